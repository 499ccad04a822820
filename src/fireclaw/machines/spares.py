"""Spares: VMM processes that wait for their snapshot, so that the next command need not wait for one to start.

Only where an idle process is cheap (``Vmm.keeps_spares``), one at a time, of the kind that was wanted last, and only
for machines of a command, whose process may die with the daemon. A spare is nobody's machine; no guest runs in it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, NamedTuple

from fireclaw.errors import FireclawError
from fireclaw.store.machines import Purpose
from fireclaw.wire.hello import new_magic

if TYPE_CHECKING:
    from fireclaw.machines.register import Register
    from fireclaw.machines.snapshots import Snapshot
    from fireclaw.machines.templates import Kind
    from fireclaw.store.machines import MachineRow
    from fireclaw.vmm.base import Vm
    from fireclaw.vmm.family import Family

logger = logging.getLogger(__name__)


class Spare(NamedTuple):
    """A process that waits.

    Attributes:
        snapshot: what it waits for.
        row: its record.
        vm: the process.
    """

    snapshot: Snapshot
    row: MachineRow
    vm: Vm


class Spares:
    """The spare of one home.

    Args:
        register: where it is recorded.
        family: the VMMs.
    """

    def __init__(self, register: Register, family: Family) -> None:
        self._register = register
        self._family = family
        self._spare: Spare | None = None
        self._making: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None
        self._closed = False

    def take(self, snapshot: Snapshot) -> Spare | None:
        """Have the spare, if it waits for just this snapshot; it is the caller's now."""
        spare = self._spare
        if spare is None or spare.snapshot is not snapshot:
            return None
        self._let_go()
        return spare

    def refill(self, kind: Kind, snapshot: Snapshot) -> None:
        """Have one made in the background, in place of one of another kind."""
        if not self._closed and (self._making is None or self._making.done()):
            self._making = asyncio.create_task(self._refill(kind, snapshot), name="spare")

    async def _refill(self, kind: Kind, snapshot: Snapshot) -> None:
        choice = self._family.choice
        if choice is None or not choice.vmm.keeps_spares:
            return
        if self._spare is not None and self._spare.snapshot is snapshot:
            return
        await self._end()
        try:
            row = self._register.add(
                Purpose.SPARE,
                kind.image,
                kind.runtime,
                new_magic(),
                vmm=choice.vmm,
                accel=choice.accel,
                memory_mib=kind.memory_mib,
                vcpus=kind.vcpus,
            )
            try:
                vm = await choice.vmm.prepare(self._register.spec(row, kind.runtime, kind.image), snapshot.memory)
            except BaseException:
                await asyncio.shield(self._register.forget(row))
                raise
        except FireclawError as error:  # the next command starts its own, and is told if that fails, too
            logger.warning("no spare: %s", error)
            return
        self._spare = Spare(snapshot, row, vm)
        self._watch = asyncio.create_task(self._bury(self._spare), name=f"watch {row.machine_id}")

    async def _bury(self, spare: Spare) -> None:
        """Forget a spare that was killed by others."""
        await spare.vm.wait()
        self._spare = None
        await self._register.forget(spare.row)

    def _let_go(self) -> None:
        self._spare = None
        if self._watch is not None:
            self._watch.cancel()

    async def _end(self) -> None:
        if (spare := self._spare) is not None:
            self._let_go()
            await asyncio.shield(spare.vm.shutdown())
            await asyncio.shield(self._register.forget(spare.row))

    async def aclose(self) -> None:
        """End it, and make no more."""
        self._closed = True
        if self._making is not None:
            self._making.cancel()
            await asyncio.wait([self._making])
        await self._end()
