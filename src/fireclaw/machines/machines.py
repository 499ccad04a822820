"""All machines of this host: made, found, ended, adopted and pruned.

Recorded before made: a machine's row exists before its folder and its process, and goes after both are gone. So
whatever is killed at whatever moment, the next daemon finds it in the store, by its mark in a process's argv, or as a
folder that no row names.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from fireclaw.errors import ConflictError, CorruptError, FireclawError, NotFoundError, VmmError
from fireclaw.images import recipe
from fireclaw.images.background import in_background
from fireclaw.machines import workspace as workspaces
from fireclaw.machines.machine import Machine
from fireclaw.machines.register import KEPT_BY_NAME, Register, short
from fireclaw.machines.spares import Spares
from fireclaw.machines.templates import Kind, Templates
from fireclaw.store.machines import MachineState, Purpose
from fireclaw.wire.hello import new_magic

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from fireclaw.images.store import Image, ImageStore, Runtime
    from fireclaw.machines.register import Record
    from fireclaw.machines.snapshots import About, Snapshot
    from fireclaw.paths import Home
    from fireclaw.store.machines import MachineRow, MachineRows
    from fireclaw.vmm.base import Vm
    from fireclaw.vmm.family import Family
    from fireclaw.vmm.host import HostMemo
    from fireclaw.vmm.process import Gate


logger = logging.getLogger(__name__)


class Machines:
    """The machines room.

    Args:
        home: where folders are made.
        rows: the record.
        gate: where processes are made.
        images: runtimes and images.
        family: the VMMs.
        memo: facts about this host that were found out once.
        memory_mib: of each machine.
        vcpus: of each machine.
        say: takes a line for people; called from any thread.
        record: the ledger.
    """

    def __init__(
        self,
        *,
        home: Home,
        rows: MachineRows,
        gate: Gate,
        images: ImageStore,
        family: Family,
        memo: HostMemo,
        memory_mib: int,
        vcpus: int,
        say: Callable[[str], None],
        record: Record,
    ) -> None:
        self._home = home
        self._rows = rows
        self._gate = gate
        self._images = images
        self._family = family
        self._memory_mib = memory_mib
        self._vcpus = vcpus
        self._say = say
        self._record_event = record
        self._register = Register(home=home, rows=rows, gate=gate, family=family, memo=memo, record=record)
        self._templates = Templates(home, self._register, family, say)
        self._spares = Spares(self._register, family)
        self._refill: Callable[[], None] = lambda: None
        self._machines: dict[str, Machine] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._endings: dict[str, asyncio.Task[None]] = {}

    # -- finding ----------------------------------------------------------------------------------------------

    def all(self) -> list[MachineRow]:
        """The rows of somebody's machines, oldest first."""
        return [row for row in self._rows.all() if row.purpose is not Purpose.SPARE]

    def get(self, name: str) -> Machine:
        """Find a running machine by its name or by its id (12 digits or more).

        Raises:
            NotFoundError: there is none.
        """
        for machine in self._machines.values():
            row = machine.row
            if row.name == name or (len(name) >= 12 and row.machine_id.replace("-", "").startswith(name)):
                return machine
        raise NotFoundError.named("machine", name, [m.row.name for m in self._machines.values() if m.row.name])

    # -- making -----------------------------------------------------------------------------------------------

    async def prepare(self, image: str = "debian", *, workspace_mib: int = 0) -> None:
        """Have everything ready that the first machine of an image needs; errors as for ``create``.

        Args:
            image: what its workload sees.
            workspace_mib: the size of its workspace; 0: it has none.
        """
        kind = await self._kind(image, self._memory_mib, workspace_mib << 20)
        snapshot = await self._templates.have(kind)
        if not workspace_mib:
            self._spares.refill(kind, snapshot)

    async def create(
        self,
        purpose: Purpose,
        *,
        name: str | None = None,
        image: str = "debian",
        memory_mib: int | None = None,
        workspace: Path | None = None,
    ) -> Machine:
        """Clone a machine; it has been sent its identity, and may be given commands at once.

        Args:
            purpose: what it is for.
            name: what people call it.
            image: what its workload sees.
            memory_mib: its memory, if not as the settings say.
            workspace: a drive (``machines.workspace``) that it mounts at /workspace; no other machine uses it.

        Raises:
            NotFoundError: no such image.
            ConflictError: the name is taken, or another machine has the workspace.
            SetupError, MachineError: it cannot be made, and why.
        """
        size = 0 if workspace is None else await asyncio.to_thread(lambda: workspace.stat().st_size)
        kind = await self._kind(image, memory_mib or self._memory_mib, size)
        snapshot = await self._templates.have(kind)
        if purpose is Purpose.RUN and workspace is None:
            self._refill = partial(self._spares.refill, kind, snapshot)
        if name is not None:
            await self._until_free(name)
        row, vm = await self._start(purpose, kind, snapshot, name, workspace)
        try:
            self._register.note_made(row, kind.image.name, "clone")
            # Hello and identity lie in the port before the guest wakes: it finds them at its first look.
            machine = await Machine.connect(
                row,
                vm,
                hostname=row.name or f"fc-{short(row.machine_id)[:8]}",
                template=snapshot.magic,
                workspace=workspace is not None,
                on_settled=self._made,
            )
        except BaseException:
            await asyncio.shield(vm.shutdown())
            await asyncio.shield(self._register.forget(row))
            raise
        self._own(machine)
        try:
            await machine.vm.resume()
        except BaseException:
            self.end_soon(machine)
            raise
        return machine

    async def _start(
        self, purpose: Purpose, kind: Kind, snapshot: Snapshot, name: str | None, workspace: Path | None
    ) -> tuple[MachineRow, Vm]:
        """Make a clone, out of a spare where there is one; it stands still where it can be given its first bytes so."""
        if purpose is Purpose.RUN and workspace is None and (spare := self._spares.take(snapshot)) is not None:
            try:
                await spare.vm.load(snapshot.memory, paused=self._family.named(spare.row.vmm).keeps_first_bytes)
                return self._rows.assign(spare.row, purpose, time.time()), spare.vm
            except VmmError as error:  # it was killed while it waited: nothing of anybody's is lost
                logger.warning("a spare could not be used: %s", error)
                await asyncio.shield(self._register.forget(spare.row))
            except BaseException:
                await asyncio.shield(spare.vm.shutdown())
                await asyncio.shield(self._register.forget(spare.row))
                raise
        assert self._family.choice is not None  # with the first template
        row = self._register.add(
            purpose,
            kind.image,
            kind.runtime,
            new_magic(),
            vmm=self._family.choice.vmm,
            accel=self._family.choice.accel,
            memory_mib=kind.memory_mib,
            vcpus=kind.vcpus,
            name=name,
            workspace=workspace,
        )
        try:
            spec = self._register.spec(row, kind.runtime, kind.image, workspace)
            vmm = self._family.named(row.vmm)
            return row, await vmm.clone(spec, snapshot.memory, paused=vmm.keeps_first_bytes)
        except BaseException:
            await asyncio.shield(self._register.forget(row))
            raise

    async def _kind(self, image: str, memory_mib: int, workspace_size: int) -> Kind:
        return await in_background(lambda: Kind(*self._find(image), memory_mib, self._vcpus, workspace_size))

    async def _until_free(self, name: str) -> None:
        """Let a machine of that name that is just ending come to its end."""
        taken = self._rows.by_name(name)
        if taken is not None and (ending := self._endings.get(taken.machine_id)) is not None:
            await asyncio.wait([ending])

    def _made(self, machine: Machine) -> None:
        """Note that a clone has taken its identity; before that, no later daemon may adopt it."""
        if machine.row.state is MachineState.MAKING:
            self._move(machine, MachineState.RUNNING)

    def _move(self, machine: Machine, state: MachineState) -> None:
        self._rows.set_state(machine.row.machine_id, state)
        machine.row = replace(machine.row, state=state)

    def _find(self, image: str) -> tuple[Runtime, Image]:
        """Find runtime and image, after building what can be built; a user's first command needs no setup."""
        runtime = self._images.find_runtime()
        if runtime is None or not self._is_sound(runtime):
            runtime = self._images.build_runtime(self._say)
        try:
            found = self._images.find_image(image)
        except NotFoundError:
            if image not in recipe.names():
                raise
            found = self._images.build_image(image, self._say)
        self._images.verify(found)
        return runtime, found

    def _is_sound(self, runtime: Runtime) -> bool:
        try:
            self._images.verify(runtime)
        except CorruptError:
            return False
        return True

    # -- ending -----------------------------------------------------------------------------------------------

    def _own(self, machine: Machine) -> None:
        machine_id = machine.row.machine_id
        self._machines[machine_id] = machine
        self._watchers[machine_id] = asyncio.create_task(self._watch(machine), name=f"watch {machine_id}")

    async def _watch(self, machine: Machine) -> None:
        """Clean up after a machine that ended by itself, or whose guest nobody can speak to any more."""
        ending = await machine.ended()
        logger.info("machine %s ended: %s %s", machine.row.machine_id, ending.cause, ending.log.strip()[-300:])
        about = {
            "cause": ending.cause,
            "status": ending.status,
            "channel": machine.channel.reason,
            "console": ending.console[-500:],
        }
        try:
            self._record_event("machine.died", about, machine=machine.row.machine_id)
        finally:
            self.end_soon(machine)

    async def destroy(self, machine: Machine) -> None:
        """End a machine and leave nothing of it; a named one is asked to write its caches first.

        It comes to its end even if whoever asked does not wait for it, and whoever asks second waits, too.
        """
        self.end_soon(machine)
        if (ending := self._endings.get(machine.row.machine_id)) is not None:
            await asyncio.shield(ending)

    def end_soon(self, machine: Machine) -> None:
        """Do ``destroy`` in the background, unless that is under way; ``aclose`` waits for it."""
        machine_id = machine.row.machine_id
        if self._machines.pop(machine_id, None) is None:
            return
        watcher = self._watchers.pop(machine_id)
        if watcher is not asyncio.current_task():
            watcher.cancel()
        ending = asyncio.create_task(self._end(machine), name=f"destroy {machine_id}")
        self._endings[machine_id] = ending
        ending.add_done_callback(lambda task: self._ended(machine_id, task))

    def _ended(self, machine_id: str, ending: asyncio.Task[None]) -> None:
        del self._endings[machine_id]
        if not ending.cancelled() and (error := ending.exception()):
            logger.error("%s failed", ending.get_name(), exc_info=error)

    async def _end(self, machine: Machine) -> None:
        try:
            self._move(machine, MachineState.STOPPING)
            if machine.row.purpose in KEPT_BY_NAME:
                await machine.ask_to_end()
        finally:  # a store that refuses must not keep a VMM alive
            await machine.disconnect()
            await machine.vm.shutdown()
            await self._register.forget(machine.row)
            if machine.row.purpose is Purpose.RUN:  # not sooner: its own command is what counts
                self._refill()
        self._record_event("machine.gone", {"purpose": machine.row.purpose}, machine=machine.row.machine_id)

    async def destroy_all(self) -> None:
        """End every machine; one that fails does not keep the others.

        Raises:
            ExceptionGroup: what went wrong on the way.
        """
        await self._end_all(list(self._machines.values()))

    async def _end_all(self, leaving: Sequence[Machine]) -> None:
        for machine in leaving:
            self.end_soon(machine)
        outcomes = await asyncio.gather(*self._endings.values(), return_exceptions=True)
        if failures := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
            raise ExceptionGroup("not every machine ended well", failures)

    async def aclose(self, *, keep: bool) -> None:
        """Let go of everything.

        Args:
            keep: named machines live on, for the next daemon to adopt; otherwise all are ended.

        Raises:
            ExceptionGroup: as for ``destroy_all``; everything is let go of all the same.
        """
        await self._spares.aclose()
        await self._templates.aclose()
        leaving = [m for m in self._machines.values() if not (keep and m.row.purpose in KEPT_BY_NAME)]
        try:
            await self._end_all(leaving)
        finally:
            for machine_id, machine in list(self._machines.items()):
                self._watchers.pop(machine_id).cancel()
                await machine.disconnect()
                machine.vm.detach()
            self._machines.clear()

    # -- after a crash ----------------------------------------------------------------------------------------

    async def adopt(self) -> list[str]:
        """Take over the named machines of an earlier daemon, and remove what is left of the others.

        Returns:
            a line for each machine that was removed.
        """
        lines = await asyncio.gather(*(self._adopt_or_forget(row) for row in self._rows.all()))
        return [line for line in lines if line]

    async def _adopt_or_forget(self, row: MachineRow) -> str:
        claimed = self._rows.claim(row.machine_id)
        if claimed is None:
            return ""
        try:
            self._own(await self._adopt_one(claimed))
        except FireclawError as error:
            await self._register.forget(claimed)
            return f"machine {claimed.name or short(claimed.machine_id)}: {error.message}"
        return ""

    async def _adopt_one(self, row: MachineRow) -> Machine:
        if row.purpose not in KEPT_BY_NAME or row.state is not MachineState.RUNNING:
            raise ConflictError("its client is gone")
        children = [child for process in self._gate.rows.of(row.machine_id) if (child := self._gate.adopt(process))]
        if not children:
            raise ConflictError("its VMM is dead")
        vm = await self._family.named(row.vmm).adopt(self._register.adopted_spec(row), children[0])
        try:
            machine = await Machine.connect(row, vm)
            await machine.settled()
        except BaseException:
            await asyncio.shield(vm.shutdown())
            raise
        return machine

    async def prune(self) -> list[str]:
        """Remove what nobody owns, and return what went.

        That is: rows whose machine ended while the store refused to be written; processes with our mark and folders
        that no row names; half-made files; runtimes, images and snapshots that newer ones replaced.
        """
        removed = []
        for row in self._rows.all():
            if not self._is_somebodys(row):
                await self._register.forget(row)
                removed.append(f"machine {row.name or short(row.machine_id)}")
        known = self._known()
        for pid, machine_id in self._gate.find_marked().items():
            if machine_id not in known and self._gate.kill_stray(pid):
                removed.append(f"process {pid} of machine {short(machine_id)}")
        for vmm in self._family.all():
            for machine_id in vmm.find_left() - self._known():
                await vmm.sweep(machine_id)
                removed.append(f"what {vmm.name} left of machine {short(machine_id)}")
        # Found in the same turn of the loop: each machine that comes later has a row, and no folder in this list.
        folders, taken = list(self._home.machines.iterdir()), {short(machine_id) for machine_id in self._known()}
        for folder in folders:
            if folder.is_dir() and folder.name not in taken:
                await asyncio.to_thread(shutil.rmtree, folder)
                removed.append(f"folder {folder.name}")
        # Not in a thread: a template that is made meanwhile would not be known.
        removed += [f"drive {name}" for name in workspaces.sweep(self._home.workspaces, self._known())]
        rows = self._rows.all()
        in_use = {row.image for row in rows} | {row.runtime for row in rows}
        removed += [f"runtime or image {name[:12]}" for name in await asyncio.to_thread(self._images.prune, in_use)]
        return removed + await self._templates.prune(await asyncio.to_thread(self._usable))

    def _known(self) -> set[str]:
        return {row.machine_id for row in self._rows.all()}

    def _is_somebodys(self, row: MachineRow) -> bool:
        """Whether a machine lives, is being ended, or is being made."""
        machine_id = row.machine_id
        return machine_id in self._machines or machine_id in self._endings or row.state is MachineState.MAKING

    def _usable(self) -> Callable[[About], bool]:
        """Tell snapshots of runtimes and images that are still here."""
        runtime = self._images.find_runtime()
        alive = {image.digest for image in self._images.images()} | ({runtime.digest} if runtime else set())
        return lambda about: {about.runtime, about.image} <= alive
