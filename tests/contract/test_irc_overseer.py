"""The overseer: who may command it, what it answers, what it records. With a real ngircd and a scripted server."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest
from ngircd_process import running_ngircd

from fireclaw.errors import NotFoundError
from fireclaw.irc.client import Backoff
from fireclaw.irc.overseer import AgentLine, Operator, Overseer, Person, TemplateLine
from fireclaw.irc.verbs import VERBS
from fireclaw.testing.irc_peer import IrcLink, IrcServerPeer, connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from ngircd_process import RunningNgircd

    from fireclaw.irc import ServerAddress

QUICK = Backoff(first=0.01, longest=0.05)
OPERATOR = Operator("fireclaw", "oper-pass")


class FakeControl:
    """Agents as a dictionary from name to template."""

    def __init__(self) -> None:
        self.agents: dict[str, str] = {}
        self.by: list[Person] = []
        self.asked: list[tuple[object, ...]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def invoke(self, template: str, name: str | None, by: Person) -> str:
        """Make one."""
        await self.gate.wait()
        if template == "defect":
            raise LookupError("a defect")
        if template != "worker":
            raise NotFoundError.named("template", template, ["worker"])
        self.by.append(by)
        nick = name or template
        self.agents[nick] = template
        return nick

    async def destroy(self, name: str, by: Person, *, keep: bool) -> None:
        """End one."""
        self._take(name, by, "destroy", keep)
        del self.agents[name]

    def decide(self, name: str, code: str, by: Person, *, approved: bool) -> str:
        """Note the decision."""
        self._take(name, by, code, approved)
        return "rm -rf build"

    async def set_model(self, name: str, model: str | None, by: Person) -> str:
        """Note the model."""
        self._take(name, by, model)
        return f"ollama:{model}" if model else "tiny"

    def set_persona(self, name: str, template: str | None, by: Person) -> str:
        """Note the persona."""
        self._take(name, by, template)
        return template or self.agents[name]

    def reload(self, name: str | None, by: str) -> Sequence[str]:
        """Find one wrong template."""
        self.asked.append((name, by))
        return ["coder.toml:3: unknown key 'toolz'"]

    async def models(self) -> Sequence[str]:
        """More than fit."""
        return [f"  ollama:model{number}: installed" for number in range(30)]

    def cost(self, name: str | None) -> Sequence[str]:
        """Something for all, nothing for one."""
        return [f"{name}: $0.00"] if name else ["ada: $1.00", "together: $1.00"]

    def _take(self, name: str, by: Person, *wish: object) -> None:
        if name not in self.agents:
            raise NotFoundError.named("agent", name, self.agents)
        self.by.append(by)
        self.asked.append((name, *wish))

    def list(self) -> Sequence[AgentLine]:
        """The agents."""
        return [AgentLine(name, template, "idle", "tiny") for name, template in self.agents.items()]

    def templates(self) -> Sequence[TemplateLine]:
        """The templates."""
        return [TemplateLine("worker", "does what it is told")]


class Ledger:
    """Keeps what is recorded."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, dict[str, object]]] = []
        self.recorded = asyncio.Event()

    def __call__(self, event: str, data: dict[str, object]) -> None:
        """Record."""
        self.entries.append((event, data))
        self.recorded.set()

    @property
    def types(self) -> list[str]:
        """What kinds of event there were."""
        return [event for event, _ in self.entries]

    def last(self, event: str) -> dict[str, object]:
        """The data of the newest event of a type."""
        return next(data for kind, data in reversed(self.entries) if kind == event)


@pytest.fixture
async def control() -> FakeControl:
    """What the overseer commands."""
    return FakeControl()


@pytest.fixture
def ledger() -> Ledger:
    """What the overseer records."""
    return Ledger()


@pytest.fixture
async def ngircd(tmp_path: Path) -> AsyncIterator[RunningNgircd]:
    """A real server without penalties."""
    async with running_ngircd(tmp_path) as running:
        yield running


