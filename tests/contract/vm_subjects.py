"""Implementations of the VMM contract as subjects of one suite of rules (``vm_rules``), and homes to try them in.

A rule states what it needs of a subject; a subject says what it lacks, and why. What a subject lacks is *not run* on
it, which the end of the test run reports: it is no pass.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import uuid
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest
from review_limits import descriptors

from fireclaw.machines.snapshots import About, Snapshot, SnapshotFolder
from fireclaw.machines.workspace import make_workspace
from fireclaw.paths import Home
from fireclaw.store.database import Database
from fireclaw.store.machines import ProcessRows
from fireclaw.vmm.base import Accel, MemorySnapshot, Vm, Vmm, VmSpec
from fireclaw.vmm.host import measure_tsc_khz
from fireclaw.vmm.process import Gate, home_tag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from fireclaw.images import Image, Runtime
    from fireclaw.vmm.process import Child

MEMORY_MIB: Final = 128
WORKSPACE_BYTES: Final = 16 << 20
TSC_KHZ: Final = measure_tsc_khz()


class Need(StrEnum):
    """What a rule needs of a subject, beyond the protocol."""

    KERNEL = "a guest with a kernel of its own"
    MEMORY = "clones that remember what their source knew"
    USER = "a user id for each machine"
    JAIL = "a jail around the VMM"
    CGROUP = "a cgroup with limits"


class Fate(StrEnum):
    """How a guest that was started for it ends by itself."""

    REBOOT = "reboot"
    PANIC = "panic"
    POWEROFF = "poweroff"
    HALT = "halt"


class Control(NamedTuple):
    """Where the conversation with the VMM's process can be overheard: a method that carries one request.

    Attributes:
        client: the class.
        method: its method's name.
    """

    client: type
    method: str


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One implementation, in one way of running it.

    Attributes:
        name: for people.
        make: makes its ``Vmm`` for a lab.
        doom: makes a ``Vmm`` and a spec whose guest meets its fate soon after its boot.
        control: where the accidents of the rules strike.
        accel: what runs the instructions.
        lacks: what it cannot do, with the reason.
        unavailable: why it cannot be tried here at all; empty where it can.
    """

    name: str
    make: Callable[[Lab], Vmm]
    doom: Callable[[Lab, Fate], tuple[Vmm, VmSpec]]
    control: Control
    accel: Accel
    lacks: Mapping[Need, str] = field(default_factory=dict)
    unavailable: str = ""

    def why_not(self, needs: tuple[Need, ...]) -> str:
        """Why a rule with these needs is not run on it; empty where it is."""
        missing = (f"it needs {need}: {self.lacks[need]}" for need in needs if need in self.lacks)
        return self.unavailable or next(missing, "")


def needs(*what: Need) -> pytest.MarkDecorator:
    """Mark a rule with what it needs."""
    return pytest.mark.needs(*what)


def doom_by_cmdline(lab: Lab, fate: Fate) -> tuple[Vmm, VmSpec]:
    """Have a real kernel start a program that ends the guest, or find none to start."""
    if fate is Fate.PANIC:
        words: tuple[str, ...] = ("rdinit=/none/such", "root=/dev/none", "loglevel=7")
    else:
        words = ("loglevel=7", "rdinit=/bin/busybox", "--", fate, "-f")
    return lab.vmm, replace(lab.spec(), cmdline=words)


