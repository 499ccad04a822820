"""An OpenAI-compatible server, by the official client: our values out, its values in, its errors in our words."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import re
from typing import TYPE_CHECKING, Any, Final, cast

from fireclaw.errors import ModelError
from fireclaw.llm.chat import ChatMessage, ChatRequest, Finish, Role, Tool, Usage
from fireclaw.llm.repair import RawCall, RawReply, response_format

if TYPE_CHECKING:
    from types import ModuleType

    import openai
    from openai.types.chat import ChatCompletionChunk
    from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall

    from fireclaw.llm.embedded import Endpoint

_LIST_TIMEOUT_S: Final = 10.0
_CONTEXT_CODES = ("exceed_context_size_error", "context_length_exceeded")
_WHOLE = ("stop", "tool_calls", "function_call")  # why a reply ended, if not because it was cut off
_OVERLOADED = (429, 502, 503, 529)
# llama.cpp: the model wrote what its own tool grammar or parser does not allow
_PARSER_COMPLAINT = re.compile(r"does not match the expected|Failed to parse|type_error\.316")


class Provider:
    """One server. Made by ``connect``; ``aclose`` when done."""

    def __init__(self, library: ModuleType, client: openai.AsyncOpenAI, endpoint: Endpoint) -> None:
        self._library = library
        self._client = client
        self._where = endpoint.base_url
        self._key = endpoint.api_key

    @classmethod
    async def connect(cls, endpoint: Endpoint, *, local: bool) -> Provider:
        """Make the client; nothing is sent yet.

        Args:
            endpoint: the server.
            local: it is our own on the loopback, so that no proxy of the environment may stand in between.
        """
        # The library takes about a second to import: not on the event loop, and not before it is needed.
        library = await asyncio.to_thread(importlib.import_module, "openai")
        client = library.AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=endpoint.api_key or "none",  # never None: it would take OPENAI_API_KEY from the environment
            max_retries=0,  # each attempt is metered, so each is ours
            timeout=None,
            http_client=library.DefaultAsyncHttpxClient(trust_env=not local),
        )
        client.organization = client.project = None  # nor these
        return cls(library, client, endpoint)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def first_model(self) -> str:
        """The name of the first model that the server offers.

        Raises:
            ModelError: it does not answer, or offers none.
        """
        try:
            async with asyncio.timeout(_LIST_TIMEOUT_S):
                page = await self._client.models.list()
        except TimeoutError as error:
            raise self._timeout(_LIST_TIMEOUT_S) from error
        except self._library.APIError as error:
            raise self._explain(error) from error
        if not page.data:
            raise ModelError(f"the model server at {self._where} offers no model", kind="refused")
        return page.data[0].id

    async def complete(self, model: str, request: ChatRequest, *, force: bool, timeout_s: float) -> RawReply:
        """Ask once.

        Args:
            model: the model's name on this server.
            request: what to ask.
            force: let the server hold the reply to the JSON schema of a call (or ``respond``).
            timeout_s: seconds for all of it.

        Raises:
            ModelError: with the kind that says how it failed.
        """
        parameters: dict[str, Any] = {}
        if request.tools:
            parameters["tools"] = [_tool(tool) for tool in request.tools]
        if request.tools and force:
            parameters |= {"tool_choice": "none", "response_format": response_format(request.tools)}
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
                    **parameters,
                )
                return await self._collect(chunks)
        except TimeoutError as error:
            raise self._timeout(timeout_s) from error
        except self._library.APIError as error:
            raise self._explain(error) from error
        except ValueError as error:
            raise ModelError(f"the model server at {self._where} sent what is no JSON", kind="bad-output") from error

    async def _collect(self, chunks: openai.AsyncStream[ChatCompletionChunk]) -> RawReply:
        reply = _Collector()
        async with chunks:
            async for chunk in chunks:
                reply.add(chunk)
        if not reply.has_begun:
            raise ModelError(f"the model server at {self._where} sent no reply in its answer", kind="bad-output")
        return reply.done()

    def _timeout(self, seconds: float) -> ModelError:
        return ModelError(f"the model server at {self._where} did not answer within {seconds:.0f} s", kind="timeout")

    def _explain(self, error: openai.APIError) -> ModelError:
        library = self._library
        where = f"the model server at {self._where}"
        if isinstance(error, library.APIConnectionError):
            return ModelError(
                f"{where} does not answer: {_root_reason(error)}", hint="is it running?", kind="unreachable"
            )
        status = error.status_code if isinstance(error, library.APIStatusError) else 0
        reason = self._server_reason(error)
        if status in (401, 403):
            return ModelError(f"{where} refuses the key: {reason}", hint="check model.api_key_file", kind="refused")
        if any(code in f"{error.type} {error.code}" for code in _CONTEXT_CODES):
            return ModelError(f"the conversation is too long for the model: {reason}", kind="context")
        if status in _OVERLOADED:
            return ModelError(f"{where} is overloaded: {reason}", hint="try again later", kind="overloaded")
        if _PARSER_COMPLAINT.search(reason):
            return ModelError(f"the model wrote what {where} cannot read: {reason}", kind="bad-output")
        return ModelError(f"{where} refuses the request: {reason}", kind="refused")

    def _server_reason(self, error: openai.APIError) -> str:
        """The server's own words, on one line; people read them, and some servers quote the key in them."""
        body = error.body
        message = str((body.get("message") if isinstance(body, dict) else None) or error.message)
        if self._key:
            message = message.replace(self._key, "[key]")
        return " ".join(message.split())[:300]


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


def _root_reason(error: BaseException) -> str:
    """The operating system's reason at the bottom of a chain of exceptions."""
    cause: BaseException | None = error
    reason = str(error)
    while cause:
        if isinstance(cause, OSError) and cause.errno and cause.errno > 0:
            return os.strerror(cause.errno).lower()
        if isinstance(cause, OSError) and cause.strerror:  # a name that does not resolve
            return cause.strerror.lower()
        reason = str(cause) or reason
        cause = cause.__cause__ or cause.__context__
    return reason
