"""What an agent gets from the office: a seat on IRC and hands in its machine."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from fireclaw.agents.ports import CommandResult
from fireclaw.daemon.commands import recorded
from fireclaw.errors import ChannelLostError, IrcError
from fireclaw.irc.client import IrcClient
from fireclaw.irc.events import Message, Ready
from fireclaw.irc.ngircd import AGENTS
from fireclaw.irc.session import Identity
from fireclaw.machines.calls import Exec
from fireclaw.wire.frames import Kind as FrameKind

if TYPE_CHECKING:
    from collections.abc import Callable

    from fireclaw.agents.ports import Delivery
    from fireclaw.irc.client import ServerAddress
    from fireclaw.irc.events import Event
    from fireclaw.irc.message import Kind
    from fireclaw.irc.overseer import Overseer
    from fireclaw.machines.calls import Execution
    from fireclaw.machines.machine import Machine
    from fireclaw.store.ledger import Ledger

log = logging.getLogger(__name__)

_USER: Final = "1000:1000"  # the user "agent" of our images; by number, so that any image will do
_HALF: Final = 32 * 1024  # of a stream's output, that much is kept from its beginning and from its end


class Seat:
    """An agent's nick on IRC (``fireclaw.agents.ports.Voice``).

    Args:
        server: where to.
        nick: the agent's name.
        on_message: called with what people say.
        overseer: frees the nick where a dead connection still holds it.
    """

    def __init__(
        self, server: ServerAddress, nick: str, on_message: Callable[[Message], None], overseer: Overseer | None
    ) -> None:
        self._nick = nick
        self._on_message = on_message
        self._overseer = overseer
        self._freeing: set[asyncio.Task[None]] = set()
        self._client = IrcClient(
            server, Identity(nick, "agent", f"{nick}, an agent of Fireclaw"), handler=self._on_event, channels=[AGENTS]
        )
        self._client.start()

    async def say(
        self, target: str, text: str, kind: Kind, *, before_send: Callable[[], None] | None = None
    ) -> Delivery:
        """Queue a line."""
        return await self._client.say(target, text, kind, before_send=before_send)

    async def wait_ready(self) -> None:
        """Wait until it is connected.

        Raises:
            IrcError: the server refused it for good.
            ConnectionError: it was closed.
        """
        await self._client.wait_ready()

    async def quit(self, reason: str) -> None:
        """Say goodbye and close."""
        for task in self._freeing:
            task.cancel()
        await asyncio.gather(*self._freeing, return_exceptions=True)
        await self._client.quit(reason)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Message):
            self._on_message(event)
        elif isinstance(event, Ready):
            self._client.mode(event.nick, "+B")
            if event.nick != self._nick and self._overseer is not None:
                task = asyncio.create_task(self._free_nick(self._overseer), name=f"free {self._nick}")
                self._freeing.add(task)
                task.add_done_callback(self._freeing.discard)

    async def _free_nick(self, overseer: Overseer) -> None:
        try:
            await overseer.free_nick(self._nick)
        except (IrcError, ConnectionError, TimeoutError) as error:
            log.info("the nick %s is not free yet: %s", self._nick, error)  # the client asks again every minute
        else:
            self._client.regain_nick()


class MachineHands:
    """An agent's machine (``fireclaw.agents.ports.Hands``)."""

    def __init__(self, machine: Machine, ledger: Ledger, agent: str) -> None:
        self._machine = machine
        self._ledger = ledger
        self._agent = agent

    @property
    def machine_id(self) -> str:
        """The machine."""
        return self._machine.row.machine_id

    async def run(self, command: str, *, timeout_s: float) -> CommandResult:
        """Run a shell command as the user ``agent``, with no_new_privs and an empty bounding set."""
        call = Exec(["/bin/sh", "-c", command], user=_USER, confined=True)
        output = {FrameKind.STDOUT: Kept(), FrameKind.STDERR: Kept()}
        with recorded(self._ledger, self.machine_id, call.argv, self._agent) as event:
            execution = await self._machine.start(call)
            try:
                async with asyncio.timeout(timeout_s):
                    event.status = await _collect(execution, output)
            except TimeoutError:
                event.status, event.timed_out = 124, True
            finally:
                execution.abort()  # harmless after the exit
        return CommandResult(
            event.status,
            output[FrameKind.STDOUT].get(),
            output[FrameKind.STDERR].get(),
            event.timed_out,
            event.duration_s,
            event.id,
        )


async def _collect(execution: Execution, output: dict[FrameKind, Kept]) -> int:
    async for kind, data in execution.output():
        output[kind].add(data)
    if execution.exit is None:
        raise ChannelLostError("the machine went away while the command ran")
    if execution.exit.error:
        output[FrameKind.STDERR].add(execution.exit.error.encode())
    return execution.exit.status


class Kept:
    """The head and the tail of a stream of any length: ``half`` bytes of each."""

    def __init__(self, half: int = _HALF) -> None:
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
