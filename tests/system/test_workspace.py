"""Workspaces in machines, on whichever VMM the settings name: what is written there outlives the machine."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import TYPE_CHECKING

import pytest
from exec_rules import sh
from workspace_drives import file_on, open_tried_rooms

from fireclaw.errors import ConflictError
from fireclaw.machines import calls
from fireclaw.machines.calls import Exec
from fireclaw.machines.workspace import make_workspace
from fireclaw.store.machines import Purpose

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fireclaw.daemon.rooms import Rooms
    from fireclaw.machines.machine import Machine
    from fireclaw.paths import Home

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
async def rooms(home: Home) -> AsyncIterator[Rooms]:
    """The daemon's rooms on the VMM that is tried."""
    async with open_tried_rooms(home) as rooms:
        yield rooms


@pytest.fixture
async def drive(rooms: Rooms) -> Path:
    """A new workspace."""
    path = rooms.home.workspaces / "drive"
    await asyncio.to_thread(make_workspace, path, 16)
    return path


async def start(rooms: Rooms, drive: Path | None) -> Machine:
    """A machine with that workspace."""
    machine = await rooms.machines.create(Purpose.NAMED, workspace=drive)
    await machine.settled()
    return machine


async def test_the_workspace_belongs_to_the_confined_user(rooms: Rooms, drive: Path) -> None:
    """An agent's command finds an empty folder of its own, where setuid programs and devices mean nothing."""
    machine = await start(rooms, drive)
    script = "stat -c '%U %F' /workspace; cd /workspace; echo mine > file; rmdir lost+found; ls -A; cat file"
    execution = await calls.start(machine.channel, Exec(["sh", "-c", script], user="1000:1000", confined=True))
    said = b"".join([data async for _, data in execution.output()]).decode()
    assert said == "agent directory\nfile\nmine\n"
    status, out, _ = await sh(machine.channel, "grep ' /workspace ' /proc/mounts")
    assert status == 0
    assert {"rw", "nosuid", "nodev"} <= set(out.decode().split()[3].split(","))


async def test_the_workspace_outlives_machines(rooms: Rooms, drive: Path) -> None:
    """What one machine wrote the next one finds, which is another user's process by then, as often as one likes."""
    for number in range(3):
        machine = await start(rooms, drive)
        assert await sh(machine.channel, f"cd /workspace; echo {number} >> log; wc -l < log") == (
            0,
            f"{number + 1}\n".encode(),
            b"",
        )
        await rooms.machines.destroy(machine)
    assert file_on(drive, "/log") == "0\n1\n2\n"


async def test_what_was_synced_survives_a_killed_vmm(rooms: Rooms, drive: Path) -> None:
    """After a kill -9 in the middle of writing, the next machine mounts the drive and finds what was synced."""
    machine = await start(rooms, drive)
    assert (await sh(machine.channel, "cd /workspace; echo safe > file; sync; (yes > noise &)"))[0] == 0
    (pid,) = rooms.gate.find_marked()
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        while rooms.machines.all():  # noqa: ASYNC110 - rows are polled, as a client would
            await asyncio.sleep(0.02)
    machine = await start(rooms, drive)
    assert await sh(machine.channel, "cat /workspace/file") == (0, b"safe\n", b"")


async def test_a_full_workspace_is_told_to_the_command(rooms: Rooms, drive: Path) -> None:
    """A command that writes more than there is room for is told, and the machine lives on."""
    machine = await start(rooms, drive)
    status, _, err = await sh(machine.channel, "head -c 64M /dev/zero > /workspace/big")
    assert (status, b"No space left on device" in err) == (1, True)
    assert await sh(machine.channel, "rm /workspace/big; echo on > /workspace/file; cat /workspace/file") == (
        0,
        b"on\n",
        b"",
    )


async def test_a_machine_without_a_workspace_has_none(rooms: Rooms) -> None:
    """Nothing is mounted there, and the drives that are there are not the workload's to see."""
    machine = await start(rooms, None)
    assert (await sh(machine.channel, "grep -c workspace /proc/mounts; ls /dev/vd*"))[:2] == (2, b"0\n")


async def test_machines_of_commands_have_workspaces_too(rooms: Rooms, drive: Path) -> None:
    """Machine after machine for one command each finds what was synced, although some start from what is waiting."""
    for number in range(3):
        machine = await rooms.machines.create(Purpose.RUN, workspace=drive)
        script = f"cd /workspace; echo {number} >> log; sync; wc -l < log"
        assert await sh(machine.channel, script) == (0, f"{number + 1}\n".encode(), b"")
        await rooms.machines.destroy(machine)


async def test_a_workspace_is_one_machines(rooms: Rooms, drive: Path) -> None:
    """While a machine has a workspace nobody else gets it; once the machine has gone it is to be had."""
    machine = await start(rooms, drive)
    with pytest.raises(ConflictError, match="the workspace 'drive' is used by machine"):
        await start(rooms, drive)
    await rooms.machines.destroy(machine)
    await start(rooms, drive)
