"""Firecracker as a subject of the VMM contract: installed in a lab, in a jail or in the machine's own folder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vm_subjects import Control, Need

from fireclaw.vmm.firecracker import bodies, release
from fireclaw.vmm.firecracker.api import Api
from fireclaw.vmm.firecracker.vm import Firecracker, FirecrackerVm

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vm_subjects import Lab

CONTROL = Control(Api, "_request")


class InFolder(Firecracker):
    """Without a jail, also as root: as a person's machines are."""

    @property
    def jailed(self) -> bool:
        """Never."""
        return False


def maker(kind: type[Firecracker], install: Callable[[Path], object]) -> Callable[[Lab], Firecracker]:
    """What makes a lab's Firecracker, after installing it."""

    def make(lab: Lab) -> Firecracker:
        place = release.folder(lab.home.vmms)
        place.parent.mkdir(exist_ok=True)
        install(place)
        return kind(lab.gate, lab.home)

    return make


async def bare_pause(vm: FirecrackerVm) -> None:
    """Pause and resume a machine behind its driver's back, with nothing between."""
    api = await Api.connect(vm._place.connect(bodies.CONTROL))
    for word in ("Paused", "Resumed"):
        await api.patch("/vm", bodies.state(word))
    api.close()


NOT_IN_A_JAIL = {
    Need.JAIL: "only root's machines are in jails",
    Need.CGROUP: "only root's machines have cgroups",
    Need.USER: "without a jail they have that of their daemon",
}
NOT_ROOT = "" if os.geteuid() == 0 else "only root can make jails"
