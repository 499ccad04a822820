"""Anthropic's Messages API by the official client: on a real llama.cpp, which speaks it too, and on a liar."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest

from fireclaw.errors import InvalidError, ModelError, NotFoundError
from fireclaw.llm.chat import ChatMessage, ChatRequest, Finish, Role, Tool, ToolCall, Usage
from fireclaw.llm.gateway import Gateway
from fireclaw.llm.settings import ModelSettings
from fireclaw.testing.scripted_model import Rule, call, scripted_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from fireclaw.llm.embedded import Endpoint

RUN = Tool(
    "run_command",
    "Run a command.",
    {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
)
RULES = [
    Rule("hello there", user="hello"),
    Rule(call("run_command", command="uname -r"), user="kernel", results=0, tools=True),
    Rule("it is 6.12.48", last="6.12.48"),
    Rule("on and on and on, without an end. ", user="forever", endless=True),
    Rule(call("run_command", command=f"echo {list(range(60))}"), user="long call"),
]
CLAUDE = "anthropic:scripted"


@asynccontextmanager
async def using(url: str, key: str, folder: Path, **changes: Any) -> AsyncIterator[Gateway]:
    """A gateway with a key for Anthropic's API at an address."""
    path = folder / "anthropic-key"
    path.touch(0o600)
    path.write_text(key + "\n")
    settings = ModelSettings(anthropic_key_file=path, anthropic_url=url.removesuffix("/v1"), timeout_s=30)
    events: list[tuple[str, Any]] = []
    gateway = Gateway(replace(settings, **changes), lambda *event: events.append(event), models=folder)
    try:
        yield gateway
    finally:
        await gateway.aclose()


def asking(text: str, *more: ChatMessage, **changes: Any) -> ChatRequest:
    """A request of the agent ``worker``."""
    messages = (ChatMessage(Role.SYSTEM, "You are worker."), ChatMessage(Role.USER, text), *more)
    request = ChatRequest("worker", "turn-1", 0, "call-1", messages, tools=(RUN,), max_tokens=200, model=CLAUDE)
    return replace(request, **changes)


@pytest.fixture
async def endpoint(tmp_path: Path) -> AsyncIterator[Endpoint]:
    """A real llama.cpp."""
    async with scripted_server(tmp_path, RULES) as endpoint:
        yield endpoint


async def test_a_tool_call_goes_there_and_back(endpoint: Endpoint, tmp_path: Path) -> None:
    """Talk, a call, its result and the answer, all through the real API; the prompt is counted as a whole."""
    async with using(endpoint.base_url, endpoint.api_key, tmp_path) as gateway:
        hello = await gateway.chat(asking("hello"))
        assert (hello.text, hello.finish, hello.tool_calls) == ("hello there", Finish.STOP, ())
        assert hello.usage.input_tokens > 100
        assert hello.usage.output_tokens > 0
        first = await gateway.chat(asking("which kernel?"))
        (wish,) = first.tool_calls
        assert (wish.name, wish.arguments, wish.error) == ("run_command", {"command": "uname -r"}, "")
        result = (
            ChatMessage(Role.ASSISTANT, "", (replace(wish, id="turn/0 id"),)),
            ChatMessage(Role.TOOL, "6.12.48", tool_call_id="turn/0 id"),
        )
        second = await gateway.chat(asking("which kernel?", *result))
    assert second.text == "it is 6.12.48"
    assert 0 < second.usage.cached_tokens < second.usage.input_tokens


async def test_a_call_that_was_cut_off_is_never_made(endpoint: Endpoint, tmp_path: Path) -> None:
    """Half the JSON of a call at the token limit is no call, however often it comes."""
    async with using(endpoint.base_url, endpoint.api_key, tmp_path) as gateway:
        with pytest.raises(ModelError, match="no usable reply in 4 attempts") as caught:
            await gateway.chat(asking("long call", max_tokens=20))
    assert caught.value.kind == "bad-output"


async def test_a_wrong_key_and_a_long_prompt_are_told_apart(endpoint: Endpoint, tmp_path: Path) -> None:
    """Both are refusals of the server, with a kind of their own."""
    async with using(endpoint.base_url, "wrong", tmp_path) as gateway:
        with pytest.raises(ModelError, match="refuses the key") as caught:
            await gateway.chat(asking("hello"))
        assert caught.value.kind == "refused"
    async with using(endpoint.base_url, endpoint.api_key, tmp_path) as gateway:
        with pytest.raises(ModelError, match="too long for the model") as caught:
            await gateway.chat(asking("hello " * 8000))
        assert caught.value.kind == "context"


async def test_a_call_that_takes_too_long_ends(endpoint: Endpoint, tmp_path: Path) -> None:
    """The time limit holds in the middle of a stream."""
    async with using(endpoint.base_url, endpoint.api_key, tmp_path, timeout_s=1) as gateway:
        with pytest.raises(ModelError, match="did not answer within 1 s") as caught:
            await gateway.chat(asking("forever", max_tokens=10000))
        assert caught.value.kind == "timeout"


