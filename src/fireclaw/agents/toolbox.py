"""Makes the calls of an agent's tools: in its machine, in its memory, to its colleagues.

A tool is a method here and a row of the table in ``fireclaw.agents.tools``. What a tool changes on the host it does not
write: it returns the rows, and they are committed together with the end of the call. So such a call has happened
exactly when its step is done.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from fireclaw.agents import scripts
from fireclaw.agents.commands import describe, describe_job, was_cut
from fireclaw.agents.events import ToolEnded
from fireclaw.agents.files import (
    MAX_EDITED,
    MAX_ENTRIES,
    MAX_MATCHES,
    ToolError,
    check_status,
    edited,
    parse_read,
    show_content,
    show_listing,
    show_matches,
)
from fireclaw.agents.ports import KEPT_BYTES, Handoff
from fireclaw.agents.speech import cut_middle
from fireclaw.agents.tools import TOOLS, Arguments, check
from fireclaw.errors import FireclawError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from fireclaw.agents.hands import LateHands
    from fireclaw.agents.memory import Memory
    from fireclaw.agents.ports import Colleagues, CommandResult
    from fireclaw.agents.turn import Turn
    from fireclaw.store.agents import StepRow
    from fireclaw.store.memory import MemoryRow

FILE_SECONDS: Final = 30.0
MAX_WAIT: Final = 60  # seconds that one look at a background command may wait for its end
MAX_DEPTH_OF_LISTING: Final = 8
HANDOFF_SECONDS: Final = 1800.0
_MATCHES_KEPT: Final = 1 << 20  # bytes; a line of a file may be long


@dataclass(frozen=True)
class Call:
    """A call to be made.

    Attributes:
        step: its step.
        turn: the turn that it belongs to.
        arguments: checked.
    """

    step: StepRow
    turn: Turn
    arguments: Arguments

    @property
    def limit(self) -> int:
        """Bytes of output that the model is to see."""
        return self.turn.outfit.output_bytes


@dataclass(frozen=True)
class Outcome:
    """What a tool has to say.

    Attributes:
        output: for the model.
        known: what else goes into the record.
        rows: to be committed with the end of the call.
    """

    output: str
    known: Mapping[str, object] = field(default_factory=dict)
    rows: tuple[MemoryRow, ...] = ()


class Toolbox:
    """An agent's tools at work.

    Args:
        name: the agent's.
        hands: its machine.
        memory: what it remembers.
        colleagues: the other agents.
    """

    def __init__(self, name: str, hands: LateHands, memory: Memory, colleagues: Colleagues) -> None:
        self._name = name
        self._hands = hands
        self._memory = memory
        self._colleagues = colleagues
        self._tools: Mapping[str, Callable[[Call], Awaitable[Outcome]]] = {
            "run_command": self._run_command,
            "check_command": self._check_command,
            "read_file": self._read_file,
            "write_file": self._write_file,
            "edit_file": self._edit_file,
            "list_files": self._list_files,
            "search_files": self._search_files,
            "save_memory": self._save_memory,
            "search_memory": self._search_memory,
            "handoff": self._handoff,
        }

    async def use(self, step: StepRow, turn: Turn) -> ToolEnded:
        """Make a call that the engine let pass, and tell how it went."""
        name, arguments = step.request["name"], step.request["arguments"]
        assert isinstance(name, str), "the engine wrote it"
        assert isinstance(arguments, dict), "the engine refuses other calls"
        checked = check(TOOLS[name], arguments)
        assert isinstance(checked, Arguments), "the engine refuses other calls"
        try:
            outcome = await self._tools[name](Call(step, turn, checked))
        except FireclawError as error:
            text = error.message if error.code in {"tool", "memory"} else f"error: {error}"
            return ToolEnded(step.call_id, {"output": text, "error": error.code}, failed=True)
        return ToolEnded(step.call_id, {"output": outcome.output, **outcome.known}, rows=outcome.rows)

    # Commands

    async def _run_command(self, call: Call) -> Outcome:
        command, limits = call.arguments.text("command"), call.turn.outfit.limits
        if call.arguments.flag("background"):
            return await self._start_job(call, command)
        limit_s = min(limits.command_seconds, call.arguments.number("timeout_s", limits.command_seconds))
        result = await self._hands.run(command, timeout_s=limit_s)
        output = describe(result, limit_s, call.limit)
        if was_cut(result, call.limit):
            output += await self._keep_whole(call, result)
        known = {
            "command_id": result.command_id,
            "status": result.status,
            "timed_out": result.timed_out,
            "duration_s": round(result.duration_s, 3),
        }
        return Outcome(output, known)

    async def _keep_whole(self, call: Call, result: CommandResult) -> str:
        """Put an output that was too long to show where the agent can read it; return a note about that."""
        name = f"output-{hashlib.sha256(call.step.call_id.encode()).hexdigest()[:6]}"
        whole = result.transcript or result.stdout + result.stderr
        try:
            kept = await self._hands.run(scripts.KEEP_OUTPUT, name, timeout_s=FILE_SECONDS, stdin=whole)
            check_status(name, kept)
        except FireclawError as error:
            return f"\n[the whole output could not be kept: {error.message}]"
        return f"\n[the whole output, {len(whole)} bytes, is in {scripts.DESK}/{name}]"

    async def _start_job(self, call: Call, command: str) -> Outcome:
        if "timeout_s" in call.arguments.values:
            raise ToolError("error: a background command has no timeout_s; end it with check_command and cancel")
        result = await self._hands.run(scripts.START_JOB, command, timeout_s=FILE_SECONDS)
        check_status(scripts.DESK, result)
        handle = result.stdout.decode(errors="replace").strip()
        look = f'check_command {{"handle": "{handle}"}} looks at it' if _has(call, "check_command") else ""
        where = f"its output goes to {scripts.DESK}/{handle}/output"
        return Outcome("; ".join(filter(None, [f"started in the background as {handle}", look, where])))

    async def _check_command(self, call: Call) -> Outcome:
        handle, cancelled = call.arguments.text("handle").strip(), call.arguments.flag("cancel")
        if not re.fullmatch(r"job-\d{1,3}", handle):
            raise ToolError(f'error: {handle!r} is no handle; a handle is what run_command gave, e.g. "job-1"')
        wait = min(MAX_WAIT, call.arguments.number("wait_s", 0))
        how = "cancel" if cancelled else "look"
        result = await self._hands.run(
            scripts.CHECK_JOB, handle, str(wait), how, str(call.limit), timeout_s=FILE_SECONDS + wait
        )
        return Outcome(describe_job(handle, result, cancelled=cancelled))

    # Files

    async def _read_file(self, call: Call) -> Outcome:
        path, start = call.arguments.text("path"), call.arguments.number("start", 1)
        count = call.arguments.number("lines", 0) or None
        result = await self._script(path, scripts.READ, str(start), str(call.limit + 1))
        return Outcome(show_content(path, parse_read(result), start, count, call.limit))

    async def _write_file(self, call: Call) -> Outcome:
        path, content = call.arguments.text("path"), call.arguments.text("content")
        append = call.arguments.flag("append")
        data = content.encode(errors="replace")
        result = await self._write(path, "append" if append else "replace", data)
        size = result.stdout.decode(errors="replace").strip() if append else len(data)
        return Outcome(f"{'added to' if append else 'wrote'} {path}; it has {size} bytes now")

    async def _edit_file(self, call: Call) -> Outcome:
        path, old, new = (call.arguments.text(name) for name in ("path", "old", "new"))
        result = await self._script(path, scripts.READ_WHOLE, str(MAX_EDITED + 1), keep=4 * MAX_EDITED)
        if len(result.stdout) > MAX_EDITED:
            raise ToolError(f"error: {path!r} is larger than {MAX_EDITED} bytes; change it with a command, e.g. sed")
        data, told = edited(path, result.stdout, old, new, everywhere=call.arguments.flag("all"))
        await self._write(path, "replace", data)
        return Outcome(told)

    async def _list_files(self, call: Call) -> Outcome:
        path = call.arguments.text("path") or "."
        depth = min(MAX_DEPTH_OF_LISTING, call.arguments.number("depth", 1))
        return Outcome(show_listing(await self._script(path, scripts.LIST, str(depth), str(MAX_ENTRIES)), call.limit))

    async def _search_files(self, call: Call) -> Outcome:
        path, names = call.arguments.text("path") or ".", call.arguments.text("files") or "*"
        pattern, limit_s = call.arguments.text("pattern"), call.turn.outfit.limits.command_seconds
        result = await self._hands.run(
            scripts.SEARCH, path, pattern, names, str(MAX_MATCHES), timeout_s=limit_s, keep=_MATCHES_KEPT
        )
        if not (result.timed_out and result.stdout):
            check_status(path, result)
        note = f"\n[stopped: the time limit of {limit_s} s was reached]" if result.timed_out else ""
        return Outcome(show_matches(result, call.limit) + note)

    async def _write(self, path: str, how: str, data: bytes) -> CommandResult:
        return await self._script(path, scripts.WRITE, how, secrets.token_hex(4), stdin=data)

    async def _script(
        self, path: str, script: str, *more: str, stdin: bytes = b"", keep: int = KEPT_BYTES
    ) -> CommandResult:
        """Run a script on a path.

        Raises:
            ToolError: it could not do it; the message is for the model.
            MachineError: the machine could not.
        """
        result = await self._hands.run(script, path, *more, timeout_s=FILE_SECONDS, stdin=stdin, keep=keep)
        check_status(path, result)
        return result

    # Memory

    async def _save_memory(self, call: Call) -> Outcome:
        line = call.turn.line
        row = self._memory.saved(
            line.conversation,
            call.arguments.text("text"),
            call.arguments.text("replaces"),
            author=self._name,
            reason=f"asked by {line.sender} ({call.step.call_id})",
        )
        return Outcome(f"saved; your memory has {len(row.content)} characters now", rows=(row,))

    async def _search_memory(self, call: Call) -> Outcome:
        return Outcome(self._memory.found(call.turn.row.conversation, call.arguments.text("query")))

    # Colleagues

    async def _handoff(self, call: Call) -> Outcome:
        handoff = Handoff(
            handoff_id=call.step.call_id,
            sender=self._name,
            line=call.turn.line,
            receiver=call.arguments.text("to").strip(),
            task=call.arguments.text("task"),
            context=call.arguments.text("context"),
            done_when=call.arguments.text("done_when"),
        )
        try:
            async with asyncio.timeout(HANDOFF_SECONDS):
                result = await self._colleagues.hand_over(handoff)
        except TimeoutError:
            raise ToolError(
                f"error: {handoff.receiver} has no result after {HANDOFF_SECONDS:.0f} s; it may still be at work"
            ) from None
        return Outcome(f"[result from {handoff.receiver}]\n{cut_middle(result, call.limit)}")


def _has(call: Call, tool: str) -> bool:
    return tool in call.turn.outfit.names
