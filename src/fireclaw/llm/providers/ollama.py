"""An Ollama server by its own API and the official client: the only way to set the context, and to see what it has."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar, cast

from fireclaw.errors import ModelError
from fireclaw.llm.chat import ChatMessage, ChatRequest, Finish, JsonObject, Role, Tool, Usage
from fireclaw.llm.fetch import Progress
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
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator
    from types import ModuleType

    import ollama

    from fireclaw.llm.fetch import OnProgress

T = TypeVar("T")

_OVERLOADED: Final = (429, 502, 503)
_TOO_LONG: Final = re.compile(r"exceeds? the (?:available )?context|context length|input length exceeds")
# Its runner, a process of its own, died under the call; Ollama starts the next one by itself.
_RUNNER_DIED: Final = re.compile(
    r"runner process|unexpected EOF|forcibly closed|connection re(?:set|fused)|error was encountered while running"
)
_BAD_CALL: Final = re.compile(r"error parsing tool call|invalid character .* in (?:string|literal)|failed to parse")


@dataclass(frozen=True)
class InstalledModel:
    """A model on an Ollama's disk.

    Attributes:
        name: with its tag.
        size: bytes.
    """

    name: str
    size: int


@dataclass(frozen=True)
class Abilities:
    """What Ollama says that a model can do.

    Attributes:
        chat: it answers.
        tools: its template knows tools.
        context: the longest context it was trained for, tokens; 0: not said.
    """

    chat: bool
    tools: bool
    context: int


class OllamaProvider:
    """One Ollama; see ``base.Provider``.

    Args:
        libraries: ``ollama``, and ``httpx``, whose errors it lets through.
        client: its client.
        where: its address.
        context: tokens of context, for every call the same: Ollama loads a model anew when it changes.
    """

    def __init__(
        self, libraries: tuple[ModuleType, ModuleType], client: ollama.AsyncClient, where: str, context: int
    ) -> None:
        self._library, self._http = libraries
        self._client = client
        self._where = where
        self._context = context

    @classmethod
    async def connect(cls, where: str, *, context: int, local: bool) -> OllamaProvider:
        """Make the client; nothing is sent yet.

        Args:
            where: its address, e.g. ``http://127.0.0.1:11434``.
            context: tokens of context for every call.
            local: it is on this host, so that no proxy of the environment may stand in between.
        """
        library = await load_library("ollama")
        http = await load_library("httpx")
        # Without this header the client sends OLLAMA_API_KEY, which is meant for its makers' servers, to any server.
        headers = {"authorization": "Bearer none"}
        client = library.AsyncClient(host=where, headers=headers, trust_env=not local)
        return cls((library, http), client, where, context)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.close()  # type: ignore[no-untyped-call]  # the library has it so

    async def names(self) -> list[str]:
        """The names of the installed models, the newest first.

        Raises:
            ModelError: it does not answer.
        """
        return [model.name for model in await self.installed()]

    async def installed(self) -> list[InstalledModel]:
        """The installed models, the newest first.

        Raises:
            ModelError: it does not answer.
        """
        async with self._within(LIST_TIMEOUT_S):
            found = await self._client.list()
        return [InstalledModel(model.model or "", int(model.size or 0)) for model in found.models]

    async def running(self) -> set[str]:
        """The names of the models in memory.

        Raises:
            ModelError: it does not answer.
        """
        async with self._within(LIST_TIMEOUT_S):
            found = await self._client.ps()
        return {model.model or model.name or "" for model in found.models}

    async def abilities(self, model: str) -> Abilities:
        """What a model can do.

        Raises:
            ModelError: it does not have the model, or does not answer.
        """
        async with self._within(LIST_TIMEOUT_S, model):
            found = await self._client.show(model)
        can = found.capabilities or []
        lengths = [value for key, value in (found.modelinfo or {}).items() if key.endswith(".context_length")]
        context = lengths[0] if lengths and isinstance(lengths[0], int) else 0
        return Abilities("completion" in can, "tools" in can, context)

    async def pull(self, model: str, on_progress: OnProgress) -> None:
        """Have Ollama fetch a model; what came so far stays if it is cancelled.

        Raises:
            ModelError: it cannot, and why.
        """
        with self._explained(model):
            async with aclosing(_generator(await self._client.pull(model, stream=True))) as parts:
                async for part in parts:
                    text = f"{model} from Ollama: {part.status}"
                    on_progress(Progress(text, int(part.completed or 0), int(part.total or 0)))

    async def complete(
        self, model: str, request: ChatRequest, *, schema: JsonObject | None, timeout_s: float
    ) -> RawReply:
        """Ask once; see ``base.Provider``.

        With a schema it takes no tools: its grammar and its parser exclude each other.

        Raises:
            ModelError: with the kind that says how it failed.
        """
        assert schema is None or not request.tools, "a request with tools has no schema here"
        async with self._within(timeout_s, model):
            answer = await self._client.chat(
                model=model,
                messages=_messages(request.messages),
                tools=[_tool(tool) for tool in request.tools],
                stream=True,
                format=dict(schema) if schema is not None else None,
                options={
                    "num_ctx": self._context,
                    "num_predict": request.max_tokens,
                    "temperature": request.temperature,
                },
            )
            reply = _Collector()
            async with aclosing(_generator(answer)) as parts:
                async for part in parts:
                    reply.add(part)
        if not reply.has_begun:
            raise no_reply(self._where)
        return reply.done()

    @contextmanager
    def _explained(self, model: str = "") -> Iterator[None]:
        """Turn the client's errors into ours."""
        try:
            yield
        except self._library.ResponseError as error:
            raise self._explain(error, model) from error
        except (ConnectionError, self._http.HTTPError) as error:
            raise unreachable(self._where, error) from error
        except ValueError as error:  # no JSON, or JSON of another shape
            raise not_json(self._where) from error

    @asynccontextmanager
    async def _within(self, seconds: float, model: str = "") -> AsyncIterator[None]:
        """The same, with a time limit."""
        try:
            with self._explained(model):
                async with asyncio.timeout(seconds):
                    yield
        except TimeoutError as error:
            raise no_answer(self._where, seconds) from error

    def _explain(self, error: ollama.ResponseError, model: str) -> ModelError:
        where = f"the model server at {self._where}"
        reason = server_words(str(error.error), "")
        status = error.status_code
        if status == 404:
            return ModelError(
                f"{where} has no model {model!r}", hint=f"fetch it: fireclaw models pull {model}", kind="refused"
            )
        if status in _OVERLOADED:
            return ModelError(f"{where} is overloaded: {reason}", hint="try again later", kind="overloaded")
        if _TOO_LONG.search(reason):
            return ModelError(f"the conversation is too long for the model: {reason}", kind="context")
        if _BAD_CALL.search(reason):
            return ModelError(f"the model wrote what {where} cannot read: {reason}", kind="bad-output")
        if _RUNNER_DIED.search(reason):
            return ModelError(f"{where} broke off: {reason}", kind="unreachable")
        return ModelError(f"{where} refuses the request: {reason}", kind="refused")


