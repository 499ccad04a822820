"""The fate of one message that was handed to an IRC client.

It carries the outbox rule: a row is ``queued``; ``before_send`` makes it ``sent``, durably, before the first byte
leaves; ``confirmed`` ends it. So a crash at any point repeats nothing that somebody may have seen.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from fireclaw.errors import FireclawError
from fireclaw.irc.message import format_line

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


class DroppedError(FireclawError):
    """A message left a full queue unsaid because newer ones needed the room; people saw how many lines."""

    code = "dropped"


class Delivery:
    """Two stations, ``sent`` and ``confirmed``. Each may be awaited by several, cancelled, or ignored."""

    def __init__(self, before_send: Callable[[], None] | None = None) -> None:
        """Begin as queued.

        Args:
            before_send: called right before the first byte leaves. If it raises, nothing leaves, and both
                stations raise the same.
        """
        loop = asyncio.get_running_loop()
        self._sent: asyncio.Future[None] = loop.create_future()
        self._confirmed: asyncio.Future[None] = loop.create_future()
        self._before_send = before_send

    @property
    def sent(self) -> Awaitable[None]:
        """All of it was given to the kernel, or the connection broke after its first byte.

        Once this is done the message must not be repeated: people may have seen it.

        Raises:
            DroppedError: it was dropped from a full queue, unsaid.
            ConnectionError: the client was closed, or gave up, before its first byte.
        """
        return asyncio.shield(self._sent)

    @property
    def confirmed(self) -> Awaitable[None]:
        """The server has handled all of it: it answered a PING that followed.

        Raises:
            DroppedError: as for ``sent``.
            ConnectionError: the connection broke first; all, a part or nothing of it was seen.
        """
        return asyncio.shield(self._confirmed)

    async def settle(self, timeout_s: float) -> None:
        """Wait until its fate is known, whatever it is, or for that many seconds."""
        await asyncio.wait([self._confirmed], timeout=timeout_s)

    def begin(self) -> None:
        """Its first byte is about to leave.

        Raises:
            Exception: whatever ``before_send`` raises; then the byte must not leave.
        """
        if self._before_send is not None:
            self._before_send()

    def mark_sent(self) -> None:
        """It is out."""
        if not self._sent.done():
            self._sent.set_result(None)

    def mark_confirmed(self) -> None:
        """It has arrived."""
        if not self._confirmed.done():
            self._confirmed.set_result(None)

    def fail(self, error: Exception) -> None:
        """It will come no further than it is."""
        for station in (self._sent, self._confirmed):
            if not station.done():
                station.set_exception(error)
                station.exception()  # marks it as seen: nobody has to await a delivery


class Confirmations:
    """The messages of one connection that are out and wait for a PONG.

    One PING is out at a time: ngircd slows a client down that sends more than three commands at once.
    """

    _MARK = "said"

    def __init__(self) -> None:
        self._serial = 0
        self._waiting: deque[tuple[int, Delivery]] = deque()
        self._ping_is_out = False

    @property
    def last(self) -> Delivery | None:
        """The newest message that waits."""
        return self._waiting[-1][1] if self._waiting else None

    def add(self, delivery: Delivery) -> bytes:
        """Wait for a message that is being written; return the PING to follow it, perhaps none."""
        self._serial += 1
        self._waiting.append((self._serial, delivery))
        return b"" if self._ping_is_out else self._ping()

    def take(self, token: str) -> bytes:
        """Take the token of a PONG; return the next PING, perhaps none."""
        serial = token.removeprefix(self._MARK)
        if serial == token or not serial.isdecimal():
            return b""
        while self._waiting and self._waiting[0][0] <= int(serial):
            _, delivery = self._waiting.popleft()
            delivery.mark_sent()
            delivery.mark_confirmed()
        self._ping_is_out = False
        return self._ping() if self._waiting else b""

    def fail(self, error: Exception) -> None:
        """The connection is lost: people may have seen these, nobody will ever know."""
        for _, delivery in self._waiting:
            delivery.mark_sent()
            delivery.fail(error)
        self._waiting.clear()
        self._ping_is_out = False

    def _ping(self) -> bytes:
        self._ping_is_out = True
        return format_line("PING", f"{self._MARK}{self._serial}")
