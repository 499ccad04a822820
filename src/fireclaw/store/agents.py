"""What the store knows of agents: who they are, what they were asked, how far they got, and what they said.

Six tables. ``agents`` has one row an agent, ``agent_settings`` one for what was changed of its template while it lives.
``inbox`` has one row a line that was addressed to it, ``turns`` one row a line that it took up, ``steps`` one row a
model call or tool call of a turn, ``outbox`` one row a line that it says.
Lines and messages have deterministic ids and are inserted once; everything else about them is a state that moves on.

Every row of an agent has one writer, the daemon whose (host_id, epoch) its ``agents`` row names. A ``Notebook`` writes
the rows of one agent, each batch in one transaction that first asks whether the agent is still ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from fireclaw.errors import ConflictError
from fireclaw.store import handoffs, memory
from fireclaw.store.handoffs import HandoffRow
from fireclaw.store.memory import MemoryRow

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterable, Sequence

    from fireclaw.store.database import Database
    from fireclaw.store.hosts import Host

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS agents (
    agent_id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    template TEXT NOT NULL,
    state TEXT NOT NULL,
    machine_id TEXT,
    invoked_by TEXT NOT NULL,
    host_id TEXT NOT NULL,
    epoch BIGINT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS agents_by_nick ON agents (lower(name));
CREATE TABLE IF NOT EXISTS agent_settings (
    agent_id TEXT PRIMARY KEY REFERENCES agents (agent_id) ON DELETE CASCADE,
    model TEXT NOT NULL,
    persona TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS inbox (
    line_id TEXT PRIMARY KEY,
    agent_id TEXT NOT NULL REFERENCES agents (agent_id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    sender TEXT NOT NULL,
    role TEXT NOT NULL,
    target TEXT NOT NULL,
    conversation TEXT NOT NULL,
    text TEXT NOT NULL,
    state TEXT NOT NULL,
    received_at DOUBLE PRECISION NOT NULL
);
CREATE INDEX IF NOT EXISTS inbox_in_order ON inbox (agent_id, position);
CREATE TABLE IF NOT EXISTS turns (
    turn_id TEXT PRIMARY KEY,
    agent_id TEXT NOT NULL REFERENCES agents (agent_id) ON DELETE CASCADE,
    line_id TEXT NOT NULL REFERENCES inbox (line_id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    conversation TEXT NOT NULL,
    state TEXT NOT NULL,
    answer TEXT NOT NULL,
    started_at DOUBLE PRECISION NOT NULL,
    finished_at DOUBLE PRECISION
);
CREATE INDEX IF NOT EXISTS turns_in_order ON turns (agent_id, position);
CREATE TABLE IF NOT EXISTS steps (
    turn_id TEXT NOT NULL REFERENCES turns (turn_id) ON DELETE CASCADE,
    step INTEGER NOT NULL,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    request TEXT NOT NULL,
    result TEXT NOT NULL,
    started_at DOUBLE PRECISION NOT NULL,
    finished_at DOUBLE PRECISION,
    PRIMARY KEY (turn_id, step)
);
CREATE TABLE IF NOT EXISTS outbox (
    message_id TEXT PRIMARY KEY,
    agent_id TEXT NOT NULL REFERENCES agents (agent_id) ON DELETE CASCADE,
    line_id TEXT NOT NULL REFERENCES inbox (line_id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    target TEXT NOT NULL,
    kind TEXT NOT NULL,
    text TEXT NOT NULL,
    state TEXT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL
);
CREATE INDEX IF NOT EXISTS outbox_in_order ON outbox (agent_id, position);
"""

JsonObject = Mapping[str, object]


class AgentState(StrEnum):
    """Whether an agent is to be kept."""

    LIVE = "live"
    DESTROYING = "destroying"  # what is left of it goes, also after a crash
    RETIRING = "retiring"  # the same, but memory and workspace stay, for the next agent of its name


class LineState(StrEnum):
    """What became of a line that was addressed to an agent."""

    WAITING = "waiting"
    TAKEN = "taken"  # it has a turn
    REFUSED = "refused"  # the queue was full, and the agent said so


class TurnState(StrEnum):
    """How a turn stands or ended."""

    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


class StepKind(StrEnum):
    """What a step is."""

    MODEL = "model"  # a model call with tools on offer
    FINAL = "final"  # a model call without tools: it can only answer
    TOOL = "tool"


class StepState(StrEnum):
    """How a step stands. ``started`` is committed before its effect, the others after it."""

    ASKED = "asked"  # a tool call that waits for an operator's yes; nothing has begun
    STARTED = "started"
    DONE = "done"
    FAILED = "failed"
    REFUSED = "refused"  # a tool call that was answered without being made
    INTERRUPTED = "interrupted"  # started by an earlier daemon; whether it finished is not known


