"""The daemon as a process: its lock, socket, log, signals, and how it tells the one who started it.

Life::

    start.lock, inherited or taken → daemon.lock, held to the end → log → settings → supervisor → socket
    → ready: told on the pipe, start.lock let go → serve → SIGTERM or SIGINT (detach: machines live on),
    ``down`` (all was stopped), idle, or out of reach → socket gone → requests end → supervisor closed → locks gone

SIGHUP has the templates read anew.

``start.lock`` makes one daemon start at a time (fireclaw.cli.start); ``daemon.lock`` makes one live at a time and
holds its pid. The kernel frees both, however the process ends, so a stale lock cannot exist, and a socket found
under the lock is stale by that alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import resource
import signal
import socket
import time
from contextlib import AbstractAsyncContextManager, ExitStack
from typing import TYPE_CHECKING, Final

from fireclaw import __version__
from fireclaw.config import Config, load_config
from fireclaw.daemon.api import Api, Supervisor
from fireclaw.daemon.conversation import error_object, internal_error
from fireclaw.daemon.log import log_to_file, log_to_stderr
from fireclaw.daemon.server import ApiServer
from fireclaw.errors import ConflictError, FireclawError, SetupError
from fireclaw.paths import Home

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from pathlib import Path

    OpenSupervisor = Callable[[Home, Config], AbstractAsyncContextManager[Supervisor]]

_LEAVING_S: Final = 30.0  # a daemon that is just ending may take this long until its lock is free
_RETRY_S: Final = 0.05
_BACKLOG: Final = 128
_DESCRIPTORS: Final = 1 << 16
_LOOK_S: Final = 2.0  # for the socket's name

log = logging.getLogger(__name__)


def main(open_supervisor: OpenSupervisor, arguments: Sequence[str] | None = None) -> int:
    """Run the daemon to its end.

    Args:
        open_supervisor: makes what the API stands on; leaving its context detaches.
        arguments: of the command line; the process's own when None.

    Returns:
        The exit status: 0, or 1 when it could not start.
    """
    parser = argparse.ArgumentParser(prog="fireclaw.daemon", description="The Fireclaw daemon.")
    parser.add_argument("--ready-fd", type=int, help="detach, and tell on this descriptor how the start went")
    parser.add_argument("--start-lock-fd", type=int, help="the descriptor of start.lock, held by the caller")
    options = parser.parse_args(arguments)
    if options.ready_fd is not None:
        _detach(options.ready_fd)
    report = _Report(options.ready_fd)
    try:
        _live(open_supervisor, options.start_lock_fd, report)
    except FireclawError as error:
        log.error("cannot go on: %s", error)  # noqa: TRY400 - an expected end needs no traceback
        report.tell({"error": error_object(error)})
        return 1
    except Exception as error:
        log.exception("cannot go on")
        report.tell({"error": error_object(internal_error(error))})
        return 1
    return 0


class _Report:
    """Tells the one who started us, once, how the start went."""

    def __init__(self, descriptor: int | None) -> None:
        self.detached = descriptor is not None
        self._descriptor = descriptor

    def tell(self, outcome: dict[str, object]) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(BrokenPipeError):  # it left; the daemon stays for others
            os.write(self._descriptor, json.dumps(outcome).encode() + b"\n")
        os.close(self._descriptor)
        self._descriptor = None


def _detach(ready: int) -> None:
    """Leave the caller's session; the caller waits for the process that ends here."""
    if os.fork():
        os._exit(0)
    os.setsid()
    os.chdir("/")
    os.set_inheritable(ready, False)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _live(open_supervisor: OpenSupervisor, start_lock: int | None, report: _Report) -> None:
    # Private files carry modes of their own; what image builds make must not depend on the caller's umask.
    os.umask(0o022)
    _raise_descriptor_limit()
    home = Home.find()
    home.make()
    with ExitStack() as locks, ExitStack() as starting:
        starting.callback(os.close, _hold_start_lock(home, start_lock))
        locks.callback(os.close, _hold_daemon_lock(home))
        if report.detached:
            log_to_file(home.log)
        else:
            log_to_stderr()
        log.info("version %s starts, pid %d", __version__, os.getpid())

        def tell_ready() -> None:
            report.tell({"ready": True, "pid": os.getpid()})
            starting.close()

        asyncio.run(_serve(home, load_config(home), open_supervisor, tell_ready))


