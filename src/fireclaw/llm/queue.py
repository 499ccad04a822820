"""Who may call the model next: at most so many at once, agents take turns."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class FairQueue:
    """A semaphore that is fair among agents: one with ten calls does not keep out one with a single call.

    Args:
        limit: how many may be inside at once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running = 0
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # in the order of whose turn it is

    @property
    def running(self) -> int:
        """How many are inside."""
        return self._running

    @property
    def waiting(self) -> int:
        """How many wait."""
        return sum(len(line) for line in self._waiting.values())

    def position(self, who: str) -> int:
        """The place in the line of an agent's first waiting call: 1 is the next one to be let in, 0 is none waits."""
        for place, (other, line) in enumerate(self._waiting.items(), 1):
            if other == who and not all(granted.cancelled() for granted in line):
                return place
        return 0

    @asynccontextmanager
    async def place(self, who: str) -> AsyncIterator[None]:
        """Wait for a place, hold it in the body."""
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(who, deque()).append(granted)
        self._admit()
        try:
            await granted
            yield
        finally:
            if granted.done() and not granted.cancelled():
                self._running -= 1
            self._admit()

    def _admit(self) -> None:
        """Let in whoever is next, one call of one agent at a time."""
        while self._running < self._limit and self._waiting:
            who = next(iter(self._waiting))
            line = self._waiting.pop(who)
            granted = line.popleft()
            if line:
                self._waiting[who] = line  # behind everybody else
            if not granted.cancelled():  # it gave up while it waited
                granted.set_result(None)
                self._running += 1
