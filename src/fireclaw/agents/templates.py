"""Templates: named recipes for agents, each a TOML file with a Markdown persona beside it.

``worker.toml`` says what the agent gets, ``worker.md`` who it is. Those that we ship are package data; a folder of the
user's own may add more or replace them.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from enum import StrEnum
from importlib import resources
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fireclaw.agents.tools import TOOLS
from fireclaw.errors import ConfigError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.resources.abc import Traversable
    from pathlib import Path


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
        turn_seconds: wall time of a turn.
        command_seconds: wall time of one command.
    """

    steps: Annotated[int, Field(ge=1, le=100)] = 8
    turn_seconds: Annotated[int, Field(ge=1)] = 900
    command_seconds: Annotated[int, Field(ge=1)] = 120


class Recipe(_Strict):
    """What stands in the TOML file.

    Attributes:
        name: what ``!invoke`` calls it.
        description: one line for people.
        tools: names of the tools that its agents have.
        image: the image of their machines.
        memory_mib: the memory of their machines.
        machine: when the machine is made.
        limits: how far one turn may go.
    """

    name: str
    description: str
    tools: tuple[str, ...]
    image: str
    memory_mib: Annotated[int, Field(ge=96)] = 256
    machine: MachineStart = MachineStart.ON_FIRST_USE
    limits: Limits = Limits()


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

    def __init__(self, templates: dict[str, Template]) -> None:
        self._templates = templates

    @classmethod
    def load(cls, folder: Path | None = None) -> Templates:
        """Read the templates that we ship, and those of a folder, which may not exist.

        Raises:
            ConfigError: one of them is wrong, with file, line and key.
        """
        shipped = resources.files("fireclaw") / "data" / "templates"
        found: dict[str, Template] = {}
        for place in (shipped, folder):
            if place is not None and place.is_dir():
                files = sorted(place.iterdir(), key=lambda file: file.name)
                read = (read_template(file, place) for file in files if file.name.endswith(".toml"))
                found |= {template.name: template for template in read}
        return cls(found)

    def get(self, name: str) -> Template:
        """Return the template of that name.

        Raises:
            NotFoundError: there is none; the nearest name is offered.
        """
        if name not in self._templates:
            raise NotFoundError.named("template", name, self._templates)
        return self._templates[name]

    def all(self) -> list[Template]:
        """Return all templates in order of name."""
        return [self._templates[name] for name in sorted(self._templates)]


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
    for tool in recipe.tools:
        if tool not in TOOLS:
            raise ConfigError(
                f"{file}:{_line_of(text, ('tools',))}: there is no tool {tool!r}",
                hint=_nearest(tool, TOOLS) or f"known: {', '.join(TOOLS)}",
            )
    return Template(**recipe.model_dump(), persona=_read(folder / file.name.replace(".toml", ".md")))


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
        known = Limits.model_fields if path[0] == "limits" and len(path) > 1 else Recipe.model_fields
        return ConfigError(f"{place}: unknown key {path[-1]!r}", hint=_nearest(path[-1], known))
    if finding["type"] == "missing":
        return ConfigError(f"{file}: the key {'.'.join(path)!r} is missing")
    return ConfigError(f"{place}: {'.'.join(path)!r} is wrong: {finding['msg']}")


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def _line_of(text: str, path: tuple[str, ...]) -> int:
    """Find the line of a key; tomllib does not tell."""
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*\[([^\]]+)\]", line):
            section = header[1].strip()
            if (section,) == path[:1] and len(path) == 1:
                return number
        elif key := re.match(r"\s*\"?([\w-]+)\"?\s*=", line):
            here = (section, key[1]) if section else (key[1],)
            if here == path[: len(here)]:
                return number
    return 1
