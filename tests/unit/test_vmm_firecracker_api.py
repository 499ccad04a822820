"""The client of Firecracker's API against scripted bytes: what a real one answers, and what a broken one may."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireclaw.vmm.firecracker.api import Api, ApiError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

NO_CONTENT = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"


def answer(status: int, body: bytes) -> bytes:
    """An answer as Firecracker makes it: without a reason phrase."""
    return (
        b"HTTP/1.1 %d \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
    ) + body


class Server:
    """The other end of a client's connection.

    Attributes:
        api: the client.
    """

    def __init__(self, api: Api, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.api = api
        self._reader = reader
        self._writer = writer

    @classmethod
    async def start(cls) -> Server:
        """Make both ends."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=theirs)
        return cls(await Api.connect(ours), reader, writer)

    def say(self, data: bytes) -> None:
        """Send bytes; the client reads them when it asks next."""
        self._writer.write(data)

    async def hear(self) -> tuple[bytes, bytes]:
        """A request's head and body."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        lines = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        return head, await self._reader.readexactly(int(lines.get(b"Content-Length", b"0")))

    def end(self) -> None:
        """Close the connection."""
        self._writer.close()

    async def close(self) -> None:
        """Close both ends."""
        self.api.close()
        self._writer.transport.abort()
        await asyncio.sleep(0)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A client and its other end."""
    server = await Server.start()
    yield server
    await server.close()


class TestRequests:
    """What is sent."""

    async def test_a_put_has_a_length_and_json(self, server: Server) -> None:
        """micro-http takes no chunks, so a body comes with its length; and only what it knows."""
        server.say(NO_CONTENT)
        await server.api.put("/vsock", {"guest_cid": 3, "uds_path": "ch"})
        head, body = await server.hear()
        assert head.startswith(b"PUT /vsock HTTP/1.1\r\n")
        assert max(map(len, head.split(b"\r\n"))) < 1024
        assert json.loads(body) == {"guest_cid": 3, "uds_path": "ch"}

    async def test_a_get_has_no_body(self, server: Server) -> None:
        """A GET with a body would be refused."""
        server.say(answer(200, b'{"firecracker_version":"1.16.1"}'))
        assert await server.api.get("/version") == {"firecracker_version": "1.16.1"}
        head, body = await server.hear()
        assert head.startswith(b"GET /version HTTP/1.1\r\n")
        assert b"Content-Length" not in head
        assert body == b""

    async def test_requests_are_never_in_flight_together(self, server: Server) -> None:
        """Firecracker serves one at a time; the second goes out when the first is answered."""
        doing = [asyncio.create_task(server.api.patch("/vm", {"state": word})) for word in ("Paused", "Resumed")]
        assert json.loads((await server.hear())[1]) == {"state": "Paused"}
        second = asyncio.create_task(server.hear())
        assert (await asyncio.wait({second}, timeout=0.05))[1] == {second}
        server.say(NO_CONTENT)
        assert json.loads((await second)[1]) == {"state": "Resumed"}
        server.say(NO_CONTENT)
        await asyncio.gather(*doing)


