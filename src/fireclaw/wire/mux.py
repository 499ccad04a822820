"""The multiplexer: many streams with back-pressure on one byte stream. Sans-I/O; both ends run this code.

The framing is yamux's (https://github.com/hashicorp/yamux/blob/master/spec.md): a 12-byte header of version, type,
flags, stream id and length, then for DATA that many bytes. Streams begin with SYN/ACK, end each way with FIN, or at
once with RST; a receiver grants 256 KiB and more as its reader consumes.

::

    mux = Mux(client=True)
    stream = mux.open()
    taken = mux.send(stream, data)      # fewer than len(data) when the peer's window is full
    transport.write(mux.take())
    for kind, stream, value in mux.receive(received): ...

A hostile peer costs bounded memory: at most MAX_STREAMS streams, no byte beyond a window, and no more than
MAX_REPLIES bytes of answers that the peer provoked and does not fetch. Anything else is a MuxError, after which the
connection must be dropped.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any

HEADER = struct.Struct(">BBHII")
DATA, WINDOW_UPDATE, PING, GO_AWAY = 0, 1, 2, 3
SYN, ACK, FIN, RST = 1, 2, 4, 8

WINDOW = 256 * 1024
MAX_STREAMS = 256
MAX_REPLIES = 64 * 1024
MAX_ID = 0xFFFFFFFF
# Bulk writers stop above this and go on when it has drained, so that a control call waits for at most this much.
HIGH_WATER = 256 * 1024


class MuxError(Exception):
    """The peer broke the protocol, or a caller did; the connection cannot go on."""


class Event(IntEnum):
    """What ``receive`` reports, and the value that comes with it."""

    OPENED = 0  # the peer opened a stream; None
    DATA = 1  # a memoryview of bytes; call ``consumed`` once they are handled
    FINISHED = 2  # the peer sends no more; None
    RESET = 3  # the stream is gone both ways; None
    WRITABLE = 4  # the send window grew; None
    PONG = 5  # the int given to ``ping``
    GONE_AWAY = 6  # the peer's int code


class Stream:
    """One conversation. Its fields are the multiplexer's, except ``owner``, which belongs to the caller."""

    __slots__ = ("finished", "id", "open", "owed", "owner", "peer_finished", "receive_window", "send_window")

    def __init__(self, stream_id: int) -> None:
        self.id = stream_id
        self.send_window = WINDOW
        self.receive_window = WINDOW
        self.owed = 0  # consumed bytes not yet granted back
        self.finished = False
        self.peer_finished = False
        self.open = True
        self.owner: Any = None