def _raise_descriptor_limit() -> None:
    """A machine costs six descriptors, and a shell's usual 1024 would end at 170 machines."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _hold_start_lock(home: Home, inherited: int | None) -> int:
    """Return the descriptor of start.lock, held; waits while another daemon starts."""
    if inherited is not None:
        os.set_inheritable(inherited, False)
        return inherited
    return _open_lock(home.start_lock, fcntl.LOCK_EX)


def _hold_daemon_lock(home: Home) -> int:
    """Return the descriptor of daemon.lock, held and with our pid in it.

    A holder that does not answer on its socket is about to leave; it gets the time to.

    Raises:
        ConflictError: another daemon holds it; names its pid.
    """
    deadline = time.monotonic() + _LEAVING_S
    while True:
        try:
            descriptor = _open_lock(home.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if _answers(home.socket) or time.monotonic() > deadline:
                raise _conflict(home) from error
            time.sleep(_RETRY_S)
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        os.close(descriptor)
        raise SetupError(f"cannot write {home.lock}: {error.strerror}", hint="run 'fireclaw doctor'") from error
    return descriptor


def _conflict(home: Home) -> ConflictError:
    pid = home.lock.read_text().strip() or "unknown"
    if _answers(home.socket):
        return ConflictError(
            f"another daemon (pid {pid}) runs on {home.data}",
            hint="'fireclaw down' stops it; FIRECLAW_HOME sets up another",
        )
    return ConflictError(
        f"the daemon before this one (pid {pid}) does not end",
        hint=f"'kill -9 {pid}' loses no machine; its log is {home.log}",
    )


def _open_lock(path: Path, operation: int) -> int:
    """Open and lock a lock file.

    Raises:
        BlockingIOError: it is held, and ``operation`` has LOCK_NB.
        SetupError: it cannot be opened or locked.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SetupError(f"cannot open {path}: {error.strerror}", hint="run 'fireclaw doctor'") from error
    try:
        fcntl.flock(descriptor, operation)
    except OSError as error:
        os.close(descriptor)
        if error.errno == errno.EWOULDBLOCK:
            raise
        raise SetupError(f"cannot lock {path}: {error.strerror}", hint="run 'fireclaw doctor'") from error
    return descriptor


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


async def _serve(home: Home, config: Config, open_supervisor: OpenSupervisor, tell_ready: Callable[[], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with open_supervisor(home, config) as supervisor:
        loop.add_signal_handler(signal.SIGHUP, supervisor.reload)
        api = Api(supervisor, home)
        with _bound(home.socket) as listener:
            server = ApiServer(api, listener)
            await server.start()
            tell_ready()
            log.info("ready")
            reason = await _wait_end(api, stop, home.socket, config.daemon.idle_minutes * 60)
            log.info("ends: %s", reason)
        # The socket's name is gone: who comes now starts the next daemon, which waits for our lock.
        await api.aclose()
        await server.aclose()


@contextlib.contextmanager
def _bound(path: Path) -> Iterator[socket.socket]:
    """Yield a listening socket at ``path``, 0600; unlink it afterwards, while the socket itself stays open."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise SetupError(f"cannot listen on {path}: {error.strerror}", hint="run 'fireclaw doctor'") from error
    finally:
        os.umask(mask)
    listener.listen(_BACKLOG)
    listener.setblocking(False)
    try:
        yield listener
    finally:
        path.unlink(missing_ok=True)


async def _wait_end(api: Api, stop: asyncio.Event, path: Path, idle_s: float) -> str:
    """Wait for the first reason to end, and name it."""
    reasons: dict[str, Coroutine[object, object, object]] = {
        "told to stop": stop.wait(),
        "all is down": api.down.wait(),
        f"{path} is gone, so nobody can reach it": _wait_removed(path),
        f"idle for {idle_s:.0f} s": wait_idle(api, idle_s),
    }
    tasks = [asyncio.create_task(wait, name=reason) for reason, wait in reasons.items()]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
    return done.pop().get_name()


async def _wait_removed(path: Path) -> None:
    """Return once the socket's name is gone: a logout may take the whole run folder with it."""
    while path.exists():  # noqa: ASYNC110, ASYNC240 - one look at a name; nothing tells of its end
        await asyncio.sleep(_LOOK_S)


async def wait_idle(api: Api, idle_s: float) -> None:
    """Return once nobody has needed the daemon for ``idle_s`` seconds."""
    loop = asyncio.get_running_loop()
    quiet_since = loop.time()
    while loop.time() - quiet_since < idle_s:
        await asyncio.sleep(idle_s / 20)
        quiet_since = loop.time() if api.needed else max(quiet_since, api.last_used)
