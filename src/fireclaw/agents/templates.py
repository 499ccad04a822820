"""Templates: named recipes for agents, each a TOML file with a Markdown persona beside it.

``worker.toml`` says what the agent gets, ``worker.md`` who it is. Those that we ship are package data; a folder of the
user's own may add more or replace them. A wrong one keeps nobody from the others: it is told when it is asked for, and
by ``fireclaw template check``.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from enum import StrEnum
from importlib import resources
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fireclaw.agents.models import unknown_model
from fireclaw.agents.tools import TOOLS
from fireclaw.errors import ConfigError, NotFoundError
from fireclaw.llm.catalogue import entries, seeds

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from importlib.resources.abc import Traversable
    from pathlib import Path

MAX_PERSONA: Final = 16384  # bytes; a page or three
_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,23}")


class MachineStart(StrEnum):
    """When an agent's machine is made."""

    AT_ONCE = "at-once"
    ON_FIRST_USE = "on-first-use"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Strict):
    """How far one turn may go.

    Attributes:
        steps: model calls a turn; the last is made without tools, so that it answers.
        turn_seconds: wall time of a turn, without the time in which it waits for people or other agents.
        command_seconds: wall time of one command.
    """

    steps: Annotated[int, Field(ge=1, le=100)] = 8
    turn_seconds: Annotated[int, Field(ge=1)] = 900
    command_seconds: Annotated[int, Field(ge=1)] = 120


class Budget(_Strict):
    """What an agent may use up in a day. None: as much as it likes.

    Attributes:
        tokens: read and written by the model.
        money: in US dollars.
        turns: lines that it takes up.
        seconds: of the model's time.
    """

    tokens: Annotated[int, Field(ge=1)] | None = None
    money: Annotated[float, Field(ge=0)] | None = None
    turns: Annotated[int, Field(ge=1)] | None = None
    seconds: Annotated[int, Field(ge=1)] | None = None


class Approvals(_Strict):
    """What needs an operator's yes.

    Attributes:
        commands: patterns of commands, see ``fireclaw.agents.approvals``.
        seconds: how long an answer is waited for.
    """

    commands: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    seconds: Annotated[int, Field(ge=1, le=86400)] = 600


class Recipe(_Strict):
    """What stands in the TOML file.

    Attributes:
        name: what ``!invoke`` calls it.
        description: one line for people.
        models: which models it likes best; the first that is there is taken, and where none is, the default.
        tools: names of the tools that its agents have.
        image: the image of their machines.
        memory_mib: the memory of their machines.
        machine: when the machine is made.
        limits: how far one turn may go.
        budget: what an agent may use up in a day.
        approvals: what needs an operator's yes.
    """

    name: str
    description: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\r\n]*$")]
    models: tuple[str, ...] = ()
    tools: tuple[str, ...]
    image: str = "debian"
    memory_mib: Annotated[int, Field(ge=96)] = 256
    machine: MachineStart = MachineStart.ON_FIRST_USE
    limits: Limits = Limits()
    budget: Budget = Budget()
    approvals: Approvals = Approvals()


class Template(Recipe):
    """A recipe with its persona.

    Attributes:
        persona: who the agents are, for the model; ``{name}`` stands for the agent's name.
    """

    persona: str

    def persona_of(self, agent: str) -> str:
        """Return the persona of the agent of that name."""
        return self.persona.replace("{name}", agent)


class Templates:
    """All templates there are.

    ::

        templates = Templates.load(home.config / "templates")
        template = templates.get("worker")
    """

    def __init__(self, found: Mapping[str, Template | ConfigError], places: Mapping[str, Traversable]) -> None:
        self._found = found
        self._places = places

    @classmethod
    def load(cls, folder: Path | None = None) -> Templates:
        """Read the templates that we ship, and those of a folder, which may not exist."""
        shipped = resources.files("fireclaw") / "data" / "templates"
        found: dict[str, Template | ConfigError] = {}
        places: dict[str, Traversable] = {}
        for place in (shipped, folder):
            if place is not None and place.is_dir():
                here = dict(_read_folder(place))
                found |= here
                places |= dict.fromkeys(here, place)
        return cls(found, places)

    def get(self, name: str) -> Template:
        """Return the template of that name.

        Raises:
            NotFoundError: there is none; the nearest name is offered.
            ConfigError: it is wrong, with file, line and key.
        """
        if name not in self._found:
            raise NotFoundError.named("template", name, self._found)
        found = self._found[name]
        if isinstance(found, ConfigError):
            raise ConfigError(found.message, hint=found.hint) from found
        return found

    def files(self, name: str) -> tuple[Traversable, Traversable]:
        """Return the files of a template that ``get`` finds: recipe and persona."""
        place = self._places[name]
        return place / f"{name}.toml", place / f"{name}.md"

    def all(self) -> list[Template]:
        """Return all sound templates in order of name."""
        return [found for _, found in sorted(self._found.items()) if isinstance(found, Template)]

    def problems(self) -> dict[str, ConfigError]:
        """Return what is wrong with the others, by name."""
        return {name: found for name, found in sorted(self._found.items()) if isinstance(found, ConfigError)}