async def test_a_server_that_is_gone_is_named(tmp_path: Path) -> None:
    """It was there for the first call and not for the second."""
    async with scripted_server(tmp_path, RULES) as endpoint:
        gateway = using(endpoint.base_url, endpoint.api_key, tmp_path)
        way = await gateway.__aenter__()
        task = asyncio.create_task(way.chat(asking("forever", max_tokens=100000)), name="forever")
        while not way.running:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # it is being worked on
    with pytest.raises(ModelError, match="the model server at") as caught:
        await task
    assert caught.value.kind == "unreachable"
    await gateway.__aexit__(None, None, None)


@dataclass
class Liar:
    """A server that answers what a test wants, in turn; the last answer for ever.

    Attributes:
        url: where it listens.
        answers: status and body of each answer.
        seen: the requests' headers and bodies.
    """

    url: str
    answers: list[tuple[int, str]] = field(default_factory=list)
    seen: list[tuple[dict[str, str], Any]] = field(default_factory=list)


@pytest.fixture
def liar() -> Iterator[Liar]:
    """A liar in a thread of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.seen.append(({name.lower(): value for name, value in self.headers.items()}, json.loads(body)))
            self.reply(*(found.answers.pop(0) if len(found.answers) > 1 else found.answers[0]))

        def do_GET(self) -> None:
            models = [{"type": "model", "id": "claude-x", "display_name": "X", "created_at": "2026-01-01T00:00:00Z"}]
            self.reply(200, json.dumps({"data": models, "has_more": False, "first_id": None, "last_id": None}))

        def reply(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "text/event-stream" if text.startswith("event:") else "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Liar(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def events(*found: dict[str, Any]) -> tuple[int, str]:
    """A stream of events."""
    return 200, "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in found)


def said(text: str, stop: str | None = "end_turn", **usage: int) -> tuple[int, str]:
    """A regular answer, streamed: words, end, tokens."""
    counts = {"input_tokens": 10, "output_tokens": 1, **usage}
    message: dict[str, Any] = {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": "claude-x",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": counts,
    }
    return events(
        {"type": "message_start", "message": message},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "hm"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "ping"},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": text}},
        {"type": "content_block_stop", "index": 1},
        {"type": "something_new", "value": 1},
        {"type": "message_delta", "delta": {"stop_reason": stop}, "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    )


def complained(status: int, kind: str, message: str) -> tuple[int, str]:
    """An answer that is an error."""
    return status, json.dumps({"type": "error", "error": {"type": kind, "message": message}})


async def test_the_request_has_the_form_of_the_api(liar: Liar, tmp_path: Path) -> None:
    """Neighbours of one role are one message, ids have legal letters, the prompt is to be cached, nothing leaks in."""
    liar.answers = [said("ok")]
    wish = ToolCall("example id -un", "run_command", {"command": "id"})
    more = (
        ChatMessage(Role.ASSISTANT, " ", (wish, replace(wish, id="b"))),
        ChatMessage(Role.TOOL, "root", tool_call_id=wish.id),
        ChatMessage(Role.TOOL, "", tool_call_id="b"),
        ChatMessage(Role.USER, "so?"),
    )
    async with using(liar.url, "sk-1", tmp_path) as gateway:
        await gateway.chat(asking("hello", *more))
    ((headers, body),) = liar.seen
    assert "sk-1" in (headers.get("x-api-key"), headers.get("authorization", "").removeprefix("Bearer "))
    assert (body["model"], body["system"], body["stream"]) == ("scripted", "You are worker.", True)
    assert body["cache_control"] == {"type": "ephemeral"}
    assert "temperature" not in body
    assert body["tools"] == [{"name": "run_command", "description": RUN.description, "input_schema": RUN.parameters}]
    call_of = {"type": "tool_use", "name": "run_command", "input": {"command": "id"}}
    assert body["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        {"role": "assistant", "content": [{**call_of, "id": "example_id_-un"}, {**call_of, "id": "b"}]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "example_id_-un", "content": "root"},
                {"type": "tool_result", "tool_use_id": "b", "content": "(no output)"},
                {"type": "text", "text": "so?"},
            ],
        },
    ]


async def test_without_tools_earlier_calls_are_told_in_words(liar: Liar, tmp_path: Path) -> None:
    """The API refuses blocks of calls and results where no tools are offered: the last answer of a turn is such."""
    liar.answers = [said("ok")]
    wish = ToolCall("1", "run_command", {"command": "id"})
    more = (ChatMessage(Role.ASSISTANT, "", (wish,)), ChatMessage(Role.TOOL, "root", tool_call_id="1"))
    async with using(liar.url, "sk-1", tmp_path) as gateway:
        await gateway.chat(asking("hello", *more, tools=()))
    ((_, body),) = liar.seen
    assert "tools" not in body
    assert {block["type"] for message in body["messages"] for block in message["content"]} == {"text"}
    assert body["messages"][-1]["content"][0]["text"] == "[result of run_command]\nroot"


async def test_the_environments_key_is_never_sent(liar: Liar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the key in the file is used, whatever the environment holds."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-env")
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "token-env")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:9")
    liar.answers = [said("ok")]
    async with using(liar.url, "sk-1", tmp_path) as gateway:
        assert (await gateway.chat(asking("hello"))).text == "ok"
    assert "env" not in str(liar.seen[0][0])


async def test_tokens_are_counted_with_the_cache(liar: Liar, tmp_path: Path) -> None:
    """Their three counts of the prompt exclude each other; ours of the whole includes the cached and written ones."""
    liar.answers = [said("ok", cache_read_input_tokens=300, cache_creation_input_tokens=40)]
    async with using(liar.url, "sk-1", tmp_path) as gateway:
        reply = await gateway.chat(asking("hello"))
    assert reply.usage == Usage(input_tokens=350, cached_tokens=300, output_tokens=5, written_tokens=40)


@pytest.mark.parametrize(
    ("stop", "finish"),
    [
        ("end_turn", Finish.STOP),
        ("stop_sequence", Finish.STOP),
        ("max_tokens", Finish.LENGTH),
        ("model_context_window_exceeded", Finish.LENGTH),
        (None, Finish.LENGTH),
    ],
)
async def test_each_end_is_understood(liar: Liar, tmp_path: Path, stop: str | None, finish: Finish) -> None:
    """A reply is whole only if the server says so."""
    liar.answers = [said("some words", stop)]
    async with using(liar.url, "sk-1", tmp_path) as gateway:
        assert (await gateway.chat(asking("hello"))).finish is finish


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (complained(401, "authentication_error", "invalid x-api-key sk-1"), "refused", r"the key: .* \[key\]"),
        (complained(404, "not_found_error", "model: nope"), "refused", "refuses the request: model: nope"),
        (complained(400, "invalid_request_error", "prompt is too long: 9 > 8"), "context", "too long for the model"),
        (complained(400, "invalid_request_error", "credit balance is too low"), "refused", "credit balance"),
        (complained(429, "rate_limit_error", "slow down"), "overloaded", "overloaded: slow down"),
        (complained(529, "overloaded_error", "Overloaded"), "overloaded", "overloaded: Overloaded"),
        ((502, "<html>Bad Gateway</html>"), "overloaded", "is overloaded"),
        (
            events({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}),
            "overloaded",
            "overloaded: Overloaded",
        ),
        ((200, "event: message_start\ndata: <html>\n\n"), "bad-output", "in 4 attempts"),
        ((200, "{}"), "bad-output", "in 4 attempts: .* no reply"),
        (said("", "refusal"), "refused", "declines to answer"),
        (said(""), "bad-output", "the reply was empty"),
    ],
)
async def test_each_way_to_fail_has_its_kind_and_words(
    liar: Liar, tmp_path: Path, answer: tuple[int, str], kind: str, words: str
) -> None:
    """What the server answers becomes an error that people understand and agents can branch on."""
    liar.answers = [answer]
    async with using(liar.url, "sk-1", tmp_path) as gateway:
        with pytest.raises(ModelError, match=words) as caught:
            await gateway.chat(asking("hello"))
    assert caught.value.kind == kind


async def test_a_key_that_others_may_read_is_refused_with_its_mode(tmp_path: Path) -> None:
    """Nothing is sent; the message has the mode and the way to mend it."""
    async with using("http://127.0.0.1:9", "sk-1", tmp_path) as gateway:
        path = tmp_path / "anthropic-key"
        path.chmod(0o640)
        with pytest.raises(ModelError, match=r"its mode 0640 lets others at it .*chmod 600") as caught:
            await gateway.chat(asking("hello"))
        assert "sk-1" not in str(caught.value)
        path.unlink()
        with pytest.raises(NotFoundError, match=r"there is no key for 'anthropic:claude-x' .*umask 077"):
            await gateway.check("anthropic:claude-x")
        with pytest.raises(NotFoundError, match="did you mean 'anthropic:claude-x'"):
            await gateway.check("claude-x")


async def test_a_model_must_be_named(tmp_path: Path) -> None:
    """The provider alone is no choice: the newest model may be the dearest."""
    async with using("http://127.0.0.1:9", "sk-1", tmp_path, model="anthropic") as gateway:
        await gateway.start()
        assert "name it: anthropic:NAME" in gateway.detail
        with pytest.raises(InvalidError, match="is not fetched"):
            await gateway.pull("anthropic:claude-x", lambda _: None)


async def test_the_models_of_the_key_are_listed(liar: Liar, tmp_path: Path) -> None:
    """They run elsewhere; a server that does not answer is a problem that hides nothing else."""
    async with using(liar.url, "sk-1", tmp_path) as gateway:
        found = await gateway.list_models()
        assert "anthropic:claude-x" in [model.name for model in found.models]
    async with using("http://127.0.0.1:9", "sk-1", tmp_path) as gateway:
        found = await gateway.list_models()
        assert "embedded:smollm2-135m" in [model.name for model in found.models]
        assert "connection refused" in found.problems[0]
