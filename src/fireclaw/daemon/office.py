"""The office: the IRC server, the overseer, the gateway to the model and the agents, as one thing to open and close.

It is open from ``up`` to ``down``. A daemon that is started while an earlier one's office was open opens it again:
ngircd and the agents' machines were left running for it, and turns go on where they stood.
"""

from __future__ import annotations

import asyncio
import builtins  # noqa: TC003 - "list" is a verb of the overseer here
import contextlib
import logging
import os
import time
from functools import partial
from typing import TYPE_CHECKING, Final

from fireclaw.agents.manager import Agents
from fireclaw.agents.templates import Templates
from fireclaw.daemon.bodies import AgentStatus, IrcStatus, ModelStatus
from fireclaw.daemon.drives import DRIVE_MIB, Drives
from fireclaw.daemon.hands import MachineHands
from fireclaw.daemon.irc_server import IrcServer
from fireclaw.daemon.model_process import start_model_process
from fireclaw.daemon.models_api import ProgressLines
from fireclaw.daemon.seats import Seat
from fireclaw.errors import ConflictError, FireclawError, IrcError, NotFoundError, SetupError
from fireclaw.irc.ngircd import LOOPBACK
from fireclaw.irc.overseer import AgentLine, Operator, Overseer, TemplateLine
from fireclaw.llm.backends.ollama import find_address
from fireclaw.llm.cost import cost_lines
from fireclaw.llm.gateway import Gateway, State
from fireclaw.llm.models import model_lines
from fireclaw.llm.prices import Prices
from fireclaw.llm.settings import ModelSettings
from fireclaw.store.machines import Purpose
from fireclaw.store.spending import CostBy, Spending

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from fireclaw.agents.manager import AgentInfo
    from fireclaw.agents.memory import Memory
    from fireclaw.agents.ports import Hands, Voice
    from fireclaw.agents.templates import Template
    from fireclaw.daemon.job import Say
    from fireclaw.daemon.rooms import Rooms
    from fireclaw.irc.events import Message
    from fireclaw.irc.ngircd import NgircdServer
    from fireclaw.irc.overseer import Person
    from fireclaw.machines.machine import Machine

log = logging.getLogger(__name__)

OVERSEER: Final = "overseer"
_IRC_S: Final = 30.0


