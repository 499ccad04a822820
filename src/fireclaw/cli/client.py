"""A small blocking HTTP client for the daemon's unix socket. Standard library only: it is on the hot path.

One request a connection. The request's body is either whole or *open* (chunked, more to come), and the answer's
body can be read while the request's is still being written; ``fireclaw run`` needs both at once.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
from typing import TYPE_CHECKING, Any, Final, Self

from fireclaw.errors import ConflictError, FireclawError, InvalidError, NotFoundError, SetupError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

_RECEIVE: Final = 1 << 16
_HEAD_MAX: Final = 1 << 16
_CREDENTIALS: Final = struct.Struct("iII")  # pid, uid, gid: unix(7)
_CLASSES: Final = {kind.code: kind for kind in (ConflictError, InvalidError, NotFoundError, SetupError)}


class NoAnswerError(ConnectionError):
    """The daemon left before it answered; by its contract nothing of the request has begun."""


def pack_chunk(data: bytes) -> bytes:
    """Wrap bytes as one chunk of an open request's body; they must not be empty."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def remote_error(error: dict[str, Any]) -> FireclawError:
    """Rebuild the error that the daemon sent, with its class where a caller may branch on it."""
    code = str(error.get("code", "error"))
    kind = _CLASSES.get(code, FireclawError)
    found = kind(str(error.get("message", "the daemon gave no reason")), hint=str(error.get("hint", "")))
    found.code = code
    return found


class Dechunker:
    """Takes the chunked framing off a response body, piece by piece.

    Attributes:
        ended: the last chunk was seen; without it the body was cut.
    """

    def __init__(self) -> None:
        self.ended = False
        self._line = b""  # of a chunk's header that has not ended yet
        self._left = -2  # bytes of the chunk's data and its closing CRLF still to come; -2: a header comes next

    def feed(self, data: bytes) -> Iterator[memoryview]:
        """Yield the payload bytes in ``data``.

        Raises:
            ConnectionError: it is not chunked framing.
        """
        position = 0
        while position < len(data) and not self.ended:
            if self._left == -2:
                position = self._feed_header(data, position)
                continue
            if self._left > 0:
                piece = memoryview(data)[position : position + self._left]
                position += len(piece)
                self._left -= len(piece)
                yield piece
                continue
            skipped = min(2 + self._left, len(data) - position)  # the CRLF after the data
            position += skipped
            self._left -= skipped

    def _feed_header(self, data: bytes, position: int) -> int:
        end = data.find(b"\n", position)
        self._line += data[position:] if end < 0 else data[position:end]
        if end < 0:
            if len(self._line) > _HEAD_MAX:
                raise ConnectionError("the daemon's answer is not HTTP")
            return len(data)
        try:
            self._left = int(self._line.split(b";")[0], 16)
        except ValueError:
            raise ConnectionError("the daemon's answer is not HTTP") from None
        self._line = b""
        self.ended = self._left == 0
        return end + 1