def _generator(parts: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """What the client types as an iterator is a generator, which ends the call when it is closed."""
    return cast("AsyncGenerator[T, None]", parts)


def _messages(messages: tuple[ChatMessage, ...]) -> list[dict[str, object]]:
    tools = {call.id: call.name for message in messages for call in message.tool_calls}
    return [_message(message, tools) for message in messages]


def _message(message: ChatMessage, tools: dict[str, str]) -> dict[str, object]:
    value: dict[str, object] = {"role": message.role.value, "content": message.text}
    if message.tool_calls:
        calls = ({"name": call.name, "arguments": dict(call.arguments)} for call in message.tool_calls)
        value["tool_calls"] = [{"function": call} for call in calls]
    if message.role is Role.TOOL:
        value["tool_name"] = tools.get(message.tool_call_id, "")
    return value


def _tool(tool: Tool) -> dict[str, object]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


class _Collector:
    """Puts the pieces of a streamed reply together."""

    def __init__(self) -> None:
        self.has_begun = False
        self._text: list[str] = []
        self._calls: list[RawCall] = []
        self._finish = Finish.LENGTH  # until the server says that it came to an end
        self._usage = Usage()
        self._model = ""

    def add(self, part: ollama.ChatResponse) -> None:
        self.has_begun = True
        self._model = part.model or self._model
        self._text.append(part.message.content or "")
        for call in part.message.tool_calls or ():
            arguments = json.dumps(dict(call.function.arguments), ensure_ascii=False)
            self._calls.append(RawCall("", call.function.name, arguments))
        if part.done:
            # Counts of zero are left out.
            self._usage = Usage(part.prompt_eval_count or 0, 0, part.eval_count or 0)
            if part.done_reason == "stop":
                self._finish = Finish.STOP

    def done(self) -> RawReply:
        return RawReply("".join(self._text), tuple(self._calls), self._finish, self._usage, self._model)
