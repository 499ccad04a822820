"""An agent's hands before it has any: the machine is made in the background, or when it is first needed."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from fireclaw.agents.ports import KEPT_BYTES
from fireclaw.errors import ChannelLostError, VmmError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fireclaw.agents.ports import CommandResult, Hands

log = logging.getLogger(__name__)


class LateHands:
    """Hands that come when they are there.

    ::

        hands = LateHands("worker", make)
        hands.warm()                          # begins now; a failure is logged, and tried again when needed
        result = await hands.run("uname -a", timeout_s=120)
        await hands.aclose()                  # the machine stays; only the waiting for it ends

    Args:
        name: the agent's, for the log.
        make: makes the machine, or finds the living one.
    """

    def __init__(self, name: str, make: Callable[[], Awaitable[Hands]]) -> None:
        self._name = name
        self._make = make
        self._making: asyncio.Task[Hands] | None = None

    @property
    def machine_id(self) -> str | None:
        """The machine, once there is one."""
        task = self._making
        there = task is not None and task.done() and not task.cancelled() and task.exception() is None
        return task.result().machine_id if task is not None and there else None

    def warm(self) -> None:
        """Begin to make the machine if there is none and none is on its way."""
        if self._making is None or (self._making.done() and self.machine_id is None):
            self._making = asyncio.create_task(self._made(), name=f"machine of {self._name}")
            self._making.add_done_callback(self._log_failure)

    async def run(
        self, script: str, *arguments: str, timeout_s: float, stdin: bytes = b"", keep: int = KEPT_BYTES
    ) -> CommandResult:
        """Run a script in the machine, which is waited for; see ``fireclaw.agents.ports.Hands``.

        Raises:
            FireclawError: there is no machine, or it could not do it. A lost one is made anew by the next call.
        """
        self.warm()
        assert self._making is not None, "warm() began it"
        making = self._making
        hands = await asyncio.shield(making)
        try:
            return await hands.run(script, *arguments, timeout_s=timeout_s, stdin=stdin, keep=keep)
        except (ChannelLostError, VmmError) as error:
            if self._making is making:
                self._making = None
            raise ChannelLostError(
                f"the machine was lost with all but its workspace: {error.message}",
                hint="the next command gets a new one",
            ) from error

    async def aclose(self) -> None:
        """Stop waiting for a machine."""
        if self._making is not None:
            self._making.cancel()
            await asyncio.wait([self._making])

    async def _made(self) -> Hands:
        return await self._make()

    def _log_failure(self, task: asyncio.Task[Hands]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.warning("%s has no machine: %s", self._name, error)
