"""Commands in throw-away and in named machines, as a person types them: real daemon, real guests."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

import pytest
from machine_home import api, make_machine, private_home, until, vmms

from conftest import command_line, leftovers
from fireclaw.errors import ConflictError, InvalidError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from conftest import Cli

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def cli() -> Iterator[Cli]:
    """The command line on one home for all tests that start no daemon of their own."""
    with private_home() as home, command_line(home) as cli:
        assert cli("run", "--", "true").returncode == 0  # what is said once is said now
        yield cli


@pytest.fixture
def fresh() -> Iterator[Cli]:
    """The command line on a home in which nothing has run yet."""
    with private_home() as home, command_line(home) as cli:
        yield cli


@pytest.fixture
def box(cli: Cli) -> Iterator[str]:
    """The name of a machine; it is gone afterwards."""
    make_machine(cli, "box")
    yield "box"
    with contextlib.suppress(NotFoundError):
        api(cli.home, "DELETE", "/v1/machines/box")


def sh(cli: Cli, script: str, *options: str, stdin: bytes | None = b"") -> tuple[int, bytes, bytes]:
    """Run a script in a machine of its own; returns status, stdout and stderr."""
    done = cli("run", *options, "--", "sh", "-c", script, stdin=stdin)
    return done.returncode, done.stdout, done.stderr


def through_shell(cli: Cli, script: str) -> subprocess.CompletedProcess[bytes]:
    """Run a line of a person's own shell, in which ``"$@"`` is ``fireclaw``."""
    return subprocess.run(
        ["bash", "-c", script, "bash", *cli.argv()], env=cli.env, capture_output=True, timeout=120, check=False
    )


def read_until(process: subprocess.Popen[bytes], word: bytes) -> None:
    """Read a verb's stdout up to a word."""
    assert process.stdout is not None
    seen = b""
    while word not in seen:
        piece = os.read(process.stdout.fileno(), 4096)
        assert piece, f"it ended after {seen!r}"
        seen += piece


def wait_quiet(cli: Cli) -> None:
    """Wait until no machine is left, neither in the list nor as a process."""
    until(lambda: cli.json("ps", "--json") == [] and vmms(cli.home) == {}, "no machine is left")
    assert [path for path in leftovers(cli.home) if not path.is_socket()] == []


# -- streams and status ---------------------------------------------------------------------------------------


def test_streams_and_status_are_the_commands(cli: Cli) -> None:
    """What a command writes to stdout and stderr comes out there, and its status is ours."""
    assert sh(cli, "echo out; echo err >&2; exit 7") == (7, b"out\n", b"err\n")


def test_a_pipeline_through_a_machine(cli: Cli) -> None:
    """``seq 100000 | fireclaw run -- sha256sum`` is the host's own sum."""
    done = through_shell(cli, 'seq 100000 | "$@" run -- sha256sum; seq 100000 | sha256sum')
    inside, outside = done.stdout.splitlines()
    assert inside == outside


def test_twenty_megabytes_come_out_whole(cli: Cli) -> None:
    """Twenty random megabytes of a guest arrive as they were, and as many zeroes go in."""
    script = "head -c 20000000 /dev/urandom > /tmp/x; sha256sum < /tmp/x >&2; cat /tmp/x"
    status, out, err = sh(cli, script)
    assert (status, len(out)) == (0, 20_000_000)
    assert hashlib.sha256(out).hexdigest() == err.split()[0].decode()
    assert sh(cli, "wc -c", stdin=bytes(20_000_000)) == (0, b"20000000\n", b"")


def test_killed_not_found_and_not_executable(cli: Cli) -> None:
    """A killed command is 128 + the signal, an unknown one 127, a file that is no program 126, with the reason."""
    assert sh(cli, "kill -9 $$") == (137, b"", b"")
    for argv, status, reason in (
        ("no-such-command", 127, b"fireclaw: the machine says: no-such-command: No such file or directory\n"),
        ("/etc/passwd", 126, b"fireclaw: the machine says: /etc/passwd: Permission denied\n"),
        ("\x1b[31mred", 127, b"fireclaw: the machine says: \\x1b[31mred: No such file or directory\n"),
    ):
        done = cli("run", "--", argv)
        assert (done.returncode, done.stdout, done.stderr) == (status, b"", reason)


