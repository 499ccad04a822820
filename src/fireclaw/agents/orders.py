"""What an engine wants done: the commands that come out of it, in the order in which they are to be carried out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fireclaw.agents.turn import Turn
    from fireclaw.store.agents import LineRow, MessageRow, StepRow, TurnRow
    from fireclaw.store.memory import MemoryRow


@dataclass(frozen=True)
class Save:
    """Commit this row."""

    row: LineRow | TurnRow | StepRow | MemoryRow


@dataclass(frozen=True)
class Settle:
    """Commit the end of work that was handed over.

    Attributes:
        line: the line that it was.
        done: whether it was done.
        words: the result, or why there is none.
    """

    line: LineRow
    done: bool
    words: str


@dataclass(frozen=True)
class Say:
    """Commit this line to the outbox; it is said after the commit."""

    row: MessageRow


@dataclass(frozen=True)
class AskModel:
    """Ask the model, with tools on offer unless the step is final."""

    step: StepRow
    turn: Turn


@dataclass(frozen=True)
class CallTool:
    """Make the call that the step's request describes."""

    step: StepRow
    turn: Turn


@dataclass(frozen=True)
class AskApproval:
    """Ask the operators about the call that the step's request describes; ``Decided`` may come."""

    step: StepRow
    turn: Turn


@dataclass(frozen=True)
class Drop:
    """Cancel the effect on its way; its result is not wanted any more."""


@dataclass(frozen=True)
class Wait:
    """Send a ``Tick`` at this time (seconds since the epoch), or none."""

    until: float | None


Command = Save | Settle | Say | AskModel | CallTool | AskApproval | Drop | Wait