class MessageKind(StrEnum):
    """Why an agent says a line."""

    ANSWER = "answer"  # it is what somebody waits for: an answer, or honest news that there is none
    ACK = "ack"
    SIGN = "sign"  # a sign of life


class MessageState(StrEnum):
    """How far a line got. ``sent`` is committed before the line is handed over."""

    QUEUED = "queued"
    SENT = "sent"
    CONFIRMED = "confirmed"
    LOST = "lost"  # sent, but whether it arrived will never be known
    DROPPED = "dropped"  # a sign of life that came too late to be true


@dataclass(frozen=True)
class AgentRow:
    """One agent.

    Attributes:
        agent_id: a UUID, never used again.
        name: its nick; unique on this store whatever its case.
        template: the template's name.
        state: see AgentState.
        machine_id: the machine of its hands, once it has one.
        invoked_by: who asked for it.
        host_id: the host that runs it.
        epoch: the start of that host's daemon that runs it.
        created_at: seconds since the epoch.
    """

    agent_id: str
    name: str
    template: str
    state: AgentState
    machine_id: str | None
    invoked_by: str
    host_id: str
    epoch: int
    created_at: float


@dataclass(frozen=True)
class LineRow:
    """A line of chat addressed to an agent.

    Attributes:
        line_id: deterministic.
        agent_id: whom it was addressed to.
        sender: the nick that said it.
        role: the sender's role, decided by the host when the line came in.
        target: where the answer goes: the channel, or the sender for a private line.
        conversation: which lines belong together: the channel, or the sender's full prefix for private lines.
        text: what was said, without the address.
        state: see LineState.
        received_at: seconds since the epoch.
    """

    line_id: str
    agent_id: str
    sender: str
    role: str
    target: str
    conversation: str
    text: str
    state: LineState
    received_at: float


@dataclass(frozen=True)
class TurnRow:
    """An agent's work on one line.

    Attributes:
        turn_id: derived from the line's id.
        agent_id: who works.
        line_id: on what.
        conversation: the line's.
        state: see TurnState.
        answer: what was said in the end; empty while it runs.
        started_at: seconds since the epoch.
        finished_at: the same, or None.
    """

    turn_id: str
    agent_id: str
    line_id: str
    conversation: str
    state: TurnState
    answer: str
    started_at: float
    finished_at: float | None = None


@dataclass(frozen=True)
class StepRow:
    """A model call or a tool call of a turn.

    Attributes:
        turn_id: the turn.
        step: 0 for the first.
        kind: see StepKind.
        state: see StepState.
        request: for a tool: which call it is (``id``, ``name``, ``arguments``, ``error``); empty for a model.
        result: for a model ``text``, ``tool_calls`` …; for a tool ``output`` …; for a failed step ``error``.
        started_at: seconds since the epoch.
        finished_at: the same, or None.
    """

    turn_id: str
    step: int
    kind: StepKind
    state: StepState
    request: JsonObject = field(default_factory=dict)
    result: JsonObject = field(default_factory=dict)
    started_at: float = 0.0
    finished_at: float | None = None

    @property
    def call_id(self) -> str:
        """The call's id in requests and in the ledger."""
        return f"{self.turn_id}/{self.step}"


@dataclass(frozen=True)
class MessageRow:
    """One line that an agent says.

    Attributes:
        message_id: deterministic.
        agent_id: who says it.
        line_id: the line that it answers.
        target: a channel or a nick.
        kind: see MessageKind.
        text: one line, short enough for IRC.
        state: see MessageState.
        created_at: seconds since the epoch.
    """

    message_id: str
    agent_id: str
    line_id: str
    target: str
    kind: MessageKind
    text: str
    state: MessageState
    created_at: float


@dataclass(frozen=True)
class Settings:
    """What was set for one agent, over its template.

    Attributes:
        model: the model's name; empty: the template's choice.
        persona: whose persona it has; empty: the template's own.
    """

    model: str = ""
    persona: str = ""


Row = LineRow | TurnRow | StepRow | MessageRow | MemoryRow | HandoffRow


class NotOursError(ConflictError):
    """Another daemon owns the agent now; whoever gets this must stop acting for it."""


