"""What the store knows of spending: one row for each time that a model was asked, with its tokens, time and price.

A row is committed before the call begins and completed after it: a call that a crash cut off stays as ``started``, so
that its turn is counted. Money is kept in billionths of a dollar, whole numbers, so that sums are exact. A day is one
of UTC: limits a day and ``fireclaw cost --by day`` mean the same one everywhere.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fireclaw.store.database import Database
    from fireclaw.store.hosts import Host

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS spending (
    spending_id TEXT PRIMARY KEY,
    host_id TEXT NOT NULL,
    started_at DOUBLE PRECISION NOT NULL,
    day TEXT NOT NULL,
    agent TEXT NOT NULL,
    person TEXT NOT NULL,
    turn_id TEXT NOT NULL,
    call_id TEXT NOT NULL,
    model TEXT NOT NULL,
    outcome TEXT NOT NULL,
    input_tokens BIGINT NOT NULL,
    cached_tokens BIGINT NOT NULL,
    written_tokens BIGINT NOT NULL,
    output_tokens BIGINT NOT NULL,
    duration_s DOUBLE PRECISION NOT NULL,
    nanodollars BIGINT,
    price_source TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS spending_by_agent ON spending (agent, day);
CREATE INDEX IF NOT EXISTS spending_by_day ON spending (day);
"""

NANO: Final = 10**9  # nanodollars in a dollar
STARTED: Final = "started"


class CostBy(StrEnum):
    """What spending is summed up by; the words are columns."""

    AGENT = "agent"
    MODEL = "model"
    DAY = "day"
    PERSON = "person"


@dataclass(frozen=True)
class Asked:
    """Who asks whom, known before the call.

    Attributes:
        agent: the agent's name.
        person: the nick of the person for whom it works; empty where it works for nobody.
        turn_id: the turn; empty where there is none.
        call_id: the call; attempts of one call share it.
        model: the model's whole name, e.g. ``ollama:qwen2.5:7b``.
    """

    agent: str
    person: str
    turn_id: str
    call_id: str
    model: str


@dataclass(frozen=True)
class Bill:
    """What a call came to.

    Attributes:
        outcome: ``done``, ``unusable``, or the kind of the error.
        input_tokens: of the prompt, neither read from a cache nor written to one.
        cached_tokens: of the prompt, read from a cache.
        written_tokens: of the prompt, written to a cache.
        output_tokens: written by the model.
        duration_s: seconds that it took.
        nanodollars: the price; None: not known.
        price_source: where the price is from, with its version.
    """

    outcome: str
    input_tokens: int
    cached_tokens: int
    written_tokens: int
    output_tokens: int
    duration_s: float
    nanodollars: int | None
    price_source: str


@dataclass(frozen=True)
class Spent:
    """What an agent has spent on one day.

    Attributes:
        tokens: all of them: read, cached and written.
        nanodollars: what is known of the price.
        turns: how many turns asked a model, a given one not counted.
        seconds: time of its model calls.
    """

    tokens: int
    nanodollars: int
    turns: int
    seconds: float


@dataclass(frozen=True)
class CostRow:
    """Spending summed up.

    Attributes:
        key: an agent, model, day or person.
        calls: how often a model was asked.
        turns: for how many turns.
        input_tokens: as in ``Bill``.
        cached_tokens: as in ``Bill``.
        written_tokens: as in ``Bill``.
        output_tokens: as in ``Bill``.
        seconds: time of the calls.
        nanodollars: what is known of the price.
        unpriced: calls whose price is not known.
    """

    key: str
    calls: int
    turns: int
    input_tokens: int
    cached_tokens: int
    written_tokens: int
    output_tokens: int
    seconds: float
    nanodollars: int
    unpriced: int


class Spending:
    """The ``spending`` table.

    ::

        spending = Spending(db, host)
        spending_id = spending.begin(Asked(…), now)
        spending.finish(spending_id, Bill(…))
        spending.spent("worker", day_of(now))

    Args:
        db: the store.
        host: the daemon that acts.
    """

    def __init__(self, db: Database, host: Host) -> None:
        self._db = db
        self._host = host

    def begin(self, asked: Asked, now: float) -> str:
        """Commit that a call begins; returns the row's id."""
        values = {
            "spending_id": str(uuid.uuid4()),
            "host_id": self._host.host_id,
            "started_at": now,
            "day": day_of(now),
            **vars(asked),
            **vars(Bill(STARTED, 0, 0, 0, 0, 0.0, 0, "")),
        }
        marks = ", ".join("?" * len(values))
        with self._db.transaction() as tx:
            tx.execute(
                f"INSERT INTO spending ({', '.join(values)}) VALUES ({marks})",  # noqa: S608 (our own words)
                tuple(values.values()),
            )
        return str(values["spending_id"])

    def finish(self, spending_id: str, bill: Bill) -> None:
        """Commit what the call came to."""
        changes = ", ".join(f"{column} = ?" for column in vars(bill))
        with self._db.transaction() as tx:
            tx.execute(
                f"UPDATE spending SET {changes} WHERE spending_id = ?",  # noqa: S608 (our own words)
                (*vars(bill).values(), spending_id),
            )

    def spent(self, agent: str, day: str, turn_id: str = "") -> Spent:
        """What an agent has spent on a day.

        Args:
            agent: its name.
            day: ``YYYY-MM-DD``.
            turn_id: a turn that is not to be counted, as it is under way.
        """
        (row,) = self._db.query(
            "SELECT coalesce(sum(input_tokens + cached_tokens + written_tokens + output_tokens), 0) AS tokens,"
            " coalesce(sum(nanodollars), 0) AS nanodollars,"
            " count(DISTINCT CASE WHEN turn_id NOT IN ('', ?) THEN turn_id END) AS turns,"
            " coalesce(sum(duration_s), 0) AS seconds"
            " FROM spending WHERE agent = ? AND day = ?",
            (turn_id, agent, day),
        )
        return Spent(**row)

    def summary(self, by: CostBy, *, agent: str | None = None) -> list[CostRow]:
        """Sum spending up; the dearest first, days in their order.

        Args:
            by: what a row stands for.
            agent: only this agent's.
        """
        order = "key" if by is CostBy.DAY else "nanodollars DESC, input_tokens + output_tokens DESC, key"
        found = self._db.query(
            f"SELECT {by.value} AS key, count(*) AS calls,"  # noqa: S608 (our own words)
            " count(DISTINCT CASE WHEN turn_id <> '' THEN turn_id END) AS turns,"
            " sum(input_tokens) AS input_tokens, sum(cached_tokens) AS cached_tokens,"
            " sum(written_tokens) AS written_tokens, sum(output_tokens) AS output_tokens,"
            " sum(duration_s) AS seconds, coalesce(sum(nanodollars), 0) AS nanodollars,"
            " sum(CASE WHEN nanodollars IS NULL THEN 1 ELSE 0 END) AS unpriced"
            f" FROM spending WHERE (? IS NULL OR agent = ?) GROUP BY {by.value} ORDER BY {order}",
            (agent, agent),
        )
        return [CostRow(**row) for row in found]


def day_of(now: float) -> str:
    """The day of a time, ``YYYY-MM-DD``, in UTC.

    Args:
        now: seconds since the epoch.
    """
    return datetime.fromtimestamp(now, UTC).date().isoformat()
