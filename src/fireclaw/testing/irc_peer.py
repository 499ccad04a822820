"""Two ends of IRC for tests: a scripted server that can do anything wrong, and a raw client that says anything.

A scripted server::

    async with IrcServerPeer() as server:
        client = IrcClient(server.address, ...)
        link = await server.accept()
        await link.welcome()
        await link.send(":ann!~ann@host PRIVMSG bot :hi")
        await link.expect("PRIVMSG ann :hello")

A raw client is an :class:`IrcLink` made by :func:`connect`, to a scripted or a real server.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Self

from fireclaw.irc.client import ServerAddress
from fireclaw.irc.message import LineBuffer

if TYPE_CHECKING:
    from types import TracebackType

PATIENCE_S = 10.0


class IrcLink:
    """One connection, seen as lines.

    Attributes:
        seen: every line that came, without its line end.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._lines = LineBuffer()
        self._waiting: list[str] = []
        self.seen: list[str] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def send(self, *lines: str) -> None:
        """Send lines."""
        await self.send_bytes("".join(f"{line}\r\n" for line in lines).encode())

    async def send_bytes(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def read_line(self) -> str:
        """Read the next line.

        Raises:
            EOFError: the other end closed the connection.
            TimeoutError: nothing came for 10 s.
        """
        async with asyncio.timeout(PATIENCE_S):
            while not self._waiting:
                data = await self._reader.read(64 * 1024)
                if not data:
                    raise EOFError("the connection has ended")
                self._waiting += [raw.decode("utf-8", "replace") for raw in self._lines.feed(data)]
        line = self._waiting.pop(0)
        self.seen.append(line)
        return line

    async def expect(self, pattern: str) -> re.Match[str]:
        """Read lines until one matches, anywhere in it; PINGs from a server are answered on the way.

        Args:
            pattern: a regular expression.

        Raises:
            AssertionError: the connection ended, or 10 s passed, with what came instead.
        """
        start = len(self.seen)
        try:
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    line = await self.read_line()
                    if match := re.search(pattern, line):
                        return match
                    if line.startswith("PING "):
                        await self.send("PONG" + line[4:])
        except (OSError, EOFError) as error:
            raise AssertionError(f"no line like {pattern!r} in {self.seen[start:]}: {error!r}") from error

    async def expect_end(self) -> None:
        """Read until the other end closes the connection."""
        try:
            while True:
                await self.read_line()
        except (EOFError, ConnectionError):
            return

    async def register(self, nick: str, password: str = "") -> None:
        """Be a client: register and wait for the end of the introduction."""
        await self.send(f"PASS {password or 'none'}", f"NICK {nick}", f"USER {nick} 0 * :{nick}")
        await self.expect(r" (376|422) ")

    async def welcome(self, *, name: str = "peer.test", isupport: str = "CASEMAPPING=ascii NICKLEN=24") -> str:
        """Be a server: let a client register, and give back its nick."""
        nick = (await self.expect(r"^NICK :?(\S+)"))[1]
        await self.expect(r"^USER ")
        await self.introduce(nick, name=name, isupport=isupport)
        return nick

    async def introduce(self, nick: str, *, name: str = "peer.test", isupport: str = "CASEMAPPING=ascii") -> None:
        """Be a server: say 001, 005 and 376."""
        await self.send(
            f":{name} 001 {nick} :Welcome {nick}!~{nick}@127.0.0.1",
            f":{name} 005 {nick} {isupport} :are supported on this server",
            f":{name} 376 {nick} :End of MOTD command",
        )

    async def aclose(self) -> None:
        """Close the connection."""
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except ConnectionError:
            return  # the other end was quicker

    def reset(self) -> None:
        """Break the connection without a goodbye."""
        self._writer.transport.abort()


async def connect(address: ServerAddress) -> IrcLink:
    """Connect a raw client; it is not registered yet.

    Raises:
        OSError: nobody listens there.
    """
    return IrcLink(*await asyncio.open_connection(address.host, address.port))


class IrcServerPeer:
    """A server that does only what its test tells it."""

    def __init__(self) -> None:
        self._accepted: asyncio.Queue[IrcLink] = asyncio.Queue()
        self._links: list[IrcLink] = []
        self._server: asyncio.Server | None = None
        self._port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._on_connect, "127.0.0.1", 0)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for link in self._links:
            link.reset()
            await link.aclose()
        await self._server.wait_closed()

    @property
    def address(self) -> ServerAddress:
        """Where it listens."""
        return ServerAddress("127.0.0.1", self._port)

    async def accept(self) -> IrcLink:
        """Wait for the next connection.

        Raises:
            TimeoutError: nobody came within 10 s.
        """
        async with asyncio.timeout(PATIENCE_S):
            return await self._accepted.get()

    def _on_connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = IrcLink(reader, writer)
        self._links.append(link)
        self._accepted.put_nowait(link)
