"""How much memory there is, from files as kernels write them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import SetupError
from fireclaw.llm.memory import available_memory, total_memory

if TYPE_CHECKING:
    from pathlib import Path

KIB = 1 << 10
MEMINFO = "MemTotal:       8000000 kB\nMemFree:          100000 kB\nMemAvailable:   6000000 kB\n"


def write(root: Path, **files: str) -> Path:
    """Make a tree with these files; ``__`` in a name stands for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_a_limit_the_host_counts(tmp_path: Path) -> None:
    """The root group has no limit."""
    root = write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/\n")
    assert (total_memory(root), available_memory(root)) == (8_000_000 * KIB, 6_000_000 * KIB)


def test_without_control_groups_the_host_counts(tmp_path: Path) -> None:
    """An old hierarchy is not looked at."""
    root = write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="4:memory:/user\n")
    assert (total_memory(root), available_memory(root)) == (8_000_000 * KIB, 6_000_000 * KIB)


@pytest.mark.parametrize(
    ("limit", "used", "inactive", "expected"),
    [
        ("max\n", 0, 0, (8_000_000 * KIB, 6_000_000 * KIB)),
        ("1000\n", 900, 300, (1000, 400)),
        ("1000\n", 1200, 0, (1000, 0)),
        (f"{1 << 60}\n", 0, 0, (8_000_000 * KIB, 6_000_000 * KIB)),
    ],
)
def test_a_limit_of_the_group_counts(
    tmp_path: Path, limit: str, used: int, inactive: int, expected: tuple[int, int]
) -> None:
    """What is used is taken off, except files that the kernel would give up."""
    root = write(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/system.slice/fireclaw.service\n")
    group = root / "sys/fs/cgroup/system.slice/fireclaw.service"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(limit)
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\n")
    assert (total_memory(root), available_memory(root)) == expected


def test_this_host_tells() -> None:
    """The real files are understood."""
    assert 0 < available_memory() <= total_memory()


def test_a_kernel_that_does_not_tell_is_an_error(tmp_path: Path) -> None:
    """The file and the field are named."""
    root = write(tmp_path, proc__meminfo="MemFree: 1 kB\n", proc__self__cgroup="0::/\n")
    with pytest.raises(SetupError, match="meminfo' does not tell MemTotal"):
        total_memory(root)
