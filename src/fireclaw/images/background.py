"""Builds in the background: in threads that nobody waits for when the daemon ends.

The event loop's own pool of threads will not do: a build takes minutes, the pool has a handful of threads, and the
end of the loop waits for them. A thread of this module is just dropped with its process; what it had started is
killed by the kernel then (``tool``), and its half-made folder is found by ``prune`` (``shelf``).
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

Result = TypeVar("Result")


async def in_background(work: Callable[[], Result]) -> Result:
    """Run ``work`` in a thread of its own and return its result; a cancelled caller leaves it running."""
    outcome: Future[Result] = Future()
    outcome.set_running_or_notify_cancel()  # from here on it cannot be cancelled, only left alone

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed to the caller
            outcome.set_exception(error)

    threading.Thread(target=run, name="image builder", daemon=True).start()
    return await asyncio.wrap_future(outcome)
