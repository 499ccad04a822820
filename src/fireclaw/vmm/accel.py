"""Whether KVM really works here: the proof is a guest that boots, and the verdict is remembered for this boot.

A half-virtualised /dev/kvm opens, answers every question and even runs sixteen bytes of code, then hangs a real
kernel. So nothing short of a booted guest counts, and it has a deadline.
"""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fireclaw.errors import MachineError
from fireclaw.vmm.base import KVM, Accel
from fireclaw.vmm.host import boot_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from fireclaw.vmm.host import HostMemo

DEADLINE_S: Final = 20.0
_KEY: Final = "accel"
_SLOWER: Final = "guests run on the software CPU, several times slower"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What guests run on here.

    Attributes:
        accel: the accelerator to use.
        reason: why KVM is not used, one line for people; empty where it is.
        remedy: what to do about it, where we know.
    """

    accel: Accel
    reason: str = ""
    remedy: str = ""


async def prove_accel(
    memo: HostMemo, boot: Callable[[], Awaitable[None]], *, device: Path = KVM, deadline_s: float = DEADLINE_S
) -> Verdict:
    """Find out what guests run on here. Quick where the answer is known or the device is closed to us.

    Args:
        memo: where the verdict of a boot is kept, until the host starts anew.
        boot: boots a guest on KVM, returns once it has said hello, and leaves nothing running, also when it fails
            or is cancelled. A MachineError says that the guest does not run.
        device: the KVM device.
        deadline_s: how long the guest may take.
    """
    if obstacle := find_obstacle(device):
        return obstacle  # not kept: what is in the way may be gone at the next start
    if kept := find_verdict(memo):
        return kept
    verdict = await _try(boot, deadline_s)
    memo.put(_KEY, {"accel": verdict.accel, "reason": verdict.reason, "boot_id": boot_id()})
    return verdict


def find_verdict(memo: HostMemo) -> Verdict | None:
    """What was found out in this boot of the host; None if nothing was tried yet."""
    kept = memo.get(_KEY) or {}
    return Verdict(Accel(kept["accel"]), kept["reason"]) if kept.get("boot_id") == boot_id() else None


async def _try(boot: Callable[[], Awaitable[None]], deadline_s: float) -> Verdict:
    try:
        async with asyncio.timeout(deadline_s):
            await boot()
    except TimeoutError:
        return Verdict(Accel.TCG, f"a guest hangs on this host's KVM ({deadline_s:g} s without a sign): {_SLOWER}")
    except MachineError as error:
        return Verdict(Accel.TCG, f"a guest does not start on this host's KVM ({error.message}): {_SLOWER}")
    return Verdict(Accel.KVM)


def find_obstacle(device: Path = KVM) -> Verdict | None:
    """Why the device cannot even be tried; None if it can.

    As root we could always open it, but the VMMs run under user ids of their own, with its group and no more.
    """
    try:
        status = device.stat()
    except FileNotFoundError:
        return Verdict(Accel.TCG, f"this host has no {device}: {_SLOWER}", "sudo modprobe kvm_intel, or kvm_amd")
    root = os.geteuid() == 0
    to_all = status.st_mode & 0o006 == 0o006
    if to_all or (root and _open_to_group(status)) or (not root and os.access(device, os.R_OK | os.W_OK)):
        return None
    user = "machines, which do not run as root" if root else pwd.getpwuid(os.geteuid()).pw_name
    if _open_to_group(status):
        remedy = f"sudo usermod -aG {_group_name(status.st_gid)} {user}, then log in again"
    else:
        remedy = f"sudo chgrp kvm {device} && sudo chmod 660 {device}"
    return Verdict(Accel.TCG, f"{device} is closed to {user}: {_SLOWER}", remedy)


def _open_to_group(status: os.stat_result) -> bool:
    both = stat.S_IRGRP | stat.S_IWGRP
    return status.st_gid != 0 and status.st_mode & both == both


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
