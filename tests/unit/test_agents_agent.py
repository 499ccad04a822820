"""Agents at work among fakes: what people see, what the model is told, what the record holds."""

# ruff: noqa: ARG001 (the stand-ins take what the ports hand them)

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from agents_world import ALICE, BOB, Daemon, World, output, use_one_tool

from fireclaw.agents import engine
from fireclaw.errors import ChannelLostError, ConflictError, InvalidError, ModelError, NotFoundError, SetupError
from fireclaw.irc.message import Kind
from fireclaw.llm.chat import ChatReply, Role
from fireclaw.store.agents import AgentRows, AgentState
from fireclaw.store.ledger import Ledger, read, verify

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from pathlib import Path

    from fireclaw.agents.ports import CommandResult
    from fireclaw.llm.chat import ChatRequest


@pytest.fixture
def world() -> World:
    """A world."""
    return World()


@pytest.fixture
async def daemon(tmp_path: Path, world: World) -> AsyncIterator[Daemon]:
    """A daemon in it, without agents."""
    daemon = Daemon(tmp_path / "store.db", world)
    yield daemon
    await daemon.agents.aclose("going down")
    await daemon.end()


def answers(world: World) -> list[str]:
    """Return what was said as talk."""
    return [text for _, kind, text in world.said if kind is Kind.PRIVMSG]


async def say_fine(request: ChatRequest) -> ChatReply:
    """Think nothing and say so."""
    return ChatReply("fine")


async def test_a_conversation_goes_on(daemon: Daemon, world: World) -> None:
    """The next question in the channel finds the last one, with its call and answer, before it in the prompt."""
    await daemon.agents.invoke("worker", None, "alice")
    daemon.hear(ALICE, "worker: first")
    await daemon.quiet()
    daemon.hear(BOB, "worker: second")
    await daemon.quiet()
    messages = world.asked[2].messages
    start = next(number for number, message in enumerate(messages) if message.text == "<alice> first")
    assert [(message.role, message.text) for message in messages[start:]] == [
        (Role.USER, "<alice> first"),
        (Role.ASSISTANT, ""),
        (Role.TOOL, "output of first"),
        (Role.ASSISTANT, "the answer to first is:\nfirst: output of first"),
        (Role.USER, "<bob> second"),
    ]
    assert messages[: start - 1] == world.asked[0].messages[: start - 1], "the prefix of all prompts is the same"


async def test_a_private_talk_stays_private(daemon: Daemon, world: World) -> None:
    """What was said in private is in no prompt for the channel, and the answer goes to who asked."""
    await daemon.agents.invoke("worker", None, "alice")
    daemon.hear(ALICE, "the password is swordfish", target="worker")
    await daemon.quiet()
    assert {target for target, kind, _ in world.said if kind is Kind.PRIVMSG} == {"alice"}
    daemon.hear(BOB, "worker: what did she say?")
    await daemon.quiet()
    assert "swordfish" not in str(world.asked[-1].messages)


async def test_the_model_hears_that_the_machine_failed(daemon: Daemon, world: World) -> None:
    """A lost machine is told on the tool channel, and asked for anew by the next command."""
    made = []

    async def break_once(command: str) -> CommandResult:
        made.append(sorted(world.machines))
        world.machines.clear()
        if len(made) == 1:
            raise ChannelLostError("the machine went away")
        return output(b"fine")

    world.work = break_once
    await daemon.agents.invoke("worker", None, "alice")
    for text in ("one", "two"):
        daemon.hear(ALICE, f"worker: {text}")
        await daemon.quiet()
    lost = "the machine was lost with all but its workspace: the machine went away (the next command gets a new one)"
    assert answers(world)[1] == f"one: error: {lost}"
    assert answers(world)[3] == "two: fine"
    assert made == [["worker"], ["worker"]]


