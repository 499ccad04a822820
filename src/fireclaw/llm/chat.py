"""What goes to a model and what comes back: frozen values, the same for every provider.

The agents room builds a ``ChatRequest`` and reads a ``ChatReply``; only ``providers/`` knows how a server spells them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fireclaw.llm.budget import Budget

JsonObject = Mapping[str, object]
"""A decoded JSON object; not to be changed."""


class Role(StrEnum):
    """Who speaks in a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class Finish(StrEnum):
    """Why the model stopped."""

    STOP = "stop"
    TOOL_CALLS = "tool_calls"
    LENGTH = "length"


@dataclass(frozen=True)
class ToolCall:
    """A model's wish to use a tool.

    Attributes:
        id: the call's id, unique in its conversation; the result names it.
        name: the tool's name, as the model wrote it.
        arguments: the arguments, always an object.
        error: not empty where the call must not be executed (unknown tool, arguments that are no object): the text
            to give back on the tool channel, so that the model can do better.
    """

    id: str
    name: str
    arguments: JsonObject
    error: str = ""


@dataclass(frozen=True)
class ChatMessage:
    """One message of a conversation.

    Attributes:
        role: who speaks.
        text: what is said; for ``Role.TOOL`` the result.
        tool_calls: of an assistant's message.
        tool_call_id: of a tool's message: the call that it answers.
    """

    role: Role
    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True)
class Tool:
    """A tool that is offered to the model.

    Attributes:
        name: letters, digits, ``_``.
        description: one or two lines for the model.
        parameters: the JSON schema of its arguments (an object).
    """

    name: str
    description: str
    parameters: JsonObject


@dataclass(frozen=True)
class Usage:
    """Tokens of one call.

    Attributes:
        input_tokens: of the prompt, all of them.
        cached_tokens: of these, read from a cache.
        output_tokens: written by the model.
        written_tokens: of the prompt's, written to a cache, where that costs extra.
    """

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    written_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.written_tokens + other.written_tokens,
        )


@dataclass(frozen=True)
class ChatRequest:
    """One question to a model.

    Attributes:
        agent: the agent's name; calls of different agents take turns.
        turn_id: the turn that it belongs to, for the ledger.
        step: number of the step in that turn.
        call_id: this call, for the ledger.
        messages: the whole prompt, system first.
        tools: what the model may use.
        max_tokens: upper limit of the reply.
        temperature: 0 repeats itself, 1 varies.
        model: which model, e.g. ``ollama:qwen2.5``; empty: the one that serves all agents without a wish.
        person: the nick of the person for whom the agent works now, for the bill; empty: nobody.
        budget: what the agent may spend a day; None: no limit.
    """

    agent: str
    turn_id: str
    step: int
    call_id: str
    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()
    max_tokens: int = 512
    temperature: float = 0.2
    model: str = ""
    person: str = ""
    budget: Budget | None = None


@dataclass(frozen=True)
class ChatReply:
    """A usable reply: text, or calls of tools, or both.

    Attributes:
        text: what the model says, without its thoughts.
        tool_calls: what it wants to do.
        finish: why it stopped; with ``Finish.LENGTH`` the text is cut and there are no calls.
        usage: tokens of all attempts together.
        model: the model that answered, as the server names it.
        duration_s: seconds from the first attempt's start, time in the queue not included.
        attempts: how often the model was asked; above 1, earlier replies were unusable.
    """

    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    finish: Finish = Finish.STOP
    usage: Usage = field(default_factory=Usage)
    model: str = ""
    duration_s: float = 0.0
    attempts: int = 1
