"""What agents remember: within its limit, where it was learnt, through restarts, and never lost on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from agents_world import ALICE, BOB, Daemon, World

from fireclaw.agents.memory import MAX_CHARS, SHARED, Memory, NotSavedError, scope_of
from fireclaw.errors import ConflictError, InvalidError, NotFoundError
from fireclaw.llm.chat import ChatReply, Role, ToolCall
from fireclaw.store.agents import AgentRows, AgentState
from fireclaw.store.database import Database
from fireclaw.store.ledger import Ledger, read
from fireclaw.store.memory import KEPT, MemoryRows

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from fireclaw.llm.chat import ChatRequest

DM = "alice!~a@localhost"


@pytest.fixture
def rows(tmp_path: Path) -> Iterator[MemoryRows]:
    """A store's memories."""
    database = Database(tmp_path / "store.db")
    yield MemoryRows(database)
    database.close()


@pytest.fixture
def memory(rows: MemoryRows) -> Memory:
    """An agent's memory."""
    return Memory(rows, "ada", lambda: 86400.0)


def save(memory: Memory, text: str, replaces: str = "", conversation: str = "#agents") -> str:
    """Save as an agent does; return what the document says then."""
    row = memory.saved(conversation, text, replaces, author="ada", reason="asked by alice")
    memory._rows.add(row)
    return row.content


def test_lines_are_added_replaced_and_forgotten(memory: Memory) -> None:
    """A save adds a line, or puts its text in the place of another, or of everything."""
    assert save(memory, "one") == "one"
    assert save(memory, "two") == "one\ntwo"
    assert save(memory, "zwei", "two") == "one\nzwei"
    assert save(memory, "", "one\n") == "zwei"
    assert save(memory, "new", "*") == "new"
    assert memory.text(SHARED) == "new"
    assert [row.version for row in memory.log(SHARED)] == [5, 4, 3, 2, 1]


@pytest.mark.parametrize(
    ("text", "replaces", "told"),
    [
        ("x" * 1999, "", "your memory would have 2007 characters, and 2000 is the limit.*replaces.*It says now:\none"),
        ("new", "three", 'the text in "replaces" is not in your memory. It says now:\none\ntwo'),
        ("new", "o", "stands more than once in your memory"),
        ("two", "", "this stands in your memory already: two"),
        ("two", "two", "that changes nothing"),
        ("", "", 'save_memory needs a "text"'),
    ],
)
def test_a_save_that_cannot_be_shows_what_there_is(memory: Memory, text: str, replaces: str, told: str) -> None:
    """Nothing is changed, and the model sees what it could save in place of what."""
    save(memory, "one\ntwo", "*")
    with pytest.raises(NotSavedError, match="(?s)" + told):
        save(memory, text, replaces)
    assert memory.text(SHARED) == "one\ntwo"


def test_a_full_memory_can_be_shortened(memory: Memory) -> None:
    """At its limit a memory takes no more, but a shorter text for all of it."""
    assert len(save(memory, "x" * MAX_CHARS)) == MAX_CHARS
    with pytest.raises(NotSavedError, match="not saved"):
        save(memory, "y")
    assert save(memory, "short", "*") == "short"


def test_what_was_learnt_in_private_stays_there(memory: Memory) -> None:
    """A private talk sees its own and the shared memory, a channel only the shared one; so does the search."""
    save(memory, "the build host is b1")
    save(memory, "the password is swordfish", conversation=DM)
    assert "swordfish" in str(memory.messages(DM))
    assert "b1" in str(memory.messages(DM))
    assert "swordfish" not in str(memory.messages("#agents"))
    assert "swordfish" not in str(memory.messages("bob!~b@localhost"))
    assert "swordfish" in memory.found(DM, "password")
    assert "swordfish" not in memory.found("#agents", "password")
    assert memory.scopes() == ["", DM]


@pytest.mark.parametrize(
    ("conversation", "scope"),
    [("#agents", ""), ("&x", ""), (DM, DM), (f"{DM}/handoff/1", DM), ("#agents/handoff/1", "")],
)
def test_a_handoff_remembers_where_it_came_from(conversation: str, scope: str) -> None:
    """What was handed over from a private talk is as private as that."""
    assert scope_of(conversation) == scope


