"""A turn as its rows tell it: what was asked, which steps were made, what comes next of them. Sans-I/O.

Everything is derived from the rows, so a turn that was read back from the store after a crash is the same turn.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from fireclaw.llm.chat import ChatMessage, Role, ToolCall
from fireclaw.store.agents import StepKind, StepState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fireclaw.agents.outfit import Outfit
    from fireclaw.llm.chat import ChatReply
    from fireclaw.store.agents import LineRow, StepRow, TurnRow

Group = tuple[ChatMessage, ...]
"""Messages that only make sense together: a call with its results, or a whole earlier turn."""

ROLE_PERSON = "person"
ROLE_HANDOFF = "handoff"  # the line is work that another agent handed over; its text is a JSON object

_NOT_MADE = "[this call was not made]"


@dataclass
class Turn:
    """An agent's work on one line.

    Attributes:
        row: its row, as committed last.
        line: the line that it answers.
        outfit: what it is made with, from its beginning to its end.
        steps: its steps in order, as committed last.
    """

    row: TurnRow
    line: LineRow
    outfit: Outfit
    steps: list[StepRow] = field(default_factory=list)

    @property
    def open_step(self) -> StepRow | None:
        """The step whose effect is on its way, or was when its daemon ended, or that waits for a yes."""
        last = self.steps[-1] if self.steps else None
        return last if last is not None and last.state in {StepState.ASKED, StepState.STARTED} else None

    @property
    def model_steps(self) -> int:
        """How often the model was asked."""
        return sum(step.kind is not StepKind.TOOL for step in self.steps)

    @property
    def wasted(self) -> int:
        """How many replies in a row, the last ones, were of no use."""
        count = 0
        for step in reversed(self.steps):
            if step.kind is StepKind.TOOL or step.state is not StepState.FAILED:
                break
            count += 1
        return count

    @property
    def pending(self) -> list[ToolCall]:
        """The calls of the newest reply that have no step yet."""
        for made, step in enumerate(reversed(self.steps)):
            if step.kind is not StepKind.TOOL:
                return tool_calls_of(step)[made:]
        return []

    def times_made(self, call: ToolCall) -> int:
        """How often this very call was made in this turn."""
        return sum(step.state is not StepState.REFUSED for step in self._like(call))

    def was_denied(self, call: ToolCall) -> bool:
        """Whether the operators were asked about this very call in this turn, and did not say yes."""
        return any("denied_by" in step.result for step in self._like(call))

    def _like(self, call: ToolCall) -> list[StepRow]:
        wanted = call_key(call)
        return [
            step
            for step in self.steps
            if step.kind is StepKind.TOOL
            and (step.request["name"], json.dumps(step.request["arguments"], sort_keys=True)) == wanted
        ]

    def put(self, step: StepRow) -> None:
        """Add a step, or put a newer state of one in its place."""
        self.steps[step.step :] = [step]


def call_key(call: ToolCall) -> tuple[str, str]:
    """Return what two calls that are the same have in common."""
    return call.name, json.dumps(call.arguments, sort_keys=True)


def result_of(reply: ChatReply, calls: Sequence[ToolCall]) -> dict[str, object]:
    """Write a reply down for a step's row, with those of its calls that count."""
    return {
        "text": reply.text,
        "tool_calls": [request_of(call) for call in calls],
        "finish": reply.finish,
        "model": reply.model,
        "input_tokens": reply.usage.input_tokens,
        "output_tokens": reply.usage.output_tokens,
    }


def request_of(call: ToolCall) -> dict[str, object]:
    """Write a call down."""
    return {"id": call.id, "name": call.name, "arguments": dict(call.arguments), "error": call.error}


def tool_calls_of(step: StepRow) -> list[ToolCall]:
    """Read the calls of a model's step."""
    written = cast("Iterable[Mapping[str, str]]", step.result.get("tool_calls", ()))
    return [
        ToolCall(call["id"], call["name"], cast("Mapping[str, object]", call["arguments"]), call.get("error", ""))
        for call in written
    ]


def exchanges(steps: Iterable[StepRow]) -> list[Group]:
    """Derive the conversation between model and tools: each reply that made calls, with a result for every call."""
    groups: list[list[ChatMessage]] = []
    for step in steps:
        if step.kind is StepKind.TOOL:
            groups[-1].append(
                ChatMessage(Role.TOOL, str(step.result.get("output", _NOT_MADE)), tool_call_id=str(step.request["id"]))
            )
        elif calls := tool_calls_of(step):
            groups.append([ChatMessage(Role.ASSISTANT, str(step.result["text"]), tuple(calls))])
    return [_complete(group) for group in groups]


def _complete(group: list[ChatMessage]) -> Group:
    """Give calls that a stop or a time limit left without a result one that says so."""
    results = group[1:]
    missing = group[0].tool_calls[len(results) :]
    return (*group, *(ChatMessage(Role.TOOL, _NOT_MADE, tool_call_id=call.id) for call in missing))


def past_turn(row: TurnRow, line: LineRow, steps: Iterable[StepRow]) -> Group:
    """Derive the messages of a finished turn: question, calls with results, answer."""
    between = (message for group in exchanges(steps) for message in group)
    return (question(line), *between, ChatMessage(Role.ASSISTANT, row.answer))


def question(line: LineRow) -> ChatMessage:
    """Hand over a line of chat, or what another agent wants done, as data."""
    if line.role == ROLE_HANDOFF:
        return ChatMessage(Role.USER, _handed_over(line))
    return ChatMessage(Role.USER, envelope(line.sender, line.text))


def person_of(line: LineRow) -> str:
    """Return the nick of the person for whom a line is worked on, be it through another agent."""
    if line.role == ROLE_HANDOFF:
        record = cast("Mapping[str, str]", json.loads(line.text))
        return record["asked_by"]
    return line.sender


def _handed_over(line: LineRow) -> str:
    """Show a handoff: one line for each of its parts, so that none of them can pass for another."""
    record = cast("Mapping[str, str]", json.loads(line.text))
    parts = (f"{key.replace('_', ' ')}: {_in_one_line(value)}" for key, value in record.items() if value)
    return "\n".join([f"<{line.sender}> [an agent hands you a task; your answer is its result]", *parts])


def _in_one_line(text: str) -> str:
    return text if len(text.splitlines()) <= 1 else json.dumps(text, ensure_ascii=False)


def envelope(sender: str, text: str) -> str:
    """Put what somebody said into a form that its text cannot leave: ``<nick> text``, in one line.

    A nick holds neither ``>`` nor spaces, and a text that could begin a new line could speak for somebody else. The
    channel is not told: a conversation is one channel or one private talk, and the answer goes there whatever the
    text asks for. The form is the one of the examples that small models learn from (``fireclaw.llm.fewshot``).
    """
    return f"<{sender}> {' '.join(text.splitlines())}"
