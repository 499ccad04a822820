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
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from fireclaw.errors import ConflictError, CorruptError, FireclawError, GuestTimeoutError, NotFoundError, SetupError
from fireclaw.images import recipe
from fireclaw.images.background import in_background
from fireclaw.machines import calls
from fireclaw.machines.calls import Exec
from fireclaw.machines.channel import Channel
from fireclaw.machines.machine import Machine
from fireclaw.machines.snapshots import Loaded, SnapshotFolder, make_key
from fireclaw.store.machines import MachineState, Purpose
from fireclaw.vmm.accel import prove_accel
from fireclaw.vmm.base import Accel, VmSpec
from fireclaw.vmm.host import tsc_khz
from fireclaw.vmm.qemu import Qemu
from fireclaw.wire.hello import new_magic

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from fireclaw.images.store import Image, ImageStore, Runtime
    from fireclaw.paths import Home
    from fireclaw.store.machines import MachineRow, MachineRows
    from fireclaw.vmm.base import Vm
    from fireclaw.vmm.host import HostMemo
    from fireclaw.vmm.process import Gate

    class Record(Protocol):
        """The ledger's ``append``."""

        def __call__(self, type: str, data: Mapping[str, object], *, machine: str | None = None) -> object:  # noqa: A002
            """Add an event."""


logger = logging.getLogger(__name__)

BOOT_SECONDS = 120.0  # a boot takes 3 s on an idle software CPU
# What a template does before it is frozen, so that a clone finds it in memory: both ways to start a command, the
# shell and the programs that nearly every command needs.
_WARM_UP = (
    Exec(["/bin/true"]),
    Exec(["/bin/true"], user="1000:1000", confined=True),
    Exec(["/bin/sh", "-c", "cat /proc/uptime; uname -a; id; ls /"], stdin=True),
)
_KEPT_BY_NAME = frozenset({Purpose.NAMED, Purpose.AGENT})


