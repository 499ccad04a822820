"""The channel on a VMM with vsock: connections come one after another, and the newest is the host's."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING

import pytest
from review_limits import descriptors, few_descriptors

from fireclaw.errors import ChannelLostError, GuestTimeoutError
from fireclaw.guest.listener import Listener, is_from_host
from fireclaw.machines import calls
from fireclaw.machines.calls import Exec
from fireclaw.machines.channel import Channel
from fireclaw.testing.guest import LocalGuest
from fireclaw.wire.hello import echo, hello, new_magic, new_nonce

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MAGIC = new_magic()


class Door:
    """A guest that listens on a unix socket, as it does on a vsock port."""

    def __init__(self, guest: LocalGuest, path: Path) -> None:
        self.guest = guest
        self.path = str(path)
        self._listener = Listener(guest.loop, guest)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(self.path)
        sock.listen()
        self.do(lambda: self._listener.listen(sock))

    def do(self, action: Callable[[], None]) -> None:
        """Have something done in the guest's loop, after what was ready before."""
        for step in (lambda: None, action):
            done = threading.Event()
            self.guest.loop.call_from_thread(step)
            self.guest.loop.call_from_thread(done.set)
            assert done.wait(10)

    def connect(self) -> socket.socket:
        """Connect, as the host does."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(self.path)
        sock.setblocking(False)
        return sock

    async def open(self, magic: bytes = MAGIC, seconds: float = 10) -> Channel:
        """Connect and begin a session."""
        return await Channel.open(self.connect(), magic, seconds)

    def serve(self, connection: socket.socket) -> None:
        """Hand over a connection."""
        self.do(lambda: self._listener.serve(connection))

    def close(self) -> None:
        """Listen no more."""
        self.do(self._listener.close)


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    """A guest that listens."""
    with LocalGuest() as guest, contextlib.closing(Door(guest, tmp_path / "door")) as door:
        yield door


async def works(channel: Channel) -> bool:
    """Whether the guest answers calls."""
    return "uptime" in await calls.call(channel, "info", 10)


async def start_sleeper(channel: Channel) -> int:
    """Start a command that runs for long; return a pidfd of it."""
    execution = await calls.start(channel, Exec(["sh", "-c", "echo $$; exec sleep 600"]))
    async for _, data in execution.output():
        return os.pidfd_open(int(data))
    raise AssertionError("it said nothing")


def has_ended(pidfd: int) -> bool:
    """Wait for a process's end, which must come, and close its descriptor."""
    try:
        return bool(select.select([pidfd], [], [], 10)[0])
    finally:
        os.close(pidfd)


async def test_connections_come_one_after_another(door: Door) -> None:
    """When a connection ends, its commands end, too, and the next one begins anew with the same magic."""
    first = await door.open()
    sleeper = await start_sleeper(first)
    await first.aclose()

    assert has_ended(sleeper)
    second = await door.open()
    assert await works(second)
    await second.aclose()


async def test_a_newer_connection_replaces_the_older(door: Door) -> None:
    """Whoever connects next is served at once; what the older one ran ends, and it is told."""
    older = await door.open()
    sleeper = await start_sleeper(older)
    newer = await door.open()

    assert has_ended(sleeper)
    await older.lost.wait()
    assert await works(newer)
    with pytest.raises(ChannelLostError):
        await calls.call(older, "info")
    await newer.aclose()
    await older.aclose()


async def test_who_says_nothing_blocks_nobody(door: Door) -> None:
    """A connection that never says hello, or only half of one, gives way, and nothing of it is left in the next."""
    with door.connect() as silent, door.connect() as half:
        half.send(hello(new_magic(), new_nonce())[:-20])
        door.do(lambda: None)
        channel = await door.open()
        assert await works(channel)
        assert silent.recv(1) == b""
        await channel.aclose()


async def test_the_magic_outlives_its_connection(door: Door) -> None:
    """The guest answers to what its first hello or its identity said, on later connections as on the same."""
    template, own = new_magic(), new_magic()
    channel = await door.open(template)
    await channel.aclose()

    with pytest.raises(GuestTimeoutError):
        await door.open(new_magic(), 0.2)
    channel = await door.open(template)
    await calls.give_identity(channel, "worker", own)
    await channel.aclose()

    with pytest.raises(GuestTimeoutError):
        await door.open(template, 0.2)
    channel = await door.open(own)
    assert await works(channel)
    await channel.aclose()


async def test_a_reset_connection_is_over(door: Door) -> None:
    """After a restore old connections are reset: their commands end, and the guest goes on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = socket.create_connection(server.getsockname())
        door.serve(server.accept()[0])
        host.setblocking(False)
        channel = await Channel.begin(host.dup(), MAGIC)
        await channel.wait_ready()
        sleeper = await start_sleeper(channel)
        host.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        host.close()
        await channel.aclose()

    assert has_ended(sleeper)
    channel = await door.open()
    assert await works(channel)
    await channel.aclose()


async def test_a_connection_that_is_none_any_more_is_over(door: Door) -> None:
    """What vsock says of a connection that a restore cut, "not connected", ends that connection and no more."""
    door.serve(socket.socket(socket.AF_INET, socket.SOCK_STREAM))

    channel = await door.open()
    assert await works(channel)
    await channel.aclose()


async def test_many_connections_leave_nothing(door: Door) -> None:
    """A hundred that come and go cost no descriptor, and the next is served."""
    channel = await door.open()
    before = len(descriptors())
    for index in range(100):
        with door.connect() as sock:
            sock.send(hello(MAGIC, new_nonce()) if index % 2 else os.urandom(100))
    await channel.aclose()

    channel = await door.open()
    assert await works(channel)
    assert len(descriptors()) == before
    await channel.aclose()


async def test_without_descriptors_the_older_session_gives_way(door: Door) -> None:
    """A session that holds all descriptors cannot keep the next connection waiting."""
    older = await door.open()
    sleeper = await start_sleeper(older)
    nonce = new_nonce()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as waiting, few_descriptors(0), socket.socket():
        waiting.settimeout(10)
        waiting.connect(door.path)
        assert has_ended(sleeper)
        waiting.send(hello(MAGIC, nonce))
        assert waiting.recv(100) == echo(MAGIC, nonce)
    await older.aclose()


async def test_the_double_is_handed_connections() -> None:
    """``LocalGuest.serve`` is what a VMM's double calls for each connection of the host."""
    with LocalGuest() as guest:
        for _ in range(2):
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            guest.serve(theirs)
            channel = await Channel.open(ours, MAGIC)
            assert await works(channel)
        await channel.aclose()


def test_only_the_hosts_vsock_is_let_in() -> None:
    """A vsock connection must come from context 2, the host; the guest's own contexts and the loopback are not."""
    assert is_from_host(socket.AF_VSOCK, (2, 1_073_741_824))
    assert not any(is_from_host(socket.AF_VSOCK, (cid, 1024)) for cid in (0, 1, 3, 0xFFFF_FFFF))
