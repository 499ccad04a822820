"""The lab's command: ``tools/lab/run --firecracker DIR``. See tools/lab/README.md."""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from fireclaw.errors import FireclawError
from fireclaw.images.shelf import Shelf
from fireclaw.vmm.host import cpu_model
from lab import disk, jobs, machine, payload, programs, results

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHECKOUT = Path(__file__).resolve().parents[2]
_CACHE = _CHECKOUT / ".cache/lab"

_START = time.monotonic()


def main() -> int:
    """Run the lab and return its exit status: 0 if every job passed, 1 if not, 125 if it could not run them."""
    arguments = _arguments()
    # Both must end L1 and remove what the run made, as Ctrl-C does.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        with _alone():
            return _run(arguments)
    except FireclawError as error:
        _say(f"error: {error}")
        return 125


@contextmanager
def _alone() -> Iterator[None]:
    """Be the only lab of this checkout: two at once take more than twice as long, and run into their limits."""
    _CACHE.mkdir(parents=True, exist_ok=True)
    with (_CACHE / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another lab runs here: waiting for its end")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/lab/run", description="Test with KVM inside a virtual machine.")
    parser.add_argument("--firecracker", type=Path, required=True, metavar="DIR", help="holds firecracker and jailer")
    parser.add_argument(
        "--out", type=Path, default=_CACHE / "out", metavar="DIR", help="for results, emptied first (.cache/lab/out)"
    )
    parser.add_argument("--job", action="append", default=[], metavar="NAME", help="run only this job; repeatable")
    parser.add_argument("--command", metavar="TEXT", help="run a shell command instead, in L1's copy of the checkout")
    parser.add_argument("pytest", nargs="*", metavar="-- PYTEST ARGS", help="run pytest instead, with these arguments")
    return parser.parse_args()


def _chosen(arguments: argparse.Namespace) -> list[jobs.Job]:
    if arguments.command or arguments.pytest:
        return [jobs.asked(command=arguments.command or "", pytest=arguments.pytest)]
    return [jobs.find(name) for name in arguments.job] or [job for job in jobs.load() if not job.extra]


def _run(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    chosen, tested, out = _chosen(arguments), programs.examine(arguments.firecracker), arguments.out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    boot_disk = disk.build(_CACHE, _say)
    runs = Shelf(_CACHE / "runs")
    runs.root.mkdir(exist_ok=True)
    runs.prune(tuple)  # what killed runs left
    with runs.staging() as scratch, (out / "output.log").open("wb") as kept:
        drive = payload.build(_CHECKOUT, _CACHE, scratch, firecracker=arguments.firecracker, jobs=chosen, progress=_say)
        tar = results.make_drive(scratch / "results.tar")
        _say("starting L1")
        fault = machine.run(
            machine.command(boot_disk, drive, tar, out / "console.log"),
            lambda piece: _show(piece, kept, sys.stderr.buffer),
            limit_s=jobs.longest(chosen),
        )
        results.unpack(tar, out)
    if fault:
        _say(f"L1 {fault}")
    reports = results.read_jobs(out, [job.name for job in chosen])
    report = {
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": round(time.monotonic() - began),
        "host": {"cpu": cpu_model(), "cpus": os.cpu_count()},
        "l1": {"cpus": machine.CPUS, "memory_mib": machine.MEMORY_MIB, "fault": fault, **results.read_l1(out)},
        "programs": [asdict(program) for program in tested],
        "jobs": [asdict(job) for job in reports],
    }
    (out / "lab.json").write_text(json.dumps(report, indent=1) + "\n")
    for job in reports:
        _say(f"{job.name}: {job.end}, {job.passed} passed, {len(job.failed)} failed, {len(job.not_run)} not run")
    return 0 if all(job.ok for job in reports) else 1


def _show(piece: bytes, *streams: IO[bytes]) -> None:
    for stream in streams:
        stream.write(piece)
        stream.flush()


def _say(text: str) -> None:
    sys.stderr.write(f"lab: {time.monotonic() - _START:6.1f} s  {text}\n")
    sys.stderr.flush()


def _leave(number: int, _frame: Any) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
