"""The gate, with real processes: recorded before made, held by pidfd, reaped, found again."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from fireclaw.store.database import Database
from fireclaw.store.machines import ProcessRow, ProcessRows, Role
from fireclaw.vmm.process import Child, Gate, home_tag

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="changes user ids")

# A starter that dies where the test says: it opens the store in argv[1] and starts a program that makes a file.
STARTER = """
import asyncio, os, signal, sys
from pathlib import Path
from fireclaw.store.database import Database
from fireclaw.store.machines import ProcessRows, Role
from fireclaw.vmm.process import Gate, home_tag

home, moment = Path(sys.argv[1]), sys.argv[2]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

class DyingRows(ProcessRows):
    def start(self, *args, **kwargs):
        if moment == "before-commit":
            die()
        super().start(*args, **kwargs)
        if moment == "after-commit":
            die()

async def main():
    gate = Gate(DyingRows(Database(home / "db")), home_tag(home))
    os.mkfifo(home / "fifo")
    command = 'echo > "$1"; read -r _ < "$2"'  # it waits without another process
    argv = ["/bin/sh", "-c", command, gate.mark("m1"), str(home / "ran"), str(home / "fifo")]
    gate.start(argv, role=Role.VMM, owner_id="m1",
               die_with_us=moment == "with-us")
    while not (home / "ran").exists():
        await asyncio.sleep(0.001)
    die()

