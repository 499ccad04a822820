"""Anthropic's Messages API, by the official client."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, cast

from fireclaw.errors import ModelError
from fireclaw.llm.chat import ChatMessage, ChatRequest, Finish, JsonObject, Role, Tool, Usage
from fireclaw.llm.providers.base import (
    LIST_TIMEOUT_S,
    load_library,
    no_answer,
    no_reply,
    not_json,
    server_words,
    unreachable,
)
from fireclaw.llm.repair import RawCall, RawReply
from fireclaw.llm.words import in_words

if TYPE_CHECKING:
    from types import ModuleType

    import anthropic
    from anthropic.types import RawMessageStreamEvent

    from fireclaw.llm.embedded import Endpoint

_OVERLOADED: Final = (429, 502, 503, 504, 529)
_OVERLOADED_TYPES: Final = ("overloaded_error", "rate_limit_error")
_KEY_TYPES: Final = ("authentication_error", "permission_error")
_TOO_LONG: Final = re.compile(r"prompt is too long|exceed_context_size|exceeds? the (?:available )?context")
_CUT: Final = ("max_tokens", "model_context_window_exceeded")
_NOT_IN_IDS: Final = re.compile(r"[^a-zA-Z0-9_-]")


class AnthropicProvider:
    """One server; see ``base.Provider``.

    Args:
        libraries: ``anthropic``, and ``httpx2``, whose errors it lets through in the middle of a stream.
        client: its client.
        endpoint: where the server is.
    """

    def __init__(
        self, libraries: tuple[ModuleType, ModuleType], client: anthropic.AsyncAnthropic, endpoint: Endpoint
    ) -> None:
        self._library, self._http = libraries
        self._client = client
        self._where = endpoint.base_url
        self._key = endpoint.api_key

    @classmethod
    async def connect(cls, endpoint: Endpoint) -> AnthropicProvider:
        """Make the client; nothing is sent yet. A key is needed: without one the library would look for others."""
        assert endpoint.api_key
        library = await load_library("anthropic")
        http = await load_library("httpx2")
        client = library.AsyncAnthropic(
            base_url=endpoint.base_url,
            api_key=endpoint.api_key,
            max_retries=0,  # each attempt is metered, so each is ours
            timeout=None,
        )
        return cls((library, http), client, endpoint)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def names(self) -> list[str]:
        """The names of the models that the key may use, the newest first.

        Raises:
            ModelError: it does not answer.
        """
        try:
            async with asyncio.timeout(LIST_TIMEOUT_S):
                page = await self._client.models.list()
        except TimeoutError as error:
            raise no_answer(self._where, LIST_TIMEOUT_S) from error
        except self._library.APIError as error:
            raise self._explain(error) from error
        except ValueError as error:
            raise not_json(self._where) from error
        return [model.id for model in page.data]

    async def complete(
        self, model: str, request: ChatRequest, *, schema: JsonObject | None, timeout_s: float
    ) -> RawReply:
        """Ask once; see ``base.Provider``. It takes no schema.

        No temperature is sent: the newer models refuse it.

        Raises:
            ModelError: with the kind that says how it failed.
        """
        assert schema is None, "these models need no schema"
        if not request.tools:
            request = in_words(request)  # the API refuses calls in a conversation that offers no tools
        system, messages = _conversation(request.messages)
        parameters: dict[str, Any] = {"system": system} if system else {}
        if request.tools:
            parameters["tools"] = [_tool(tool) for tool in request.tools]
        try:
            async with asyncio.timeout(timeout_s):
                # Streamed for the same reason as everywhere: the server notices when nobody listens any more.
                events = await self._client.messages.create(
                    model=model,
                    messages=cast("Any", messages),
                    max_tokens=request.max_tokens,
                    # What a turn's steps have in common is read from the cache, at a tenth of the price.
                    cache_control={"type": "ephemeral"},
                    stream=True,
                    **parameters,
                )
                return await self._collect(events)
        except TimeoutError as error:
            raise no_answer(self._where, timeout_s) from error
        except self._library.APIError as error:
            raise self._explain(error) from error
        except self._http.HTTPError as error:
            raise unreachable(self._where, error) from error
        except ValueError as error:
            raise not_json(self._where) from error

    async def _collect(self, events: anthropic.AsyncStream[RawMessageStreamEvent]) -> RawReply:
        reply = _Collector()
        async with events:
            async for event in events:
                reply.add(event)
        if not reply.has_begun:
            raise no_reply(self._where)
        return reply.done()

    def _explain(self, error: anthropic.APIError) -> ModelError:
        library = self._library
        where = f"the model server at {self._where}"
        if isinstance(error, library.APIConnectionError):
            return unreachable(self._where, error)
        status = error.status_code if isinstance(error, library.APIStatusError) else 0
        kind, message = _complaint(error.body)
        reason = server_words(message or error.message, self._key)
        if status in (401, 403) or kind in _KEY_TYPES:
            return ModelError(f"{where} refuses the key: {reason}", hint="check the file anthropic-key", kind="refused")
        # An error in mid-stream comes with status 200, so the type counts as well.
        if status in _OVERLOADED or kind in _OVERLOADED_TYPES:
            return ModelError(f"{where} is overloaded: {reason}", hint="try again later", kind="overloaded")
        if _TOO_LONG.search(f"{kind} {reason}"):
            return ModelError(f"the conversation is too long for the model: {reason}", kind="context")
        return ModelError(f"{where} refuses the request: {reason}", kind="refused")


def _complaint(body: object) -> tuple[str, str]:
    """Type and message of an error's body, ``{"type": "error", "error": {"type": …, "message": …}}``."""
    inner = body.get("error") if isinstance(body, dict) else None
    if not isinstance(inner, dict):
        return "", ""
    return str(inner.get("type", "")), str(inner.get("message", ""))


