"""The program ``firecracker``: command line, exit statuses, signals, and the loop in which everything happens."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fireclaw.guest.loop import Loop
from fireclaw.testing.firecracker import snapshot
from fireclaw.testing.firecracker.arguments import ArgumentError, Arguments, IdError, Option, check_id, read
from fireclaw.testing.firecracker.http import PAYLOAD
from fireclaw.testing.firecracker.machine import Machine
from fireclaw.testing.firecracker.rust import debug, say
from fireclaw.testing.firecracker.server import Server, die
from fireclaw.testing.firecracker.sinks import Journal, Metrics, open_sink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fireclaw.testing.firecracker.script import Script

_LEVELS: Final = ("off", "error", "warn", "warning", "info", "debug", "trace")
_OPTIONS: Final = (
    Option("api-sock"),
    Option("id"),
    Option("seccomp-filter", forbids="no-seccomp"),
    Option("no-seccomp", takes_value=False, forbids="seccomp-filter"),
    Option("start-time-us"),
    Option("start-time-cpu-us"),
    Option("parent-cpu-time-us"),
    Option("log-path"),
    Option("level"),
    Option("module"),
    Option("show-level", takes_value=False),
    Option("show-log-origin", takes_value=False),
    Option("metrics-path"),
    Option("boot-timer", takes_value=False),
    Option("snapshot-version", takes_value=False),
    Option("describe-snapshot"),
    Option("http-api-max-payload-size"),
    Option("mmds-size-limit"),
)
# Signals that the original turns into an exit status; SIGTERM and SIGINT are none of them and just kill.
_STATUS_OF_SIGNAL: Final = {
    signal.SIGSYS: 148,
    signal.SIGBUS: 149,
    signal.SIGSEGV: 150,
    signal.SIGXFSZ: 151,
    signal.SIGXCPU: 154,
    signal.SIGHUP: 156,
    signal.SIGILL: 157,
}


class _Failure(Exception):  # noqa: N818 - it has a status, not a name
    """The program ends.

    Attributes:
        debug: its last line on stderr.
        status: its exit status.
    """

    def __init__(self, text: str, debug: str, status: int = 1) -> None:
        super().__init__(text)
        self.debug = debug
        self.status = status


def main(script: Script, words: Sequence[str] | None = None) -> int:
    """Be a Firecracker.

    Args:
        script: what to do beside being faithful.
        words: the command line; sys.argv's when None.

    Returns:
        The exit status.
    """
    journal = Journal()
    try:
        _run(script, sys.argv[1:] if words is None else words, journal)
    except _Failure as failure:
        journal.error(str(failure))
        print(f"Error: {failure.debug}", file=sys.stderr)  # noqa: T201 - a program's last words
        journal.error(f"Firecracker exiting with error. exit_code={failure.status}")
        return failure.status
    journal.info("Firecracker exiting successfully. exit_code=0")
    return 0


def _run(script: Script, words: Sequence[str], journal: Journal) -> None:
    try:
        arguments = read(words, _OPTIONS)
    except ArgumentError as error:
        text = f"Arguments parsing error: {error} \n\nFor more information try --help."
        raise _Failure(text.replace("\n", "\\n", 2), f"ParseArguments({error.debug})", 153) from None
    if _answered_at_once(script, arguments):
        return
    Path("/proc/self/comm").write_text("firecracker")
    _begin(arguments, journal, script)
    for number, status in _STATUS_OF_SIGNAL.items():
        signal.signal(number, lambda *_, status=status: os._exit(status))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    metrics = Metrics(cut=script.cut_metrics)
    if "metrics-path" in arguments:
        metrics.fd = _open_metrics(arguments.get("metrics-path"))
    if "start" in script.exit_at:
        die(script.exit_at["start"])
    _Process(script, arguments, journal, metrics).serve()


def _answered_at_once(script: Script, arguments: Arguments) -> bool:
    """Answer the questions that need no machine."""
    if "help" in arguments or "version" in arguments:
        _say(f"Firecracker v{script.version}\n")
    elif "snapshot-version" in arguments:
        _say(f"v{script.snapshot_version}")
    elif "describe-snapshot" in arguments:
        _say(f"v{_describe(arguments.get('describe-snapshot'))}")
    else:
        return False
    return True


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - the answer to an option is for stdout


def _describe(path: str) -> str:
    problem = "When printing Snapshot Data format: "
    try:
        return snapshot.read_version(path)
    except OSError as error:
        text = f"{problem}Unable to open snapshot state file: {say(error)}"
        raise _Failure(text, f"PrintSnapshotDataFormat(OpenSnapshot({debug(error)}))") from None
    except snapshot.StateError as error:
        text = f"{problem}Invalid data format version of snapshot file: {error}"
        raise _Failure(text, f"PrintSnapshotDataFormat(SnapshotVersion({error.debug}))") from None


def _begin(arguments: Arguments, journal: Journal, script: Script) -> None:
    """Take the id and set up the log."""
    name = arguments.get("id", journal.name)
    try:
        check_id(name)
    except IdError as error:  # a panic, in the original
        journal.error(
            f"Firecracker panicked at src/firecracker/src/main.rs:309:48:\nInvalid instance ID: {error.debug}"
        )
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        die(-signal.SIGABRT)
    journal.name = name
    level = arguments.get("level").lower()
    if level and level not in _LEVELS:
        level = arguments.get("level")
        text = (
            f"Invalid value for logger level: Failed to parse string to level filter: {level}."
            "Possible values: [Error, Warning, Info, Debug]"
        )
        raise _Failure(text, f'InvalidLogLevel(LevelFilterFromStrError("{level}"))', 152)
    try:
        journal.update(
            path=arguments.get("log-path") or None, level=level or None, show_level="show-level" in arguments or None
        )
    except OSError as error:
        text = f"Could not initialize logger: Failed to open target file: {say(error)}"
        raise _Failure(text, f"LoggerInitialization(LoggerUpdateError({debug(error)}))") from None
    journal.info(f"Running Firecracker v{script.version}")


def _open_metrics(path: str) -> int:
    try:
        return open_sink(path)
    except OSError as error:
        problem = "Could not initialize metrics: Cannot initialize the metrics system due to bad user input: "
        words = f'MetricsInitialization(InitializationFailure("{say(error)}"))'
        raise _Failure(problem + say(error), words) from None


class _Process:
    """The process once its socket exists: it serves until the guest ends, or something fatal."""

    def __init__(self, script: Script, arguments: Arguments, journal: Journal, metrics: Metrics) -> None:
        self._script = script
        self._metrics = metrics
        self._loop = Loop()
        self._failure: _Failure | None = None
        listener = self._bind(arguments.get("api-sock", "/run/firecracker.socket"), journal)
        name = arguments.get("id", "anonymous-instance")
        limit = arguments.get("http-api-max-payload-size", str(PAYLOAD))
        self._machine = Machine(
            self._loop,
            script,
            name=name,
            journal=journal,
            metrics=metrics,
            metadata_limit=int(arguments.get("mmds-size-limit", limit)),
            on_exit=self._loop.stop,
        )
        self._server = Server(
            self._loop,
            listener,
            self._machine,
            script,
            limit=int(limit),
            journal=journal,
            metrics=metrics,
            on_fatal=self._fail,
        )

    def serve(self) -> None:
        """Serve until the end.

        Raises:
            _Failure: the end is an error.
        """
        if not self._script.never_listens:
            time.sleep(self._script.listen_after_s)
            self._server.start()
        self._loop.run()
        self._machine.close()
        self._metrics.close()
        if self._failure is not None:
            raise self._failure

    def _fail(self) -> None:
        self._failure = _Failure(
            "RunWithApiError error: Failed to build MicroVM: Loading snapshot failed..",
            "RunWithApi(BuildMicroVmError(Restore))",
        )
        self._loop.stop()

    @staticmethod
    def _bind(path: str, journal: Journal) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                text = f"Failed to open the API socket at: {path}. Check that it is not already used."
                raise _Failure(f"RunWithApiError error: {text}", f'RunWithApi(FailedToBindSocket("{path}"))') from None
            text = f"RunWithApiError error: Failed to bind and run the HTTP server: IO error: {say(error)}"
            raise _Failure(text, f"RunWithApi(FailedToBindAndRunHttpServer(IOError({debug(error)})))") from None
        journal.info(f'Listening on API socket ("{path}").')
        return listener
