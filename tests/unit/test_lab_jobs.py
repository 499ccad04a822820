"""The lab's list of jobs, and how L1 watches one."""

from __future__ import annotations

import subprocess
import sys
import time
from io import BytesIO
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import NotFoundError
from lab import inside, jobs

if TYPE_CHECKING:
    from pathlib import Path

_LAB_S = 25 * 60
_PREPARE_S = 20  # before L1 starts, with a disk that is built


def test_all_jobs_end_within_25_minutes() -> None:
    """Even if every job that nobody asked for runs into its limit, the lab ends in time."""
    assert _PREPARE_S + jobs.longest([job for job in jobs.load() if not job.extra]) <= _LAB_S


def test_names_are_folders_of_their_own() -> None:
    """No two jobs share a folder in the results."""
    names = [job.name for job in jobs.load()]
    assert len(set(names)) == len(names)
    assert all("/" not in name for name in names)


def test_an_unknown_job_is_refused_with_the_nearest_name() -> None:
    """A slip in the name tells what was meant."""
    with pytest.raises(NotFoundError, match="smoke"):
        jobs.find("smok")


def test_pytest_arguments_reach_pytest_as_they_were_typed() -> None:
    """Blanks and quotes of an expression survive the shell in L1."""
    job = jobs.asked(pytest=["tests/x.py", "-k", "a and not 'b'"])
    words = subprocess.run(
        ["bash", "-c", job.command.replace("python3 -m pytest", "printf '%s\\n'", 1)],
        env={"LAB_OUT": "/o"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert words[-4:] == ["--junit-xml=/o/junit.xml", "tests/x.py", "-k", "a and not 'b'"]


def _watch(folder: Path, command: str, *, seconds: float) -> tuple[str, bytes]:
    """Watch a command as L1 does, once it has said so on stderr; return how it ended and what was shown."""
    shown = BytesIO()
    with (
        (folder / "log").open("wb") as log,
        (folder / "log").open("rb") as seen,
        subprocess.Popen(
            [sys.executable, "-c", command], stdout=log, stderr=subprocess.PIPE, start_new_session=True
        ) as process,
    ):
        assert process.stderr is not None
        process.stderr.readline()
        end = inside._watch(process, seen, shown, time.monotonic() + seconds)
        shown.write(seen.read())
    return end, shown.getvalue()


@pytest.mark.parametrize(("status", "end"), [(0, "passed"), (3, "failed with status 3")])
def test_a_job_is_judged_by_its_status(tmp_path: Path, status: int, end: str) -> None:
    """Zero is passed, everything else is told."""
    command = f"import sys; print('said', flush=True); print(file=sys.stderr); sys.exit({status})"
    assert _watch(tmp_path, command, seconds=60) == (end, b"said\n")


_REPORTS_WHEN_INTERRUPTED = """
import signal, sys
signal.signal(signal.SIGINT, lambda *_: sys.exit(print("report", flush=True)))
print(file=sys.stderr, flush=True)
signal.pause()
"""


def test_a_job_at_its_limit_may_say_what_it_had(tmp_path: Path) -> None:
    """It is interrupted before it is killed, for pytest then still writes its report."""
    assert _watch(tmp_path, _REPORTS_WHEN_INTERRUPTED, seconds=0) == ("ended at its limit", b"report\n")


def test_a_job_that_does_not_heed_its_limit_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The jobs after it get their time."""
    monkeypatch.setattr(inside, "LAST_WORDS_S", 0.05)
    deaf = _REPORTS_WHEN_INTERRUPTED.replace('sys.exit(print("report", flush=True))', "None")
    assert _watch(tmp_path, f"{deaf}while True: signal.pause()", seconds=0) == ("ended at its limit", b"")
