"""Runs the jobs inside L1: standard library only, started by boot.sh, reads /lab/jobs.json.

What comes out goes to the third drive as a tar that grows with each job. The drive is full of zeros, which is
how a tar ends, so whatever happens to L1, the host reads what was finished. What jobs print is shown to the
host as it comes, on a virtio console.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import tarfile
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any

_LAB = Path("/lab")
_OUT = _LAB / "out"
_RESULTS = Path("/dev/vdc")
_SHOWN = Path("/dev/hvc0")
_GLANCE_S = 0.2
_BEAT_S = 5.0

BEAT = b"\0"
"""Written where there is nothing to show: the host tells a job that is silent from an L1 that hangs."""
LAST_WORDS_S = 20.0


def main() -> None:
    """Run all jobs; the results of each are safe when the next one starts."""
    jobs = json.loads((_LAB / "jobs.json").read_text())
    with (
        _SHOWN.open("wb", buffering=0) as shown,
        _RESULTS.open("r+b", buffering=0) as drive,
        tarfile.open(fileobj=drive, mode="w") as results,
    ):
        _add(results, "l1.json", _facts())
        os.fsync(drive.fileno())
        for job in jobs:
            shown.write(f"lab: {job['name']}: {job['command']}\n".encode())
            report = _run(job, shown)
            shown.write(f"lab: {job['name']}: {report['end']} after {report['seconds']} s\n".encode())
            results.add(_OUT / job["name"], job["name"])
            _add(results, f"{job['name']}/job.json", report)
            os.fsync(drive.fileno())


def _run(job: dict[str, Any], shown: IO[bytes]) -> dict[str, Any]:
    """Run one job to its end or its limit, and kill what it left."""
    folder = _OUT / job["name"]
    folder.mkdir(parents=True)
    start = time.monotonic()
    with (folder / "log").open("w+b") as log, (folder / "log").open("rb") as seen:
        process = subprocess.Popen(
            ["/bin/bash", "-c", job["command"]],
            cwd=_LAB / "checkout",
            env={**os.environ, **_environment(folder), **job["env"]},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end = _watch(process, seen, shown, start + job["limit"])
        left = _kill_all()
        shown.write(seen.read())
    seconds = round(time.monotonic() - start, 1)
    return {"name": job["name"], "end": end, "status": process.returncode, "seconds": seconds, "left": left}


def _watch(process: subprocess.Popen[bytes], seen: IO[bytes], shown: IO[bytes], deadline: float) -> str:
    """Show what a job prints until it ends; return how it ended."""
    beat = time.monotonic()
    while time.monotonic() < deadline:
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(_GLANCE_S)
            return "passed" if status == 0 else f"failed with status {status}"
        text = seen.read()
        if not text and time.monotonic() - beat < _BEAT_S:
            continue
        shown.write(text or BEAT)
        beat = time.monotonic()
    # Interrupted, pytest still tells what had passed.
    os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(LAST_WORDS_S)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "ended at its limit"


def _environment(folder: Path) -> dict[str, str]:
    checkout = _LAB / "checkout"
    return {
        "LAB_OUT": str(folder),
        "PATH": f"{_LAB / 'firecracker'}:{os.environ['PATH']}",
        "PYTHONPATH": f"{checkout / 'src'}:{checkout / 'tools'}:{_LAB / 'libraries'}",
        "FIRECLAW_TEST_HOME": str(_LAB / "home"),
        "FIRECLAW_TEST_FIRECRACKER": str(_LAB / "firecracker"),
    }


def _kill_all() -> list[str]:
    """Kill every process but PID 1, this one and the kernel's; return the command lines of those there were."""
    left = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in {1, os.getpid()}:
            continue
        with suppress(OSError):  # it may end while we look
            if command := (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
                left.append(command.replace(b"\0", b" ").decode(errors="replace").strip()[:200])
    return left


def _facts() -> dict[str, Any]:
    return {
        "kernel": platform.release(),
        "boot_seconds": float(Path("/proc/uptime").read_text().split()[0]),
        "versions": {path.name: _version(path) for path in sorted((_LAB / "firecracker").iterdir())},
    }


def _version(program: Path) -> str:
    """Return the first line of what it says to --version, or why it does not run here."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout.partition("\n")[0]


def _add(results: tarfile.TarFile, name: str, data: dict[str, Any]) -> None:
    encoded = json.dumps(data).encode()
    info = tarfile.TarInfo(name)
    info.size = len(encoded)
    results.addfile(info, BytesIO(encoded))


if __name__ == "__main__":
    main()
