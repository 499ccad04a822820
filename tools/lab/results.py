"""What came out of L1, and what it says."""

from __future__ import annotations

import json
import os
import tarfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

from fireclaw.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_DRIVE_BYTES = 1 << 30
_L1 = "l1.json"
_JOB = "job.json"
_JUNIT = "junit.xml"
_BENCH = "bench.json"
_NEVER_ENDED = "did not end before the lab did"


@dataclass(frozen=True)
class JobReport:
    """How a job went.

    Attributes:
        name: its name.
        end: ``"passed"``, or what else happened.
        seconds: how long it took; 0 where it did not end.
        passed: how many tests passed; 0 for a plain command.
        failed: the tests that failed, and the first line of why.
        not_run: the tests that were skipped, and why.
        left: command lines of processes that it left behind.
        bench: the rows of its bench.json, where it wrote one.
    """

    name: str
    end: str
    seconds: float = 0
    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    bench: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether it did what it should."""
        return self.end == "passed"


def make_drive(path: Path) -> Path:
    """Make the sparse file that L1 writes its tar to."""
    path.touch()
    os.truncate(path, _DRIVE_BYTES)
    return path


def unpack(tar: Path, out: Path) -> None:
    """Unpack the regular files of L1's tar; whatever ran in L1, nothing is written outside ``out``."""
    root = out.resolve()
    with tarfile.open(tar) as archive:
        for member in archive:
            target = (root / member.name).resolve()
            if not member.isreg() or not target.is_relative_to(root):
                continue
            source = archive.extractfile(member)
            assert source is not None
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read())


def read_l1(out: Path) -> dict[str, Any]:
    """Return what L1 said about itself.

    Raises:
        SetupError: it did not come to that.
    """
    try:
        facts: dict[str, Any] = json.loads((out / _L1).read_bytes())
    except FileNotFoundError as error:
        raise SetupError("L1 did not start", hint=f"see {str(out / 'console.log')!r}") from error
    return facts


def read_jobs(out: Path, names: Sequence[str]) -> list[JobReport]:
    """Return how each job went."""
    return [_read_job(out / name) for name in names]


def _read_job(folder: Path) -> JobReport:
    if not (folder / _JOB).exists():
        return JobReport(folder.name, _NEVER_ENDED)
    job = json.loads((folder / _JOB).read_bytes())
    tests = read_junit((folder / _JUNIT).read_bytes()) if (folder / _JUNIT).exists() else {}
    bench = json.loads((folder / _BENCH).read_bytes())["rows"] if (folder / _BENCH).exists() else []
    return JobReport(job["name"], job["end"], job["seconds"], left=job["left"], bench=bench, **tests)


def read_junit(xml: bytes) -> dict[str, Any]:
    """Return ``passed``, ``failed`` and ``not_run`` of a JUnit file, as ``JobReport`` has them."""
    passed, failed, not_run = set(), {}, {}
    for case in ET.fromstring(xml).iter("testcase"):  # noqa: S314 - pytest wrote it
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        broken = [child for child in case if child.tag in {"failure", "error"}]
        skipped = case.find("skipped")
        if broken:
            failed[name] = _first_line(broken[0])
        elif skipped is not None:
            not_run[name] = _first_line(skipped)
        else:
            passed.add(name)
    # A test that passed and whose fixture then failed stands there twice.
    return {"passed": len(passed - failed.keys()), "failed": failed, "not_run": not_run}


def _first_line(element: ET.Element) -> str:
    return element.get("message", "").partition("\n")[0]