class Lab:
    """A home of its own, in which machines of one subject are made; nothing of them may be left at the end.

    Attributes:
        home: its folders.
        gate: where its processes are made.
        vmm: the subject, installed in it.
    """

    def __init__(self, subject: Subject, folder: Path, runtime: Runtime, image: Image) -> None:
        self.home = Home(folder, folder / "run", folder)
        self.home.make()
        self.subject = subject
        self._database = Database(self.home.database)
        self.gate = Gate(ProcessRows(self._database), home_tag(folder))
        self.vmm = subject.make(self)
        self._spec = VmSpec(
            machine_id="",
            kernel=runtime.kernel,
            initrd=runtime.initrd,
            root=runtime.root,
            image=image.root,
            memory_mib=MEMORY_MIB,
            vcpus=1,
            accel=subject.accel,
            tsc_khz=TSC_KHZ,
            folder=folder,
            slot=0,
        )
        self._slots = iter(range(1000))
        self._snapshots = SnapshotFolder(self.home.snapshots)

    def spec(self, workspace: Path | None = None) -> VmSpec:
        """What the next machine is, as a clone of the template must be; its third drive is empty if none is given."""
        machine_id = str(uuid.uuid4())
        folder = self.home.machines / machine_id.replace("-", "")[:12]
        folder.mkdir(mode=0o700)
        if workspace is None:
            workspace = self.home.workspaces / f"{machine_id}.blank"
            with workspace.open("xb") as file:
                file.truncate(WORKSPACE_BYTES)
        return replace(self._spec, machine_id=machine_id, folder=folder, slot=next(self._slots), workspace=workspace)

    def workspace(self, name: str) -> Path:
        """Make a workspace drive."""
        path = self.home.workspaces / name
        make_workspace(path, WORKSPACE_BYTES >> 20)
        return path

    def adopted(self, spec: VmSpec) -> VmSpec:
        """What a later daemon knows of a machine: no file of its."""
        nowhere = spec.folder
        return replace(spec, kernel=nowhere, initrd=nowhere, root=nowhere, image=nowhere, workspace=None, cmdline=())

    def take_over(self, vm: Vm) -> Child:
        """Let go of a machine, and hold its process as a later daemon would."""
        vm.detach()
        (row,) = self.gate.rows.of(vm.spec.machine_id)
        child = self.gate.adopt(row)
        assert child is not None
        return child

    def pid(self, spec: VmSpec) -> int:
        """The process of a machine."""
        (row,) = self.gate.rows.of(spec.machine_id)
        assert row.pid is not None
        return row.pid

    def kill(self, spec: VmSpec, number: signal.Signals = signal.SIGKILL) -> None:
        """Signal the process of a machine."""
        os.kill(self.pid(spec), number)

    def freeze(self, memory: MemorySnapshot, magic: bytes) -> Snapshot:
        """Keep a snapshot and open it again, as the templates do; the one given is closed."""
        about = About(runtime="", image="", vmm=str(uuid.uuid4()))
        try:
            self._snapshots.save(about, memory, magic)
        finally:
            memory.close()
        loaded = self._snapshots.load(about, seal=self.vmm.wants_sealed)
        assert loaded is not None
        return loaded

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """A snapshot of its own with the same bytes."""
        memory, state = (_copy_of(fd) for fd in (snapshot.memory.memory, snapshot.memory.state))
        return self.freeze(MemorySnapshot(memory, state), snapshot.magic)

    def forget_snapshots(self) -> None:
        """Remove every snapshot's files."""
        shutil.rmtree(self.home.snapshots)

    async def forget(self, spec: VmSpec) -> None:
        """Remove what is left of a machine, as its maker does."""
        await self.vmm.sweep(spec.machine_id)
        shutil.rmtree(spec.folder)

    def leftovers(self) -> Left:
        """Whatever is left of machines."""
        return Left(
            processes=self.gate.find_marked(),
            rows=[row.owner_id for row in self.gate.rows.all()],
            files=[*self.home.machines.glob("*/*"), *self.home.jails.glob("*/*")],
            elsewhere=self.vmm.find_left(),
            cgroups=list(Path("/sys/fs/cgroup").glob(f"*{self.gate.home_tag}*")),
        )

    async def clear(self) -> None:
        """Kill what a test has left, so that it spoils no other."""
        for pid in self.gate.find_marked():
            os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            while self.gate.rows.all():  # noqa: ASYNC110 - rows go when their processes are reaped
                await asyncio.sleep(0.01)

    def close(self) -> None:
        """Close the store."""
        self._database.close()


class Left(NamedTuple):
    """What is left of machines, wherever it may be."""

    processes: dict[int, str] = {}  # noqa: RUF012 - never changed
    rows: list[str] = []  # noqa: RUF012 - never changed
    files: list[Path] = []  # noqa: RUF012 - never changed
    elsewhere: set[str] = set()  # noqa: RUF012 - never changed
    cgroups: list[Path] = []  # noqa: RUF012 - never changed


NOTHING: Final = Left()


def make_memfd(content: bytes, size: int) -> int:
    """A file in memory that begins with some bytes."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, content)
    os.ftruncate(fd, size)
    return fd


def _copy_of(source: int) -> int:
    size = os.fstat(source).st_size
    target = make_memfd(b"", size)
    for start in range(0, size, 1 << 20):
        piece = os.pread(source, 1 << 20, start)
        if piece.count(0) != len(piece):
            os.pwrite(target, piece, start)
    return target


@dataclass(frozen=True)
class Watch:
    """Descriptors of this process, before something was done."""

    before: set[int] = field(default_factory=descriptors)

    def new(self) -> set[int]:
        """Which of them are new."""
        return descriptors() - self.before


def labs(
    subject: Subject, runtime: Runtime, image: Image, factory: pytest.TempPathFactory
) -> Iterator[Callable[[], Lab]]:
    """Make labs of a subject; all are closed at the end."""
    made: list[Lab] = []
    shelf = factory.mktemp("shelf")
    near_runtime = replace(
        runtime,
        kernel=_bring(runtime.kernel, shelf / "kernel"),
        initrd=_bring(runtime.initrd, shelf / "initrd"),
        root=_bring(runtime.root, shelf / "root"),
    )
    near_image = replace(image, root=_bring(image.root, shelf / "image"))

    def make() -> Lab:
        made.append(Lab(subject, factory.mktemp("lab"), near_runtime, near_image))
        return made[-1]

    yield make
    for lab in made:
        lab.close()


def _bring(file: Path, place: Path) -> Path:
    """Have a file on the file system of the labs, as the files of a home are: jails get hard links."""
    try:
        place.hardlink_to(file)
    except OSError:
        shutil.copy2(file, place)
    return place
