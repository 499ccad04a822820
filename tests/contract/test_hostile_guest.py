"""A guest that lies to the host's end of the channel: it costs bounded memory, and the error says what it did."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import struct
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import ChannelLostError, ConflictError, FireclawError, GuestError, GuestTimeoutError
from fireclaw.machines import calls
from fireclaw.machines.calls import Exec, Execution
from fireclaw.machines.channel import Channel
from fireclaw.wire.frames import Kind, pack
from fireclaw.wire.hello import HELLO_SIZE, PREFIX, new_magic
from fireclaw.wire.mux import ACK, DATA, FIN, GO_AWAY, HEADER, MAX_STREAMS, PING, RST, SYN, WINDOW, WINDOW_UPDATE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

MIB = 1 << 20


class Guest:
    """The guest's end of a channel, in a test's hands: it says whatever the test wants.

    Attributes:
        sent: how many bytes the host has taken.
    """

    def __init__(self) -> None:
        self.host, self._socket = socket.socketpair()
        self.host.setblocking(False)
        self._socket.setblocking(False)
        self.sent = 0

    async def send(self, data: bytes) -> None:
        """Send bytes; raises ConnectionError once the host has closed the channel."""
        await asyncio.get_running_loop().sock_sendall(self._socket, data)
        self.sent += len(data)

    async def receive(self, size: int = 1 << 16) -> bytes:
        """Receive some bytes."""
        return await asyncio.get_running_loop().sock_recv(self._socket, size)

    async def greet(self) -> None:
        """Answer the host's hello as a good guest does."""
        hello = b""
        while len(hello) < HELLO_SIZE:
            hello += await self.receive(HELLO_SIZE - len(hello))
        await self.send(hello[len(PREFIX) :])

    async def frame(
        self, kind: int, flags: int = 0, stream: int = 1, length: int | None = None, data: bytes = b""
    ) -> None:
        """Send one frame of the multiplexer, honest or not."""
        await self.send(HEADER.pack(0, kind, flags, stream, len(data) if length is None else length) + data)

    async def wait_closed(self) -> None:
        """Wait until the host has closed the channel."""
        try:
            while await self.receive():
                pass
        except ConnectionError:
            pass

    def close(self) -> None:
        """Close this end."""
        self._socket.close()


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    """A guest, not greeted yet."""
    guest = Guest()
    async with asyncio.timeout(30):
        yield guest
    guest.close()
    guest.host.close()


@pytest.fixture
async def channel(guest: Guest) -> AsyncIterator[Channel]:
    """The host's end, after a good greeting."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(guest.greet())
        opening = tasks.create_task(Channel.open(guest.host, new_magic()))
    channel = opening.result()
    yield channel
    await channel.aclose()


async def started(channel: Channel) -> Execution:
    """Start a command, which is stream 1."""
    return await calls.start(channel, Exec(["true"]))


async def output_of(execution: Execution) -> bytes:
    """Read all of a command's output."""
    return b"".join([data async for _, data in execution.output()])


async def assert_lost(channel: Channel, guest: Guest, *reasons: str) -> None:
    """The host has closed the channel, says why, and begins nothing on it any more."""
    await channel.lost.wait()
    await guest.wait_closed()
    assert any(reason in channel.reason for reason in reasons), channel.reason
    with pytest.raises(ChannelLostError):
        channel.stream()


