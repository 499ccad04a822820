"""What an agent's doings look like in the ledger. Sans-I/O.

Every change of a row is at most one event, so ledger and store tell the same story. The ids join them: ``line_id`` →
``turn_id`` → ``call_id`` (a model call, also in the gateway's own events) → ``tool_call_id`` → ``command_id`` (also in
the machine's) → ``message_id``. Where OpenTelemetry's conventions for generative AI have a name, it stands beside.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fireclaw.agents.turn import ROLE_PERSON
from fireclaw.store.agents import (
    LineRow,
    LineState,
    MessageRow,
    MessageState,
    StepKind,
    StepRow,
    StepState,
    TurnRow,
    TurnState,
)
from fireclaw.store.handoffs import HandoffRow, HandoffState
from fireclaw.store.memory import MemoryRow

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fireclaw.store.agents import Row

_MESSAGE_TYPES = {
    MessageState.SENT: "irc.said",
    MessageState.LOST: "irc.unconfirmed",
    MessageState.DROPPED: "irc.dropped",
}


_HOST_TOOLS = {"save_memory", "search_memory", "handoff"}


@dataclass(frozen=True)
class Event:
    """One event for the ledger.

    Attributes:
        type: its dotted name.
        data: what happened.
        origin: ``guest`` where the guest claims it.
    """

    type: str
    data: Mapping[str, object] = field(default_factory=dict)
    origin: str = "host"


def heard(line: LineRow) -> Event:
    """Describe a line that came in."""
    return Event(
        "irc.line" if line.role == ROLE_PERSON else "handoff.heard",
        {
            "line_id": line.line_id,
            "sender": line.sender,
            "role": line.role,
            "target": line.target,
            "text": line.text,
            "gen_ai.conversation.id": line.conversation,
        },
    )


def changed(row: Row) -> Event | None:
    """Describe a row's new state; None where it is news to nobody."""
    match row:
        case LineRow():
            refused = row.state is LineState.REFUSED
            return Event("irc.line.refused", {"line_id": row.line_id}) if refused else None
        case TurnRow():
            return _turn(row)
        case StepRow(kind=StepKind.TOOL):
            return _tool(row)
        case StepRow():
            return None if row.state is StepState.STARTED else _model(row)
        case MessageRow():
            return _message(row)
        case MemoryRow():
            return _memory(row)
        case HandoffRow():
            return _handoff(row)


def _turn(row: TurnRow) -> Event:
    ids = {"turn_id": row.turn_id, "line_id": row.line_id, "gen_ai.conversation.id": row.conversation}
    if row.state is TurnState.RUNNING:
        return Event("turn.started", {**ids, "gen_ai.operation.name": "invoke_agent", "gen_ai.agent.id": row.agent_id})
    duration = (row.finished_at or row.started_at) - row.started_at
    return Event("turn.done", {**ids, "outcome": row.state, "answer": row.answer, "duration_s": round(duration, 3)})


def _model(row: StepRow) -> Event:
    """The gateway records the call itself; this says what the agent made of it."""
    ids = {"turn_id": row.turn_id, "step": row.step, "call_id": row.call_id}
    return Event("turn.step", {**ids, "kind": row.kind, "state": row.state, **row.result})


def _tool(row: StepRow) -> Event:
    ids = {
        "turn_id": row.turn_id,
        "step": row.step,
        "call_id": row.request["asked_by"],
        "tool_call_id": row.call_id,
        "gen_ai.operation.name": "execute_tool",
        "gen_ai.tool.name": row.request["name"],
        "gen_ai.tool.call.id": row.request["id"],
    }
    if row.state in {StepState.ASKED, StepState.STARTED}:
        kind = "tool.call" if row.state is StepState.STARTED else "tool.approval.asked"
        arguments = json.dumps(row.request["arguments"])
        return Event(kind, {**ids, "gen_ai.tool.call.arguments": arguments, **row.result})
    # Only what the machine printed is the guest's word; that a call failed or was refused is ours.
    of_machine = row.state is StepState.DONE and row.request["name"] not in _HOST_TOOLS
    origin = "guest" if of_machine else "host"
    result = {("gen_ai.tool.call.result" if key == "output" else key): row.result[key] for key in row.result}
    return Event("tool.result", {**ids, "state": row.state, **result}, origin)


def _message(row: MessageRow) -> Event | None:
    if row.state not in _MESSAGE_TYPES:
        return None
    data = {"message_id": row.message_id, "line_id": row.line_id, "target": row.target, "kind": row.kind}
    return Event(_MESSAGE_TYPES[row.state], {**data, "text": row.text})


def _memory(row: MemoryRow) -> Event:
    data = {
        "gen_ai.operation.name": "update_memory",
        "scope": row.scope,
        "version": row.version,
        "author": row.author,
        "reason": row.reason,
        "content": row.content,
    }
    return Event("memory.saved", data)


def _handoff(row: HandoffRow) -> Event:
    ids = {"handoff_id": row.handoff_id, "line_id": row.line_id, "from": row.sender, "to": row.receiver}
    if row.state is HandoffState.OPEN:
        return Event("handoff.given", {**ids, "depth": row.depth, "task": row.task})
    return Event("handoff.ended", {**ids, "outcome": row.state, "result": row.result})
