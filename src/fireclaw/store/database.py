"""The SQLite file behind every noun of the store: opening, checking, transactions.

One connection, used from the event loop's thread only. WAL with ``synchronous=NORMAL``: a commit costs a fraction
of a millisecond and survives any killed process; a power failure may cost the last commits, never the file.
The SQL of all nouns stays within what SQLite and PostgreSQL share, so that many hosts can share one store later.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from fireclaw.errors import ConfigError, CorruptError, SetupError
from fireclaw.store import agents, handoffs, hosts, ledger, machines, memory, spending

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

VERSION: Final = 2
SCHEMAS: Final = (
    hosts.SCHEMA,
    machines.SCHEMA,
    agents.SCHEMA,
    memory.SCHEMA,
    handoffs.SCHEMA,
    ledger.SCHEMA,
    spending.SCHEMA,
)

_VERSION_SCHEMA = "CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL);"
# Primary result codes (sqlite.org/rescode.html) that are the host's fault, not a mistake in a statement.
_HOST_REFUSES: Final = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_READONLY}
_BUSY_S = 5.0  # another process holds the write lock only for the length of one commit


class Database:
    """The store, open for as long as the daemon lives.

    ::

        database = Database(home.database)
        with database.transaction() as tx:
            tx.execute("UPDATE ...", (...,))
        database.close()
    """

    def __init__(self, path: Path) -> None:
        """Open the store, making it (0600) where there is none.

        Raises:
            ConfigError: another version of Fireclaw wrote it.
            CorruptError: the file is not a sound database.
            SetupError: the file cannot be opened.
        """
        self.path = path
        try:
            _make_private(path)
            self._connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)
        except (OSError, sqlite3.OperationalError) as error:
            raise SetupError(
                f"cannot open the store {str(path)!r}: {error}", hint="check that its folder is yours and writable"
            ) from error
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        connection = self._connection
        connection.row_factory = sqlite3.Row
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            raise _corrupt(self.path, str(error)) from error
        if verdict != "ok":
            raise _corrupt(self.path, verdict)
        with self.transaction() as tx:
            self._check_version(tx)
            for schema in SCHEMAS:
                for statement in schema.split(";"):
                    tx.execute(statement)

    def _check_version(self, tx: sqlite3.Connection) -> None:
        tx.execute(_VERSION_SCHEMA)
        row = tx.execute("SELECT version FROM schema_version").fetchone()
        if row is None:
            tx.execute("INSERT INTO schema_version (version) VALUES (?)", (VERSION,))
        elif row["version"] != VERSION:
            age = "a newer" if row["version"] > VERSION else "an older"
            raise ConfigError(
                f"the store {str(self.path)!r} was written by {age} Fireclaw "
                f"(schema {row['version']}, this one knows {VERSION})",
                hint="use that one, or set FIRECLAW_HOME to another folder",
            )

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One atomic change: committed at the end of the block, rolled back if it raises.

        A block inside another joins it. There must be no ``await`` inside: the connection is shared, so whatever
        else ran meanwhile would become part of the transaction.

        Raises:
            SetupError: the disk is full or refuses; nothing was changed.
        """
        if self._connection.in_transaction:
            yield self._connection
            return
        try:
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection
            self._connection.commit()
        except BaseException as error:
            # A failed commit, too, may leave the transaction open, and the next one would join it unseen.
            self._connection.rollback()
            if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF in _HOST_REFUSES:
                raise SetupError(
                    f"cannot write the store {str(self.path)!r}: {error}", hint="is there room on its disk?"
                ) from error
            raise

    def query(self, sql: str, values: Sequence[object] = ()) -> list[sqlite3.Row]:
        """All rows of a SELECT."""
        return self._connection.execute(sql, values).fetchall()

    def close(self) -> None:
        """Close the file; the write-ahead log is folded into it."""
        self._connection.close()


def _make_private(path: Path) -> None:
    """Make the file, or take everybody else's rights from it, before SQLite copies its mode to its side files."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o600)
    finally:
        os.close(fd)


def _corrupt(path: Path, reason: str) -> CorruptError:
    return CorruptError(
        f"the store {str(path)!r} is damaged: {reason}",
        hint="put a backup in its place, or move it away to start with an empty one",
    )
