"""A world for agents: IRC, a model and machines that outlive the daemon, which can be killed at any commit."""

# ruff: noqa: ARG002 (the fakes take what the ports hand them)

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fireclaw.agents.manager import Agents
from fireclaw.agents.ports import CommandResult
from fireclaw.agents.templates import Templates
from fireclaw.irc.events import Message
from fireclaw.irc.message import Kind, Prefix
from fireclaw.llm.chat import ChatReply, Role, ToolCall
from fireclaw.store.database import Database
from fireclaw.store.hosts import open_host

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Awaitable, Callable, Iterator, Mapping
    from pathlib import Path

    from fireclaw.agents.ports import Delivery, Hands, Record
    from fireclaw.agents.templates import Template
    from fireclaw.llm.chat import ChatRequest

NOW = 1_795_512_600.0  # 09:30:00 UTC
LATE = 0.005  # seconds that the world takes to confirm a line
ALICE, BOB = Prefix("alice", "~a", "localhost"), Prefix("bob", "~b", "localhost")


class KilledError(BaseException):
    """The daemon is no more."""


@dataclass
class World:
    """What outlives a daemon.

    Attributes:
        said: every line that people saw, in order.
        announced: what the operators were told.
        ran: every command that a machine ran.
        asked: every question to the model.
        think: how the model replies.
        work: how a machine runs a command.
        deaf: connections break before the server confirms anything.
        machines: agents that have a machine.
        changed: set whenever something happens.
    """

    said: list[tuple[str, Kind, str]] = field(default_factory=list)
    announced: list[str] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    asked: list[ChatRequest] = field(default_factory=list)
    think: Callable[[ChatRequest], Awaitable[ChatReply]] = field(default_factory=lambda: use_one_tool)
    work: Callable[[str], Awaitable[CommandResult]] = field(default_factory=lambda: echo)
    deaf: bool = False
    machines: set[str] = field(default_factory=set)
    workspaces: set[str] = field(default_factory=set)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds; it is looked at whenever something happens."""
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


class MortalStore(Database):
    """A store whose process is killed at a commit.

    Args:
        path: the file.
        world: hears of every commit.
        kill_at: the number of the fatal commit, from 1; 0 never.
        before: whether the fatal commit is not made any more.
    """

    def __init__(self, path: Path, world: World, kill_at: int = 0, *, before: bool = False) -> None:
        self.commits = 0
        self._world = world
        self.armed = False
        self.is_dead = False
        self._kill_at = kill_at
        self._before = before
        super().__init__(path)
        self._connection.execute("PRAGMA synchronous = OFF")  # the process dies here, never the host

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit, unless killed."""
        if not self.armed:
            with super().transaction() as tx:
                yield tx
            self._world.changed.set()
            return
        self.check()
        with super().transaction() as tx:
            yield tx
            self.commits += 1
            if self._before and self.commits == self._kill_at:
                self._die()
        if self.commits == self._kill_at:
            self._die()
        self._world.changed.set()

    def check(self) -> None:
        """Raise if the process is dead: nothing may happen any more."""
        if self.is_dead:
            raise KilledError

    def _die(self) -> None:
        self.is_dead = True
        self._world.changed.set()
        raise KilledError


@dataclass
class FakeDelivery:
    """The fate of a line in the world."""

    sent_at: asyncio.Future[None]
    confirmed_at: asyncio.Future[None]

    @property
    def sent(self) -> Awaitable[None]:
        """Out."""
        return self.sent_at

    @property
    def confirmed(self) -> Awaitable[None]:
        """Arrived."""
        return self.confirmed_at


class FakeVoice:
    """A nick in the world, held by one daemon."""

    def __init__(self, world: World, store: MortalStore) -> None:
        self._world = world
        self._store = store

    async def say(
        self, target: str, text: str, kind: Kind, *, before_send: Callable[[], None] | None = None
    ) -> Delivery:
        """Say a line; the confirmation comes a little later."""
        loop = asyncio.get_running_loop()
        delivery = FakeDelivery(loop.create_future(), loop.create_future())
        await asyncio.sleep(0)
        self._store.check()
        if before_send:
            before_send()
        self._world.said.append((target, kind, text))
        self._world.changed.set()
        delivery.sent_at.set_result(None)
        loop.call_later(LATE, self._confirm, delivery.confirmed_at)
        return delivery

    def _confirm(self, future: asyncio.Future[None]) -> None:
        if future.done():
            return
        if self._world.deaf:
            future.set_exception(ConnectionError("the connection broke"))
        else:
            future.set_result(None)

    async def quit(self, reason: str) -> None:
        """Go."""
        self._world.said.append(("", Kind.NOTICE, f"QUIT {reason}"))


def output(stdout: bytes, status: int = 0, stderr: bytes = b"") -> CommandResult:
    """Make the result of a command."""
    return CommandResult(status, stdout, stderr, timed_out=False, duration_s=0.1, command_id="command-1")


async def echo(command: str) -> CommandResult:
    """Run a command that prints what it was."""
    await asyncio.sleep(0)
    return output(f"output of {command}".encode())