def make_overseer(address: ServerAddress, control: FakeControl, ledger: Ledger, *, operator: bool = True) -> Overseer:
    """An overseer whose own agents are called agent-something."""
    return Overseer(
        address,
        OPERATOR if operator else None,
        control=control,
        record=ledger,
        is_agent=lambda nick: nick.startswith("agent-"),
        backoff=QUICK,
    )


@pytest.fixture
async def overseer(ngircd: RunningNgircd, control: FakeControl, ledger: Ledger) -> AsyncIterator[Overseer]:
    """A settled overseer on the real server."""
    async with make_overseer(ngircd.server.address, control, ledger) as overseer:
        await overseer.wait_ready()
        yield overseer


@contextlib.asynccontextmanager
async def person(ngircd: RunningNgircd, nick: str, *, operator: bool = False) -> AsyncIterator[IrcLink]:
    """Somebody in #control."""
    async with await connect(ngircd.server.address) as link:
        await link.register(nick, "server-pass")
        if operator:
            await link.send("OPER fireclaw oper-pass")
            await link.expect(" 381 ")
        await link.send("JOIN #control")
        await link.expect(r" 353 .*overseer")
        await link.expect(" 366 ")
        yield link


async def answer(link: IrcLink, target: str = "#control") -> str:
    """The next answer of the overseer."""
    return (await link.expect(rf"^:overseer!\S+ NOTICE {target} :(.*)$"))[1]


async def silence(link: IrcLink) -> list[str]:
    """Everything that came for a person until a question asked now was answered."""
    start = len(link.seen)
    await link.send("PRIVMSG #control :!help help")
    await link.expect(r"NOTICE #control :!help \[VERB\]")
    return [line for line in link.seen[start:-1] if line.startswith(":overseer!") and " NOTICE " in line]


# Rights


@pytest.mark.usefixtures("overseer")
async def test_an_operator_makes_and_ends_agents(ngircd: RunningNgircd, control: FakeControl, ledger: Ledger) -> None:
    """With the operator flag !invoke and !destroy work, and the ledger has the evidence."""
    async with person(ngircd, "ann", operator=True) as ann:
        await ann.send("PRIVMSG #control :!invoke worker ada")
        assert await answer(ann) == "ada is coming to #agents"
        await ann.send("PRIVMSG #control :!list")
        assert await answer(ann) == "ada (worker, tiny): idle"
        await ann.send("PRIVMSG #control :!destroy ada")
        assert await answer(ann) == "ada is gone"
    assert control.agents == {}
    assert [(by.nick, by.operator, by.server) for by in control.by] == [("ann", True, "box.fireclaw.local")] * 2
    assert ledger.types == ["control.accepted", "control.done"] * 3
    accepted = ledger.last("control.accepted")
    assert accepted["line"] == "!destroy ada"
    assert accepted["sender"] == accepted["mask"] == "ann!~ann@127.0.0.1"
    assert (accepted["server"], accepted["our_server"], accepted["operator"]) == (
        "box.fireclaw.local",
        "box.fireclaw.local",
        True,
    )


CHANGES = [
    ("!approve ada 3f2c", "ada runs `rm -rf build`", ("ada", "3f2c", True)),
    ("!approve ada 3f2c no", "ada does not run `rm -rf build`", ("ada", "3f2c", False)),
    ("!model ada qwen2.5", "ada thinks with ollama:qwen2.5 from its next turn on", ("ada", "qwen2.5")),
    ("!model ada", "ada thinks with tiny from its next turn on", ("ada", None)),
    ("!persona ada coder", "ada has the persona of coder from its next turn on", ("ada", "coder")),
    ("!persona ada", "ada has the persona of worker from its next turn on", ("ada", None)),
    ("!reload", "the templates were read anew", (None, "ann")),
    ("!reload ada", "the templates were read anew", ("ada", "ann")),
    ("!destroy ada", "ada is gone", ("ada", "destroy", False)),
    ("!destroy ada keep", "ada is gone; its memory and /workspace wait for the next ada", ("ada", "destroy", True)),
]


