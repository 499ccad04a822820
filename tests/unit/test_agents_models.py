"""Which model an agent thinks with."""

from __future__ import annotations

import pytest

from fireclaw.agents.models import pick_model, unknown_model

THERE = ["ollama:qwen2.5:7b", "ollama:llama3.1:latest", "embedded:qwen2.5-coder-0.5b", "anthropic:claude-x"]


@pytest.mark.parametrize(
    ("preferences", "picked"),
    [
        (["llama3.1", "qwen2.5"], "ollama:llama3.1:latest"),
        (["gemma3", "qwen2.5"], "ollama:qwen2.5:7b"),
        (["qwen2.5:7b"], "ollama:qwen2.5:7b"),
        (["qwen2.5:14b"], None),
        (["ollama:qwen2.5"], "ollama:qwen2.5:7b"),
        (["embedded:qwen2.5"], None),
        (["embedded:qwen2.5-coder-0.5b"], "embedded:qwen2.5-coder-0.5b"),
        (["openai", "anthropic"], "anthropic:claude-x"),
        ([], None),
    ],
)
def test_the_first_that_is_there_is_taken(preferences: list[str], picked: str | None) -> None:
    """A name without a version means any, one behind a provider's name only that provider's."""
    assert pick_model(preferences, THERE) == picked


def test_a_provider_may_be_unnamed() -> None:
    """Where the list names no providers, a preference for one is met by its model."""
    assert pick_model(["ollama:qwen2.5"], ["qwen2.5:7b"]) == "qwen2.5:7b"
    assert pick_model(["ollama"], ["qwen2.5:7b"]) is None


def test_what_cannot_be_a_preference() -> None:
    """A family that nobody knows is refused with the nearest; what a provider's name stands before is not."""
    known = ["qwen2.5", "gemma3"]
    assert unknown_model("qwen2.5:72b", known) is None
    assert unknown_model("ollama:anything", known) is None
    assert unknown_model("gema3", known) == (
        "there is no model 'gema3' (did you mean 'gemma3'?; one of your own: 'ollama:NAME')"
    )
