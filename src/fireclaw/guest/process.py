"""One command: its pipes, its exit, its signals.

Rules: output is complete before the exit; a grandchild that holds a pipe does not keep the stream; a host that does
not read stops the command through the full pipe; a reset kills the command's whole process group.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
from collections import deque
from typing import TYPE_CHECKING, Any

from fireclaw.guest.spawner import Command, UserError
from fireclaw.wire.frames import HEADER, FrameError, FrameReader, Kind, pack_json

if TYPE_CHECKING:
    from fireclaw.guest.session import Session
    from fireclaw.wire.mux import Stream

_READ_SIZE = 65536
_PIPE_SIZE = 262144
_ROOM = 4096 + HEADER.size  # less window than this is not worth a frame


class Process:
    """Serves the exec call."""

    def __init__(self, session: Session, stream: Stream, call: dict[str, Any]) -> None:
        self._session = session
        self._stream = stream
        self._loop = session.host.loop
        self._frames = FrameReader()
        self._input: deque[bytes] = deque()
        self._input_closed = False  # the host sends no more
        self._pid = 0
        self._pidfd = -1
        self._status: int | None = None
        self._signal = 0  # asked for before the command had started
        self._ended = False
        self._outputs: dict[int, Kind] = {}  # our ends of stdout and stderr, while open
        self._stdin = -1
        command = Command(call)
        theirs: list[int] = []  # the command's stdin, stdout and stderr
        try:
            self._make_pipes(theirs, with_stdin=bool(call.get("stdin")))
        except OSError as error:
            self._started(error, theirs)
            return
        spawner = session.host.spawner(confined=bool(call.get("confined")))
        spawner.start(command, theirs, lambda result: self._started(result, theirs))

    def _make_pipes(self, theirs: list[int], *, with_stdin: bool) -> None:
        if with_stdin:
            end, self._stdin = os.pipe()
            os.set_blocking(self._stdin, False)
        else:
            end = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        theirs.append(end)
        for kind in (Kind.STDOUT, Kind.STDERR):
            ours, end = os.pipe()
            os.set_blocking(ours, False)
            self._outputs[ours] = kind
            theirs.append(end)
        with contextlib.suppress(OSError):  # a small pipe is only slower
            fcntl.fcntl(theirs[1], fcntl.F_SETPIPE_SZ, _PIPE_SIZE)

    def _started(self, result: int | Exception, theirs: list[int]) -> None:
        for fd in theirs:
            os.close(fd)
        if isinstance(result, Exception):
            self._failed(result)
            return
        self._pid = result
        self._pidfd = os.pidfd_open(result)
        self._loop.add_reader(self._pidfd, self._exited)
        if self._ended:  # reset while the spawner worked
            self._kill(signal.SIGKILL)
            return
        if self._signal:
            self._kill(self._signal)
        for fd in self._outputs:
            self._watch(fd)
        self._pump_input()

    def _failed(self, error: Exception) -> None:
        """Answer that the command could not be started: docker's 126 and 127."""
        if self._ended:
            return
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            status = 127
        elif isinstance(error, OSError | UserError | ValueError):
            status = 126
        else:
            raise error
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        self._end({"status": status, "error": reason})

    # -- output -----------------------------------------------------------------------------------------------

    def _watch(self, fd: int) -> None:
        self._loop.add_reader(fd, lambda: self._readable(fd))

    def _readable(self, fd: int) -> None:
        if not self._may_send():
            self._loop.remove_reader(fd)
            return
        self._read(fd)
        self._session.flush()

    def _may_send(self) -> bool:
        if self._stream.send_window < _ROOM:
            return False  # ``writable`` comes with the host's grant
        if self._session.congested:
            self._session.park(self._stream)
            return False
        return True

    def _read(self, fd: int) -> bool:
        """Forward one piece of output; return whether there may be more."""
        try:
            data = os.read(fd, min(_READ_SIZE, self._stream.send_window - HEADER.size))
        except BlockingIOError:
            return False
        if not data:
            self._close_output(fd)
            return False
        # Two frames of the multiplexer cost less than one copy of the data.
        self._session.mux.send(self._stream, HEADER.pack(self._outputs[fd], len(data)))
        self._session.mux.send(self._stream, data)
        return True

    def _close_output(self, fd: int) -> None:
        self._loop.remove_reader(fd)
        del self._outputs[fd]
        os.close(fd)

    def writable(self) -> None:
        """Go on forwarding."""
        if self._ended:
            return
        if self._status is not None:
            self._drain()
            self._session.flush()
        elif self._pid:
            for fd in list(self._outputs):
                self._watch(fd)

    # -- input ------------------------------------------------------------------------------------------------

    def data(self, payload: bytes | memoryview) -> None:
        """Take frames of the host."""
        try:
            for kind, body in self._frames.feed(payload):
                self._frame(kind, body)
        except FrameError as error:
            self._session.host.log(f"exec: {error!r}")
            self._session.mux.reset(self._stream)
            self.reset()
            return
        self._pump_input()

    def _frame(self, kind: Kind, body: bytes) -> None:
        if kind is Kind.STDIN and body and self._stdin >= 0:
            self._input.append(body)
            return
        self._session.mux.consumed(self._stream, HEADER.size + len(body))
        if kind is Kind.STDIN_CLOSED:
            self._input_closed = True
        elif kind is Kind.SIGNAL:
            number = _parse_signal(body)
            if self._pid:
                self._kill(number)
            else:
                self._signal = number

    def finished(self) -> None:
        """The host sends no more: the command's stdin ends."""
        self._input_closed = True
        self._pump_input()

    def _pump_input(self) -> None:
        if not self._pid:
            return
        while self._input and self._stdin >= 0:
            body = self._input[0]
            try:
                count = os.write(self._stdin, body)
            except BlockingIOError:
                self._loop.add_writer(self._stdin, self._pump_input)
                break
            except OSError:  # the command closed its stdin: the rest goes nowhere, as in a shell
                self._close_stdin()
                break
            if count < len(body):
                self._input[0] = body[count:]
                self._session.mux.consumed(self._stream, count)
            else:
                self._input.popleft()
                self._session.mux.consumed(self._stream, HEADER.size + count)
        else:
            if self._stdin >= 0:
                self._loop.remove_writer(self._stdin)
            if self._input_closed:
                self._close_stdin()
        self._session.flush()

    def _close_stdin(self) -> None:
        if self._stdin >= 0:
            self._loop.remove_writer(self._stdin)
            os.close(self._stdin)
            self._stdin = -1
        for body in self._input:
            self._session.mux.consumed(self._stream, HEADER.size + len(body))
        self._input.clear()

    # -- end --------------------------------------------------------------------------------------------------

    def _kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, number)

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        self._status = code if code >= 0 else 128 - code
        if not self._ended:
            self._drain()
            self._session.flush()

    def _drain(self) -> None:
        """After the exit: forward what the pipes hold, then end. What a grandchild writes later is cut off."""
        for fd in list(self._outputs):
            while self._may_send() and self._read(fd):
                self._session.flush()
            if not self._may_send():
                return  # ``writable`` goes on; the exit itself needs room, too
        self._end({"status": self._status})

    def _end(self, exit_: dict[str, Any]) -> None:
        self._release()
        self._session.mux.send(self._stream, pack_json(Kind.EXIT, exit_))
        self._session.mux.finish(self._stream)
        self._session.flush()

    def _release(self) -> None:
        self._ended = True
        for fd in list(self._outputs):
            self._close_output(fd)
        self._close_stdin()

    def reset(self) -> None:
        """The host is not interested any more: kill the command's group."""
        if self._ended:
            return
        self._release()
        if self._pid and self._status is None:
            self._kill(signal.SIGKILL)


def _parse_signal(body: bytes) -> int:
    try:
        number = json.loads(body)["signal"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FrameError(f"a signal frame of {error!r}") from None
    if not isinstance(number, int) or not 0 < number < signal.NSIG:
        raise FrameError(f"signal {number!r}")
    return number
