"""The gateway on Ollama: one suite for the real program and for its double."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from llm_ollama import CONTEXT, Ollama, OllamaDouble, RealOllama, find_ollama

from fireclaw.errors import ModelError, NotFoundError
from fireclaw.llm.chat import ChatMessage, ChatRequest, Finish, Role, Tool
from fireclaw.llm.gateway import Gateway, State
from fireclaw.llm.models import model_lines
from fireclaw.llm.providers.ollama import OllamaProvider
from fireclaw.llm.settings import ModelSettings
from fireclaw.testing.scripted_model import Rule, call

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from fireclaw.llm.fetch import Progress

RUN = Tool(
    "run_command",
    "Run a command.",
    {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
)
TALK = [
    Rule("hello there", user="hello"),
    Rule(call("run_command", command="uname -r"), user="kernel", results=0, tools=True),
    Rule("it is 6.12.48", user="kernel", results=1, last="6.12.48"),
    Rule("on and on, with no end. ", user="forever", endless=True),
]
PHI = [Rule('{"name": "run_command", "arguments": {"command": "id"}}', user="who")]
GEMMA = [
    Rule('{"name": "run_command", "arguments": {"command": "df"}}', user="disk"),
    Rule('{"name": "respond", "arguments": {"message": "half of it is free"}}', user="result of run_command"),
]


@pytest.fixture(scope="module", params=["real", "double"])
def ollama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ollama]:
    """An Ollama with three models of different talents."""
    server: Ollama
    if request.param == "double":
        server = OllamaDouble()
    elif (program := find_ollama()) is not None:
        server = RealOllama(tmp_path_factory.mktemp("ollama"), program)
    else:
        pytest.skip("no Ollama here: set FIRECLAW_TEST_OLLAMA, or put it on PATH")
    server.start()
    try:
        server.create("gemma3:1b", GEMMA, tools=False)
        server.create("phi4-mini", PHI)
        server.create("qwen2.5:tiny", TALK)
        yield server
    finally:
        server.kill()


@asynccontextmanager
async def using(ollama: Ollama, folder: Path, **changes: Any) -> AsyncIterator[Gateway]:
    """A gateway beside a running Ollama."""
    settings = replace(ModelSettings(ollama=ollama.address, context=CONTEXT, timeout_s=60), **changes)
    gateway = Gateway(settings, lambda *_: None, models=folder)
    try:
        yield gateway
    finally:
        await gateway.aclose()


def asking(text: str, *more: ChatMessage, **changes: Any) -> ChatRequest:
    """A request of the agent ``worker``."""
    messages = (ChatMessage(Role.SYSTEM, "You are worker."), ChatMessage(Role.USER, text), *more)
    request = ChatRequest("worker", "turn-1", 0, "call-1", messages, tools=(RUN,), max_tokens=100)
    return replace(request, **changes)


async def test_a_running_ollama_is_found_and_preferred(ollama: Ollama, tmp_path: Path) -> None:
    """Without a wish the best of its models serves, not the embedded one; people are told once."""
    async with using(ollama, tmp_path) as gateway:
        await gateway.start()
        assert (gateway.state, gateway.model, gateway.provider) == (State.READY, "qwen2.5:tiny", "ollama")
        assert ollama.address in gateway.take_notice()
        assert gateway.take_notice() == ""
        reply = await gateway.chat(asking("hello"))
    assert (reply.text, reply.finish, reply.tool_calls, reply.model) == ("hello there", Finish.STOP, (), "qwen2.5:tiny")
    assert reply.usage.input_tokens > 20
    assert reply.usage.output_tokens > 1


async def test_a_tool_call_goes_there_and_back(ollama: Ollama, tmp_path: Path) -> None:
    """Ollama's own parser reads the call; the answer is made from the result."""
    async with using(ollama, tmp_path) as gateway:
        first = await gateway.chat(asking("which kernel?"))
        (wish,) = first.tool_calls
        assert (wish.name, wish.arguments, wish.error) == ("run_command", {"command": "uname -r"}, "")
        result = (
            ChatMessage(Role.ASSISTANT, first.text, first.tool_calls),
            ChatMessage(Role.TOOL, "6.12.48", tool_call_id=wish.id),
        )
        assert (await gateway.chat(asking("which kernel?", *result))).text == "it is 6.12.48"


async def test_a_call_written_as_bare_json_is_rescued(ollama: Ollama, tmp_path: Path) -> None:
    """Some models write their calls as text; they are calls all the same."""
    async with using(ollama, tmp_path) as gateway:
        reply = await gateway.chat(asking("who are you?", model="ollama:phi4-mini"))
    assert [(wish.name, wish.arguments) for wish in reply.tool_calls] == [("run_command", {"command": "id"})]
    assert reply.attempts == 1


