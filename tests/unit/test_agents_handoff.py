"""Work that agents hand to each other: a record there, a result back, once, whoever crashes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from agents_world import ALICE, BOB, Daemon, World

from fireclaw.irc.message import Kind
from fireclaw.llm.chat import ChatReply, Role, ToolCall
from fireclaw.store.handoffs import HandoffRows, HandoffState
from fireclaw.store.ledger import Ledger, read

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fireclaw.llm.chat import ChatRequest

TEMPLATE = """\
name = "boss"
description = "hands things over"
tools = ["handoff", "run_command"]
"""


def wish(to: str, task: str = "count the files") -> ChatReply:
    """Want to hand something over."""
    arguments = {"to": to, "task": task, "context": "in /data\nand below", "done_when": "there is a number"}
    return ChatReply("", (ToolCall("call", "handoff", arguments),))


async def delegate(request: ChatRequest) -> ChatReply:
    """Think like agents that hand things on: boss to bert, who does it."""
    last = request.messages[-1]
    if request.agent == "boss":
        return wish("bert") if last.role is Role.USER else ChatReply(f"boss got {last.text}")
    return ChatReply("there are 7")


@pytest.fixture
def world() -> World:
    """A world in which things are handed over."""
    world = World()
    world.think = delegate
    return world


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    """A folder with a template that can hand things over."""
    (tmp_path / "boss.toml").write_text(TEMPLATE)
    (tmp_path / "boss.md").write_text("You are {name}.")
    return tmp_path


@pytest.fixture
async def daemon(tmp_path: Path, world: World, templates: Path) -> AsyncIterator[Daemon]:
    """A daemon with two agents."""
    daemon = Daemon(tmp_path / "store.db", world, templates=templates)
    for name in ("boss", "bert"):
        await daemon.agents.invoke("boss", name, "alice")
    yield daemon
    await daemon.agents.aclose("going down")
    await daemon.end()


def answers(world: World) -> list[str]:
    """Return what was said as talk."""
    return [text for _, kind, text in world.said if kind is Kind.PRIVMSG]


async def test_the_receiver_gets_a_record_and_the_sender_the_result(daemon: Daemon, world: World) -> None:
    """The receiver's prompt holds the record and no scrollback; only the sender speaks to people."""
    daemon.hear(ALICE, "boss: how many files are there? it is a secret")
    await daemon.quiet()
    assert answers(world) == ["alice: boss got [result from bert]", "there are 7"]
    (asked,) = [request for request in world.asked if request.agent == "bert"]
    assert asked.messages[-1].text == (
        "<boss> [an agent hands you a task; your answer is its result]\nasked by: alice\ntask: count the files\n"
        'context: "in /data\\nand below"\ndone when: there is a number'
    )
    assert "secret" not in str(asked.messages)
    assert asked.person == "alice"
    (row,) = daemon.store.query("SELECT * FROM handoffs")
    assert (row["sender"], row["receiver"], row["depth"], row["state"], row["result"]) == (
        "boss", "bert", 1, "done", "there are 7",
    )  # fmt: skip


async def test_the_record_tells_of_it(daemon: Daemon, tmp_path: Path) -> None:
    """The ledger joins the sender's call, the handoff, the receiver's turn and the result by their ids."""
    ledger = Ledger(tmp_path / "ledger.jsonl", daemon.clock)
    daemon.ledger = ledger.append
    daemon.hear(ALICE, "boss: how many?")
    await daemon.quiet()
    daemon.ledger = None
    ledger.close()
    found = {entry.type: entry for entry in read(tmp_path / "ledger.jsonl") if entry.type.startswith(("hand", "tool"))}
    call, given, heard = found["tool.call"].data, found["handoff.given"].data, found["handoff.heard"].data
    ended, result = found["handoff.ended"], found["tool.result"]
    assert call["tool_call_id"] == given["handoff_id"] == ended.data["handoff_id"] == result.data["tool_call_id"]
    assert given["line_id"] == heard["line_id"] == ended.data["line_id"]
    assert (given["from"], given["to"], given["depth"]) == ("boss", "bert", 1)
    assert (ended.agent, ended.data["outcome"], ended.data["result"]) == ("bert", "done", "there are 7")
    assert result.origin == "host"


