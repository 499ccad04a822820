"""Names of models, as people write them: with the provider in front, ``ollama:qwen2.5``, or without.

The part before the first colon is a provider only if it is one of the four words; so Ollama's own colons, as in
``qwen2.5:7b``, need no care. A provider's word alone means its best model.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class ProviderKind(StrEnum):
    """The kinds of servers that models run on."""

    EMBEDDED = "embedded"
    OLLAMA = "ollama"
    OPENAI = "openai"
    ANTHROPIC = "anthropic"

    @property
    def label(self) -> str:
        """What it is called in status lines and in the ledger."""
        return _LABELS[self]


_LABELS: Final = {
    ProviderKind.EMBEDDED: "llama.cpp",
    ProviderKind.OLLAMA: "ollama",
    ProviderKind.OPENAI: "openai-compatible",
    ProviderKind.ANTHROPIC: "anthropic",
}


@dataclass(frozen=True)
class ModelName:
    """A name, taken apart.

    Attributes:
        provider: None where the name does not say it.
        model: the name on its server; empty where only the provider was named.
    """

    provider: ProviderKind | None
    model: str

    def __str__(self) -> str:
        if self.provider is None:
            return self.model
        return f"{self.provider}:{self.model}" if self.model else self.provider.value


def parse(name: str) -> ModelName:
    """Take a model's name apart."""
    head, colon, model = name.partition(":")
    if head not in list(ProviderKind):
        return ModelName(None, name)
    return ModelName(ProviderKind(head), model if colon else "")


def is_cloud(model: str) -> bool:
    """Whether an Ollama sends what this model is asked to its makers' machines; the tag says so.

    Args:
        model: its name there, e.g. ``gpt-oss:120b-cloud``.
    """
    tag = model.partition(":")[2]
    return tag == "cloud" or tag.endswith("-cloud")
