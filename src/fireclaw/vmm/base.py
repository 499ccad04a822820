"""The contract of the VMM family: what a member does for the machines room, and in which words.

A ``Vmm`` is a program that runs microVMs, as it is installed here; a ``Vm`` is one microVM with its process. It
carries bytes to the guest (``open_channel``) and does not read them: hello, identity and commands belong to the
layers above.
"""

from __future__ import annotations

import fcntl
import os
import re
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from fireclaw.errors import InvalidError, SetupError, VmmError

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from fireclaw.vmm.process import Child, Gate

KVM: Final = Path("/dev/kvm")
# As root every VMM runs under a user id of its own, so that a guest that broke out of one cannot touch another.
# The range lies above those of systemd, containers and ordinary accounts (systemd's docs/UIDS-GIDS.md).
FIRST_USER: Final = 0x7000_0000
MIN_MEMORY_MIB: Final = 96
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Accel(StrEnum):
    """What runs the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True, kw_only=True, slots=True)
class VmSpec:
    """Everything that makes a microVM what it is.

    Attributes:
        machine_id: in the VMM's argv, so that a lost process can be found.
        kernel: the guest's kernel; it must be readable by all, as the VMM opens it with no rights of ours.
        initrd: its initrd, readable by all.
        root: the runtime's squashfs, the guest's first drive, read-only.
        image: the image's squashfs, the guest's second drive, read-only.
        workspace: the guest's third drive, writable, this machine's alone; None for a machine without one. A clone's
            has the size of its snapshot's source's, which had it in no use.
        memory_mib: guest memory.
        vcpus: virtual processors.
        accel: what runs them.
        tsc_khz: this host's time stamp counter, from ``host.tsc_khz``.
        folder: the machine's own run folder, 0700, made and removed by the caller; holds sockets.
        slot: the machine's slot; user and group id follow from it where we are root.
        cmdline: more words for the kernel command line.
        tied: the kernel ends the VMM when this process dies, for nobody would adopt it or keep its time limits. The
            kernel forgets that when the jailer changes the user id (prctl(2), PR_SET_PDEATHSIG): the next daemon ends
            such a Firecracker.
    """

    machine_id: str
    kernel: Path
    initrd: Path
    root: Path
    image: Path
    memory_mib: int
    vcpus: int
    accel: Accel
    tsc_khz: int
    folder: Path
    slot: int
    workspace: Path | None = None
    cmdline: tuple[str, ...] = ()
    tied: bool = False

    def __post_init__(self) -> None:
        """Refuse what cannot run: with too little memory a guest dies without a word, and Firecracker exits with 0."""
        if self.memory_mib < MIN_MEMORY_MIB:
            raise InvalidError(f"{self.memory_mib} MiB are too little for a machine; {MIN_MEMORY_MIB} are the least")

    @property
    def user(self) -> int | None:
        """The user and group id the VMM runs under, or None where we are not root and it runs under ours."""
        return FIRST_USER + self.slot if os.geteuid() == 0 else None


class MemorySnapshot:
    """The memory and device state of a stopped guest, in two open files.

    Attributes:
        memory: file descriptor of the guest's memory.
        state: file descriptor of the VMM's device state.
    """

    def __init__(self, memory: int, state: int) -> None:
        """Own both from now on."""
        self.memory = memory
        self.state = state

    def seal(self) -> None:
        """See to it that nobody can change them any more, not even a VMM that may open them for writing.

        Raises:
            OSError: one is no sealable memfd, or is still mapped writable.
        """
        for fd in (self.memory, self.state):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)

    def close(self) -> None:
        """Give both back; clones that run keep what they mapped."""
        os.close(self.memory)
        os.close(self.state)


class Cause(StrEnum):
    """Why a microVM ended."""

    ASKED = "asked"  # shutdown() or snapshot()
    GUEST_SHUTDOWN = "guest-shutdown"  # the guest switched itself off
    GUEST_RESET = "guest-reset"  # the guest rebooted
    GUEST_PANIC = "guest-panic"  # its kernel gave up, by the last words on its console
    VMM = "vmm"  # the VMM process ended by itself or was killed by others


@dataclass(frozen=True, slots=True)
class Ending:
    """How a microVM ended.

    Attributes:
        cause: who ended it.
        status: the VMM's exit status (negative: killed by that signal); None where it was not our own child.
        log: the VMM's last words.
        console: the guest's last lines.
    """

    cause: Cause
    status: int | None
    log: str
    console: str


@dataclass(frozen=True, slots=True)
class Usage:
    """What a microVM costs its host.

    Attributes:
        resident_bytes: memory in RAM, shared pages included.
        private_bytes: memory in RAM that is this process's alone.
        cpu_seconds: processor time since its start.
    """

    resident_bytes: int
    private_bytes: int
    cpu_seconds: float


class Vmm(ABC):
    """A program that runs microVMs, as it is installed here.

    ::

        vmm = Qemu(gate)
        vm = await vmm.boot(spec, snapshottable=True)
        sock = await vm.open_channel()
        ...                             # the guest says hello, gets warm; then close the channel
        snapshot = await vm.snapshot()  # the microVM is gone now
        clone = await vmm.clone(other_spec, snapshot)
        ending = await clone.shutdown(grace_s=2)

    Whatever fails on the way to a running microVM, no process and no file is left of it.

    Attributes:
        name: in the store, in reports and in the settings.
    """

    name: ClassVar[str]

    def __init__(self, gate: Gate) -> None:
        """Use ``gate`` for its processes."""
        self._gate = gate

    @property
    @abstractmethod
    def wants_sealed(self) -> bool:
        """Whether a snapshot must lie in sealed memfds: the VMM's process could otherwise write to it."""

    @abstractmethod
    def fingerprint(self, spec: VmSpec) -> str:
        """Whatever of the VMM and of this host must be the same for a snapshot to be loadable.

        Files (kernel, initrd, drives) are not in it: the caller knows their digests.

        Raises:
            SetupError: the VMM is not installed.
        """

    @abstractmethod
    async def boot(self, spec: VmSpec, *, snapshottable: bool = False) -> Vm:
        """Start a microVM from its kernel; it runs, but the guest is not ready yet.

        Args:
            spec: what to start.
            snapshottable: its memory can become a snapshot; without, it is private from the start.

        Raises:
            SetupError: the VMM is not installed, or a file is missing.
            VmmError: the VMM did not start; it says why.
        """

    async def clone(self, spec: VmSpec, snapshot: MemorySnapshot, *, paused: bool = False) -> Vm:
        """Start a microVM from a snapshot; no byte of its memory is copied, and the snapshot cannot change.

        Args:
            spec: as the snapshot's source had it, apart from machine_id, folder, slot and the workspace's file.
            snapshot: what to start from; the caller keeps it open until this returns.
            paused: leave it stopped until ``resume``; see ``keeps_first_bytes``.

        Raises:
            SetupError: the VMM is not installed, or a file is missing.
            VmmError: the VMM did not start, or did not accept the state.
        """
        vm = await self.prepare(spec, snapshot)
        await vm.load(snapshot, paused=paused)
        return vm

    @property
    @abstractmethod
    def keeps_first_bytes(self) -> bool:
        """Whether the channel of a paused clone takes the first bytes: a guest that wakes with them answers sooner."""

    @property
    @abstractmethod
    def keeps_spares(self) -> bool:
        """Whether a process that waits for a snapshot is cheap enough to be kept for the next clone."""

    @abstractmethod
    async def prepare(self, spec: VmSpec, snapshot: MemorySnapshot) -> Vm:
        """Start a process that waits for ``Vm.load`` of just this snapshot; the first half of ``clone``."""

    @abstractmethod
    async def adopt(self, spec: VmSpec, child: Child) -> Vm:
        """Take over a running microVM that an earlier daemon started.

        Raises:
            VmmError: it does not answer, or its guest has ended; it is gone now.
        """

    @abstractmethod
    async def sweep(self, machine_id: str) -> None:
        """Remove what a machine whose processes are gone has left outside of its own folder."""

    @abstractmethod
    def find_left(self) -> set[str]:
        """The ids of the machines of which something is there outside of their own folders."""