@pytest.mark.parametrize("change", CHANGES, ids=[line for line, _, _ in CHANGES])
@pytest.mark.usefixtures("overseer")
async def test_what_changes_an_agent_needs_a_proved_operator(
    ngircd: RunningNgircd, control: FakeControl, ledger: Ledger, change: tuple[str, str, tuple[object, ...]]
) -> None:
    """An operator's wish reaches the agents as it was typed; anybody else's is refused, told and recorded."""
    line, words, wish = change
    control.agents["ada"] = "worker"
    async with person(ngircd, "bob") as bob:
        await bob.send(f"PRIVMSG #control :{line}")
        assert "you are not an operator of" in await answer(bob)
        assert control.asked == []
        assert (ledger.types, ledger.last("control.refused")["line"]) == (["control.refused"], line)
    async with person(ngircd, "ann", operator=True) as ann:
        await ann.send(f"PRIVMSG #control :{line}")
        assert await answer(ann) == words
        if line.startswith("!reload"):
            assert await answer(ann) == "coder.toml:3: unknown key 'toolz'"
    assert control.asked == [wish]
    assert ledger.types[1:] == ["control.accepted", "control.done"]


async def test_an_announcement_reaches_the_operators(ngircd: RunningNgircd, overseer: Overseer) -> None:
    """What an agent asks its operators is said in #control, as NOTICE, however long it is."""
    async with person(ngircd, "bob") as bob:
        overseer.announce("ada wants to run `" + "x" * 600 + "`")
        said = await answer(bob) + await answer(bob)
    assert said == "ada wants to run `" + "x" * 600 + "`"


@pytest.mark.usefixtures("overseer")
async def test_without_the_operator_flag_destroy_is_refused(
    ngircd: RunningNgircd, control: FakeControl, ledger: Ledger
) -> None:
    """Who is no operator is told why and what to do, nothing happens, and the refusal is in the ledger."""
    control.agents["ada"] = "worker"
    async with person(ngircd, "bob") as bob:
        await bob.send("PRIVMSG #control :!destroy ada")
        assert await answer(bob) == (
            "cannot do !destroy: you are not an operator of box.fireclaw.local "
            "(type /oper fireclaw PASSWORD, then !destroy again)"
        )
    assert control.agents == {"ada": "worker"}
    assert ledger.types == ["control.refused"]
    refused = ledger.last("control.refused")
    assert (refused["line"], refused["sender"], refused["operator"]) == (
        "!destroy ada",
        "bob!~bob@127.0.0.1",
        False,
    )
    assert "not an operator" in str(refused["reason"])


@pytest.mark.usefixtures("overseer")
async def test_everybody_may_look(ngircd: RunningNgircd, control: FakeControl) -> None:
    """The verbs that change nothing are for all."""
    control.agents["ada"] = "worker"
    async with person(ngircd, "bob") as bob:
        await bob.send("PRIVMSG #control :!list")
        assert await answer(bob) == "ada (worker, tiny): idle"
        await bob.send("PRIVMSG #control :!templates")
        assert await answer(bob) == "worker: does what it is told"
        await bob.send("PRIVMSG #control :!help")
        assert "!list" in await answer(bob)
        await bob.send("PRIVMSG #control :!cost", "PRIVMSG #control :!cost ada")
        assert [await answer(bob) for _ in range(3)] == ["ada: $1.00", "together: $1.00", "ada: $0.00"]
        await bob.send("PRIVMSG #control :!models")
        lines = [await answer(bob) for _ in range(20)]
        assert (lines[0], lines[-1]) == ("ollama:model0: installed", "… and 11 more")


