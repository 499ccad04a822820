"""What waits to be sent on one IRC session, in the order it may go. Sans-I/O.

Three classes: urgent lines (PONG, registration, QUIT) overtake all and cost nothing; commands go before talk; talk
is bounded: when it overflows, the oldest message that has not begun is dropped and the gap is announced.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from fireclaw.irc.message import Kind, Prefix, format_line
from fireclaw.irc.text import room_for, say_as, split_line
from fireclaw.irc.throttle import TokenBucket

if TYPE_CHECKING:
    from fireclaw.irc.throttle import Rate

T = TypeVar("T")


@dataclass(eq=False)
class Parcel(Generic[T]):
    """One message to say, of one or more lines.

    Attributes:
        target: the one channel or nick.
        kind: how it is said.
        lines: what is left to say.
        owner: whatever the shell needs to know it by.
        has_begun: whether a line of it has been handed out.
    """

    target: str
    kind: Kind
    lines: deque[str]
    owner: T
    has_begun: bool = False


@dataclass(frozen=True)
class Ticket(Generic[T]):
    """The next bytes to write.

    Attributes:
        data: whole lines.
        parcel: the message they belong to, None for commands and notes.
        is_first: the message begins with them.
        is_last: the message ends with them.
    """

    data: bytes
    parcel: Parcel[T] | None = None
    is_first: bool = False
    is_last: bool = False


class SendQueue(Generic[T]):
    """The queue of one session; it outlives a connection."""

    def __init__(self, rate: Rate, limit: int, now: float) -> None:
        """Make an empty queue.

        Args:
            rate: how fast commands and talk may go.
            limit: most lines of talk that wait.
            now: monotonic seconds.
        """
        self._bucket = TokenBucket(rate, now)
        self._limit = limit
        self._urgent: deque[bytes] = deque()
        self._commands: deque[bytes] = deque()
        self._talk: deque[Parcel[T]] = deque()
        self._dropped: dict[str, int] = {}

    @property
    def limit(self) -> int:
        """Most lines of talk that wait."""
        return self._limit

    @property
    def talk_lines(self) -> int:
        """How many lines of talk wait."""
        return sum(len(parcel.lines) for parcel in self._talk)

    @property
    def last(self) -> Parcel[T] | None:
        """The message that was put in last and is not all out."""
        return self._talk[-1] if self._talk else None

    def put_urgent(self, data: bytes) -> None:
        """Queue a line that cannot wait."""
        self._urgent.append(data)

    def put_command(self, data: bytes) -> None:
        """Queue a command."""
        self._commands.append(data)

    def put_talk(self, parcel: Parcel[T]) -> list[Parcel[T]]:
        """Queue a message of at most ``limit`` lines; return those that had to go for it."""
        self._talk.append(parcel)
        dropped = []
        while self.talk_lines > self._limit:
            victim = next(each for each in self._talk if not each.has_begun)
            self._talk.remove(victim)
            self._dropped[victim.target] = self._dropped.get(victim.target, 0) + len(victim.lines)
            dropped.append(victim)
        return dropped

    def take(self, me: Prefix, *, talk: bool, now: float) -> Ticket[T] | None:
        """Hand out the next bytes that may go now.

        Args:
            me: our own prefix, which decides how much fits in a line.
            talk: whether commands and talk may go yet, or only what is urgent.
            now: monotonic seconds.
        """
        if self._urgent:
            return Ticket(self._urgent.popleft())
        if not talk or self.delay(talk=talk, now=now) > 0:
            return None
        ticket = self._take_command() or self._take_note() or self._take_talk(me)
        if ticket is not None:
            self._bucket.pay(len(ticket.data), now)
        return ticket

    def delay(self, *, talk: bool, now: float) -> float:
        """Seconds until :meth:`take` has something; infinite while there is nothing."""
        if self._urgent:
            return 0.0
        if talk and (self._commands or self._talk):
            return self._bucket.delay(now)
        return math.inf

    def drop_connection(self) -> Parcel[T] | None:
        """Forget what was meant for the old connection; return the message that was cut off in the middle."""
        self._urgent.clear()
        self._commands.clear()
        if self._talk and self._talk[0].has_begun:
            return self._talk.popleft()
        return None

    def drop_talk(self) -> list[Parcel[T]]:
        """Empty the talk; return what was in it."""
        dropped = list(self._talk)
        self._talk.clear()
        self._dropped.clear()
        return dropped

    def remove(self, parcel: Parcel[T]) -> None:
        """Take a message out, begun or not."""
        if parcel in self._talk:
            self._talk.remove(parcel)

    def _take_command(self) -> Ticket[T] | None:
        return Ticket(self._commands.popleft()) if self._commands else None

    def _take_note(self) -> Ticket[T] | None:
        """The gap is where the oldest messages were: before the next one to the same target."""
        if not self._talk or self._talk[0].has_begun:
            return None
        head = self._talk[0]
        count = self._dropped.pop(head.target, 0)
        note = f"… {count} lines dropped" if count != 1 else "… 1 line dropped"
        return Ticket(format_line(head.kind.command, head.target, note)) if count else None

    def _take_talk(self, me: Prefix) -> Ticket[T] | None:
        if not self._talk:
            return None
        head = self._talk[0]
        # The room may have shrunk since the message was split: our nick or host may be longer now.
        line, *rest = split_line(head.lines.popleft(), room_for(me, head.kind, head.target))
        head.lines.extendleft(reversed(rest))
        is_first, head.has_begun = not head.has_begun, True
        if not head.lines:
            self._talk.popleft()
        data = format_line(head.kind.command, head.target, say_as(head.kind, line))
        return Ticket(data, head, is_first, is_last=not head.lines)