class Mux:
    """One end of a multiplexed connection.

    Args:
        client: whether this end is the host (odd stream ids) or the guest (even ones).
    """

    def __init__(self, *, client: bool) -> None:
        self._client = client
        self._next = 1 if client else 2
        self._streams: dict[int, Stream] = {}
        self._accepted = 0  # open streams that the peer began
        self._out: list[bytes | memoryview] = []
        self.pending = 0  # bytes waiting in ``take``
        self._replies = 0
        self._header = bytearray()
        self._left = 0  # bytes of the present DATA frame still to come
        self._current: Stream | None = None
        self._flags = 0

    # -- sending ----------------------------------------------------------------------------------------------

    def open(self) -> Stream:
        """Begin a stream.

        Raises:
            MuxError: MAX_STREAMS of ours are open, or all stream ids were used.
        """
        if len(self._streams) - self._accepted >= MAX_STREAMS:
            raise MuxError(f"{MAX_STREAMS} streams are open")
        if self._next > MAX_ID:
            raise MuxError("all stream ids were used; connect anew")
        stream = Stream(self._next)
        self._next += 2
        self._streams[stream.id] = stream
        self._put(WINDOW_UPDATE, SYN, stream.id, 0)
        return stream

    def send(self, stream: Stream, data: bytes | memoryview) -> int:
        """Queue as much of ``data`` as the peer's window takes; return how many bytes that was.

        The bytes are not copied when all are taken: the caller must not change them afterwards.
        A stream that was reset swallows what it is given.

        Raises:
            MuxError: the stream was finished by this end.
        """
        if stream.finished:
            raise MuxError(f"stream {stream.id} was finished")
        count = min(len(data), stream.send_window)
        if count and stream.open:
            stream.send_window -= count
            self._put(DATA, 0, stream.id, count, data if count == len(data) else data[:count])
        return count

    def finish(self, stream: Stream) -> None:
        """Say that no more will be sent."""
        if not stream.finished and stream.open:
            stream.finished = True
            self._put(DATA, FIN, stream.id, 0)
            if stream.peer_finished:
                self._forget(stream)

    def reset(self, stream: Stream) -> None:
        """End the stream at once, both ways."""
        if stream.open:
            self._put(DATA, RST, stream.id, 0)
            self._forget(stream)

    def consumed(self, stream: Stream, count: int) -> None:
        """Grant ``count`` bytes back to the peer: its reader has handled them."""
        stream.owed += count
        if stream.owed >= WINDOW // 2 and stream.open and not stream.peer_finished:
            stream.receive_window += stream.owed
            self._reply(WINDOW_UPDATE, 0, stream.id, stream.owed)
            stream.owed = 0

    def ping(self, value: int) -> None:
        """Ask the peer to send ``value`` (32 bits) back."""
        self._put(PING, SYN, 0, value)

    def take(self) -> bytes:
        """Return what must be written to the connection now, and forget it."""
        data = b"".join(self._out)
        self._out.clear()
        self.pending = 0
        self._replies = 0
        return data

    @property
    def streams(self) -> list[Stream]:
        """The open streams."""
        return list(self._streams.values())

    def _put(self, kind: int, flags: int, stream_id: int, length: int, payload: bytes | memoryview = b"") -> None:
        self._out.append(HEADER.pack(0, kind, flags, stream_id, length))
        self.pending += HEADER.size
        if payload:
            self._out.append(payload)
            self.pending += len(payload)

    def _reply(self, kind: int, flags: int, stream_id: int, length: int) -> None:
        """Queue what the peer provoked; ``_frame`` stops a peer that provokes without end."""
        self._replies += HEADER.size
        self._put(kind, flags, stream_id, length)

    def _forget(self, stream: Stream) -> None:
        stream.open = False
        if self._streams.pop(stream.id, None) is not None and self._theirs(stream.id):
            self._accepted -= 1

    def _theirs(self, stream_id: int) -> bool:
        return (stream_id & 1) != self._client

    # -- receiving --------------------------------------------------------------------------------------------

    def receive(self, data: bytes) -> list[tuple[Event, Stream | None, Any]]:
        """Take bytes from the connection and report what they mean, in order.

        Returns:
            (kind, stream, value) for each event; DATA values are memoryviews of ``data``.

        Raises:
            MuxError: the peer broke the protocol; drop the connection.
        """
        events: list[tuple[Event, Stream | None, Any]] = []
        view = memoryview(data)
        position, end = 0, len(data)
        while position < end:
            if self._left:
                count = min(self._left, end - position)
                stream = self._current
                if stream is not None and stream.open:
                    events.append((Event.DATA, stream, view[position : position + count]))
                position += count
                self._left -= count
                if not self._left and self._flags and stream is not None:
                    self._apply_flags(stream, self._flags, events)
                continue
            if self._header or end - position < HEADER.size:
                need = HEADER.size - len(self._header)
                self._header += view[position : position + need]
                position += need
                if len(self._header) < HEADER.size:
                    break
                fields = HEADER.unpack(self._header)
                self._header.clear()
            else:
                fields = HEADER.unpack_from(data, position)
                position += HEADER.size
            self._frame(fields, events)
        return events

    def _frame(self, fields: tuple[int, ...], events: list[tuple[Event, Stream | None, Any]]) -> None:
        version, kind, flags, stream_id, length = fields
        if version or kind > GO_AWAY or flags > 0xF:
            raise MuxError(f"not a frame: version {version}, type {kind}, flags {flags:#x}")
        if self._replies > MAX_REPLIES:
            raise MuxError("the peer asks without end and does not fetch the answers")
        if kind == DATA:
            stream = self._accept(stream_id, events) if flags & SYN else self._streams.get(stream_id)
            if stream is not None:
                if length > stream.receive_window or (length and stream.peer_finished):
                    raise MuxError(f"stream {stream_id}: {length} bytes exceed the window")
                stream.receive_window -= length
            elif length > WINDOW:
                raise MuxError(f"stream {stream_id}: {length} bytes exceed any window")
            self._current, self._left, self._flags = stream, length, flags
            if not length and flags and stream is not None:
                self._apply_flags(stream, flags, events)
        elif kind == WINDOW_UPDATE:
            stream = self._accept(stream_id, events) if flags & SYN else self._streams.get(stream_id)
            if stream is None:  # reset by us with frames still under way
                return
            if length:
                if length > WINDOW - stream.send_window:
                    raise MuxError(f"stream {stream_id}: the window grew over {WINDOW}")
                stream.send_window += length
                events.append((Event.WRITABLE, stream, None))
            self._apply_flags(stream, flags, events)
        elif kind == PING and flags & SYN:
            self._reply(PING, ACK, 0, length)
        elif kind == PING:
            events.append((Event.PONG, None, length))
        else:
            events.append((Event.GONE_AWAY, None, length))

    def _accept(self, stream_id: int, events: list[tuple[Event, Stream | None, Any]]) -> Stream | None:
        if not stream_id or not self._theirs(stream_id) or stream_id in self._streams:
            raise MuxError(f"stream {stream_id} cannot be opened by the peer")
        if self._accepted >= MAX_STREAMS:
            self._reply(DATA, RST, stream_id, 0)
            return None
        stream = Stream(stream_id)
        self._streams[stream_id] = stream
        self._accepted += 1
        self._reply(WINDOW_UPDATE, ACK, stream_id, 0)
        events.append((Event.OPENED, stream, None))
        return stream

    def _apply_flags(self, stream: Stream, flags: int, events: list[tuple[Event, Stream | None, Any]]) -> None:
        if not stream.open:
            return  # reset by us while the frame's bytes were still coming
        if flags & RST:
            self._forget(stream)
            events.append((Event.RESET, stream, None))
        elif flags & FIN and not stream.peer_finished:
            stream.peer_finished = True
            events.append((Event.FINISHED, stream, None))
            if stream.finished:
                self._forget(stream)
