"""The catalogue and the examples: data that the program relies on."""

from __future__ import annotations

import re

import pytest

from fireclaw.errors import NotFoundError
from fireclaw.llm.catalogue import (
    PackageSource,
    ToolSupport,
    UrlSource,
    entries,
    find,
    find_seed,
    pick_default,
    seeds,
)
from fireclaw.llm.chat import Role, Tool
from fireclaw.llm.fewshot import few_shot_messages
from fireclaw.llm.names import ModelName, ProviderKind, parse

GIB = 1 << 30
RUN = Tool("run_command", "Run a command.", {"type": "object"})


def test_every_entry_can_be_fetched_and_checked() -> None:
    """Each model has a licence, a digest, and the publisher's own file as its first source."""
    for entry in entries():
        assert re.fullmatch(r"[0-9a-f]{64}", entry.sha256)
        assert entry.licence == "Apache-2.0"
        assert entry.size > 0
        first, *mirrors = entry.sources
        assert isinstance(first, UrlSource)
        assert first.url.startswith("https://")
        assert all(isinstance(source, PackageSource) for source in mirrors)
        assert all("mirror" in source.name for source in mirrors)


def test_models_with_tools_bring_a_template_that_offers_them() -> None:
    """The chat template renders tools, calls and results."""
    for entry in entries():
        assert bool(entry.template) == (entry.tools is ToolSupport.NATIVE)
        if entry.template:
            for word in ("tools", "tool_calls", "tool_response"):
                assert word in entry.template


@pytest.mark.parametrize(
    ("cores", "memory", "name"),
    [
        (2, 64 * GIB, "qwen2.5-coder-0.5b"),
        (4, 6 * GIB - 1, "qwen2.5-coder-0.5b"),
        (4, 6 * GIB, "qwen2.5-coder-1.5b"),
        (64, 512 * GIB, "qwen2.5-coder-1.5b"),
    ],
)
def test_a_small_host_gets_a_small_model(cores: int, memory: int, name: str) -> None:
    """Under four cores or 6 GB the half-billion model is the default."""
    assert pick_default(cores, memory).name == name


def test_an_unknown_name_offers_the_nearest() -> None:
    """A mistyped model is answered with what was probably meant."""
    with pytest.raises(NotFoundError, match=r"smollm2-135m"):
        find("smollm-135m")


def test_memory_grows_with_the_context() -> None:
    """The need for memory counts weights, cache and scratch."""
    entry = find("qwen2.5-coder-0.5b")
    assert entry.memory_bytes(2000) - entry.memory_bytes(1000) == 1000 * entry.kv_bytes
    assert entry.memory_bytes(0) > entry.size


def test_examples_are_the_same_bytes_each_time() -> None:
    """A server can keep the work that it did for them."""
    assert few_shot_messages([RUN]) == few_shot_messages([RUN])


def test_each_call_of_the_examples_has_its_result() -> None:
    """Calls and results pair up, and every example ends in words."""
    calls = [call.id for message in few_shot_messages([RUN]) for call in message.tool_calls]
    results = [message.tool_call_id for message in few_shot_messages([RUN]) if message.role is Role.TOOL]
    assert calls == results
    assert len(set(calls)) == len(calls) > 2
    assert few_shot_messages([RUN])[-1].role is Role.ASSISTANT


def test_examples_use_only_offered_tools() -> None:
    """Without tools only talk remains."""
    roles = {message.role for message in few_shot_messages([])}
    assert roles == {Role.USER, Role.ASSISTANT}
    assert not any(message.tool_calls for message in few_shot_messages([]))


def test_the_seeds_are_the_five_with_what_they_make_of_tools() -> None:
    """One writes calls as text, two need the schema; a tag does not matter, another family does."""
    assert {seed.name: seed.tools.value for seed in seeds()} == {
        "qwen2.5": "native",
        "qwen2.5-coder": "schema",
        "llama3.1": "native",
        "gemma3": "schema",
        "phi4-mini": "rescue",
    }
    assert all(seed.licence and seed.title and seed.note and seed.context >= 32768 for seed in seeds())
    coder = find_seed("qwen2.5-coder:7b")
    assert coder is not None
    assert coder.name == "qwen2.5-coder"
    assert find_seed("qwen2.5vl") is None


def test_each_kind_of_support_has_words() -> None:
    """A list of models can tell them apart."""
    assert len({support.words for support in ToolSupport}) == len(ToolSupport)


@pytest.mark.parametrize(
    ("text", "provider", "model"),
    [
        ("qwen2.5:7b", None, "qwen2.5:7b"),
        ("ollama:qwen2.5:7b", ProviderKind.OLLAMA, "qwen2.5:7b"),
        ("anthropic:claude-x", ProviderKind.ANTHROPIC, "claude-x"),
        ("embedded", ProviderKind.EMBEDDED, ""),
        ("openai:", ProviderKind.OPENAI, ""),
        ("hf.co/some/model:Q4", None, "hf.co/some/model:Q4"),
        ("", None, ""),
    ],
)
def test_a_name_may_carry_its_provider(text: str, provider: ProviderKind | None, model: str) -> None:
    """Only the four words before the first colon are providers."""
    assert parse(text) == ModelName(provider, model)
    assert str(parse(text)) == text.removesuffix(":")
