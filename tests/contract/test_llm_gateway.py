"""The gateway on a real llama.cpp that serves scripted models, and on servers that lie."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import urllib.request
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fireclaw.errors import ModelError
from fireclaw.llm import embedded as embedded_module
from fireclaw.llm import gateway as gateway_module
from fireclaw.llm.catalogue import PackageSource
from fireclaw.llm.chat import ChatMessage, ChatReply, ChatRequest, Finish, Role, Tool, Usage
from fireclaw.llm.embedded import EmbeddedServer, Endpoint
from fireclaw.llm.fetch import model_path
from fireclaw.llm.gateway import Gateway, State
from fireclaw.llm.providers.openai import OpenAIProvider
from fireclaw.llm.repair import Unusable, call_schema, judge
from fireclaw.llm.settings import ModelSettings
from fireclaw.testing.scripted_model import Rule, call, scripted_entry, scripted_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    from fireclaw.llm.catalogue import Entry
    from fireclaw.llm.fetch import Tick

RULES = [
    Rule("hello there", user="hello"),
    Rule(call("run_command", command="uname -r"), user="kernel", results=0, tools=True),
    Rule("it is 6.12.48", user="kernel", results=1, last="6.12.48"),
    Rule('{"name": "run_command", "arguments": {"command": "id"}}', user="forced"),
    Rule("thawed", user="on ice"),
    Rule("on and on and on, without an end. ", user="forever", endless=True),
    Rule(call("run_command", command=f"echo {list(range(60))}"), user="long call"),
]
RUN = Tool(
    "run_command",
    "Run a command.",
    {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
)
SETTINGS = ModelSettings(context=16384, timeout_s=30)


@dataclass
class Ledger:
    """Keeps what is recorded."""

    events: list[tuple[str, dict[str, object]]] = field(default_factory=list)

    def record(self, kind: str, data: Mapping[str, object]) -> None:
        """Append an event."""
        self.events.append((kind, dict(data)))

    @property
    def types(self) -> list[str]:
        """The types of the events."""
        return [kind for kind, _ in self.events]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Entry]:
    """A folder of model files with the scripted model in it, and its entry."""
    folder = tmp_path_factory.mktemp("models")
    entry = scripted_entry(folder / "scripted.gguf", RULES)
    (folder / "scripted.gguf").rename(model_path(entry, folder))
    return folder, entry


@asynccontextmanager
async def running(
    models: tuple[Path, Entry], settings: ModelSettings = SETTINGS, ledger: Ledger | None = None
) -> AsyncIterator[Gateway]:
    """A gateway that was started on the scripted model."""
    folder, entry = models
    gateway = Gateway(settings, (ledger or Ledger()).record, models=folder, entry=entry)
    try:
        await gateway.start()
        yield gateway
    finally:
        await gateway.aclose()


def asking(text: str, *more: ChatMessage, **changes: Any) -> ChatRequest:
    """A request of the agent ``worker``."""
    messages = (ChatMessage(Role.SYSTEM, "You are worker."), ChatMessage(Role.USER, text), *more)
    request = ChatRequest("worker", "turn-1", 0, "call-1", messages, tools=(RUN,), max_tokens=200)
    return replace(request, **changes)


def server_of(gateway: Gateway) -> EmbeddedServer:
    """The embedded server of a gateway."""
    return gateway._embedded.servers[gateway.model]


async def busy_slots(gateway: Gateway) -> int:
    """How many calls llama.cpp is working on."""
    endpoint = await server_of(gateway).ensure()
    request = urllib.request.Request(
        endpoint.base_url.removesuffix("/v1") + "/slots", headers={"Authorization": f"Bearer {endpoint.api_key}"}
    )

    def ask() -> int:
        with urllib.request.urlopen(request, timeout=10) as response:
            return sum(bool(slot["is_processing"]) for slot in json.load(response))

    return await asyncio.to_thread(ask)


async def until_busy(gateway: Gateway, slots: int) -> None:
    """Wait until llama.cpp works on so many calls."""
    async with asyncio.timeout(20):
        while await busy_slots(gateway) != slots:
            pass


async def test_a_question_is_answered_and_recorded(models: tuple[Path, Entry]) -> None:
    """The embedded server answers; the ledger tells the call with its tokens before and after."""
    ledger = Ledger()
    async with running(models, ledger=ledger) as gateway:
        assert (gateway.state, gateway.detail, gateway.model) == (State.READY, "", "scripted")
        reply = await gateway.chat(asking("hello"))
    assert (reply.text, reply.tool_calls, reply.finish, reply.model) == ("hello there", (), Finish.STOP, "scripted")
    assert reply.usage.input_tokens > 100
    assert reply.usage.output_tokens == 3
    (started, before), (done, after) = ledger.events
    assert (started, done) == ("model.call.started", "model.call.done")
    assert before == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "llama.cpp",
        "gen_ai.request.model": "scripted",
        "gen_ai.request.max_tokens": 200,
        "gen_ai.request.temperature": 0.2,
        "gen_ai.agent.name": "worker",
        "turn_id": "turn-1",
        "step": 0,
        "call_id": "call-1",
        "attempt": 1,
    }
    assert after["gen_ai.usage.output_tokens"] == 3
    assert after["gen_ai.response.finish_reasons"] == ["stop"]
    assert after["call_id"] == "call-1"


async def test_a_tool_call_goes_there_and_back(models: tuple[Path, Entry]) -> None:
    """The model asks for a command, gets its result, and answers from it."""
    async with running(models) as gateway:
        first = await gateway.chat(asking("which kernel?"))
        assert first.finish is Finish.TOOL_CALLS
        (wish,) = first.tool_calls
        assert (wish.name, wish.arguments, wish.error) == ("run_command", {"command": "uname -r"}, "")
        result = (
            ChatMessage(Role.ASSISTANT, first.text, first.tool_calls),
            ChatMessage(Role.TOOL, "6.12.48", tool_call_id=wish.id),
        )
        second = await gateway.chat(asking("which kernel?", *result))
    assert second.text == "it is 6.12.48"
    assert second.usage.cached_tokens > 0


async def test_a_warm_prompt_is_known_when_the_question_comes(models: tuple[Path, Entry]) -> None:
    """What a prompt begins with is read ahead, for one token that the ledger counts, and then comes from the cache."""
    ledger = Ledger()
    async with running(models, ledger=ledger) as gateway:
        await gateway.warm(asking("which kernel?"))
        (warm,) = [data for name, data in ledger.events if name == "model.call.done"]
        assert warm["gen_ai.usage.output_tokens"] == 1
        reply = await gateway.chat(asking("which kernel?"))
    assert reply.usage.cached_tokens > reply.usage.input_tokens // 2


async def test_the_server_holds_a_forced_reply_to_the_schema(models: tuple[Path, Entry]) -> None:
    """With a schema the model can only call a tool or respond: a script that says otherwise is overruled."""
    async with running(models) as gateway:
        provider = await OpenAIProvider.connect(await server_of(gateway).ensure(), local=True)
        legal = await provider.complete("scripted", asking("forced"), schema=call_schema([RUN]), timeout_s=30)
        overruled = await provider.complete("scripted", asking("hello"), schema=call_schema([RUN]), timeout_s=30)
        await provider.aclose()
    assert json.loads(legal.text) == {"name": "run_command", "arguments": {"command": "id"}}
    assert overruled.text.lstrip().startswith("{")


async def test_a_call_that_was_cut_off_is_refused(models: tuple[Path, Entry]) -> None:
    """llama.cpp sends half the JSON of a call that met the token limit; nothing is made of it."""
    async with running(models) as gateway:
        provider = await OpenAIProvider.connect(await server_of(gateway).ensure(), local=True)
        raw = await provider.complete("scripted", asking("long call", max_tokens=20), schema=None, timeout_s=30)
        await provider.aclose()
    assert raw.calls[0].name == "run_command"
    assert raw.calls[0].arguments.startswith('{"command": "echo')
    assert judge(raw, [RUN], "call-1") == Unusable("the call was cut off")


async def test_a_conversation_that_is_too_long_is_told_apart(models: tuple[Path, Entry]) -> None:
    """More than the context is refused by the server, and the agent can see why."""
    async with running(models, replace(SETTINGS, context=512)) as gateway:
        with pytest.raises(ModelError, match="too long for the model") as caught:
            await gateway.chat(asking("hello " * 200))
        assert caught.value.kind == "context"
        assert gateway.state is State.READY


async def test_a_call_that_takes_too_long_ends(models: tuple[Path, Entry]) -> None:
    """The time limit holds, and the server stops working on it."""
    async with running(models, replace(SETTINGS, timeout_s=1)) as gateway:
        with pytest.raises(ModelError, match="did not answer within 1 s") as caught:
            await gateway.chat(asking("forever", max_tokens=10000))
        assert caught.value.kind == "timeout"
        await until_busy(gateway, 0)


async def test_a_cancelled_call_frees_its_slot(models: tuple[Path, Entry]) -> None:
    """Who gives up stops the work, and the ledger says so."""
    ledger = Ledger()
    async with running(models, ledger=ledger) as gateway:
        task = asyncio.create_task(gateway.chat(asking("forever", max_tokens=10000)), name="forever")
        await until_busy(gateway, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until_busy(gateway, 0)
        assert (await gateway.chat(asking("hello"))).text == "hello there"
    assert ledger.types[:2] == ["model.call.started", "model.call.failed"]
    assert ledger.events[1][1]["error.type"] == "cancelled"


async def test_a_call_whose_server_was_killed_is_made_once_more(models: tuple[Path, Entry]) -> None:
    """A call in flight goes on with a new server; when that dies as well it fails with a reason, and the next works."""
    ledger = Ledger()
    async with running(models, ledger=ledger) as gateway:
        task = asyncio.create_task(gateway.chat(asking("forever", max_tokens=10000)), name="forever")
        pids = []
        for _ in range(2):
            await until_busy(gateway, 1)
            pid = server_of(gateway).pid
            assert pid
            pids.append(pid)
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(ModelError, match="the model server at") as caught:
            await task
        assert caught.value.kind == "unreachable"
        assert gateway.state == "failed"
        assert (await gateway.chat(asking("hello"))).text == "hello there"
        assert gateway.state == "ready"
        assert len({*pids, server_of(gateway).pid}) == 3
    assert ledger.types.count("model.call.failed") == 2


async def test_a_server_that_hangs_under_a_call_is_replaced(
    models: tuple[Path, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that stopped answering is ended in the middle of the call, which goes on with a new one."""
    monkeypatch.setattr(embedded_module, "_WATCH_S", 0.05)
    monkeypatch.setattr(embedded_module, "_HEALTH_TIMEOUT_S", 2.0)
    async with running(models) as gateway:
        pid = server_of(gateway).pid
        assert pid
        task = asyncio.create_task(gateway.chat(asking("on ice")), name="on ice")
        os.kill(pid, signal.SIGSTOP)
        assert (await task).text == "thawed"
        assert server_of(gateway).pid != pid


