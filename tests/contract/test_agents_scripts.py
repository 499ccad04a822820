"""The file tools' scripts in each shell that an image may have: the same bytes, the same statuses."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from fireclaw.agents import scripts

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Shell:
    """A shell with the tools that go with it.

    Attributes:
        argv: how it is started.
        path: where its tools are.
        folder: where scripts run.
    """

    argv: list[str]
    path: str
    folder: Path

    def run(self, script: str, *arguments: str, stdin: bytes = b"") -> tuple[int, bytes]:
        """Run a script as the machine does; return its status and output."""
        done = subprocess.run(
            [*self.argv, "-c", script, "sh", *arguments],
            cwd=self.folder,
            env={"PATH": self.path, "HOME": str(self.folder)},
            input=stdin,
            capture_output=True,
            timeout=30,
            check=False,
        )
        return done.returncode, done.stdout


@pytest.fixture(params=["dash", "bash", "busybox"])
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Shell:
    """A shell of this host: Debian's, the one that people know, and busybox with nothing but its own tools."""
    program = shutil.which(request.param)
    if program is None:
        pytest.skip(f"this host has no {request.param}")
    folder, tools = tmp_path / "work", tmp_path / "tools"
    folder.mkdir()
    tools.mkdir()
    if request.param != "busybox":
        return Shell([program], os.environ["PATH"], folder)
    subprocess.run([program, "--install", "-s", tools], check=True)
    return Shell([program, "sh"], str(tools), folder)


def test_a_file_goes_there_and_back(shell: Shell) -> None:
    """Any bytes under any name are written, appended to and read, with size and lines."""
    data = bytes(range(256)) * 3 + b"\nend"
    for name in ("a", "deep/er/é '\"$x", "-e", "new\nline"):
        assert shell.run(scripts.WRITE, name, "replace", "1234", stdin=data)[0] == 0
        assert shell.run(scripts.WRITE, name, "append", "1234", stdin=b"!")[0] == 0
        assert shell.run(scripts.READ_WHOLE, name, "9999") == (0, data + b"!")
        assert (shell.folder / name).read_bytes() == data + b"!"
        status, printed = shell.run(scripts.READ, name, "5", "3")
        assert (status, printed.split()) == (0, [b"4", b"773", b"end"])
    assert [path.name for path in shell.folder.rglob(".fireclaw*")] == []


def test_a_disk_without_room_leaves_the_old_file(shell: Shell) -> None:
    """A write that breaks off leaves neither half a file nor its draft."""
    (shell.folder / "f").write_bytes(b"old")
    limited = f"trap '' XFSZ; ulimit -f 1\n{scripts.WRITE}"
    status, _ = shell.run(limited, "f", "replace", "1234", stdin=b"x" * 100_000)
    assert status == scripts.FAILED
    assert (shell.folder / "f").read_bytes() == b"old"
    assert [path.name for path in shell.folder.iterdir()] == ["f"]


def test_listing_and_searching(shell: Shell) -> None:
    """Entries come with kind and size, matches with path and line; a broken expression is a text."""
    (shell.folder / "sub").mkdir()
    (shell.folder / "sub/a b.py").write_text("x = (1\n")
    (shell.folder / "bin").write_bytes(b"\0x = (1\0")
    (shell.folder / "link").symlink_to("sub")
    status, printed = shell.run(scripts.LIST, ".", "2", "10")
    assert status == 0
    lines = {line.replace(b"'", b"") for line in printed.splitlines()}
    assert {b"regular file|7|./sub/a b.py", b"symbolic link|3|./link -> sub"} <= lines
    assert shell.run(scripts.SEARCH, ".", "x = (", "*.py", "10") == (0, b"./sub/a b.py:1:x = (1\n")
    assert shell.run(scripts.SEARCH, "link", "x", "*", "10") == (0, b"link/a b.py:1:x = (1\n")
    assert shell.run(scripts.SEARCH, "none", "x", "*", "10")[0] == scripts.MISSING


@pytest.mark.parametrize(
    ("make", "read", "written"),
    [
        (lambda _: None, scripts.MISSING, 0),
        (lambda path: path.mkdir(), scripts.FOLDER, scripts.FOLDER),
        (lambda path: path.symlink_to("nowhere/at/all"), scripts.DANGLING, scripts.DANGLING),
        (lambda path: path.symlink_to("/dev/null"), scripts.SPECIAL, scripts.SPECIAL),
    ],
    ids=["missing", "folder", "dangling", "device"],
)
def test_what_is_no_file_is_said(shell: Shell, make: object, read: int, written: int) -> None:
    """Each kind of thing that is no file has its status, for reading and for writing."""
    assert callable(make)
    make(shell.folder / "it")
    assert shell.run(scripts.READ, "it", "1", "9")[0] == read
    assert shell.run(scripts.WRITE, "it", "replace", "1234", stdin=b"x")[0] == written
