"""The overseer: the bot of this host that takes commands in ``#control`` or in a direct message.

Who may: everybody may look, only an operator of *our* server may change something, and that is proved by a fresh
WHOIS for each command, never by a nick. The proof holds only if the person who spoke is the one whom the WHOIS
describes, so the full prefix must be the same before and after, and any change of that nick in between ends it.

It answers by NOTICE, where it was asked, and nobody answers a NOTICE. What it decided is in the ledger, the
evidence beside it.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from fireclaw.errors import FireclawError, InvalidError, IrcError
from fireclaw.irc.client import IrcClient
from fireclaw.irc.events import Kicked, Lost, Message, Parted, Quit, Ready, Renamed
from fireclaw.irc.message import Kind
from fireclaw.irc.ngircd import AGENTS, CONTROL
from fireclaw.irc.session import Identity
from fireclaw.irc.text import split_text
from fireclaw.irc.throttle import CommandLimit, Rate, Verdict
from fireclaw.irc.verbs import VERBS, find_verb, help_text, is_command, parse_command

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from types import TracebackType

    from fireclaw.irc.client import Backoff, ServerAddress
    from fireclaw.irc.events import Event, Whois
    from fireclaw.irc.verbs import Command

_log = logging.getLogger(__name__)

_COMMANDS_A_MINUTE = 12
_LIST_LINES = 20
# As an operator it has +F, which lifts the server's penalties.
_RATE = Rate(per_second=10, burst=20)


@dataclass(frozen=True)
class Operator:
    """How to become an operator of the server.

    Attributes:
        name: the name for OPER.
        password: its password.
    """

    name: str
    password: str


@dataclass(frozen=True)
class Person:
    """Who gave a command, as our server knows it.

    Attributes:
        nick: the nick at that moment.
        mask: the full ``nick!user@host``.
        server: the server that person is on.
        operator: an operator of our own server.
        account: the services account, empty for none.
    """

    nick: str
    mask: str
    server: str
    operator: bool
    account: str


@dataclass(frozen=True)
class AgentLine:
    """One agent in ``!list``.

    Attributes:
        name: its nick.
        template: what it was made from.
        state: what it is doing, a word or a short sentence.
        model: the model it thinks with.
    """

    name: str
    template: str
    state: str
    model: str


@dataclass(frozen=True)
class TemplateLine:
    """One template in ``!templates``."""

    name: str
    description: str


class Control(Protocol):
    """What the overseer commands. Errors are FireclawErrors; they become one NOTICE."""

    async def invoke(self, template: str, name: str | None, by: Person) -> str:
        """Make an agent; return its nick."""
        ...

    async def destroy(self, name: str, by: Person, *, keep: bool) -> None:
        """End an agent; with ``keep`` its memory and workspace stay for the next of its name."""
        ...

    def decide(self, name: str, code: str, by: Person, *, approved: bool) -> str:
        """Say yes or no to a command that waits; return the command."""
        ...

    async def set_model(self, name: str, model: str | None, by: Person) -> str:
        """Give an agent another model, None for its template's choice; return the model's whole name."""
        ...

    def set_persona(self, name: str, template: str | None, by: Person) -> str:
        """Give an agent the persona of a template, None for its own; return the template's name."""
        ...

    def reload(self, name: str | None, by: str) -> Sequence[str]:
        """Read the templates anew, for all agents or for one; return what went wrong on the way."""
        ...

    def list(self) -> Sequence[AgentLine]:
        """The agents."""
        ...

    def templates(self) -> Sequence[TemplateLine]:
        """The templates."""
        ...

    async def models(self) -> Sequence[str]:
        """The models, a line each."""
        ...

    def cost(self, name: str | None) -> Sequence[str]:
        """What models cost, a line for each agent, or for each model of one agent."""
        ...


@dataclass(eq=False)
class _Check:
    """A command on its way to being believed.

    Attributes:
        message: the line as it came.
        broken: why the sender of the line may not be the one whom a WHOIS describes; empty for no reason.
    """

    message: Message
    broken: str


