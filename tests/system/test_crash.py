"""Processes killed with -9, and what the next daemon and ``prune`` make of it: adopted, removed, or found."""

from __future__ import annotations

import os
import shutil
import signal
from typing import TYPE_CHECKING

import pytest
from machine_home import kill, make_machine, private_home, rows, until, vmms

from conftest import command_line, leftovers

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from conftest import Cli

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def cli() -> Iterator[Cli]:
    """The command line on a home in which a daemon runs, and nothing else."""
    with private_home() as home, command_line(home) as cli:
        assert cli("run", "--", "true").returncode == 0
        until(lambda: not vmms(home), "the machine is gone")
        yield cli


def start_run(cli: Cli, script: str = "echo ready; sleep 600") -> subprocess.Popen[bytes]:
    """Start a run and return once its command runs."""
    process = cli.start("run", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


def vmm_of(cli: Cli, machine_id: str) -> int:
    """The pid of a machine's VMM."""
    (pid,) = (pid for pid, mark in vmms(cli.home).items() if mark == machine_id)
    return pid


def prune(cli: Cli) -> list[str]:
    """What ``prune`` says that it removed."""
    done = cli("prune")
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().splitlines()


def assert_empty(cli: Cli) -> None:
    """No machine is left, as a row, as a process, or as a folder, and ``prune`` finds nothing."""
    until(lambda: cli.json("ps", "--json") == [], "no machine is listed")
    assert rows(cli.home, "SELECT machine_id FROM machines UNION ALL SELECT process_id FROM processes") == []
    assert vmms(cli.home) == {}
    assert [path for path in leftovers(cli.home) if not path.is_socket()] == []
    assert prune(cli) == []


# -- the daemon -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_named_machine_survives_its_daemon(cli: Cli, number: signal.Signals) -> None:
    """However the daemon ends, the next verb takes a named machine over, with its files and processes, twice."""
    machine = make_machine(cli, "box")
    vmm = vmm_of(cli, machine["id"])
    assert cli("exec", "box", "echo kept > /tmp/file; (sleep 1000 &)").returncode == 0
    for _ in range(2):
        kill(cli.daemon_pid, number)
        assert vmm_of(cli, machine["id"]) == vmm

        done = cli("exec", "box", "cat /tmp/file; hostname; pgrep -x sleep | wc -l")

        assert (done.returncode, done.stdout) == (0, b"kept\nbox\n1\n")
        assert done.stderr == b"fireclaw: started the daemon (pid %d)\n" % cli.daemon_pid
        assert cli.json("ps", "--json") == [machine]
        assert vmm_of(cli, machine["id"]) == vmm
        assert prune(cli) == []


def test_a_run_ends_with_its_daemon(cli: Cli) -> None:
    """When the daemon is killed, a run's client exits 125 with the reason, and the next daemon removes its machine."""
    process = start_run(cli)
    (vmm,) = vmms(cli.home)

    kill(cli.daemon_pid)

    _, err = process.communicate(timeout=30)
    assert process.returncode == 125
    assert err == f"fireclaw: the connection to the daemon was lost (its log is {cli.home.log})\n".encode()
    until(lambda: vmm not in vmms(cli.home), "the kernel has ended the VMM")
    assert cli.json("ps", "--json") == []
    assert "its client is gone" in cli.home.log.read_text()
    assert_empty(cli)


def test_an_exec_ends_with_its_daemon_and_its_machine_stays(cli: Cli) -> None:
    """When the daemon is killed, an exec's client exits 125; the next daemon's session has killed its command."""
    make_machine(cli, "box")
    process = cli.start("exec", "box", "echo ready; exec sleep 777")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"

    kill(cli.daemon_pid)

    process.communicate(timeout=30)
    assert process.returncode == 125
    until(lambda: cli("exec", "box", "pgrep -fx 'sleep 777'").returncode == 1, "the command is killed")
    assert prune(cli) == []


def test_a_daemon_that_is_told_to_stop_ends_runs_and_keeps_names(cli: Cli) -> None:
    """SIGTERM tells a run's client why it ends and removes its machine at once; a named one lives on."""
    machine = make_machine(cli, "box")
    process = start_run(cli)

    kill(cli.daemon_pid, signal.SIGTERM)

    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (125, b"fireclaw: the daemon ended while the command ran\n")
    assert set(vmms(cli.home).values()) == {machine["id"]}
    assert cli.json("ps", "--json") == [machine]


def test_a_template_that_was_being_made_is_found(cli: Cli) -> None:
    """A daemon killed while it makes a snapshot leaves a template; the next one removes it and makes another."""
    assert cli("down").returncode == 0
    shutil.rmtree(cli.home.snapshots)
    first = cli.start("run", "--", "true")
    until(lambda: vmms(cli.home), "the template boots")

    kill(cli.daemon_pid)
    first.communicate(timeout=30)

    assert first.returncode == 125
    done = cli("run", "--", "echo", "made")
    assert (done.returncode, done.stdout) == (0, b"made\n")
    assert b"making a snapshot of the image 'debian' (once)" in done.stderr
    assert len(list(cli.home.snapshots.iterdir())) == 1
    assert_empty(cli)


def test_down_ends_what_a_dead_daemon_left(cli: Cli) -> None:
    """``down`` after the daemon was killed ends the machines that it left."""
    make_machine(cli, "box")
    process = start_run(cli)
    kill(cli.daemon_pid)
    process.communicate(timeout=30)

    done = cli("down")

    assert done.returncode == 0
    assert done.stderr.endswith(b"fireclaw: ending 1 machine\nfireclaw: all is stopped\n")
    assert vmms(cli.home) == {}
    assert leftovers(cli.home) == []


# -- the client -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["echo ready; sleep 600", "echo ready; cat; yes"])
def test_a_killed_client_takes_its_machine_along(cli: Cli, script: str) -> None:
    """A client that is killed cannot say goodbye; its machine goes all the same, idle or busy."""
    process = start_run(cli, script)

    process.kill()
    process.communicate()

    until(lambda: not vmms(cli.home), "the machine is gone")
    assert_empty(cli)


def test_a_killed_client_whose_input_waits_takes_its_machine_along(cli: Cli) -> None:
    """A client is missed also while its command reads nothing and all buffers between them are full."""
    process = start_run(cli)
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    until(lambda: _is_full(process.stdin.fileno()), "all buffers are full")  # type: ignore[union-attr]  # see above

    process.kill()
    process.communicate()

    until(lambda: not vmms(cli.home), "the machine is gone")
    assert_empty(cli)


def _is_full(pipe: int) -> bool:
    """Write into a pipe; whether it took nothing."""
    try:
        os.write(pipe, bytes(1 << 20))
    except BlockingIOError:
        return True
    return False


# -- the VMM --------------------------------------------------------------------------------------------------


def test_a_killed_vmm_of_a_named_machine_is_noticed(cli: Cli) -> None:
    """The machine's row goes, its commands end with a reason, its death is in the ledger, and its name is free."""
    machine = make_machine(cli, "box")
    process = cli.start("exec", "box", "echo ready; sleep 600")
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"

    kill(vmm_of(cli, machine["id"]))

    _, err = process.communicate(timeout=30)
    assert process.returncode == 125
    assert err == b"fireclaw: the machine closed the channel\n"
    assert_empty(cli)
    (died,) = (entry for entry in cli.ledger() if entry.type == "machine.died")
    assert (died.machine, died.data["cause"], died.data["status"]) == (machine["id"], "vmm", -9)
    done = cli("exec", "box", "true")
    assert (done.returncode, done.stderr) == (125, b"fireclaw: no machine named 'box' (there is no machine yet)\n")
    assert make_machine(cli, "box")["name"] == "box"


def test_a_run_whose_vmm_is_killed_says_so(cli: Cli) -> None:
    """A run never passes for finished when its VMM was killed."""
    process = start_run(cli)
    (vmm,) = vmms(cli.home)

    kill(vmm)

    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (125, b"")
    assert err == b"fireclaw: the machine closed the channel\n"
    assert_empty(cli)


def test_a_vmm_that_died_with_its_daemon_is_forgotten(cli: Cli) -> None:
    """The next daemon finds that a named machine is dead, removes what is left of it, and says so in its log."""
    make_machine(cli, "box")
    (vmm,) = vmms(cli.home)
    kill(cli.daemon_pid)
    kill(vmm)

    assert cli.json("ps", "--json") == []

    assert "removed machine box: " in cli.home.log.read_text()
    assert_empty(cli)


# -- prune ----------------------------------------------------------------------------------------------------


def test_prune_finds_a_machine_that_no_row_names(cli: Cli) -> None:
    """A VMM and a folder whose rows are lost are found by their marks and names, once."""
    machine = make_machine(cli, "box")
    short = machine["id"].replace("-", "")[:12]
    (vmm,) = vmms(cli.home)
    kill(cli.daemon_pid)
    rows(cli.home, "DELETE FROM machines")
    rows(cli.home, "DELETE FROM processes")

    removed = prune(cli)

    assert removed == [f"process {vmm} of machine {short}", f"folder {short}"]
    until(lambda: not vmms(cli.home), "the VMM is gone")
    assert_empty(cli)


def test_prune_finds_folders_and_half_made_files(cli: Cli) -> None:
    """Folders without a machine and whatever a killed builder left half made are removed, what is whole stays."""
    home = cli.home
    whole = {folder: set(folder.iterdir()) for folder in (home.snapshots, home.images, home.runtimes)}
    for folder in (home.machines / "0123456789ab", *(each / "tmp-lost" for each in whole)):
        folder.mkdir()
        (folder / "memory").write_bytes(b"half")
    for folder in (home.machines, home.snapshots):
        (folder / "notes.txt").write_text("a person's own file")

    removed = prune(cli)

    assert sorted(removed) == [
        "folder 0123456789ab",
        "runtime or image tmp-lost",
        "runtime or image tmp-lost",
        "snapshot tmp-lost",
    ]
    for folder in (home.machines, home.snapshots):
        (folder / "notes.txt").unlink()
    assert {folder: set(folder.iterdir()) for folder in whole} == whole
    assert prune(cli) == []
    assert cli("run", "--", "true").returncode == 0


def test_prune_leaves_what_lives(cli: Cli) -> None:
    """``prune`` while machines run removes nothing of them."""
    make_machine(cli, "box")
    process = start_run(cli, "echo ready; read word; echo $word")

    assert prune(cli) == []

    assert cli("exec", "box", "hostname").stdout == b"box\n"
    assert process.communicate(b"alive\n", timeout=30)[0] == b"alive\n"
