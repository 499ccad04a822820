"""Hot reload: model, persona, tools and budget change for the next turn; the one on its way and the talk go on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from agents_world import ALICE, Daemon, World

from fireclaw.agents.templates import Templates
from fireclaw.errors import InvalidError, NotFoundError
from fireclaw.llm.budget import Budget
from fireclaw.llm.chat import ChatReply

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fireclaw.llm.chat import ChatRequest

TEMPLATE = """\
name = "mine"
description = "x"
models = ["gemma3", "qwen2.5"]
tools = ["run_command"]
"""


class Slow:
    """A model that answers when it is told to."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()

    async def think(self, request: ChatRequest) -> ChatReply:
        """Answer with what the request was made of."""
        self.begun.set()
        await self.go_on.wait()
        return ChatReply(f"{request.model or 'default'}: {request.messages[0].text}")


@pytest.fixture
def world() -> World:
    """A world."""
    return World()


@pytest.fixture
async def daemon(tmp_path: Path, world: World) -> AsyncIterator[Daemon]:
    """A daemon with an agent of a template of its own."""
    write(tmp_path, TEMPLATE, "I am old.")
    daemon = Daemon(tmp_path / "store.db", world, templates=tmp_path)
    await daemon.agents.invoke("mine", "ada", "alice")
    yield daemon
    await daemon.agents.aclose("going down")
    await daemon.end()


def write(folder: Path, recipe: str, persona: str) -> None:
    """Write the template."""
    (folder / "mine.toml").write_text(recipe)
    (folder / "mine.md").write_text(persona)


async def test_a_turn_ends_with_what_it_began_with(daemon: Daemon, world: World, tmp_path: Path) -> None:
    """The answer on its way comes from the old model and persona, the next one from the new, in the same talk."""
    slow = Slow()
    world.think = slow.think
    daemon.hear(ALICE, "ada: first")
    await slow.begun.wait()
    write(tmp_path, TEMPLATE.replace('"run_command"', '"read_file"') + "[budget]\ntokens = 9\n", "I am new.")
    assert daemon.agents.use_templates(Templates.load(tmp_path), by="alice") == []
    info = daemon.agents.reload("ada", "alice", model="ollama:other")
    assert info.model == "ollama:other"
    daemon.hear(ALICE, "ada: second")
    slow.go_on.set()
    await daemon.quiet()
    old, new = world.asked
    assert (old.model, old.messages[0].text, old.budget) == ("", "I am old.", None)
    assert (new.model, new.messages[0].text, new.budget) == ("ollama:other", "I am new.", Budget(tokens=9))
    assert [tool.name for tool in old.tools] == ["run_command"]
    assert [tool.name for tool in new.tools] == ["read_file"]
    assert "<alice> first" in [message.text for message in new.messages]


async def test_what_was_set_survives_a_restart(tmp_path: Path, world: World) -> None:
    """Model and persona are rows; the next daemon's agent has them, until they are taken back."""
    write(tmp_path, TEMPLATE, "I am old.")
    first = Daemon(tmp_path / "store.db", world, templates=tmp_path)
    await first.agents.invoke("mine", "ada", "alice", model="embedded:x", persona="quick")
    await first.agents.aclose("restarting")
    await first.end()
    second = Daemon(tmp_path / "store.db", world, templates=tmp_path)
    await second.agents.recover()
    second.hear(ALICE, "ada: hello")
    await second.quiet()
    assert world.asked[-1].model == "embedded:x"
    assert world.asked[-1].messages[0].text.startswith("You are ada, who answers quick questions")
    second.agents.reload("ada", "alice", persona="")
    second.hear(ALICE, "ada: hello")
    await second.quiet()
    assert world.asked[-1].model == "embedded:x"
    assert world.asked[-1].messages[0].text == "I am old."
    await second.agents.aclose("going down")
    await second.end()


async def test_the_first_model_that_is_there_is_asked(daemon: Daemon, world: World) -> None:
    """Preferences are looked up before each call, so a model that comes or goes is taken into account."""
    daemon.models.append("ollama:qwen2.5:7b")
    daemon.hear(ALICE, "ada: one")
    await daemon.quiet()
    assert {request.model for request in world.asked} == {"ollama:qwen2.5:7b"}
    assert daemon.agents.list()[0].model == "ollama:qwen2.5:7b"
    daemon.models.append("ollama:gemma3")
    daemon.hear(ALICE, "ada: two")
    await daemon.quiet()
    assert world.asked[-1].model == "ollama:gemma3"


async def test_a_wrong_change_changes_nothing(daemon: Daemon, world: World, tmp_path: Path) -> None:
    """An unknown persona or agent, a broken template: said with the reason, and the agent stays as it is."""
    with pytest.raises(NotFoundError, match="did you mean 'coder'"):
        daemon.agents.reload("ada", "alice", persona="codr")
    with pytest.raises(NotFoundError, match="no agent named 'bob'"):
        daemon.agents.reload("bob", "alice")
    with pytest.raises(InvalidError, match="not the name of a model"):
        daemon.agents.reload("ada", "alice", model="a\nb")
    with pytest.raises(NotFoundError):
        await daemon.agents.invoke("mine", "eve", "alice", persona="codr")
    write(tmp_path, TEMPLATE.replace("tools", "toolz"), "I am new.")
    (problem,) = daemon.agents.use_templates(Templates.load(tmp_path), by="alice")
    assert problem.startswith("ada stays as it is: ")
    assert "unknown key 'toolz'" in problem
    daemon.hear(ALICE, "ada: hello")
    await daemon.quiet()
    assert world.asked[-1].messages[0].text == "I am old."
    assert len(daemon.agents.list()) == 1
