"""The channel on a VMM with vsock: a listening socket, whose connections are served one at a time.

A newer connection replaces the older one: after a restore the older one is dead, and whoever adopts a machine
connects while that of a dead daemon may linger. The magic goes from one connection to the next (see
``fireclaw.wire.hello``): a clone answers to what its template or its identity gave it, and to nothing else.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from fireclaw.guest.port import Port

if TYPE_CHECKING:
    from fireclaw.guest.loop import Loop
    from fireclaw.guest.session import Host

_BACKLOG = 16


def listen_vsock(port: int) -> socket.socket:
    """Listen for the host."""
    sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    sock.bind((socket.VMADDR_CID_ANY, port))
    sock.listen(_BACKLOG)
    return sock


def is_from_host(family: int, peer: object) -> bool:
    """Whether a connection comes from the host, by its peer's address.

    Commands may open vsock sockets, too, and a kernel with a loopback for them would carry those to us.
    """
    return family != socket.AF_VSOCK or (isinstance(peer, tuple) and peer[0] == socket.VMADDR_CID_HOST)


class Listener:
    """Serves connections with ``host``.

    ::

        listener = Listener(loop, guest)
        listener.listen(listen_vsock(VSOCK_PORT))     # accepts from now on
        listener.serve(connection)                    # or is handed one
        listener.close()
    """

    def __init__(self, loop: Loop, host: Host) -> None:
        self._loop = loop
        self._host = host
        self._listening: socket.socket | None = None
        self._connection: socket.socket | None = None
        self._port: Port | None = None
        self._magic = b""

    def listen(self, sock: socket.socket) -> None:
        """Accept the connections of a listening socket, which belongs to the listener from now on."""
        sock.setblocking(False)
        self._listening = sock
        self._loop.add_reader(sock.fileno(), lambda: self._accept(sock))

    def _accept(self, sock: socket.socket) -> None:
        try:
            connection, peer = sock.accept()
        except (BlockingIOError, ConnectionError):
            return  # it was gone before we came
        except OSError as error:
            # Out of descriptors: the session that holds them is to be replaced anyway. The next round accepts.
            self._host.log(f"accept: {error}")
            self._end()
            return
        if is_from_host(sock.family, peer):
            self.serve(connection)
        else:
            connection.close()

    def serve(self, connection: socket.socket) -> None:
        """Serve a connection in place of the one before; it belongs to the listener from now on."""
        self._end()
        connection.setblocking(False)
        self._connection = connection
        self._port = Port(self._loop, connection.fileno(), self._host, on_end=self._end, magic=self._magic)

    def _end(self) -> None:
        """End the present connection and its session, if there is one."""
        if self._port is not None and self._connection is not None:
            self._magic = self._port.magic
            self._port.close()
            self._connection.close()
            self._port = self._connection = None

    def close(self) -> None:
        """End what is served and accept no more."""
        self._end()
        if self._listening is not None:
            self._loop.remove_reader(self._listening.fileno())
            self._listening.close()
            self._listening = None
