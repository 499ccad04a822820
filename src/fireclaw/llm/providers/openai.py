"""An OpenAI-compatible server, by the official client. llama.cpp, our embedded one too, is such a server."""

from __future__ import annotations

import asyncio
import json
import re
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

if TYPE_CHECKING:
    from types import ModuleType

    import openai
    from openai.types.chat import ChatCompletionChunk
    from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall

    from fireclaw.llm.embedded import Endpoint

_CONTEXT_CODES: Final = ("exceed_context_size_error", "context_length_exceeded")
_WHOLE: Final = ("stop", "tool_calls", "function_call")  # why a reply ended, if not because it was cut off
_OVERLOADED: Final = (429, 502, 503, 529)
# llama.cpp: the model wrote what its own tool grammar or parser does not allow
_PARSER_COMPLAINT: Final = re.compile(r"does not match the expected|Failed to parse|type_error\.316")


class OpenAIProvider:
    """One server; see ``base.Provider``.

    Args:
        libraries: ``openai``, and ``httpx2``, whose errors it lets through in the middle of a stream.
        client: its client.
        endpoint: where the server is.
    """

    def __init__(
        self, libraries: tuple[ModuleType, ModuleType], client: openai.AsyncOpenAI, endpoint: Endpoint
    ) -> None:
        self._library, self._http = libraries
        self._client = client
        self._where = endpoint.base_url
        self._key = endpoint.api_key

    @classmethod
    async def connect(cls, endpoint: Endpoint, *, local: bool) -> OpenAIProvider:
        """Make the client; nothing is sent yet.

        Args:
            endpoint: the server.
            local: it is our own on the loopback, so that no proxy of the environment may stand in between.
        """
        library = await load_library("openai")
        http = await load_library("httpx2")
        client = library.AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=endpoint.api_key or "none",  # never None: it would take OPENAI_API_KEY from the environment
            max_retries=0,  # each attempt is metered, so each is ours
            timeout=None,
            http_client=library.DefaultAsyncHttpxClient(trust_env=not local),
        )
        client.organization = client.project = None  # nor these
        return cls((library, http), client, endpoint)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def names(self) -> list[str]:
        """The names of the models that the server offers.

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
        return [model.id for model in page.data or ()]

    async def complete(
        self, model: str, request: ChatRequest, *, schema: JsonObject | None, timeout_s: float
    ) -> RawReply:
        """Ask once; see ``base.Provider``.

        Raises:
            ModelError: with the kind that says how it failed.
        """
        try:
            async with asyncio.timeout(timeout_s):
                # Streamed, although only the whole is of use: a server that writes notices at once that nobody listens
                # any more. llama.cpp goes on with any other call to its end, for minutes, and its slot is taken.
                chunks = await self._client.chat.completions.create(
                    model=model,
                    messages=cast("Any", [_message(message) for message in request.messages]),
                    max_tokens=request.max_tokens,
                    temperature=request.temperature,
                    stream=True,
                    stream_options={"include_usage": True},
                    **_choices(request.tools, schema),
                )
                return await self._collect(chunks)
        except TimeoutError as error:
            raise no_answer(self._where, timeout_s) from error
        except self._library.APIError as error:
            raise self._explain(error) from error
        except self._http.HTTPError as error:
            raise unreachable(self._where, error) from error
        except ValueError as error:
            raise not_json(self._where) from error

    async def _collect(self, chunks: openai.AsyncStream[ChatCompletionChunk]) -> RawReply:
        reply = _Collector()
        async with chunks:
            async for chunk in chunks:
                reply.add(chunk)
        if not reply.has_begun:
            raise no_reply(self._where)
        return reply.done()

    def _explain(self, error: openai.APIError) -> ModelError:
        library = self._library
        where = f"the model server at {self._where}"
        if isinstance(error, library.APIConnectionError):
            return unreachable(self._where, error)
        status = error.status_code if isinstance(error, library.APIStatusError) else 0
        body = error.body
        message = (body.get("message") if isinstance(body, dict) else None) or error.message
        reason = server_words(str(message), self._key)
        if status in (401, 403):
            return ModelError(f"{where} refuses the key: {reason}", hint="check model.api_key_file", kind="refused")
        if any(code in f"{error.type} {error.code}" for code in _CONTEXT_CODES):
            return ModelError(f"the conversation is too long for the model: {reason}", kind="context")
        if status in _OVERLOADED:
            return ModelError(f"{where} is overloaded: {reason}", hint="try again later", kind="overloaded")
        if _PARSER_COMPLAINT.search(reason):
            return ModelError(f"the model wrote what {where} cannot read: {reason}", kind="bad-output")
        return ModelError(f"{where} refuses the request: {reason}", kind="refused")


def _choices(tools: tuple[Tool, ...], schema: JsonObject | None) -> dict[str, Any]:
    """What the model may do, as parameters of the request."""
    parameters: dict[str, Any] = {}
    if tools:
        parameters["tools"] = [_tool(tool) for tool in tools]
    if schema is not None:
        form = {"name": "call_or_respond", "strict": True, "schema": schema}
        parameters["response_format"] = {"type": "json_schema", "json_schema": form}
        if tools:
            parameters["tool_choice"] = "none"  # the server's own parser and grammar would stand in the way
    return parameters


def _message(message: ChatMessage) -> dict[str, object]:
    value: dict[str, object] = {"role": message.role.value, "content": message.text}
    if message.tool_calls:
        value["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
            }
            for call in message.tool_calls
        ]
    if message.role is Role.TOOL:
        value["tool_call_id"] = message.tool_call_id
    return value


def _tool(tool: Tool) -> dict[str, object]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


class _Collector:
    """Puts the pieces of a streamed reply together."""

    def __init__(self) -> None:
        self.has_begun = False
        self._text: list[str] = []
        self._calls: dict[int, RawCall] = {}
        self._finish = Finish.LENGTH  # until the server says that it came to an end
        self._usage = Usage()
        self._model = ""

    def add(self, chunk: ChatCompletionChunk) -> None:
        self._model = chunk.model or self._model
        if chunk.usage:
            details = chunk.usage.prompt_tokens_details
            cached = (details.cached_tokens or 0) if details else 0
            self._usage = Usage(chunk.usage.prompt_tokens, cached, chunk.usage.completion_tokens)
        for choice in chunk.choices or ():  # the last one has none, and a server that is no such server neither
            self.has_begun = True
            self._text.append(choice.delta.content or "")
            for piece in choice.delta.tool_calls or ():
                self._add_call(piece)
            if choice.finish_reason in _WHOLE:
                self._finish = Finish.STOP

    def _add_call(self, piece: ChoiceDeltaToolCall) -> None:
        call = self._calls.get(piece.index, RawCall("", "", ""))
        name, arguments = (piece.function.name, piece.function.arguments) if piece.function else (None, None)
        self._calls[piece.index] = RawCall(
            call.id or piece.id or "", call.name or name or "", call.arguments + (arguments or "")
        )

    def done(self) -> RawReply:
        calls = tuple(call for _, call in sorted(self._calls.items()))
        return RawReply("".join(self._text), calls, self._finish, self._usage, self._model)