def test_one_string_goes_through_the_machines_shell(cli: Cli) -> None:
    """One lone word is a line for the shell; words after ``--`` reach the command as they are."""
    assert cli("run", "uname -a").stdout.startswith(b"Linux fc-")
    assert cli("run", "echo $((6 * 7)) | rev").stdout == b"24\n"
    done = through_shell(cli, """"$@" run -- printf '%s|' '$HOME' 'a  b' $'\\xff\\xfe' ''""")
    assert done.stdout == b"$HOME|a  b|\xff\xfe||"


def test_options_of_run(cli: Cli) -> None:
    """Variables, folder and user are the ones asked for, and nothing of the host's environment goes in."""
    cli.env["FIRECLAW_SECRET_OF_THE_HOST"] = "x"
    try:
        status, out, _ = sh(cli, "echo $A-$B; pwd; id -un; env", "-e", "A=1 2", "-w", "/usr", "-u", "agent")
    finally:
        del cli.env["FIRECLAW_SECRET_OF_THE_HOST"]
    assert (status, out.splitlines()[:3]) == (0, [b"1 2-", b"/usr", b"agent"])
    assert {line.partition(b"=")[0] for line in out.splitlines()[3:]} == {b"A", b"HOME", b"PATH", b"PWD", b"USER"}


def test_a_command_that_runs_out_of_time_is_124(cli: Cli) -> None:
    """``--timeout`` kills the command, whatever it ignores, says so, and nothing of its machine is left."""
    began = time.monotonic()
    status, out, err = sh(cli, "trap '' TERM INT; echo before; sleep 60 & wait", "--timeout", "1")
    assert (status, out, err) == (124, b"before\n", b"fireclaw: the command ran out of time and was killed\n")
    assert time.monotonic() - began < 20
    wait_quiet(cli)


# -- what a machine is ----------------------------------------------------------------------------------------


def test_two_machines_at_once_are_two(cli: Cli) -> None:
    """Two runs at once differ in hostname, machine-id, UUID and random bytes, know the time, and have no network."""
    script = (
        "hostname; cat /etc/machine-id /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | od -An -tx1;"
        " date +%s.%N; ls /sys/class/net; read _"
    )
    began = time.time()
    pair = [cli.start("run", script) for _ in range(2)]
    until(lambda: len(cli.json("ps", "--json")) == 2, "both machines run at the same time")
    outputs = [process.communicate(b"\n")[0].decode().splitlines() for process in pair]
    ended = time.time()
    assert [process.returncode for process in pair] == [0, 0]
    for mine, other in zip(outputs[0][:4], outputs[1][:4], strict=True):
        assert mine
        assert mine != other
    for lines in outputs:
        assert began - 1 < float(lines[4]) < ended + 1
        assert lines[5:] == ["lo"]


def test_a_machine_is_gone_when_its_command_is(cli: Cli) -> None:
    """After a run no machine, process, folder or socket of it is left, and ``prune`` finds nothing."""
    assert sh(cli, "sleep 1000 & exit 3")[0] == 3
    wait_quiet(cli)
    done = cli("prune")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_what_a_run_did_is_in_the_ledger(cli: Cli) -> None:
    """A run's machine, command and status are recorded, and the record is whole."""
    assert sh(cli, "exit 42")[0] == 42
    wait_quiet(cli)
    entries = cli.ledger()
    done = next(entry for entry in entries if entry.type == "command.done" and entry.data["status"] == 42)
    of_machine = [entry.type for entry in entries if entry.machine == done.machine]
    assert of_machine == ["machine.made", "command.started", "command.done", "machine.gone"]
    assert cli("ledger", "verify").returncode == 0


# -- the terminal's side --------------------------------------------------------------------------------------


def test_ctrl_c_once_is_the_commands(cli: Cli) -> None:
    """The first Ctrl-C is the command's SIGINT: it may handle it, and its own status counts."""
    process = cli.start("run", "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.05; done")
    read_until(process, b"ready\n")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (5, b"caught\n")
    assert err == b"fireclaw: passed Ctrl-C to the command; press it again to kill it\n"


