"""Matches the events of an IRC session with those who wait for one. A part of ``client.py``."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from fireclaw.irc.events import Event


@dataclass(eq=False)
class _Waiter:
    wants: Callable[[Event], bool]
    future: asyncio.Future[Event]


class Answers:
    """Everybody who has asked the server something and waits for its answer."""

    def __init__(self) -> None:
        self._waiters: list[_Waiter] = []

    def __len__(self) -> int:
        return len(self._waiters)

    async def wait(self, wants: Callable[[Event], bool], timeout_s: float) -> Event:
        """Wait for the first event that ``wants`` accepts.

        Raises:
            TimeoutError: none came in time.
            Exception: what :meth:`fail` was given.
        """
        waiter = _Waiter(wants, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter.future
        finally:
            self._waiters.remove(waiter)

    def offer(self, event: Event) -> None:
        """Give an event to those who want it."""
        for waiter in self._waiters:
            if not waiter.future.done() and waiter.wants(event):
                waiter.future.set_result(event)

    def fail(self, error: Exception) -> None:
        """Tell all who wait that no answer will come."""
        for waiter in self._waiters:
            if not waiter.future.done():
                waiter.future.set_exception(error)