class Vm(ABC):
    """One microVM and its VMM process."""

    def __init__(self, spec: VmSpec) -> None:
        self.spec = spec

    @abstractmethod
    async def load(self, snapshot: MemorySnapshot, *, paused: bool = False) -> None:
        """Give a process that was prepared its snapshot; the second half of ``Vmm.clone``."""

    @abstractmethod
    async def open_channel(self, *, timeout_s: float) -> socket.socket:
        """Connect to the guest's end of the channel: a connected, non-blocking stream socket, the caller's to close.

        Bytes of an earlier connection may still come; the hello (``wire.hello``) tells where the new session
        begins. There is one owner at a time: close the first connection before the second. Where nothing reaches
        a guest that stands still, a paused clone is let run first.

        Args:
            timeout_s: how long a guest that is not up yet may take, where its end must answer for a connection.

        Raises:
            ChannelLostError: the VMM is gone.
            GuestTimeoutError: the guest has no ear for it within the time.
        """

    @abstractmethod
    async def pause(self) -> None:
        """Stop the virtual processors; close the channel before."""

    @abstractmethod
    async def resume(self) -> None:
        """Let the virtual processors run on; nothing happens if they do. After a pause the channel is opened anew."""

    @abstractmethod
    async def snapshot(self) -> MemorySnapshot:
        """Turn a microVM that was booted ``snapshottable`` into a snapshot, sealed where it must be. It ends with this.

        The caller has closed the channel before.

        Raises:
            ConflictError: it was not booted for this.
            VmmError: the VMM could not do it; the microVM is gone all the same.
        """

    @abstractmethod
    async def shutdown(self, *, grace_s: float = 0) -> Ending:
        """End the VMM process, whatever state it is in, and wait until it is reaped.

        To ask the guest first is the caller's part.

        Args:
            grace_s: how long the VMM may take to end by itself before it is killed; 0 kills it at once, which is
                harmless: it holds no data of its own, and what a guest has synced is with the host's kernel.
        """

    @abstractmethod
    def detach(self) -> None:
        """Let go of the microVM without ending it, for the next daemon to adopt. Cancels whoever is in ``wait``."""

    @abstractmethod
    async def wait(self) -> Ending:
        """Wait until the microVM has ended, for whatever cause, and its process is reaped."""

    @abstractmethod
    def usage(self) -> Usage:
        """What it costs the host now.

        Raises:
            VmmError: it has ended.
        """

    @abstractmethod
    async def console(self, limit: int = 100) -> str:
        """The guest's last lines on its console, made safe for a terminal.

        It comes from a ring of bounded size, so a guest that prints for ever costs nothing more.
        """


