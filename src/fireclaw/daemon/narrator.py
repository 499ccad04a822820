"""Lines for people about what takes long (building an image, why KVM is not used), to whoever waits for it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

log = logging.getLogger(__name__)


class Narrator:
    """Passes lines on to all who listen at that moment, and to the log. ``say`` may be called from any thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._listeners: list[Callable[[str], None]] = []

    def say(self, line: str) -> None:
        """Tell a line."""
        self._loop.call_soon_threadsafe(self._tell, line)

    def _tell(self, line: str) -> None:
        log.info("%s", line)
        for listener in self._listeners:
            listener(line)

    @contextmanager
    def listen(self, listener: Callable[[str], None]) -> Iterator[None]:
        """Pass lines to ``listener`` inside the block."""
        self._listeners.append(listener)
        try:
            yield
        finally:
            self._listeners.remove(listener)

    @asynccontextmanager
    async def tell(self, note: Callable[[str], Awaitable[None]]) -> AsyncIterator[None]:
        """Pass lines to an asynchronous listener inside the block; all of them are told at its end."""
        lines: asyncio.Queue[str | None] = asyncio.Queue()

        async def pass_on() -> None:
            while (line := await lines.get()) is not None:
                await note(line)

        task = asyncio.create_task(pass_on(), name="narrator")
        try:
            with self.listen(lines.put_nowait):
                yield
            lines.put_nowait(None)
            await task
        finally:
            task.cancel()
            await asyncio.wait([task])
