"""Programs that the builders start: their words, their failures, their end."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import SetupError
from fireclaw.images import tool

if TYPE_CHECKING:
    from pathlib import Path

# Holds a lock for ever; a grandchild holds it too.
HOLDER = "exec 9>{lock}; flock 9; sleep 1000 & echo locked; wait"

BUILDER = """
import sys
from fireclaw.images import tool
tool.watch(["sh", "-c", sys.argv[1]], lambda line: print(line, flush=True), prefix={prefix})
"""


def wait_until_free(lock: Path) -> None:
    """Return when nobody holds the lock any more; the test's time-out is the limit."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def kill_builder_of(script: str, prefix: str) -> None:
    """Start a builder that runs a script, and kill it once the script says that it is locked."""
    argv = [sys.executable, "-c", BUILDER.format(prefix=prefix), script]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "locked\n"
        builder.kill()


def test_output_comes_back_and_the_environment_is_made_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program sees the C locale and what it is given, and none of the caller's secrets."""
    monkeypatch.setenv("SECRET_KEY", "hidden")

    said = tool.run(["env"], env={"TMPDIR": "/somewhere"})
    assert {"LC_ALL=C.UTF-8", "TMPDIR=/somewhere"} <= set(said.splitlines())
    assert "hidden" not in said


def test_a_failure_carries_the_last_words() -> None:
    """The error of a failed program has its name, its status and what it said last."""
    with pytest.raises(SetupError, match=r"^'sh' failed with status 3: b \| c \| d$"):
        tool.run(["sh", "-c", "for word in a b c d; do echo $word >&2; done; exit 3"])
    with pytest.raises(SetupError, match=r"^'sh' failed with status 3: out \| err$"):
        tool.watch(["sh", "-c", "echo out; echo err >&2; exit 3"], print)


def test_a_program_that_was_killed_says_so() -> None:
    """Death by a signal is told by the signal's name."""
    with pytest.raises(SetupError, match=r"'sh' was killed by SIGTERM: it said nothing"):
        tool.run(["sh", "-c", "kill -TERM $$"])


def test_a_missing_program_is_an_error_of_the_host() -> None:
    """A program that is not installed is named."""
    with pytest.raises(SetupError, match="'no-such-program' is not installed"):
        tool.run(["no-such-program"])


def test_lines_come_while_the_program_runs() -> None:
    """Each line is handed over before the next one is written."""
    seen: list[str] = []
    tool.watch(["sh", "-c", "echo one; echo two >&2; echo three"], seen.append)

    assert seen == ["one", "two", "three"]


def test_a_reader_that_fails_ends_the_program(tmp_path: Path) -> None:
    """An exception in the block kills the program and all of its session, and passes through."""
    lock = tmp_path / "lock"

    def read_one() -> None:
        with tool.reading(["sh", "-c", HOLDER.format(lock=lock)]) as stream:
            assert stream.readline() == b"locked\n"
            raise LookupError

    with pytest.raises(LookupError):
        read_one()
    wait_until_free(lock)


def test_a_killed_builder_takes_its_program_along(tmp_path: Path) -> None:
    """A kill -9 of the builder ends the program that it was running."""
    lock = tmp_path / "lock"
    kill_builder_of(f"exec 9>{lock}; flock 9; echo locked; exec sleep 1000", "()")

    wait_until_free(lock)


def test_a_killed_builder_takes_a_whole_room_along(tmp_path: Path) -> None:
    """A kill -9 of the builder ends every process in a root room, and its mounts with them."""
    try:
        tool.watch(["true"], print, prefix=tool.root_room())
    except SetupError as error:
        pytest.skip(f"needs namespaces: {error}")
    lock, mounted = tmp_path / "lock", tmp_path / "mounted"
    mounted.mkdir()
    kill_builder_of(f"mount -t tmpfs none {mounted} || exit; {HOLDER.format(lock=lock)}", "tool.root_room()")

    wait_until_free(lock)
    assert not mounted.is_mount()