asyncio.run(main())
"""


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[ProcessRows]:
    """The record of an empty home."""
    database = Database(tmp_path / "db")
    yield ProcessRows(database)
    database.close()


@pytest.fixture
def gate(rows: ProcessRows, tmp_path: Path) -> Gate:
    """The gate of an empty home."""
    return Gate(rows, home_tag(tmp_path))


def start(gate: Gate, command: str) -> Child:
    """Start a shell command."""
    return gate.start(["/bin/sh", "-c", command], role=Role.VMM, owner_id="m1")


def run_starter(home: Path, moment: str) -> None:
    """Run a starter until it kills itself."""
    done = subprocess.run([sys.executable, "-c", STARTER, home, moment], check=False, timeout=30)
    assert done.returncode == -signal.SIGKILL


def wait_gone(pids: list[int]) -> None:
    """Wait until none of these processes runs any more."""
    for pid in pids:
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([fd], [], [], 10)[0], f"process {pid} is still there"
        finally:
            os.close(fd)


class TestChild:
    """What a child is given, and what it leaves."""

    async def test_its_end_is_told_and_its_row_goes(self, gate: Gate, rows: ProcessRows) -> None:
        """The exit status passes through, and no row is left of a process that is reaped."""
        child = start(gate, "exit 7")
        assert [row.pid for row in rows.of("m1")] == [child.pid]
        assert await child.wait() == 7
        assert rows.all() == []
        assert not child.running

    async def test_a_signal_is_told_as_such(self, gate: Gate) -> None:
        """A killed child's status is negative; to kill it again does nothing."""
        child = start(gate, "sleep 1000")
        child.kill()
        assert await child.wait() == -signal.SIGKILL
        child.kill()

    async def test_stop_asks_first(self, gate: Gate) -> None:
        """A child that handles SIGTERM ends in its own way, one that ignores it is killed."""
        polite = start(gate, "trap 'exit 3' TERM; echo; while :; do sleep 0.01; done")
        stubborn = start(gate, "trap '' TERM; while :; do sleep 0.01; done")
        await _written(polite)
        assert await polite.stop(grace_s=10) == 3
        assert await stubborn.stop(grace_s=0.2) in {-signal.SIGKILL, -signal.SIGTERM}

    async def test_it_leads_its_own_session(self, gate: Gate) -> None:
        """A Ctrl+C at the daemon's terminal does not reach it."""
        child = start(gate, "sleep 1000")
        assert os.getsid(child.pid) == os.getpgid(child.pid) == child.pid
        child.kill()
        await child.wait()

    async def test_it_inherits_what_it_was_given_and_no_more(self, gate: Gate) -> None:
        """Of our descriptors it gets those named, and it can leave no core dump."""
        leaky, given = os.open("/dev/zero", os.O_RDONLY), os.open("/dev/full", os.O_RDONLY)
        os.set_inheritable(leaky, True)
        child = gate.start(
            ["/bin/sh", "-c", "ulimit -c; readlink /proc/$$/fd/* || :"], role=Role.VMM, owner_id="m1", fds=[given]
        )
        os.close(leaky)
        os.close(given)
        assert await child.wait() == 0
        limit, *links = child.log().splitlines()
        log = "/memfd:fireclaw-log (deleted)"
        assert limit == "0"
        assert sorted(links) == ["/dev/full", "/dev/null", log, log]

    async def test_its_log_is_bounded(self, gate: Gate) -> None:
        """A child that writes for ever neither blocks nor fills anything; its first words are kept."""
        child = start(gate, "echo first; head -c 1000000 /dev/zero | tr '\\0' x; echo last >&2; exit 5")
        assert await child.wait() == 5
        assert child.log().startswith("first\nxxx")
        assert len(child.log()) == 16 * 1024

    async def test_it_can_be_given_input(self, gate: Gate) -> None:
        """A child that asked for it reads a pipe of ours from its first byte to its end."""
        child = gate.start(["/bin/cat"], role=Role.MODEL, owner_id="daemon", keep_stdin=True)
        assert child.stdin is not None
        os.write(child.stdin, b"settings")
        await _written(child)
        child.close_stdin()
        assert await child.wait() == 0
        assert child.log() == "settings"

    async def test_a_missing_program_says_so(self, gate: Gate) -> None:
        """A program that cannot be executed is told by its status and its log."""
        child = gate.start(["/none/such"], role=Role.VMM, owner_id="m1")
        assert await child.wait() == 127
        assert "not found" in child.log()

    async def test_what_it_started_ends_with_it(self, gate: Gate) -> None:
        """A process that a child leaves in its group is ended when the child is reaped."""
        child = start(gate, "sleep 1000 & echo $!")
        assert await child.wait() == 0
        wait_gone([int(child.log())])

    @root_only
    async def test_it_has_no_rights(self, gate: Gate) -> None:
        """Under a user id of its own it has no group, no capability, and can get none."""
        child = gate.start(["cat", "/proc/self/status"], role=Role.VMM, owner_id="m1", user=0x7000_0003)
        assert await child.wait() == 0
        status = dict(line.split(":\t", 1) for line in child.log().splitlines() if ":\t" in line)
        assert set(status["Uid"].split()) == set(status["Gid"].split()) == {str(0x7000_0003)}
        assert status["Groups"].strip() == ""
        assert {status[key] for key in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert status["NoNewPrivs"] == "1"

    @root_only
    async def test_it_may_be_given_a_group(self, gate: Gate) -> None:
        """The group that may open a device is all it gets."""
        child = gate.start(["id", "-G"], role=Role.VMM, owner_id="m1", user=0x7000_0003, groups=[4321])
        assert await child.wait() == 0
        assert child.log().split() == [str(0x7000_0003), "4321"]


async def _written(child: Child) -> None:
    """Wait until a child has written something; its log has no event to wait for."""
    async with asyncio.timeout(10):
        while not child.log():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


class TestCrash:
    """Whoever is killed whenever, nothing runs that is not found."""

    @pytest.mark.parametrize("moment", ["before-commit", "after-commit"])
    async def test_a_starter_killed_before_the_go_leaves_nothing(
        self, gate: Gate, rows: ProcessRows, tmp_path: Path, moment: str
    ) -> None:
        """The program never runs, the waiting shell ends by itself, and the row tells that something was begun."""
        run_starter(tmp_path, moment)
        wait_gone(list(gate.find_marked()))
        assert gate.find_marked() == {}
        assert not (tmp_path / "ran").exists()
        (row,) = rows.all()
        assert (row.pid is None) is (moment == "before-commit")
        left = gate.adopt(row)  # a zombie may be left, until the host's init reaps it
        assert left is None or await left.wait() is None

    async def test_a_child_survives_its_starter_and_is_adopted(
        self, gate: Gate, rows: ProcessRows, tmp_path: Path
    ) -> None:
        """The next daemon finds it by its row, reads its log, ends it, and nothing is left."""
        run_starter(tmp_path, "later")
        (row,) = rows.all()
        assert gate.find_marked() == {row.pid: "m1"}
        child = gate.adopt(row)
        assert child is not None
        assert child.pid == row.pid
        assert child.running
        child.kill()
        assert await child.wait() is None  # it was not our own: nobody tells us its status
        assert gate.find_marked() == {}
        assert rows.all() == []

    async def test_a_child_that_no_row_names_is_found_by_its_mark(self, gate: Gate, tmp_path: Path) -> None:
        """Even with its row lost it can be found and killed; another home's cannot."""
        run_starter(tmp_path, "later")
        other = Gate(gate.rows, home_tag(tmp_path / "other"))
        (pid,) = gate.find_marked()
        assert other.find_marked() == {}
        assert not other.kill_stray(pid)
        assert gate.kill_stray(pid)
        wait_gone([pid])
        assert not gate.kill_stray(pid)

    async def test_a_child_can_die_with_its_starter(self, gate: Gate, tmp_path: Path) -> None:
        """Where it was asked for, the kernel ends the child of a killed starter."""
        run_starter(tmp_path, "with-us")
        wait_gone(list(gate.find_marked()))
        assert (tmp_path / "ran").exists()

    async def test_a_pid_that_changed_hands_is_not_adopted(self, gate: Gate, rows: ProcessRows) -> None:
        """A row whose start time or boot is not that of the process with its pid is void."""
        child = start(gate, "sleep 1000")
        (row,) = rows.all()
        assert row.start_time is not None
        for other in (
            ProcessRow(row.process_id, row.role, row.owner_id, row.pid, row.start_time - 1, row.boot_id),
            ProcessRow(row.process_id, row.role, row.owner_id, row.pid, row.start_time, "another boot"),
            ProcessRow(row.process_id, row.role, row.owner_id),
        ):
            assert gate.adopt(other) is None
        child.kill()
        await child.wait()

    async def test_a_released_child_lives_on(self, gate: Gate, rows: ProcessRows) -> None:
        """After release the row stays, and the child can be held again."""
        child = start(gate, "echo hello; exec sleep 1000")
        await _written(child)
        child.release()
        (row,) = rows.all()
        again = gate.adopt(row)
        assert again is not None
        assert again.log() == "hello\n"
        again.kill()
        assert await again.wait() == -signal.SIGKILL
        assert rows.all() == []
