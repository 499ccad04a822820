"""``fireclaw template``: listing, showing, making and checking, with no daemon."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from fireclaw.cli.template import template
from fireclaw.errors import ConfigError, ConflictError, InvalidError, NotFoundError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own; returns its folder of templates, which does not exist yet."""
    monkeypatch.setenv("FIRECLAW_HOME", str(tmp_path))
    return tmp_path / "templates"


def test_templates_are_listed_and_shown(capfd: pytest.CaptureFixture[str]) -> None:
    """The list has all that can be invoked, a shown one all that its files say."""
    assert template(["ls"]) == 0
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()] == [
        "NAME",
        "coder",
        "creative",
        "quick",
        "researcher",
        "worker",
    ]
    assert template(["ls", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)[0]["name"] == "coder"
    assert template(["show", "worker"]) == 0
    shown = capfd.readouterr().out
    assert 'tools = ["run_command", "save_memory"]' in shown
    assert "You are {name}, an assistant" in shown
    assert template(["show", "worker", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["limits"]["steps"] == 8


def test_a_new_one_is_a_sound_copy(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It has its own name, passes the check, can be the base of the next, and nothing is overwritten."""
    assert template(["new", "librarian", "--from", "researcher"]) == 0
    assert capfd.readouterr().out.splitlines() == [str(folder / "librarian.toml"), str(folder / "librarian.md")]
    assert 'name = "librarian"' in (folder / "librarian.toml").read_text()
    assert "researcher.md" not in (folder / "librarian.toml").read_text()
    assert template(["new", "second", "--from", "librarian"]) == 0
    assert template(["check", "librarian", "second"]) == 0
    with pytest.raises(ConflictError, match="already"):
        template(["new", "librarian"])
    with pytest.raises(InvalidError, match="cannot be the name"):
        template(["new", "../x"])
    with pytest.raises(NotFoundError, match="did you mean 'worker'"):
        template(["new", "x", "--from", "wroker"])
    with pytest.raises(InvalidError, match="needs one name"):
        template(["show"])


def test_a_check_finds_every_mistake(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The wrong ones are told with file and line and make the status 1; the good ones are good."""
    template(["new", "one"])
    template(["new", "two"])
    recipe = folder / "two.toml"
    recipe.write_text(recipe.read_text().replace("steps", "stepz"))
    (folder / "three.toml").write_text("name =")
    capfd.readouterr()
    assert template(["check"]) == 1
    out, err = capfd.readouterr()
    assert "one: good\n" in out
    assert "worker: good\n" in out
    assert f"{recipe}:10: unknown key 'stepz' (did you mean 'steps'?)" in err
    assert "three.toml: Invalid value" in err
    assert template(["check", "one"]) == 0
    assert template(["check", str(recipe)]) == 1
    assert template(["ls"]) == 1
    with pytest.raises(ConfigError, match="stepz"):
        template(["show", "two"])
    assert template(["check", str(tmp_path / "none.toml")]) == 1
