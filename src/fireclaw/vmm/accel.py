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
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from fireclaw.errors import MachineError
from fireclaw.vmm.base import KVM
from fireclaw.vmm.host import boot_id

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from fireclaw.vmm.host import HostMemo

DEADLINE_S: Final = 30.0  # a boot takes 2 s; within another virtual machine ten times that


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether guests run on KVM here.

    Attributes:
        works: a guest has booted on it.
        reason: why it is not used, one line for people; empty where it is.
        remedy: what to do about it, where we know.
        hangs: a guest did nothing until it was killed: the fault is KVM's, whatever the VMM.
    """

    works: bool
    reason: str = ""
    remedy: str = ""
    hangs: bool = False


async def prove_kvm(
    memo: HostMemo, vmm: str, boot: Callable[[], Awaitable[None]], *, deadline_s: float = DEADLINE_S
) -> Verdict:
    """Find out whether guests run on KVM here; quick where that is known.

    Args:
        memo: where the verdict of a boot is kept, until the host starts anew.
        vmm: the name of the VMM that is tried.
        boot: boots a guest on KVM, returns once it has said hello, and leaves nothing running, also when it fails
            or is cancelled. A MachineError says that the guest does not run.
        deadline_s: how long the guest may take.
    """
    if kept := find_verdict(memo, vmm):
        return kept
    verdict = await _try(boot, deadline_s)
    if verdict.works or verdict.hangs:  # another reason may be gone at the next start
        memo.put(_key(vmm), {**asdict(verdict), "boot_id": boot_id()})
    return verdict


def find_verdict(memo: HostMemo, vmm: str) -> Verdict | None:
    """What was found out for a VMM in this boot of the host; None if nothing was tried yet."""
    kept = memo.get(_key(vmm)) or {}
    return Verdict(**kept) if kept.pop("boot_id", None) == boot_id() else None


def _key(vmm: str) -> str:
    return f"kvm with {vmm}"


async def _try(boot: Callable[[], Awaitable[None]], deadline_s: float) -> Verdict:
    try:
        async with asyncio.timeout(deadline_s):
            await boot()
    except TimeoutError:
        return Verdict(False, f"a guest hangs on this host's KVM ({deadline_s:g} s without a sign)", hangs=True)
    except MachineError as error:
        return Verdict(False, f"a guest does not start on this host's KVM ({error.message})")
    return Verdict(True)


def find_obstacle(device: Path = KVM, *, jailed: bool = False) -> Verdict | None:
    """Why the device cannot even be tried; None if it can.

    As root we could always open it, but the VMMs run under user ids of their own, with its group and no more.

    Args:
        device: the KVM device.
        jailed: each VMM gets a device node of its own from Firecracker's jailer, whatever the host's node allows.
    """
    try:
        status = device.stat()
    except FileNotFoundError:
        return Verdict(False, f"this host has no {device}", "sudo modprobe kvm_intel, or kvm_amd")
    root = os.geteuid() == 0
    to_all = status.st_mode & 0o006 == 0o006
    if jailed or to_all or (root and _open_to_group(status)) or (not root and os.access(device, os.R_OK | os.W_OK)):
        return None
    user = "machines, which do not run as root" if root else pwd.getpwuid(os.geteuid()).pw_name
    if _open_to_group(status):
        remedy = f"sudo usermod -aG {_group_name(status.st_gid)} {user}, then log in again"
    else:
        remedy = f"sudo chgrp kvm {device} && sudo chmod 660 {device}"
    return Verdict(False, f"{device} is closed to {user}", remedy)


def _open_to_group(status: os.stat_result) -> bool:
    both = stat.S_IRGRP | stat.S_IWGRP
    return status.st_gid != 0 and status.st_mode & both == both


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