async def test_a_failing_model_and_a_mistake_of_ours_are_said(daemon: Daemon, world: World) -> None:
    """Whatever ends a turn, whoever asked hears the reason, and the agent goes on."""
    errors: list[Exception] = [ModelError("the model server does not answer", kind="unreachable"), KeyError("x")]

    async def fail(request: ChatRequest) -> ChatReply:
        raise errors.pop(0)

    world.think = fail
    await daemon.agents.invoke("worker", None, "alice")
    daemon.hear(ALICE, "worker: one")
    await daemon.quiet()
    daemon.hear(ALICE, "worker: two")
    await daemon.quiet()
    world.think = say_fine
    daemon.hear(ALICE, "worker: three")
    await daemon.quiet()
    assert answers(world) == [
        "alice: I cannot answer: the model server does not answer",
        "alice: something broke in me: KeyError: 'x'",
        "alice: fine",
    ]


async def test_stop_cancels_what_is_on_its_way(daemon: Daemon, world: World) -> None:
    """A model call that nobody waits for any more is cancelled, not left to run."""
    begun, ended = asyncio.Event(), asyncio.Event()

    async def think_long(request: ChatRequest) -> ChatReply:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    world.think = think_long
    await daemon.agents.invoke("worker", None, "alice")
    daemon.hear(ALICE, "worker: think")
    await begun.wait()
    assert daemon.agents.list()[0].state == "working"
    daemon.hear(ALICE, "worker: stop")
    await ended.wait()
    await daemon.quiet()
    assert answers(world) == ["alice: stopped"]
    assert daemon.agents.list()[0].state == "idle"