class Overseer:
    """The bot, with the IRC client it owns.

    Attributes:
        client: its client.
    """

    def __init__(
        self,
        server: ServerAddress,
        operator: Operator | None,
        *,
        control: Control,
        record: Callable[[str, dict[str, object]], None],
        is_agent: Callable[[str], bool],
        nick: str = "overseer",
        backoff: Backoff | None = None,
    ) -> None:
        """Describe the overseer; :meth:`start` makes it dial.

        Args:
            server: where to.
            operator: how to become an operator there; None where we may not. Then it cannot free nicks.
            control: what it commands.
            record: writes an event to the ledger: its type and data.
            is_agent: whether a nick is one of our own agents; they may not command.
            nick: the wanted nick.
            backoff: how long to wait between dials.
        """
        self._operator = operator
        self._control = control
        self._record = record
        self._is_agent = is_agent
        self._wanted_nick = nick
        self.client = IrcClient(
            server,
            Identity(nick, "overseer", "Fireclaw's overseer: !help"),
            handler=self._on_event,
            channels=[CONTROL, AGENTS],
            rate=_RATE if operator is not None else None,
            backoff=backoff,
        )
        self._clock = asyncio.get_running_loop().time
        self._checks: list[_Check] = []
        self._limit = CommandLimit(_COMMANDS_A_MINUTE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._last: dict[str, asyncio.Task[None]] = {}
        self._actions: dict[str, Callable[[Command, Person], Awaitable[list[str]]]] = {
            "invoke": self._invoke,
            "destroy": self._destroy,
            "approve": self._approve,
            "model": self._model,
            "persona": self._persona,
            "reload": self._reload,
            "list": self._list,
            "templates": self._templates,
            "models": self._models,
            "cost": self._cost,
            "help": self._help,
        }
        self._settling: asyncio.Task[None] | None = None

    # Life

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def start(self) -> None:
        """Begin to dial."""
        self.client.start()

    async def wait_ready(self) -> None:
        """Wait until it is connected and has its rights.

        Raises:
            IrcError: the server refused us for good.
            ConnectionError: it was closed.
        """
        await self.client.wait_ready()
        if self._settling is not None:
            await asyncio.wait([self._settling])

    async def quit(self, reason: str) -> None:
        """Say goodbye and end.

        Raises:
            InvalidError: a line break in the reason.
        """
        await self._reap_tasks()
        await self.client.quit(reason)

    async def aclose(self) -> None:
        """End at once and reap the tasks; a command in flight is cancelled."""
        await self._reap_tasks()
        await self.client.aclose()

    def announce(self, text: str) -> None:
        """Say something to the operators in ``#control``, soon."""
        self._start_task(self._say(text), "announcement")

    async def _say(self, text: str) -> None:
        for line in split_text(text, 400):
            await self.client.say(CONTROL, line, Kind.NOTICE)

    async def free_nick(self, nick: str) -> bool:
        """Take a nick from whoever holds it, a dead connection as a rule; tell whether somebody did.

        Raises:
            IrcError: the overseer is no operator.
            ConnectionError: not connected, or no longer.
            TimeoutError: no answer within 30 s.
        """
        if await self.client.whois(nick) is None:
            return False
        await self.client.kill(nick, "this nick belongs to an agent of this host")
        return True

    # Events

    def _on_event(self, event: Event) -> None:
        match event:
            case Ready():
                self._settling = self._start_task(self._settle(), "settle")
            case Message():
                self._on_message(event)
            case Renamed(who, nick):
                self._doubt(who.nick, "you changed your nick")
                self._doubt(nick, "your nick has changed hands")
            case Quit(who) | Parted(who):
                self._doubt(who.nick, "you left")
            case Kicked(nick):
                self._doubt(nick, "you were kicked")
            case Lost():
                for check in self._checks:
                    check.broken = "the connection broke"
            case _:
                pass

    def _doubt(self, nick: str, reason: str) -> None:
        """Whoever has this nick now may be somebody else than a moment ago."""
        for check in self._checks:
            if self.client.fold(check.message.sender.nick) == self.client.fold(nick):
                check.broken = reason

    async def _settle(self) -> None:
        """Take up the rights of the overseer, on each new connection."""
        try:
            if self._operator is not None:
                await self.client.oper(self._operator.name, self._operator.password)
            # +B: a bot. +F: an operator without flood penalties. Others than ngircd refuse what they lack.
            self.client.mode(self.client.nick, "+BF")
            for channel in (CONTROL, AGENTS):
                self.client.mode(channel, "+nt")
            if self._operator is not None and self.client.nick != self._wanted_nick:
                await self.client.kill(self._wanted_nick, "this nick is the overseer's")
                self.client.regain_nick()
        except IrcError as error:
            _log.warning("the overseer has no operator rights: %s", error)
            self._record("control.powerless", {"reason": str(error)})
        except (ConnectionError, TimeoutError) as error:
            _log.info("the overseer could not settle: %s", error)  # the next connection tries again

    def _on_message(self, message: Message) -> None:
        sender = message.sender
        if message.kind is not Kind.PRIVMSG or message.is_bot or self._is_agent(sender.nick):
            return
        if not message.is_private and self.client.fold(message.target) != self.client.fold(CONTROL):
            return
        if not is_command(message.text):
            return
        match self._limit.judge(self.client.fold(sender.nick), self._clock()):
            case Verdict.SERVE:
                self._start_command(message)
            case Verdict.REFUSE:
                reason = f"more than {_COMMANDS_A_MINUTE} commands a minute; wait a minute"
                self._refuse(message, reason, {})
                self._start_task(self._answer(message, [f"cannot follow: {reason}"]), f"{sender.nick} too fast")
            case Verdict.IGNORE:
                pass

    def _start_command(self, message: Message) -> None:
        sender = message.sender
        # Somebody who shares no channel with us could change nick without our hearing of it.
        check = _Check(message, "" if self.client.sees(sender.nick) else "you are not in #control")
        self._checks.append(check)
        # One at a time for each person: "!invoke" and "!destroy" pasted together stay in order.
        key = self.client.fold(sender.nick)
        task = self._start_task(self._serve(check, self._last.get(key)), f"{sender.nick}")
        self._last[key] = task
        task.add_done_callback(lambda done: self._forget(key, done))

    # Commands

    async def _serve(self, check: _Check, previous: asyncio.Task[None] | None) -> None:
        """See one command through: who is it, may they, do it, answer, record."""
        message = check.message
        try:
            if previous is not None:
                await asyncio.wait([previous])
            whois = await self.client.whois(message.sender.nick)
        except (ConnectionError, TimeoutError, InvalidError) as error:
            self._refuse(message, f"the server did not tell who this is: {error}", {})
            return
        finally:
            self._checks.remove(check)
        if whois is None or whois.bot:
            self._refuse(message, "bots may not command" if whois else "the sender is gone", {})
            return
        await self._judge(check, whois)

    async def _judge(self, check: _Check, whois: Whois) -> None:
        message = check.message
        person = self._person(whois)
        evidence = {
            "mask": person.mask,
            "server": person.server,
            "operator": whois.operator,
            "our_server": self.client.server_name,
            "account": person.account,
        }
        try:
            command = parse_command(message.text)
            if command.verb.mutating:
                self._authorise(command, check, person)
        except FireclawError as error:
            self._refuse(message, str(error), evidence)
            await self._answer(message, [f"cannot do {message.text.split()[0]}: {error}"])
            return
        self._note("control.accepted", message, evidence)
        await self._execute(command, message, person)

    def _authorise(self, command: Command, check: _Check, person: Person) -> None:
        """Let only proven operators through.

        Raises:
            InvalidError: not proven, with the reason and what to do.
        """
        if not person.operator:
            name = self._operator.name if self._operator is not None else "NAME"
            raise InvalidError(
                f"you are not an operator of {self.client.server_name}",
                hint=f"type /oper {name} PASSWORD, then !{command.verb.name} again",
            )
        if not check.broken and not self.client.sees(person.nick):
            check.broken = "you are not in #control"
        if not check.broken and person.mask != str(check.message.sender):
            check.broken = "your nick has changed hands"
        if check.broken:
            raise InvalidError(
                f"it is not certain that you gave this command: {check.broken}",
                hint=f"join {CONTROL} and type it again",
            )

    async def _execute(self, command: Command, message: Message, person: Person) -> None:
        wish = " ".join((command.verb.name, *command.args))
        try:
            lines = await self._actions[command.verb.name](command, person)
        except FireclawError as error:
            self._note("control.failed", message, {"reason": str(error)})
            lines = [f"cannot {wish}: {error}"]
        except Exception as error:  # noqa: BLE001 - the daemon outlives a defect in one command, and logs it
            _log.exception("the command %r failed", message.text)
            self._note("control.failed", message, {"reason": repr(error)})
            lines = [f"cannot {wish}: an error inside Fireclaw (its log tells more)"]
        else:
            self._note("control.done", message, {})
        await self._answer(message, lines)

    async def _invoke(self, command: Command, person: Person) -> list[str]:
        nick = await self._control.invoke(command.args[0], command.arg(1), person)
        return [f"{nick} is coming to {AGENTS}"]

    async def _destroy(self, command: Command, person: Person) -> list[str]:
        name, keep = command.args[0], command.arg(1) is not None
        await self._control.destroy(name, person, keep=keep)
        return [f"{name} is gone; its memory and /workspace wait for the next {name}" if keep else f"{name} is gone"]

    async def _approve(self, command: Command, person: Person) -> list[str]:
        name, code = command.args[:2]
        approved = command.arg(2) is None
        wish = self._control.decide(name, code, person, approved=approved)
        return [f"{name} {'runs' if approved else 'does not run'} `{wish}`"]

    async def _model(self, command: Command, person: Person) -> list[str]:
        name = command.args[0]
        model = await self._control.set_model(name, command.arg(1), person)
        return [f"{name} thinks with {model} from its next turn on"]

    async def _persona(self, command: Command, person: Person) -> list[str]:
        name = command.args[0]
        template = self._control.set_persona(name, command.arg(1), person)
        return [f"{name} has the persona of {template} from its next turn on"]

    async def _reload(self, command: Command, person: Person) -> list[str]:
        return ["the templates were read anew", *self._control.reload(command.arg(0), person.nick)]

    async def _list(self, _command: Command, _person: Person) -> list[str]:
        agents = self._control.list()
        lines = [f"{each.name} ({each.template}, {each.model}): {each.state}" for each in agents]
        return _shortened(lines) or [f"there are no agents yet: {VERBS['invoke'].example}"]

    async def _templates(self, _command: Command, _person: Person) -> list[str]:
        lines = [f"{each.name}: {each.description}" for each in self._control.templates()]
        return lines or ["there are no templates"]

    async def _models(self, _command: Command, _person: Person) -> list[str]:
        return _shortened(await self._control.models())

    async def _cost(self, command: Command, _person: Person) -> list[str]:
        return _shortened(self._control.cost(command.arg(0)))

    async def _help(self, command: Command, _person: Person) -> list[str]:
        name = command.arg(0)
        return [help_text(find_verb(name) if name else None)]

    def _person(self, whois: Whois) -> Person:
        ours = bool(whois.server) and whois.server == self.client.server_name
        mask = f"{whois.nick}!{whois.user}@{whois.host}"
        return Person(whois.nick, mask, whois.server, whois.operator and ours, whois.account)

    # Words

    async def _answer(self, message: Message, lines: Sequence[str]) -> None:
        # What an error quotes may have line breaks of its own; each of ours is one line.
        text = "\n".join(" ".join(line.split()) for line in lines)
        try:
            await self.client.say(message.reply_to, text, Kind.NOTICE)
        except (ConnectionError, InvalidError) as error:
            _log.info("no answer to %s: %s", message.sender, error)

    def _refuse(self, message: Message, reason: str, evidence: dict[str, object]) -> None:
        self._note("control.refused", message, {"reason": reason, **evidence})

    def _note(self, event: str, message: Message, data: dict[str, object]) -> None:
        said = {"line": message.raw, "sender": str(message.sender), "target": message.target}
        self._record(event, {**said, **data})

    # Tasks

    def _start_task(self, work: Coroutine[None, None, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"overseer: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _forget(self, key: str, task: asyncio.Task[None]) -> None:
        if self._last.get(key) is task:
            del self._last[key]

    async def _reap_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)


def _shortened(lines: Sequence[str]) -> list[str]:
    """As many lines as a channel bears."""
    if len(lines) <= _LIST_LINES:
        return list(lines)
    return [*lines[: _LIST_LINES - 1], f"… and {len(lines) - _LIST_LINES + 1} more"]
