"""The guest's end of the channel: the port, its hellos, and one session at a time.

Reads and writes never block. Nothing is written before a hello, since a port that nobody reads keeps what is written
for the next who connects.
"""

from __future__ import annotations

import os
import select
from typing import TYPE_CHECKING

from fireclaw.guest.session import Session
from fireclaw.wire.hello import HelloError, HelloFinder, echo
from fireclaw.wire.mux import HIGH_WATER, MuxError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fireclaw.guest.loop import Loop
    from fireclaw.guest.session import Host

_READ = select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR
_READ_SIZE = 65536
_READS_A_ROUND = 64


class Port:
    """Owns the descriptor of the channel.

    Args:
        loop: calls back when the port can be read or written.
        fd: the virtio-serial port, a vsock connection, or a socket (the double for tests); non-blocking.
        host: what sessions may use.
        on_end: called when the other end is gone (a socket's end-of-file or reset; a virtio port just waits).
        magic: what begins a session, if it is known already.
    """

    def __init__(
        self, loop: Loop, fd: int, host: Host, on_end: Callable[[], None] | None = None, magic: bytes = b""
    ) -> None:
        self._loop = loop
        self._fd = fd
        self._host = host
        self._on_end = on_end
        self._hellos = HelloFinder()
        self._hellos.magic = magic
        self._session: Session | None = None
        self._buffer: bytes | memoryview = b""
        self._greeted = False  # something of the session has left
        self._closed = False
        # While no host is connected a virtio port reports a level-triggered hang-up without end: so it stands
        # edge-triggered in an epoll of its own, which the loop watches.
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
        loop.add_reader(self._epoll.fileno(), self._ready)

    @property
    def magic(self) -> bytes:
        """What begins a session by now; empty before the first hello."""
        return self._hellos.magic

    def _ready(self) -> None:
        for _, events in self._epoll.poll(0):
            if events & _READ:
                self._read()
            if events & select.EPOLLOUT:
                self.flush()

    def _read(self) -> None:
        if self._closed:  # since this was planned
            return
        for _ in range(_READS_A_ROUND):
            try:
                data = os.read(self._fd, _READ_SIZE)
            except BlockingIOError:
                return
            except OSError:  # a reset; after a restore vsock calls it "not connected"
                data = b""
            if not data:
                # A virtio port may deliver a host's hello before the word that the host is there. Until then it
                # takes no echo and reads as ended: that end is the last host's, not this one's.
                if self._greeted:
                    self._drop()
                if self._on_end is not None:
                    self._on_end()
                return
            self._receive(data)
        self._loop.call_from_thread(self._read)  # edges come once: go on after the others had a turn

    def _receive(self, data: bytes) -> None:
        try:
            data, nonce, rest = self._hellos.feed(data)
        except HelloError as error:
            self._drop()
            self._host.log(f"{error}")
            return
        if nonce is not None:
            self._drop()
            self._session = Session(self._host, self.flush, self._rekey)
            self._buffer = echo(self._hellos.magic, nonce)
            data = rest
        if self._session is not None and data:
            try:
                self._session.receive(data)
            except MuxError as error:
                self._host.log(f"session dropped: {error}")
                self._drop()
        self.flush()

    def _rekey(self, magic: bytes) -> None:
        self._hellos.magic = magic

    def _drop(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
        self._buffer = b""
        self._greeted = False

    def close(self) -> None:
        """End the session and give the port's epoll back; the descriptor stays the caller's."""
        self._closed = True
        self._drop()
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def flush(self) -> None:
        """Write what is pending, as far as the host reads."""
        session = self._session
        while session is not None:
            if not self._buffer:
                self._buffer = session.mux.take()
                if not self._buffer:
                    break
            try:
                count = os.write(self._fd, self._buffer)
            except BlockingIOError:
                break
            except OSError as error:  # the host is gone; its hang-up or next hello follows
                self._host.log(f"write: {error}")
                self._buffer = b""
                break
            self._greeted = True
            self._buffer = memoryview(self._buffer)[count:] if count < len(self._buffer) else b""
        if session is not None:
            session.congested = len(self._buffer) + session.mux.pending > HIGH_WATER
            if not session.congested:
                session.resume()
