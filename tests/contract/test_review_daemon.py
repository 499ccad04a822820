"""What must not make the daemon unreachable or let a guest speak in our name: found in review, each seen to fail."""

from __future__ import annotations

import asyncio
import os
import shutil
from typing import TYPE_CHECKING

import pytest
from api_office import CommandLine, daemon_pid, short_home, startable_home

from fireclaw.daemon.doctor import State, _check_port
from fireclaw.daemon.irc_server import IrcServer
from fireclaw.store.database import Database
from fireclaw.store.machines import ProcessRows
from fireclaw.vmm.process import Gate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


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


@pytest.fixture
async def irc() -> AsyncIterator[IrcServer]:
    """The managed IRC server of a home."""
    with short_home() as home:
        home.make()
        database = Database(home.database)
        server = IrcServer(home, Gate(ProcessRows(database), "review00"), 0)
        await server.start()
        yield server
        await server.stop()
        database.close()


async def test_doctor_knows_our_irc_server(irc: IrcServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """While our own IRC server runs, its port counts as ours, not as taken by a stranger."""
    assert irc.settings is not None
    monkeypatch.setenv("FIRECLAW_IRC_PORT", str(irc.settings.port))

    state, reason, _ = _check_port(irc._home)

    assert (state, reason.startswith("our IRC server")) == (State.OK, True)


async def test_an_irc_server_is_started_again_once_that_is_possible(irc: IrcServer) -> None:
    """A server that died while nothing could be written is tried again, and comes back."""
    settings, child = irc.settings, irc._child
    assert settings is not None
    assert child is not None
    shutil.rmtree(irc._home.run)
    child.kill()
    await child.wait()
    await asyncio.sleep(0.1)  # its watcher has tried once

    irc._home.make()

    await settings.wait_ready(10)