def cause_of_reset(console: str) -> Cause:
    """Tell a reboot from a panic, which ends a guest the same way: only its last words differ."""
    return Cause.GUEST_PANIC if "Kernel panic - not syncing" in console else Cause.GUEST_RESET


def usage_of(pid: int) -> Usage:
    """What a process costs, from proc(5).

    Raises:
        VmmError: it has ended.
    """
    folder = Path("/proc") / str(pid)
    try:
        status = (folder / "status").read_text(errors="replace")
        times = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        raise VmmError("the machine has ended; it uses nothing any more") from None
    kib = {name: int(size) for name, size in re.findall(r"^(VmRSS|RssAnon):\s*(\d+) kB$", status, re.MULTILINE)}
    return Usage(
        resident_bytes=kib.get("VmRSS", 0) * 1024,
        private_bytes=kib.get("RssAnon", 0) * 1024,
        cpu_seconds=(int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"),  # user and system time
    )


@contextmanager
def told_by_host() -> Iterator[None]:
    """Turn what this host refuses into an error of ours."""
    try:
        yield
    except OSError as error:
        raise SetupError(
            f"this host refuses what a machine needs: {error.strerror}",
            hint="it is short of memory, processes or open files; end some machines",
        ) from error


def escape(text: bytes | str) -> str:
    """Make bytes of a guest safe to show: line ends stay, other control characters become visible escapes."""
    if isinstance(text, bytes):
        text = text.decode(errors="backslashreplace")
    return "".join(_visible(char) for char in text.replace("\r\n", "\n").replace("\r", "\n"))


def _visible(char: str) -> str:
    return char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode()