async def test_a_server_that_died_idle_is_replaced_before_the_call(models: tuple[Path, Entry]) -> None:
    """Nobody sees that the server was gone between two calls."""
    async with running(models) as gateway:
        pid = server_of(gateway).pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        assert (await gateway.chat(asking("hello"))).text == "hello there"


async def test_calls_beyond_the_limit_wait(models: tuple[Path, Entry]) -> None:
    """One call at a time where the settings say so, and the waiting is visible."""
    async with running(models, replace(SETTINGS, parallel=1)) as gateway:
        first = asyncio.create_task(gateway.chat(asking("forever", max_tokens=10000)), name="first")
        await until_busy(gateway, 1)
        second = asyncio.create_task(gateway.chat(asking("hello", agent="other")), name="second")
        await asyncio.sleep(0)  # it runs up to where it must wait
        assert (gateway.running, gateway.waiting) == (1, 1)
        first.cancel()
        assert (await second).text == "hello there"
        assert (gateway.running, gateway.waiting) == (0, 0)


async def test_the_key_stands_in_no_argv_and_no_environment(models: tuple[Path, Entry]) -> None:
    """Other users of the host cannot read it, and without it the server refuses."""
    async with running(models) as gateway:
        endpoint = await server_of(gateway).ensure()
        process = Path(f"/proc/{server_of(gateway).pid}")
        for name in ("cmdline", "environ"):
            assert endpoint.api_key.encode() not in (process / name).read_bytes()
        provider = await OpenAIProvider.connect(replace(endpoint, api_key="wrong"), local=True)
        with pytest.raises(ModelError, match="refuses the key") as caught:
            await provider.complete("scripted", asking("hello"), schema=None, timeout_s=30)
        await provider.aclose()
        assert caught.value.kind == "refused"


