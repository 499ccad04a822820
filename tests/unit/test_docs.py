"""The documents against the product: links, verbs, options, modules, settings and tests that they name must exist.

What has a table of its own is held elsewhere: the settings in test_config, the routes in test_api_routes.
"""

from __future__ import annotations

import ast
import re
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fireclaw.agents.templates import Recipe
from fireclaw.agents.tools import TOOLS
from fireclaw.cli import VERBS, main
from fireclaw.config import Config
from fireclaw.irc.verbs import VERBS as OVERSEER_VERBS
from fireclaw.store.database import SCHEMAS

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHECKOUT = Path(__file__).resolve().parents[2]
_DOCS = _CHECKOUT / "docs"
_PAGES = sorted([*_CHECKOUT.glob("*.md"), *_DOCS.rglob("*.md")])

_LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND = re.compile(r"(?<!/oper )\bfireclaw ([a-z]+)\b([^\n`]*)")
_CODE = re.compile(r"`([^`\n]+)`")

pages = pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.relative_to(_CHECKOUT).as_posix())


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code forges make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def _commands(text: str) -> Iterator[tuple[str, str]]:
    """Each ``fireclaw VERB REST`` in code: fences and backticks, where a line of a machine's output cannot be meant."""
    code = [block[1] for block in _FENCE.findall(text)] + _CODE.findall(_FENCE.sub("", text))
    for piece in code:
        for match in _COMMAND.finditer(piece):
            yield match[1], match[2]


@cache
def _test_names() -> set[str]:
    trees = (ast.parse(path.read_text()) for path in (_CHECKOUT / "tests").rglob("*.py"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)}


@pages
def test_links_lead_somewhere(page: Path) -> None:
    """A link to a file finds it, and a link to a heading finds that."""
    for target in _LINK.findall(page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(_CHECKOUT), target
        assert not anchor or anchor in _anchors(file), target


@pages
def test_commands_can_be_typed(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A verb that a page tells people to type exists, and has the options that stand behind it."""
    for verb, rest in _commands(page.read_text()):
        assert verb in VERBS, f"fireclaw {verb}"
        ours = re.split(r" -- |[\"'#;|&)]", rest)[0]
        options = re.findall(r"(?<=\s)--?[a-z][a-z-]*", ours)
        if options:
            with pytest.raises(SystemExit):
                main([verb, "--help"])
            known = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", capsys.readouterr().out))
            assert set(options) <= known, f"fireclaw {verb}{rest}"


@pages
def test_names_of_ours_exist(page: Path) -> None:
    """A module, a file of the checkout, a test and a verb of the overseer in backticks exist."""
    for code in _CODE.findall(_FENCE.sub("", page.read_text())):
        if re.fullmatch(r"test_\w+", code):
            assert code in _test_names(), code
        elif re.fullmatch(r"fireclaw(\.[a-z_]+)+", code) and code != "fireclaw.toml":
            assert find_spec(code) is not None, code
        elif re.fullmatch(r"(src|tests|docs|bench|bin)/[\w./-]+", code):
            assert (_CHECKOUT / code).exists(), code
        elif match := re.fullmatch(r"!([a-z]+)( .*)?", code):
            assert match[1] in OVERSEER_VERBS, code


@pages
def test_toml_is_accepted(page: Path) -> None:
    """What a page shows as TOML is a template or a configuration that we take."""
    for language, block in _FENCE.findall(page.read_text()):
        if language == "toml":
            values = tomllib.loads(block)
            if "tools" in values:
                assert set(Recipe(**values).tools) <= set(TOOLS)
            else:
                Config.model_validate(values)


def test_indexes_are_complete() -> None:
    """Every page can be reached from its index, every verb and every table of the store is told of somewhere."""
    for folder in (_DOCS, _DOCS / "decisions"):
        index = folder / "README.md"
        linked = {(folder / target.partition("#")[0]).resolve() for target in _LINK.findall(index.read_text())}
        assert {page.resolve() for page in folder.glob("*.md")} - {index.resolve()} <= linked
    told = {verb for page in _PAGES for verb, _ in _commands(page.read_text())}
    assert told == set(VERBS)
    tables = set(re.findall(r"CREATE TABLE IF NOT EXISTS (\w+)", "".join(SCHEMAS))) | {"schema_version"}
    rows = re.findall(
        r"^\| `(\w+)` \|", (_DOCS / "architecture.md").read_text().partition("## The store")[2], re.MULTILINE
    )
    assert set(rows) == tables


def test_the_checks_see_what_they_are_for() -> None:
    """The pages name tests, verbs and options in the forms that are looked for, or nothing would be checked."""
    security = (_DOCS / "security.md").read_text()
    assert len(re.findall(r"`test_\w+`", security)) > 30
    commands = list(_commands((_CHECKOUT / "README.md").read_text()))
    assert ("run", " --timeout 2 -- sleep 60; echo $?") in commands
    assert any("--detach" in rest for _, rest in commands)
