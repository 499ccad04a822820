"""Which host this is, and which run of the daemon on it.

A row that must have one writer carries (host_id, epoch). The epoch goes up with every start of the daemon, so a
daemon that was thought dead and comes back cannot change what its successor owns.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from fireclaw.store.database import Database

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS host (
    host_id TEXT PRIMARY KEY,
    epoch BIGINT NOT NULL
)
"""


@dataclass(frozen=True, slots=True)
class Host:
    """One run of the daemon on one host.

    Attributes:
        host_id: a UUID, made once per store.
        epoch: counts the daemon's starts, from 1.
    """

    host_id: str
    epoch: int


def open_host(database: Database) -> Host:
    """Begin a new epoch of this host."""
    with database.transaction() as tx:
        row = tx.execute("SELECT host_id, epoch FROM host").fetchone()
        if row is None:
            host = Host(str(uuid.uuid4()), 1)
            tx.execute("INSERT INTO host (host_id, epoch) VALUES (?, ?)", (host.host_id, host.epoch))
        else:
            host = Host(row["host_id"], row["epoch"] + 1)
            tx.execute("UPDATE host SET epoch = ? WHERE host_id = ?", (host.epoch, host.host_id))
    return host
