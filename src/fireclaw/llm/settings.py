"""Settings of the way to models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

ANTHROPIC_URL: Final = "https://api.anthropic.com"


@dataclass(frozen=True)
class ModelSettings:
    """Which models serve the agents.

    Attributes:
        base_url: an OpenAI-compatible server, e.g. ``http://127.0.0.1:8000/v1``; None: there is none.
        model: the model for all agents without a wish of their own, with or without its provider in front; None: the
            first of ``base_url``'s server, else the best of a running Ollama, else the embedded one for this host.
        api_key_file: a file with that server's key; None: none is sent.
        context: tokens of context for each call in flight (embedded server, Ollama).
        parallel: calls in flight at once, for each provider.
        timeout_s: seconds that one call may take.
        ollama: where an Ollama may run, e.g. ``http://127.0.0.1:11434``; None: nobody looks for one.
        anthropic_key_file: where Anthropic's key lies, if there is one; None: models of theirs cannot be had.
        anthropic_url: where Anthropic's API is.
    """

    base_url: str | None = None
    model: str | None = None
    api_key_file: Path | None = None
    context: int = 8192
    parallel: int = 2
    timeout_s: float = 300.0
    ollama: str | None = None
    anthropic_key_file: Path | None = None
    anthropic_url: str = ANTHROPIC_URL
