"""A job: long work of the daemon's that clients watch, line by line. It goes on when they leave.

There is one job of a kind at a time. A client that asks for one that runs watches it from its first line.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from fireclaw.daemon.conversation import error_object, internal_error
from fireclaw.errors import FireclawError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    Say = Callable[[str], None]

log = logging.getLogger(__name__)


class Job:
    """Runs ``work`` once, in a task of its own, and keeps what it says.

    Args:
        name: for people and for the log.
        work: gets ``say``, which takes one line and may be called from any thread; what it returns goes into the
            last event, ``{"ready": true, …}``.
    """

    def __init__(self, name: str, work: Callable[[Say], Awaitable[dict[str, Any]]]) -> None:
        self._name = name
        self._events: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run(work), name=f"job {name}")

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return not self._task.done()

    async def follow(self) -> AsyncIterator[dict[str, Any]]:
        """Yield its events from the first: ``{"line": text}`` …, then ``{"ready": true, …}`` or ``{"error": …}``."""
        position = 0
        while True:
            while position == len(self._events):
                await self._news.wait()
            event = self._events[position]
            position += 1
            yield event
            if "line" not in event:
                return

    async def aclose(self) -> None:
        """Cancel it where it still runs, and wait for its end."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self, work: Callable[[Say], Awaitable[dict[str, Any]]]) -> None:
        try:
            self._post({"ready": True} | await work(self._say))
        except FireclawError as error:
            self._post({"error": error_object(error)})
        except asyncio.CancelledError:
            self._post({"error": error_object(FireclawError(f"{self._name} was cut short: the daemon ends"))})
            raise
        except Exception as error:
            log.exception("%s failed", self._name)
            self._post({"error": error_object(internal_error(error))})

    def _say(self, line: str) -> None:
        self._post({"line": line})

    def _post(self, event: dict[str, Any]) -> None:
        # Always by way of the loop, so that lines of any thread and the end keep their order.
        self._loop.call_soon_threadsafe(self._add, event)

    def _add(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        self._news.set()
        self._news = asyncio.Event()