@pytest.mark.usefixtures("overseer")
async def test_a_direct_message_is_answered_there(ngircd: RunningNgircd, control: FakeControl) -> None:
    """A command in a direct message is answered to that person alone; who is an operator may command there."""
    async with person(ngircd, "ann", operator=True) as ann:
        await ann.send("PRIVMSG overseer :!invoke worker")
        assert await answer(ann, "ann") == "worker is coming to #agents"
    assert control.agents == {"worker": "worker"}


@pytest.mark.usefixtures("overseer")
async def test_an_operator_who_cannot_be_seen_is_refused(
    ngircd: RunningNgircd, control: FakeControl, ledger: Ledger
) -> None:
    """Outside of shared channels a change of nick would be invisible, so no proof holds."""
    async with await connect(ngircd.server.address) as ann:
        await ann.register("ann", "server-pass")
        await ann.send("OPER fireclaw oper-pass", "PRIVMSG overseer :!invoke worker")
        assert "you are not in #control (join #control and type it again)" in await answer(ann, "ann")
    assert control.agents == {}
    assert ledger.types == ["control.refused"]


# Who is not heard


@pytest.mark.parametrize(
    "line",
    [
        "NOTICE #control :!list",
        "NOTICE overseer :!list",
        "PRIVMSG overseer :\x01ACTION !list\x01",
        "PRIVMSG #control :\x01LIST\x01",
        "PRIVMSG #agents :!list",
        "PRIVMSG #control :please !list",
        "PRIVMSG #control :hello overseer",
    ],
)
@pytest.mark.usefixtures("overseer")
async def test_only_commands_in_their_place_are_heard(ngircd: RunningNgircd, ledger: Ledger, line: str) -> None:
    """NOTICE, CTCP, other channels and ordinary talk get no answer and leave no record."""
    async with person(ngircd, "bob") as bob:
        await bob.send("JOIN #agents", line)
        assert await silence(bob) == []
    assert [data["line"] for _, data in ledger.entries] == ["!help help"] * 2


@pytest.mark.usefixtures("overseer")
async def test_agents_and_bots_do_not_command(ngircd: RunningNgircd, ledger: Ledger) -> None:
    """Our own agents are not heard at all; a foreign bot is refused in silence."""
    async with person(ngircd, "agent-1") as agent, person(ngircd, "robot") as robot, person(ngircd, "bob") as bob:
        await agent.send("PRIVMSG #control :!list")
        await robot.send("MODE robot +B")
        await robot.expect("MODE robot")
        await robot.send("PRIVMSG #control :!list")
        await bob.expect(r":robot!\S+ PRIVMSG #control :!list")
        assert await silence(bob) == []
    assert ledger.types[0] == "control.refused"
    assert ledger.entries[0][1]["reason"] == "bots may not command"
    assert not any("agent-1" in str(data["sender"]) for _, data in ledger.entries)


@pytest.mark.usefixtures("overseer")
async def test_too_many_commands_are_refused_once(ngircd: RunningNgircd, ledger: Ledger) -> None:
    """The thirteenth command in a minute is answered with the limit, more of them with nothing."""
    async with person(ngircd, "bob") as bob, person(ngircd, "ann") as ann:
        await bob.send(*["PRIVMSG #control :!templates"] * 15)
        answers = [await answer(bob) for _ in range(13)]
        assert len(await silence(ann)) == 13
    assert answers.count("worker: does what it is told") == 12
    assert "cannot follow: more than 12 commands a minute; wait a minute" in answers
    assert ledger.types.count("control.refused") == 1


