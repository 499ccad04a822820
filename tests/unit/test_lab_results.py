"""What the lab makes of what comes out of L1, and of the programs that go in."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import SetupError
from lab import programs, results

if TYPE_CHECKING:
    from pathlib import Path

_DRIVE = 1 << 20
_JUNIT = b"""<testsuites><testsuite>
<testcase classname="tests.test_vm" name="test_good[fc]"/>
<testcase classname="tests.test_vm" name="test_bad"><failure message="assert 1 == 2&#10;more">trace</failure></testcase>
<testcase classname="tests.test_vm" name="test_left"/>
<testcase classname="tests.test_vm" name="test_left"><error message="failed on teardown">trace</error></testcase>
<testcase classname="tests.test_vm" name="test_not"><skipped message="has no memory state">where</skipped></testcase>
</testsuite></testsuites>"""


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _unpacked(tmp_path: Path, files: dict[str, bytes], *, keep: int | None = None) -> Path:
    """Write files as L1 does, on a drive of zeros, and unpack its first ``keep`` bytes."""
    drive, out = tmp_path / "drive", tmp_path / "out"
    out.mkdir()
    drive.write_bytes(bytes(_DRIVE))
    with drive.open("r+b") as file, tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in files.items():
            _add(archive, name, data)
    if keep is not None:
        data = drive.read_bytes()[:keep]
        drive.write_bytes(data + bytes(_DRIVE - len(data)))
    results.unpack(drive, out)
    return out


def _job(end: str = "passed") -> bytes:
    return json.dumps({"name": "one", "end": end, "status": 0, "seconds": 1.5, "left": []}).encode()


def test_a_job_is_reported_with_its_tests(tmp_path: Path) -> None:
    """Passed, failed and not run are told apart; a test whose fixture fails at the end has failed."""
    out = _unpacked(tmp_path, {"one/junit.xml": _JUNIT, "one/job.json": _job("failed with status 1")})
    (report,) = results.read_jobs(out, ["one"])
    assert not report.ok
    assert (report.seconds, report.passed) == (1.5, 1)
    assert report.failed == {
        "tests.test_vm::test_bad": "assert 1 == 2",
        "tests.test_vm::test_left": "failed on teardown",
    }
    assert report.not_run == {"tests.test_vm::test_not": "has no memory state"}


def test_bench_rows_are_taken_along(tmp_path: Path) -> None:
    """A job that measures leaves its rows in the report."""
    bench = {"host": {}, "rows": [{"name": "floor", "p50_ms": 1.0}]}
    out = _unpacked(tmp_path, {"one/bench.json": json.dumps(bench).encode(), "one/job.json": _job()})
    assert results.read_jobs(out, ["one"])[0].bench == bench["rows"]


def test_jobs_that_ended_are_read_although_l1_died(tmp_path: Path) -> None:
    """A tar that stops in the middle gives up what stood before, and the rest did not end."""
    # Three members of a header and a block each, then L1 dies.
    files = {"l1.json": b'{"kernel": "6.1"}', "one/job.json": _job(), "two/log": b"begun", "two/job.json": _job()}
    out = _unpacked(tmp_path, files, keep=3 * 1024)
    assert results.read_l1(out) == {"kernel": "6.1"}
    one, two = results.read_jobs(out, ["one", "two"])
    assert one.ok
    assert not two.ok
    assert (out / "two/log").read_bytes() == b"begun"


def test_nothing_is_written_outside_the_results(tmp_path: Path) -> None:
    """L1 runs what nobody trusts: names that lead out are left alone."""
    _unpacked(tmp_path, {"../escaped": b"x", "/tmp/fct-escaped": b"x", "good": b"x"})
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["drive", "good"]


def test_an_l1_that_said_nothing_is_an_error_that_names_its_console(tmp_path: Path) -> None:
    """Empty results mean that L1 did not start."""
    out = _unpacked(tmp_path, {})
    with pytest.raises(SetupError, match=r"did not start .*console\.log"):
        results.read_l1(out)


def _program(folder: Path, name: str, data: bytes, mode: int = 0o755) -> None:
    (folder / name).write_bytes(data)
    (folder / name).chmod(mode)


def test_a_gnu_build_is_told_from_a_release(tmp_path: Path) -> None:
    """The note of glibc in the Firecracker means that it runs without a seccomp filter; the jailer has none anyway."""
    elf = b"\x7fELF\x02\x01" + bytes(100)
    gnu = elf + struct.pack("<III", 4, 16, 1) + b"GNU\0" + struct.pack("<IIII", 0, 3, 2, 0)
    _program(tmp_path, "firecracker", gnu)
    _program(tmp_path, "jailer", gnu)
    firecracker, jailer = programs.examine(tmp_path)
    assert "without" in firecracker.note
    assert firecracker.sha256 == hashlib.sha256(gnu).hexdigest()
    assert jailer.note == ""
    _program(tmp_path, "firecracker", elf)
    assert programs.examine(tmp_path)[0].note == ""


def test_a_folder_without_the_programs_is_refused(tmp_path: Path) -> None:
    """Missing, not executable, not a program: each is named."""
    _program(tmp_path, "firecracker", b"\x7fELF\x02\x01" + bytes(100))
    with pytest.raises(SetupError, match="no program 'jailer'"):
        programs.examine(tmp_path)
    _program(tmp_path, "jailer", b"\x7fELF\x02\x01", 0o644)
    with pytest.raises(SetupError, match="no program 'jailer'"):
        programs.examine(tmp_path)
    _program(tmp_path, "jailer", b"#!/bin/sh\n")
    with pytest.raises(SetupError, match="jailer' is not a program for x86-64"):
        programs.examine(tmp_path)