class AgentRows:
    """The ``agents`` table.

    Args:
        db: the store.
        host: the daemon that acts.
    """

    def __init__(self, db: Database, host: Host) -> None:
        self._db = db
        self._host = host

    def add(self, row: AgentRow) -> None:
        """Add an agent.

        Raises:
            ConflictError: there is one of that name.
        """
        with self._db.transaction() as tx:
            known = tx.execute("SELECT 1 FROM agents WHERE lower(name) = lower(?)", (row.name,)).fetchone()
            if known:
                raise ConflictError(f"there is an agent named {row.name!r} already", hint="choose another name")
            _insert(tx, "agents", vars(row))

    def claim(self) -> list[AgentRow]:
        """Make the agents of this host's earlier daemons ours, and return all of ours in order of age."""
        host_id, epoch = self._host.host_id, self._host.epoch
        with self._db.transaction() as tx:
            tx.execute("UPDATE agents SET epoch = ? WHERE host_id = ? AND epoch < ?", (epoch, host_id, epoch))
        found = self._db.query(
            "SELECT * FROM agents WHERE host_id = ? AND epoch = ? ORDER BY created_at, name", (host_id, epoch)
        )
        return [AgentRow(**{**row, "state": AgentState(row["state"])}) for row in found]

    def set_state(self, agent_id: str, state: AgentState) -> None:
        """Change an agent's state.

        Raises:
            NotOursError: it is not ours any more.
        """
        self._update(agent_id, "state", state)

    def set_machine(self, agent_id: str, machine_id: str) -> None:
        """Note which machine its hands have.

        Raises:
            NotOursError: it is not ours any more.
        """
        self._update(agent_id, "machine_id", machine_id)

    def settings(self, agent_id: str) -> Settings:
        """Return what was set for an agent."""
        found = self._db.query("SELECT model, persona FROM agent_settings WHERE agent_id = ?", (agent_id,))
        return Settings(**found[0]) if found else Settings()

    def set_settings(self, agent_id: str, settings: Settings) -> None:
        """Set something for an agent.

        Raises:
            NotOursError: it is not ours any more.
        """
        values = {"agent_id": agent_id, **vars(settings)}
        with self._db.transaction() as tx:
            _guard(tx, agent_id, self._host)
            _insert(tx, "agent_settings", values, key="agent_id", moving=("model", "persona"))

    def ids(self) -> set[str]:
        """Return the ids of all agents that there are, on whichever host."""
        return {str(row["agent_id"]) for row in self._db.query("SELECT agent_id FROM agents", ())}

    def find(self, name: str) -> AgentRow | None:
        """Return the agent of that name, whatever its case."""
        found = self._db.query("SELECT * FROM agents WHERE lower(name) = lower(?)", (name,))
        return AgentRow(**{**found[0], "state": AgentState(found[0]["state"])}) if found else None

    def remove(self, agent_id: str) -> None:
        """Remove an agent with all of its rows.

        Raises:
            NotOursError: it is not ours any more.
        """
        with self._db.transaction() as tx:
            _guard(tx, agent_id, self._host)
            tx.execute("DELETE FROM agents WHERE agent_id = ?", (agent_id,))

    def _update(self, agent_id: str, column: str, value: str) -> None:
        with self._db.transaction() as tx:
            _guard(tx, agent_id, self._host)
            tx.execute(f"UPDATE agents SET {column} = ? WHERE agent_id = ?", (value, agent_id))  # noqa: S608 (ours)


class Notebook:
    """The rows of one agent, as written by one daemon.

    Args:
        db: the store.
        host: the daemon that acts.
        agent_id: the agent.
    """

    def __init__(self, db: Database, host: Host, agent_id: str) -> None:
        self._db = db
        self._host = host
        self._agent_id = agent_id

    @property
    def epoch(self) -> int:
        """The epoch of the daemon that writes."""
        return self._host.epoch

    def commit(self, rows: Sequence[Row]) -> None:
        """Write the rows in one transaction: new ones whole, known ones in what may change of them.

        Raises:
            NotOursError: the agent is not ours any more; nothing was written.
        """
        with self._db.transaction() as tx:
            _guard(tx, self._agent_id, self._host)
            for row in rows:
                _write(tx, row)

    def line(self, line_id: str) -> LineRow:
        """Return the line of that id, which must exist."""
        return _line(self._db.query("SELECT * FROM inbox WHERE line_id = ?", (line_id,))[0])

    def waiting(self) -> list[LineRow]:
        """Return the lines that wait for their turn, oldest first."""
        found = self._db.query(
            "SELECT * FROM inbox WHERE agent_id = ? AND state = ? ORDER BY position",
            (self._agent_id, LineState.WAITING),
        )
        return [_line(row) for row in found]

    def running(self) -> TurnRow | None:
        """Return the turn that runs, or that ran when its daemon ended."""
        found = self._db.query(
            "SELECT * FROM turns WHERE agent_id = ? AND state = ?", (self._agent_id, TurnState.RUNNING)
        )
        return _turn(found[0]) if found else None

    def history(self, conversation: str, limit: int) -> list[TurnRow]:
        """Return the newest finished turns of a conversation, oldest first."""
        found = self._db.query(
            "SELECT * FROM turns WHERE agent_id = ? AND conversation = ? AND state <> ? ORDER BY position DESC LIMIT ?",
            (self._agent_id, conversation, TurnState.RUNNING, limit),
        )
        return [_turn(row) for row in reversed(found)]

    def turns(self, conversation: str) -> int:
        """Return how many finished turns a conversation has."""
        (row,) = self._db.query(
            "SELECT count(*) AS turns FROM turns WHERE agent_id = ? AND conversation = ? AND state <> ?",
            (self._agent_id, conversation, TurnState.RUNNING),
        )
        return int(row["turns"])

    def steps(self, turn_id: str) -> list[StepRow]:
        """Return the steps of a turn in order."""
        return [_step(row) for row in self._db.query("SELECT * FROM steps WHERE turn_id = ? ORDER BY step", (turn_id,))]

    def messages(self, state: MessageState) -> list[MessageRow]:
        """Return the lines of the outbox in that state, in the order in which they are to be said."""
        found = self._db.query(
            "SELECT * FROM outbox WHERE agent_id = ? AND state = ? ORDER BY position", (self._agent_id, state)
        )
        return [_message(row) for row in found]


