"""kill -9 at random moments of clients, daemon and VMMs while commands run: nothing is left, and nothing is lost.

On whichever VMM the settings name. ``FIRECLAW_SOAK_ROUNDS`` sets the rounds, of five kills each, and
``FIRECLAW_SOAK_SEED`` repeats the choices of a run that failed.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from machine_home import make_machine, private_home, rows, until, vmms

from conftest import command_line, leftovers
from fireclaw.vmm.process import home_tag

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Cli

ROUNDS = int(os.environ.get("FIRECLAW_SOAK_ROUNDS") or 3)
SEED = int(os.environ.get("FIRECLAW_SOAK_SEED") or time.time_ns())
# What is killed, and within how many seconds: while machines are cloned, while commands run, or afterwards. A young
# daemon is one that the commands had to start, so it dies while it starts, adopts, or serves its first requests. A
# young VMM is one that was not there before them, so it dies as Firecracker's jailer, or before it has its guest.
VICTIMS = {"client": 2.0, "daemon": 2.0, "young daemon": 1.0, "vmm": 2.0, "young vmm": 0.3}

# Its output is long, and its last word tells a whole one from a cut one.
WORK = "for i in 1 2 3 4 5 6 7 8; do echo $i; sleep 0.1; done; head -c 300000 /dev/zero; echo done"

pytestmark = pytest.mark.timeout(120 + 300 * ROUNDS)


@pytest.fixture
def cli() -> Iterator[Cli]:
    """The command line on a home of its own; outside of machines' own folders nothing is left of them, either."""
    with private_home() as home:
        with command_line(home) as cli:
            yield cli
        cgroups = Path("/sys/fs/cgroup").glob(f"*{home_tag(home.data)}*")
        assert [*home.jails.glob("*/*"), *cgroups, *home.workspaces.iterdir()] == []


class Box:
    """A named machine that outlives daemons, and what must be in it.

    Attributes:
        vmm: its VMM's pid.
    """

    def __init__(self, cli: Cli) -> None:
        self._cli = cli
        self._make()

    def _make(self) -> None:
        self._id = make_machine(self._cli, "box")["id"]
        (self.vmm,) = (pid for pid, machine_id in vmms(self._cli.home).items() if machine_id == self._id)
        self._written = 0

    def write(self) -> None:
        """Add a line to a file in it."""
        assert self._cli("exec", "box", f"echo {self._written} >> /tmp/lines").returncode == 0
        self._written += 1

    def check(self, victim: int) -> None:
        """It is still there with all that was written, or its VMM was the victim, and it is made anew."""
        found = {machine["name"]: machine["id"] for machine in self._cli.json("ps", "--json")}
        if victim == self.vmm:
            assert found == {}
            self._make()
            return
        assert found == {"box": self._id}
        done = self._cli("exec", "box", "cat /tmp/lines")
        assert (done.returncode, done.stdout.decode().split()) == (0, list(map(str, range(self._written))))


def test_whatever_is_killed_the_next_verb_works(cli: Cli) -> None:
    """After each kill the next verb works, no machine but the named one is left, and ``prune`` has nothing to find."""
    chance = seeded()
    box = Box(cli)
    for number in range(ROUNDS):
        for kind in chance.sample(list(VICTIMS), len(VICTIMS)):
            box.write()
            moment = chance.uniform(0, VICTIMS[kind])
            print(f"round {number}: {kind} after {moment:.2f} s")  # noqa: T201 - shown when it fails
            victim = work_and_kill(cli, kind, moment, chance)
            assert cli("run", "--", "echo", "alive").stdout == b"alive\n"
            wait_settled(cli)
            box.check(victim)
            assert cli("ledger", "verify").returncode == 0


