"""The office: the IRC server, the overseer, the gateway to the model and the agents, as one thing to open and close.

It is open from ``up`` to ``down``. A daemon that is started while an earlier one's office was open opens it again:
ngircd and the agents' machines were left running for it, and turns go on where they stood.
"""

from __future__ import annotations

import asyncio
import builtins  # noqa: TC003 - "list" is a verb of the overseer here
import contextlib
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from fireclaw.agents.manager import Agents
from fireclaw.agents.templates import Templates
from fireclaw.daemon.bodies import AgentStatus, IrcStatus, ModelStatus
from fireclaw.daemon.irc_server import IrcServer
from fireclaw.daemon.model_process import start_model_process
from fireclaw.daemon.seats import MachineHands, Seat
from fireclaw.errors import ConflictError, FireclawError, IrcError, NotFoundError, SetupError
from fireclaw.irc.ngircd import LOOPBACK
from fireclaw.irc.overseer import AgentLine, Operator, Overseer, TemplateLine
from fireclaw.llm.gateway import Gateway, State
from fireclaw.llm.settings import ModelSettings
from fireclaw.store.machines import Purpose

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fireclaw.agents.manager import AgentInfo
    from fireclaw.agents.ports import Hands, Voice
    from fireclaw.agents.templates import Template
    from fireclaw.daemon.job import Say
    from fireclaw.daemon.rooms import Rooms
    from fireclaw.irc.events import Message
    from fireclaw.irc.ngircd import NgircdServer
    from fireclaw.irc.overseer import Person
    from fireclaw.llm.fetch import Progress
    from fireclaw.machines.machine import Machine

log = logging.getLogger(__name__)

OVERSEER: Final = "overseer"
_IRC_S: Final = 30.0
_PROGRESS_S: Final = 1.0  # between two lines of progress


