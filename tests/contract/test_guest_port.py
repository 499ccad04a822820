"""The guest's port on a kernel that tells of a host later than it delivers the host's first bytes."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from fireclaw.guest.port import Port
from fireclaw.testing.guest import LocalGuest
from fireclaw.wire.hello import echo, hello, new_magic, new_nonce

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAGIC = new_magic()


class Host:
    """The host's end of a port that does what a virtio port does: it reads as ended and goes on, or takes nothing.

    A datagram socket does so, too: an empty datagram reads as an end, and a full queue takes nothing.
    """

    def __init__(self, guest: LocalGuest) -> None:
        self._guest = guest
        self._host, self._port_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._host.settimeout(10)
        self._port_end.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self._port_end.send(b"filler")
        self._do(self._make_port)

    def _make_port(self) -> None:
        self._port = Port(self._guest.loop, self._port_end.fileno(), self._guest)

    def _do(self, action: Callable[[], None]) -> None:
        """Have something done in the guest's loop, after what was ready before."""
        for step in (lambda: None, action):
            done = threading.Event()
            self._guest.loop.call_from_thread(step)
            self._guest.loop.call_from_thread(done.set)
            assert done.wait(10)

    def send(self, data: bytes) -> None:
        """Send bytes, and wait until the guest has handled them."""
        self._host.send(data)
        self._do(lambda: None)

    def receive(self) -> bytes:
        """Receive what is not filler."""
        while (data := self._host.recv(4096)) == b"filler":
            pass
        return data

    def close(self) -> None:
        """Close both ends."""
        self._do(self._port.close)
        self._host.close()
        self._port_end.close()


@pytest.fixture
def host() -> Iterator[Host]:
    """A host at such a port."""
    with LocalGuest() as guest, contextlib.closing(Host(guest)) as host:
        yield host


def test_a_hello_that_comes_before_the_word_of_its_host_is_answered(host: Host) -> None:
    """An end that is read before the echo could leave is the last host's: the session lives, and the echo follows."""
    nonce = new_nonce()
    host.send(hello(MAGIC, nonce))
    host.send(b"")
    assert host.receive() == echo(MAGIC, nonce)


def test_an_end_after_the_echo_ends_the_session(host: Host) -> None:
    """Once the echo has left, an end is this host's; what comes after it without a hello is nobody's."""
    first, second = new_nonce(), new_nonce()
    host.send(hello(MAGIC, first))
    assert host.receive() == echo(MAGIC, first)
    host.send(b"")
    host.send(b"\0\2\0\1\0\0\0\0\0\0\0\7")  # a ping, which a session would answer
    host.send(hello(MAGIC, second))
    assert host.receive() == echo(MAGIC, second)