class FakeHands:
    """A machine in the world."""

    machine_id = "m-1"

    def __init__(self, world: World, store: MortalStore) -> None:
        self._world = world
        self._store = store

    async def run(
        self, script: str, *arguments: str, timeout_s: float, stdin: bytes = b"", keep: int = 0
    ) -> CommandResult:
        """Run a script, which takes a moment; one with arguments is a tool's, and shows up as those."""
        self._store.check()
        self._world.ran.append(" ".join(arguments) or script)
        assert timeout_s > 0
        result = await self._world.work(" ".join(arguments) or script)
        self._store.check()
        return result


async def use_one_tool(request: ChatRequest) -> ChatReply:
    """Think like a model that makes one call and then answers, in two lines, with what it was told."""
    last = request.messages[-1]
    if last.role is Role.USER:
        command = last.text.partition("> ")[2]
        return ChatReply("", (ToolCall("call", "run_command", {"command": command}),))
    question = next(message for message in reversed(request.messages) if message.role is Role.USER)
    asked = question.text.partition("> ")[2]
    return ChatReply(f"the answer to {asked} is:\n{asked}: {last.text}")


class FakeMind:
    """A model in the world, asked by one daemon."""

    model = "fake"

    def __init__(self, world: World, store: MortalStore) -> None:
        self._world = world
        self._store = store

    async def warm(self, request: ChatRequest) -> None:
        """Nothing to warm."""

    async def chat(self, request: ChatRequest) -> ChatReply:
        """Think as the world says."""
        self._store.check()
        self._world.asked.append(request)
        self._world.changed.set()
        await asyncio.sleep(0)
        self._store.check()
        return await self._world.think(request)


class FakeOffice:
    """Gives agents of one daemon what they need."""

    def __init__(self, world: World, store: MortalStore) -> None:
        self._world = world
        self._store = store
        self.ears: dict[str, Callable[[Message], None]] = {}

    async def make_machine(self, agent_id: str, name: str, template: Template) -> Hands:
        """Give the machine."""
        self._store.check()
        self._world.machines.add(name)
        self._world.workspaces.add(name)
        return FakeHands(self._world, self._store)

    async def destroy_machine(self, agent_id: str, name: str, *, keep: bool) -> None:
        """Take it."""
        del agent_id
        self._world.machines.discard(name)
        if not keep:
            self._world.workspaces.discard(name)

    def announce(self, text: str) -> None:
        """Tell the operators."""
        self._store.check()
        self._world.announced.append(text)
        self._world.changed.set()

    async def connect(self, nick: str, on_message: Callable[[Message], None]) -> FakeVoice:
        """Give a voice."""
        self._store.check()
        self.ears[nick] = on_message
        return FakeVoice(self._world, self._store)


def _let_the_dead_rest(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Report what nobody caught, but not that a killed daemon's tasks died."""
    if not isinstance(context.get("exception"), KilledError):
        loop.default_exception_handler(context)


class Daemon:
    """One life of the daemon with its one agent."""

    def __init__(
        self, path: Path, world: World, kill_at: int = 0, *, before: bool = False, templates: Path | None = None
    ) -> None:
        asyncio.get_running_loop().set_exception_handler(_let_the_dead_rest)
        self._world = world
        self.store = MortalStore(path, world, kill_at, before=before)
        self.host = open_host(self.store)
        self.office = FakeOffice(world, self.store)
        self.clock: Callable[[], float] = lambda: NOW
        self.ledger: Record | None = None
        self.models: list[str] = []
        self.agents = Agents(
            self.store,
            self.host,
            Templates.load(templates),
            office=self.office,
            mind=FakeMind(world, self.store),
            record=self.record,
            clock=self.time,
            context_tokens=8192,
            reserved=["overseer"],
            models=lambda: self.models,
        )

    def record(
        self,
        type: str,  # noqa: A002 (the port's name for it)
        data: Mapping[str, object],
        *,
        agent: str | None = None,
        machine: str | None = None,
        origin: str = "host",
    ) -> None:
        """Take an event down where there is a ledger."""
        self.store.check()
        if self.ledger is not None:
            self.ledger(type, data, agent=agent, machine=machine, origin=origin)

    def time(self) -> float:
        """Tell the time."""
        return self.clock()

    def hear(self, sender: Prefix, text: str, target: str = "#agents", kind: Kind = Kind.PRIVMSG) -> None:
        """Let everybody in the channel hear a line."""
        for ear in list(self.office.ears.values()):
            ear(Message(sender, target, text, text, kind))

    async def quiet(self) -> None:
        """Wait until nothing is left to do, or the daemon is dead."""
        await self._world.until(lambda: self.store.is_dead or not self._open_rows())

    def _open_rows(self) -> list[sqlite3.Row]:
        return self.store.query(
            "SELECT 1 FROM turns WHERE state = 'running'"
            " UNION ALL SELECT 1 FROM inbox WHERE state = 'waiting'"
            " UNION ALL SELECT 1 FROM outbox WHERE state IN ('queued', 'sent')"
        )

    async def end(self) -> None:
        """End, killed or not: nothing of it runs on."""
        self.store.armed = False
        mine = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in mine:
            task.cancel()
        await asyncio.gather(*mine, return_exceptions=True)
        self.store.close()
