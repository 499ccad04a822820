"""Limits a day, prices, and the meter that keeps and writes them down."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireclaw.errors import ConfigError, SetupError
from fireclaw.llm.budget import Budget, BudgetError, check, dollars
from fireclaw.llm.chat import ChatRequest, Usage
from fireclaw.llm.cost import cost_lines
from fireclaw.llm.keys import read_key
from fireclaw.llm.meter import Meter
from fireclaw.llm.prices import Price, Prices, Rate, is_private
from fireclaw.store.database import Database
from fireclaw.store.hosts import open_host
from fireclaw.store.spending import CostBy, Spending, Spent, day_of

if TYPE_CHECKING:
    from collections.abc import Iterator

OPENAI = "https://api.openai.com/v1"
CLAUDE, CLAUDES = "anthropic:claude-sonnet-4-5", "https://api.anthropic.com"
NOON = 1_780_000_000.0


@pytest.fixture
def spending(tmp_path: Path) -> Iterator[Spending]:
    """An empty table."""
    database = Database(tmp_path / "fireclaw.db")
    yield Spending(database, open_host(database))
    database.close()


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        """The time now."""
        return self.now


def asking(turn: str = "t1", **changes: object) -> ChatRequest:
    """A request of the agent ``worker`` for alice."""
    defaults: dict[str, object] = {"agent": "worker", "person": "alice", "step": 0, "call_id": f"{turn}/0"}
    return ChatRequest(turn_id=turn, messages=(), **{**defaults, **changes})  # type: ignore[arg-type]


# The check


SPENT = Spent(tokens=1000, nanodollars=5_000_000, turns=3, seconds=60.0)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(tokens=1000), "1,000 of 1,000 tokens"),
        (Budget(tokens=0), "1,000 of 0 tokens"),
        (Budget(turns=3), "3 of 3 turns"),
        (Budget(seconds=59.5), "60 of 60 seconds of thinking"),
        (Budget(money=Decimal("0.005")), r"\$0\.0050 of \$0\.0050"),
    ],
)
def test_a_limit_that_is_reached_is_said_in_a_sentence(budget: Budget, words: str) -> None:
    """The agent can say it of itself, with what an operator can do."""
    with pytest.raises(BudgetError, match=rf"^my budget for today is spent: {words} \(it starts anew at") as caught:
        check(budget, SPENT, model="m", is_priced=True)
    assert (caught.value.kind, caught.value.code) == ("budget", "budget")


@pytest.mark.parametrize(
    "budget", [Budget(), Budget(tokens=1001), Budget(turns=4), Budget(seconds=61), Budget(money=Decimal("0.0051"))]
)
def test_below_its_limits_an_agent_may_go_on(budget: Budget) -> None:
    """The last bit of a budget may be used."""
    check(budget, SPENT, model="m", is_priced=True)


def test_a_limit_in_money_needs_a_price() -> None:
    """With a model whose price nobody knows the limit could not be kept, so nothing is asked; without one it is."""
    with pytest.raises(BudgetError, match=r"the price of openai:x is not known.*prices\.toml"):
        check(Budget(money=Decimal(1)), SPENT, model="openai:x", is_priced=False)
    check(Budget(tokens=5000), SPENT, model="openai:x", is_priced=False)


@pytest.mark.parametrize(
    ("nano", "text"),
    [
        (0, "$0"),
        (1, "$0.0000000010"),
        (4_200_000, "$0.0042"),
        (123_456_789, "$0.12"),
        (10**9, "$1.00"),
        (1234 * 10**9, "$1,234.00"),
    ],
)
def test_money_shows_what_tells_something(nano: int, text: str) -> None:
    """Cents from a dollar on, two digits that are not zero below."""
    assert dollars(nano) == text


# Prices


async def test_a_model_of_ones_own_costs_nothing() -> None:
    """Embedded, Ollama's, and any server on this host or in a private network."""
    prices = Prices()
    for model, where in (
        ("embedded:qwen2.5-coder-0.5b", "http://127.0.0.1:1/v1"),
        ("ollama:qwen2.5", "http://ollama.example:11434"),
        ("openai:x", "http://localhost:8000/v1"),
        ("openai:x", "http://192.168.1.7:8000/v1"),
        ("openai:x", "http://[::1]:8000/v1"),
    ):
        found = await prices.find(model, where)
        assert found.price(Usage(1000, 0, 1000)) == Price(0, "local")
        assert found.is_known


async def test_public_prices_know_the_cache_and_their_version() -> None:
    """Read, written and fresh tokens of the prompt have three prices."""
    found = await Prices().find(CLAUDE, CLAUDES)
    price = found.price(Usage(input_tokens=1000, cached_tokens=500, output_tokens=200, written_tokens=100))
    assert price.nanodollars == 4_725_000  # 400 at 3, 500 at 0.3, 100 at 3.75, 200 at 15 dollars a million
    assert price.source.startswith("genai-prices 0.")
    assert (await Prices().find("openai:gpt-4o", OPENAI)).is_known