# Mistakes


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("!lst", "cannot do !lst: there is no !lst (did you mean !list?)"),
        ("!destroy", "cannot do !destroy: the syntax is: !destroy NAME [keep] (for example: !destroy ada)"),
        ("!model bob tiny", "cannot model bob tiny: no agent named 'bob' (there is no agent yet)"),
        ("!help lst", "cannot help lst: there is no !lst (did you mean !list?)"),
        ("!invoke werker", "cannot invoke werker: no template named 'werker' (did you mean 'worker'?)"),
        ("!invoke defect", "cannot invoke defect: an error inside Fireclaw (its log tells more)"),
        ("!destroy ada", "cannot destroy ada: no agent named 'ada' (there is no agent yet)"),
    ],
)
@pytest.mark.usefixtures("overseer")
async def test_mistakes_are_answered_with_the_next_step(ngircd: RunningNgircd, line: str, words: str) -> None:
    """Typos, misuse, unknown names and defects get one NOTICE: the thing, the reason, the next step."""
    async with person(ngircd, "ann", operator=True) as ann:
        await ann.send(f"PRIVMSG #control :{line}")
        assert await answer(ann) == words
        assert await silence(ann) == []


async def test_every_verb_has_an_action(ngircd: RunningNgircd, overseer: Overseer) -> None:
    """The table of verbs and the overseer know the same verbs."""
    assert set(overseer._actions) == set(VERBS)
    assert ngircd.is_running()


# Order


async def test_commands_of_one_person_keep_their_order(
    ngircd: RunningNgircd, overseer: Overseer, control: FakeControl
) -> None:
    """Two commands pasted together run one after the other, while another person is served at once."""
    control.gate.clear()
    async with person(ngircd, "ann", operator=True) as ann, person(ngircd, "bob") as bob:
        await ann.send("PRIVMSG #control :!invoke worker ada", "PRIVMSG #control :!destroy ada")
        await ann.send("PING :said")
        await ann.expect("PONG .*said")
        await bob.send("PRIVMSG #control :!list")
        assert "no agents yet" in await answer(bob)
        control.gate.set()
        assert await answer(bob) == "ada is coming to #agents"
        assert await answer(bob) == "ada is gone"
    assert overseer._last == {}


# Its own standing


async def test_it_takes_its_nick_back_from_a_squatter(
    ngircd: RunningNgircd, control: FakeControl, ledger: Ledger
) -> None:
    """Whoever took the overseer's nick while it was away is removed, and the nick regained."""
    async with await connect(ngircd.server.address) as squatter:
        await squatter.register("overseer", "server-pass")
        async with make_overseer(ngircd.server.address, control, ledger) as overseer:
            await squatter.expect("ERROR :KILLed by overseer-1")
            await overseer.wait_ready()
            async with person(ngircd, "ann", operator=True) as ann:
                await ann.send("PRIVMSG overseer :!list")
                assert "no agents yet" in await answer(ann, "ann")


async def test_it_frees_the_nick_of_a_dead_agent(ngircd: RunningNgircd, overseer: Overseer) -> None:
    """A ghost's nick is free again at once, and a free nick stays free."""
    async with await connect(ngircd.server.address) as ghost:
        await ghost.register("ada", "server-pass")
        assert await overseer.free_nick("ada")
        await ghost.expect("ERROR :KILLed by overseer")
        assert not await overseer.free_nick("ada")


async def test_it_is_marked_as_a_bot_without_penalties(ngircd: RunningNgircd, overseer: Overseer) -> None:
    """It has +B so that other bots leave it alone, and +F so that its answers are not held back."""
    async with person(ngircd, "ann", operator=True) as ann:
        await ann.send("WHOIS overseer")
        await ann.expect(" 335 ann overseer ")
        modes = (await ann.expect(r" 379 ann overseer :is using modes \+(\w+)"))[1]
        assert {"B", "F", "o"} <= set(modes)
    assert overseer.client.nick == "overseer"


async def test_a_command_in_flight_ends_with_the_overseer(
    ngircd: RunningNgircd, control: FakeControl, ledger: Ledger
) -> None:
    """Closing cancels what is being done and leaves no task."""
    before = asyncio.all_tasks()
    control.gate.clear()
    async with make_overseer(ngircd.server.address, control, ledger) as overseer:
        await overseer.wait_ready()
        async with person(ngircd, "ann", operator=True) as ann:
            await ann.send("PRIVMSG #control :!invoke worker", "PRIVMSG #control :!help")
            await ann.send("PING :said")
            await ann.expect("PONG .*said")
        await overseer.quit("restarting")
    assert asyncio.all_tasks() == before
    assert control.agents == {}