async def test_a_model_without_tools_uses_them_by_schema(ollama: Ollama, tmp_path: Path) -> None:
    """Tools are told in words, and the reply is held to a schema, in which to talk is a choice."""
    async with using(ollama, tmp_path) as gateway:
        first = await gateway.chat(asking("the disk?", model="gemma3"))
        (wish,) = first.tool_calls
        assert (wish.name, wish.arguments) == ("run_command", {"command": "df"})
        result = (
            ChatMessage(Role.ASSISTANT, "", first.tool_calls),
            ChatMessage(Role.TOOL, "50 %", tool_call_id=wish.id),
        )
        second = await gateway.chat(asking("the disk?", *result, model="gemma3:1b"))
    assert (second.text, second.tool_calls) == ("half of it is free", ())


async def test_a_reply_at_the_token_limit_is_marked(ollama: Ollama, tmp_path: Path) -> None:
    """A long text is cut at the limit and says so."""
    async with using(ollama, tmp_path) as gateway:
        reply = await gateway.chat(asking("forever", tools=(), max_tokens=20))
    assert reply.finish is Finish.LENGTH
    assert reply.usage.output_tokens == 20


async def test_the_models_are_listed_with_what_they_can_do(ollama: Ollama, tmp_path: Path) -> None:
    """Installed, running, tools, context; then what could be fetched; the embedded ones last."""
    async with using(ollama, tmp_path) as gateway:
        await gateway.start()
        await gateway.chat(asking("hello"))
        found = await gateway.list_models()
    assert found.problems == ()
    known = {model.name: model for model in found.models}
    talker = known["ollama:qwen2.5:tiny"]
    assert (talker.installed, talker.running, talker.tools, talker.is_default) == (True, True, "yes", True)
    assert talker.context == 131072
    assert talker.size > 0
    assert known["ollama:phi4-mini:latest"].tools == "yes, as text"
    assert known["ollama:gemma3:1b"].tools == "yes, by schema"
    assert not known["ollama:qwen2.5-coder"].installed
    assert not known["embedded:qwen2.5-coder-0.5b"].installed
    lines = model_lines(found)
    assert "* ollama:qwen2.5:tiny: running, tools: yes, context 128k, the steadiest of the five with tools" in lines
    assert lines[-1].startswith("to be fetched: ollama:qwen2.5-coder, ollama:llama3.1, embedded:")


async def test_names_are_found_with_and_without_tag_and_provider(ollama: Ollama, tmp_path: Path) -> None:
    """What people write is enough; what is not there is answered with what is near."""
    async with using(ollama, tmp_path) as gateway:
        for name in ("qwen2.5", "qwen2.5:tiny", "ollama:qwen2.5", "ollama:qwen2.5:tiny"):
            assert await gateway.check(name) == "ollama:qwen2.5:tiny"
        assert await gateway.check("embedded:qwen2.5-coder-0.5b") == "embedded:qwen2.5-coder-0.5b"
        await gateway.start()
        known = {"ollama:qwen2.5:tiny", "ollama:phi4-mini:latest", "ollama:gemma3:1b"}
        assert set(gateway.available()) == known
        with pytest.raises(NotFoundError, match=r"did you mean 'qwen2\.5:tiny'"):
            await gateway.check("qwen2.5:tin")
        with pytest.raises(NotFoundError, match=r"fireclaw models pull ollama:llama3\.1"):
            await gateway.check("ollama:llama3.1")


async def test_what_cannot_be_fetched_says_why(ollama: Ollama, tmp_path: Path) -> None:
    """A pull of a model that its registry does not have, or cannot be asked for, fails in words."""
    async with using(ollama, tmp_path) as gateway:
        with pytest.raises(ModelError, match="pull model manifest"):
            await gateway.pull("ollama:nonsense", lambda _: None)


async def test_a_model_that_is_gone_is_named_with_the_way_to_fetch_it(ollama: Ollama) -> None:
    """The server's 404 becomes a sentence with the next step."""
    provider = await OllamaProvider.connect(ollama.address, context=CONTEXT, local=True)
    with pytest.raises(ModelError, match=r"has no model 'gone' .*models pull gone") as caught:
        await provider.complete("gone", asking("hello"), schema=None, timeout_s=30)
    await provider.aclose()
    assert caught.value.kind == "refused"


async def test_a_cancelled_call_ends_on_the_server(ollama: Ollama, tmp_path: Path) -> None:
    """Who gives up frees the one place of the model for the next."""
    async with using(ollama, tmp_path) as gateway:
        task = asyncio.create_task(gateway.chat(asking("forever", max_tokens=100000)), name="forever")
        while not gateway.running:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # it is being worked on
        task.cancel()
        await asyncio.wait([task])
        assert (await asyncio.wait_for(gateway.chat(asking("hello")), 20)).text == "hello there"


async def test_a_server_that_ended_is_named_and_found_again(ollama: Ollama, tmp_path: Path) -> None:
    """While it is gone each call says so; once it is there again the next call works, and nothing else is needed."""
    async with using(ollama, tmp_path) as gateway:
        assert (await gateway.chat(asking("hello"))).text == "hello there"
        ollama.kill()
        try:
            with pytest.raises(
                ModelError, match=r"the model server at .* does not answer: connection refused"
            ) as caught:
                await gateway.chat(asking("hello"))
            assert caught.value.kind == "unreachable"
            with pytest.raises(ModelError, match="connection refused"):
                await gateway.chat(asking("hello"))
        finally:
            ollama.start()
        assert (await gateway.chat(asking("hello"))).text == "hello there"