async def growth(work: Callable[[], Awaitable[object]]) -> int:
    """The most memory, in bytes, that something took above what there was."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        await work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


# -- the greeting ---------------------------------------------------------------------------------------------


async def test_silence_before_the_echo_is_a_timeout(guest: Guest) -> None:
    """A guest that never answers the hello is given up, and its channel closed."""
    with pytest.raises(GuestTimeoutError, match=r"did not answer within 0\.2 s"):
        await Channel.open(guest.host, new_magic(), 0.2)
    await guest.wait_closed()


async def test_a_flood_before_the_echo_costs_nothing(guest: Guest) -> None:
    """However much comes before the echo is thrown away, and the time limit holds."""

    async def flood() -> None:
        piece = random.Random(1).randbytes(1 << 16)
        try:
            while True:
                await guest.send(piece)
        except ConnectionError:
            pass

    async def suffer() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(flood())
            with pytest.raises(GuestTimeoutError):
                await Channel.open(guest.host, new_magic(), 0.5)

    assert await growth(suffer) < 4 * MIB
    assert guest.sent > 20 * MIB


async def test_an_end_before_the_echo_is_said(guest: Guest) -> None:
    """A guest that ends instead of answering is an error of its own."""
    guest.close()
    with pytest.raises(ChannelLostError, match="ended before it answered"):
        await Channel.open(guest.host, new_magic())


async def test_somebody_elses_echo_is_not_ours(guest: Guest) -> None:
    """An echo with another nonce, as an older session left it, does not begin the session."""
    await guest.send(new_magic() + b"\0\1" + bytes(16))
    with pytest.raises(GuestTimeoutError):
        await Channel.open(guest.host, new_magic(), 0.2)


# -- the multiplexer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nonsense", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "not a frame"),
        (b"\xff" * 100, "not a frame"),
        (HEADER.pack(0, DATA, 0, 1, 0xFFFFFFFF), "exceed the window"),
        (HEADER.pack(0, DATA, 0, 999, 0xFFFFFFFF), "exceed any window"),
        (HEADER.pack(0, DATA, 0, 1, WINDOW + 1), "exceed the window"),
        (HEADER.pack(0, WINDOW_UPDATE, 0, 1, 0xFFFFFFFF), "the window grew"),
        (HEADER.pack(0, WINDOW_UPDATE, SYN, 1, 0), "cannot be opened by the peer"),
        (HEADER.pack(0, WINDOW_UPDATE, SYN, 0, 0), "cannot be opened by the peer"),
    ],
)
async def test_frames_that_break_the_protocol(channel: Channel, guest: Guest, nonsense: bytes, reason: str) -> None:
    """Garbage, huge lengths and forbidden streams close the channel, and a command on it ends with that reason."""
    execution = await started(channel)
    await guest.send(nonsense)
    with pytest.raises(ChannelLostError, match=reason):
        await output_of(execution)
    await assert_lost(channel, guest, "the guest broke the protocol: ", reason)


async def test_data_after_the_end_of_a_stream(channel: Channel, guest: Guest) -> None:
    """A guest that goes on after it has finished a stream breaks the protocol."""
    await started(channel)
    await guest.frame(DATA, FIN)
    await guest.frame(DATA, data=b"more")
    await assert_lost(channel, guest, "exceed the window")


async def test_streams_of_the_guests_own_are_refused(channel: Channel, guest: Guest) -> None:
    """Whatever the guest opens is reset and forgotten; the channel works on."""
    for stream in range(2, 2000, 2):
        await guest.frame(WINDOW_UPDATE, SYN, stream)
    answers = b""
    while answers.count(HEADER.pack(0, DATA, RST, 1998, 0)) < 1:
        answers += await guest.receive()
    assert channel._mux.streams == []
    execution = await started(channel)
    await guest.frame(DATA, data=pack(Kind.EXIT, b'{"status": 3}'))
    assert await output_of(execution) == b""
    assert execution.exit is not None
    assert execution.exit.status == 3


@pytest.mark.parametrize("kind", ["streams", "pings"])
async def test_a_flood_whose_answers_nobody_fetches(channel: Channel, guest: Guest, kind: str) -> None:
    """A guest that asks without end and reads no answer is cut off before the answers fill the memory."""

    async def flood() -> None:
        for first in range(2, 1 << 31, 4000):
            if kind == "streams":
                frames = [HEADER.pack(0, WINDOW_UPDATE, SYN, stream, 0) for stream in range(first, first + 4000, 2)]
            else:
                frames = [HEADER.pack(0, PING, SYN, 0, 7)] * 2000
            try:
                await guest.send(b"".join(frames))
            except ConnectionError:
                return

    assert await growth(flood) < 4 * MIB
    await channel.lost.wait()
    assert "asks without end" in channel.reason


async def test_answers_that_nobody_asked_for_are_ignored(channel: Channel, guest: Guest) -> None:
    """Frames for streams that are no more, pongs and goodbyes change nothing."""
    for flags in (0, ACK, FIN, RST):
        await guest.frame(DATA, flags, 77, data=b"" if flags else b"late")
        await guest.frame(WINDOW_UPDATE, flags, 77, 10)
    await guest.frame(PING, ACK, 0, 5)
    await guest.frame(GO_AWAY, 0, 0, 1)
    execution = await started(channel)
    await guest.frame(DATA, data=pack(Kind.STDOUT, b"fine") + pack(Kind.EXIT, b'{"status": 0}'))
    assert await output_of(execution) == b"fine"


async def test_output_that_nobody_reads_stops_at_a_window(channel: Channel, guest: Guest) -> None:
    """A stream whose reader is away holds one window, in pieces however small, and one byte more ends the channel."""
    await started(channel)

    async def fill() -> None:
        byte = HEADER.pack(0, DATA, 0, 1, 1) + b"x"
        for _ in range(WINDOW // 1024):
            await guest.send(byte * 1024)
        await guest.frame(DATA, data=b"y")
        await channel.lost.wait()

    assert await growth(fill) < 8 * MIB
    await assert_lost(channel, guest, "1 bytes exceed the window")


async def test_a_guest_that_reads_nothing_stops_the_sender(channel: Channel, guest: Guest) -> None:
    """While the guest takes nothing, a writer waits, little is kept for it, and its end ends the waiting."""
    execution = await started(channel)
    writer = asyncio.create_task(execution.write(bytes(64 * MIB)))

    async def wait() -> None:
        done, _ = await asyncio.wait({writer}, timeout=0.5)
        assert not done

    assert await growth(wait) < 4 * MIB
    guest.close()
    with pytest.raises(ChannelLostError):
        await writer


async def test_no_more_streams_than_the_limit(channel: Channel, guest: Guest) -> None:
    """Commands that the guest never ends fill the channel's streams; the next one is refused with the reason."""
    executions = [await started(channel) for _ in range(MAX_STREAMS)]
    with pytest.raises(ConflictError, match="the machine is busy"):
        await started(channel)
    await guest.frame(DATA, FIN, 1, data=pack(Kind.EXIT, b'{"status": 0}'))
    await output_of(executions[0])
    executions[0].abort()
    await started(channel)


