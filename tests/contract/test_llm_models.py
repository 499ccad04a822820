"""Models, budgets and cost by way of the gateway, the API's routes and the command line."""

from __future__ import annotations

import asyncio
import json
import socket
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from api_office import CommandLine, short_home
from llm_ollama import OllamaDouble
from starlette.applications import Starlette

from fireclaw.daemon.api import _answer_error
from fireclaw.daemon.job import Job
from fireclaw.daemon.models_api import model_routes
from fireclaw.daemon.server import ApiServer
from fireclaw.errors import FireclawError, InvalidError, ModelError, NotFoundError
from fireclaw.llm.backends.ollama import find_address
from fireclaw.llm.budget import Budget, BudgetError
from fireclaw.llm.chat import ChatMessage, ChatRequest, Role, Tool
from fireclaw.llm.gateway import Gateway
from fireclaw.llm.prices import Prices
from fireclaw.llm.settings import ModelSettings
from fireclaw.store.database import Database
from fireclaw.store.hosts import open_host
from fireclaw.store.spending import CostBy, Spending
from fireclaw.testing.scripted_model import Rule, call

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from fireclaw.paths import Home

RULES = [
    Rule("hello there", user="hello"),
    Rule(call("run_command", command="ls"), user="list", tools=True),
    Rule("on and on, with no end. ", user="forever", endless=True),
]
RUN = Tool("run_command", "Run a command.", {"type": "object", "properties": {"command": {"type": "string"}}})


@pytest.fixture
def ollama() -> Iterator[OllamaDouble]:
    """A double of Ollama with one model."""
    server = OllamaDouble(fetchable={"llama3.1": RULES})
    server.create("qwen2.5", RULES)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def home() -> Iterator[Home]:
    """A home of its own."""
    with short_home() as home:
        home.make()
        yield home


@pytest.fixture
def spending(home: Home) -> Iterator[Spending]:
    """Its table of spending."""
    database = Database(home.database)
    yield Spending(database, open_host(database))
    database.close()


class Ledger:
    """Keeps what is recorded."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def record(self, kind: str, data: Any) -> None:
        """Append an event."""
        self.events.append((kind, dict(data)))


@asynccontextmanager
async def gateway_of(
    ollama: OllamaDouble,
    home: Home,
    spending: Spending,
    *,
    prices: Prices | None = None,
    ledger: Ledger | None = None,
    **changes: Any,
) -> AsyncIterator[Gateway]:
    """A gateway beside an Ollama, whose calls are written down."""
    settings = replace(ModelSettings(ollama=ollama.address, parallel=1, timeout_s=30), **changes)
    record = (ledger or Ledger()).record
    gateway = Gateway(settings, record, models=home.models, spending=spending, prices=prices)
    try:
        yield gateway
    finally:
        await gateway.aclose()


def asking(text: str, turn: str = "t1", **changes: Any) -> ChatRequest:
    """A request of the agent ``worker`` for alice."""
    messages = (ChatMessage(Role.SYSTEM, "You are worker."), ChatMessage(Role.USER, text))
    request = ChatRequest("worker", turn, 0, f"{turn}/0", messages, tools=(RUN,), max_tokens=20, person="alice")
    return replace(request, **changes)


# Budgets and cost


async def test_each_call_is_written_down_with_its_price(
    ollama: OllamaDouble, home: Home, spending: Spending, tmp_path: Path
) -> None:
    """Store and ledger have tokens, price and where the price is from; the override file has prices for one's own."""
    path = tmp_path / "prices.toml"
    path.write_text('["ollama:qwen2.5:latest"]\ninput = 1\noutput = 100\n')
    ledger = Ledger()
    async with gateway_of(ollama, home, spending, prices=Prices.load(path), ledger=ledger) as gateway:
        reply = await gateway.chat(asking("hello"))
    (row,) = spending.summary(CostBy.MODEL)
    tokens = (reply.usage.input_tokens, reply.usage.output_tokens)
    assert (row.key, row.calls, row.turns) == ("ollama:qwen2.5:latest", 1, 1)
    assert (row.input_tokens, row.output_tokens) == tokens
    assert row.nanodollars == tokens[0] * 1000 + tokens[1] * 100_000
    done = ledger.events[-1][1]
    assert done["price_usd"] == row.nanodollars / 10**9
    assert done["price_source"].startswith("prices.toml ")


async def test_at_its_limit_an_agent_is_told_and_the_server_not_asked(
    ollama: OllamaDouble, home: Home, spending: Spending
) -> None:
    """The sentence is the agent's own; other agents go on, and an operator's raise works at once."""
    budget = Budget(turns=1, money=Decimal(1))
    ledger = Ledger()
    async with gateway_of(ollama, home, spending, ledger=ledger) as gateway:
        await gateway.chat(asking("hello", budget=budget))
        with pytest.raises(BudgetError, match="my budget for today is spent: 1 of 1 turns"):
            await gateway.chat(asking("hello", "t2", budget=budget))
        assert len(ollama.asked) == 1
        assert [kind.rpartition(".")[2] for kind, _ in ledger.events] == ["started", "done", "refused"]
        assert ledger.events[-1][1]["error.type"] == "budget"
        await gateway.chat(asking("hello", "t3", agent="other", budget=budget))
        await gateway.chat(asking("hello", "t2", budget=Budget(turns=2)))


