"""Work that one agent handed to another: one row for each, kept as a record after both are gone.

A row is written together with the line in the receiver's inbox that it becomes, and gets its result together with the
end of the receiver's turn. So whoever asks after a crash finds either no handoff, an open one that somebody works on,
or its result.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import sqlite3

    from fireclaw.store.database import Database

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS handoffs (
    handoff_id TEXT PRIMARY KEY,
    line_id TEXT NOT NULL,
    sender TEXT NOT NULL,
    receiver TEXT NOT NULL,
    depth INTEGER NOT NULL,
    task TEXT NOT NULL,
    context TEXT NOT NULL,
    done_when TEXT NOT NULL,
    state TEXT NOT NULL,
    result TEXT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    finished_at DOUBLE PRECISION
);
CREATE UNIQUE INDEX IF NOT EXISTS handoffs_by_line ON handoffs (line_id);
"""


class HandoffState(StrEnum):
    """How a handoff stands."""

    OPEN = "open"
    DONE = "done"
    FAILED = "failed"  # the receiver could not, or is gone; ``result`` says why


@dataclass(frozen=True)
class HandoffRow:
    """Work that was handed over.

    Attributes:
        handoff_id: the id of the tool call that handed it over.
        line_id: the line in the receiver's inbox that it became.
        sender: the name of the agent that handed it over.
        receiver: the name of the agent that does it.
        depth: 1 for what a person asked the sender for, 2 for what was handed to the sender itself.
        task: what is to be done.
        context: what the receiver must know.
        done_when: how to tell that it is done.
        state: see HandoffState.
        result: what came of it; empty while it is open.
        created_at: seconds since the epoch.
        finished_at: the same, or None.
    """

    handoff_id: str
    line_id: str
    sender: str
    receiver: str
    depth: int
    task: str
    context: str
    done_when: str
    state: HandoffState
    result: str
    created_at: float
    finished_at: float | None = None


class HandoffRows:
    """The ``handoffs`` table.

    Args:
        db: the store.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    def find(self, handoff_id: str) -> HandoffRow | None:
        """Return the handoff of that id."""
        return self._one("SELECT * FROM handoffs WHERE handoff_id = ?", handoff_id)

    def of_line(self, line_id: str) -> HandoffRow | None:
        """Return the handoff that became that line."""
        return self._one("SELECT * FROM handoffs WHERE line_id = ?", line_id)

    def open(self) -> list[HandoffRow]:
        """Return those that are not done, oldest first."""
        found = self._db.query(
            "SELECT * FROM handoffs WHERE state = ? ORDER BY created_at, handoff_id", (HandoffState.OPEN,)
        )
        return [_row(row) for row in found]

    def _one(self, sql: str, value: str) -> HandoffRow | None:
        found = self._db.query(sql, (value,))
        return _row(found[0]) if found else None


def write(tx: sqlite3.Connection, row: HandoffRow) -> None:
    """Insert a handoff; of a known one change what may change."""
    values = vars(row)
    tx.execute(
        f"INSERT INTO handoffs ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})"  # noqa: S608 (ours)
        " ON CONFLICT (handoff_id) DO UPDATE SET"
        " state = excluded.state, result = excluded.result, finished_at = excluded.finished_at",
        tuple(values.values()),
    )


def _row(row: sqlite3.Row) -> HandoffRow:
    return HandoffRow(**{**row, "state": HandoffState(row["state"])})
