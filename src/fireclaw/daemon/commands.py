"""Commands in the ledger: one event when a command starts and one when it has ended, joined by its id."""

from __future__ import annotations

import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fireclaw.store.ledger import Ledger


@dataclass
class Command:
    """A command under way; whoever runs it fills in how it ended.

    Attributes:
        id: names it in the ledger.
        status: its exit status; None as long as it is not known.
        timed_out: it was killed at its time limit.
        duration_s: how long it ran, once it has ended.
    """

    id: str
    status: int | None = None
    timed_out: bool = False
    duration_s: float = 0.0


@contextmanager
def recorded(ledger: Ledger, machine_id: str, argv: Sequence[str], agent: str | None = None) -> Iterator[Command]:
    """Record a command that runs inside the block; one that is broken off has the status None."""
    command = Command(str(uuid.uuid4()))
    started = time.monotonic()
    ledger.append("command.started", {"command_id": command.id, "argv": list(argv)}, agent=agent, machine=machine_id)
    try:
        yield command
    finally:
        command.duration_s = round(time.monotonic() - started, 3)
        ledger.append(
            "command.done",
            {
                "command_id": command.id,
                "status": command.status,
                "timed_out": command.timed_out,
                "duration_s": command.duration_s,
            },
            agent=agent,
            machine=machine_id,
        )