async def test_a_failed_call_is_written_down_as_well(ollama: OllamaDouble, home: Home, spending: Spending) -> None:
    """Its time counts, its turn counts, and what went wrong stands in the row."""
    ollama.errors = [(503, "server busy")]
    async with gateway_of(ollama, home, spending) as gateway:
        with pytest.raises(ModelError):
            await gateway.chat(asking("hello"))
        task = asyncio.create_task(gateway.chat(asking("forever", "t2", max_tokens=10**9)), name="forever")
        while len(ollama.asked) < 2:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
    rows = spending._db.query("SELECT outcome, turn_id FROM spending ORDER BY started_at")
    assert [tuple(row) for row in rows] == [("overloaded", "t1"), ("cancelled", "t2")]


async def test_waiting_is_visible_and_fair(ollama: OllamaDouble, home: Home, spending: Spending) -> None:
    """An agent sees its place; one with three calls does not keep out one with a single call."""
    async with gateway_of(ollama, home, spending) as gateway:
        await gateway.start()
        first = asyncio.create_task(gateway.chat(asking("forever", agent="a", max_tokens=10**9)), name="first")
        await asyncio.sleep(0)
        order: list[str] = []

        async def ask(agent: str) -> None:
            await gateway.chat(asking("hello", agent=agent))
            order.append(agent)

        async with asyncio.TaskGroup() as group:
            for agent in ("b", "b", "b", "c"):
                group.create_task(ask(agent), name=agent)
            await asyncio.sleep(0)
            assert (gateway.running, gateway.waiting) == (1, 4)
            assert [gateway.position(agent) for agent in ("b", "c", "a")] == [1, 2, 0]
            first.cancel()
        assert order == ["b", "c", "b", "b"]


# Which model serves


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("", "http://127.0.0.1:11434"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        (":5000", "http://127.0.0.1:5000"),
        ("10.0.0.7:5000", "http://10.0.0.7:5000"),
        ("http://box", "http://box:80"),
        ("https://box/", "https://box:443"),
        ("[::]:5000", "http://127.0.0.1:5000"),
        ("[::1]", "http://[::1]:11434"),
        ("box:99999", "http://box:11434"),
    ],
)
def test_ollamas_address_is_read_as_ollama_reads_it(host: str, address: str) -> None:
    """OLLAMA_HOST says what a server binds; a client must be able to connect to it."""
    assert find_address({"OLLAMA_HOST": host} if host else {}) == address


@pytest.mark.parametrize("model", [None, "ollama", "qwen2.5", "qwen2.5:latest", "ollama:qwen2.5"])
async def test_the_setting_names_the_default_in_several_ways(
    ollama: OllamaDouble, home: Home, spending: Spending, model: str | None
) -> None:
    """With and without provider, with and without tag, or none at all."""
    async with gateway_of(ollama, home, spending, model=model) as gateway:
        await gateway.start()
        assert (gateway.state, gateway.provider, gateway.model) == ("ready", "ollama", "qwen2.5:latest")


async def test_a_default_that_is_not_there_says_what_is(ollama: OllamaDouble, home: Home, spending: Spending) -> None:
    """A mistyped model fails in words with a near name, and other models can still be asked for."""
    async with gateway_of(ollama, home, spending, model="smollm-135m") as gateway:
        await gateway.start()
        assert gateway.state == "failed"
        assert "did you mean 'smollm2-135m'?" in gateway.detail
        assert (await gateway.chat(asking("hello", model="qwen2.5"))).text == "hello there"
        with pytest.raises(ModelError, match=r"no model named 'qwen2\.6'.*did you mean 'qwen2\.5"):
            await gateway.chat(asking("hello", model="qwen2.6"))


async def test_a_kind_of_server_that_is_not_configured_is_said(home: Home, spending: Spending) -> None:
    """The start fails, and each call does, in words."""
    async with gateway_of(OllamaDouble(), home, spending, model="openai:gpt-4o") as gateway:
        with pytest.raises(InvalidError, match="no server of the kind 'openai' is configured"):
            await gateway.start()
        with pytest.raises(ModelError, match="no server of the kind 'openai' is configured"):
            await gateway.chat(asking("hello"))


async def test_what_nobody_can_fetch_is_said(home: Home, spending: Spending) -> None:
    """Without an Ollama only the embedded catalogue can be fetched."""
    async with gateway_of(OllamaDouble(), home, spending) as gateway:
        with pytest.raises(NotFoundError, match=r"no model named 'llama3\.1'.*others need a running Ollama"):
            await gateway.pull("llama3.1", lambda _: None)
        with pytest.raises(ModelError, match=r"no Ollama answers at .*ollama serve"):
            await gateway.pull("ollama:llama3.1", lambda _: None)
        with pytest.raises(ModelError, match="no Ollama answers at"):
            await gateway.check("ollama:qwen2.5")


