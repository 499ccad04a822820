"""The tools of agents: what the model is offered, whether a call can be made, and how its result is told.

Sans-I/O: a tool is a description and two functions. The one tool so far is ``run_command``, a call into the agent's
machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fireclaw.agents.speech import cut_middle
from fireclaw.llm.chat import Tool

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fireclaw.agents.ports import CommandResult

MAX_OUTPUT = 2000  # bytes of a command's output that the model sees; a small model reads some 70 tokens a second
MAX_COMMAND = 8192  # bytes

RUN_COMMAND = Tool(
    name="run_command",
    description="Run a shell command in your Linux machine and return its output.",
    parameters={
        "type": "object",
        "properties": {"command": {"type": "string", "description": "the command line for /bin/sh"}},
        "required": ["command"],
    },
)

TOOLS: Final[Mapping[str, Tool]] = {RUN_COMMAND.name: RUN_COMMAND}


def refusal(name: str, arguments: Mapping[str, object], offered: tuple[str, ...]) -> str:
    """Say why a call cannot be made, in words for the model; empty where it can."""
    if name not in offered:
        return f"error: there is no tool {name!r}; your tools: {', '.join(offered)}"
    command = arguments.get("command")
    if not isinstance(command, str) or not command.strip():
        return 'error: run_command needs {"command": "..."}'
    if "\0" in command:
        return "error: a command cannot hold a NUL byte"
    if len(command.encode(errors="replace")) > MAX_COMMAND:
        return f"error: the command is longer than {MAX_COMMAND} bytes; write a script file in parts instead"
    return ""


def describe(result: CommandResult, limit_s: float) -> str:
    """Tell the model how a command went: output first, then what else it must know."""
    parts = [cut_middle(result.stdout.decode(errors="replace").rstrip("\n"), MAX_OUTPUT)]
    if result.stderr:
        errors = cut_middle(result.stderr.decode(errors="replace").rstrip("\n"), MAX_OUTPUT // 2)
        parts.append(f"[stderr]\n{errors}")
    if result.timed_out:
        parts.append(f"[stopped: the time limit of {limit_s:.0f} s was reached]")
    elif result.status:
        parts.append(f"[exit status {result.status}]")
    return "\n".join(part for part in parts if part) or "[no output]"