def _conversation(messages: tuple[ChatMessage, ...]) -> tuple[str, list[dict[str, object]]]:
    """The system text, and the rest as turns of user and assistant, each role's neighbours in one message."""
    system = "\n\n".join(message.text for message in messages if message.role is Role.SYSTEM)
    turns: list[tuple[str, list[dict[str, object]]]] = []
    for message in messages:
        if message.role is Role.SYSTEM:
            continue
        role = "assistant" if message.role is Role.ASSISTANT else "user"
        if not turns or turns[-1][0] != role:
            turns.append((role, []))
        turns[-1][1].extend(_blocks(message))
    return system, [{"role": role, "content": blocks} for role, blocks in turns if blocks]


def _blocks(message: ChatMessage) -> list[dict[str, object]]:
    if message.role is Role.TOOL:
        content = message.text or "(no output)"
        return [{"type": "tool_result", "tool_use_id": _id(message.tool_call_id), "content": content}]
    text = message.text.strip()  # the API refuses blocks of nothing but white space
    blocks: list[dict[str, object]] = [{"type": "text", "text": text}] if text else []
    return blocks + [
        {"type": "tool_use", "id": _id(call.id), "name": call.name, "input": dict(call.arguments)}
        for call in message.tool_calls
    ]


def _id(call_id: str) -> str:
    """A call's id in the letters that the API allows."""
    return _NOT_IN_IDS.sub("_", call_id)


def _tool(tool: Tool) -> dict[str, object]:
    return {"name": tool.name, "description": tool.description, "input_schema": dict(tool.parameters)}


class _Collector:
    """Puts the events of a streamed reply together."""

    def __init__(self) -> None:
        self.has_begun = False
        self._is_declined = False
        self._text: list[str] = []
        self._calls: dict[int, RawCall] = {}
        self._finish = Finish.LENGTH  # until the server says that it came to an end
        self._usage = Usage()
        self._model = ""

    def add(self, event: RawMessageStreamEvent) -> None:
        match event.type:
            case "message_start":
                self.has_begun = True
                self._model = event.message.model
                usage = event.message.usage
                cached, written = usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0
                # Their counts exclude each other; ours of the prompt is the whole.
                self._usage = Usage(usage.input_tokens + cached + written, cached, usage.output_tokens, written)
            case "content_block_start" if event.content_block.type == "tool_use":
                self._calls[event.index] = RawCall(event.content_block.id, event.content_block.name, "")
            case "content_block_delta" if event.delta.type == "text_delta":
                self._text.append(event.delta.text)
            case "content_block_delta" if event.delta.type == "input_json_delta":
                call = self._calls[event.index]
                self._calls[event.index] = replace(call, arguments=call.arguments + event.delta.partial_json)
            case "message_delta":
                self._usage = replace(self._usage, output_tokens=event.usage.output_tokens)
                self._end(event.delta.stop_reason)
            case _:  # the ends of blocks, thoughts, and events that are not known yet
                pass

    def _end(self, reason: str | None) -> None:
        self._is_declined = reason == "refusal"
        if reason is not None and reason not in _CUT:
            self._finish = Finish.STOP

    def done(self) -> RawReply:
        calls = tuple(call for _, call in sorted(self._calls.items()))
        return RawReply("".join(self._text), calls, self._finish, self._usage, self._model, self._is_declined)