def test_ctrl_c_ends_a_command_that_does_not_mind_it(cli: Cli) -> None:
    """A command without a handler ends by SIGINT, status 130."""
    process = cli.start("run", "echo ready; sleep 60")
    read_until(process, b"ready\n")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_ctrl_c_twice_ends_at_once(cli: Cli) -> None:
    """The second Ctrl-C does not wait for a command that ignores the first one; its machine is destroyed."""
    process = cli.start("run", "trap '' INT; echo ready; sleep 60 & wait; sleep 60")
    read_until(process, b"ready\n")
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    assert b"press it again" in process.stderr.readline()
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - began < 5
    wait_quiet(cli)


def test_a_terminated_client_takes_its_machine_along(cli: Cli) -> None:
    """SIGTERM ends the client with 143 and destroys its machine."""
    process = cli.start("run", "echo ready; sleep 60")
    read_until(process, b"ready\n")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    wait_quiet(cli)


@pytest.mark.parametrize(
    ("line", "status", "out"),
    [
        ('"$@" run -- cat <&-', 0, b""),
        ('"$@" run -- cat < /dev/null', 0, b""),
        ('"$@" run "echo out; exit 3" <&- 2>&-', 3, b"out\n"),
        ('"$@" run "echo out; exit 3" >&-', 3, b""),
        ('"$@" run yes | head -n 1; exit ${PIPESTATUS[0]}', 141, b"y\n"),
        ('"$@" run yes > /dev/full', 125, b""),
    ],
)
def test_inputs_and_outputs_that_are_not_there(cli: Cli, line: str, status: int, out: bytes) -> None:
    """Closed, empty, broken and full standard files each have their plain outcome, and leave no machine behind."""
    done = through_shell(cli, line)
    assert (done.returncode, done.stdout) == (status, out)
    assert b"Traceback" not in done.stderr
    wait_quiet(cli)


def test_a_full_disk_under_stdout_is_named(cli: Cli) -> None:
    """The error says which output cannot be written, and why."""
    done = through_shell(cli, '"$@" run "echo x" > /dev/full')
    assert done.stderr == b"fireclaw: cannot write standard output: No space left on device\n"


# -- named machines -------------------------------------------------------------------------------------------


def test_exec_reaches_a_machine_that_stays(cli: Cli, box: str) -> None:
    """Commands in a named machine share its files and processes; status, streams and options are as for ``run``."""
    done = cli("exec", box, "--", "sh", "-c", "echo kept > /tmp/f; (sleep 1000 &) ; echo err >&2; exit 9")
    assert (done.returncode, done.stdout, done.stderr) == (9, b"", b"err\n")
    assert cli("exec", box, "cat /tmp/f; hostname; pgrep -x sleep | wc -l").stdout == b"kept\nbox\n1\n"
    done = cli("exec", "-w", "/usr", "-u", "agent", "-e", "A=b", box, "pwd; id -un; echo $A; cat", stdin=b"in")
    assert done.stdout == b"/usr\nagent\nb\nin"
    done = cli("exec", "--timeout", "0.5", box, "--", "sleep", "60")
    assert done.returncode == 124
    assert cli("exec", box, "pgrep -x sleep | wc -l").stdout == b"1\n"  # of the two, the one that ran out of time went


def test_ps_tells_of_machines(cli: Cli, box: str) -> None:
    """``ps`` lists a machine for people, ``ps --json`` for programs."""
    (machine,) = cli.json("ps", "--json")
    assert machine | {"created_at": 0, "id": "", "vmm": "", "accel": ""} == {
        "id": "",
        "name": box,
        "purpose": "named",
        "image": "debian",
        "state": "running",
        "vmm": "",
        "accel": "",
        "memory_mib": 256,
        "created_at": 0,
    }
    head, line = cli("ps").stdout.decode().splitlines()
    assert head.split() == ["ID", "NAME", "PURPOSE", "IMAGE", "STATE", "MEMORY", "VMM", "AGE"]
    assert line.split()[:5] == [machine["id"][:12], box, "named", "debian", "running"]
    assert cli("exec", machine["id"].replace("-", "")[:12], "hostname").stdout == b"box\n"