class Office:
    """The talking half of the daemon; the API's part of it, the agents' office and the overseer's control.

    Attributes:
        open: whether it is open, or opening.
    """

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self.open = False
        self._irc = IrcServer(rooms.home, rooms.gate, rooms.config.irc.port)
        self._templates = Templates.load(rooms.home.config / "templates")
        settings = rooms.config.model
        self._gateway = Gateway(
            ModelSettings(settings.base_url, settings.name, settings.api_key_file, settings.context),
            self._record_call,
            models=rooms.home.models,
            start=partial(start_model_process, rooms.gate),
        )
        self._agents = Agents(
            rooms.database,
            rooms.host,
            self._templates,
            office=self,
            mind=self._gateway,
            record=rooms.ledger.append,
            clock=time.time,
            context_tokens=settings.context,
            reserved=[OVERSEER],
        )
        self._overseer: Overseer | None = None
        self._seats: dict[str, Seat] = {}
        self._reopening: asyncio.Task[None] | None = None

    # -- opening and closing ----------------------------------------------------------------------------------

    async def up(self, say: Say) -> None:
        """Open; return when all is ready, the model included.

        Raises:
            FireclawError: something cannot be started; what was started before it keeps running, and ``up`` can be
                asked for again.
        """
        if self._reopening is not None:
            await asyncio.wait([self._reopening])
        settings = await self._irc.start()
        self.open = True
        self._keep_secrets(settings)
        say(f"IRC server {settings.name} on {LOOPBACK}:{settings.port}")
        model = asyncio.create_task(self._gateway.start(_Teller(say)), name="model")
        try:
            await self._rooms.machines.prepare()
            if (choice := self._rooms.family.choice) is not None:
                say(f"machines: {choice.vmm.name}, {choice.accel}")
            await self._start_overseer(settings)
            await self._wait_seated()
            await model
        finally:
            model.cancel()
            await asyncio.wait([model])
        if self._gateway.state is not State.READY:
            raise SetupError(f"the model is not ready: {self._gateway.detail}", hint="run 'fireclaw up' again")
        say(f"model {self._gateway.model} ({self._gateway.provider})")

    async def recover(self) -> None:
        """Open again, in the background, what an earlier daemon of this boot left open."""
        if self._irc.recorded:
            self.open = True
            self._reopening = asyncio.create_task(self._reopen(), name="reopen the office")

    async def _reopen(self) -> None:
        try:
            settings = await self._irc.start()
            self._keep_secrets(settings)
            await self._start_overseer(settings)
            await self._gateway.start()
        except FireclawError as error:
            log.error("cannot open the office again: %s", error)  # noqa: TRY400 - an expected error, told as such
        except Exception:
            log.exception("cannot open the office again")

    async def _start_overseer(self, settings: NgircdServer) -> None:
        """Seat the overseer, then the agents; harmless where they sit already."""
        if self._overseer is not None:
            return
        overseer = Overseer(
            settings.address,
            Operator(settings.operator, settings.operator_password),
            control=self,
            record=self._record,
            is_agent=self._agents.is_ours,
            nick=OVERSEER,
        )
        overseer.start()
        try:
            async with asyncio.timeout(_IRC_S):
                await overseer.wait_ready()
        except BaseException as error:
            await overseer.aclose()
            if isinstance(error, TimeoutError | ConnectionError):
                raise SetupError(f"the overseer cannot connect to {settings.address}: {error}") from error
            raise
        self._overseer = overseer
        await self._agents.recover()

    async def _wait_seated(self) -> None:
        """Wait until the agents that came back are on IRC: who is told that all is ready may speak to them."""
        waits = [seat.wait_ready() for seat in self._seats.values()]
        try:
            async with asyncio.timeout(_IRC_S):
                await asyncio.gather(*waits)
        except (IrcError, ConnectionError, TimeoutError) as error:
            log.warning("not all agents are on IRC: %s", error)  # each of them goes on trying

    def _record(self, event: str, data: dict[str, object]) -> None:
        self._rooms.ledger.append(event, data)

    def _record_call(self, event: str, data: Mapping[str, object]) -> None:
        self._rooms.ledger.append(event, data, agent=str(data["gen_ai.agent.name"]))

    def _keep_secrets(self, settings: NgircdServer) -> None:
        """Have the ledger leave out what only this host may know, whoever says it."""
        key = ""
        if (path := self._rooms.config.model.api_key_file) is not None:
            with contextlib.suppress(OSError, UnicodeDecodeError):  # the gateway tells, once it needs the key
                key = path.read_text("utf-8").strip()
        for secret in filter(None, (settings.password, settings.operator_password, key)):
            self._rooms.ledger.redact(secret)

    async def fetch_model(self, say: Say) -> None:
        """Have the model's file, without starting the office."""
        await self._gateway.fetch(_Teller(say))

    async def down(self, say: Say) -> None:
        """Close for good: everybody leaves IRC, the servers end."""
        if self.open:
            say("closing the office; agents keep what they were told, not the files in their machines")
        await self._leave("going down")
        await self._irc.stop()
        self.open = False

    async def detach(self) -> None:
        """Leave IRC for the next daemon to come back; ngircd and the agents' machines live on."""
        await self._leave("restarting")
        await self._irc.detach()

    async def _leave(self, reason: str) -> None:
        if self._reopening is not None:
            self._reopening.cancel()
            await asyncio.wait([self._reopening])
            self._reopening = None
        await self._agents.aclose(reason)
        self._seats.clear()
        if self._overseer is not None:
            await self._overseer.quit(reason)
            self._overseer = None
        await self._gateway.aclose()

    # -- for the agents (fireclaw.agents.ports.Office) ----------------------------------------------------------

    async def make_machine(self, agent_id: str, name: str, template: Template) -> Hands:
        """Return the agent's machine: the one it has, if that lives, or a new one."""
        del agent_id
        machines = self._rooms.machines
        try:
            machine = self._machine_of(name)
        except NotFoundError:
            machine = await machines.create(
                Purpose.AGENT, name=name, image=template.image, memory_mib=template.memory_mib
            )
        try:
            await machine.settled()
        except BaseException:
            machines.end_soon(machine)
            raise
        return MachineHands(machine, self._rooms.ledger, name)

    async def destroy_machine(self, name: str) -> None:
        """Remove the agent's machine; harmless where there is none."""
        with contextlib.suppress(NotFoundError, ConflictError):
            await self._rooms.machines.destroy(self._machine_of(name))

    def _machine_of(self, name: str) -> Machine:
        machine = self._rooms.machines.get(name)
        if machine.row.purpose is not Purpose.AGENT:
            raise ConflictError(
                f"the machine {name!r} is not an agent's", hint="remove it, or invoke the agent under another name"
            )
        return machine

    async def connect(self, nick: str, on_message: Callable[[Message], None]) -> Voice:
        """Take a seat on IRC."""
        settings = self._irc.settings
        if settings is None:
            raise SetupError("the IRC server is not running", hint="run 'fireclaw up'")
        seat = self._seats[nick] = Seat(settings.address, nick, on_message, self._overseer)
        return seat

    # -- for the overseer (fireclaw.irc.overseer.Control) --------------------------------------------------------

    async def invoke(self, template: str, name: str | None, by: Person) -> str:
        """Make an agent."""
        info = await self._agents.invoke(template, name, by.nick)
        return info.name

    async def destroy(self, name: str, by: Person) -> None:
        """End an agent."""
        await self._agents.destroy(name, by.nick)
        self._seats.pop(name, None)

    def list(self) -> Sequence[AgentLine]:
        """The agents."""
        return [AgentLine(info.name, info.template, _doing(info), info.model) for info in self._agents.list()]

    def templates(self) -> Sequence[TemplateLine]:
        """The templates."""
        return [TemplateLine(each.name, each.description) for each in self._templates.all()]

    # -- for the API --------------------------------------------------------------------------------------------

    def irc_status(self) -> IrcStatus | None:
        """What a person needs to join."""
        settings = self._irc.settings
        if settings is None:
            return None
        return IrcStatus(
            host=LOOPBACK,
            port=settings.port,
            server=settings.name,
            password=settings.password,
            operator=settings.operator,
            operator_password_file=str(self._irc.operator_password_file),
        )

    def agent_status(self) -> builtins.list[AgentStatus]:
        """The agents; one whose machine has died has none until it needs the next."""
        alive = {row.machine_id for row in self._rooms.machines.all()}
        return [
            AgentStatus(
                name=info.name,
                template=info.template,
                model=info.model,
                state=info.state,
                machine=info.machine if info.machine in alive else "",
            )
            for info in self._agents.list()
        ]

    def model_status(self) -> ModelStatus:
        """The way to models."""
        gateway = self._gateway
        return ModelStatus(gateway.provider, gateway.model, gateway.state, gateway.detail)


def _doing(info: AgentInfo) -> str:
    return f"{info.state}, {info.waiting} waiting" if info.waiting else info.state


class _Teller:
    """Turns the progress of a fetch into some lines."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._last = 0.0

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= _PROGRESS_S or progress.done >= progress.total:
            self._last = now
            done, total = progress.done / 1e6, progress.total / 1e6
            self._say(f"{progress.text}: {done:.0f} of {total:.0f} MB")
