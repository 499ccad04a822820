"""Workspace drives: what is on a new one, and what is left when one cannot be made."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import ConflictError, SetupError
from fireclaw.images import tool
from fireclaw.machines.workspace import blank_drive, make_workspace, sweep

if TYPE_CHECKING:
    from pathlib import Path


def debugfs(path: Path, request: str) -> str:
    """Ask the file system's own tools about a drive."""
    return subprocess.run(["/sbin/debugfs", "-R", request, path], capture_output=True, text=True, check=True).stdout


def test_a_workspace_is_an_empty_drive_of_the_workloads_user(tmp_path: Path) -> None:
    """It is a file of that size, ours alone and mostly a hole, with a sound ext4 whose root belongs to user 1000."""
    path = tmp_path / "drive"
    make_workspace(path, 32)

    status = path.stat()
    assert (status.st_size, status.st_mode & 0o7777, status.st_nlink) == (32 << 20, 0o600, 1)
    assert status.st_blocks * 512 < 1 << 20
    assert re.search(r"User:\s+1000\s+Group:\s+1000", debugfs(path, "stat /"))
    assert re.search(r"Reserved block count:\s+0\n", debugfs(path, "show_super_stats -h"))
    assert subprocess.run(["/sbin/e2fsck", "-fn", path], capture_output=True, check=False).returncode == 0
    assert list(tmp_path.iterdir()) == [path]


def test_a_workspace_is_never_replaced(tmp_path: Path) -> None:
    """A file that is there already stays as it is, and whoever asked is told."""
    path = tmp_path / "drive"
    path.write_text("somebody's work")

    with pytest.raises(ConflictError, match=f"there is a workspace '{path}' already"):
        make_workspace(path)

    assert path.read_text() == "somebody's work"
    assert list(tmp_path.iterdir()) == [path]


def test_a_host_without_its_tool_is_told_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where mkfs.ext4 is missing the error names the package that brings it, and nothing is left."""
    monkeypatch.setattr(tool, "_PATH", str(tmp_path))

    with pytest.raises(SetupError) as caught:
        make_workspace(tmp_path / "drive")

    assert caught.value.message == "the program 'mkfs.ext4' is not installed"
    assert caught.value.hint.endswith(" e2fsprogs")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The error says which workspace cannot be made, and why."""
    path = tmp_path / "no" / "drive"
    with pytest.raises(SetupError, match=f"cannot make the workspace '{path}': No such file or directory"):
        make_workspace(path)


@pytest.mark.parametrize("size", ["64k", "0-inodes"])
def test_a_full_disk_is_told_and_left_as_it_was(tmp_path: Path, size: str) -> None:
    """Where there is no room for the file system's tables, or for the file, nothing is left of either."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("a disk of a size of one's own needs root and a mount namespace")
    script = (
        "import os, sys, pathlib\n"
        "from fireclaw.errors import SetupError\n"
        "from fireclaw.machines.workspace import make_workspace\n"
        "try:\n make_workspace(pathlib.Path(sys.argv[1]) / 'drive')\n"
        "except SetupError as error:\n print(error.message)\n"
        "print(os.listdir(sys.argv[1]))\n"
    )
    options = "nr_inodes=1" if size == "0-inodes" else f"size={size}"
    mount = f'mount -t tmpfs -o {options} none "$0" && exec "$@"'
    argv = ["unshare", "-m", "sh", "-c", mount, str(tmp_path), sys.executable, "-c", script, str(tmp_path)]

    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)

    message, left = done.stdout.splitlines()
    assert "No space left on device" in message
    assert left == "[]"


def test_only_what_nobody_needs_any_more_is_swept(tmp_path: Path) -> None:
    """What killed makers and templates left goes; what is being made, is in use, or is whole, stays."""
    names = ("a", "b.x.unfinished", "c.y.unfinished", "dead.blank", "living.blank")
    whole, left, begun, dead, living = (tmp_path / name for name in names)
    for path in (whole, left, begun, dead, living):
        path.touch()
    with begun.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)

        assert sweep(tmp_path, {"living"}) == [left.name, dead.name]

    assert sorted(tmp_path.iterdir()) == [whole, begun, living]
    assert sweep(tmp_path, {"living"}) == [begun.name]


def test_a_template_has_a_drive_for_a_while(tmp_path: Path) -> None:
    """In the place of workspaces it has an empty file of their size, which goes; without workspaces it has none."""
    with blank_drive(tmp_path, "m", 1 << 20) as blank:
        assert blank is not None
        assert (blank.stat().st_size, blank.stat().st_blocks) == (1 << 20, 0)
        assert sweep(tmp_path, {"m"}) == []
    assert list(tmp_path.iterdir()) == []
    with blank_drive(tmp_path, "m", 0) as nothing:
        assert nothing is None
