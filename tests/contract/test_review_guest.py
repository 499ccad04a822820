"""What must not be able to end guestd, or to keep it from its other work: found in review, each seen to fail before."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from review_limits import descriptors, few_descriptors

from fireclaw.errors import ChannelLostError, GuestError
from fireclaw.guest.loop import Loop
from fireclaw.machines import calls
from fireclaw.machines.calls import Exec, Exit
from fireclaw.machines.channel import Channel
from fireclaw.testing.guest import LocalGuest
from fireclaw.wire.frames import Kind, pack
from fireclaw.wire.hello import new_magic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def channel() -> AsyncIterator[Channel]:
    """A session with a guestd in this process."""
    with LocalGuest() as guest:
        channel = await Channel.open(guest.connect(), new_magic())
        yield channel
        await channel.aclose()


async def finish(channel: Channel, *argv: str) -> Exit | None:
    """Run a command to its end."""
    execution = await calls.start(channel, Exec(argv))
    async for _ in execution.output():
        pass
    return execution.exit


async def test_a_command_without_descriptors_is_126_and_costs_none(channel: Channel) -> None:
    """Where there are no descriptors left for its pipes, a command ends with 126 and the reason, and leaks none."""
    assert await finish(channel, "true") == Exit(0)
    before = len(descriptors())

    for more in (1, 2, 3, 4):
        with few_descriptors(more):
            exit_ = await finish(channel, "true")
        assert exit_ == Exit(126, "Too many open files")

    assert await finish(channel, "true") == Exit(0)
    assert len(descriptors()) == before


async def test_a_file_that_cannot_be_read_ends_only_its_stream(channel: Channel) -> None:
    """A file that opens and then refuses to be read is an error of that call; guestd goes on."""
    with pytest.raises(ChannelLostError, match="reset"):
        await calls.read_file(channel, "/proc/self/mem", 10)

    assert await finish(channel, "true") == Exit(0)


@pytest.mark.parametrize("said", [b"[" * 60_000, b'{"signal": Infinity}', b'{"signal": "9"}', b"7", b"\xff"])
async def test_a_bad_signal_ends_only_its_command(channel: Channel, said: bytes) -> None:
    """A client's frame that is no signal ends the command that it was for; guestd goes on."""
    execution = await calls.start(channel, Exec(["sleep", "60"], stdin=True))
    await execution.forward(pack(Kind.SIGNAL, said))

    with pytest.raises(ChannelLostError, match="reset"):
        _ = [each async for each in execution.output()]

    assert await finish(channel, "true") == Exit(0)


async def test_a_large_file_that_cannot_be_written_is_told_at_once(channel: Channel) -> None:
    """The reason reaches a host that still has more to send than a stream's window."""
    with pytest.raises(GuestError, match="No such file"):
        await calls.write_file(channel, "/no/such/folder/file", bytes(1_000_000), timeout_s=5)


def test_a_call_that_asks_for_another_turn_waits_for_the_others() -> None:
    """Who goes on in a later turn of the loop lets ready descriptors have theirs in between."""
    loop = Loop()
    read, write = os.pipe()
    os.write(write, b"x")
    turns = 0

    def again() -> None:
        nonlocal turns
        turns += 1
        if turns < 100:
            loop.call_from_thread(again)
        else:
            loop.stop()

    loop.add_reader(read, loop.stop)
    loop.call_from_thread(again)
    loop.run()

    assert turns < 100
    for fd in (read, write):
        os.close(fd)
    loop.close()


async def test_commands_in_a_row_use_nothing_up(channel: Channel) -> None:
    """More commands than a session has streams run one after the other, and leave no descriptor open."""
    await finish(channel, "true")
    before = len(descriptors())

    for _ in range(300):
        assert await finish(channel, "true") == Exit(0)

    assert len(descriptors()) == before
