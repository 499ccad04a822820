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

from fireclaw.agents.agent import Agent
from fireclaw.agents.hands import LateHands
from fireclaw.agents.templates import MachineStart
from fireclaw.errors import FireclawError, InvalidError, NotFoundError
from fireclaw.irc.message import fold
from fireclaw.store.agents import AgentRow, AgentRows, AgentState, Notebook

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fireclaw.agents.ports import Hands, Mind, Office, Record, Voice
    from fireclaw.agents.templates import Template, Templates
    from fireclaw.store.database import Database
    from fireclaw.store.hosts import Host

log = logging.getLogger(__name__)

MAX_NAME = 24  # NICKLEN of the managed server
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
        self._seats: dict[str, _Seat] = {}

    async def recover(self) -> None:
        """Bring back the agents of the last daemon, and finish the destruction of those that were on their way out.

        One that cannot be brought back (its template is gone, say) is left as it is, and logged.
        """
        for row in self._rows.claim():
            self._ours.add(fold(row.name, "ascii"))
            try:
                if row.state is AgentState.DESTROYING:
                    await self._take_apart(row)
                else:
                    await self._seat(row, self._templates.get(row.template))
            except FireclawError as error:
                log.error("cannot bring back the agent %s: %s", row.name, error)  # noqa: TRY400 (it is the reason)

    async def invoke(self, template: str, name: str | None, by: str) -> AgentInfo:
        """Make an agent.

        Args:
            template: the template's name.
            name: the agent's nick; None: the template's name, with a number where that is taken.
            by: who asks for it.

        Raises:
            NotFoundError: there is no such template.
            InvalidError: the name cannot be a nick of an agent.
            ConflictError: there is an agent of that name.
            FireclawError: it cannot be connected; it is gone again.
        """
        recipe = self._templates.get(template)
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
            await self._seat(row, recipe)
        except BaseException:
            await self._take_apart(row)
            raise
        return self._info(self._seats[fold(row.name, "ascii")])

    async def destroy(self, name: str, by: str) -> None:
        """Destroy an agent with its machine and everything it was told.

        Raises:
            NotFoundError: there is no agent of that name.
        """
        seat = self._seats.pop(fold(name, "ascii"), None)
        if seat is None:
            raise NotFoundError.named("agent", name, (other.agent.row.name for other in self._seats.values()))
        row = seat.agent.row
        self._rows.set_state(row.agent_id, AgentState.DESTROYING)
        self._record("agent.destroyed", {"gen_ai.agent.id": row.agent_id, "by": by}, agent=row.name)
        await seat.agent.dismiss(by)
        await seat.agent.aclose()
        await seat.voice.quit(f"destroyed, as {by} wants it")
        await self._take_apart(row)

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
        await asyncio.gather(*(self._leave(seat, reason) for seat in seats.values()))

    async def _leave(self, seat: _Seat, reason: str) -> None:
        await seat.agent.aclose()
        await seat.voice.quit(reason)

    async def _seat(self, row: AgentRow, template: Template) -> None:
        """Set an agent up: it goes on with its work at once, and speaks as soon as it is connected."""
        hands = LateHands(row.name, lambda: self._make_machine(row, template))
        agent = Agent(
            row,
            template,
            notebook=Notebook(self._db, self._host, row.agent_id),
            mind=self._mind,
            hands=hands,
            record=self._record,
            clock=self._clock,
            context_tokens=self._context_tokens,
            ours=self._ours,
        )
        self._ours.add(fold(row.name, "ascii"))
        if template.machine is MachineStart.AT_ONCE:
            hands.warm()
        agent.start()
        agent.warm()
        try:
            voice = await self._office.connect(row.name, agent.hear)
        except BaseException:
            await agent.aclose()
            raise
        agent.speak_with(voice)
        self._seats[fold(row.name, "ascii")] = _Seat(agent, hands, voice)

    async def _make_machine(self, row: AgentRow, template: Template) -> Hands:
        hands = await self._office.make_machine(row.agent_id, row.name, template)
        self._rows.set_machine(row.agent_id, hands.machine_id)
        return hands

    async def _take_apart(self, row: AgentRow) -> None:
        """Remove what an agent without a seat still has: its machine, then its rows."""
        await self._office.destroy_machine(row.name)
        self._rows.remove(row.agent_id)
        self._ours.discard(fold(row.name, "ascii"))

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
            model=self._mind.model,
            state=seat.agent.state,
            waiting=seat.agent.waiting,
            machine=seat.hands.machine_id,
            invoked_by=row.invoked_by,
        )