def _read_folder(folder: Traversable) -> Iterator[tuple[str, Template | ConfigError]]:
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if file.name.endswith(".toml"):
            name = file.name.removesuffix(".toml")
            try:
                yield name, read_template(file, folder)
            except ConfigError as error:
                yield name, error


def read_template(file: Traversable, folder: Traversable) -> Template:
    """Read one template and its persona.

    Args:
        file: the TOML file.
        folder: where its persona lies, under the same name with ``.md``.

    Raises:
        ConfigError: it is wrong, with file, line and key.
    """
    text = _read(file)
    try:
        members = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: {error}", hint="see https://toml.io for the format") from error
    try:
        recipe = Recipe(**members)
    except ValidationError as error:
        raise _explained(error, file, text) from error
    _check_names(recipe, file, text)
    persona = folder / file.name.replace(".toml", ".md")
    words = _read(persona)
    if not words.strip() or len(words.encode()) > MAX_PERSONA:
        raise ConfigError(f"{persona}: a persona has some words, and {MAX_PERSONA} bytes at most")
    return Template(**dict(recipe), persona=words)


def _check_names(recipe: Recipe, file: Traversable, text: str) -> None:
    """Check what names something else: the file, tools, models."""
    stem = file.name.removesuffix(".toml")
    if recipe.name != stem:
        raise ConfigError(
            f"{file}:{_line_of(text, ('name',))}: the name {recipe.name!r} is not that of the file",
            hint=f"call it {stem!r}, or the file '{recipe.name}.toml'",
        )
    if not _NAME.fullmatch(recipe.name):
        raise ConfigError(
            f"{file}:{_line_of(text, ('name',))}: {recipe.name!r} cannot be the name of an agent",
            hint="a letter, then letters, digits, '-' or '_', 24 at most",
        )
    for tool in recipe.tools:
        if tool not in TOOLS:
            raise ConfigError(
                f"{file}:{_line_of(text, ('tools',), tool)}: there is no tool {tool!r}",
                hint=_nearest(tool, TOOLS) or f"known: {', '.join(TOOLS)}",
            )
    known = [*(entry.name for entry in entries()), *(seed.name for seed in seeds())]
    for model in recipe.models:
        if problem := unknown_model(model, known):
            raise ConfigError(f"{file}:{_line_of(text, ('models',), model)}: {problem}")


def _read(file: Traversable) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot read {str(file)!r}: {reason}") from error


def _explained(error: ValidationError, file: Traversable, text: str) -> ConfigError:
    """Turn one finding of pydantic into our kind of message: an unknown key before the missing one it was meant for."""
    finding = min(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
    path = tuple(str(part) for part in finding["loc"])
    place = f"{file}:{_line_of(text, path)}"
    if finding["type"] == "extra_forbidden":
        return ConfigError(f"{place}: unknown key {path[-1]!r}", hint=_nearest(path[-1], _keys_beside(path)))
    if finding["type"] == "missing":
        return ConfigError(f"{file}: the key {'.'.join(path)!r} is missing")
    return ConfigError(f"{place}: {'.'.join(path)!r} is wrong: {finding['msg']}")


def _keys_beside(path: tuple[str, ...]) -> Iterable[str]:
    section = Recipe.model_fields[path[0]].annotation if len(path) > 1 else Recipe
    assert isinstance(section, type)
    assert issubclass(section, BaseModel)
    return section.model_fields


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def _line_of(text: str, path: tuple[str, ...], value: str = "") -> int:
    """Find the line of a key, or of a value behind it; tomllib does not tell."""
    section, found = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[([^\]\"',]+)\]\s*(#.*)?$", line):
            section = header[1].strip()
            if (section,) == path[:1] and len(path) == 1:
                return number
        elif key := re.match(r"\s*\"?([\w-]+)\"?\s*=", line):
            here = (section, key[1]) if section else (key[1],)
            found = found or (number if here == path[: len(here)] else 0)
        if found and (not value or value in line):
            return number if value else found
    return found or 1
