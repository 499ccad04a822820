"""All agents of this host: invoked, destroyed, brought back after a restart.

The store is the truth: an agent is a row before it has a seat on IRC or a machine, and the row goes after both are
gone, so a daemon that ends in the middle leaves something that ``recover`` can finish in either direction.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fireclaw.agents import audit
from fireclaw.agents.agent import Agent
from fireclaw.agents.handoff import Switchboard
from fireclaw.agents.hands import LateHands
from fireclaw.agents.memory import Memory
from fireclaw.agents.outfit import Outfit
from fireclaw.agents.templates import MachineStart
from fireclaw.agents.toolbox import Toolbox
from fireclaw.errors import FireclawError, InvalidError, NotFoundError
from fireclaw.irc.message import fold
from fireclaw.store.agents import AgentRow, AgentRows, AgentState, Notebook, Settings
from fireclaw.store.memory import MemoryRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from fireclaw.agents.approvals import Approval
    from fireclaw.agents.ports import Hands, Mind, Office, Record, Voice
    from fireclaw.agents.templates import Template, Templates
    from fireclaw.store.database import Database
    from fireclaw.store.hosts import Host
    from fireclaw.store.memory import MemoryRow

log = logging.getLogger(__name__)

MAX_NAME = 24  # NICKLEN of the managed server
_MAX_MODEL = 200
_NAME = re.compile(rf"[A-Za-z][A-Za-z0-9_-]{{0,{MAX_NAME - 1}}}")


@dataclass(frozen=True)
class AgentInfo:
    """An agent as people see it.

    Attributes:
        agent_id: never used again.
        name: its nick.
        template: what it is made of.
        model: what it thinks with.
        state: ``idle``, ``working``, or ``failed: …``.
        waiting: lines that wait for their turn.
        machine: the id of its machine, or None while it has none.
        invoked_by: who asked for it.
    """

    agent_id: str
    name: str
    template: str
    model: str
    state: str
    waiting: int
    machine: str | None
    invoked_by: str


@dataclass
class _Seat:
    """A living agent with what it needs to be taken down again."""

    agent: Agent
    hands: LateHands
    voice: Voice


class Agents:
    """The agents of this host.

    ::

        agents = Agents(db, host, templates, office=…, mind=gateway, record=ledger.append, …)
        await agents.recover()
        info = await agents.invoke("worker", None, by="alice")
        agents.reload("worker", by="alice", model="ollama:qwen2.5")
        agents.memory("worker").text("")
        await agents.destroy("worker", by="alice")
        await agents.aclose("restarting")

    Args:
        db: the store.
        host: this daemon.
        templates: what can be invoked.
        office: makes machines and connections.
        mind: the way to models.
        record: the ledger's ``append``.
        clock: seconds since the epoch.
        context_tokens: what the model can read and write at once.
        reserved: nicks that no agent may have; agents do not listen to them.
        models: the names of the models that can be asked now, in the order in which equals are to be taken.
    """

    def __init__(
        self,
        db: Database,
        host: Host,
        templates: Templates,
        *,
        office: Office,
        mind: Mind,
        record: Record,
        clock: Callable[[], float],
        context_tokens: int,
        reserved: Iterable[str] = (),
        models: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._db = db
        self._host = host
        self._templates = templates
        self._office = office
        self._mind = mind
        self._record = record
        self._clock = clock
        self._context_tokens = context_tokens
        self._rows = AgentRows(db, host)
        self._reserved = {fold(name, "ascii") for name in reserved}
        self._ours = set(self._reserved)
        self._models = models
        self._memories = MemoryRows(db)
        self._seats: dict[str, _Seat] = {}
        self._living: dict[str, Agent] = {}  # from before they have a seat: they can be handed something at once
        self._switchboard = Switchboard(
            db,
            host,
            self._rows,
            find=lambda name: self._living.get(fold(name, "ascii")),
            names=lambda: [agent.row.name for agent in self._living.values()],
            record=record,
            clock=clock,
        )

    async def recover(self) -> None:
        """Bring back the agents of the last daemon, and finish the destruction of those that were on their way out.

        One that cannot be brought back (its template is gone, say) is left as it is, and logged.
        """
        for row in self._rows.claim():
            self._ours.add(fold(row.name, "ascii"))
            try:
                if row.state is AgentState.LIVE:
                    await self._seat(row, self._templates.get(row.template))
                else:
                    await self._take_apart(row, keep=row.state is AgentState.RETIRING)
            except FireclawError as error:
                log.error("cannot bring back the agent %s: %s", row.name, error)  # noqa: TRY400 (it is the reason)

    async def invoke(
        self, template: str, name: str | None, by: str, *, model: str = "", persona: str = ""
    ) -> AgentInfo:
        """Make an agent.

        Args:
            template: the template's name.
            name: the agent's nick; None: the template's name, with a number where that is taken.
            by: who asks for it.
            model: the model that it has, over the template's choice.
            persona: the template whose persona it has, over its own.

        Raises:
            NotFoundError: there is no such template.
            InvalidError: the name cannot be a nick of an agent.
            ConflictError: there is an agent of that name.
            FireclawError: it cannot be connected; it is gone again.
        """
        recipe = self._templates.get(template)
        settings = self._checked_settings(Settings(model, persona))
        row = AgentRow(
            agent_id=str(uuid.uuid4()),
            name=self._free_name(recipe.name) if name is None else self._checked(name),
            template=recipe.name,
            state=AgentState.LIVE,
            machine_id=None,
            invoked_by=by,
            host_id=self._host.host_id,
            epoch=self._host.epoch,
            created_at=self._clock(),
        )
        self._rows.add(row)
        data = {"gen_ai.agent.id": row.agent_id, "template": row.template, "by": by}
        self._record("agent.invoked", data, agent=row.name)
        try:
            self._rows.set_settings(row.agent_id, settings)
            await self._seat(row, recipe)
        except BaseException:
            await self._take_apart(row, keep=True)  # what the last agent of its name had
            raise
        return self._info(self._seats[fold(row.name, "ascii")])

    async def destroy(self, name: str, by: str, *, keep: bool = False) -> None:
        """Destroy an agent with its machine and everything it was told.

        Args:
            name: the agent's.
            by: who wants it.
            keep: its memory and its workspace stay, for an agent that is invoked under its name again.

        Raises:
            NotFoundError: there is no agent of that name.
        """
        seat = self._find(name)
        row = seat.agent.row
        del self._seats[fold(row.name, "ascii")]
        self._rows.set_state(row.agent_id, AgentState.RETIRING if keep else AgentState.DESTROYING)
        data = {"gen_ai.agent.id": row.agent_id, "by": by, "kept": keep}
        self._record("agent.destroyed", data, agent=row.name)
        await seat.agent.dismiss(by)
        await seat.agent.aclose()
        await seat.voice.quit(f"destroyed, as {by} wants it")
        await self._take_apart(row, keep=keep)

    def reload(self, name: str, by: str, *, model: str | None = None, persona: str | None = None) -> AgentInfo:
        """Give an agent what its template says now, and what is set here; its next turn is made with that.

        The conversation goes on, the machine stays as it is, and a turn on its way ends with what it began with.

        Args:
            name: the agent's.
            by: who wants it.
            model: the model that it has from now on; empty: the template's choice; None: as it was.
            persona: the template whose persona it has; empty: its own; None: as it was.

        Raises:
            NotFoundError: there is no agent, or no template, of that name.
            ConfigError: the template is wrong.
        """
        seat = self._find(name)
        row = seat.agent.row
        before = self._rows.settings(row.agent_id)
        settings = self._checked_settings(
            Settings(before.model if model is None else model, before.persona if persona is None else persona)
        )
        outfit = self._outfit(row, self._templates.get(row.template), settings)
        self._rows.set_settings(row.agent_id, settings)
        self._record("agent.reloaded", {"gen_ai.agent.id": row.agent_id, "by": by, **vars(settings)}, agent=row.name)
        seat.agent.reload(outfit)
        return self._info(seat)

    def use_templates(self, templates: Templates, by: str, name: str | None = None) -> Sequence[str]:
        """Take templates that were read anew, for new agents and for the next turns of those that live.

        Args:
            templates: the new ones.
            by: who wants it.
            name: the only living agent that gets what its template says now; None: all of them.

        Returns:
            Why some of them stay as they are, for people.

        Raises:
            NotFoundError: there is no agent of that name.
        """
        seats = list(self._seats.values()) if name is None else [self._find(name)]
        self._templates = templates
        problems = []
        for seat in seats:
            try:
                self.reload(seat.agent.row.name, by)
            except FireclawError as error:
                problems.append(f"{seat.agent.row.name} stays as it is: {error}")
        return problems

    def approvals(self) -> Sequence[tuple[str, Approval]]:
        """Return the commands that wait for an operator's yes, each with the name of its agent."""
        found = ((seat.agent.row.name, seat.agent.approval) for seat in self._seats.values())
        return [(name, approval) for name, approval in found if approval is not None]

    def decide(self, name: str, code: str, *, approved: bool, by: str) -> Approval:
        """Say yes or no to a command that waits; whoever calls this has proved that ``by`` is an operator.

        Raises:
            NotFoundError: there is no such agent, or nothing waits.
            ConflictError: another command waits than the one of that code.
        """
        return self._find(name).agent.decide(code, approved=approved, by=by)

    def memory(self, name: str) -> Memory:
        """Return the memory of an agent, or of one that was destroyed while its memory was kept.

        Raises:
            NotFoundError: nobody of that name ever was, or nothing of it is left.
        """
        memory = self._memory_of(name)
        if not memory.scopes() and self._rows.find(name) is None:
            raise NotFoundError.named("agent", name, (agent.row.name for agent in self._living.values()))
        return memory

    def _memory_of(self, name: str) -> Memory:
        owner = fold(name, "ascii")

        def note(row: MemoryRow) -> None:
            if event := audit.changed(row):
                self._record(event.type, event.data, agent=owner)

        return Memory(self._memories, owner, self._clock, note)

    def _find(self, name: str) -> _Seat:
        seat = self._seats.get(fold(name, "ascii"))
        if seat is None:
            raise NotFoundError.named("agent", name, (other.agent.row.name for other in self._seats.values()))
        return seat

    def ids(self) -> set[str]:
        """Return the ids of all agents in the store, those that nobody has brought back yet among them."""
        return self._rows.ids()

    def list(self) -> list[AgentInfo]:
        """Return the agents in order of age."""
        return [self._info(seat) for seat in self._seats.values()]

    def is_ours(self, nick: str) -> bool:
        """Whether a nick is one of our agents', or reserved for another program of ours."""
        return fold(nick, "ascii") in self._ours

    async def aclose(self, reason: str) -> None:
        """End this daemon's part: agents leave IRC and stay in the store; turns and machines stay as they are.

        Args:
            reason: what they say when they leave.
        """
        seats, self._seats = self._seats, {}
        self._living.clear()
        await asyncio.gather(*(self._leave(seat, reason) for seat in seats.values()))

    async def _leave(self, seat: _Seat, reason: str) -> None:
        await seat.agent.aclose()
        await seat.voice.quit(reason)

    async def _seat(self, row: AgentRow, template: Template) -> None:
        """Set an agent up: it goes on with its work at once, and speaks as soon as it is connected."""
        nick = fold(row.name, "ascii")
        hands = LateHands(row.name, lambda: self._make_machine(row))
        memory = self._memory_of(row.name)
        agent = Agent(
            row,
            self._outfit(row, template, self._rows.settings(row.agent_id)),
            notebook=Notebook(self._db, self._host, row.agent_id),
            mind=self._mind,
            hands=hands,
            toolbox=Toolbox(row.name, hands, memory, self._switchboard),
            memory=memory,
            switchboard=self._switchboard,
            announce=self._office.announce,
            models=self._models,
            record=self._record,
            clock=self._clock,
            ours=self._ours,
        )
        self._ours.add(nick)
        self._living[nick] = agent
        if template.machine is MachineStart.AT_ONCE:
            hands.warm()
        agent.start()
        agent.warm()
        try:
            voice = await self._office.connect(row.name, agent.hear)
        except BaseException:
            del self._living[nick]
            await agent.aclose()
            raise
        agent.speak_with(voice)
        self._seats[nick] = _Seat(agent, hands, voice)

    def _outfit(self, row: AgentRow, template: Template, settings: Settings) -> Outfit:
        persona = self._templates.get(settings.persona).persona if settings.persona else ""
        return Outfit.of(template, row.name, self._context_tokens, model=settings.model, persona=persona)

    def _checked_settings(self, settings: Settings) -> Settings:
        if settings.persona:
            self._templates.get(settings.persona)
        if settings.model and (len(settings.model) > _MAX_MODEL or not settings.model.isprintable()):
            raise InvalidError(f"{settings.model[:40]!r} is not the name of a model")
        return settings

    async def _make_machine(self, row: AgentRow) -> Hands:
        hands = await self._office.make_machine(row.agent_id, row.name, self._templates.get(row.template))
        self._rows.set_machine(row.agent_id, hands.machine_id)
        return hands

    async def _take_apart(self, row: AgentRow, *, keep: bool) -> None:
        """Remove what an agent without a seat still has: its machine, then its rows."""
        self._switchboard.give_up(row)
        await self._office.destroy_machine(row.agent_id, row.name, keep=keep)
        if not keep:
            self._memories.forget(fold(row.name, "ascii"))
        self._rows.remove(row.agent_id)
        self._ours.discard(fold(row.name, "ascii"))
        self._living.pop(fold(row.name, "ascii"), None)

    def _checked(self, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise InvalidError(
                f"{name!r} cannot be the name of an agent",
                hint=f"a letter, then letters, digits, '-' or '_', {MAX_NAME} at most",
            )
        if fold(name, "ascii") in self._reserved:
            raise InvalidError(f"the name {name!r} is reserved", hint="choose another name")
        return name

    def _free_name(self, stem: str) -> str:
        names = (stem if number == 1 else f"{stem}{number}" for number in range(1, len(self._ours) + 2))
        return self._checked(next(name for name in names if fold(name, "ascii") not in self._ours))

    def _info(self, seat: _Seat) -> AgentInfo:
        row = seat.agent.row
        return AgentInfo(
            agent_id=row.agent_id,
            name=row.name,
            template=row.template,
            model=seat.agent.model or self._mind.model,
            state=seat.agent.state,
            waiting=seat.agent.waiting,
            machine=seat.hands.machine_id,
            invoked_by=row.invoked_by,
        )
