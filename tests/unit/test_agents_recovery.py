"""Whatever the moment at which the daemon is killed: each question gets one answer or one honest notice, nothing twice.

The world outside (IRC, the model, the machine) outlives the daemons. A daemon is killed at its k-th commit, for every
k, right before or right after it; another one then goes on from the same file.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from agents_world import ALICE, BOB, Daemon, KilledError, MortalStore, World

from fireclaw.irc.message import Kind
from fireclaw.store import agents as rows
from fireclaw.store.hosts import Host

if TYPE_CHECKING:
    from pathlib import Path

    from fireclaw.irc.message import Prefix


def ask(daemon: Daemon, sender: Prefix, text: str) -> bool:
    """Ask in the channel; return whether the daemon lived to read it."""
    if daemon.store.is_dead:
        return False
    try:
        daemon.hear(sender, f"worker: {text}")
    except KilledError:
        return daemon.store.commits > 0
    return True


async def live(path: Path, world: World, kill_at: int, *, before: bool) -> tuple[int, list[str]]:
    """Invoke an agent and ask it two questions at once, in a daemon that is killed at that commit.

    Returns:
        How many commits there were, and the questions that were heard.
    """
    daemon = Daemon(path, world, kill_at, before=before)
    await daemon.agents.invoke("worker", None, "alice")
    daemon.store.armed = True
    questions = [(ALICE, "first"), (BOB, "second")]
    heard = [text for sender, text in questions if ask(daemon, sender, text)]
    if before and kill_at <= 2:
        # The commit that takes a line in is the fatal one and was not made: IRC has the line, we never had it.
        heard = heard[: kill_at - 1]
    await daemon.quiet()
    await daemon.end()
    return daemon.store.commits, heard


async def go_on(path: Path, world: World) -> None:
    """Start a daemon that lives until all is done."""
    daemon = Daemon(path, world)
    await daemon.agents.recover()
    await daemon.quiet()
    await daemon.agents.aclose("restarting")
    await daemon.end()


def judge(world: World, heard: list[str]) -> None:
    """Check what people saw."""
    texts = [text for _, kind, text in world.said if kind is Kind.PRIVMSG]
    assert max(Counter(texts).values(), default=0) <= 1, "a line appeared twice"
    for name, asked in (("alice", "first"), ("bob", "second")):
        answer = [f"{name}: the answer to {asked} is:", f"{asked}: "]
        seen = [text for text in texts if text.startswith(tuple(answer))]
        notices = [text for text in texts if text.startswith(f"{name}: I was restarted")]
        if asked not in heard:
            assert not seen
            assert not notices
        elif len(seen) == 2:
            assert len(notices) <= 1
        else:
            assert len(notices) == 1, f"{asked} was lost in silence"
    assert max(Counter(world.ran).values(), default=0) <= 1, "a command ran twice"


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    """Where the store is."""
    return tmp_path / "store.db"


async def test_two_questions_are_answered(store_path: Path) -> None:
    """Without a crash both are answered in full, each once, the second after it was acknowledged."""
    world = World()
    commits, heard = await live(store_path, world, 0, before=False)
    assert heard == ["first", "second"]
    assert commits > 10
    assert world.ran == ["first", "second"]
    assert len(world.asked) == 4
    assert world.said[:5] == [
        ("#agents", Kind.NOTICE, "bob: noted, you are next; I am still at work for alice"),
        ("#agents", Kind.PRIVMSG, "alice: the answer to first is:"),
        ("#agents", Kind.PRIVMSG, "first: output of first"),
        ("#agents", Kind.PRIVMSG, "bob: the answer to second is:"),
        ("#agents", Kind.PRIVMSG, "second: output of second"),
    ]
    judge(world, heard)


COMMITS = 19  # of the story above; the last test of this module holds it to that


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("kill_at", range(1, COMMITS + 1))
async def test_a_kill_at_any_commit_loses_and_repeats_nothing(store_path: Path, kill_at: int, before: bool) -> None:
    """A daemon killed at any commit leaves what the next one needs to answer each question once, or say it cannot."""
    world = World()
    _, heard = await live(store_path, world, kill_at, before=before)
    await go_on(store_path, world)
    judge(world, heard)


@pytest.mark.parametrize("kill_at", range(1, COMMITS + 1, 3))
async def test_a_second_kill_changes_nothing_of_it(store_path: Path, kill_at: int) -> None:
    """A daemon that is killed while it recovers leaves no less than the one before."""
    for second in range(1, 6):
        world = World()
        path = store_path.with_name(f"{second}.db")
        _, heard = await live(path, world, kill_at, before=False)
        daemon = Daemon(path, world, second)
        daemon.store.armed = True
        try:
            await daemon.agents.recover()
        except KilledError:
            pass
        else:
            await daemon.quiet()
        await daemon.end()
        await go_on(path, world)
        texts = [text for _, kind, text in world.said if kind is Kind.PRIVMSG]
        for name, asked in (("alice", "first"), ("bob", "second")):
            answers = [text for text in texts if text == f"{name}: the answer to {asked} is:"]
            notices = [text for text in texts if text.startswith(f"{name}: I was restarted")]
            assert len(answers) <= 1
            assert (asked in heard) == bool(answers or notices)


async def test_the_story_has_as_many_commits_as_are_tried(store_path: Path) -> None:
    """The parametrised kills reach the last commit of the story."""
    commits, _ = await live(store_path, World(), 0, before=False)
    assert commits == COMMITS


async def test_a_second_owner_makes_the_first_stop(store_path: Path) -> None:
    """Once another daemon has claimed the agent, the first commits, asks and says nothing for it any more."""
    world = World()
    first = Daemon(store_path, world)
    await first.agents.invoke("worker", None, "alice")
    second = Daemon(store_path, world)
    await second.agents.recover()
    assert ask(first, ALICE, "first")
    (info,) = first.agents.list()
    assert info.state.startswith("failed: ")
    assert "another daemon" in info.state
    assert ask(second, BOB, "second")
    await second.quiet()
    assert world.ran == ["second"]
    assert [text for _, _, text in world.said] == ["bob: the answer to second is:", "second: output of second"]
    for daemon in (first, second):
        await daemon.agents.aclose("restarting")
    second.store.close()
    await first.end()


async def test_an_older_epoch_claims_nothing(store_path: Path) -> None:
    """A daemon that was thought dead and comes back does not take agents from its successor."""
    store = MortalStore(store_path, World())
    row = rows.AgentRow("a", "worker", "worker", rows.AgentState.LIVE, None, "alice", "h", 2, 0.0)
    rows.AgentRows(store, Host("h", 2)).add(row)
    assert rows.AgentRows(store, Host("h", 1)).claim() == []
    assert rows.AgentRows(store, Host("other", 9)).claim() == []
    with pytest.raises(rows.NotOursError):
        rows.Notebook(store, Host("h", 1), "a").commit([])
    store.close()
