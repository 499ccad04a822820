"""The host's side of a fake vsock device: one Unix socket, where ``CONNECT <port>`` leads to a port of the guest.

What makes it worth having is when it does *not* answer. Before the guest's driver is up nobody even accepts. While the
VM is paused by an API call nothing moves. After a bare pause and resume (upstream issue 6100) a gate stays shut: every
byte and every request to the guest waits, for good, until a snapshot/create, even one that fails, lets the guest answer
a reset event. That event, in turn, ends all connections; a clone is born with it.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

from fireclaw.testing.firecracker.guest import PORT
from fireclaw.testing.firecracker.script import Connect

if TYPE_CHECKING:
    from collections.abc import Callable

    from fireclaw.guest.loop import Loop
    from fireclaw.testing.firecracker.guest import GuestEnd
    from fireclaw.testing.firecracker.script import Script
    from fireclaw.testing.firecracker.sinks import Metrics

FIRST_PORT: Final = 1 << 30
_SHORTEST: Final = len(b"connect 0\n")
_LONGEST: Final = 32
_PIECE: Final = 65536
_BACKLOG: Final = 128
_GATED: Final = (1, 16)  # the releases with the gate


class Vsock:
    """The device.

    ::

        made, bound → activate() → accepts, connects ⇄ freeze(), resume()
                                                     save() → a reset follows

    Args:
        loop: calls back.
        path: of the socket; bound at once.
        metrics: counts connections and bytes.
        script: how the first CONNECTs end, and which version this is.

    Raises:
        OSError: the path is taken, or cannot be.
    """

    def __init__(self, loop: Loop, path: str, metrics: Metrics, script: Script) -> None:
        self._loop = loop
        self._metrics = metrics
        self._connects = iter(script.connects)
        self._has_gate = script.version_tuple[:2] == _GATED
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setblocking(False)
        try:
            self._listener.bind(path)
        except OSError:
            self._listener.close()
            raise
        self._listener.listen(_BACKLOG)
        self._guest: GuestEnd | None = None
        self._new: set[socket.socket] = set()  # accepted, their CONNECT not here yet
        self._waiting: dict[socket.socket, tuple[int, int]] = {}  # asked for: (guest's port, host's port)
        self._links: set[_Link] = set()
        self._frozen = False
        self._gated = False
        self._halted = False
        self._guest_stopped = False  # loaded, and not resumed yet
        self._reset_sent = False
        self.active = False
        self.last_port = FIRST_PORT - 1

    def activate(self, guest: GuestEnd | None) -> None:
        """The guest's driver is up; without a guest's end nobody listens in it."""
        self._guest = guest
        self.active = True
        if not self._frozen:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def restore(self, guest: GuestEnd | None, *, active: bool, last_port: int) -> None:
        """Begin as a clone: its guest stands still, and finds the reset event when it goes on."""
        self._guest_stopped = True
        self._reset_sent = active
        self.last_port = last_port
        if active:
            self.activate(guest)

    def freeze(self) -> None:
        """Stop moving anything: what an API pause does to all devices."""
        self._frozen = True
        for sock in (self._listener, *self._new):
            self._loop.remove_reader(sock.fileno())
        for link in self._links:
            link.stop()

    def save(self, *, running: bool) -> None:
        """A snapshot is being made, or was tried: the guest is sent the reset event."""
        if not self.active:
            return
        self._reset_sent = True
        if running:
            self._answer_reset()

    def resume(self) -> None:
        """The guest goes on; so does the device, unless the gate is shut."""
        self._gated = self._halted or (self.active and self._has_gate)
        if self._reset_sent:
            self._answer_reset()
        self._frozen = self._guest_stopped = False
        if self.active:
            self._loop.add_reader(self._listener.fileno(), self._accept)
        for sock in self._new:
            self._await_command(sock)
        if not self._gated:
            for link in self._links:
                link.start()

    def halt(self) -> None:
        """The guest is gone for good, and the process is not: nothing reaches it any more."""
        self._gated = self._halted = True
        for link in self._links:
            link.stop()

    def close(self) -> None:
        """Give everything back but the socket's file, which stays."""
        self.freeze()
        for sock in (*self._new, *self._waiting, self._listener):
            sock.close()
        for link in set(self._links):
            link.close()
        if self._guest is not None:
            self._guest.close()

    def _answer_reset(self) -> None:
        """The guest ends all its connections. Requests that waited behind the gate reach it only after that."""
        self._reset_sent = False
        if self._halted:
            return
        self._gated = False
        for link in set(self._links):
            link.close()
        waiting, self._waiting = self._waiting, {}
        for sock, (port, host_port) in waiting.items():
            if self._guest_stopped:  # a clone's guest gets request and reset together, and answers both
                self._greet(sock, host_port)
                sock.close()
            else:
                self._reach(sock, port, host_port)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except BlockingIOError:
            return
        sock.setblocking(False)
        self._new.add(sock)
        self._await_command(sock)

    def _await_command(self, sock: socket.socket) -> None:
        self._loop.add_reader(sock.fileno(), lambda: self._command(sock))

    def _command(self, sock: socket.socket) -> None:
        self._loop.remove_reader(sock.fileno())
        self._new.remove(sock)
        port = _read_command(sock)
        if port is None:
            sock.close()
            return
        self.last_port += 1
        self._metrics.count("vsock", "conns_added")
        self._reach(sock, port, self.last_port)

    def _reach(self, sock: socket.socket, port: int, host_port: int) -> None:
        """Ask the guest for a connection."""
        if self._gated or self._guest_stopped:
            self._waiting[sock] = (port, host_port)
            return
        scripted = next(self._connects, None)
        if scripted is Connect.HANG:
            self._waiting[sock] = (port, host_port)
        elif scripted is None and port == PORT and self._guest is not None:
            self._greet(sock, host_port)
            link = _Link(self._loop, sock, self._guest.dial(), self._metrics, self._links.discard)
            self._links.add(link)
            link.start()
        else:
            if scripted is Connect.RESET:
                self._greet(sock, host_port)
            sock.close()

    def _greet(self, sock: socket.socket, host_port: int) -> None:
        try:
            sock.send(f"OK {host_port}\n".encode())
        except OSError:
            return  # it is gone already; whoever reads it next will see


