"""The daemon's process: started on first need, one a home, told to stop, killed, and refused with a reason."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import socket
import stat
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from api_office import FAKE_DAEMON, CommandLine, daemon_pid, served_office, startable_home, stop_process

from fireclaw.daemon import process as daemon_process
from fireclaw.daemon.process import wait_idle
from fireclaw.errors import ConflictError

if TYPE_CHECKING:
    from collections.abc import Iterator

STARTED = "fireclaw: started the daemon (pid {})\n"


@pytest.fixture
def line() -> Iterator[CommandLine]:
    """A command line whose daemons are real processes over fake supervisors."""
    with startable_home() as line:
        yield line


def mode(line: CommandLine, name: str) -> int:
    """Return the permission bits of a file in the home."""
    return stat.S_IMODE((line.home.data / name).stat().st_mode)


def working_folder(pid: int) -> Path:
    """Return a process's working folder."""
    return Path(f"/proc/{pid}/cwd").readlink()


async def test_first_need_starts_it_and_says_so_once(line: CommandLine) -> None:
    """The first verb starts the daemon and says so, the second one uses it; its files are private."""
    first = await line.call("run", "--", "cat", stdin=b"hello")
    pid = daemon_pid(line.home)
    second = await line.call("run", "--", "cat", stdin=b"again")

    assert first == (0, b"hello", STARTED.format(pid))
    assert second == (0, b"again", "")
    assert [mode(line, name) for name in ("run", "run/api.sock", "run/daemon.lock", "daemon.log")] == [
        0o700,
        0o600,
        0o600,
        0o600,
    ]


async def test_it_has_left_its_caller(line: CommandLine) -> None:
    """The daemon leads a session of its own, works in the root folder, and holds no descriptor of its caller."""
    pipe = line.home.data / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    await line.call("run", "--", "cat", shell=f'exec 9> {pipe}; exec "$@"')
    pid = daemon_pid(line.home)
    assert pid is not None

    assert os.read(reader, 1) == b""  # an end of file: nobody can write any more
    os.close(reader)
    assert os.getsid(pid) == pid != os.getsid(0)
    assert working_folder(pid) == Path("/")


async def test_clients_that_race_start_one(line: CommandLine) -> None:
    """Four first verbs at once start one daemon, and all four work."""
    answers = await asyncio.gather(*(line.call("run", "--", "cat", stdin=b"%d" % n) for n in range(4)))

    assert [(status, out) for status, out, _ in answers] == [(0, b"%d" % n) for n in range(4)]
    assert sorted(err for _, _, err in answers) == ["", "", "", STARTED.format(daemon_pid(line.home))]
    assert line.home.log.read_text().count("starts, pid") == 1


async def test_second_daemon_is_refused(line: CommandLine) -> None:
    """A second daemon on one home names the first and leaves it alone."""
    await line.call("run", "--", "cat")
    pid = daemon_pid(line.home)
    second = await asyncio.create_subprocess_exec(
        sys.executable,
        str(FAKE_DAEMON),
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"FIRECLAW_HOME": str(line.home.data)},
    )
    _, err = await second.communicate()

    assert second.returncode == 1
    assert f"another daemon (pid {pid}) runs on {line.home.data}" in err.decode()
    assert (await line.call("run", "--", "cat"))[0] == 0
    assert daemon_pid(line.home) == pid