def test_names_are_taken_and_given_back(cli: Cli, box: str) -> None:
    """A second machine of the same name is refused; a removed one's name is free again."""

    def make(name: str) -> dict[str, Any]:
        made: dict[str, Any] = api(cli.home, "POST", "/v1/machines", b'{"name": "%s"}' % name.encode())
        return made

    with pytest.raises(ConflictError, match="box"):
        make(box)
    with pytest.raises(InvalidError, match="name"):
        make("no such/name")
    assert len(cli.json("ps", "--json")) == 1
    api(cli.home, "DELETE", f"/v1/machines/{box}")
    wait_quiet(cli)
    assert make(box)["name"] == box


def test_exec_in_an_unknown_machine(cli: Cli, box: str) -> None:
    """An unknown name is 125, with the nearest one."""
    done = cli("exec", "bxo", "--", "true")
    assert (done.returncode, done.stderr) == (
        125,
        f"fireclaw: no machine named 'bxo' (did you mean '{box}'?)\n".encode(),
    )


def test_an_interrupted_exec_leaves_the_machine(cli: Cli, box: str) -> None:
    """A killed client's command is killed; the machine, and what else runs in it, stays."""
    assert cli("exec", box, "sleep 1000 & echo $!").returncode == 0
    process = cli.start("exec", box, "echo ready; sleep 777")
    read_until(process, b"ready\n")
    process.kill()
    process.communicate()
    until(lambda: cli("exec", box, "pgrep -fx 'sleep 777'").returncode == 1, "the command is killed")
    assert cli("exec", box, "pgrep -fx 'sleep 1000'").returncode == 0


# -- the daemon -----------------------------------------------------------------------------------------------


def test_the_first_verb_starts_the_daemon_and_says_so(fresh: Cli) -> None:
    """Any verb starts the daemon, says so once, and the next verb uses it; ``down`` ends it and all machines."""
    first = fresh("ps")
    assert first.stderr == b"fireclaw: started the daemon (pid %d)\n" % fresh.daemon_pid
    assert fresh("ps").stderr == b""
    make_machine(fresh, "box")

    down = fresh("down")

    assert (down.returncode, down.stderr) == (0, b"fireclaw: ending 1 machine\nfireclaw: all is stopped\n")
    assert vmms(fresh.home) == {}
    assert leftovers(fresh.home) == []
    assert fresh("status").returncode == 1


def test_two_first_verbs_start_one_daemon(fresh: Cli) -> None:
    """Two runs that both need a daemon start one between them, and both are served."""
    pair = [fresh.start("run", "--", "echo", str(n)) for n in range(2)]
    ends = [process.communicate(timeout=60) for process in pair]
    assert [process.returncode for process in pair] == [0, 0]
    assert [out for out, _ in ends] == [b"0\n", b"1\n"]
    assert sum(b"started the daemon" in err for _, err in ends) == 1
    assert fresh.home.log.read_text().count("starts, pid") == 1


def test_doctor_finds_the_host_in_order(cli: Cli) -> None:
    """``doctor`` finds everything in order that a run needs, whether or not a daemon runs, and starts none."""
    assert cli("run", "--", "true").returncode == 0
    found = {check["name"]: check for check in cli.json("doctor", "--json")}
    needed = ("platform", "packages", "folders", "runtime", "image", "daemon")
    assert [(name, found[name]["reason"]) for name in needed if found[name]["state"] != "ok"] == []
    assert str(cli.daemon_pid) in found["daemon"]["reason"]
    text = cli("doctor").stdout.decode()
    assert all(check["reason"] in text for check in found.values())


def test_doctor_starts_nothing(fresh: Cli) -> None:
    """``doctor`` in a new home makes neither a daemon nor a file."""
    before = sorted(fresh.home.data.iterdir())
    fresh("doctor")
    assert sorted(fresh.home.data.iterdir()) == before
