"""What must not make the daemon unreachable or let a guest speak in our name: found in review, each seen to fail."""

from __future__ import annotations

import asyncio
import os
import shutil
from typing import TYPE_CHECKING

import pytest
from api_office import CommandLine, daemon_pid, startable_home

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def line() -> Iterator[CommandLine]:
    """A command line whose daemons are real processes over fake supervisors."""
    with startable_home() as line:
        yield line


async def test_a_daemon_out_of_reach_makes_room(line: CommandLine) -> None:
    """A daemon whose run folder was removed (a logout may do that) ends, so that the next verb gets a new one."""
    await line.call("run", "--", "cat")
    pid = daemon_pid(line.home)
    assert pid is not None
    ended = os.pidfd_open(pid)

    shutil.rmtree(line.home.run)

    async with asyncio.timeout(10):
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(ended, gone.set)
        await gone.wait()
        asyncio.get_running_loop().remove_reader(ended)
    os.close(ended)
    assert (await line.call("run", "--", "cat", stdin=b"x"))[:2] == (0, b"x")
