"""How much memory there is for a model: the host's, or what the control group of this process leaves of it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from fireclaw.errors import SetupError

ROOT: Final = Path("/")


def total_memory(root: Path = ROOT) -> int:
    """Bytes of memory of this host, or the limit of our control group if that is less.

    Args:
        root: where ``proc`` and ``sys`` are.

    Raises:
        SetupError: the kernel does not tell.
    """
    limit = _group_limit(root)
    total = _field(root / "proc/meminfo", "MemTotal:") << 10
    return total if limit is None else min(total, limit)


def available_memory(root: Path = ROOT) -> int:
    """Bytes of memory that this process could still get without swapping.

    Args:
        root: where ``proc`` and ``sys`` are.

    Raises:
        SetupError: the kernel does not tell.
    """
    available = _field(root / "proc/meminfo", "MemAvailable:") << 10
    limit = _group_limit(root)
    if limit is None:
        return available
    group = _group(root)
    used = int((group / "memory.current").read_text("ascii"))
    # Files that were read count as used, but the kernel gives them up when memory is needed.
    reclaimable = _field(group / "memory.stat", "inactive_file")
    return max(0, min(available, limit - used + reclaimable))


def _group_limit(root: Path) -> int | None:
    with suppress(OSError, ValueError):  # "max", no cgroup v2, or the root group, which has no such file
        return int((_group(root) / "memory.max").read_text("ascii"))
    return None


def _group(root: Path) -> Path:
    """The folder of our control group; in a container with a namespace of its own that is the top one."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::/"):
            return root / "sys/fs/cgroup" / line.removeprefix("0::/")
    raise FileNotFoundError("there is no cgroup v2")


def _field(file: Path, name: str) -> int:
    """The first number after a name in a file of names and numbers."""
    for line in file.read_text("ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise SetupError(f"{str(file)!r} does not tell {name.removesuffix(':')}")