async def test_the_server_ends_with_its_parents_end_of_the_pipe(models: tuple[Path, Entry]) -> None:
    """A parent that is gone, however it went, leaves no server: even in the middle of a reply."""
    async with running(models) as gateway:
        task = asyncio.create_task(gateway.chat(asking("forever", max_tokens=10000)), name="forever")
        await until_busy(gateway, 1)
        process = server_of(gateway)._process
        assert process
        assert process.stdin
        process.stdin.close()
        assert await asyncio.wait_for(process.wait(), 10) == 0
        task.cancel()  # it is being made once more
        await asyncio.wait([task])


async def test_no_proxy_stands_between_us_and_our_own_server(
    models: tuple[Path, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy of the environment never sees what agents say to the embedded model."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with running(models) as gateway:
        assert (await gateway.chat(asking("hello"))).text == "hello there"


async def test_a_file_that_is_no_model_is_said_so(models: tuple[Path, Entry], tmp_path: Path) -> None:
    """llama.cpp's refusal to load comes back as an error, and no process stays."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(4096))
    server = EmbeddedServer(path, models[1], context=512, slots=1)
    with pytest.raises(ModelError, match="the model server cannot load 'scripted': "):
        await server.ensure()
    assert server.pid is None


async def test_a_host_without_the_memory_says_so_before_it_loads(models: tuple[Path, Entry]) -> None:
    """The need is compared with what is free; the message has both numbers and a way out."""
    folder, entry = models
    greedy = replace(entry, kv_bytes=1 << 40)
    async with running((folder, greedy)) as gateway:
        assert gateway.state is State.FAILED
        assert "MiB of memory" in gateway.detail
        assert "choose a smaller model" in gateway.detail


async def test_a_fetch_is_visible_and_ends_with_the_gateway(
    models: tuple[Path, Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question during the first fetch is told how far it is; closing the gateway stops the fetch."""
    monkeypatch.setattr(gateway_module, "_PATIENCE_S", 0.01)
    half = models[1].size // 2
    stopped = threading.Event()

    def download(package: str, version: str, folder: Path, tick: Tick) -> Path:
        del package, version, folder
        try:
            while True:
                tick(half)
        finally:
            stopped.set()

    entry = replace(models[1], sources=(PackageSource(("piece",), "1.0", "*"),))
    gateway = Gateway(SETTINGS, Ledger().record, models=tmp_path, entry=entry, download=download)
    seen = asyncio.Event()
    starting = asyncio.create_task(
        gateway.start(lambda progress: seen.set() if progress.done == half else None), name="start"
    )
    await seen.wait()
    assert gateway.state == "fetching"
    with pytest.raises(ModelError, match=r"not ready: fetching scripted from the mirror piece .* \(50 %\)"):
        await gateway.chat(asking("hello"))
    await gateway.aclose()
    assert await asyncio.to_thread(stopped.wait, 10)
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert gateway.state == "off"


async def test_any_compatible_server_does_by_one_setting(tmp_path: Path) -> None:
    """With only a base URL (and the key it wants) the server's first model is used."""
    async with scripted_server(tmp_path, RULES) as endpoint:
        key = tmp_path / "key"
        key.touch(0o600)
        key.write_text(endpoint.api_key + "\n")
        settings = ModelSettings(base_url=endpoint.base_url, api_key_file=key)
        gateway = Gateway(settings, Ledger().record, models=tmp_path)
        await gateway.start()
        assert (gateway.state, gateway.model, gateway.provider) == (State.READY, "scripted", "openai-compatible")
        assert (await gateway.chat(asking("hello"))).text == "hello there"
        await gateway.aclose()


async def test_a_server_that_is_not_there_is_named_with_the_reason(tmp_path: Path) -> None:
    """Nobody listens: the state, and each call, say where and why."""
    gateway = Gateway(ModelSettings(base_url="http://127.0.0.1:9/v1"), Ledger().record, models=tmp_path)
    await gateway.start()
    assert gateway.state is State.FAILED
    words = "the model server at http://127.0.0.1:9/v1 does not answer: connection refused"
    assert words in gateway.detail
    with pytest.raises(ModelError) as caught:
        await gateway.chat(asking("hello"))
    assert words in caught.value.message
    assert caught.value.kind == "unreachable"
    await gateway.aclose()


@dataclass
class Liar:
    """A server that answers what a test wants, in turn; the last answer for ever.

    Attributes:
        endpoint: where it listens.
        answers: status and body of each answer.
        seen: the requests' headers and bodies.
    """

    endpoint: Endpoint
    answers: list[tuple[int, str]] = field(default_factory=list)
    seen: list[tuple[dict[str, str], Any]] = field(default_factory=list)


@pytest.fixture
def liar() -> Iterator[Liar]:
    """A liar in a thread of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.seen.append((dict(self.headers), json.loads(body)))
            status, text = found.answers.pop(0) if len(found.answers) > 1 else found.answers[0]
            self.send_response(status)
            self.send_header("Content-Type", "text/event-stream" if text.startswith("data:") else "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Liar(Endpoint(f"http://127.0.0.1:{server.server_port}/v1", ""))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def said(text: str | None, finish: str | None = "stop", **delta: object) -> tuple[int, str]:
    """A regular answer, streamed: words, end, tokens."""
    common = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    usage = {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12}
    words = {"index": 0, "delta": {"role": "assistant", "content": text, **delta}, "finish_reason": None}
    end = {"index": 0, "delta": {}, "finish_reason": finish}
    chunks = [
        common | {"choices": [words]},
        common | {"choices": [end]},
        common | {"choices": [], "usage": usage},
    ]
    return 200, "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def complained(status: int, message: str, kind: str = "") -> tuple[int, str]:
    """An answer that is an error."""
    return status, json.dumps({"error": {"message": message, "type": kind, "code": status}})


async def ask(liar: Liar, tmp_path: Path, ledger: Ledger | None = None) -> ChatReply:
    """Ask a liar something through a gateway."""
    settings = ModelSettings(base_url=liar.endpoint.base_url, model="m", timeout_s=30)
    gateway = Gateway(settings, (ledger or Ledger()).record, models=tmp_path)
    try:
        return await gateway.chat(asking("hello"))
    finally:
        await gateway.aclose()


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (complained(401, "no such key"), "refused", "refuses the key: no such key"),
        (complained(404, "no model m"), "refused", "refuses the request: no model m"),
        (complained(400, "tools are not supported"), "refused", "tools are not supported"),
        (complained(400, "12 > 10", "exceed_context_size_error"), "context", "too long for the model: 12 > 10"),
        (complained(429, "slow down"), "overloaded", "is overloaded: slow down"),
        (complained(503, "busy"), "overloaded", "is overloaded: busy"),
        (complained(500, "out of order"), "refused", "out of order"),
        ((502, "<html>Bad Gateway</html>"), "overloaded", "is overloaded"),
        (complained(500, "does not match the expected peg-native format"), "bad-output", "in 4 attempts"),
        ((200, "{}"), "bad-output", "in 4 attempts"),
        ((200, '"<html>"'), "bad-output", "in 4 attempts"),
        ((200, "data: <html>\n\n"), "bad-output", "in 4 attempts: the model server at"),
        ((200, 'data: {"error": {"message": "out of memory"}}\n\n'), "refused", "out of memory"),
        (said(""), "bad-output", "in 4 attempts: the reply was empty"),
        (said('{"name": "run_command", "argum', "length"), "bad-output", "in 4 attempts: it called a tool where"),
    ],
)
async def test_each_way_to_fail_has_its_kind_and_words(
    liar: Liar, tmp_path: Path, answer: tuple[int, str], kind: str, words: str
) -> None:
    """What a server answers becomes an error that people understand and agents can branch on."""
    liar.answers = [answer]
    ledger = Ledger()
    with pytest.raises(ModelError) as caught:
        await ask(liar, tmp_path, ledger)
    assert caught.value.kind == kind
    assert words in caught.value.message
    assert len(ledger.events) == 2 * len(liar.seen)


async def test_a_bad_reply_is_asked_for_again_warmer(liar: Liar, tmp_path: Path) -> None:
    """An empty reply and a parser's complaint are followed by a good one; all attempts are metered."""
    liar.answers = [said(""), complained(500, "does not match the expected peg-native format"), said("hi")]
    ledger = Ledger()
    reply = await ask(liar, tmp_path, ledger)
    assert (reply.text, reply.attempts, reply.usage) == ("hi", 3, Usage(20, 0, 4))
    assert [body["temperature"] for _, body in liar.seen] == [0.2, 0.5, 0.8]
    assert [kind.removeprefix("model.call.") for kind in ledger.types] == [
        *("started", "done"),
        *("started", "failed"),
        *("started", "done"),
    ]
    assert ledger.events[1][1]["unusable"] == "the reply was empty"


async def test_the_last_attempt_offers_no_tools(liar: Liar, tmp_path: Path) -> None:
    """After two bad retries the model may only talk."""
    liar.answers = [said(""), said(""), said(""), said("I cannot.")]
    assert (await ask(liar, tmp_path)).text == "I cannot."
    assert ["tools" in body for _, body in liar.seen] == [True, True, True, False]


async def test_a_text_call_is_rescued(liar: Liar, tmp_path: Path) -> None:
    """A server that does not parse its model's calls still gets them executed."""
    liar.answers = [said('```json\n{"name": "run_command", "arguments": {"command": "ls"}}\n```')]
    reply = await ask(liar, tmp_path)
    assert [(wish.name, wish.arguments) for wish in reply.tool_calls] == [("run_command", {"command": "ls"})]
    assert reply.text == ""


async def test_a_reply_without_content_and_usage_is_understood(liar: Liar, tmp_path: Path) -> None:
    """Some servers send null, or nothing, where others send a text or numbers."""
    pieces = [
        {"index": 0, "id": "1", "type": "function", "function": {"name": "run_command", "arguments": '{"comm'}},
        {"index": 0, "function": {"arguments": 'and": "ls"}'}},
    ]
    status, body = said(None, "tool_calls", tool_calls=pieces)
    liar.answers = [(status, body.replace("usage", "other"))]
    reply = await ask(liar, tmp_path)
    assert [(wish.id, wish.arguments) for wish in reply.tool_calls] == [("1", {"command": "ls"})]
    assert reply.usage == Usage()


async def test_a_reply_without_an_end_counts_as_cut_off(liar: Liar, tmp_path: Path) -> None:
    """A stream that just stops is not taken for the whole."""
    liar.answers = [said("Once upon", None)]
    assert (await ask(liar, tmp_path)).finish is Finish.LENGTH


async def test_no_key_of_the_environment_goes_to_a_server(
    liar: Liar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that lies in the environment for another service is not sent to this one."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-secret")
    liar.answers = [said("hi")]
    await ask(liar, tmp_path)
    assert "secret" not in json.dumps(liar.seen)


async def test_a_key_file_that_cannot_be_read_is_named(liar: Liar, tmp_path: Path) -> None:
    """The path and the reason are in the state."""
    settings = ModelSettings(base_url=liar.endpoint.base_url, model="m", api_key_file=tmp_path / "none")
    gateway = Gateway(settings, Ledger().record, models=tmp_path)
    await gateway.start()
    assert "there is no key in" in gateway.detail
    with pytest.raises(ModelError, match="umask 077"):
        await gateway.chat(asking("hello"))
    await gateway.aclose()
