"""The relay between a person's terminal and a command in a machine: one poll loop, no threads. On the hot path.

Standard input, both outputs, Ctrl-C and the exit status travel as frames (``fireclaw.wire.frames``) on one open
request. Nothing is read from stdin while earlier input still waits to be sent, and nothing from the daemon while
an output is not taken, so memory stays bounded and back-pressure reaches the command.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
from typing import TYPE_CHECKING, Any, Final, Self

from fireclaw.cli.client import pack_chunk, remote_error
from fireclaw.cli.terminal import say
from fireclaw.errors import FireclawError
from fireclaw.wire.frames import FrameReader, Kind, pack, pack_json

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType, TracebackType

    from fireclaw.cli.client import Connection

TIMED_OUT: Final = 124
_STDIN, _STDOUT, _STDERR = 0, 1, 2
_PIECE: Final = 1 << 16


class Relay:
    """Carries one command to its end.

    ::

        status = Relay(connection).run()   # the answer's head has been received

    The first Ctrl-C is passed to the command, the second ends us; a SIGTERM ends us at once. When we end, the
    connection closes, and the daemon destroys what it was for.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._socket = connection.socket
        self._frames = FrameReader()
        self._unsent = b""
        self._stdin_open = True
        self._status: int | None = None

    def run(self) -> int:
        """Relay until the command has ended.

        Returns:
            Its exit status; 124 when it ran out of time.

        Raises:
            Stopped: a signal or a closed output ended us first.
            FireclawError: the daemon reported an error.
            ConnectionError: the daemon was lost.
        """
        with _Signals() as signals:
            self._take(self._connection.take_rest())
            while self._status is None:
                self._step(signals)
        return self._status

    def _step(self, signals: _Signals) -> None:
        """Wait until something can be done, and do it."""
        poll = select.poll()
        poll.register(signals.fileno(), select.POLLIN)
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if self._unsent else 0))
        if self._stdin_open and not self._unsent:
            poll.register(_STDIN, select.POLLIN)
        ready = dict(poll.poll())
        if signals.take_interrupt():
            say("passed Ctrl-C to the command; press it again to kill it")
            self._send(pack_json(Kind.SIGNAL, {"signal": int(signal.SIGINT)}))
        if ready.get(self._socket.fileno(), 0) & ~select.POLLOUT:
            self._receive()
        if self._unsent:
            self._send(b"")
        if _STDIN in ready:
            self._read_stdin()

    def _receive(self) -> None:
        data = self._socket.recv(_PIECE)
        self._take(self._connection.take(data))
        if self._status is None and (not data or self._connection.ended):
            raise ConnectionError("the answer ended before the command")

    def _take(self, pieces: Iterable[memoryview]) -> None:
        for piece in pieces:
            for kind, payload in self._frames.feed(piece):
                self._handle(kind, payload)

    def _handle(self, kind: Kind, payload: bytes) -> None:
        if kind is Kind.STDOUT:
            _write(_STDOUT, payload)
        elif kind is Kind.STDERR:
            _write(_STDERR, payload)
        elif kind is Kind.NOTE:
            say(payload.decode(errors="replace"))
        elif kind is Kind.ERROR:
            raise remote_error(json.loads(payload))
        elif kind is Kind.EXIT:
            self._finish(json.loads(payload))

    def _finish(self, end: dict[str, Any]) -> None:
        if reason := end.get("reason"):
            say(reason)
        if end["timed_out"]:
            say("the command ran out of time and was killed")
        self._status = TIMED_OUT if end["timed_out"] else int(end["status"])

    def _read_stdin(self) -> None:
        try:
            data = os.read(_STDIN, _PIECE)
        except OSError as error:  # a folder; a terminal that hung up
            say(f"cannot read standard input: {error.strerror}")
            data = b""
        self._stdin_open = bool(data)
        self._send(pack(Kind.STDIN, data) if data else pack(Kind.STDIN_CLOSED))

    def _send(self, frame: bytes) -> None:
        """Send a frame after what is still unsent, as far as the daemon takes it."""
        self._unsent += pack_chunk(frame) if frame else b""
        try:
            sent = self._socket.send(self._unsent, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
            self._unsent = self._unsent[sent:]
        except BlockingIOError:
            pass
        except ConnectionError:
            # The daemon stopped listening; its last words, or their absence, are read from the answer.
            self._unsent, self._stdin_open = b"", False


class Stopped(Exception):  # noqa: N818 - an ending, not an error
    """We were made to stop before the command did.

    Attributes:
        status: what we exit with.
    """

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Signals:
    """SIGINT and SIGTERM while a command runs.

    Signals wake the poll loop by a pipe. A signal that must end us raises Stopped wherever we are, even in the
    middle of writing to an output that nobody reads.
    """

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._interrupts = 0
        self._taken = 0

    def __enter__(self) -> Self:
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._old = [(number, signal.signal(number, self._on_signal)) for number in (signal.SIGINT, signal.SIGTERM)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._old:
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._reader)
        os.close(self._writer)

    def fileno(self) -> int:
        """What becomes readable when a signal came."""
        return self._reader

    def take_interrupt(self) -> bool:
        """Whether the first Ctrl-C has come and has not been taken yet."""
        try:
            os.read(self._reader, 64)
        except BlockingIOError:
            return False
        fresh = self._interrupts > self._taken
        self._taken = self._interrupts
        return fresh

    def _on_signal(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the form signal demands
        self._interrupts += 1
        if number == signal.SIGTERM or self._interrupts > 1:
            raise Stopped(128 + number)


def _write(descriptor: int, data: bytes) -> None:
    """Write all of ``data`` to an output of ours."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # the caller gave us a pipe in non-blocking mode
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            poll.poll()
        except BrokenPipeError:
            raise Stopped(128 + signal.SIGPIPE) from None
        except OSError as error:
            name = "standard output" if descriptor == _STDOUT else "standard error"
            raise FireclawError(f"cannot write {name}: {error.strerror}") from error
