"""Templates: what we ship, and what is said about a wrong one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fireclaw.agents.templates import MachineStart, Templates
from fireclaw.errors import ConfigError, NotFoundError

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


def write(folder: Path, text: str, name: str = "mine") -> None:
    """Write a template with its persona."""
    (folder / f"{name}.toml").write_text(text)
    (folder / f"{name}.md").write_text("You are {name}. {this} stays.")


def test_the_worker_is_shipped() -> None:
    """The worker has a shell, a machine at once, and a persona that knows its name."""
    worker = Templates.load().get("worker")
    assert worker.tools == ("run_command",)
    assert worker.machine is MachineStart.AT_ONCE
    assert worker.limits.steps == 8
    assert worker.persona_of("bert").startswith("You are bert,")
    assert "{" not in worker.persona_of("bert")


def test_a_user_adds_and_replaces(tmp_path: Path) -> None:
    """A folder of the user's own adds templates and replaces shipped ones; a missing folder adds none."""
    assert [template.name for template in Templates.load(tmp_path / "none").all()] == ["worker"]
    write(tmp_path, GOOD)
    write(tmp_path, GOOD.replace("mine", "worker"), "worker")
    templates = Templates.load(tmp_path)
    assert [template.name for template in templates.all()] == ["mine", "worker"]
    mine = templates.get("mine")
    assert (mine.limits.steps, mine.limits.turn_seconds, mine.machine) == (3, 900, MachineStart.ON_FIRST_USE)
    assert mine.persona_of("bert") == "You are bert. {this} stays."
    assert templates.get("worker").limits.steps == 3


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
        (GOOD.replace('image = "debian"', ""), r"mine\.toml: the key 'image' is missing"),
        (GOOD.replace('"debian"', "debian"), r"mine\.toml: Invalid value \(at line 4"),
        (GOOD + 'persona = "x"\n', r"mine\.toml:8: unknown key 'persona'"),
    ],
)
def test_a_wrong_template_is_told_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    """The error names the file, the line, the key, and what was probably meant."""
    write(tmp_path, text)
    with pytest.raises(ConfigError, match=message):
        Templates.load(tmp_path)


def test_a_missing_persona_is_an_error(tmp_path: Path) -> None:
    """A template needs its Markdown file, in UTF-8."""
    write(tmp_path, GOOD)
    (tmp_path / "mine.md").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"mine\.md'.*not UTF-8"):
        Templates.load(tmp_path)
    (tmp_path / "mine.md").unlink()
    with pytest.raises(ConfigError, match=r"mine\.md'.*No such file"):
        Templates.load(tmp_path)
