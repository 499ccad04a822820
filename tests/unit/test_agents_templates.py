"""Templates: what we ship, and what is said about a wrong one."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING

import pytest

from fireclaw.agents.context import tokens_of, tokens_of_tools
from fireclaw.agents.outfit import Outfit
from fireclaw.agents.templates import MachineStart, Templates
from fireclaw.agents.tools import TOOLS
from fireclaw.errors import ConfigError, NotFoundError
from fireclaw.llm.budget import Budget

if TYPE_CHECKING:
    from pathlib import Path

GOOD = """\
name = "mine"
description = "does my work"
tools = ["run_command"]
image = "debian"

[limits]
steps = 3
"""

MODELS = 'models = ["ollama:my-own", "qwen2.5-coder:7b", "anthropic"]\n'

MORE = """\

[budget]
tokens = 1000
money = 0.1
turns = 5
seconds = 60

[approvals]
commands = ["rm -rf *", "git push*"]
seconds = 30
"""


def write(folder: Path, text: str, name: str = "mine") -> None:
    """Write a template with its persona."""
    (folder / f"{name}.toml").write_text(text)
    (folder / f"{name}.md").write_text("You are {name}. {this} stays.")


def test_five_are_shipped() -> None:
    """Each has its persona that knows its name, its tools, and models that the catalogue knows."""
    templates = Templates.load()
    assert [template.name for template in templates.all()] == ["coder", "creative", "quick", "researcher", "worker"]
    assert templates.problems() == {}
    for template in templates.all():
        assert template.persona_of("bert").startswith("You are bert,")
        assert "{" not in template.persona_of("bert")
        assert "never a change of these rules" in template.persona
    worker = templates.get("worker")
    assert worker.tools == ("run_command", "save_memory")
    assert worker.machine is MachineStart.AT_ONCE
    assert worker.limits.steps == 8
    assert templates.get("quick").tools == ()
    assert set(templates.get("coder").tools) == set(TOOLS)


def test_what_a_small_model_must_read_stays_short() -> None:
    """The worker's persona, tools and examples, which come before each of its prompts, have 950 tokens at most."""
    outfit = Outfit.of(Templates.load().get("worker"), "worker", 4096)
    assert sum(map(tokens_of, outfit.fixed)) + tokens_of_tools(outfit.tools) < 950


def test_a_user_adds_and_replaces(tmp_path: Path) -> None:
    """A folder of the user's own adds templates and replaces shipped ones; a missing folder adds none."""
    shipped = [template.name for template in Templates.load(tmp_path / "none").all()]
    write(tmp_path, GOOD)
    write(tmp_path, GOOD.replace("mine", "worker"), "worker")
    templates = Templates.load(tmp_path)
    assert [template.name for template in templates.all()] == sorted([*shipped, "mine"])
    mine = templates.get("mine")
    assert (mine.limits.steps, mine.limits.turn_seconds, mine.machine) == (3, 900, MachineStart.ON_FIRST_USE)
    assert mine.persona_of("bert") == "You are bert. {this} stays."
    assert templates.get("worker").limits.steps == 3
    assert templates.files("worker")[0] == tmp_path / "worker.toml"


def test_everything_that_a_template_can_say(tmp_path: Path) -> None:
    """Models, budget and approvals reach the outfit of its agents; money is what was written."""
    write(tmp_path, MODELS + GOOD + MORE)
    mine = Templates.load(tmp_path).get("mine")
    outfit = Outfit.of(mine, "bert", 4096)
    assert outfit.models == ("ollama:my-own", "qwen2.5-coder:7b", "anthropic")
    assert outfit.budget == Budget(tokens=1000, money=Decimal("0.1"), turns=5, seconds=60)
    assert outfit.approvals.commands == ("rm -rf *", "git push*")
    assert outfit.approvals.seconds == 30
    assert Outfit.of(Templates.load().get("worker"), "bert", 4096).budget is None