async def test_a_closed_gateway_can_be_opened_again(ollama: OllamaDouble, home: Home, spending: Spending) -> None:
    """As the office does between ``down`` and ``up``."""
    async with gateway_of(ollama, home, spending) as gateway:
        for _ in range(2):
            await gateway.start()
            assert (await gateway.chat(asking("hello"))).text == "hello there"
            assert "found an Ollama" in gateway.take_notice()
            await gateway.aclose()
            assert gateway.state == "off"


async def test_only_a_model_of_ones_own_is_warmed_up(ollama: OllamaDouble, home: Home, spending: Spending) -> None:
    """Ollama loads the model and reads the prompt for one token; a failure is of no matter."""
    async with gateway_of(ollama, home, spending) as gateway:
        await gateway.warm(asking("hello", ""))
        ollama.errors = [(503, "server busy")]
        await gateway.warm(asking("hello", ""))
        await gateway.warm(asking("hello", "", model="nonsense"))
    assert [body["options"]["num_predict"] for body in ollama.asked] == [1, 1]
    (row,) = spending.summary(CostBy.AGENT)
    assert (row.calls, row.turns) == (2, 0)


# The API and the command line


@asynccontextmanager
async def served(gateway: Gateway, spending: Spending, home: Home) -> AsyncIterator[CommandLine]:
    """The routes on the home's socket, and a command line for them."""
    jobs: dict[str, Job] = {}

    def start_job(name: str, work: Any) -> Job:
        return jobs.setdefault(name, Job(name, work))

    routes = model_routes(gateway, spending, start_job)
    app = Starlette(routes=routes, exception_handlers={FireclawError: _answer_error})
    verbs = (
        "import sys; from fireclaw import cli;"
        "cli.VERBS = {'models': ('models:models', ''), 'cost': ('cost:cost', '')}; sys.exit(cli.main())"
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home.socket))
        listener.listen()
        server = ApiServer(app, listener)
        await server.start()
        try:
            yield CommandLine(home, "-c", verbs)
        finally:
            for job in jobs.values():
                await job.aclose()
            await server.aclose()


async def test_models_are_listed_and_fetched_by_the_command_line(
    ollama: OllamaDouble, home: Home, spending: Spending
) -> None:
    """A table, the same as JSON, progress on stderr, the new model in the list."""
    async with gateway_of(ollama, home, spending) as gateway, served(gateway, spending, home) as cli:
        await gateway.start()
        status, table, _ = await cli.call("models")
        assert status == 0
        lines = table.decode().splitlines()
        assert lines[0].split() == ["NAME", "STATE", "TOOLS", "CONTEXT", "SIZE", "WHERE", "NOTE"]
        assert lines[1].split()[:5] == ["*", "ollama:qwen2.5:latest", "installed", "yes", "128k"]
        status, out, told = await cli.call("models", "pull", "llama3.1")
        assert (status, out) == (0, b"")
        assert told.splitlines() == [
            "fireclaw: llama3.1 from Ollama: pulling manifest",
            "fireclaw: llama3.1 from Ollama: pulling 5ee4f07cdb9b: 0 of 0 MB",
            "fireclaw: llama3.1 from Ollama: pulling 5ee4f07cdb9b: 0 of 0 MB",
            "fireclaw: llama3.1 from Ollama: success",
            "fireclaw: ollama:llama3.1 is here",
        ]
        _, listed, _ = await cli.call("models", "--json")
        found = {model["name"]: model for model in json.loads(listed)["models"]}
        assert found["ollama:llama3.1:latest"]["installed"]
        assert found["ollama:qwen2.5:latest"]["is_default"]
        assert (await cli.call("models", "pull"))[2] == "fireclaw: which model? (see 'fireclaw models')\n"
        status, _, told = await cli.call("models", "pull", "ollama:nonsense")
        assert (status, "file does not exist" in told) == (125, True)


async def test_cost_is_shown_by_the_command_line(ollama: OllamaDouble, home: Home, spending: Spending) -> None:
    """Four ways, as a table and as JSON."""
    async with gateway_of(ollama, home, spending) as gateway, served(gateway, spending, home) as cli:
        await gateway.chat(asking("hello"))
        await gateway.chat(asking("list", "t2", person="bob\x1b[2J"))
        status, table, _ = await cli.call("cost")
        assert status == 0
        header, row = table.decode().splitlines()
        assert header.split() == ["AGENT", "CALLS", "TURNS", "READ", "CACHED", "WRITTEN", "OUTPUT", "TIME", "PRICE"]
        assert row.split()[:3] == ["worker", "2", "2"]
        assert row.split()[-1] == "$0.00"
        _, table, _ = await cli.call("cost", "--by", "person")
        assert "bob\\x1b[2J" in table.decode()
        _, found, _ = await cli.call("cost", "--by", "model", "--json")
        (only,) = json.loads(found)["rows"]
        assert (only["key"], only["price_usd"], only["unpriced"]) == ("ollama:qwen2.5:latest", 0, 0)
        status, _, told = await cli.call("cost", "--by", "weather")
        assert (status, "invalid choice: 'weather'" in told) == (125, True)
