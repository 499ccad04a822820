"""Handing work from one agent to another: who may hand what to whom, and how the result comes back.

The receiver gets a record (task, context, when it is done), never the sender's scrollback: a line in its inbox with a
conversation of its own. The sender's call ends with the result. Handoff and line are one commit, so are the receiver's
end and the result; whoever crashes in between finds the one or the other.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import TYPE_CHECKING, Final

from fireclaw.agents import audit
from fireclaw.agents.files import ToolError
from fireclaw.agents.memory import HANDOFF_MARK
from fireclaw.agents.turn import ROLE_HANDOFF, person_of
from fireclaw.irc.message import fold
from fireclaw.store.agents import AgentRow, AgentState, LineRow, LineState, Notebook
from fireclaw.store.handoffs import HandoffRow, HandoffRows, HandoffState

if TYPE_CHECKING:
    from collections.abc import Callable

    from fireclaw.agents.agent import Agent
    from fireclaw.agents.ports import Handoff, Record
    from fireclaw.store.agents import AgentRows
    from fireclaw.store.database import Database
    from fireclaw.store.hosts import Host

MAX_DEPTH: Final = 2


class Switchboard:
    """Connects the agents of this host (``fireclaw.agents.ports.Colleagues``).

    Args:
        db: the store.
        host: this daemon.
        agents: the agents' rows.
        find: the living agent of a name; None while it has no seat.
        names: the names of the living agents.
        record: the ledger's ``append``.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        db: Database,
        host: Host,
        agents: AgentRows,
        *,
        find: Callable[[str], Agent | None],
        names: Callable[[], list[str]],
        record: Record,
        clock: Callable[[], float],
    ) -> None:
        self._db = db
        self._host = host
        self._agents = agents
        self._find = find
        self._names = names
        self._record = record
        self._clock = clock
        self._rows = HandoffRows(db)
        self._waiting: dict[str, asyncio.Future[HandoffRow]] = {}

    async def hand_over(self, handoff: Handoff) -> str:
        """See ``fireclaw.agents.ports.Colleagues``."""
        row = self._rows.find(handoff.handoff_id) or self._give(handoff)
        if row.state is HandoffState.OPEN:
            future = self._waiting[row.handoff_id] = asyncio.get_running_loop().create_future()
            try:
                row = await future
            finally:
                self._waiting.pop(row.handoff_id, None)
        if row.state is HandoffState.FAILED:
            raise ToolError(f"error: {row.receiver} did not do it: {row.result}")
        return row.result

    def settled(self, line: LineRow, *, done: bool, words: str) -> HandoffRow | None:
        """Build the row with the result of the handoff that became that line; None if it has one already."""
        row = self._rows.of_line(line.line_id)
        if row is None or row.state is not HandoffState.OPEN:
            return None
        state = HandoffState.DONE if done else HandoffState.FAILED
        return HandoffRow(**{**vars(row), "state": state, "result": words, "finished_at": self._clock()})

    def tell(self, row: HandoffRow) -> None:
        """Let whoever waits for it know the result, which is committed."""
        future = self._waiting.get(row.handoff_id)
        if future is not None and not future.done():
            future.set_result(row)

    def give_up(self, receiver: AgentRow) -> None:
        """Fail what an agent that is gone has not done."""
        for row in self._rows.open():
            if fold(row.receiver, "ascii") == fold(receiver.name, "ascii"):
                values = {"state": HandoffState.FAILED, "result": "it was destroyed", "finished_at": self._clock()}
                failed = HandoffRow(**{**vars(row), **values})
                Notebook(self._db, self._host, receiver.agent_id).commit([failed])
                self._note(failed, receiver.name)
                self.tell(failed)

    def _give(self, handoff: Handoff) -> HandoffRow:
        """Commit a handoff with the line that it becomes, and let the receiver hear it.

        Raises:
            ToolError: it may not be handed over.
        """
        sender, receiver = self._ends_of(handoff)
        came_from = self._rows.of_line(handoff.line.line_id)
        depth = came_from.depth + 1 if came_from else 1
        if depth > MAX_DEPTH:
            raise ToolError("error: this was handed to you through others already; do it yourself")
        if self._waits_for(receiver.name, sender.name):
            raise ToolError(f"error: {receiver.name} waits for you; do it yourself")
        row, line = self._rows_of(handoff, sender, receiver, depth)
        with self._db.transaction():
            Notebook(self._db, self._host, sender.agent_id).commit([row])
            Notebook(self._db, self._host, receiver.agent_id).commit([line])
        self._note(row, sender.name)
        if agent := self._find(receiver.name):
            agent.take(line)
        return self._rows.find(row.handoff_id) or row

    def _note(self, row: HandoffRow, agent: str) -> None:
        if event := audit.changed(row):
            self._record(event.type, event.data, agent=agent)

    def _ends_of(self, handoff: Handoff) -> tuple[AgentRow, AgentRow]:
        sender, receiver = self._agents.find(handoff.sender), self._agents.find(handoff.receiver)
        assert sender is not None, "an agent at work has a row"
        if receiver is None or receiver.state is not AgentState.LIVE:
            others = [name for name in self._names() if name != sender.name]
            known = f"there are: {', '.join(others)}" if others else "there is no other agent; do it yourself"
            raise ToolError(f"error: there is no agent {handoff.receiver!r}; {known}")
        if receiver.agent_id == sender.agent_id:
            raise ToolError("error: you cannot hand something to yourself; do it")
        agent = self._find(receiver.name)
        if agent is not None and agent.failure:
            raise ToolError(f"error: {receiver.name} does not work: {agent.failure}")
        return sender, receiver

    def _waits_for(self, name: str, other: str) -> bool:
        """Whether an agent waits for another one, be it through others."""
        waits = [(fold(row.sender, "ascii"), fold(row.receiver, "ascii")) for row in self._rows.open()]
        reached, ahead = set(), [fold(name, "ascii")]
        while ahead:
            here = ahead.pop()
            reached.add(here)
            ahead += [receiver for sender, receiver in waits if sender == here and receiver not in reached]
        return fold(other, "ascii") in reached

    def _rows_of(
        self, handoff: Handoff, sender: AgentRow, receiver: AgentRow, depth: int
    ) -> tuple[HandoffRow, LineRow]:
        asked, now = handoff.line, self._clock()
        line_id = hashlib.sha256(f"handoff\n{handoff.handoff_id}".encode()).hexdigest()[:16]
        record = {
            "asked_by": person_of(asked),
            "task": handoff.task,
            "context": handoff.context,
            "done_when": handoff.done_when,
        }
        row = HandoffRow(
            handoff_id=handoff.handoff_id,
            line_id=line_id,
            sender=sender.name,
            receiver=receiver.name,
            depth=depth,
            task=handoff.task,
            context=handoff.context,
            done_when=handoff.done_when,
            state=HandoffState.OPEN,
            result="",
            created_at=now,
        )
        line = LineRow(
            line_id=line_id,
            agent_id=receiver.agent_id,
            sender=sender.name,
            role=ROLE_HANDOFF,
            target=asked.target,
            conversation=f"{asked.conversation.partition(HANDOFF_MARK)[0]}{HANDOFF_MARK}{line_id}",
            text=json.dumps(record, ensure_ascii=False),
            state=LineState.WAITING,
            received_at=now,
        )
        return row, line