def _read_command(sock: socket.socket) -> int | None:
    """The port that a CONNECT asks for; None for anything else, a command that is not all there yet included."""
    try:
        command = sock.recv(_SHORTEST)
        if len(command) < _SHORTEST:
            return None
        while not command.endswith(b"\n") and len(command) < _LONGEST:
            letter = sock.recv(1)
            if not letter:
                return None
            command += letter
    except OSError:
        return None
    words = command.decode(errors="replace").split()
    if len(words) < 2 or words[0].lower() != "connect" or not words[1].isdecimal() or int(words[1]) >= 1 << 32:
        return None
    return int(words[1])


class _Link:
    """Moves bytes between two sockets; the end of either ends both, as vsock has no half-closed streams here."""

    def __init__(
        self,
        loop: Loop,
        host: socket.socket,
        guest: socket.socket,
        metrics: Metrics,
        on_end: Callable[[_Link], None],
    ) -> None:
        self._loop = loop
        self._ends = {host: guest, guest: host}
        self._names = {host: "rx_bytes_count", guest: "tx_bytes_count"}
        self._left: dict[socket.socket, bytes] = {}  # what did not fit, by where it goes
        self._metrics = metrics
        self._on_end = on_end

    def start(self) -> None:
        for source, target in self._ends.items():
            if target in self._left:
                self._await_room(source, target)
            else:
                self._await_bytes(source, target)

    def stop(self) -> None:
        for sock in self._ends:
            self._loop.remove_reader(sock.fileno())
            self._loop.remove_writer(sock.fileno())

    def close(self) -> None:
        self.stop()
        for sock in self._ends:
            sock.close()
        self._metrics.count("vsock", "conns_removed")
        self._on_end(self)

    def _await_bytes(self, source: socket.socket, target: socket.socket) -> None:
        self._loop.add_reader(source.fileno(), lambda: self._move(source, target))

    def _await_room(self, source: socket.socket, target: socket.socket) -> None:
        self._loop.add_writer(target.fileno(), lambda: self._flush(source, target))

    def _move(self, source: socket.socket, target: socket.socket) -> None:
        try:
            data = source.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self._metrics.count("vsock", self._names[source], len(data))
        self._left[target] = data
        self._loop.remove_reader(source.fileno())
        self._flush(source, target)

    def _flush(self, source: socket.socket, target: socket.socket) -> None:
        try:
            count = target.send(self._left[target])
        except BlockingIOError:
            count = 0
        except OSError:
            self.close()
            return
        self._left[target] = self._left[target][count:]
        if self._left[target]:
            self._await_room(source, target)
        else:
            del self._left[target]
            self._loop.remove_writer(target.fileno())
            self._await_bytes(source, target)