def test_a_daemon_that_does_not_end_is_named(line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock whose holder neither answers nor leaves is an error that names the holder and the next step."""
    monkeypatch.setattr(daemon_process, "_LEAVING_S", 0.1)
    line.home.make()
    with line.home.lock.open("w") as lock:
        lock.write("4711\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)

        with pytest.raises(ConflictError) as refused:
            daemon_process._hold_daemon_lock(line.home)

        assert refused.value.message == "the daemon before this one (pid 4711) does not end"
        assert "kill -9 4711" in refused.value.hint


async def test_killed_daemon_is_replaced(line: CommandLine) -> None:
    """What a daemon killed with -9 leaves (socket, lock file) does not hinder the next one; the old log is kept."""
    await line.call("run", "--", "cat")
    old = daemon_pid(line.home)
    assert old is not None
    stop_process(old, signal.SIGKILL)
    assert line.home.socket.exists()

    status, out, err = await line.call("run", "--", "cat", stdin=b"on")

    assert (status, out, err) == (0, b"on", STARTED.format(daemon_pid(line.home)))
    assert f"pid {old}" in line.home.log.with_suffix(".log.1").read_text()


async def test_lost_daemon_is_125(line: CommandLine) -> None:
    """When the daemon dies under a command, what came before is written, and the status is 125 with the reason."""
    status, out, err = await line.call("run", "--", "crash")

    assert (status, out) == (125, b"half")
    assert f"fireclaw: the connection to the daemon was lost (its log is {line.home.log})\n" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_ends_it_cleanly(line: CommandLine, number: signal.Signals) -> None:
    """A daemon told to stop tells the commands that run, and leaves neither socket nor lock."""
    process = await line.start("run", "--", "stubborn")
    assert process.stdout is not None
    await process.stdout.readline()
    pid = daemon_pid(line.home)
    assert pid is not None

    await asyncio.to_thread(stop_process, pid, number)
    _, err = await process.communicate()

    assert process.returncode == 125
    assert b"fireclaw: the daemon ended while the command ran\n" in err
    assert not line.home.socket.exists()
    assert daemon_pid(line.home) is None


async def test_down_returns_when_it_is_gone(line: CommandLine) -> None:
    """After ``down`` there is no daemon; ``down`` where nothing ever ran starts none."""
    assert await line.call("down") == (0, b"", "fireclaw: nothing is running\n")
    await line.call("run", "--", "cat")

    status, _, err = await line.call("down")

    assert (status, err) == (0, "fireclaw: stopping\nfireclaw: all is stopped\n")
    assert daemon_pid(line.home) is None
    assert not line.home.socket.exists()


async def test_up_stays_in_the_foreground_until_ctrl_c(line: CommandLine) -> None:
    """``up`` shows how to join, stays, and stops everything on Ctrl-C."""
    process = await line.start("up")
    assert process.stderr is not None
    while b"Ctrl-C stops everything" not in (await process.stderr.readline()):
        pass

    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()

    assert process.returncode == 0
    assert b"irc      127.0.0.1 port 6667, password pw, then /join #agents\n" in out
    assert err.endswith(b"fireclaw: all is stopped\n")
    assert daemon_pid(line.home) is None


async def test_up_detached_returns_and_down_elsewhere_is_told(line: CommandLine) -> None:
    """``up --detach`` returns when all is ready; an ``up`` that stays ends with 0 when somebody says ``down``."""
    assert (await line.call("up", "--detach"))[0] == 0
    staying = await line.start("up")
    assert staying.stderr is not None
    while b"Ctrl-C stops everything" not in (await staying.stderr.readline()):
        pass

    await line.call("down")
    _, err = await staying.communicate()

    assert (staying.returncode, err) == (0, b"fireclaw: all was stopped\n")


async def test_up_says_when_the_daemon_was_stopped(line: CommandLine) -> None:
    """An ``up`` in the foreground whose daemon is told to detach fails, and says that machines go on."""
    process = await line.start("up")
    assert process.stderr is not None
    while b"Ctrl-C stops everything" not in (await process.stderr.readline()):
        pass
    pid = daemon_pid(line.home)
    assert pid is not None

    await asyncio.to_thread(stop_process, pid)
    _, err = await process.communicate()

    assert process.returncode == 125
    assert b"the daemon ended, and machines go on ('fireclaw up' takes them over)" in err


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ("[irc]\nprot = 1\n", "fireclaw.toml, line 2: unknown key 'irc.prot' (did you mean 'port'?)"),
        ("[irc\n", "fireclaw.toml, line 1: not TOML"),
        ("[irc]\nport = '1'\n", "fireclaw.toml, line 2: irc.port must be a valid integer, not '1'"),
    ],
)
async def test_bad_settings_are_said_and_leave_nothing(line: CommandLine, settings: str, complaint: str) -> None:
    """A bad configuration is the client's error, with its place; no process and no socket remain."""
    line.home.config_file.write_text(settings)

    status, out, err = await line.call("run", "--", "cat")

    assert (status, out) == (125, b"")
    assert complaint in err
    assert daemon_pid(line.home) is None
    assert not line.home.socket.exists()


async def test_full_state_folder_is_said(line: CommandLine) -> None:
    """Where nothing can be written any more (here: a file size limit of 0), the start fails with the reason."""
    status, _, err = await line.call("run", "--", "cat", shell='ulimit -f 0; exec "$@"')

    assert (status, err) == (
        125,
        f"fireclaw: cannot write {line.home.lock}: File too large (run 'fireclaw doctor')\n",
    )
    assert daemon_pid(line.home) is None


async def test_impossible_home_is_said(line: CommandLine) -> None:
    """A home that cannot be made is an error with the reason, without a daemon."""
    status, _, err = await line.call("run", "--", "cat", env={"FIRECLAW_HOME": "/proc/fireclaw"})

    assert status == 125
    assert "fireclaw: cannot make the folder '/proc/fireclaw'" in err


async def test_crash_at_start_is_said(line: CommandLine) -> None:
    """A daemon that cannot even be imported is reported with its last words."""
    code = (
        "import sys; from fireclaw.cli import main, start;"
        "start.DAEMON = (sys.executable, '-c', 'raise RuntimeError(7)', '--'); sys.exit(main())"
    )

    status, _, err = await CommandLine(line.home, "-c", code).call("run", "--", "cat")

    assert (status, err) == (
        125,
        "fireclaw: the daemon ended while it started: RuntimeError: 7 (run 'fireclaw doctor')\n",
    )


async def test_daemon_that_just_leaves_is_replaced(line: CommandLine) -> None:
    """A request that a leaving daemon does not answer is sent again, to the next one."""
    line.home.make()
    with socket.socket(socket.AF_UNIX) as leaving:
        leaving.bind(str(line.home.socket))
        leaving.listen()

        def leave() -> None:
            connection, _ = leaving.accept()
            line.home.socket.unlink()
            connection.close()

        thread = threading.Thread(target=leave)
        thread.start()
        status, out, _ = await line.call("run", "--", "cat", stdin=b"x")
        thread.join()

    assert (status, out) == (0, b"x")


async def test_status_without_a_daemon_starts_none(line: CommandLine) -> None:
    """``status`` says that nothing runs, with exit status 1, and starts nothing."""
    assert await line.call("status") == (1, b"not running\n", "")
    status, out, _ = await line.call("status", "--json")
    assert (status, json.loads(out)["daemon"]) == (1, None)
    assert daemon_pid(line.home) is None


async def test_idle_daemon_ends() -> None:
    """A daemon that nobody needs ends after its time, but not while it is busy or a job of it runs."""
    async with served_office() as office:
        await asyncio.wait_for(wait_idle(office.api, 0.05), 5)

        office.fake.busy = True
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wait_idle(office.api, 0.05), 0.5)
        office.fake.busy = False

        setup = await office.start("setup")
        assert setup.stderr is not None
        assert await setup.stderr.readline() == b"fireclaw: building\n"
        setup.kill()
        await setup.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wait_idle(office.api, 0.05), 0.5)

        office.fake.go_on.set()
        await asyncio.wait_for(wait_idle(office.api, 0.05), 5)