class Office:
    """The talking half of the daemon; the API's part of it, the agents' office and the overseer's control.

    Attributes:
        open: whether it is open, or opening.
        gateway: the way to models.
        spending: what models cost.
    """

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self.open = False
        self._irc = IrcServer(rooms.home, rooms.gate, rooms.config.irc.port)
        self._drives = Drives(rooms.home.workspaces)
        self._templates = self._load_templates()
        for problem in self._templates.problems().values():
            log.warning("a template is left out: %s", problem)
        self.spending = Spending(rooms.database, rooms.host)
        settings = rooms.config.model
        self._anthropic_key = rooms.home.secrets / "anthropic-key"
        self.gateway = Gateway(
            ModelSettings(
                base_url=settings.base_url,
                model=settings.name,
                api_key_file=settings.api_key_file,
                context=settings.context,
                ollama=find_address(os.environ),
                anthropic_key_file=self._anthropic_key,
            ),
            self._record_call,
            models=rooms.home.models,
            start=partial(start_model_process, rooms.gate),
            spending=self.spending,
            prices=Prices.load(rooms.home.config / "prices.toml"),
        )
        self._agents = Agents(
            rooms.database,
            rooms.host,
            self._templates,
            office=self,
            mind=self.gateway,
            record=rooms.ledger.append,
            clock=time.time,
            context_tokens=settings.context,
            reserved=[OVERSEER],
            models=self.gateway.available,
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
        model = asyncio.create_task(self.gateway.start(ProgressLines(say)), name="model")
        try:
            await self._rooms.machines.prepare()
            await self._rooms.machines.prepare(workspace_mib=DRIVE_MIB)
            if (choice := self._rooms.family.choice) is not None:
                say(f"machines: {choice.vmm.name}, {choice.accel}")
            await self._start_overseer(settings)
            await self._wait_seated()
            await model
        finally:
            model.cancel()
            await asyncio.wait([model])
        if self.gateway.state is not State.READY:
            raise SetupError(f"the model is not ready: {self.gateway.detail}", hint="run 'fireclaw up' again")
        if notice := self.gateway.take_notice():
            say(notice)
        say(f"model {self.gateway.model} ({self.gateway.provider})")

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
            await self.gateway.start()
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

    def _load_templates(self) -> Templates:
        return Templates.load(self._rooms.home.config / "templates")

    def _record(self, event: str, data: dict[str, object]) -> None:
        self._rooms.ledger.append(event, data)

    def _record_call(self, event: str, data: Mapping[str, object]) -> None:
        self._rooms.ledger.append(event, data, agent=str(data["gen_ai.agent.name"]))

    def _keep_secrets(self, settings: NgircdServer) -> None:
        """Have the ledger leave out what only this host may know, whoever says it."""
        keys = [_read_secret(path) for path in (self._rooms.config.model.api_key_file, self._anthropic_key) if path]
        for secret in filter(None, (settings.password, settings.operator_password, *keys)):
            self._rooms.ledger.redact(secret)

    async def fetch_model(self, say: Say) -> None:
        """Have the model's file, without starting the office."""
        await self.gateway.fetch(ProgressLines(say))

    async def down(self, say: Say) -> None:
        """Close for good: everybody leaves IRC, the servers end."""
        if self.open:
            say("closing the office; agents keep what they were told, and of their files those in /workspace")
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
        await self.gateway.aclose()

    # -- for the agents (fireclaw.agents.ports.Office) ----------------------------------------------------------

    async def make_machine(self, agent_id: str, name: str, template: Template) -> Hands:
        """Return the agent's machine: the one it has, if that lives, or a new one on its workspace."""
        machines = self._rooms.machines
        try:
            machine = self._machine_of(name)
        except NotFoundError:
            machine = await machines.create(
                Purpose.AGENT,
                name=name,
                image=template.image,
                memory_mib=template.memory_mib,
                workspace=await asyncio.to_thread(self._drives.have, agent_id, name),
            )
        try:
            await machine.settled()
        except BaseException:
            machines.end_soon(machine)
            raise
        return MachineHands(machine, self._rooms.ledger, name)

    async def destroy_machine(self, agent_id: str, name: str, *, keep: bool) -> None:
        """Remove the agent's machine and its workspace; harmless where there is none."""
        with contextlib.suppress(NotFoundError, ConflictError):
            await self._rooms.machines.destroy(self._machine_of(name))
        await asyncio.to_thread(self._drives.drop, agent_id, name, keep=keep)

    def _machine_of(self, name: str) -> Machine:
        machine = self._rooms.machines.get(name)
        if machine.row.purpose is not Purpose.AGENT:
            raise ConflictError(
                f"the machine {name!r} is not an agent's", hint="remove it, or invoke the agent under another name"
            )
        return machine

    def announce(self, text: str) -> None:
        """Tell the operators something in #control."""
        if self._overseer is not None:
            self._overseer.announce(text)
        else:
            log.warning("nobody is told: %s", text)

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

    async def destroy(self, name: str, by: Person, *, keep: bool) -> None:
        """End an agent."""
        await self._agents.destroy(name, by.nick, keep=keep)
        self._seats.pop(name, None)

    async def set_model(self, name: str, model: str | None, by: Person) -> str:
        """Give an agent another model, or the one that its template chooses."""
        found = "" if model is None else await self.gateway.check(model)
        return self._agents.reload(name, by.nick, model=found).model

    def set_persona(self, name: str, template: str | None, by: Person) -> str:
        """Give an agent the persona of another template, or that of its own."""
        info = self._agents.reload(name, by.nick, persona=template or "")
        return template or info.template

    def reload(self, name: str | None, by: str) -> Sequence[str]:
        """Read the templates anew, for all agents or for one."""
        templates = self._load_templates()
        stays = self._agents.use_templates(templates, by, name)
        self._templates = templates
        self._rooms.ledger.append("templates.loaded", {"by": by, "templates": [each.name for each in templates.all()]})
        return [*map(str, templates.problems().values()), *stays]

    def decide(self, name: str, code: str, by: Person, *, approved: bool) -> str:
        """Say yes or no to a command that waits."""
        return self._agents.decide(name, code, approved=approved, by=by.nick).command

    async def models(self) -> Sequence[str]:
        """The models."""
        return model_lines(await self.gateway.list_models())

    def cost(self, name: str | None) -> Sequence[str]:
        """What models cost: by agent, or one agent's by model."""
        by = CostBy.AGENT if name is None else CostBy.MODEL
        return cost_lines(self.spending.summary(by, agent=name), by)

    def list(self) -> Sequence[AgentLine]:
        """The agents."""
        return [AgentLine(info.name, info.template, _doing(info), info.model) for info in self._agents.list()]

    def templates(self) -> Sequence[TemplateLine]:
        """The templates."""
        return [TemplateLine(each.name, each.description) for each in self._templates.all()]

    # -- for the API --------------------------------------------------------------------------------------------

    def memory(self, name: str) -> Memory:
        """What an agent remembers."""
        return self._agents.memory(name)

    def prune(self) -> builtins.list[str]:
        """Remove the workspaces of agents that are no more, and return what went."""
        # In one turn of the loop: an agent's row comes before its drive, so no drive of a living one is in the list.
        return [f"workspace {name}" for name in self._drives.prune(self._agents.ids())]

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
        gateway = self.gateway
        return ModelStatus(gateway.provider, gateway.model, gateway.state, gateway.detail)


def _doing(info: AgentInfo) -> str:
    return f"{info.state}, {info.waiting} waiting" if info.waiting else info.state


def _read_secret(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):  # the gateway tells, once it needs the key
        return path.read_text("utf-8").strip()
    return ""