class TestRefusals:
    """What is answered instead."""

    async def test_a_fault_is_told_with_the_request(self, server: Server) -> None:
        """Method, path and Firecracker's own words; the connection goes on."""
        server.say(answer(400, b'{"fault_message":"The requested operation is not supported before starting."}'))
        with pytest.raises(ApiError, match=r"Firecracker, PATCH /vm: The requested operation is not") as caught:
            await server.api.patch("/vm", {"state": "Paused"})
        assert (caught.value.http_status, caught.value.status) == (400, None)
        server.say(NO_CONTENT)
        await server.api.patch("/vm", {"state": "Paused"})
        assert server.api.connected

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            (
                b'{ "error": "Invalid Header.\nAll previous unanswered requests will be dropped." }',
                "Invalid Header. All previous unanswered requests will be dropped.",
            ),
            (b'{ "error": "Too many open connections" }', '{ "error": "Too many open connections" }'),
            (b"", "refused without a word"),
            (b"[1]", "[1]"),
            (b'{"fault_message":7}', "7"),
            (b"\xff\x1b[2J", "\ufffd\\x1b[2J"),
            (b'{"fault_message":"\\u001b[2Jgone"}', "\\x1b[2Jgone"),
        ],
    )
    async def test_whatever_stands_in_a_refusal(self, server: Server, body: bytes, message: str) -> None:
        """The transport's own refusals are no JSON; nothing in any of them moves a terminal's cursor."""
        server.say(answer(400, body))
        with pytest.raises(ApiError) as caught:
            await server.api.put("/x", {})
        assert caught.value.message == f"Firecracker, PUT /x: {message}"

    async def test_a_503_that_closes(self, server: Server) -> None:
        """The eleventh connection is turned away: refused, and afterwards not connected."""
        server.say(
            b"HTTP/1.1 503 \r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n"
            b'{ "error": "Too many open connections" }'
        )
        server.end()
        with pytest.raises(ApiError) as caught:
            await server.api.get("/")
        assert caught.value.http_status == 503
        with pytest.raises(ApiError, match="the connection ended"):
            await server.api.get("/")

    async def test_a_value_that_is_no_json(self, server: Server) -> None:
        """A 200 to a GET whose body is garbage is an error of ours."""
        server.say(answer(200, b"nonsense"))
        with pytest.raises(ApiError, match="GET /version: the reply is not JSON"):
            await server.api.get("/version")


class TestConnection:
    """How it ends."""

    @pytest.mark.parametrize("said", [b"", b"HTTP/1.1 20", b"HTTP/1.1 200 \r\nContent-Length: 10\r\n\r\n{}"])
    async def test_an_end_in_the_middle(self, server: Server, said: bytes) -> None:
        """A process that dies before, in or after the head of its answer is told, and nothing is repeated."""
        server.say(said)
        server.end()
        with pytest.raises(ApiError, match="GET /: the connection ended"):
            await server.api.get("/")
        assert not server.api.connected

    async def test_no_answer_in_time(self, server: Server) -> None:
        """A process that hangs is given up, and so is its connection: a late answer would be another's."""
        with pytest.raises(ApiError, match=r"PUT /snapshot/create: no reply within 0\.05 s"):
            await server.api.put("/snapshot/create", {}, timeout_s=0.05)
        server.say(NO_CONTENT)
        with pytest.raises(ApiError):
            await server.api.put("/vsock", {})

    async def test_a_request_that_is_not_wanted_any_more(self, server: Server) -> None:
        """After a cancellation the connection is of no use, and says so."""
        doing = asyncio.create_task(server.api.put("/vsock", {}))
        await server.hear()
        doing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doing
        assert not server.api.connected

    @pytest.mark.parametrize(
        "said",
        [
            b"\r\n\r\n",
            b"SSH-2.0\r\n\r\n",
            b"HTTP/1.1 twohundred\r\n\r\n",
            b"HTTP/1.1 200 \r\nContent-Length: 99999999999\r\n\r\n",
            b"x" * (1 << 21),
        ],
        ids=["empty", "foreign", "no number", "huge", "endless"],
    )
    async def test_what_is_no_http(self, server: Server, said: bytes) -> None:
        """Whatever comes from a process that its guest has taken over costs bounded memory and is an error of ours."""
        server.say(said)
        with pytest.raises(ApiError, match="the reply is not HTTP"):
            await server.api.get("/")
        assert not server.api.connected


@given(st.binary(max_size=300), st.booleans())
def test_no_bytes_are_anything_but_an_answer_or_our_error(said: bytes, whole: bool) -> None:
    """Any bytes, followed by the end, are an answer or an ``ApiError``."""

    async def ask() -> None:
        server = await Server.start()
        server.say(answer(200, said) if whole else said)
        server.end()
        try:
            await server.api.get("/")
        except ApiError:
            pass
        finally:
            await server.close()

    asyncio.run(ask())
