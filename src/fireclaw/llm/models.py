"""The list of models that people see: what is there, what runs, what can use tools, and what could be fetched."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fireclaw.errors import FireclawError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fireclaw.llm.backends.base import Backend, ModelInfo


@dataclass(frozen=True)
class ModelList:
    """All models.

    Attributes:
        models: those of the preferred places first.
        problems: a sentence for each place that did not tell.
    """

    models: tuple[ModelInfo, ...]
    problems: tuple[str, ...] = ()


async def list_models(backends: Iterable[Backend], default: str) -> ModelList:
    """Ask all places.

    Args:
        backends: the places.
        default: the whole name of the default model, where it is known.
    """
    models: list[ModelInfo] = []
    problems: list[str] = []
    for backend in backends:
        try:
            models += await backend.models()
        except FireclawError as error:
            problems.append(str(error))
    return ModelList(tuple(replace(model, is_default=model.name == default) for model in models), tuple(problems))


def model_lines(found: ModelList) -> list[str]:
    """The list as lines for a chat: those that are there first, each with what matters for choosing it."""
    there = [_line(model) for model in found.models if model.installed]
    missing = [model.name for model in found.models if not model.installed]
    lines = there or ["no model is here yet"]
    if missing:
        lines.append(f"to be fetched: {', '.join(missing)}")
    return [*lines, *found.problems]


def _line(model: ModelInfo) -> str:
    facts = [
        "running" if model.running else "installed",
        f"tools: {model.tools}" if model.tools else "",
        f"context {thousands(model.context)}" if model.context else "",
        model.note,
    ]
    return f"{'*' if model.is_default else ' '} {model.name}: {', '.join(filter(None, facts))}"


def thousands(tokens: int) -> str:
    """Write a context's length: ``32k``."""
    return f"{tokens >> 10}k" if tokens >= 1024 else str(tokens)
