"""The rooms and the arrows between them, as docs/architecture.md draws them, read from the imports themselves."""

from __future__ import annotations

import ast
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

_CHECKOUT = Path(__file__).resolve().parents[2]
_PACKAGE = _CHECKOUT / "src/fireclaw"
_LONGEST_MODULE = 600  # lines; a module that grows over it has become two nouns

# Room: the rooms that it may import. An import for type checkers only is an arrow, too: it is knowledge.
_ARROWS = {
    "errors": set(),
    "paths": {"errors"},
    "config": {"errors", "paths"},
    "download": set(),
    "wire": set(),
    "guest": {"wire"},
    "store": {"errors"},
    "images": {"errors", "paths"},
    "vmm": {"download", "errors", "paths", "store", "wire"},
    "machines": {"errors", "images", "paths", "store", "vmm", "wire"},
    "llm": {"download", "errors", "store"},
    "irc": {"errors"},
    "agents": {"errors", "irc", "llm", "store"},
    "daemon": {"agents", "config", "errors", "images", "irc", "llm", "machines", "paths", "store", "vmm", "wire"},
    "cli": {"errors", "paths", "wire"},
    "testing": {"guest", "irc", "llm", "wire"},
    "__main__": {"cli"},
}

# What the table forbids and is right all the same: (module, imported module): why.
_EXCEPTIONS = {
    ("fireclaw.cli.ledger", "fireclaw.store.ledger"): "a record must be checkable while no daemon runs",
    ("fireclaw.cli.template", "fireclaw.agents.templates"): "a template must be checkable without a daemon",
    ("fireclaw.cli.host", "fireclaw.daemon.doctor"): "doctor must not need what it examines; loaded late",
}

# Library: the only modules or rooms that may import it.
_LIBRARIES = {
    "anthropic": {"fireclaw.llm.providers.anthropic"},
    "genai_prices": {"fireclaw.llm.prices"},
    "gguf": {"fireclaw.testing.scripted_model"},
    "lz4": {"fireclaw.images.kernel"},
    "numpy": {"fireclaw.testing.scripted_model"},
    "ollama": {"fireclaw.llm.providers.ollama"},
    "openai": {"fireclaw.llm.providers.openai"},
    "pydantic": {"fireclaw.agents.templates", "fireclaw.config", "fireclaw.daemon.bodies"},
    "pydantic_core": {"fireclaw.config"},
    "rich": {"fireclaw.cli.terminal"},
    "starlette": {
        "fireclaw.daemon.api",
        "fireclaw.daemon.conversation",
        "fireclaw.daemon.memory_api",
        "fireclaw.daemon.models_api",
        "fireclaw.daemon.server",
    },
    "uvicorn": {"fireclaw.daemon.server"},
    "xllamacpp": {"fireclaw.llm.server"},
}
_NOT_IMPORTED = {"httptools"}  # by us: uvicorn loads it


@dataclass(frozen=True)
class Import:
    """One import statement's target.

    Attributes:
        module: who imports.
        target: what is imported; of ours the module, of others the library.
    """

    module: str
    target: str

    def __str__(self) -> str:
        return f"{self.module} imports {self.target}"


def _modules() -> dict[str, Path]:
    """Every module of ours by its dotted name; a package's is that of its ``__init__``."""
    found = {}
    for path in sorted(_PACKAGE.rglob("*.py")):
        parts = ("fireclaw", *path.relative_to(_PACKAGE).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def _room(module: str) -> str:
    return module.split(".")[1]


@cache
def _imports() -> tuple[Import, ...]:
    """Every import of every module, wherever in it the statement stands."""
    modules = _modules()
    return tuple(
        Import(module, target)
        for module, path in modules.items()
        for node in ast.walk(ast.parse(path.read_text(), str(path)))
        for target in _targets(node, modules)
    )


def _targets(node: ast.AST, modules: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute here"
        assert node.module is not None
        # "from fireclaw import cli" is an import of a module, "from fireclaw import __version__" is not.
        names = [f"{node.module}.{alias.name}" for alias in node.names]
        names = [name if name in modules else node.module for name in names]
    else:
        return
    for name in names:
        yield name if name.split(".")[0] == "fireclaw" else name.split(".")[0]


def _ours() -> list[Import]:
    """The imports that cross a room's border."""
    crossing = (each for each in _imports() if each.target.startswith("fireclaw.") and each.module != "fireclaw")
    return [each for each in crossing if _room(each.module) != _room(each.target)]


def test_every_room_has_its_arrows() -> None:
    """The table knows every room and no other, and its arrows form no circle."""
    rooms = {_room(module) for module in _modules() if module != "fireclaw"}
    assert rooms == set(_ARROWS)
    assert list(TopologicalSorter(_ARROWS).static_order())


def test_imports_follow_the_arrows() -> None:
    """A room imports only what the table allows, but for the exceptions that have a reason."""
    wrong = [each for each in _ours() if _room(each.target) not in _ARROWS[_room(each.module)]]
    assert [str(each) for each in wrong if (each.module, each.target) not in _EXCEPTIONS] == []


def test_no_arrow_and_no_exception_is_kept_in_reserve() -> None:
    """What the table allows is used: an arrow that nobody needs any more goes."""
    used = {(_room(each.module), _room(each.target)) for each in _ours()}
    assert {(room, other) for room, others in _ARROWS.items() for other in others} - used == set()
    assert set(_EXCEPTIONS) - {(each.module, each.target) for each in _ours()} == set()


def test_libraries_are_used_where_the_table_says() -> None:
    """A library is imported in its one place; guest, wire and the hot path have none at all."""
    others = {each for each in _imports() if each.target != "fireclaw" and not each.target.startswith("fireclaw.")}
    foreign = {each for each in others if each.target not in sys.stdlib_module_names}
    assert [str(each) for each in foreign if each.module not in _LIBRARIES.get(each.target, set())] == []
    assert {each.target for each in foreign} == set(_LIBRARIES)


def test_every_dependency_is_used() -> None:
    """What an installation pulls in is what the package imports."""
    project = tomllib.loads((_CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted = {line.partition(">")[0].replace("-", "_") for line in project["dependencies"]}
    assert wanted <= set(_LIBRARIES) | _NOT_IMPORTED
    tests_only = {line.partition(">")[0] for line in project["optional-dependencies"]["dev"]}
    assert set(_LIBRARIES) - {"pydantic_core"} <= wanted | tests_only  # pydantic brings its core


@pytest.mark.parametrize("module", sorted(_modules()))
def test_a_module_says_what_it_is_and_stays_small(module: str) -> None:
    """A module begins with a docstring and has at most 600 lines."""
    text = _modules()[module].read_text()
    assert ast.get_docstring(ast.parse(text))
    assert text.count("\n") <= _LONGEST_MODULE
