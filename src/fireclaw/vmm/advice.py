"""What of this host's settings slows machines down, or lets them learn of each other, and the command that mends it.

Read from the kernel's files, which everybody may read. The source is Firecracker's docs/prod-host-setup.md, and for
cgroup v1 its issue 2129.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_FAVORDYNMODS_SINCE: Final = (6, 0)
_LOUD: Final = 4  # a console level above warnings


@dataclass(frozen=True, slots=True)
class Advice:
    """One setting.

    Attributes:
        reason: what it does to machines.
        remedy: the command that changes it until the host starts anew.
    """

    reason: str
    remedy: str


def find_slow(root: Path = Path("/"), kernel: str = "") -> list[Advice]:
    """What makes the start of machines slower than it need be.

    Args:
        root: where proc and sys are mounted.
        kernel: the release of the kernel; this host's where empty.
    """
    release = tuple(map(int, re.findall(r"\d+", kernel or os.uname().release)[:2]))
    return [*_slow_cgroups(root, release), *_loud_console(root), *_idle_huge_pages(root)]


def find_leaks(root: Path = Path("/")) -> list[Advice]:
    """What lets machines learn of each other, or their memory reach the disk; ``root`` as for ``find_slow``."""
    found = []
    if _read(root / "sys/devices/system/cpu/smt/active") == "1":
        found.append(
            Advice(
                "SMT is on: guests on two threads of one core can spy on each other",
                "where they are hostile: echo off | sudo tee /sys/devices/system/cpu/smt/control",
            )
        )
    if _read(root / "sys/kernel/mm/ksm/run") == "1":
        found.append(
            Advice(
                "KSM is on: how long a write takes tells a guest what others have in memory",
                "echo 2 | sudo tee /sys/kernel/mm/ksm/run",
            )
        )
    if swaps := [swap for swap in _swaps(root) if not _encrypted(root, swap)]:
        names = ", ".join(swaps)
        found.append(
            Advice(f"guests' memory can reach the disk: {names} is not encrypted", "encrypt it, or swapoff -a")
        )
    return found


def _slow_cgroups(root: Path, kernel: tuple[int, ...]) -> Iterator[Advice]:
    mounts = _cgroup_mounts(root)
    # KVM moves a thread of its own into the VMM's cgroup with each machine, and that move is what waits.
    recovers = _read(root / "sys/module/kvm/parameters/nx_huge_pages") != "never"
    if any(kind == "cgroup" for kind, _, _ in mounts):
        yield Advice(
            "KVM needs some 30 ms more for each machine: cgroup v1 is used",
            "boot with systemd.unified_cgroup_hierarchy=1",
        )
        return
    for kind, place, options in mounts:
        if kind == "cgroup2" and kernel >= _FAVORDYNMODS_SINCE and recovers and "favordynmods" not in options:
            remedy = f"sudo mount -o remount,favordynmods {place}"
            if _read(root / "sys/devices/system/cpu/vulnerabilities/itlb_multihit") == "Not affected":
                remedy += "; or load kvm with nx_huge_pages=never, as this processor has no iTLB multihit"
            yield Advice(
                "KVM needs some 30 ms more for each machine: cgroup v2 is mounted without favordynmods", remedy
            )


def _cgroup_mounts(root: Path) -> list[tuple[str, str, list[str]]]:
    """Type, place and options of each mounted hierarchy with controllers; see proc_pid_mountinfo(5)."""
    found = []
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(maxsplit=2)
        named = kind == "cgroup" and "name=" in options  # systemd's own, without a controller
        if kind in {"cgroup", "cgroup2"} and not named:
            found.append((kind, before.split()[4], options.split(",")))
    return found


def _loud_console(root: Path) -> Iterator[Advice]:
    level = _read(root / "proc/sys/kernel/printk").split()
    consoles = _read(root / "sys/class/tty/console/active").split()
    serial = [name for name in consoles if name.startswith("ttyS")]  # writing to one is slow
    if serial and level and int(level[0]) > _LOUD:
        yield Advice(f"starts wait for the kernel's messages on {serial[0]}", "sudo dmesg -n 1")


def _idle_huge_pages(root: Path) -> Iterator[Advice]:
    for pool in sorted((root / "sys/kernel/mm/hugepages").glob("hugepages-*kB")):
        number, kib = _read(pool / "nr_hugepages"), int(pool.name.removeprefix("hugepages-").removesuffix("kB"))
        if number not in {"", "0"}:
            place = "/" + str((pool / "nr_hugepages").relative_to(root))
            yield Advice(
                f"{int(number) * kib >> 10} MiB are set aside as huge pages, which clones cannot use: they share pages",
                f"echo 0 | sudo tee {place}",
            )


def _swaps(root: Path) -> list[str]:
    return [line.split()[0] for line in _read(root / "proc/swaps").splitlines()[1:]]


def _encrypted(root: Path, swap: str) -> bool:
    """Whether a swap never reaches a disk in the clear."""
    name = Path(swap).name
    return name.startswith("zram") or _read(root / f"sys/block/{name}/dm/uuid").startswith("CRYPT-")


def _read(path: Path) -> str:
    """A file of the kernel's; empty where it has none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