# -- calls ----------------------------------------------------------------------------------------------------


async def test_silence_instead_of_an_answer_is_a_timeout_of_that_call(channel: Channel, guest: Guest) -> None:
    """A call that is not answered ends at its time limit; other calls go on."""
    with pytest.raises(GuestTimeoutError, match="did not answer 'info'"):
        await calls.call(channel, "info", 0.1)
    execution = await started(channel)  # stream 3
    await guest.frame(DATA, 0, 3, data=pack(Kind.EXIT, b'{"status": 0}'))
    assert await output_of(execution) == b""


async def test_an_end_without_a_status_is_never_a_status(channel: Channel, guest: Guest) -> None:
    """A stream that ends, a stream that is reset and a channel that ends are each an error, not an exit."""
    ended, reset, lost = [await started(channel) for _ in range(3)]
    await guest.frame(DATA, FIN, 1, data=pack(Kind.STDOUT, b"half"))
    await guest.frame(DATA, RST, 3)
    with pytest.raises(ChannelLostError, match="without an exit status"):
        await output_of(ended)
    with pytest.raises(ChannelLostError, match="reset the stream"):
        await output_of(reset)
    guest.close()
    with pytest.raises(ChannelLostError, match=r"closed the channel|connection ended"):
        await output_of(lost)
    assert [execution.exit for execution in (ended, reset, lost)] == [None] * 3


