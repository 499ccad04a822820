"""Commands that wait for an operator: asked once, answered by code, found again after a crash, never run unasked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from agents_world import ALICE, NOW, Daemon, World

from fireclaw.errors import ConflictError, NotFoundError
from fireclaw.irc.message import Kind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

TEMPLATE = """\
name = "careful"
description = "asks first"
tools = ["run_command"]
[approvals]
commands = ["danger*"]
seconds = 600
"""


@pytest.fixture
def world() -> World:
    """A world."""
    return World()


@pytest.fixture
def templates(tmp_path: Path) -> Path:
    """A folder with a template that asks before some commands."""
    (tmp_path / "careful.toml").write_text(TEMPLATE)
    (tmp_path / "careful.md").write_text("You are {name}.")
    return tmp_path


@pytest.fixture
async def daemon(tmp_path: Path, world: World, templates: Path) -> AsyncIterator[Daemon]:
    """A daemon with an agent that asks before some commands."""
    daemon = Daemon(tmp_path / "store.db", world, templates=templates)
    await daemon.agents.invoke("careful", "ada", "alice")
    yield daemon
    await daemon.agents.aclose("going down")
    await daemon.end()


async def test_an_operator_says_yes(daemon: Daemon, world: World) -> None:
    """The operators are told once what to say; with their yes, and not before, the command runs."""
    daemon.hear(ALICE, "ada: danger zone")
    await world.until(lambda: world.announced)
    ((name, approval),) = daemon.agents.approvals()
    assert (name, approval.command, approval.asked_by, approval.asked_at) == ("ada", "danger zone", "alice", NOW)
    verb = f"!approve ada {approval.code}"
    assert world.announced == [f"ada wants to run `danger zone` for alice: {verb}, or {verb} no"]
    assert world.ran == []
    daemon.agents.decide("ADA", approval.code.upper(), approved=True, by="carol")
    await daemon.quiet()
    assert world.ran == ["danger zone"]
    assert daemon.agents.approvals() == []


async def test_an_operator_says_no(daemon: Daemon, world: World) -> None:
    """The command does not run, and the asker's answer tells why."""
    daemon.hear(ALICE, "ada: danger zone")
    await world.until(lambda: world.announced)
    ((_, approval),) = daemon.agents.approvals()
    daemon.agents.decide("ada", approval.code, approved=False, by="carol")
    await daemon.quiet()
    assert world.ran == []
    said = [text for _, kind, text in world.said if kind is Kind.PRIVMSG]
    assert said[-1] == "danger zone: refused: carol, an operator, said no; do not try it in another way"


async def test_a_yes_counts_only_for_what_was_asked(daemon: Daemon, world: World) -> None:
    """A wrong code, another agent's name, or a yes that comes too late approves nothing."""
    with pytest.raises(NotFoundError, match="ada does not wait for a yes"):
        daemon.agents.decide("ada", "0000", approved=True, by="carol")
    daemon.hear(ALICE, "ada: danger zone")
    await world.until(lambda: world.announced)
    ((_, approval),) = daemon.agents.approvals()
    with pytest.raises(ConflictError, match=r"ada waits with .* not 00: danger zone"):
        daemon.agents.decide("ada", "00", approved=True, by="carol")
    with pytest.raises(NotFoundError, match="did you mean 'ada'"):
        daemon.agents.decide("adda", approval.code, approved=True, by="carol")
    daemon.hear(ALICE, "ada: stop")
    await daemon.quiet()
    with pytest.raises(NotFoundError, match="does not wait"):
        daemon.agents.decide("ada", approval.code, approved=True, by="carol")
    assert world.ran == []


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
async def test_a_kill_at_any_commit_runs_nothing_unasked(
    tmp_path: Path, world: World, templates: Path, before: bool
) -> None:
    """Whatever the moment of the kill, the command runs at most once and only after a yes, and somebody hears of it."""
    commits = kill_at = 0
    while kill_at <= commits:
        path = tmp_path / f"{before}-{kill_at}.db"
        world.said.clear()
        world.ran.clear()
        world.announced.clear()
        first = Daemon(path, world, kill_at, before=before, templates=templates)
        await first.agents.invoke("careful", "ada", "alice")
        first.store.armed = True
        heard, decided = await _story(first, world)
        if before and kill_at == 1:
            heard = False
        commits = commits or first.store.commits
        await first.end()
        if not decided:
            assert world.ran == [], kill_at
        second = Daemon(path, world, templates=templates)
        await second.agents.recover()
        await world.until(lambda: second.agents.approvals() or not second._open_rows())  # noqa: B023 (waited for here)
        for _, approval in second.agents.approvals():
            second.agents.decide("ada", approval.code, approved=True, by="carol")
        await second.quiet()
        assert len(world.ran) <= 1, kill_at
        told = [text for _, kind, text in world.said if kind is Kind.PRIVMSG]
        assert bool(told) == heard, kill_at
        await second.agents.aclose("restarting")
        await second.end()
        kill_at += 1
    assert commits >= 8


async def _story(daemon: Daemon, world: World) -> tuple[bool, bool]:
    """Ask and approve; return whether the question was heard and whether the yes was given."""
    try:
        daemon.hear(ALICE, "ada: danger zone")
    except BaseException:  # noqa: BLE001 (the daemon was killed)
        return True, False
    await world.until(lambda: daemon.store.is_dead or world.announced)
    if daemon.store.is_dead:
        return True, False
    ((_, approval),) = daemon.agents.approvals()
    try:
        daemon.agents.decide("ada", approval.code, approved=True, by="carol")
    except BaseException:  # noqa: BLE001 (the daemon was killed)
        return True, True
    await daemon.quiet()
    return True, True
