"""Measures Fireclaw against its floor, interleaved in one run, on whatever this host is and whatever VMM is used.

==================  ==========================================================================================
row                 from - to
==================  ==========================================================================================
floor               start of a bare clone by the same VMM - its guest's first finished /bin/true (bench/floor.py)
clone_first_exec    request to the daemon's API - exit of /bin/true in a new clone, from a waiting process where
                    the VMM keeps one
named_first_exec    the same for a machine with a name, which starts from nothing
run_true            start of ``fireclaw run -- true`` - its end, daemon running, as for clone_first_exec
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
from fireclaw.vmm.firecracker import release
from fireclaw.vmm.host import HostMemo, cpu_model, tsc_khz
from fireclaw.wire.frames import FrameReader, Kind
from floor_firecracker import FirecrackerFloor
from floor_qemu import QemuFloor
from hypervisor import SOFTWARE_CPU, hypervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from floor import Floor

_MACHINE = "bench"
_FRESH = "bench-fresh"
_ROUNDS = 15
_WARM_A_ROUND = 8
_LOOPS = 25  # fork+exec is measured as the difference between this many and one in a shell
_BUDGET_S = 240.0
_SETTLE_FLOORS = 2.0  # between rows: what one leaves to do, an end or a process that shall wait, is not the next one's


class Bench:
    """One run.

    Attributes:
        samples: milliseconds by row.
    """

    def __init__(self, home: Home, floor: Floor) -> None:
        self._home = home
        self._floor = floor
        self._settle_s = 0.0
        self.samples: dict[str, list[float]] = {}

    def run(self, rounds: int) -> None:
        """Measure all rows in turn, round by round, within the time budget."""
        with _NamedMachine(self._home, _MACHINE):
            self._round()
            self.samples.clear()
            began = time.monotonic()
            for _ in range(rounds):
                self._round()
                if time.monotonic() - began > _BUDGET_S:
                    break

    def _round(self) -> None:
        self._settle()  # before the floor, too: a processor that has just worked is quicker than one that has rested
        self._take("floor", floor := self._floor.measure())
        self._settle_s = _SETTLE_FLOORS * floor / 1000
        self._settle()
        self._take("clone_first_exec", _timed(lambda: self._api("/v1/run", ["/bin/true"])))
        self._settle()
        self._take("named_first_exec", self._named_first_exec())
        self._settle()
        self._take("run_true", _timed(_run_true))
        self._settle()
        for _ in range(_WARM_A_ROUND):
            self._take("warm_exec", _timed(lambda: self._exec(_MACHINE, ["/bin/true"])))
        loop = "i=0; while [ $i -lt {} ]; do /bin/true; i=$((i+1)); done"
        one, many = (_timed(partial(self._exec, _MACHINE, ["/bin/sh", "-c", loop.format(n)])) for n in (1, 1 + _LOOPS))
        self._take("guest_fork_exec", (many - one) / _LOOPS)

    def _settle(self) -> None:
        time.sleep(self._settle_s)

    def _take(self, name: str, sample: float) -> None:
        self.samples.setdefault(name, []).append(sample)

    def _named_first_exec(self) -> float:
        began = time.monotonic()
        with _NamedMachine(self._home, _FRESH):
            self._exec(_FRESH, ["/bin/true"])
            return (time.monotonic() - began) * 1000

    def _exec(self, machine: str, argv: Sequence[str]) -> None:
        self._api(f"/v1/machines/{machine}/exec", argv)

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
    """A machine that stays as long as the block."""

    def __init__(self, home: Home, name: str) -> None:
        self._home = home
        self._name = name

    def __enter__(self) -> None:
        self._request("POST", "/v1/machines", {"name": self._name})

    def __exit__(self, *_: object) -> None:
        self._request("DELETE", f"/v1/machines/{self._name}", {})

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
    if len(samples) == 1:
        return samples[0]
    return statistics.quantiles(samples, n=100, method="inclusive")[round(share * 100) - 1]


def report(bench: Bench, floor: Floor, vmm: dict[str, str]) -> dict[str, Any]:
    """Build the JSON report."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
    return {
        "host": {
            "cpu": cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_mib": memory,
            "kernel": platform.release(),
            "hypervisor": hypervisor(),
            "load": round(os.getloadavg()[0], 2),
            "fireclaw": __version__,
        },
        "vmm": {**vmm, "version": floor.version},
        "floor": floor.steps,
        "rows": [
            {
                "name": name,
                "p50_ms": round(statistics.median(values), 1),
                "p95_ms": round(_percentile(values, 0.95), 1),
                "n": len(values),
            }
            for name, values in bench.samples.items()
        ],
    }


def print_table(result: dict[str, Any]) -> None:
    """Print it for people, with the ratios that have targets."""
    host, vmm = result["host"], result["vmm"]
    print(f"{host['cpu']}, {host['cores']} cores, load {host['load']}, Linux {host['kernel']}")
    print(f"{vmm['kind']} {vmm['version']}, {vmm['accel']}{_under(host['hypervisor'], vmm['accel'])}")
    print(f"floor: {result['floor']}\n")
    print(f"{'':18} {'p50 ms':>8} {'p95 ms':>8} {'n':>5}")
    for row in result["rows"]:
        print(f"{row['name']:18} {row['p50_ms']:8.1f} {row['p95_ms']:8.1f} {row['n']:5}")
    p50 = {row["name"]: row["p50_ms"] for row in result["rows"]}
    print()
    for name in ("clone_first_exec", "named_first_exec", "run_true"):
        ratio, more = p50[name] / p50["floor"], p50[name] - p50["floor"]
        print(f"{name + ' / floor':35} {ratio:6.2f} (floor {more:+.1f} ms)")
    print(f"{'warm_exec - guest_fork_exec, ms':35} {p50['warm_exec'] - p50['guest_fork_exec']:6.1f}")


def _under(signature: str, accel: str) -> str:
    """What a reader must know of figures that were not taken on bare metal."""
    if not signature:
        return ""
    if signature == SOFTWARE_CPU:
        return f"; this host's own processor is software ({signature}): only ratios say something"
    return f"; this host is a virtual machine itself ({signature})" + (", so KVM is nested" if accel == "kvm" else "")


def _find_floor(home: Home, vmm: dict[str, str]) -> Floor:
    """The floor of the VMM that the daemon uses."""
    images = ImageStore(home)
    runtime = images.find_runtime()
    assert runtime is not None  # a command has just run
    image = images.find_image("debian")
    if vmm["kind"] == "firecracker":
        programs = release.find(home.vmms)
        return FirecrackerFloor(runtime, image, programs.firecracker, release.dotted(programs.version))
    return QemuFloor(runtime, image, tsc_khz(HostMemo(home.memo)), vmm["accel"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="bin/bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print only JSON")
    parser.add_argument("--rounds", type=int, default=_ROUNDS, help="rounds at most (default: %(default)s)")
    options = parser.parse_args()
    home = Home.find()
    _run_true()  # starts the daemon, builds what is missing, loads the snapshot
    with request(home, "GET", "/v1/status") as answer:
        vmm = answer.read_json()["vmm"]
    with _find_floor(home, vmm) as floor:
        bench = Bench(home, floor)
        bench.run(options.rounds)
        result = report(bench, floor, vmm)
    if options.json:
        print(json.dumps(result))
    else:
        print_table(result)


if __name__ == "__main__":
    main()