@pytest.mark.parametrize(
    "frames",
    [
        b"\xff" * 16,
        struct.pack(">BI", Kind.STDOUT, 0xFFFFFFFF),
        pack(Kind.STDIN, b"echo"),
        pack(Kind.EXIT, b"0"),
        pack(Kind.EXIT, b"{}"),
        pack(Kind.EXIT, b'{"status": "0"}'),
        pack(Kind.EXIT, b'{"status": 256}'),
        pack(Kind.EXIT, b'{"status": -1}'),
        pack(Kind.EXIT, b'{"status": null}'),
        pack(Kind.EXIT, b'{"status": true}'),
        pack(Kind.EXIT, b'{"status": 0, "error": 7}'),
        pack(Kind.EXIT, b'{"status": 0, "error": "words where none are called for"}'),
        pack(Kind.EXIT, b"\xff\xfe"),
        pack(Kind.EXIT, b"[" * 50_000),
    ],
)
async def test_nonsense_instead_of_output(channel: Channel, guest: Guest, frames: bytes) -> None:
    """Frames that are no output, and exits without a good status, end that command with an error, not with a status."""
    execution = await started(channel)
    await guest.frame(DATA, data=frames)
    with pytest.raises(GuestError, match="nonsense"):
        await output_of(execution)
    assert execution.exit is None
    assert not channel.lost.is_set()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"not json\n", "the guest's answer is "),
        (b"[]\n", "the guest's answer is "),
        (b"[" * 50_000 + b"\n", "the guest's answer is "),
        (b'{"error": {"a": 1}, "errno": "x"}\n', "{'a': 1}"),
    ],
)
async def test_nonsense_instead_of_an_answer(channel: Channel, guest: Guest, answer: bytes, reason: str) -> None:
    """An answer that is no JSON object, has no end, or is an error of strange types is an error of that call."""
    calling = asyncio.create_task(calls.call(channel, "info"))
    await guest.receive()
    await guest.frame(DATA, data=answer)
    with pytest.raises(GuestError) as caught:
        await calling
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert not channel.lost.is_set()


async def test_an_answer_without_an_end(channel: Channel, guest: Guest) -> None:
    """A guest whose answer never ends is cut off after a megabyte or so."""
    calling = asyncio.create_task(calls.call(channel, "info"))
    await guest.receive()

    async def babble() -> None:
        while not calling.done():
            await guest.frame(DATA, data=b"x" * (WINDOW // 2))
            await guest.receive()  # half a window more, or a reset

    assert await growth(babble) < 8 * MIB
    with pytest.raises(GuestError, match="a line of over"):
        await calling
    assert guest.sent < 2 * MIB


async def test_a_file_larger_than_asked_for(channel: Channel, guest: Guest) -> None:
    """A guest that sends more of a file than was asked for is cut off."""
    reading = asyncio.create_task(calls.read_file(channel, "/x", 1000))
    await guest.receive()
    await guest.frame(DATA, data=b'{"size": 5}\n' + bytes(100_000))
    with pytest.raises(GuestError, match="more than the 1000 bytes"):
        await reading


async def test_a_long_reason_is_cut(channel: Channel, guest: Guest) -> None:
    """What the guest gives as its reason is kept short."""
    execution = await started(channel)
    await guest.frame(DATA, data=pack(Kind.EXIT, json.dumps({"status": 127, "error": "x" * 50_000}).encode()))
    await output_of(execution)
    assert execution.exit is not None
    assert 0 < len(execution.exit.error) <= 1000


@pytest.mark.parametrize("seed", range(20))
async def test_random_bytes_never_hang_a_call(guest: Guest, seed: int) -> None:
    """Whatever a guest sends after its echo, in whatever pieces, a call ends with one of our errors in its time."""
    chance = random.Random(seed)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(guest.greet())
        opening = tasks.create_task(Channel.open(guest.host, new_magic()))
    channel = opening.result()
    calling = asyncio.create_task(calls.call(channel, "info", 0.3))
    try:
        for _ in range(50):
            kind, flags, stream = chance.randrange(4), chance.choice([0, 0, 0, ACK, FIN, RST, SYN]), chance.randrange(4)
            payload = chance.randbytes(chance.randrange(200))
            length = len(payload) if chance.random() < 0.9 else chance.randrange(1 << 32)
            await guest.frame(kind, flags, stream, length, payload if kind == DATA else b"")
    except ConnectionError:
        pass
    with pytest.raises(FireclawError):
        await calling
    await channel.aclose()
