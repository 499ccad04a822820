"""Measures Fireclaw against its floor, interleaved in one run, on whatever this host is.

==================  ==========================================================================================
row                 from - to
==================  ==========================================================================================
floor               start of a bare QEMU clone - its guest's first finished /bin/true (bench/floor.py)
clone_first_exec    request to the daemon's API - exit of /bin/true in a new clone (no pool member)
run_true            start of ``fireclaw run -- true`` - its end, daemon running (no pool member)
warm_exec           request to the daemon's API - exit of /bin/true in a machine that runs
guest_fork_exec     one fork and exec of /bin/true inside that machine, by its shell
==================  ==========================================================================================

One at a time, page cache warm, snapshot loaded. It uses the daemon of FIRECLAW_HOME and leaves it as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from fireclaw import __version__
from fireclaw.cli.client import Connection
from fireclaw.cli.start import request
from fireclaw.images import ImageStore
from fireclaw.paths import Home
from fireclaw.vmm.host import HostMemo, cpu_model, tsc_khz
from fireclaw.wire.frames import FrameReader, Kind
from floor import Floor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_MACHINE = "bench"
_ROUNDS = 15
_WARM_A_ROUND = 8
_LOOPS = 25  # fork+exec is measured as the difference between this many and one in a shell
_BUDGET_S = 240.0


class Bench:
    """One run.

    Attributes:
        samples: milliseconds by row.
    """

    def __init__(self, home: Home, floor: Floor) -> None:
        self._home = home
        self._floor = floor
        self.samples: dict[str, list[float]] = {
            name: [] for name in ("floor", "clone_first_exec", "run_true", "warm_exec", "guest_fork_exec")
        }

    def run(self, rounds: int) -> None:
        """Measure all rows in turn, round by round, within the time budget."""
        with _NamedMachine(self._home):
            self._round(discard=True)
            began = time.monotonic()
            for _ in range(rounds):
                self._round()
                if time.monotonic() - began > _BUDGET_S:
                    break

    def _round(self, *, discard: bool = False) -> None:
        taken: list[tuple[str, float]] = [
            ("floor", self._floor.measure()),
            ("clone_first_exec", _timed(lambda: self._api("/v1/run", ["/bin/true"]))),
            ("run_true", _timed(_run_true)),
        ]
        taken += [("warm_exec", _timed(lambda: self._exec(["/bin/true"]))) for _ in range(_WARM_A_ROUND)]
        loop = "i=0; while [ $i -lt {} ]; do /bin/true; i=$((i+1)); done"
        one, many = (_timed(partial(self._exec, ["/bin/sh", "-c", loop.format(n)])) for n in (1, 1 + _LOOPS))
        taken.append(("guest_fork_exec", (many - one) / _LOOPS))
        if not discard:
            for name, sample in taken:
                self.samples[name].append(sample)

    def _exec(self, argv: Sequence[str]) -> None:
        self._api(f"/v1/machines/{_MACHINE}/exec", argv)

    def _api(self, target: str, argv: Sequence[str]) -> None:
        call = json.dumps({"argv": list(argv)}).encode() + b"\n"
        reader = FrameReader()
        with Connection(self._home.socket) as connection:
            connection.send("POST", target, call)
            connection.receive_head()
            for piece in connection.pieces():
                for kind, payload in reader.feed(piece):
                    if kind is Kind.EXIT and json.loads(payload)["status"] == 0:
                        return
                    if kind in {Kind.EXIT, Kind.ERROR}:
                        raise RuntimeError(f"{target}: {payload.decode()}")
        raise RuntimeError(f"{target}: no exit")


class _NamedMachine:
    """The machine for warm commands."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def __enter__(self) -> None:
        self._request("POST", "/v1/machines", {"name": _MACHINE})

    def __exit__(self, *_: object) -> None:
        self._request("DELETE", f"/v1/machines/{_MACHINE}", {})

    def _request(self, method: str, target: str, body: dict[str, str]) -> None:
        with Connection(self._home.socket) as connection:
            connection.send(method, target, json.dumps(body).encode())
            connection.receive_head()
            connection.read_json()


def _timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return (time.monotonic() - began) * 1000


def _run_true() -> None:
    subprocess.run([sys.executable, "-m", "fireclaw", "run", "--", "true"], check=True)


def _percentile(samples: list[float], share: float) -> float:
    return statistics.quantiles(samples, n=100, method="inclusive")[round(share * 100) - 1]


def report(samples: dict[str, list[float]], accel: str) -> dict[str, Any]:
    """Build the JSON report."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return {
        "host": {
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_mib": memory,
            "kernel": platform.release(),
            "accel": accel,
            "load": round(os.getloadavg()[0], 2),
            "fireclaw": __version__,
        },
        "rows": [
            {
                "name": name,
                "p50_ms": round(statistics.median(values), 1),
                "p95_ms": round(_percentile(values, 0.95), 1),
                "n": len(values),
            }
            for name, values in samples.items()
        ],
    }


def print_table(result: dict[str, Any]) -> None:
    """Print it for people, with the ratios that have targets."""
    host = result["host"]
    print(f"{host['cpu']}, {host['cores']} cores, {host['accel']}, load {host['load']}, Linux {host['kernel']}\n")
    print(f"{'':18} {'p50 ms':>8} {'p95 ms':>8} {'n':>5}")
    for row in result["rows"]:
        print(f"{row['name']:18} {row['p50_ms']:8.1f} {row['p95_ms']:8.1f} {row['n']:5}")
    p50 = {row["name"]: row["p50_ms"] for row in result["rows"]}
    print(
        f"\nclone_first_exec / floor         {p50['clone_first_exec'] / p50['floor']:6.2f}"
        f"\nrun_true / floor                 {p50['run_true'] / p50['floor']:6.2f}"
        f"\nwarm_exec - guest_fork_exec, ms  {p50['warm_exec'] - p50['guest_fork_exec']:6.1f}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bin/bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print only JSON")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="rounds at most (default: %(default)s)")
    options = parser.parse_args()
    home = Home.find()
    _run_true()  # starts the daemon, builds what is missing, loads the snapshot
    with request(home, "GET", "/v1/status") as answer:
        accel = answer.read_json()["vmm"]["accel"]
    images = ImageStore(home)
    runtime = images.find_runtime()
    assert runtime is not None
    with Floor(runtime, images.find_image("debian"), tsc_khz(HostMemo(home.memo)), accel) as floor:
        bench = Bench(home, floor)
        bench.run(options.rounds)
    result = report(bench.samples, accel)
    if options.json:
        print(json.dumps(result))
    else:
        print_table(result)


if __name__ == "__main__":
    main()
