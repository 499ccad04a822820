"""Reaching the daemon, and starting it when a verb first needs it. Standard library only: it is on the hot path.

Starts are serialised by a lock, ``start.lock``, whose holder alone may start a daemon. The daemon inherits the lock
and lets go of it once it is ready, so a second client waits for exactly as long as the first one's daemon starts,
even when the first client is killed meanwhile.

The daemon says how its start went on a pipe, one JSON line; anything else on that pipe is a crash it did not foresee.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from fireclaw.cli.client import Connection, NoAnswerError, remote_error
from fireclaw.cli.terminal import say
from fireclaw.errors import FireclawError, SetupError

if TYPE_CHECKING:
    from fireclaw.paths import Home

# -P: the caller's working directory must not be able to shadow a module of the daemon's.
DAEMON = (sys.executable, "-P", "-m", "fireclaw.daemon")


class NotRunningError(FireclawError):
    """There is no daemon, and the verb would not start one."""

    code = "not-running"


def request(
    home: Home, method: str, target: str, body: bytes = b"", *, more: bool = False, start: bool = True
) -> Connection:
    """Send a request and wait for its answer's head, starting the daemon where there is none.

    A daemon that leaves before it answers (it was just ending, idle) has begun nothing, so the request is
    sent once more, to the next daemon.

    Args:
        home: whose daemon.
        method: ``GET``, ``POST`` or ``DELETE``.
        target: the path.
        body: the body, or the first chunk of an open one.
        more: the body stays open.
        start: whether a missing daemon is started.

    Raises:
        NotRunningError: there is none, and ``start`` is False.
        FireclawError: the daemon's start failed, or the daemon refused.
    """
    for attempt in (1, 2):
        connection = _connect(home, start=start)
        try:
            connection.send(method, target, body, more=more)
            connection.receive_head()
        except NoAnswerError as error:
            connection.socket.close()
            if attempt == 2:
                raise lost(home) from error
        except BaseException:
            connection.socket.close()
            raise
        else:
            return connection
    raise AssertionError("unreachable")


def lost(home: Home) -> FireclawError:
    """Build the error for a daemon that left in the middle."""
    return FireclawError("the connection to the daemon was lost", hint=f"its log is {home.log}")


def _connect(home: Home, *, start: bool) -> Connection:
    connection = _try_connect(home)
    if connection is not None:
        return connection
    if not start:
        raise NotRunningError("no daemon is running")
    _start(home)
    connection = _try_connect(home)
    if connection is None:
        raise FireclawError("the daemon ended as soon as it had started", hint=f"its log is {home.log}")
    return connection


def _try_connect(home: Home) -> Connection | None:
    try:
        return Connection(home.socket)
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        return None
    except OSError as error:
        raise SetupError(
            f"cannot reach the daemon at {home.socket}: {error.strerror}",
            hint="is it another user's? set FIRECLAW_HOME to a folder of your own",
        ) from error


def _start(home: Home) -> None:
    """Start the daemon, unless somebody did while we waited for our turn."""
    home.make()
    lock = _take_start_lock(home)
    try:
        if _try_connect(home) is None:
            ready = _await_readiness(_spawn(lock))
            if "error" in ready:
                raise remote_error(ready["error"])
            say(f"started the daemon (pid {ready['pid']})")
    finally:
        os.close(lock)


def _take_start_lock(home: Home) -> int:
    path = home.start_lock
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        raise SetupError(f"cannot lock {path}: {error.strerror}", hint="run 'fireclaw doctor'") from error
    return lock


def _spawn(lock: int) -> int:
    """Start the process; returns the reading end of the pipe on which it reports."""
    import subprocess  # noqa: PLC0415 - slow to import, and seldom needed

    reader, writer = os.pipe()
    try:
        command = [*DAEMON, "--ready-fd", str(writer), "--start-lock-fd", str(lock)]
        # It detaches itself: the process that we wait for here ends at once, and no zombie of ours remains.
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, pass_fds=(writer, lock), check=False
        )
    except OSError as error:
        os.close(reader)
        raise SetupError(f"cannot start the daemon: {error.strerror}") from error
    finally:
        os.close(writer)
    return reader


def _await_readiness(reader: int) -> dict[str, Any]:
    """Read the daemon's report, or make one of what it printed when it crashed."""
    with os.fdopen(reader, "rb") as pipe:
        last = b""
        for line in pipe:
            if line.startswith((b'{"ready"', b'{"error"')):
                report: dict[str, Any] = json.loads(line)
                return report
            last = line.strip() or last
    reason = last.decode(errors="replace") or "no reason given"
    raise FireclawError(f"the daemon ended while it started: {reason}", hint="run 'fireclaw doctor'")
