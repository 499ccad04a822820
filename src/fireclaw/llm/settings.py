"""Settings of the way to models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class ModelSettings:
    """Which model serves the agents.

    Attributes:
        base_url: an OpenAI-compatible server, e.g. ``http://127.0.0.1:11434/v1``; None: the embedded server.
        model: the model's name there, or the name of a catalogue entry for the embedded server; None: the server's
            first, or the entry that suits this host.
        api_key_file: a file with the server's key; None: none is sent.
        context: tokens of context for each call in flight (embedded server).
        parallel: calls in flight at once.
        timeout_s: seconds that one call may take.
    """

    base_url: str | None = None
    model: str | None = None
    api_key_file: Path | None = None
    context: int = 8192
    parallel: int = 2
    timeout_s: float = 300.0
