"""What can happen to an agent: the events that go into its engine (``fireclaw.agents.engine``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fireclaw.llm.chat import ChatReply
    from fireclaw.store.agents import LineRow
    from fireclaw.store.memory import MemoryRow


@dataclass(frozen=True)
class Heard:
    """Somebody said something to the agent; its id is new."""

    line: LineRow


@dataclass(frozen=True)
class Replied:
    """The model replied."""

    call_id: str
    reply: ChatReply


@dataclass(frozen=True)
class ModelFailed:
    """The model did not reply.

    Attributes:
        call_id: which call.
        reason: why, for people.
        unusable: it did, but with nothing that can be used, as often as it was asked.
    """

    call_id: str
    reason: str
    unusable: bool = False


@dataclass(frozen=True)
class ToolEnded:
    """A tool call ended.

    Attributes:
        call_id: which one.
        result: ``output`` for the model, and what else is known.
        failed: it could not be made; ``output`` says why.
        rows: what it changes on the host; committed together with its end, or not at all.
    """

    call_id: str
    result: Mapping[str, object]
    failed: bool = False
    rows: tuple[MemoryRow, ...] = ()


@dataclass(frozen=True)
class Decided:
    """An operator has said yes or no to a call that waits for it."""

    call_id: str
    approved: bool
    by: str


@dataclass(frozen=True)
class EffectBroke:
    """An effect ended in a way that nobody foresaw."""

    call_id: str
    reason: str


@dataclass(frozen=True)
class Tick:
    """The time of the last ``Wait`` has come."""


@dataclass(frozen=True)
class Dismissed:
    """The agent is being destroyed."""

    by: str


@dataclass(frozen=True)
class Recovered:
    """A new daemon took over; comes first and once."""


Event = Heard | Replied | ModelFailed | ToolEnded | Decided | EffectBroke | Tick | Dismissed | Recovered