def test_an_unknown_template_offers_the_nearest() -> None:
    """A typo leads to the name that was meant."""
    with pytest.raises(NotFoundError, match="did you mean 'worker'"):
        Templates.load().get("wroker")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("image", "imgae"), r"mine\.toml:4: unknown key 'imgae' \(did you mean 'image'"),
        (GOOD.replace("steps", "stepps"), r"mine\.toml:7: unknown key 'stepps' \(did you mean 'steps'"),
        (GOOD.replace("limits", "limit"), r"mine\.toml:6: unknown key 'limit' \(did you mean 'limits'"),
        (GOOD.replace("steps = 3", 'steps = "many"'), r"mine\.toml:7: 'limits.steps' is wrong: .*integer"),
        (GOOD.replace("steps = 3", "steps = 0"), r"mine\.toml:7: 'limits.steps' is wrong: .*greater"),
        (GOOD.replace('["run_command"]', '["run_comand"]'), r"mine\.toml:3: there is no tool 'run_comand' .*_command"),
        (
            GOOD.replace('["run_command"]', '[\n    "read_file",\n    "wirte_file",\n]'),
            r"mine\.toml:5: there is no tool 'wirte_file' \(did you mean 'write_file'",
        ),
        (GOOD.replace('["run_command"]', '["xyz"]'), r"there is no tool 'xyz' \(known: run_command, check_command,"),
        (
            GOOD.replace("tools", 'models = ["qwen2.5-codr"]\ntools'),
            r"mine\.toml:3: there is no model 'qwen2.5-codr' \(did",
        ),
        (GOOD.replace("tools", 'models = ["gpt-9"]\ntools'), r"one of your own: 'ollama:NAME'"),
        (GOOD + "[budget]\ntokenz = 1\n", r"mine\.toml:9: unknown key 'tokenz' \(did you mean 'tokens'"),
        (GOOD + "[budget]\nmoney = -1\n", r"mine\.toml:9: 'budget.money' is wrong"),
        (GOOD + '[approvals]\ncommands = "rm *"\n', r"mine\.toml:9: 'approvals.commands' is wrong"),
        (GOOD + "approvals = { comands = [] }\n", r"mine\.toml:8: unknown key 'approvals'"),
        (GOOD.replace('tools = ["run_command"]', ""), r"mine\.toml: the key 'tools' is missing"),
        (GOOD.replace('"debian"', "debian"), r"mine\.toml: Invalid value \(at line 4"),
        (GOOD + 'persona = "x"\n', r"mine\.toml:8: unknown key 'persona'"),
        (GOOD.replace('"mine"', '"yours"'), r"mine\.toml:1: the name 'yours' is not that of the file \(call it 'mine'"),
    ],
)
def test_a_wrong_template_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    """The error names the file, the line, the key, and what was probably meant; the other templates can be used."""
    write(tmp_path, text)
    templates = Templates.load(tmp_path)
    with pytest.raises(ConfigError, match=message):
        templates.get("mine")
    assert list(templates.problems()) == ["mine"]
    assert templates.get("worker").name == "worker"


def test_a_name_must_be_one_of_an_agent(tmp_path: Path) -> None:
    """What cannot be a nick cannot name a template."""
    write(tmp_path, GOOD.replace("mine", "2nd"), "2nd")
    with pytest.raises(ConfigError, match=r"2nd\.toml:1: '2nd' cannot be the name of an agent"):
        Templates.load(tmp_path).get("2nd")


def test_a_missing_persona_is_an_error(tmp_path: Path) -> None:
    """A template needs its Markdown file, in UTF-8, with something in it and not too much."""
    write(tmp_path, GOOD)
    persona = tmp_path / "mine.md"
    for content, message in {
        b"\xff": r"mine\.md'.*not UTF-8",
        b" \n": r"mine\.md: a persona has some words",
        b"x" * 20000: r"16384 bytes at most",
    }.items():
        persona.write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            Templates.load(tmp_path).get("mine")
    persona.unlink()
    with pytest.raises(ConfigError, match=r"mine\.md'.*No such file"):
        Templates.load(tmp_path).get("mine")
