"""The rooms that every verb needs, opened in order and closed in reverse: store, ledger, images, machines."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fireclaw.daemon.narrator import Narrator
from fireclaw.errors import SetupError
from fireclaw.images.store import ImageStore
from fireclaw.machines.machines import Machines
from fireclaw.store.database import Database
from fireclaw.store.hosts import Host, open_host
from fireclaw.store.ledger import Ledger, save_anchor
from fireclaw.store.machines import MachineRows, ProcessRows
from fireclaw.vmm.family import Family
from fireclaw.vmm.host import HostMemo
from fireclaw.vmm.process import Gate, home_tag

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fireclaw.config import Config
    from fireclaw.paths import Home

log = logging.getLogger(__name__)

_ANCHOR_S = 10.0  # at most so much of the ledger is lost with the host's power


@dataclass(frozen=True)
class Rooms:
    """What stands open for the daemon's life."""

    home: Home
    config: Config
    database: Database
    host: Host
    ledger: Ledger
    gate: Gate
    images: ImageStore
    family: Family
    machines: Machines
    narrator: Narrator


@asynccontextmanager
async def open_rooms(home: Home, config: Config) -> AsyncIterator[Rooms]:
    """Open them.

    Raises:
        FireclawError: one cannot be opened, and why.
    """
    database = Database(home.database)
    try:
        ledger = Ledger(home.ledger, clock=time.time)
        try:
            rooms = _furnish(home, config, database, ledger)
            anchoring = asyncio.create_task(_anchor_often(rooms), name="anchor the ledger")
            try:
                yield rooms
            finally:
                anchoring.cancel()
                await asyncio.wait([anchoring])
                _anchor(rooms)
        finally:
            ledger.close()
    finally:
        database.close()


async def _anchor_often(rooms: Rooms) -> None:
    while True:
        await asyncio.sleep(_ANCHOR_S)
        try:
            _anchor(rooms)
        except SetupError as error:
            log.warning("the ledger is not anchored: %s", error)  # a full disk may have room again later


def _anchor(rooms: Rooms) -> None:
    """Have the ledger on the disk, and its end known to the store: a cut end is then found."""
    save_anchor(rooms.database, rooms.host.host_id, rooms.ledger.checkpoint())


def _furnish(home: Home, config: Config, database: Database, ledger: Ledger) -> Rooms:
    host = open_host(database)
    gate = Gate(ProcessRows(database), home_tag(home.data))
    images = ImageStore(home, mirror=config.images.mirror)
    narrator = Narrator()
    memo = HostMemo(home.memo)
    family = Family(gate, home, memo, vmm=config.machine.vmm, accel=config.machine.accel, say=narrator.say)
    machines = Machines(
        home=home,
        rows=MachineRows(database, host),
        gate=gate,
        images=images,
        family=family,
        memo=memo,
        memory_mib=config.machine.memory_mib,
        vcpus=config.machine.vcpus,
        say=narrator.say,
        record=ledger.append,
    )
    return Rooms(home, config, database, host, ledger, gate, images, family, machines, narrator)