def test_older_versions_are_found(memory: Memory) -> None:
    """A search finds what is not remembered any more, says so, and puts the best first."""
    save(memory, "the build host is b1")
    save(memory, "the build host is b2", "*")
    assert memory.found("#agents", "build HOST b1") == (
        "until after 1970-01-02: the build host is b1\nnow: the build host is b2"
    )
    assert memory.found("#agents", "zebra") == "nothing in memory, now or earlier, has 'zebra'"


def test_people_write_compare_and_restore(memory: Memory) -> None:
    """A person's change is a version like any other, refused if somebody else's came first."""
    save(memory, "one")
    row = memory.write(SHARED, "two\n", by="alice", reason="edited", base=1)
    assert (row.version, row.content, row.author) == (2, "two", "alice")
    with pytest.raises(ConflictError, match="changed meanwhile"):
        memory.write(SHARED, "three", by="bob", reason="edited", base=1)
    with pytest.raises(ConflictError, match="says that already"):
        memory.write(SHARED, "two", by="bob", reason="edited")
    with pytest.raises(InvalidError, match="2000 characters at most"):
        memory.write(SHARED, "x" * 2001, by="bob", reason="edited")
    assert memory.diff(SHARED, 1, 2).splitlines()[2:] == ["@@ -1 +1 @@", "-one", "+two"]
    assert memory.restore(SHARED, 1, by="bob").reason == "restored version 1"
    assert memory.text(SHARED) == "one"
    with pytest.raises(NotFoundError, match="no version 9"):
        memory.restore(SHARED, 9, by="bob")


def test_old_versions_go(rows: MemoryRows, memory: Memory) -> None:
    """The history is bounded; what holds is always there."""
    for number in range(KEPT + 5):
        save(memory, str(number), "*")
    assert len(rows.history("ada", SHARED)) == KEPT
    assert memory.text(SHARED) == str(KEPT + 4)
    with pytest.raises(ConflictError):
        rows.add(rows.history("ada", SHARED)[0])


# Agents that remember


async def remember(request: ChatRequest) -> ChatReply:
    """Think like a model that saves what it is told, then says so."""
    last = request.messages[-1]
    if last.role is Role.USER:
        return ChatReply("", (ToolCall("call", "save_memory", {"text": last.text.partition("> ")[2]}),))
    return ChatReply(f"it says: {last.text}")


@pytest.fixture
def world() -> World:
    """A world whose model remembers everything."""
    world = World()
    world.think = remember
    return world


@pytest.fixture
async def daemon(tmp_path: Path, world: World) -> AsyncIterator[Daemon]:
    """A daemon in it with an agent."""
    daemon = Daemon(tmp_path / "store.db", world)
    await daemon.agents.invoke("worker", None, "alice")
    yield daemon
    await daemon.agents.aclose("going down")
    await daemon.end()


async def test_what_was_saved_is_in_the_next_prompt(daemon: Daemon, world: World) -> None:
    """It stands behind the fixed part, which stays the same byte for byte, and no machine was needed for it."""
    daemon.hear(ALICE, "worker: the build host is b1")
    await daemon.quiet()
    assert world.ran == []
    daemon.hear(BOB, "worker: what next?")
    await daemon.quiet()
    first, second = world.asked[0].messages, world.asked[-1].messages
    fixed = first[:-1]
    assert second[: len(fixed)] == fixed
    assert second[len(fixed)].role is Role.USER
    assert second[len(fixed)].text.endswith("the build host is b1\nwhat next?")
    (row,) = daemon.agents.memory("worker").log(SHARED)[-1:]
    assert (row.author, row.reason.partition(" (")[0]) == ("worker", "asked by alice")


