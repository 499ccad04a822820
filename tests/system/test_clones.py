"""Eight clones of one snapshot at once, on whichever VMM the settings name: each is somebody, and none sees another."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, NamedTuple

import pytest
from exec_rules import sh
from workspace_drives import file_on, open_tried_rooms

from fireclaw.machines.workspace import make_workspace
from fireclaw.store.machines import Purpose

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fireclaw.daemon.rooms import Rooms
    from fireclaw.machines.machine import Machine
    from fireclaw.paths import Home

pytestmark = pytest.mark.timeout(300)

CLONES = 8
WHO = (
    "cat /proc/sys/kernel/hostname /etc/hostname /etc/machine-id /proc/sys/kernel/random/uuid;"
    " head -c 16 /dev/urandom | od -An -tx1; mktemp -u; date +%s.%N"
)


class Who(NamedTuple):
    """What a clone says of itself."""

    hostname: str
    etc_hostname: str
    machine_id: str
    uuid: str
    random: str
    temporary: str
    seconds: str


@pytest.fixture
async def rooms(home: Home) -> AsyncIterator[Rooms]:
    """The daemon's rooms on the VMM that is tried."""
    async with open_tried_rooms(home) as rooms:
        yield rooms


async def make(rooms: Rooms, name: str) -> Machine:
    """A machine with a workspace of its own."""
    drive = rooms.home.workspaces / name
    await asyncio.to_thread(make_workspace, drive, 16)
    machine = await rooms.machines.create(Purpose.NAMED, name=name, workspace=drive)
    await machine.settled()
    return machine


async def ask(machine: Machine, script: str) -> str:
    """What a script prints in a machine, where it succeeds."""
    status, out, err = await sh(machine.channel, script)
    assert status == 0, err
    return out.decode()


async def test_eight_clones_at_once_have_nothing_in_common(rooms: Rooms) -> None:
    """Names, machine-ids, UUIDs, random bytes and workspaces all differ, the clocks are right, and all of it ends."""
    names = [f"clone{number}" for number in range(CLONES)]
    machines = await asyncio.gather(*(make(rooms, name) for name in names))

    async def meet(machine: Machine) -> Who:
        before = time.time()
        who = Who(*(await ask(machine, WHO)).splitlines())
        assert before - 2 < float(who.seconds) < time.time() + 2
        return who

    people = await asyncio.gather(*(meet(machine) for machine in machines))

    for field in ("hostname", "etc_hostname", "machine_id", "uuid", "random", "temporary"):
        assert len({getattr(who, field) for who in people}) == CLONES, field
    assert [who.hostname for who in people] == [who.etc_hostname for who in people] == names

    await asyncio.gather(*(ask(machine, f"echo {name} > /workspace/{name}") for machine, name in _pairs(machines)))
    seen = await asyncio.gather(*(ask(machine, "cd /workspace; ls -A; cat clone*") for machine in machines))
    assert [set(each.split()) - {"lost+found"} for each in seen] == [{name} for name in names]

    await rooms.machines.destroy_all()
    assert rooms.machines.all() == []
    assert rooms.gate.find_marked() == {}
    assert [vmm.find_left() for vmm in rooms.family.all()] == [set(), set()]
    assert list(rooms.home.machines.iterdir()) == []
    for name in names:
        assert file_on(rooms.home.workspaces / name, f"/{name}") == f"{name}\n"


def _pairs(machines: list[Machine]) -> list[tuple[Machine, str]]:
    return [(machine, machine.row.name or "") for machine in machines]
