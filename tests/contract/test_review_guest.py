"""What must not be able to end guestd, or to keep it from its other work: found in review, each seen to fail before."""

from __future__ import annotations

import os
import resource
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import ChannelLostError, GuestError
from fireclaw.guest.loop import Loop
from fireclaw.machines import calls
from fireclaw.machines.calls import Exec, Exit
from fireclaw.machines.channel import Channel
from fireclaw.testing.guest import LocalGuest
from fireclaw.wire.hello import new_magic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture
async def channel() -> AsyncIterator[Channel]:
    """A session with a guestd in this process."""
    with LocalGuest() as guest:
        channel = await Channel.open(guest.connect(), new_magic())
        yield channel
        await channel.aclose()


def descriptors() -> set[int]:
    """The descriptors that this process has open; one is this look's own."""
    return {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}


@contextmanager
def few_descriptors(more: int) -> Iterator[None]:
    """Let this process open only so many descriptors more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = descriptors()
    free = [fd for fd in range(len(used) + more + 1) if fd not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[more], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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
