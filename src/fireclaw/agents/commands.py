"""How a command went, in words for the model. Sans-I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fireclaw.agents import scripts
from fireclaw.agents.files import ToolError
from fireclaw.agents.speech import cut_middle

if TYPE_CHECKING:
    from fireclaw.agents.ports import CommandResult


def describe(result: CommandResult, limit_s: float, limit: int) -> str:
    """Tell how a command went: output first, then what else there is to know.

    Args:
        result: of the command.
        limit_s: the seconds that it had.
        limit: bytes of its output to show, and half as many of its errors.
    """
    parts = [cut_middle(_text(result.stdout), limit)]
    if result.stderr:
        parts.append(f"[stderr]\n{cut_middle(_text(result.stderr), limit // 2)}")
    if result.timed_out:
        parts.append(f"[stopped: the time limit of {limit_s:.0f} s was reached]")
    elif result.status:
        parts.append(f"[exit status {result.status}]")
    return "\n".join(part for part in parts if part) or "[no output]"


def was_cut(result: CommandResult, limit: int) -> bool:
    """Whether ``describe`` leaves something out."""
    return len(_text(result.stdout).encode()) > limit or len(_text(result.stderr).encode()) > limit // 2


def describe_job(handle: str, result: CommandResult, *, cancelled: bool) -> str:
    """Tell how a command in the background stands, from what the script ``CHECK_JOB`` printed.

    Raises:
        ToolError: there is no such command, or the machine printed something else.
    """
    if result.status == scripts.MISSING:
        known = ", ".join(result.stdout.decode(errors="replace").split())
        raise ToolError(f"error: there is no {handle!r}; " + (f"there are: {known}" if known else "there is none"))
    parts = result.stdout.split(b"\n", 2)
    if result.status or len(parts) < 3 or not parts[1].strip().isdigit():
        raise ToolError("error: the machine's answer makes no sense")
    state, size, output = parts[0].decode(errors="replace"), int(parts[1]), _text(parts[2])
    words = {
        "running": "is still running",
        "cancelled": "was cancelled" if cancelled else "was cancelled earlier",
        "lost": "is gone without an exit status: it was killed, or the machine was restarted",
    }
    standing = words.get(state, f"has ended with exit status {state}")
    left = size - len(parts[2])
    where = f"[the first {left} bytes are left out; all is in {scripts.DESK}/{handle}/output]\n" if left > 0 else ""
    return f"{handle} {standing}\n{where}{output}".rstrip()


def _text(data: bytes) -> str:
    return data.decode(errors="replace").rstrip("\n")
