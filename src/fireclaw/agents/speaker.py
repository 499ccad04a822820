"""The mouth of one agent: takes the lines of its outbox to its voice, one after the other.

The rule of the outbox: a line is ``sent`` in the store right before its first byte goes out, and ``confirmed`` when the
server has handled it. A ``queued`` line was never seen by anybody, so whoever finds it says it. A ``sent`` one may have
been seen, so nobody ever says it again; whoever finds it unconfirmed, after a crash or a lost connection, says once
that the end may be missing.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fireclaw.agents.engine import missing_end
from fireclaw.irc.delivery import DroppedError
from fireclaw.irc.message import Kind
from fireclaw.store.agents import MessageKind, MessageState

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from fireclaw.agents.ports import Delivery, Voice
    from fireclaw.store.agents import MessageRow, Notebook, Row

log = logging.getLogger(__name__)

# Agents converse in PRIVMSG; what is only about their state goes as NOTICE, which nobody answers.
KINDS = {MessageKind.ANSWER: Kind.PRIVMSG, MessageKind.ACK: Kind.NOTICE, MessageKind.SIGN: Kind.ACTION}
CONFIRMATION_S = 1.0


class Speaker:
    """Says what stands in the outbox.

    ::

        speaker = Speaker("worker", notebook, save, clock)
        speaker.recover()          # once, before anything is said: what became of the last daemon's lines
        speaker.start(voice)
        speaker.wake()             # there is something new
        await speaker.drain(2.0)
        await speaker.aclose()

    Args:
        name: the agent's, for task names and the log.
        notebook: the agent's rows, to be read.
        save: commits rows and records them; raises if that cannot be.
        clock: seconds since the epoch.
    """

    def __init__(
        self, name: str, notebook: Notebook, save: Callable[[list[Row]], None], clock: Callable[[], float]
    ) -> None:
        self._name = name
        self._notebook = notebook
        self._save = save
        self._clock = clock
        self._news = asyncio.Event()
        self._idle = asyncio.Event()
        self._speaking: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def recover(self) -> None:
        """Settle what an earlier daemon left."""
        stale = [row for row in self._notebook.messages(MessageState.QUEUED) if row.kind is MessageKind.SIGN]
        dropped: list[Row] = [replace(row, state=MessageState.DROPPED) for row in stale]
        unconfirmed = self._notebook.messages(MessageState.SENT)
        self._save([*dropped, *self._lost(unconfirmed, "I was restarted")])

    def start(self, voice: Voice) -> None:
        """Begin to speak."""
        self._speaking = self._own(self._speak(voice), "speaker")

    def wake(self) -> None:
        """Look into the outbox again."""
        self._idle.clear()
        self._news.set()

    async def drain(self, seconds: float) -> None:
        """Wait until everything is said, but no longer than that."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            log.info("%s leaves with lines unsaid", self._name)

    async def aclose(self) -> None:
        """Stop speaking; what is not said stays in the outbox, what is said has a moment to be confirmed."""
        if self._speaking is not None:
            self._speaking.cancel()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=CONFIRMATION_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    async def _speak(self, voice: Voice) -> None:
        try:
            while True:
                self._news.clear()
                for row in self._notebook.messages(MessageState.QUEUED):
                    await self._say(voice, row)
                if not self._news.is_set():
                    self._idle.set()
                await self._news.wait()
        except ConnectionError as error:
            log.warning("%s has lost its voice: %s", self._name, error)

    async def _say(self, voice: Voice, row: MessageRow) -> None:
        sent = replace(row, state=MessageState.SENT)
        delivery = await voice.say(row.target, row.text, KINDS[row.kind], before_send=lambda: self._save([sent]))
        try:
            await delivery.sent
        except DroppedError as error:
            log.warning("%s was not heard: %s", self._name, error)
            self._save(self._lost([row], "too much was waiting to be said"))
            return
        self._own(self._confirm(sent, delivery), "confirmation")

    async def _confirm(self, row: MessageRow, delivery: Delivery) -> None:
        try:
            await delivery.confirmed
        except (ConnectionError, DroppedError):
            self._save(self._lost([row], "the connection broke"))
            self.wake()
        else:
            self._save([replace(row, state=MessageState.CONFIRMED)])

    def _own(self, work: Coroutine[None, None, None], what: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"{what} of {self._name}")
        self._tasks.add(task)
        task.add_done_callback(self._reap)
        return task

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("%s falls silent: %s", self._name, error, exc_info=error)

    def _lost(self, rows: Iterable[MessageRow], reason: str) -> list[Row]:
        """Give lines up, and queue the news of it for each line that they were an answer to."""
        now = self._clock()
        when = datetime.fromtimestamp(now, UTC).strftime("%H:%M:%S UTC")
        lost = [replace(row, state=MessageState.LOST) for row in rows]
        answered = {row.line_id: row for row in lost if row.kind is MessageKind.ANSWER}
        news = [
            missing_end(self._notebook.line(line_id), self._notebook.epoch, f"{reason} at {when}", row.agent_id, now)
            for line_id, row in answered.items()
        ]
        return [*lost, *news]