# A server that lies, or a clever person


class Stage:
    """A scripted server with the overseer on it, settled, and ann in #control."""

    def __init__(self, peer: IrcServerPeer) -> None:
        self._peer = peer
        self.link: IrcLink

    async def open(self) -> None:
        """Let the overseer connect, and settle."""
        self.link = await self._peer.accept()
        await self.link.welcome()
        await self.link.expect("^OPER fireclaw :oper-pass$")
        await self.link.send(":peer.test 381 overseer :You are now an IRC Operator")
        await self.link.send(":overseer!~overseer@host JOIN #control")
        await self.link.send(":peer.test 353 overseer = #control :overseer ann")

    async def say(self, text: str) -> None:
        """Let ann say something in #control."""
        await self.link.send(f":ann!~ann@host PRIVMSG #control :{text}")

    async def whois(self, *, server: str = "peer.test", mask: str = "ann ~ann host", operator: bool = True) -> None:
        """Answer the overseer's WHOIS."""
        lines = [f":peer.test 311 overseer {mask} * :Ann"]
        lines += [f":peer.test 312 overseer ann {server} :x"] * bool(server)
        lines += [":peer.test 313 overseer ann :is an IRC operator"] * operator
        await self.link.send(*lines, ":peer.test 318 overseer ann :End of WHOIS")

    async def answer(self) -> str:
        """The next answer of the overseer."""
        return (await self.link.expect("^NOTICE #control :(.*)$"))[1]


@pytest.fixture
async def stage(control: FakeControl, ledger: Ledger) -> AsyncIterator[Stage]:
    """The stage."""
    async with IrcServerPeer() as peer, make_overseer(peer.address, control, ledger) as overseer:
        stage = Stage(peer)
        await stage.open()
        await overseer.wait_ready()
        yield stage


async def test_the_stage_works(stage: Stage, control: FakeControl) -> None:
    """An honest operator on the scripted server is obeyed: what follows fails for its own reason only."""
    await stage.say("!invoke worker")
    await stage.link.expect("^WHOIS :ann$")
    await stage.whois()
    assert await stage.answer() == "worker is coming to #agents"
    assert control.agents


@pytest.mark.parametrize(
    ("meanwhile", "reason"),
    [
        (":ann!~ann@host NICK :eve", "you changed your nick"),
        (":eve!~ann@host NICK :ann", "your nick has changed hands"),
        (":ann!~ann@host QUIT :bye", "you left"),
        (":ann!~ann@host PART #control", "you left"),
        (":x!x@x KICK #control ann", "you were kicked"),
    ],
)
async def test_a_nick_that_moves_before_the_proof_is_refused(
    stage: Stage, control: FakeControl, ledger: Ledger, meanwhile: str, reason: str
) -> None:
    """If anything happens to the nick between the command and the WHOIS, an operator's WHOIS proves nothing."""
    await stage.say("!invoke worker")
    await stage.link.expect("^WHOIS :ann$")
    await stage.link.send(meanwhile, ":ann!~ann@host JOIN #control")
    await stage.whois()
    assert reason in await stage.answer()
    assert control.agents == {}
    assert reason in str(ledger.last("control.refused")["reason"])


async def test_another_mask_under_the_same_nick_is_refused(stage: Stage, control: FakeControl) -> None:
    """The WHOIS must describe the very prefix that gave the command."""
    await stage.say("!invoke worker")
    await stage.link.expect("^WHOIS :ann$")
    await stage.whois(mask="ann ~boss host")
    assert "your nick has changed hands" in await stage.answer()
    assert control.agents == {}