async def test_the_record_tells_who_wrote_what(daemon: Daemon, tmp_path: Path) -> None:
    """What an agent saves and what a person writes are events with author, reason and the whole text."""
    ledger = Ledger(tmp_path / "ledger.jsonl", daemon.clock)
    daemon.ledger = ledger.append
    daemon.hear(ALICE, "worker: one")
    await daemon.quiet()
    daemon.agents.memory("worker").write(SHARED, "two", by="carol", reason="edited")
    daemon.ledger = None
    ledger.close()
    saved = [entry.data for entry in read(tmp_path / "ledger.jsonl") if entry.type == "memory.saved"]
    assert [(data["author"], data["version"], data["content"]) for data in saved] == [
        ("worker", 1, "one"),
        ("carol", 2, "two"),
    ]


async def test_memory_outlives_the_agent_where_it_is_kept(daemon: Daemon) -> None:
    """With keep an agent that is invoked again under the name knows it, without it is gone for good."""
    daemon.hear(ALICE, "worker: one")
    await daemon.quiet()
    await daemon.agents.destroy("worker", "alice", keep=True)
    assert daemon.agents.memory("WORKER").text(SHARED) == "one"
    await daemon.agents.invoke("worker", None, "alice")
    daemon.hear(ALICE, "worker: two")
    await daemon.quiet()
    assert daemon.agents.memory("worker").text(SHARED) == "one\ntwo"
    await daemon.agents.destroy("worker", "alice")
    with pytest.raises(NotFoundError):
        daemon.agents.memory("worker")


@pytest.mark.parametrize(("state", "kept"), [(AgentState.RETIRING, "one"), (AgentState.DESTROYING, "")])
async def test_a_crash_in_a_destruction_changes_nothing_of_the_wish(
    daemon: Daemon, tmp_path: Path, world: World, state: AgentState, kept: str
) -> None:
    """The next daemon finishes it, and keeps the memory or removes it as the operator said."""
    daemon.hear(ALICE, "worker: one")
    await daemon.quiet()
    rows = AgentRows(daemon.store, daemon.host)
    (row,) = rows.claim()
    rows.set_state(row.agent_id, state)
    await daemon.agents.aclose("restarting")
    await daemon.end()
    second = Daemon(tmp_path / "store.db", world)
    await second.agents.recover()
    assert second.agents.list() == []
    assert second.agents._memory_of("worker").text(SHARED) == kept
    assert world.workspaces == ({"worker"} if kept else set())
    await second.agents.aclose("going down")
    await second.end()


async def test_a_private_save_is_not_in_a_channels_prompt(daemon: Daemon, world: World) -> None:
    """What an agent saved in a private talk comes back there and nowhere else."""
    daemon.hear(ALICE, "the password is swordfish", target="worker")
    await daemon.quiet()
    daemon.hear(BOB, "worker: hello")
    await daemon.quiet()
    assert "swordfish" not in str(world.asked[-1].messages)
    daemon.hear(ALICE, "hello", target="worker")
    await daemon.quiet()
    (kept,) = [
        message.text for message in world.asked[-1].messages if "MEMORY" in message.text or "[what" in message.text
    ]
    assert "[what you saved in this private talk; say it nowhere else]\nthe password is swordfish" in kept


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
async def test_a_kill_at_any_commit_saves_once(tmp_path: Path, world: World, before: bool) -> None:
    """Whatever the moment of the kill, the next daemon finds it saved once or saves it, and says so once."""
    commits = 0
    kill_at = 0
    while kill_at <= commits:
        path = tmp_path / f"{before}-{kill_at}.db"
        world.said.clear()
        first = Daemon(path, world, kill_at, before=before)
        await first.agents.invoke("worker", None, "alice")
        first.store.armed = True
        heard = True
        try:
            first.hear(ALICE, "worker: the build host is b1")
        except BaseException:  # noqa: BLE001 (the daemon was killed)
            heard = first.store.commits > 0 and not (before and kill_at == 1)
        await first.quiet()
        commits = commits or first.store.commits
        await first.end()
        second = Daemon(path, world)
        await second.agents.recover()
        await second.quiet()
        texts = [row.content for row in second.agents.memory("worker").log(SHARED)]
        assert texts == (["the build host is b1"] if heard else []), kill_at
        answers = [text for _, _, text in world.said if "it says: saved" in text]
        assert len(answers) <= 1
        await second.agents.aclose("restarting")
        await second.end()
        kill_at += 1
    assert commits >= 6
