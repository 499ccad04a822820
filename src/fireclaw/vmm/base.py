"""The contract of the VMM family: what a member does for the machines room, and in which words.

A ``Vm`` is one microVM with its VMM process. It carries bytes to the guest (``open_channel``) and does not read
them: hello, identity and commands belong to the layers above.
"""

from __future__ import annotations

import fcntl
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    import socket

    from fireclaw.vmm.process import Child, Gate

KVM: Final = Path("/dev/kvm")
# As root every VMM runs under a user id of its own, so that a guest that broke out of one cannot touch another.
# The range lies above those of systemd, containers and ordinary accounts (systemd's docs/UIDS-GIDS.md).
FIRST_USER: Final = 0x7000_0000
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
        memory_mib: guest memory.
        vcpus: virtual processors.
        accel: what runs them.
        tsc_khz: this host's time stamp counter, from ``host.tsc_khz``.
        folder: the machine's own run folder, 0700, made and removed by the caller; holds sockets.
        slot: the machine's slot; user and group id follow from it where we are root.
        cmdline: more words for the kernel command line.
        tied: the kernel ends the VMM when this process dies, for nobody would adopt it or keep its time limits.
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
    cmdline: tuple[str, ...] = ()
    tied: bool = False

    @property
    def user(self) -> int | None:
        """The user and group id the VMM runs under, or None where we are not root and it runs under ours."""
        return FIRST_USER + self.slot if os.geteuid() == 0 else None


class MemorySnapshot:
    """The memory and device state of a stopped guest, in two sealed memfds: nobody can change them any more.

    Attributes:
        memory: file descriptor of the guest's memory.
        state: file descriptor of the VMM's device state.
    """

    def __init__(self, memory: int, state: int) -> None:
        """Seal both and own them from now on.

        Raises:
            OSError: one is no sealable memfd, or is still mapped writable.
        """
        self.memory = memory
        self.state = state
        for fd in (memory, state):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)

    def close(self) -> None:
        """Give both back; clones that run keep what they mapped."""
        os.close(self.memory)
        os.close(self.state)


class Cause(StrEnum):
    """Why a microVM ended."""

    ASKED = "asked"  # shutdown() or snapshot()
    GUEST_SHUTDOWN = "guest-shutdown"  # the guest switched itself off
    GUEST_RESET = "guest-reset"  # the guest rebooted; a kernel that panics does, too
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


class Vm(ABC):
    """One microVM and its VMM process.

    ::

        vm = await Qemu.boot(spec, gate, snapshottable=True)
        sock = vm.open_channel()
        ...                             # the guest says hello, gets warm; then close the channel
        snapshot = await vm.snapshot()  # the microVM is gone now
        clone = await Qemu.clone(other_spec, gate, snapshot)
        ending = await clone.shutdown(grace_s=2)

    Whatever fails on the way to a running microVM, no process and no socket is left of it.
    """

    def __init__(self, spec: VmSpec) -> None:
        self.spec = spec

    @classmethod
    @abstractmethod
    def fingerprint(cls, spec: VmSpec) -> str:
        """Whatever of the VMM and of this host must be the same for a snapshot to be loadable.

        Files (kernel, initrd, drives) are not in it: the caller knows their digests.

        Raises:
            SetupError: the VMM is not installed.
        """

    @classmethod
    @abstractmethod
    async def boot(cls, spec: VmSpec, gate: Gate, *, snapshottable: bool = False) -> Self:
        """Start a microVM from its kernel; it runs, but the guest is not ready yet.

        Args:
            spec: what to start.
            gate: where its process is made.
            snapshottable: its memory can become a snapshot; without, it is private from the start.

        Raises:
            SetupError: the VMM is not installed, or a file is missing.
            VmmError: the VMM did not start; it says why.
        """

    @classmethod
    @abstractmethod
    async def clone(cls, spec: VmSpec, gate: Gate, snapshot: MemorySnapshot, *, paused: bool = False) -> Self:
        """Start a microVM from a snapshot; no byte of its memory is copied, and the snapshot cannot change.

        Args:
            spec: as the snapshot's source had it, apart from machine_id, folder and slot.
            gate: where its process is made.
            snapshot: what to start from; the caller keeps it open until this returns.
            paused: leave it stopped until ``resume``. Open the channel and write the first bytes before that: a
                guest that wakes with them at hand answers some 10 ms sooner.

        Raises:
            SetupError: the VMM is not installed, or a file is missing.
            VmmError: the VMM did not start, or did not accept the state.
        """

    @classmethod
    @abstractmethod
    async def adopt(cls, spec: VmSpec, child: Child) -> Self:
        """Take over a running microVM that an earlier daemon started.

        Raises:
            VmmError: it does not answer, or its guest has ended; it is gone now.
        """

    @abstractmethod
    def open_channel(self) -> socket.socket:
        """Connect to the guest's end of the channel: a connected, non-blocking stream socket, the caller's to close.

        Bytes of an earlier connection may still come; the hello (``wire.hello``) tells where the new session
        begins. There is one owner at a time: a second connection waits until the first is closed.

        Raises:
            ChannelLostError: the VMM is gone.
        """

    @abstractmethod
    async def pause(self) -> None:
        """Stop the virtual processors."""

    @abstractmethod
    async def resume(self) -> None:
        """Let the virtual processors run on."""

    @abstractmethod
    async def snapshot(self) -> MemorySnapshot:
        """Turn a microVM that was booted ``snapshottable`` into a snapshot. The microVM has ended after this.

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


def escape(text: bytes | str) -> str:
    """Make bytes of a guest safe to show: line ends stay, other control characters become visible escapes."""
    if isinstance(text, bytes):
        text = text.decode(errors="backslashreplace")
    return "".join(_visible(char) for char in text.replace("\r\n", "\n").replace("\r", "\n"))


def _visible(char: str) -> str:
    return char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode()