async def test_a_long_turn_gives_signs_of_life(daemon: Daemon, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """After some seconds, here made short, an ACTION says what the agent is at."""
    enough = asyncio.Event()
    daemon.clock = asyncio.get_running_loop().time
    monkeypatch.setattr(engine, "FIRST_SIGN_S", 0.01)

    async def wait(request: ChatRequest) -> ChatReply:
        await enough.wait()
        return ChatReply("fine")

    world.think = wait
    await daemon.agents.invoke("worker", None, "alice")
    daemon.hear(ALICE, "worker: think")
    await world.until(lambda: world.said)
    enough.set()
    await daemon.quiet()
    assert world.said == [
        ("#agents", Kind.ACTION, "is thinking, 0 s"),
        ("#agents", Kind.PRIVMSG, "alice: fine"),
    ]


async def test_a_broken_connection_is_told_once(daemon: Daemon, world: World) -> None:
    """Lines that were never confirmed are not repeated; one line says that the end may be missing."""
    world.deaf = True
    await daemon.agents.invoke("worker", None, "alice")
    daemon.hear(ALICE, "worker: first")
    await world.until(lambda: len(answers(world)) == 3)
    world.deaf = False
    await daemon.quiet()
    assert answers(world) == [
        "alice: the answer to first is:",
        "first: output of first",
        "alice: the connection broke at 09:30:00 UTC; the end of my last answer may be missing",
    ]


async def test_a_line_after_closing_time_is_kept_for_the_next_daemon(tmp_path: Path, world: World) -> None:
    """What is heard while a daemon leaves is committed but not begun; what was said is confirmed before it goes."""
    first = Daemon(tmp_path / "store.db", world)
    world.think = say_fine
    await first.agents.invoke("worker", None, "alice")
    first.hear(ALICE, "worker: one")
    await world.until(lambda: answers(world))
    await first.agents.aclose("restarting")
    assert first.store.query("SELECT state FROM outbox")[0]["state"] == "confirmed"
    first.hear(ALICE, "worker: two")
    await asyncio.sleep(0)
    assert len(world.asked) == 1
    await first.end()
    second = Daemon(tmp_path / "store.db", world)
    await second.agents.recover()
    await second.quiet()
    assert answers(world) == ["alice: fine", "alice: fine"]
    await second.agents.aclose("going down")
    await second.end()


async def test_the_record_joins_line_to_answer(daemon: Daemon, world: World, tmp_path: Path) -> None:
    """From a line in the ledger the ids lead to its turn, model call, tool call, command and the words said."""
    ledger = Ledger(tmp_path / "ledger.jsonl", daemon.clock)
    daemon.ledger = ledger.append
    info = await daemon.agents.invoke("worker", None, "alice")
    daemon.hear(ALICE, "worker: first")
    await daemon.quiet()
    await daemon.agents.destroy("worker", "bob")
    ledger.close()
    assert verify(tmp_path / "ledger.jsonl").ok
    entries = list(read(tmp_path / "ledger.jsonl"))
    assert [entry.type for entry in entries] == [
        "agent.invoked",
        "irc.line",
        "turn.started",
        "turn.step",
        "tool.call",
        "tool.result",
        "turn.step",
        "turn.done",
        "irc.said",
        "irc.said",
        "agent.destroyed",
    ]
    assert {entry.agent for entry in entries} == {"worker"}
    invoked, line, started, step, called, result, _, done, said, _, destroyed = (entry.data for entry in entries)
    assert line["sender"] == "alice"
    assert line["line_id"] == started["line_id"] == done["line_id"] == said["line_id"]
    assert started["turn_id"] == step["turn_id"] == called["turn_id"] == result["turn_id"] == done["turn_id"]
    assert step["call_id"] == called["call_id"] == result["call_id"] == world.asked[0].call_id
    assert called["tool_call_id"] == result["tool_call_id"]
    assert called["gen_ai.tool.call.arguments"] == '{"command": "first"}'
    assert result["command_id"] == "command-1"
    assert result["gen_ai.tool.call.result"] == "output of first"
    assert [entry.origin for entry in entries].count("guest") == 1
    assert entries[5].origin == "guest"
    assert entries[5].machine == "m-1"
    assert str(said["message_id"]).startswith(str(done["turn_id"]))
    assert (invoked["gen_ai.agent.id"], destroyed["by"]) == (info.agent_id, "bob")


async def test_what_cannot_be_recorded_is_not_done(daemon: Daemon, world: World) -> None:
    """With a ledger that cannot be written the agent asks no model and says why it stands still."""

    def refuse(type: str, data: Mapping[str, object], **more: str | None) -> None:  # noqa: A002 (the port's name)
        raise SetupError("cannot write the ledger: No space left on device")

    await daemon.agents.invoke("worker", None, "alice")
    daemon.ledger = refuse
    daemon.hear(ALICE, "worker: first")
    await asyncio.sleep(0)
    assert world.asked == []
    assert daemon.agents.list()[0].state == "failed: cannot write the ledger: No space left on device"


async def test_agents_get_free_names(daemon: Daemon) -> None:
    """Without a name the template's is taken, with a number where it must be; with one, it is kept as written."""
    names = [(await daemon.agents.invoke("worker", name, "alice")).name for name in (None, None, "Bert", None)]
    assert names == ["worker", "worker2", "Bert", "worker3"]
    assert [info.name for info in daemon.agents.list()] == names
    assert daemon.agents.is_ours("WORKER2")
    assert not daemon.agents.is_ours("alice")


@pytest.mark.parametrize(
    ("template", "name", "error", "message"),
    [
        ("wroker", None, NotFoundError, "did you mean 'worker'"),
        ("worker", "Worker", ConflictError, "there is an agent named 'Worker' already"),
        ("worker", "overseer", InvalidError, "reserved"),
        ("worker", "2fast", InvalidError, "cannot be the name"),
        ("worker", "a b", InvalidError, "cannot be the name"),
        ("worker", "../x", InvalidError, "cannot be the name"),
        ("worker", "x" * 25, InvalidError, "24 at most"),
        ("worker", "", InvalidError, "cannot be the name"),
    ],
)
async def test_a_wrong_invocation_is_refused(
    daemon: Daemon, template: str, name: str | None, error: type[Exception], message: str
) -> None:
    """An unknown template, a taken, reserved or impossible name: said with the reason, and nothing is made."""
    await daemon.agents.invoke("worker", None, "alice")
    with pytest.raises(error, match=message):
        await daemon.agents.invoke(template, name, "alice")
    assert len(daemon.agents.list()) == 1


async def test_an_agent_without_a_seat_is_taken_back(
    daemon: Daemon, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When IRC cannot be reached, the invocation fails with the reason and leaves neither machine nor row."""

    async def refuse(nick: str, on_message: object) -> None:
        raise SetupError("the IRC server is not running")

    with monkeypatch.context() as patch:
        patch.setattr(daemon.office, "connect", refuse)
        with pytest.raises(SetupError, match="not running"):
            await daemon.agents.invoke("worker", None, "alice")
    assert world.machines == set()
    assert daemon.store.query("SELECT * FROM agents") == []
    assert (await daemon.agents.invoke("worker", None, "alice")).name == "worker"


async def test_destroying_an_agent_leaves_nothing(daemon: Daemon, world: World) -> None:
    """Whoever waits is told, the seat and the machine go, and so does all that it was told."""

    async def think_long(request: ChatRequest) -> ChatReply:
        await asyncio.Event().wait()
        raise AssertionError

    world.think = think_long
    await daemon.agents.invoke("worker", None, "alice")
    daemon.hear(ALICE, "worker: first")
    await asyncio.sleep(0)
    assert world.machines == {"worker"}
    await daemon.agents.destroy("WORKER", "bob")
    assert world.said == [
        ("#agents", Kind.PRIVMSG, "alice: stopped: I am being destroyed, as bob wants it"),
        ("", Kind.NOTICE, "QUIT destroyed, as bob wants it"),
    ]
    assert world.machines == set()
    for table in ("agents", "inbox", "turns", "steps", "outbox"):
        assert daemon.store.query(f"SELECT * FROM {table}") == []
    with pytest.raises(NotFoundError, match="there is no agent yet"):
        await daemon.agents.destroy("worker", "bob")
    assert not daemon.agents.is_ours("worker")


async def test_a_new_daemon_brings_agents_back(tmp_path: Path, world: World) -> None:
    """Agents return with their conversation; a destruction that a crash interrupted is finished."""
    first = Daemon(tmp_path / "store.db", world)
    for _ in range(2):
        await first.agents.invoke("worker", None, "alice")
    first.hear(ALICE, "worker: first")
    await first.quiet()
    await first.agents.aclose("restarting")
    assert first.agents.list() == []
    rows = AgentRows(first.store, first.host)
    (worker2,) = [row for row in rows.claim() if row.name == "worker2"]
    rows.set_state(worker2.agent_id, AgentState.DESTROYING)
    await first.end()
    second = Daemon(tmp_path / "store.db", world)
    await second.agents.recover()
    assert [info.name for info in second.agents.list()] == ["worker"]
    assert world.machines == {"worker"}
    second.hear(BOB, "worker: second")
    await second.quiet()
    assert "<alice> first" in [message.text for message in world.asked[-1].messages]
    await second.agents.aclose("going down")
    await second.end()


async def test_the_machine_may_wait_until_it_is_needed(tmp_path: Path, world: World) -> None:
    """With ``machine = "on-first-use"`` there is none before the first command."""
    (tmp_path / "worker.toml").write_text(
        'name = "worker"\ndescription = "x"\ntools = ["run_command"]\nimage = "debian"\n'
    )
    (tmp_path / "worker.md").write_text("You are {name}.")
    daemon = Daemon(tmp_path / "store.db", world, templates=tmp_path)
    world.think = say_fine
    info = await daemon.agents.invoke("worker", None, "alice")
    daemon.hear(ALICE, "worker: hello")
    await daemon.quiet()
    assert info.machine is None
    assert world.machines == set()
    world.think = use_one_tool
    daemon.hear(ALICE, "worker: work")
    await daemon.quiet()
    assert world.machines == {"worker"}
    assert daemon.agents.list()[0].machine == "m-1"
    await daemon.agents.aclose("going down")
    await daemon.end()