async def test_what_is_not_on_the_list_has_no_price() -> None:
    """Neither an unknown model nor an unknown server is taken for another."""
    ollama = "http://127.0.0.1:11434"
    for model, where in (
        ("openai:gpt-nonsense", OPENAI),
        ("openai:gpt-4o", "https://llm.example/v1"),
        ("ollama:gpt-oss:120b-cloud", ollama),
    ):
        found = await Prices().find(model, where)
        assert not found.is_known
        assert found.price(Usage(1, 0, 1)) == Price(None, "unknown")


async def test_the_override_file_wins(tmp_path: Path) -> None:
    """By whole names, with the file's digest as its version; what it leaves out costs as input does."""
    path = tmp_path / "prices.toml"
    path.write_text(
        '["ollama:qwen2.5"]\ninput = 1\noutput = 2.5\n["openai:x"]\ninput=2\ncached=0.5\nwritten=4\noutput=8'
    )
    prices = Prices.load(path)
    local = (await prices.find("ollama:qwen2.5", "http://127.0.0.1:11434")).price(Usage(1000, 400, 100, 100))
    assert local.nanodollars == 1_250_000
    assert local.source.startswith("prices.toml ")
    assert len(local.source) == len("prices.toml 01234567")
    remote = await prices.find("openai:x", "https://llm.example/v1")
    assert remote.price(Usage(1000, 400, 100, 100)).nanodollars == (500 * 2 + 200 + 400 + 800) * 1000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "not TOML"),
        ("x = 1", "'x' must be a section"),
        ("[m]\ninput = 1\noutptu = 2", "unknown key 'outptu'.*did you mean 'output'"),
        ("[m]\ninput = 1", "has no 'output'"),
        ("[m]\ninput = -1\noutput = 1", "must be dollars for a million tokens, not -1"),
        ("[m]\ninput = true\noutput = 1", "not True"),
        ("[m]\ninput = 'a'\noutput = 1", "not 'a'"),
    ],
)
def test_a_mistake_in_the_override_file_is_named(tmp_path: Path, text: str, words: str) -> None:
    """A wrong price must not become none."""
    path = tmp_path / "prices.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        Prices.load(path)


