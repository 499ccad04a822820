"""The HTTP of Firecracker's API socket, without the socket: bytes in, requests out, replies to bytes.

It is no general HTTP. A line longer than the 1024 bytes of its buffer is an error, a body needs a Content-Length, and
what cannot be read is answered with something that looks like JSON and is none. After such an answer the reader goes
on where it was, so that the rest of a wrong request becomes more wrong requests.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Final

BUFFER: Final = 1024
PAYLOAD: Final = 51200
CONNECTIONS: Final = 10
FULL: Final = (
    b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n"
    b'{ "error": "Too many open connections" }'
)
_METHODS: Final = frozenset({b"GET", b"PUT", b"PATCH", b"DELETE"})
_VERSIONS: Final = frozenset({b"HTTP/1.0", b"HTTP/1.1"})


class TransportError(Exception):
    """These bytes are no request; the text is for the answer."""


@dataclass(frozen=True)
class Request:
    """A request as it came.

    Attributes:
        method: ``GET``, ``PUT``, ``PATCH`` or ``DELETE``.
        path: the path with whatever followed it; empty where the target was no path.
        body: the body; None without one.
    """

    method: str
    path: str
    body: bytes | None


@dataclass(frozen=True)
class Reply:
    """An answer.

    Attributes:
        status: 100, 200, 204, 400 or 413.
        body: None for none.
        deprecated: the request used what will go.
    """

    status: int
    body: bytes | None = None
    deprecated: bool = False

    @classmethod
    def of(cls, value: object) -> Reply:
        """Answer with a value."""
        return cls(200, compact(value))

    @classmethod
    def fault(cls, text: str, status: int = 400) -> Reply:
        """Refuse."""
        return cls(status, compact({"fault_message": text}))

    @classmethod
    def transport(cls, text: str) -> Reply:
        """Refuse bytes that were no request. The newline is raw, which JSON forbids."""
        return cls(400, f'{{ "error": "{text}\nAll previous unanswered requests will be dropped." }}'.encode())

    def encode(self) -> bytes:
        """The bytes to send. The reason phrase is empty, and 204 has no length."""
        lines = [f"HTTP/1.1 {self.status} ", "Server: Firecracker API", "Connection: keep-alive"]
        if self.deprecated:
            lines.append("Deprecation: true")
        if self.body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(self.body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + (self.body or b"")


CONTINUE: Final = Reply(100)


def compact(value: object) -> bytes:
    """JSON as Firecracker writes it."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass
class _Pending:
    method: str
    path: str
    length: int = 0
    expects: bool = False
    body: bytearray = field(default_factory=bytearray)


class Inbox:
    """Reads the requests of one connection.

    Args:
        limit: the longest body.
    """

    def __init__(self, limit: int = PAYLOAD) -> None:
        self._limit = limit
        self._kept = b""  # the beginning of a line
        self._pending: _Pending | None = None
        self._in_body = False

    @property
    def room(self) -> int:
        """How many bytes may be fed at once."""
        return BUFFER - len(self._kept)

    def feed(self, data: bytes) -> list[Request | Reply]:
        """Take bytes that came; return the requests that are complete, and what to answer before they are.

        Raises:
            TransportError: they cannot be read; requests before them are lost.
        """
        data = self._kept + data
        start = 0
        found: list[Request | Reply] = []
        while True:
            if self._pending is not None and self._in_body:
                taken = data[start : start + self._pending.length - len(self._pending.body)]
                self._pending.body += taken
                start += len(taken)
                if len(self._pending.body) < self._pending.length:
                    self._kept = b""
                    return found
                found.append(self._finish(self._pending))
                continue
            end = data.find(b"\r\n", start)
            if end < 0:
                self._check_line(data, start)
                self._kept = data[start:]
                return found
            line, start = data[start:end], end + 2
            if self._pending is None:
                self._pending = _read_request_line(line)
            elif line:
                _read_header(self._pending, line)
            elif self._pending.length:
                found += self._expect_body(self._pending)
            else:
                found.append(self._finish(self._pending))

    def _check_line(self, data: bytes, start: int) -> None:
        """A line that fills the whole buffer has no end that could still come."""
        if start or len(data) < BUFFER:
            return
        if self._pending is None:
            raise TransportError("Invalid request.")
        text = data.decode(errors="replace")
        raise TransportError(f"Invalid header. Reason: Invalid content length. Header: {text}")

    def _expect_body(self, pending: _Pending) -> list[Reply]:
        if pending.length > self._limit:
            raise TransportError(
                f"Request payload with size {pending.length} is larger than the limit of {self._limit} "
                "allowed by server."
            )
        self._in_body = True
        return [CONTINUE] if pending.expects else []

    def _finish(self, pending: _Pending) -> Request:
        self._pending, self._in_body = None, False
        return Request(pending.method, pending.path, bytes(pending.body) if pending.length else None)


def _read_request_line(line: bytes) -> _Pending:
    method, space, rest = line.partition(b" ")
    target, space_too, version = rest.partition(b" ")
    if not space or not space_too:
        raise TransportError("Invalid request.")
    if method not in _METHODS:
        raise TransportError("Invalid HTTP Method: Unsupported HTTP method.")
    if not target:
        raise TransportError("Invalid URI: Empty URI not allowed.")
    try:
        path = target.decode()
    except UnicodeDecodeError:
        raise TransportError("Invalid URI: Cannot parse URI as UTF-8.") from None
    if version not in _VERSIONS:
        raise TransportError("Invalid HTTP Version: Unsupported HTTP version.")
    if path.startswith("http://"):
        path = path[path.find("/", 7) :] if "/" in path[7:] else ""
    return _Pending(method.decode(), path if path.startswith("/") else "")


def _read_header(pending: _Pending, line: bytes) -> None:
    """Most headers mean nothing here; a few wrong ones are errors."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise TransportError(
            "Invalid header. Reason: Header contains invalid characters. Key: "
            f"invalid utf-8 sequence of {error.end - error.start} bytes from index {error.start}"
        ) from None
    name, colon, value = text.partition(":")
    if not colon:
        raise TransportError(f"Invalid header. Reason: Header is incorrectly formatted. Key: {name}")
    match name.strip().lower():
        case "content-length":
            if not value.strip().removeprefix("+").isdecimal() or int(value) >= 2**32:
                raise TransportError(f"Invalid header. Reason: Invalid value. Key:{name}; Value:{value}")
            pending.length = int(value)
        case "expect":
            pending.expects = pending.expects or value.strip() == "100-continue"
        case "accept-encoding":
            _check_encoding(value)


def _check_encoding(value: str) -> None:
    if not value.strip():
        raise TransportError("Invalid request.")
    for each in (part.strip() for part in value.split(",")):
        if each == "identity;q=0" or (each == "*;q=0" and "identity" not in value):
            raise TransportError(f"Invalid header. Reason: Invalid value. Key:Accept-Encoding; Value:{each}")