class Machines:
    """The machines room.

    Args:
        home: where folders are made.
        rows: the record.
        gate: where processes are made.
        images: runtimes and images.
        memo: facts about this host that were found out once.
        accel: "auto", "kvm" or "tcg".
        memory_mib: of each machine.
        vcpus: of each machine.
        say: takes a line for people, e.g. why KVM is not used; called from any thread.
        record: the ledger.
    """

    def __init__(
        self,
        *,
        home: Home,
        rows: MachineRows,
        gate: Gate,
        images: ImageStore,
        memo: HostMemo,
        accel: str,
        memory_mib: int,
        vcpus: int,
        say: Callable[[str], None],
        record: Record,
    ) -> None:
        self._home = home
        self._rows = rows
        self._gate = gate
        self._images = images
        self._memo = memo
        self._wanted_accel = accel
        self._memory_mib = memory_mib
        self._vcpus = vcpus
        self._say = say
        self._record_event = record
        self._folder = SnapshotFolder(home.snapshots)
        self._loaded: dict[str, Loaded] = {}
        self._making = asyncio.Lock()
        self._accel: Accel | None = None
        self._machines: dict[str, Machine] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._endings: dict[str, asyncio.Task[None]] = {}
        self._snapshots: set[asyncio.Task[Loaded]] = set()

    # -- finding ----------------------------------------------------------------------------------------------

    def all(self) -> list[MachineRow]:
        """The machines' rows, oldest first."""
        return self._rows.all()

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

    async def prepare(self, image: str = "debian") -> None:
        """Have everything ready that the first machine of an image needs; errors as for ``create``."""
        runtime, found = await in_background(lambda: self._find(image))
        await self._snapshot(runtime, found, self._memory_mib)

    async def create(
        self, purpose: Purpose, *, name: str | None = None, image: str = "debian", memory_mib: int | None = None
    ) -> Machine:
        """Clone a machine; it has been sent its identity, and may be given commands at once.

        Raises:
            NotFoundError: no such image.
            ConflictError: the name is taken.
            SetupError, MachineError: it cannot be made, and why.
        """
        runtime, found = await in_background(lambda: self._find(image))
        memory_mib = memory_mib or self._memory_mib
        snapshot = await self._snapshot(runtime, found, memory_mib)
        if name is not None:
            await self._until_free(name)
        row = self._record(purpose, found, runtime, new_magic(), memory_mib=memory_mib, name=name)
        try:
            machine = await self._clone(row, runtime, found, snapshot)
        except BaseException:
            await asyncio.shield(self._forget(row))
            raise
        self._own(machine)
        try:
            await machine.vm.resume()
        except BaseException:
            self.end_soon(machine)
            raise
        return machine

    async def _until_free(self, name: str) -> None:
        """Let a machine of that name that is just ending come to its end."""
        taken = self._rows.by_name(name)
        if taken is not None and (ending := self._endings.get(taken.machine_id)) is not None:
            await asyncio.wait([ending])

    async def _clone(self, row: MachineRow, runtime: Runtime, image: Image, snapshot: Loaded) -> Machine:
        """Make a clone that has all it needs to begin and stands still."""
        vm = await Qemu.clone(self._spec_of(row, runtime, image), self._gate, snapshot.memory, paused=True)
        try:
            self._note_made(row, image.name, "clone")
            # Hello and identity lie in the port before the guest wakes: it finds them at its first look.
            hostname = row.name or f"fc-{_short(row.machine_id)[:8]}"
            return await Machine.connect(row, vm, hostname=hostname, template=snapshot.magic, on_settled=self._made)
        except BaseException:
            await asyncio.shield(vm.shutdown())
            raise

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

    def _record(
        self,
        purpose: Purpose,
        image: Image,
        runtime: Runtime,
        magic: bytes,
        *,
        memory_mib: int,
        name: str | None = None,
        accel: Accel | None = None,
    ) -> MachineRow:
        row = self._rows.add(
            machine_id=str(uuid.uuid4()),
            name=name,
            purpose=purpose,
            image=image.digest,
            runtime=runtime.digest,
            accel=accel or self._accel or Accel.TCG,
            memory_mib=memory_mib,
            vcpus=self._vcpus,
            magic=magic.hex(),
            created_at=time.time(),
        )
        folder = self._machine_folder(row.machine_id)
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            self._rows.remove(row.machine_id)
            raise SetupError(
                f"cannot make the folder {str(folder)!r}: {error.strerror}", hint="'fireclaw down' and try again"
            ) from error
        return row

    def _note_made(self, row: MachineRow, image: str, how: str) -> None:
        about = {"purpose": row.purpose, "name": row.name, "image": image, "how": how, "accel": row.accel}
        self._record_event("machine.made", about, machine=row.machine_id)

    def _spec(
        self,
        runtime: Runtime,
        image: Image,
        accel: Accel,
        *,
        memory_mib: int,
        machine_id: str = "",
        slot: int = 0,
    ) -> VmSpec:
        """What to start; without a machine_id, what every machine of this kind has in common."""
        return VmSpec(
            machine_id=machine_id,
            kernel=runtime.kernel,
            initrd=runtime.initrd,
            root=runtime.root,
            image=image.root,
            memory_mib=memory_mib,
            vcpus=self._vcpus,
            accel=accel,
            tsc_khz=tsc_khz(self._memo),
            folder=self._machine_folder(machine_id),
            slot=slot,
        )

    def _spec_of(self, row: MachineRow, runtime: Runtime, image: Image) -> VmSpec:
        spec = self._spec(
            runtime, image, Accel(row.accel), memory_mib=row.memory_mib, machine_id=row.machine_id, slot=row.slot
        )
        return replace(spec, tied=row.purpose not in _KEPT_BY_NAME)

    def _machine_folder(self, machine_id: str) -> Path:
        return self._home.machines / _short(machine_id)

    # -- snapshots --------------------------------------------------------------------------------------------

    async def _snapshot(self, runtime: Runtime, image: Image, memory_mib: int) -> Loaded:
        """Have a snapshot; once begun it is made, for others, even if who asked first does not wait for it."""
        task = asyncio.create_task(self._have_snapshot(runtime, image, memory_mib), name=f"snapshot {image.name}")
        self._snapshots.add(task)
        task.add_done_callback(self._snapshots.discard)
        return await asyncio.shield(task)

    async def _have_snapshot(self, runtime: Runtime, image: Image, memory_mib: int) -> Loaded:
        async with self._making:
            if self._accel is None:
                self._accel = await self._choose_accel(runtime, image)
            spec = self._spec(runtime, image, self._accel, memory_mib=memory_mib)
            key = make_key(vmm=Qemu.fingerprint(spec), runtime=runtime.digest, image=image.digest)
            if key not in self._loaded:
                self._loaded[key] = await self._load(key) or await self._make(key, runtime, image, memory_mib)
            return self._loaded[key]

    async def _load(self, key: str) -> Loaded | None:
        try:
            return await asyncio.to_thread(self._folder.load, key)
        except CorruptError as error:
            self._say(f"{error.message}; it is built anew")
            return None

    async def _make(self, key: str, runtime: Runtime, image: Image, memory_mib: int) -> Loaded:
        """Boot a template, warm it up, freeze it and keep it on disk."""
        self._say(f"making a snapshot of the image {image.name!r} (once)")
        magic = new_magic()
        row = self._record(Purpose.TEMPLATE, image, runtime, magic, memory_mib=memory_mib)
        try:
            vm = await Qemu.boot(self._spec_of(row, runtime, image), self._gate, snapshottable=True)
            self._note_made(row, image.name, "boot")
            try:
                await _warm_up(vm, magic)
                memory = await vm.snapshot()
            except GuestTimeoutError as error:
                console = (await vm.console()).strip()
                raise GuestTimeoutError(f"{error.message}; its console ends with: {console[-500:]}") from None
            finally:
                await asyncio.shield(vm.shutdown())
        finally:
            await asyncio.shield(self._forget(row))
        try:
            await asyncio.to_thread(self._folder.save, key, memory, magic, runtime.digest, image.digest)
        except FireclawError:
            memory.close()
            raise
        return Loaded(key, memory, magic)

    async def _choose_accel(self, runtime: Runtime, image: Image) -> Accel:
        """Take what was asked for; for "auto", KVM if a guest of ours really boots on it."""
        if self._wanted_accel != "auto":
            return Accel(self._wanted_accel)

        async def boot() -> None:
            magic = new_magic()
            row = self._record(Purpose.PROBE, image, runtime, magic, memory_mib=self._memory_mib, accel=Accel.KVM)
            try:
                vm = await Qemu.boot(self._spec_of(row, runtime, image), self._gate)
                self._note_made(row, image.name, "boot")
                try:
                    channel = await Channel.open(vm.open_channel(), magic, BOOT_SECONDS)
                    await channel.aclose()
                finally:
                    await asyncio.shield(vm.shutdown())
            finally:
                await asyncio.shield(self._forget(row))

        verdict = await prove_accel(self._memo, boot)
        if verdict.reason:
            self._say(f"{verdict.reason} (remedy: {verdict.remedy})" if verdict.remedy else verdict.reason)
        return verdict.accel

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
            if machine.row.purpose in _KEPT_BY_NAME:
                await machine.ask_to_end()
        finally:  # a store that refuses must not keep a VMM alive
            await machine.disconnect()
            await machine.vm.shutdown()
            await self._forget(machine.row)
        self._record_event("machine.gone", {"purpose": machine.row.purpose}, machine=machine.row.machine_id)

    async def _forget(self, row: MachineRow) -> None:
        """Remove what is left of a machine: stray processes, its folder, its row."""
        await self._gate.sweep(row.machine_id)
        await asyncio.to_thread(shutil.rmtree, self._machine_folder(row.machine_id), ignore_errors=True)
        self._rows.remove(row.machine_id)

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
        for making in self._snapshots:
            making.cancel()
        await asyncio.gather(*self._snapshots, return_exceptions=True)  # who waited for one was told
        leaving = [m for m in self._machines.values() if not (keep and m.row.purpose in _KEPT_BY_NAME)]
        try:
            await self._end_all(leaving)
        finally:
            for machine_id, machine in list(self._machines.items()):
                self._watchers.pop(machine_id).cancel()
                await machine.disconnect()
                machine.vm.detach()
            self._machines.clear()
            for loaded in self._loaded.values():
                loaded.close()
            self._loaded.clear()

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
            await self._forget(claimed)
            return f"machine {claimed.name or _short(claimed.machine_id)}: {error.message}"
        return ""

    async def _adopt_one(self, row: MachineRow) -> Machine:
        if row.purpose not in _KEPT_BY_NAME or row.state is not MachineState.RUNNING:
            raise ConflictError("its client is gone")
        children = [child for process in self._gate.rows.of(row.machine_id) if (child := self._gate.adopt(process))]
        if not children:
            raise ConflictError("its VMM is dead")
        vm = await Qemu.adopt(self._adopted_spec(row), children[0])
        try:
            machine = await Machine.connect(row, vm)
            await machine.settled()
        except BaseException:
            await asyncio.shield(vm.shutdown())
            raise
        return machine

    def _adopted_spec(self, row: MachineRow) -> VmSpec:
        """The spec of a running VMM: its files are open already and may even be gone by now."""
        gone = self._machine_folder(row.machine_id)
        return VmSpec(
            machine_id=row.machine_id,
            kernel=gone,
            initrd=gone,
            root=gone,
            image=gone,
            memory_mib=row.memory_mib,
            vcpus=row.vcpus,
            accel=Accel(row.accel),
            tsc_khz=0,
            folder=gone,
            slot=row.slot,
        )

    async def prune(self) -> list[str]:
        """Remove what nobody owns, and return what went.

        That is: rows whose machine ended while the store refused to be written; processes with our mark and folders
        that no row names; half-made files; runtimes, images and snapshots that newer ones replaced.
        """
        removed = []
        for row in self._rows.all():
            if not self._is_somebodys(row):
                await self._forget(row)
                removed.append(f"machine {row.name or _short(row.machine_id)}")
        known = {row.machine_id for row in self._rows.all()}
        for pid, machine_id in self._gate.find_marked().items():
            if machine_id not in known and self._gate.kill_stray(pid):
                removed.append(f"process {pid} of machine {_short(machine_id)}")
        folders = {_short(machine_id) for machine_id in known}
        for folder in self._home.machines.iterdir():
            if folder.is_dir() and folder.name not in folders:
                await asyncio.to_thread(shutil.rmtree, folder)
                removed.append(f"folder {folder.name}")
        rows = self._rows.all()
        in_use = {row.image for row in rows} | {row.runtime for row in rows}
        removed += [f"runtime or image {name[:12]}" for name in await asyncio.to_thread(self._images.prune, in_use)]
        async with self._making:  # one that is half written is somebody's until then
            removed += await asyncio.to_thread(self._prune_snapshots)
        return removed

    def _is_somebodys(self, row: MachineRow) -> bool:
        """Whether a machine lives, is being ended, or is being made."""
        machine_id = row.machine_id
        return machine_id in self._machines or machine_id in self._endings or row.state is MachineState.MAKING

    def _prune_snapshots(self) -> list[str]:
        """Remove snapshots of runtimes and images that are no more."""
        runtime = self._images.find_runtime()
        alive = {image.digest for image in self._images.images()} | ({runtime.digest} if runtime else set())
        return self._folder.prune(lambda manifest: {manifest.runtime, manifest.image} <= alive)

    @property
    def accel(self) -> str:
        """What runs the guests' instructions; "" before the first machine."""
        return self._accel or ""


def _short(machine_id: str) -> str:
    return machine_id.replace("-", "")[:12]


async def _warm_up(vm: Vm, magic: bytes) -> None:
    channel = await Channel.open(vm.open_channel(), magic, BOOT_SECONDS)
    try:
        async with asyncio.timeout(BOOT_SECONDS):
            await calls.give_identity(channel, "template", magic)
            for command in _WARM_UP:
                execution = await calls.start(channel, command)
                if command.stdin:
                    await execution.close_stdin()
                async for _ in execution.output():
                    pass
    except TimeoutError:
        raise GuestTimeoutError(f"the template did not get warm within {BOOT_SECONDS:g} s") from None
    finally:
        await channel.aclose()
