"""Which commands need an operator's yes, and what is asked for them. Sans-I/O.

A template names patterns. They are a rail, not a wall: a shell has more ways to write a command than patterns can
name. What keeps the host safe is the machine; what patterns do is stop an agent that means well.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from fireclaw.agents.speech import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fireclaw.store.agents import StepRow

_PIECES: Final = re.compile(r"&&|\|\||[;|&\n(){}`]|\$\(")
_COMMAND_SHOWN: Final = 200  # characters


@dataclass(frozen=True)
class Approval:
    """A question to the operators.

    Attributes:
        code: names it in ``!approve NAME CODE``; another question of the agent has another one.
        call_id: the call that waits.
        command: what is to be run, in one line.
        asked_by: who asked the agent.
        asked_at: seconds since the epoch.
    """

    code: str
    call_id: str
    command: str
    asked_by: str
    asked_at: float


def matching(patterns: Iterable[str], name: str, arguments: Mapping[str, object]) -> str:
    """Return the pattern because of which a call needs a yes, or nothing.

    A pattern (``rm -rf *``, ``git push*``) is compared with the command as a whole and with each of the commands that
    it is made of, white space evened out.

    Args:
        patterns: of the template.
        name: the tool.
        arguments: of the call.
    """
    if name != "run_command":
        return ""
    command = str(arguments.get("command", ""))
    pieces = [" ".join(piece.split()) for piece in (command, *_PIECES.split(command))]
    return next((pattern for pattern in patterns for piece in pieces if fnmatchcase(piece, pattern)), "")


def approval_of(step: StepRow, asked_by: str) -> Approval:
    """Build the question for a step that waits."""
    arguments = step.request["arguments"]
    command = arguments.get("command", "") if isinstance(arguments, dict) else ""
    code = hashlib.sha256(step.call_id.encode()).hexdigest()[:4]
    return Approval(code, step.call_id, one_line(str(command), _COMMAND_SHOWN), asked_by, step.started_at)