class Connection:
    """One request to the daemon and its answer.

    ::

        with Connection(home.socket) as connection:
            connection.send("POST", "/v1/run", first_line, more=True)
            connection.receive_head()          # raises the daemon's error
            for piece in connection.pieces(): ...
    """

    def __init__(self, path: Path) -> None:
        """Connect.

        Raises:
            OSError: as connect(2) has it; FileNotFoundError and ConnectionRefusedError: there is no daemon.
            PermissionError: another user listens there, who would read the commands and invent the answers.
        """
        self.socket = socket.socket(socket.AF_UNIX)
        self._dechunker: Dechunker | None = None
        self._rest = b""
        self._length = 0
        try:
            self.socket.connect(str(path))
            _, owner, _ = _CREDENTIALS.unpack(self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if owner != os.geteuid():
                raise PermissionError(errno.EACCES, f"user {owner} listens there")
        except OSError:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def send(self, method: str, target: str, body: bytes = b"", *, more: bool = False) -> None:
        """Send the head and ``body``; with ``more`` the body stays open for chunks.

        Raises:
            NoAnswerError: the daemon left.
        """
        framing = b"Transfer-Encoding: chunked" if more else b"Content-Length: %d" % len(body)
        head = f"{method} {target} HTTP/1.1\r\nHost: fireclaw\r\nConnection: close\r\n".encode() + framing
        data = head + b"\r\n\r\n" + (pack_chunk(body) if more else body)
        try:
            while data:  # MSG_NOSIGNAL: a daemon that died must not kill us with SIGPIPE
                data = data[self.socket.send(data, socket.MSG_NOSIGNAL) :]
        except ConnectionError as error:
            # It may have refused the body and said why: then the answer is still readable.
            if not self._is_readable():
                raise NoAnswerError("the daemon closed the connection") from error

    def receive_head(self) -> None:
        """Wait for the answer's head.

        Raises:
            NoAnswerError: the daemon left before it answered, or is about to leave.
            FireclawError: the daemon refused; its own error.
        """
        data = b""
        while b"\r\n\r\n" not in data:
            piece = self._receive()
            if not piece or len(data) > _HEAD_MAX:
                raise NoAnswerError("the daemon closed the connection")
            data += piece
        head, _, self._rest = data.partition(b"\r\n\r\n")
        status, *fields = head.split(b"\r\n")
        headers = dict(field.lower().split(b": ", 1) for field in fields if b": " in field)
        if headers.get(b"transfer-encoding") == b"chunked":
            self._dechunker = Dechunker()
        else:
            self._length = int(headers.get(b"content-length", b"0"))
        if status.split(b" ")[1:2] != [b"200"]:
            refusal = self._refusal(status)
            if refusal.code == "closing":
                raise NoAnswerError("the daemon is ending")
            raise refusal

    def pieces(self) -> Iterator[memoryview]:
        """Yield the body as it comes, to its end.

        Raises:
            ConnectionError: the body was cut.
        """
        data = self._rest or self._receive()
        while data:
            yield from self.take(data)
            if self.ended:
                return
            data = self._receive()
        raise ConnectionError("the daemon closed the connection in the middle of its answer")

    def take_rest(self) -> Iterator[memoryview]:
        """Yield what of the body came along with the head, for callers that read the socket themselves."""
        rest, self._rest = self._rest, b""
        return self.take(rest)

    def take(self, data: bytes) -> Iterator[memoryview]:
        """Take the framing off bytes that the caller read from ``socket``."""
        if self._dechunker is not None:
            yield from self._dechunker.feed(data)
        else:
            self._length -= len(data)
            yield memoryview(data)

    @property
    def ended(self) -> bool:
        """Whether the whole body has been taken."""
        return self._dechunker.ended if self._dechunker is not None else self._length <= 0

    def read_json(self) -> Any:
        """Read the whole body as JSON.

        Raises:
            ConnectionError: the body was cut, or is not JSON.
        """
        body = b"" if self.ended else b"".join(self.pieces())
        try:
            return json.loads(body)
        except ValueError as error:
            raise ConnectionError(f"the daemon's answer is not JSON: {error}") from error

    def read_lines(self) -> Iterator[dict[str, Any]]:
        """Yield each JSON line of a streamed body as it comes.

        Raises:
            ConnectionError: the body was cut.
        """
        line = b""
        for piece in self.pieces():
            *lines, line = (line + piece).split(b"\n")
            yield from map(json.loads, lines)

    def _refusal(self, status: bytes) -> FireclawError:
        try:
            return remote_error(self.read_json()["error"])
        except (ConnectionError, KeyError, TypeError):
            return FireclawError(f"the daemon answered {status.decode(errors='replace')!r}")

    def _receive(self) -> bytes:
        """Receive some bytes; none: the daemon left."""
        try:
            return self.socket.recv(_RECEIVE)
        except ConnectionError:
            return b""

    def _is_readable(self) -> bool:
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except (BlockingIOError, ConnectionError):
            return False