@pytest.mark.parametrize(
    ("to", "told"),
    [
        ("nobody", "error: there is no agent 'nobody'; there are: bert"),
        ("BOSS", "error: you cannot hand something to yourself; do it"),
    ],
)
async def test_a_wrong_receiver_is_refused(daemon: Daemon, world: World, to: str, told: str) -> None:
    """The model hears who could take it."""

    async def think(request: ChatRequest) -> ChatReply:
        last = request.messages[-1]
        return wish(to) if last.role is Role.USER else ChatReply(last.text)

    world.think = think
    daemon.hear(ALICE, "boss: go")
    await daemon.quiet()
    assert answers(world) == [f"alice: {told}"]
    assert daemon.store.query("SELECT * FROM handoffs") == []


async def test_nobody_hands_on_what_went_through_two(daemon: Daemon, world: World) -> None:
    """The third agent in a row does it itself; nobody hands to one who waits for it."""
    for name in ("carl", "dora"):
        await daemon.agents.invoke("boss", name, "alice")
    chain = {"boss": "bert", "bert": "carl", "carl": "dora"}

    async def think(request: ChatRequest) -> ChatReply:
        last = request.messages[-1]
        if last.role is Role.USER:
            return wish(chain[request.agent]) if request.agent in chain else ChatReply("I am dora")
        return ChatReply(f"{request.agent}: {last.text}")

    world.think = think
    daemon.hear(ALICE, "boss: go")
    await daemon.quiet()
    assert "carl: error: this was handed to you through others already; do it yourself" in answers(world)[-1]
    chain["bert"] = "boss"
    world.said.clear()
    daemon.hear(ALICE, "boss: go")
    await daemon.quiet()
    assert "bert: error: boss waits for you; do it yourself" in answers(world)[-1]


async def test_two_that_hand_to_each_other_do_not_wait_for_ever(daemon: Daemon, world: World) -> None:
    """Of two agents with work for each other one is refused, and both answer."""

    async def think(request: ChatRequest) -> ChatReply:
        last = request.messages[-1]
        if "[an agent hands you" in last.text:
            return ChatReply(f"{request.agent} did it")
        if last.role is Role.USER:
            return wish("bert" if request.agent == "boss" else "boss")
        return ChatReply(f"{request.agent} got {last.text}")

    world.think = think
    daemon.hear(ALICE, "boss: go")
    daemon.hear(BOB, "bert: go")
    await daemon.quiet()
    said = " ".join(answers(world))
    assert "waits for you; do it yourself" in said
    assert said.count(" got ") == 2


async def test_a_receiver_that_cannot_is_told(daemon: Daemon, world: World) -> None:
    """Stopping, destroying: the sender hears why there is no result."""
    begun = asyncio.Event()

    async def think(request: ChatRequest) -> ChatReply:
        if request.agent == "bert":
            begun.set()
            await asyncio.Event().wait()
        last = request.messages[-1]
        return wish("bert") if last.role is Role.USER else ChatReply(last.text)

    world.think = think
    daemon.hear(ALICE, "boss: go")
    await begun.wait()
    await daemon.agents.destroy("bert", "carol")
    await daemon.quiet()
    assert answers(world) == ["alice: error: bert did not do it: stopped: I am being destroyed, as carol wants it"]
    assert HandoffRows(daemon.store).open() == []


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
async def test_a_kill_at_any_commit_hands_over_once(
    tmp_path: Path, world: World, templates: Path, before: bool
) -> None:
    """Whatever the moment of the kill: one handoff, one result, one answer or one honest notice."""
    commits = kill_at = 0
    while kill_at <= commits:
        path = tmp_path / f"{before}-{kill_at}.db"
        world.said.clear()
        first = Daemon(path, world, kill_at, before=before, templates=templates)
        for name in ("boss", "bert"):
            await first.agents.invoke("boss", name, "alice")
        first.store.armed = True
        heard = True
        try:
            first.hear(ALICE, "boss: how many?")
        except BaseException:  # noqa: BLE001 (the daemon was killed)
            heard = not (before and kill_at == 1)
        await first.quiet()
        commits = commits or first.store.commits
        await first.end()
        second = Daemon(path, world, templates=templates)
        await second.agents.recover()
        await second.quiet()
        rows = second.store.query("SELECT state, result FROM handoffs")
        assert [tuple(row) for row in rows] == ([(HandoffState.DONE, "there are 7")] if heard else []), kill_at
        seen = [text for text in answers(world) if text == "there are 7"]
        notices = [text for text in answers(world) if "end of my last answer may be missing" in text]
        assert len(seen) <= 1
        assert bool(seen or notices) == heard, (kill_at, world.said)
        await second.agents.aclose("restarting")
        await second.end()
        kill_at += 1
    assert commits >= 9
