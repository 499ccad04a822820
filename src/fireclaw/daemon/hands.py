"""An agent's hands: scripts that run in its machine as its user (``fireclaw.agents.ports.Hands``)."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Final

from fireclaw.agents.ports import KEPT_BYTES, CommandResult
from fireclaw.daemon.commands import recorded
from fireclaw.errors import ChannelLostError, MachineError
from fireclaw.machines.calls import Exec
from fireclaw.wire.frames import Kind

if TYPE_CHECKING:
    from fireclaw.machines.calls import Execution
    from fireclaw.machines.machine import Machine
    from fireclaw.store.ledger import Ledger

WORKSPACE: Final = "/workspace"
_USER: Final = "1000:1000"  # the user "agent" of our images; by number, so that any image will do
_TRANSCRIPT_BYTES: Final = 4 << 20
_PROBE_SECONDS: Final = 10.0


class MachineHands:
    """An agent's machine, as far as the agent uses it.

    Args:
        machine: the machine.
        ledger: where commands are recorded.
        agent: the agent's name, for the record.
    """

    def __init__(self, machine: Machine, ledger: Ledger, agent: str) -> None:
        self._machine = machine
        self._ledger = ledger
        self._agent = agent
        self._place: str | None = None  # where commands run; empty: in the user's home

    @property
    def machine_id(self) -> str:
        """The machine."""
        return self._machine.row.machine_id

    async def run(
        self, script: str, *arguments: str, timeout_s: float, stdin: bytes = b"", keep: int = KEPT_BYTES
    ) -> CommandResult:
        """Run a shell script as the user ``agent``; see ``fireclaw.agents.ports.Hands``."""
        if self._place is None:
            self._place = await self._find_place()
        argv = ["/bin/sh", "-c", script, *(("sh", *arguments) if arguments else ())]
        call = Exec(argv, cwd=self._place, user=_USER, confined=True, stdin=bool(stdin))
        output = {Kind.STDOUT: Kept(keep // 2), Kind.STDERR: Kept(keep // 2)}
        transcript = Kept(_TRANSCRIPT_BYTES // 2)
        with recorded(self._ledger, self.machine_id, argv, self._agent) as event:
            execution = await self._machine.start(call)
            try:
                async with asyncio.timeout(timeout_s):
                    event.status = await _converse(execution, stdin, output, transcript)
            except TimeoutError:
                event.status, event.timed_out = 124, True
            finally:
                execution.abort()  # harmless after the exit
        return CommandResult(
            event.status,
            output[Kind.STDOUT].get(),
            output[Kind.STDERR].get(),
            event.timed_out,
            event.duration_s,
            event.id,
            transcript.get(),
        )

    async def _find_place(self) -> str:
        """Ask the machine whether it has a workspace that the agent may write to."""
        execution = await self._machine.start(Exec(["test", "-w", WORKSPACE], user=_USER, confined=True))
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                status = await _converse(execution, b"", {}, Kept(0))
        except TimeoutError:
            return ""
        finally:
            execution.abort()
        return "" if status else WORKSPACE


async def _converse(execution: Execution, stdin: bytes, output: dict[Kind, Kept], transcript: Kept) -> int:
    """Feed a command and collect what it prints; return its status."""
    feeding = asyncio.create_task(_feed(execution, stdin), name="stdin of an agent's command")
    try:
        async for kind, data in execution.output():
            transcript.add(data)
            if kind in output:
                output[kind].add(data)
    finally:
        feeding.cancel()
        await asyncio.wait([feeding])
    if execution.exit is None:
        raise ChannelLostError("the machine went away while the command ran")
    if execution.exit.error and Kind.STDERR in output:
        output[Kind.STDERR].add(execution.exit.error.encode())
    return execution.exit.status


async def _feed(execution: Execution, stdin: bytes) -> None:
    if stdin:
        with contextlib.suppress(MachineError):  # it has ended without reading all; its output tells
            await execution.write(stdin)
            await execution.close_stdin()


class Kept:
    """The head and the tail of a stream of any length: ``half`` bytes of each."""

    def __init__(self, half: int) -> None:
        self._half = half
        self._head = bytearray()
        self._tail = bytearray()
        self._dropped = 0

    def add(self, data: bytes) -> None:
        """Take more."""
        room = self._half - len(self._head)
        self._head += data[:room]
        self._tail += data[room:] if room < len(data) else b""
        excess = len(self._tail) - self._half
        if excess > 0:
            del self._tail[:excess]
            self._dropped += excess

    def get(self) -> bytes:
        """Return what was kept."""
        if not self._dropped:
            return bytes(self._head + self._tail)
        return bytes(self._head) + f"\n[... {self._dropped} bytes ...]\n".encode() + bytes(self._tail)