def test_a_kill_while_a_snapshot_is_made(cli: Cli) -> None:
    """A daemon killed at any moment of its first run leaves nothing that the next one does not find or mend."""
    chance = seeded()
    for number in range((ROUNDS + 2) // 3):
        shutil.rmtree(cli.home.snapshots)
        moment = chance.uniform(0, 5)
        print(f"round {number}: after {moment:.2f} s")  # noqa: T201 - shown when it fails
        client = cli.start("run", WORK)
        time.sleep(moment)
        kill_one_of(daemons(cli), chance)
        client.communicate(timeout=60)
        assert cli("run", "--", "echo", "alive").stdout == b"alive\n"
        wait_settled(cli)
        assert len(list(cli.home.snapshots.iterdir())) == 1
        kill_one_of(daemons(cli), chance)
        assert cli("run", "--", "true").returncode == 0  # from what is on the disk
        assert cli("down").returncode == 0


def seeded() -> random.Random:
    """The choices of this run, which a failure shows how to repeat."""
    print(f"FIRECLAW_SOAK_SEED={SEED} FIRECLAW_SOAK_ROUNDS={ROUNDS}")  # noqa: T201 - shown when it fails
    return random.Random(SEED)


def work_and_kill(cli: Cli, kind: str, moment: float, chance: random.Random) -> int:
    """Run commands and kill something after a while; returns the victim.

    Whoever says that a command succeeded has all of its output, and only a dead daemon is everybody's misfortune.
    """
    if kind == "young daemon":
        kill_one_of(daemons(cli), chance)
        kind = "daemon"
    before = vmms(cli.home).keys()
    clients = [cli.start("run", WORK), cli.start("run", WORK), cli.start("exec", "box", WORK)]
    if kind == "young vmm":
        pids = list(until(lambda: vmms(cli.home).keys() - before, "a VMM starts"))
        time.sleep(moment)
    else:
        time.sleep(moment)
        pids = {"client": [client.pid for client in clients], "daemon": daemons(cli), "vmm": list(vmms(cli.home))}[kind]
    victim = kill_one_of(pids, chance)
    for client in clients:
        out, err = client.communicate(timeout=60)
        assert client.returncode in {0, 125, -signal.SIGKILL}, err.decode()
        assert client.returncode != 0 or out.endswith(b"done\n")
    assert kind == "daemon" or [client.returncode for client in clients].count(0) >= len(clients) - 1
    return victim


def kill_one_of(pids: list[int], chance: random.Random) -> int:
    """Kill one of these processes and return which; 0 where there are none."""
    if not pids:
        return 0
    victim = chance.choice(pids)
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGKILL)
    return victim


def daemons(cli: Cli) -> list[int]:
    """The home's daemon, even one that is only starting, as its command line and environment tell."""
    home = f"FIRECLAW_HOME={cli.home.data}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # it ended while we looked
            if entry.name.isdigit() and b"fireclaw.daemon" in (entry / "cmdline").read_bytes().split(b"\0"):
                found += [int(entry.name)] if home in (entry / "environ").read_bytes().split(b"\0") else []
    return found


def wait_settled(cli: Cli) -> None:
    """Wait until no more is there than the rows of named machines say, and ``prune`` finds nothing, twice."""
    until(lambda: {row["purpose"] for row in cli.json("ps", "--json")} <= {"named"}, "throw-away machines are gone")
    assert cli("prune").returncode == 0
    again = cli("prune")
    assert (again.returncode, again.stdout) == (0, b"")
    until(lambda: agrees(cli), "rows, processes and folders are of the same machines")


def agrees(cli: Cli) -> bool:
    """Whether rows, processes and folders are of the same machines; one more may just be getting ready for a run."""
    machines = {str(row[0]) for row in rows(cli.home, "SELECT machine_id FROM machines")}
    owners = {str(row[0]) for row in rows(cli.home, "SELECT owner_id FROM processes WHERE role = 'vmm'")}
    folders = {path.name for path in leftovers(cli.home) if not path.is_socket()}
    return machines == owners == set(vmms(cli.home).values()) and folders == {
        machine_id.replace("-", "")[:12] for machine_id in machines
    }