async def test_the_embedded_model_can_be_insisted_on(ollama: Ollama, tmp_path: Path) -> None:
    """The setting ``embedded`` leaves a running Ollama alone."""
    async with using(ollama, tmp_path, model="embedded") as gateway:
        route = await gateway._default_route()
        assert (route.backend.kind, gateway.take_notice()) == ("embedded", "")


# What only the double can be made to do


@pytest.fixture
def double() -> Iterator[OllamaDouble]:
    """A double with one model."""
    server = OllamaDouble()
    server.create("qwen2.5", TALK)
    server.start()
    yield server
    server.kill()


async def test_every_call_of_a_model_has_the_same_context(double: OllamaDouble, tmp_path: Path) -> None:
    """Ollama would load the model anew for each other number; with tools, a forced retry included."""
    double.create("mute", [Rule('{"name": "respond", "arguments": {"message": "ah"}}', last="Answer with one JSON")])
    async with using(double, tmp_path) as gateway:
        await gateway.chat(asking("hello"))
        await gateway.chat(asking("hello", agent="other", tools=()))
        with pytest.raises(ModelError):
            await gateway.chat(asking("hello", model="mute"))
    assert {body["options"]["num_ctx"] for body in double.asked} == {CONTEXT}
    native, _, first, second, third, last = double.asked
    assert native["tools"]
    assert first["tools"]
    for forced in (second, third):
        assert "tools" not in forced or not forced["tools"]
        assert forced["format"]["oneOf"][-1]["properties"]["name"] == {"const": "respond"}
        assert "run_command" in forced["messages"][0]["content"]
    assert not last.get("format")


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        ((503, "server busy, please try again. maximum pending requests exceeded"), "overloaded", "is overloaded"),
        ((400, "registry.ollama.ai/library/qwen2.5 does not support tools"), "refused", "does not support tools"),
        ((400, "the input length exceeds the context length"), "context", "too long for the model"),
        ((200, "out of memory"), "refused", "refuses the request: out of memory"),
    ],
)
async def test_each_way_to_fail_has_its_kind_and_words(
    double: OllamaDouble, tmp_path: Path, error: tuple[int, str], kind: str, words: str
) -> None:
    """What Ollama answers, in mid-stream as well, becomes an error that agents can branch on."""
    double.errors = [error]
    async with using(double, tmp_path) as gateway:
        with pytest.raises(ModelError, match=words) as caught:
            await gateway.chat(asking("hello"))
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "error",
    [
        (500, "llama runner process has terminated: signal: killed"),
        (200, "an error was encountered while running the model: unexpected EOF"),
    ],
)
async def test_a_call_whose_runner_died_is_made_once_more(
    double: OllamaDouble, tmp_path: Path, error: tuple[int, str]
) -> None:
    """Ollama starts the next runner by itself."""
    double.errors = [error]
    async with using(double, tmp_path) as gateway:
        assert (await gateway.chat(asking("hello"))).text == "hello there"
    assert len(double.asked) == 2


async def test_a_pull_tells_how_far_it_is(double: OllamaDouble, tmp_path: Path) -> None:
    """Progress comes as it is; then the model can be asked."""
    double.fetchable["llama3.1"] = TALK
    seen: list[Progress] = []
    async with using(double, tmp_path) as gateway:
        assert await gateway.pull("llama3.1", seen.append) == "ollama:llama3.1"
        assert "ollama:llama3.1:latest" in gateway.available()
        assert (await gateway.chat(asking("hello", model="llama3.1"))).text == "hello there"
    assert [(each.done, each.total) for each in seen] == [(0, 0), (0, 1000), (500, 1000), (1000, 1000), (0, 0)]
    assert seen[2].text == "llama3.1 from Ollama: pulling 5ee4f07cdb9b"


async def test_a_model_that_runs_elsewhere_is_never_the_default(double: OllamaDouble, tmp_path: Path) -> None:
    """What agents say leaves the host only if somebody said so; the list tells it."""
    double.models.clear()
    double.create("qwen2.5:72b-cloud", TALK)
    double.create("mine", TALK)
    async with using(double, tmp_path) as gateway:
        await gateway.start()
        assert gateway.model == "mine:latest"
        assert (await gateway.chat(asking("hello", model="qwen2.5:72b-cloud"))).text == "hello there"
        notes = {model.name: model.note for model in (await gateway.list_models()).models}
    assert notes["ollama:qwen2.5:72b-cloud"] == "runs on the machines of Ollama's makers"


async def test_an_ollama_without_models_leaves_the_embedded_one(tmp_path: Path) -> None:
    """An empty Ollama is said, with the way to fill it; the embedded model serves."""
    server = OllamaDouble()
    server.start()
    try:
        async with using(server, tmp_path) as gateway:
            route = await gateway._default_route()
            assert route.backend.kind == "embedded"
            assert "has no model (fireclaw models pull qwen2.5)" in gateway.take_notice()
    finally:
        server.kill()
