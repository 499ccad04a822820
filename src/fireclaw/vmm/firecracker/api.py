"""A client of Firecracker's HTTP API: one kept connection on a unix socket, one request at a time.

Firecracker's server is its own (micro-http): reason phrases are empty, 204 has no Content-Length, and what is wrong
with the transport is told in JSON that is none, for it holds a raw newline. It serves ten connections and one request
at a time, so there is one connection here and a lock. Requests are not repeated: not every PUT is idempotent (the
vsock device binds its socket).
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from fireclaw.errors import VmmError
from fireclaw.vmm.base import escape

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

TIMEOUT_S: Final = 10.0  # a call takes a millisecond; the longest in Firecracker's own tests 700
_FAULT_BYTES: Final = 500
_REPLY_BYTES: Final = 1 << 20  # a reply is some hundred bytes; the guest's metadata, the longest, 51200
_STATUS: Final = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_LENGTH: Final = re.compile(rb"^content-length:\s*(\d+)\s*$", re.IGNORECASE | re.MULTILINE)
_FAULT: Final = re.compile(r'"(?:fault_message|error)":\s*"(.*)"\s*}?\s*$', re.DOTALL)


class ApiError(VmmError):
    """Firecracker refused a request, or did not answer it.

    Attributes:
        http_status: of its reply; 0 where there was none.
        fault: its own words.
    """

    def __init__(self, method: str, path: str, fault: str, *, http_status: int = 0) -> None:
        super().__init__(f"Firecracker, {method} {path}: {escape(fault)}")
        self.http_status = http_status
        self.fault = fault


class Reply(NamedTuple):
    """What came back.

    Attributes:
        status: the HTTP status.
        body: its bytes, without meaning for a 204.
    """

    status: int
    body: bytes


class Api:
    """The API of one Firecracker.

    ::

        api = await Api.connect(sock)
        await api.put("/vsock", {"guest_cid": 3, "uds_path": "ch"})
        version = (await api.get("/version"))["firecracker_version"]
        api.close()
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._lock = asyncio.Lock()

    @classmethod
    async def connect(cls, sock: socket.socket) -> Api:
        """Talk on a connected, non-blocking socket, which the client then owns."""
        return cls(*await asyncio.open_unix_connection(sock=sock, limit=_REPLY_BYTES))

    @property
    def connected(self) -> bool:
        """Whether the connection stands, as far as is known."""
        return not (self._writer.is_closing() or self._reader.at_eof())

    async def get(self, path: str) -> Any:
        """Ask for a JSON value; errors as for ``put``."""
        reply = await self._request("GET", path, None, TIMEOUT_S)
        try:
            return json.loads(reply.body)
        except (ValueError, RecursionError):  # from one that its guest has taken over
            raise ApiError("GET", path, "the reply is not JSON", http_status=reply.status) from None

    async def put(self, path: str, body: Mapping[str, object], *, timeout_s: float = TIMEOUT_S) -> None:
        """Set something up, or have something done.

        Raises:
            ApiError: it was refused, the connection ended, or there was no reply within the time.
        """
        await self._request("PUT", path, body, timeout_s)

    async def patch(self, path: str, body: Mapping[str, object], *, timeout_s: float = TIMEOUT_S) -> None:
        """Change something; errors as for ``put``."""
        await self._request("PATCH", path, body, timeout_s)

    def close(self) -> None:
        """End the connection."""
        self._writer.transport.abort()

    async def _request(self, method: str, path: str, body: Mapping[str, object] | None, timeout_s: float) -> Reply:
        async with self._lock:
            try:
                async with asyncio.timeout(timeout_s):
                    self._writer.write(_encode(method, path, body))
                    await self._writer.drain()
                    reply = await self._receive()
            except TimeoutError:
                self.close()  # a late reply would be taken for the next request's
                raise ApiError(method, path, f"no reply within {timeout_s:g} s") from None
            except asyncio.CancelledError:
                self.close()
                raise
            except (OSError, EOFError):
                raise ApiError(method, path, "the connection ended") from None
            except (asyncio.LimitOverrunError, ValueError):
                self.close()
                raise ApiError(method, path, "the reply is not HTTP") from None
        if reply.status not in {200, 204}:
            raise ApiError(method, path, _fault(reply.body), http_status=reply.status)
        return reply

    async def _receive(self) -> Reply:
        head = await self._reader.readuntil(b"\r\n\r\n")
        status = _STATUS.match(head)
        if status is None:
            raise ValueError(head[:80])
        length = _LENGTH.search(head)
        size = int(length[1]) if length else 0
        if size > _REPLY_BYTES:
            raise ValueError(size)
        return Reply(int(status[1]), await self._reader.readexactly(size))


def _encode(method: str, path: str, body: Mapping[str, object] | None) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
    if body is None:
        return f"{head}\r\n".encode()
    data = json.dumps(body).encode()
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def _fault(body: bytes) -> str:
    """Firecracker's own words in the body of a refusal, whether that is JSON or not."""
    text = body.decode(errors="replace").strip()
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        match = _FAULT.search(text[:_FAULT_BYTES])
        return " ".join((match[1] if match else text[:_FAULT_BYTES]).split()) or "refused without a word"
    fault = found.get("fault_message", text) if isinstance(found, dict) else text
    return str(fault)[:_FAULT_BYTES]
