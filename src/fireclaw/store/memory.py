"""What agents remember, with everything they remembered before: one row for each version of each document.

A document belongs to a name, not to an agent's id: who is invoked again under the name of one that was destroyed with
its workspace kept finds what that one knew. A *scope* separates what was learnt where (``fireclaw.agents.memory``).
Versions are written once and never change; the newest is what holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fireclaw.errors import ConflictError

if TYPE_CHECKING:
    import sqlite3

    from fireclaw.store.database import Database

KEPT: Final = 200  # versions of a document; older ones go

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS memory (
    owner TEXT NOT NULL,
    scope TEXT NOT NULL,
    version INTEGER NOT NULL,
    content TEXT NOT NULL,
    author TEXT NOT NULL,
    reason TEXT NOT NULL,
    saved_at DOUBLE PRECISION NOT NULL,
    PRIMARY KEY (owner, scope, version)
);
"""


@dataclass(frozen=True)
class MemoryRow:
    """One version of a document.

    Attributes:
        owner: the agent's name, folded.
        scope: where it was learnt; empty for what everybody may hear again.
        version: 1 for the first.
        content: the whole text.
        author: who wrote it: the agent, or a person.
        reason: why.
        saved_at: seconds since the epoch.
    """

    owner: str
    scope: str
    version: int
    content: str
    author: str
    reason: str
    saved_at: float


class MemoryRows:
    """The ``memory`` table.

    Args:
        db: the store.
    """

    def __init__(self, db: Database) -> None:
        self._db = db

    def newest(self, owner: str, scope: str) -> MemoryRow | None:
        """Return what holds now, or None where nothing was ever written."""
        found = self._db.query(
            "SELECT * FROM memory WHERE owner = ? AND scope = ? ORDER BY version DESC LIMIT 1", (owner, scope)
        )
        return _row(found[0]) if found else None

    def history(self, owner: str, scope: str) -> list[MemoryRow]:
        """Return the versions that are kept, newest first."""
        found = self._db.query(
            "SELECT * FROM memory WHERE owner = ? AND scope = ? ORDER BY version DESC", (owner, scope)
        )
        return [_row(row) for row in found]

    def scopes(self, owner: str) -> list[str]:
        """Return the scopes that have a document, in order."""
        found = self._db.query("SELECT DISTINCT scope FROM memory WHERE owner = ? ORDER BY scope", (owner,))
        return [str(row["scope"]) for row in found]

    def add(self, row: MemoryRow) -> None:
        """Add a version.

        Raises:
            ConflictError: somebody wrote this version first.
        """
        with self._db.transaction() as tx:
            write(tx, row)

    def forget(self, owner: str) -> None:
        """Remove every document of that name, with its history."""
        with self._db.transaction() as tx:
            tx.execute("DELETE FROM memory WHERE owner = ?", (owner,))


def write(tx: sqlite3.Connection, row: MemoryRow) -> None:
    """Add a version, and drop the one that is too old to be kept.

    Raises:
        ConflictError: somebody wrote this version first.
    """
    key = (row.owner, row.scope, row.version)
    known = tx.execute("SELECT 1 FROM memory WHERE owner = ? AND scope = ? AND version = ?", key).fetchone()
    if known:
        raise ConflictError(
            f"the memory of {row.owner!r} was changed meanwhile", hint="look at what it says now, and try again"
        )
    tx.execute(
        "INSERT INTO memory (owner, scope, version, content, author, reason, saved_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (*key, row.content, row.author, row.reason, row.saved_at),
    )
    tx.execute(
        "DELETE FROM memory WHERE owner = ? AND scope = ? AND version <= ?", (row.owner, row.scope, row.version - KEPT)
    )


def _row(row: sqlite3.Row) -> MemoryRow:
    return MemoryRow(*(row[key] for key in row.keys()))  # noqa: SIM118 (a Row iterates its values)
