"""The host's end of the channel: a session with guestd, and the streams on it.

::

    channel = await Channel.open(sock, magic)        # hello and echo, at most 10 s
    stream = channel.stream()
    await stream.send(b"...")
    data = await stream.receive()                    # b"" at the end
    await channel.aclose()

The guest is hostile: a violation of the protocol closes the channel, every wait ends with it, and no more than one
window of bytes is kept for a stream that nobody reads.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any

from fireclaw.errors import ChannelLostError, ConflictError, GuestTimeoutError
from fireclaw.wire.hello import EchoFinder, hello, new_nonce
from fireclaw.wire.mux import HIGH_WATER, Event, Mux, MuxError

if TYPE_CHECKING:
    import socket

    from fireclaw.wire.mux import Stream as MuxStream

HELLO_SECONDS = 10.0
_SMALL = 4096


class Stream:
    """One conversation with guestd. One task reads, one task writes."""

    def __init__(self, channel: Channel, stream: MuxStream) -> None:
        self._channel = channel
        self._stream = stream
        self._chunks: deque[bytes] = deque()
        self._ended = False
        self._reset = False
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()

    async def receive(self) -> bytes:
        """Return the next bytes; b"" when the guest has finished.

        Raises:
            ChannelLostError: the stream or the channel ended before the guest finished it.
        """
        while not self._chunks:
            if self._ended:
                return b""
            if self._reset:
                raise ChannelLostError(self._channel.reason or "the guest reset the stream")
            self._readable.clear()
            await self._readable.wait()
        data = self._chunks.popleft()
        self._channel.consumed(self._stream, len(data))
        return data

    async def send(self, data: bytes | memoryview) -> None:
        """Send all of ``data``, as fast as the guest reads.

        Raises:
            ChannelLostError: the stream or the channel ended.
        """
        view = memoryview(data)
        while view:
            if self._reset:
                raise ChannelLostError(self._channel.reason or "the guest reset the stream")
            if self._channel.congested:
                await self._channel.drained()
                continue
            count = self._channel.send(self._stream, view)
            view = view[count:]
            if view:
                self._writable.clear()
                await self._writable.wait()

    def finish(self) -> None:
        """Say that no more will be sent."""
        self._channel.finish(self._stream)

    def abort(self) -> None:
        """End the stream at once; a command on it is killed. Harmless when it has ended."""
        self._channel.abort(self._stream)
        self.lose()

    def deliver(self, data: memoryview) -> None:
        """Take bytes from the channel."""
        # Small pieces are joined, or a window full of one-byte frames would cost forty times its size.
        if self._chunks and len(self._chunks[-1]) < _SMALL:
            self._chunks[-1] += bytes(data)
        else:
            self._chunks.append(bytes(data))
        self._readable.set()

    def end(self) -> None:
        """The guest sends no more."""
        self._ended = True
        self._readable.set()

    def lose(self) -> None:
        """The stream is gone both ways."""
        self._reset = True
        self._readable.set()
        self._writable.set()

    def grow(self) -> None:
        """The guest takes more."""
        self._writable.set()


class Channel(asyncio.Protocol):
    """A session with guestd on a connected socket.

    Attributes:
        lost: set once the channel has ended.
        reason: why it ended, for people.
    """

    def __init__(self, magic: bytes) -> None:
        nonce = new_nonce()
        self._hello = hello(magic, nonce)
        self._echo: EchoFinder | None = EchoFinder(magic, nonce)
        self._mux = Mux(client=True)
        self._transport: asyncio.Transport | None = None
        self._drained = asyncio.Event()
        self._drained.set()
        self._ready = asyncio.Event()
        self._flush_planned = False
        self.lost = asyncio.Event()
        self.reason = ""

    @classmethod
    async def open(cls, sock: socket.socket, magic: bytes, timeout_s: float = HELLO_SECONDS) -> Channel:
        """Begin a session on ``sock`` (connected, non-blocking), which the channel then owns.

        Raises:
            GuestTimeoutError: no echo within ``timeout_s``; the machine is as good as dead.
            ChannelLostError: the connection ended first.
        """
        channel = await cls.begin(sock, magic)
        try:
            await channel.wait_ready(timeout_s)
        except BaseException:
            await channel.aclose()
            raise
        return channel

    @classmethod
    async def begin(cls, sock: socket.socket, magic: bytes) -> Channel:
        """Send the hello and do not wait for the echo: calls may be written behind it at once."""
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_connection(lambda: cls(magic), sock=sock)
        return channel

    async def wait_ready(self, timeout_s: float = HELLO_SECONDS) -> None:
        """Wait for the echo of our hello; errors as for ``open``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            raise GuestTimeoutError(f"the guest did not answer within {timeout_s:g} s") from None
        if self.lost.is_set():
            raise ChannelLostError(f"the machine ended before it answered: {self.reason}")

    def stream(self) -> Stream:
        """Begin a stream.

        Raises:
            ChannelLostError: the channel has ended.
            ConflictError: too many streams are open.
        """
        if self.lost.is_set():
            raise ChannelLostError(self.reason)
        try:
            inner = self._mux.open()
        except MuxError as error:
            raise ConflictError(f"the machine is busy: {error}", hint="wait until a command has ended") from error
        inner.owner = stream = Stream(self, inner)
        self._plan_flush()
        return stream

    async def aclose(self) -> None:
        """Close the connection and wait until it is closed; the guest notices."""
        self._lose("closed")
        if self._transport is not None:
            self._transport.abort()
        await self.lost.wait()

    # -- for streams ------------------------------------------------------------------------------------------

    @property
    def congested(self) -> bool:
        """Whether more is pending than the machine reads."""
        return not self._drained.is_set() or self._mux.pending > HIGH_WATER

    async def drained(self) -> None:
        """Wait until the machine has read what was pending."""
        self._flush()
        await self._drained.wait()

    def send(self, stream: MuxStream, data: memoryview) -> int:
        """Queue what the guest's window takes; return how much that was."""
        # The multiplexer keeps what it is given until the next flush, so it gets bytes of its own.
        count = self._mux.send(stream, bytes(data[: stream.send_window])) if stream.open else len(data)
        self._plan_flush()
        return count

    def consumed(self, stream: MuxStream, count: int) -> None:
        """Let the guest send ``count`` bytes more."""
        self._mux.consumed(stream, count)
        if self._mux.pending:
            self._plan_flush()

    def finish(self, stream: MuxStream) -> None:
        """Finish our direction."""
        self._mux.finish(stream)
        self._plan_flush()

    def abort(self, stream: MuxStream) -> None:
        """Reset both directions."""
        self._mux.reset(stream)
        self._plan_flush()

    def _plan_flush(self) -> None:
        # One write for all that is queued in this turn of the loop: identity and first command travel together.
        if not self._flush_planned:
            self._flush_planned = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        # While the socket is full everything stays in the multiplexer, which bounds what a peer can provoke.
        self._flush_planned = False
        if self._mux.pending and self._transport is not None and self._drained.is_set() and not self.lost.is_set():
            self._transport.write(self._mux.take())

    # -- asyncio.Protocol -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the hello."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=HIGH_WATER)
        transport.write(self._hello)

    def pause_writing(self) -> None:
        """The socket is full."""
        self._drained.clear()

    def resume_writing(self) -> None:
        """The socket has drained."""
        self._drained.set()
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Take what the guest sent."""
        if self._echo is not None:
            rest = self._echo.feed(data)
            if rest is None:
                return
            self._echo = None
            self._ready.set()
            data = rest
        try:
            events = self._mux.receive(data)
        except MuxError as error:
            self._lose(f"the guest broke the protocol: {error}")
            if self._transport is not None:
                self._transport.abort()
            return
        for kind, stream, value in events:
            self._dispatch(kind, stream, value)
        self._flush()

    def _dispatch(self, kind: Event, inner: MuxStream | None, value: Any) -> None:
        if inner is None:
            return
        if kind is Event.OPENED:
            self._mux.reset(inner)  # no call of the guest is served
            return
        stream: Stream | None = inner.owner
        if stream is None:
            return
        if kind is Event.DATA:
            stream.deliver(value)
        elif kind is Event.FINISHED:
            stream.end()
        elif kind is Event.WRITABLE:
            stream.grow()
        elif kind is Event.RESET:
            stream.lose()

    def eof_received(self) -> None:
        """The machine closed its end; asyncio closes ours."""

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail everything that waits."""
        self._lose(f"the connection ended: {exc}" if exc else "the machine closed the channel")
        self.lost.set()
        self._ready.set()
        self._drained.set()
        for inner in self._mux.streams:
            if inner.owner is not None:
                inner.owner.lose()

    def _lose(self, reason: str) -> None:
        self.reason = self.reason or reason