def test_the_documented_file_is_one(tmp_path: Path) -> None:
    """What docs/models.md shows can be taken as it is."""
    page = (Path(__file__).parents[2] / "docs/models.md").read_text()
    (block,) = re.findall(r"^```text\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    path = tmp_path / "prices.toml"
    path.write_text(block)
    assert list(Prices.load(path)._overrides) == [CLAUDE]


def test_a_missing_override_file_is_an_empty_one(tmp_path: Path) -> None:
    """Nobody needs to have one."""
    assert isinstance(Prices.load(tmp_path / "prices.toml"), Prices)


@given(*[st.integers(0, 10**7)] * 3)
def test_a_rate_never_loses_a_token(fresh: int, cached: int, output: int) -> None:
    """The price is the sum of its parts, exactly."""
    rate = Rate(Decimal(1), Decimal(2), Decimal("0.5"))
    assert rate.price(Usage(fresh + cached, cached, output)) == fresh * 1000 + cached * 500 + output * 2000


def test_names_are_not_private() -> None:
    """Only an address, or localhost, tells by its look."""
    assert not is_private("https://intranet/v1")
    assert not is_private("https://8.8.8.8/v1")
    assert not is_private("")


# The meter and its table


async def test_a_call_is_written_down_before_and_after(spending: Spending) -> None:
    """A crash in between leaves a row without tokens, whose turn counts; the price is zero for local models."""
    meter = Meter(spending, Prices(), Clock())
    reading = await meter.begin(asking(), "embedded:tiny", "")
    (open_row,) = spending.summary(CostBy.AGENT)
    assert (open_row.calls, open_row.turns, open_row.output_tokens) == (1, 1, 0)
    reading.end("done", Usage(100, 40, 7, 10))
    (row,) = spending.summary(CostBy.AGENT)
    assert (row.key, row.calls, row.turns) == ("worker", 1, 1)
    assert (row.input_tokens, row.cached_tokens, row.written_tokens, row.output_tokens) == (50, 40, 10, 7)
    assert (row.nanodollars, row.unpriced) == (0, 0)
    assert row.seconds >= 0


async def test_limits_are_kept_before_each_call_and_anew_each_day(spending: Spending) -> None:
    """At the limit nothing is asked and nothing written; the next day of UTC everything is allowed again."""
    clock = Clock()
    meter = Meter(spending, Prices(), clock)
    request = asking(budget=Budget(tokens=100))
    (await meter.begin(request, "embedded:tiny", "")).end("done", Usage(90, 0, 10))
    with pytest.raises(BudgetError, match="100 of 100 tokens"):
        await meter.begin(request, "embedded:tiny", "")
    await meter.begin(asking(agent="other", budget=Budget(tokens=100)), "embedded:tiny", "")
    assert sum(row.calls for row in spending.summary(CostBy.AGENT)) == 2
    clock.now += 86400
    await meter.begin(request, "embedded:tiny", "")
    assert [row.key for row in spending.summary(CostBy.DAY)] == [day_of(NOON), day_of(NOON + 86400)]


async def test_a_turn_under_way_may_end(spending: Spending) -> None:
    """The limit of turns keeps new ones out, not the further calls of the last one."""
    meter = Meter(spending, Prices(), Clock())
    budget = Budget(turns=2)
    for turn in ("t1", "t1", "t2", "t2"):
        await meter.begin(asking(turn, budget=budget), "embedded:tiny", "")
    await meter.begin(asking("", budget=Budget(turns=3)), "embedded:tiny", "")  # warming up is no turn
    with pytest.raises(BudgetError, match="2 of 2 turns"):
        await meter.begin(asking("t3", budget=budget), "embedded:tiny", "")


async def test_a_limit_in_money_is_kept(spending: Spending) -> None:
    """With list prices, to the nanodollar."""
    meter = Meter(spending, Prices(), Clock())
    request = asking(budget=Budget(money=Decimal("0.001")))
    (await meter.begin(request, CLAUDE, CLAUDES)).end("done", Usage(400, 0, 0))
    with pytest.raises(BudgetError, match=r"\$0\.0012 of \$0\.0010"):
        await meter.begin(request, CLAUDE, CLAUDES)
    with pytest.raises(BudgetError, match="is not known"):
        await meter.begin(asking(agent="new", budget=Budget(money=Decimal(1))), "openai:x", "https://llm.example")


async def test_spending_is_summed_up_four_ways(spending: Spending) -> None:
    """By agent, model, day and person; the dearest first; what has no price is counted as such."""
    meter = Meter(spending, Prices(), Clock())
    (await meter.begin(asking("t1"), "ollama:qwen2.5", "")).end("done", Usage(1000, 0, 10))
    (await meter.begin(asking("t2", agent="claude", person="bob"), CLAUDE, CLAUDES)).end("done", Usage(100, 0, 10))
    (await meter.begin(asking("t3", person="bob"), "openai:x", "https://llm.example")).end("timeout", Usage())
    assert [row.key for row in spending.summary(CostBy.AGENT)] == ["claude", "worker"]
    assert [row.key for row in spending.summary(CostBy.PERSON)] == ["bob", "alice"]
    assert [row.key for row in spending.summary(CostBy.MODEL)] == [CLAUDE, "ollama:qwen2.5", "openai:x"]
    assert [row.key for row in spending.summary(CostBy.DAY)] == [day_of(NOON)]
    assert [row.key for row in spending.summary(CostBy.PERSON, agent="worker")] == ["alice", "bob"]
    assert cost_lines(spending.summary(CostBy.PERSON), CostBy.PERSON) == [
        "bob: $0.00045 and 1 call of unknown price, 2 calls in 2 turns, 110 tokens, 0 s",
        "alice: $0, 1 call in 1 turn, 1,010 tokens, 0 s",
        "together: $0.00045 and 1 call of unknown price, 3 calls, 1,120 tokens, 0 s",
    ]
    assert cost_lines([], CostBy.AGENT) == ["nothing was spent"]


# Keys


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o644, 0o610])
def test_a_key_that_others_may_read_is_refused(tmp_path: Path, mode: int) -> None:
    """The message has the mode, the way to mend it, and not the key."""
    path = tmp_path / "key"
    path.write_text("sk-secret\n")
    path.chmod(mode)
    with pytest.raises(SetupError, match=f"mode {mode:04o} lets others at it .*chmod 600") as caught:
        read_key(path)
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n", "two words", "two\nlines", "sk-\x01", "ключ", "x" * 5000])
def test_what_is_no_key_is_refused(tmp_path: Path, text: str) -> None:
    """It becomes a header, so it must be one word."""
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text(text)
    with pytest.raises(ConfigError, match="must hold a key and nothing else"):
        read_key(path)


def test_a_key_is_read_without_its_line_end(tmp_path: Path) -> None:
    """As an editor leaves it."""
    path = tmp_path / "key"
    path.touch(0o600)
    path.write_text("sk-secret\r\n")
    assert read_key(path) == "sk-secret"
    with pytest.raises(SetupError, match="there is no key in"):
        read_key(tmp_path / "none")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_key(tmp_path)
