"""The rules of the VMM contract on a real Firecracker, where there is one and KVM works (``tools/lab`` has both).

``FIRECLAW_TEST_FIRECRACKER`` names a folder with the programs ``firecracker`` and ``jailer``.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from exec_rules import *  # noqa: F403 - the suite, over a clone
from firecracker_subjects import CONTROL, NOT_IN_A_JAIL, NOT_ROOT, InFolder, bare_pause, maker
from vm_accidents import *  # noqa: F403 - the suite
from vm_fixtures import *  # noqa: F403 - the suite's
from vm_fixtures import BOOT_S, greet, running
from vm_rules import *  # noqa: F403 - the suite
from vm_subjects import Fate, Lab, Need, Subject, doom_by_cmdline, needs

from fireclaw.errors import GuestTimeoutError
from fireclaw.vmm.accel import find_obstacle
from fireclaw.vmm.base import Accel, Cause
from fireclaw.vmm.firecracker.jail import can_limit
from fireclaw.vmm.firecracker.vm import Firecracker, FirecrackerVm

if TYPE_CHECKING:
    from fireclaw.machines.snapshots import Snapshot

_PROGRAMS = os.environ.get("FIRECLAW_TEST_FIRECRACKER", "")


def _why_not() -> str:
    """Why no real one can be tried here."""
    if not _PROGRAMS:
        return "FIRECLAW_TEST_FIRECRACKER names no programs"
    if (obstacle := find_obstacle(jailed=not NOT_ROOT)) is not None:
        return obstacle.reason
    # A paravirtual KVM opens and answers, and hangs every guest.
    if not {"svm", "vmx"} & set(Path("/proc/cpuinfo").read_text().split()):
        return "this host's processor has neither svm nor vmx"
    return ""


def _install(folder: Path) -> None:
    folder.symlink_to(_PROGRAMS)


SUBJECTS = [
    Subject(
        name="Firecracker in a jail",
        make=maker(Firecracker, _install),
        doom=doom_by_cmdline,
        control=CONTROL,
        accel=Accel.KVM,
        lacks={} if can_limit() else {Need.CGROUP: "this host has no cgroup v2 that we may use"},
        unavailable=_why_not() or NOT_ROOT,
    ),
    Subject(
        name="Firecracker",
        make=maker(InFolder, _install),
        doom=doom_by_cmdline,
        control=CONTROL,
        accel=Accel.KVM,
        lacks=NOT_IN_A_JAIL,
        unavailable=_why_not(),
    ),
]


class TestFirecracker:
    """What only Firecracker has, seen on a real one."""

    @needs(Need.KERNEL)
    async def test_a_bare_pause_wedges_it_and_ours_does_not(self, lab: Lab, template: Snapshot) -> None:
        """Its issue 6100: after Paused and Resumed alone no connection is answered; ours heals even that."""
        async with running(lab, template) as clone:
            assert isinstance(clone, FirecrackerVm)
            await greet(clone, template.magic)
            await bare_pause(clone)
            with pytest.raises(GuestTimeoutError):
                await clone.open_channel(timeout_s=5)
            await clone.pause()
            await clone.resume()
            await greet(clone, template.magic)

    @needs(Need.KERNEL)
    async def test_a_guest_that_halts_is_noticed(self, lab: Lab) -> None:
        """A guest that halts is as good as one that switches itself off, and Firecracker notices neither."""
        vmm, spec = lab.subject.doom(lab, Fate.HALT)
        vm = await vmm.boot(spec)
        async with asyncio.timeout(BOOT_S):
            assert (await vm.wait()).cause is Cause.GUEST_SHUTDOWN
