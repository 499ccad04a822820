"""The VMMs of this host, and the one that new machines get.

Firecracker where it is installed and a guest of ours has booted on it; otherwise QEMU, on KVM where a guest has booted
on that, and on the software CPU elsewhere. The settings can ask for one of them.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from fireclaw.errors import SetupError
from fireclaw.vmm.accel import Verdict, find_obstacle, prove_kvm
from fireclaw.vmm.base import Accel
from fireclaw.vmm.firecracker import release
from fireclaw.vmm.firecracker.vm import Firecracker
from fireclaw.vmm.qemu import Qemu

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fireclaw.paths import Home
    from fireclaw.vmm.base import Vmm
    from fireclaw.vmm.host import HostMemo
    from fireclaw.vmm.process import Gate

    Prove = Callable[[Vmm, Accel], Awaitable[None]]

_ASKED: Final = "the settings ask for QEMU"
_NO_FAULT: Final = {_ASKED, release.MISSING}  # not why the software CPU is used

WantedVmm = Literal["auto", "firecracker", "qemu"]
WantedAccel = Literal["auto", "kvm", "tcg"]


@dataclass(frozen=True, slots=True)
class Choice:
    """What new machines get.

    Attributes:
        vmm: the program.
        accel: what runs their instructions.
        why: one line for people; empty where the settings ask for just this.
    """

    vmm: Vmm
    accel: Accel
    why: str = ""


class Family:
    """All VMMs of one home.

    Args:
        gate: where their processes are made.
        home: where programs are installed and jails made.
        memo: where verdicts about KVM are kept.
        vmm: which one is wanted.
        accel: what should run the guests' instructions.
        say: takes the line that tells what was chosen and why.

    Attributes:
        choice: what new machines get; None before the first.
    """

    def __init__(
        self,
        gate: Gate,
        home: Home,
        memo: HostMemo,
        *,
        vmm: WantedVmm,
        accel: WantedAccel,
        say: Callable[[str], None],
    ) -> None:
        self._firecracker = Firecracker(gate, home)
        self._qemu = Qemu(gate)
        self._memo = memo
        self._vmm = vmm
        self._accel = accel
        self._say = say
        self.choice: Choice | None = None

    def named(self, name: str) -> Vmm:
        """The VMM of that name in the store."""
        return self._firecracker if name == Firecracker.name else self._qemu

    def all(self) -> list[Vmm]:
        """Every one of them."""
        return [self._firecracker, self._qemu]

    async def choose(self, prove: Prove) -> tuple[Vmm, Accel]:
        """Choose, once in a daemon's life.

        Args:
            prove: boots a guest and hears it; errors and cancellation as for ``accel.prove_kvm``.

        Raises:
            SetupError: what the settings ask for is not to be had, and why.
        """
        if self.choice is None:
            self.choice = await self._choose(prove)
            if self.choice.why:
                self._say(self.choice.why)
        return self.choice.vmm, self.choice.accel

    async def _choose(self, prove: Prove) -> Choice:
        if self._vmm == "firecracker":
            return await self._only_firecracker(prove)
        if self._accel == "tcg":
            return Choice(self._qemu, Accel.TCG)
        no_firecracker = Verdict(False, _ASKED)
        if self._vmm == "auto":
            no_firecracker = await self._try_firecracker(prove)
            if no_firecracker.works:
                return Choice(self._firecracker, Accel.KVM, "machines run on Firecracker with KVM")
        if self._accel == "kvm":
            return Choice(self._qemu, Accel.KVM)
        kvm = no_firecracker if no_firecracker.hangs else await self._try_qemu(prove)
        if kvm.works:
            return Choice(self._qemu, Accel.KVM, f"machines run on QEMU with KVM: {_told(no_firecracker)}")
        return Choice(
            self._qemu,
            Accel.TCG,
            "machines run on QEMU with the software CPU, several times slower: "
            + "; ".join(dict.fromkeys(_told(each) for each in (no_firecracker, kvm) if each.reason not in _NO_FAULT)),
        )

    async def _only_firecracker(self, prove: Prove) -> Choice:
        if self._accel == "tcg":
            raise SetupError("Firecracker needs KVM, and the settings ask for the software CPU", hint="set vmm to qemu")
        await asyncio.to_thread(self._firecracker.check)
        if obstacle := find_obstacle(jailed=self._firecracker.jailed):
            raise SetupError(f"Firecracker cannot be used: {obstacle.reason}", hint=obstacle.remedy)
        if self._accel == "auto":
            verdict = await self._try_firecracker(prove)
            if not verdict.works:
                raise SetupError(f"Firecracker cannot be used: {verdict.reason}", hint=verdict.remedy)
        return Choice(self._firecracker, Accel.KVM)

    async def _try_firecracker(self, prove: Prove) -> Verdict:
        """Whatever it lacks, there is QEMU."""
        try:
            await asyncio.to_thread(self._firecracker.check)
            if obstacle := find_obstacle(jailed=self._firecracker.jailed):
                return obstacle
            if self._accel == "kvm":  # asked for: no proof is wanted
                return Verdict(True)
            return await prove_kvm(self._memo, Firecracker.name, lambda: prove(self._firecracker, Accel.KVM))
        except SetupError as error:
            return Verdict(False, error.message, error.hint)

    async def _try_qemu(self, prove: Prove) -> Verdict:
        if obstacle := find_obstacle():  # not kept: what is in the way may be gone at the next start
            return obstacle
        return await prove_kvm(self._memo, Qemu.name, lambda: prove(self._qemu, Accel.KVM))


def _told(verdict: Verdict) -> str:
    return f"{verdict.reason} (remedy: {verdict.remedy})" if verdict.remedy else verdict.reason