def _line(row: sqlite3.Row) -> LineRow:
    return LineRow(**_without_position(row) | {"state": LineState(row["state"])})


def _turn(row: sqlite3.Row) -> TurnRow:
    return TurnRow(**_without_position(row) | {"state": TurnState(row["state"])})


def _step(row: sqlite3.Row) -> StepRow:
    return StepRow(
        row["turn_id"],
        row["step"],
        StepKind(row["kind"]),
        StepState(row["state"]),
        json.loads(row["request"]),
        json.loads(row["result"]),
        row["started_at"],
        row["finished_at"],
    )


def _message(row: sqlite3.Row) -> MessageRow:
    typed = {"state": MessageState(row["state"]), "kind": MessageKind(row["kind"])}
    return MessageRow(**_without_position(row) | typed)


def _without_position(row: sqlite3.Row) -> dict[str, Any]:
    return {key: row[key] for key in row.keys() if key != "position"}  # noqa: SIM118 (a Row iterates its values)


def _guard(tx: sqlite3.Connection, agent_id: str, host: Host) -> None:
    """Touch the agent's row as its owner: the write makes two daemons' transactions exclude each other."""
    owned = tx.execute(
        "UPDATE agents SET epoch = epoch WHERE agent_id = ? AND host_id = ? AND epoch = ?",
        (agent_id, host.host_id, host.epoch),
    )
    if owned.rowcount != 1:
        raise NotOursError(
            f"the agent {agent_id} is not run by this daemon any more",
            hint="it was destroyed, or another daemon of this home has taken over",
        )


def _write(tx: sqlite3.Connection, row: Row) -> None:
    """Insert one row; where its id is known, change only what may move on."""
    match row:
        case LineRow():
            values = _in_order(tx, "inbox", row)
            _insert(tx, "inbox", values, key="line_id", moving=("state",))
        case TurnRow():
            values = _in_order(tx, "turns", row)
            _insert(tx, "turns", values, key="turn_id", moving=("state", "answer", "finished_at"))
        case StepRow():
            values = {**vars(row), "request": json.dumps(row.request), "result": json.dumps(row.result)}
            _insert(tx, "steps", values, key="turn_id, step", moving=("state", "result", "started_at", "finished_at"))
        case MessageRow():
            values = _in_order(tx, "outbox", row)
            _insert(tx, "outbox", values, key="message_id", moving=("state",))
        case MemoryRow():
            memory.write(tx, row)
        case HandoffRow():
            handoffs.write(tx, row)


def _in_order(tx: sqlite3.Connection, table: str, row: LineRow | TurnRow | MessageRow) -> dict[str, object]:
    """Return the row's values with the next free place in its agent's order."""
    found = tx.execute(
        f"SELECT coalesce(max(position), 0) + 1 FROM {table} WHERE agent_id = ?",  # noqa: S608 (our own words)
        (row.agent_id,),
    ).fetchone()
    return {**vars(row), "position": found[0]}


def _insert(
    tx: sqlite3.Connection,
    table: str,
    values: Mapping[str, object],
    *,
    key: str = "",
    moving: Iterable[str] = (),
) -> None:
    """Insert a row; where ``key`` is given and known, move the named columns on instead."""
    sql = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})"  # noqa: S608 (ours)
    if key:
        changes = ", ".join(f"{column} = excluded.{column}" for column in moving)
        sql += f" ON CONFLICT ({key}) DO UPDATE SET {changes}"
    tx.execute(sql, tuple(values.values()))
