"""Templates: what clones start from. Made once for each kind of machine, kept on disk, held in memory.

A template is booted, warmed up and frozen; it is nobody's machine. Whoever needs its snapshot first has it made, for
all others, and it is made to its end even if he does not wait for it.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

from fireclaw.errors import CorruptError, GuestTimeoutError
from fireclaw.machines import calls
from fireclaw.machines.calls import Exec
from fireclaw.machines.channel import Channel
from fireclaw.machines.snapshots import About, Snapshot, SnapshotFolder
from fireclaw.machines.workspace import blank_drive
from fireclaw.store.machines import Purpose
from fireclaw.wire.hello import new_magic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from fireclaw.images.store import Image, Runtime
    from fireclaw.machines.register import Register
    from fireclaw.paths import Home
    from fireclaw.vmm.base import Accel, Vm, Vmm
    from fireclaw.vmm.family import Family

BOOT_SECONDS = 120.0  # a boot takes 3 s on an idle software CPU
# What a template does before it is frozen, so that a clone finds it in memory: both ways to start a command, the
# shell and the programs that nearly every command needs.
_WARM_UP = (
    Exec(["/bin/true"]),
    Exec(["/bin/true"], user="1000:1000", confined=True),
    Exec(["/bin/sh", "-c", "cat /proc/uptime; uname -a; id; ls /"], stdin=True),
)


class Kind(NamedTuple):
    """What machines that share a template have in common.

    Attributes:
        runtime: what they boot from.
        image: what their workload sees.
        memory_mib: their memory.
        vcpus: their virtual processors.
        workspace_bytes: the size of their workspace drives; 0 for machines without one.
    """

    runtime: Runtime
    image: Image
    memory_mib: int
    vcpus: int
    workspace_bytes: int = 0


class Templates:
    """The templates of one home.

    Args:
        home: where snapshots are kept.
        register: where a template's own machine is recorded.
        family: the VMMs, of which one is chosen with the first template.
        say: takes a line for people.
    """

    def __init__(self, home: Home, register: Register, family: Family, say: Callable[[str], None]) -> None:
        self._folder = SnapshotFolder(home.snapshots)
        self._workspaces = home.workspaces
        self._register = register
        self._family = family
        self._say = say
        self._loaded: dict[str, Snapshot] = {}
        self._retired: list[Snapshot] = []  # somebody may still be about to clone one
        self._making = asyncio.Lock()
        self._tasks: set[asyncio.Task[Snapshot]] = set()

    async def have(self, kind: Kind) -> Snapshot:
        """The snapshot of a kind's template.

        Raises:
            SetupError, MachineError: it cannot be made, and why.
        """
        task = asyncio.create_task(self._have(kind), name=f"template {kind.image.name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _have(self, kind: Kind) -> Snapshot:
        async with self._making:
            vmm, accel = await self._family.choose(lambda vmm, accel: self._prove(vmm, accel, kind))
            spec = self._register.common_spec(
                kind.runtime, kind.image, accel, memory_mib=kind.memory_mib, vcpus=kind.vcpus
            )
            about = About(
                runtime=kind.runtime.digest,
                image=kind.image.digest,
                vmm=vmm.fingerprint(spec),
                workspace_bytes=kind.workspace_bytes,
            )
            if (held := self._loaded.get(about.key)) is not None and held.is_removed and not vmm.wants_sealed:
                self._retired.append(self._loaded.pop(about.key))  # a jail can be given a file only while it has a name
            if about.key not in self._loaded:
                self._loaded[about.key] = await self._load(about, vmm) or await self._make(about, vmm, accel, kind)
            return self._loaded[about.key]

    async def _load(self, about: About, vmm: Vmm) -> Snapshot | None:
        try:
            return await asyncio.to_thread(self._folder.load, about, seal=vmm.wants_sealed)
        except CorruptError as error:
            self._say(f"{error.message}; it is built anew")
            return None

    async def _make(self, about: About, vmm: Vmm, accel: Accel, kind: Kind) -> Snapshot:
        """Boot a template, warm it up, freeze it and keep it on disk."""
        outdated = await asyncio.to_thread(self._folder.remove_outdated, about)
        why = "the old one is of another VMM, CPU or kernel" if outdated else "once"
        self._say(f"making a snapshot of the image {kind.image.name!r} ({why})")
        magic = new_magic()
        async with self._machine(Purpose.TEMPLATE, vmm, accel, kind, magic, snapshottable=True) as vm:
            try:
                await _warm_up(vm, magic)
                memory = await vm.snapshot()
            except GuestTimeoutError as error:
                console = (await vm.console()).strip()
                raise GuestTimeoutError(f"{error.message}; its console ends with: {console[-500:]}") from None
            try:
                await asyncio.to_thread(self._folder.save, about, memory, magic)
            finally:
                memory.close()
        made = await self._load(about, vmm)
        if made is None:
            raise CorruptError(
                "the snapshot that was just written cannot be read", hint="'fireclaw doctor' looks further"
            )
        return made

    async def _prove(self, vmm: Vmm, accel: Accel, kind: Kind) -> None:
        """Boot a machine and hear its guest: nothing less shows that it works here."""
        magic = new_magic()
        async with self._machine(Purpose.PROBE, vmm, accel, kind, magic) as vm:
            channel = await Channel.open(await vm.open_channel(timeout_s=BOOT_SECONDS), magic, BOOT_SECONDS)
            await channel.aclose()

    @asynccontextmanager
    async def _machine(
        self, purpose: Purpose, vmm: Vmm, accel: Accel, kind: Kind, magic: bytes, *, snapshottable: bool = False
    ) -> AsyncIterator[Vm]:
        """A machine of our own, booted; nothing is left of it."""
        row = self._register.add(
            purpose, kind.image, kind.runtime, magic, vmm=vmm, accel=accel, memory_mib=kind.memory_mib, vcpus=kind.vcpus
        )
        try:
            with blank_drive(self._workspaces, row.machine_id, kind.workspace_bytes) as blank:
                spec = self._register.spec(row, kind.runtime, kind.image, blank)
                vm = await vmm.boot(spec, snapshottable=snapshottable)
                self._register.note_made(row, kind.image.name, "boot")
                try:
                    yield vm
                finally:
                    await asyncio.shield(vm.shutdown())
        finally:
            await asyncio.shield(self._register.forget(row))

    async def prune(self, wanted: Callable[[About], bool]) -> list[str]:
        """Remove half-written snapshots and those that are not wanted; return what went."""
        async with self._making:  # one that is half written is somebody's until then
            return await asyncio.to_thread(self._folder.prune, wanted)

    async def aclose(self) -> None:
        """Let go of everything; who waits for a template is told."""
        for making in self._tasks:
            making.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)  # who waited for one was told
        for loaded in (*self._loaded.values(), *self._retired):
            loaded.close()
        self._loaded.clear()


async def _warm_up(vm: Vm, magic: bytes) -> None:
    channel = await Channel.open(await vm.open_channel(timeout_s=BOOT_SECONDS), magic, BOOT_SECONDS)
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