async def test_an_operator_of_a_linked_server_is_refused(stage: Stage, control: FakeControl, ledger: Ledger) -> None:
    """A linked server can forge the operator flag, but not that somebody is on ours."""
    await stage.say("!destroy ada")
    await stage.link.expect("^WHOIS :ann$")
    await stage.whois(server="evil.example")
    assert "you are not an operator of peer.test" in await stage.answer()
    assert control.agents == {}
    assert ledger.last("control.refused")["server"] == "evil.example"


async def test_a_whois_without_a_server_proves_nothing(stage: Stage, control: FakeControl) -> None:
    """A missing 312 is not a match."""
    await stage.say("!invoke worker")
    await stage.link.expect("^WHOIS :ann$")
    await stage.whois(server="")
    assert "you are not an operator of peer.test" in await stage.answer()
    assert control.agents == {}


async def test_somebody_who_is_gone_is_refused(stage: Stage, control: FakeControl, ledger: Ledger) -> None:
    """A WHOIS of nobody ends the command without an answer."""
    await stage.say("!invoke worker")
    await stage.link.expect("^WHOIS :ann$")
    await stage.link.send(":peer.test 401 overseer ann :No such nick", ":peer.test 318 overseer ann :End")
    await stage.say("!templates")
    await stage.link.expect("^WHOIS :ann$")
    await stage.whois()
    assert await stage.answer() == "worker: does what it is told"
    assert control.agents == {}
    assert ledger.last("control.refused")["reason"] == "the sender is gone"


async def test_a_lost_connection_ends_the_command(stage: Stage, control: FakeControl, ledger: Ledger) -> None:
    """A command whose proof was cut off is not carried out."""
    await stage.say("!invoke worker")
    await stage.link.expect("^WHOIS :ann$")
    stage.link.reset()
    async with asyncio.timeout(10):
        await ledger.recorded.wait()
    assert ledger.types == ["control.refused"]
    assert control.agents == {}


async def test_a_command_that_waited_over_a_reconnect_is_refused(stage: Stage, control: FakeControl) -> None:
    """Who has a nick on the new connection may be somebody else, and nobody saw the change."""
    control.gate.clear()
    await stage.say("!invoke worker ada")
    await stage.link.expect("^WHOIS :ann$")
    await stage.whois()
    await stage.say("!invoke worker bob")
    await stage.link.send("PING :said")
    await stage.link.expect("^PONG :said$")
    stage.link.reset()
    await stage.open()
    await stage.link.expect(r"^MODE #agents :\+nt$")
    control.gate.set()
    assert await stage.answer() == "ada is coming to #agents"
    await stage.link.expect("^WHOIS :ann$")
    await stage.whois()
    assert "the connection broke" in await stage.answer()
    assert set(control.agents) == {"ada"}


async def test_without_operator_rights_it_still_serves(control: FakeControl, ledger: Ledger) -> None:
    """Where its password is refused it says so in the ledger and goes on."""
    async with IrcServerPeer() as peer, make_overseer(peer.address, control, ledger) as overseer:
        link = await peer.accept()
        await link.welcome()
        await link.expect("^OPER fireclaw :oper-pass$")
        await link.send(":peer.test 464 overseer :Invalid password")
        await overseer.wait_ready()
        assert ledger.types == ["control.powerless"]
        await link.send(":ann!~ann@host PRIVMSG overseer :!templates")
        await link.expect("^WHOIS :ann$")
        await link.send(":peer.test 311 overseer ann ~ann host * :Ann", ":peer.test 318 overseer ann :End")
        await link.expect("^NOTICE ann :worker: does what it is told$")


async def test_on_a_foreign_server_it_does_not_ask_for_rights(control: FakeControl, ledger: Ledger) -> None:
    """Without an operator name there is no OPER, and only modes that it may lack."""
    async with IrcServerPeer() as peer, make_overseer(peer.address, control, ledger, operator=False) as overseer:
        link = await peer.accept()
        await link.welcome()
        await overseer.wait_ready()
        await link.expect(r"^MODE #agents :\+nt$")
        assert not any(line.startswith("OPER") for line in link.seen)
