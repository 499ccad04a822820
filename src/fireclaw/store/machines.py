"""Machines, and the processes that keep them (and the other children of the daemon) going.

A row exists before the thing it stands for, and goes after that is gone. Rows hold no file paths: folders follow
from ids, images and runtimes are named by digest.
"""

from __future__ import annotations

import itertools
from dataclasses import astuple, dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from fireclaw.errors import ConflictError

if TYPE_CHECKING:
    import sqlite3

    from fireclaw.store.database import Database
    from fireclaw.store.hosts import Host

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS machines (
    machine_id TEXT PRIMARY KEY,
    name TEXT UNIQUE,
    purpose TEXT NOT NULL CHECK (purpose IN ('run', 'named', 'agent', 'template', 'probe', 'spare')),
    image TEXT NOT NULL,
    runtime TEXT NOT NULL,
    vmm TEXT NOT NULL,
    accel TEXT NOT NULL,
    memory_mib INTEGER NOT NULL,
    vcpus INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('making', 'running', 'stopping')),
    slot INTEGER NOT NULL,
    magic TEXT NOT NULL,
    host_id TEXT NOT NULL REFERENCES host (host_id),
    epoch BIGINT NOT NULL,
    created_at DOUBLE PRECISION NOT NULL,
    workspace TEXT UNIQUE,
    UNIQUE (host_id, slot)
);
CREATE TABLE IF NOT EXISTS processes (
    process_id TEXT PRIMARY KEY,
    role TEXT NOT NULL CHECK (role IN ('vmm', 'ngircd', 'model')),
    owner_id TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('planned', 'started')),
    pid INTEGER,
    start_time BIGINT,
    boot_id TEXT
)
"""


class Purpose(StrEnum):
    """What a machine is for; it decides who may end it."""

    RUN = "run"
    NAMED = "named"
    AGENT = "agent"
    TEMPLATE = "template"
    PROBE = "probe"
    SPARE = "spare"


class MachineState(StrEnum):
    """Where a machine is in its life."""

    MAKING = "making"
    RUNNING = "running"
    STOPPING = "stopping"


class Role(StrEnum):
    """What a child process of the daemon does."""

    VMM = "vmm"
    NGIRCD = "ngircd"
    MODEL = "model"


@dataclass(frozen=True, slots=True)
class MachineRow:
    """One machine.

    Attributes:
        machine_id: a UUID, apart from the name.
        name: what people call it, or None.
        purpose: what it is for.
        image: digest of the image its workload sees.
        runtime: digest of the runtime it boots.
        vmm: the program that runs it: ``firecracker`` or ``qemu``.
        accel: ``kvm`` or ``tcg``.
        memory_mib: its memory.
        vcpus: its virtual processors.
        state: where it is in its life.
        slot: the lowest small number free on its host when it was made; user ids follow from it.
        magic: of its guest's boot, hexadecimal (``fireclaw.wire.hello``); a later daemon needs it to speak to it.
        host_id: the host that runs it.
        epoch: the daemon start that owns it.
        created_at: seconds since 1970.
        workspace: the name of the drive that it mounts at /workspace, which is its alone; None without one.
    """

    machine_id: str
    name: str | None
    purpose: Purpose
    image: str
    runtime: str
    vmm: str
    accel: str
    memory_mib: int
    vcpus: int
    state: MachineState
    slot: int
    magic: str
    host_id: str
    epoch: int
    created_at: float
    workspace: str | None = None

    @classmethod
    def of(cls, row: sqlite3.Row) -> MachineRow:
        """Read one row of the table."""
        values = dict(row)
        values["purpose"] = Purpose(values["purpose"])
        values["state"] = MachineState(values["state"])
        return cls(**values)


@dataclass(frozen=True, slots=True)
class ProcessRow:
    """One child process: planned before it is made, started once its identity is known.

    Attributes:
        process_id: a UUID.
        role: what it does.
        owner_id: the machine it keeps going, or a word of its role's own.
        pid: its process id, once started.
        start_time: field 22 of /proc/PID/stat, in clock ticks since boot; with boot_id it tells a reused pid.
        boot_id: the kernel's id of the boot in which the pid is valid.
    """

    process_id: str
    role: Role
    owner_id: str
    pid: int | None = None
    start_time: int | None = None
    boot_id: str | None = None

    @classmethod
    def of(cls, row: sqlite3.Row) -> ProcessRow:
        """Read one row of the table."""
        values = dict(row)
        del values["state"]  # a started row is one with a pid
        values["role"] = Role(values["role"])
        return cls(**values)


_COLUMNS: Final = ", ".join(field.name for field in fields(MachineRow))
_MARKS: Final = ", ".join("?" for _ in fields(MachineRow))


class MachineRows:
    """The machines of this host, changed only by the daemon run that owns them."""

    def __init__(self, database: Database, host: Host) -> None:
        self._database = database
        self._host = host

    def add(
        self,
        *,
        machine_id: str,
        name: str | None,
        purpose: Purpose,
        image: str,
        runtime: str,
        vmm: str,
        accel: str,
        memory_mib: int,
        vcpus: int,
        magic: str,
        created_at: float,
        workspace: str | None = None,
    ) -> MachineRow:
        """Record a machine that is about to be made, in the lowest free slot.

        Raises:
            ConflictError: the name is taken, or another machine has the workspace.
        """
        with self._database.transaction() as tx:
            if name is not None and self.by_name(name):
                raise ConflictError(f"a machine named {name!r} exists already", hint="choose another name")
            if workspace is not None and (owner := self._one("workspace", workspace)):
                raise ConflictError(
                    f"the workspace {workspace!r} is used by machine {owner.name or owner.machine_id}",
                    hint="end that machine first",
                )
            row = MachineRow(
                machine_id=machine_id,
                name=name,
                purpose=purpose,
                image=image,
                runtime=runtime,
                vmm=vmm,
                accel=accel,
                memory_mib=memory_mib,
                vcpus=vcpus,
                state=MachineState.MAKING,
                slot=self._free_slot(),
                magic=magic,
                host_id=self._host.host_id,
                epoch=self._host.epoch,
                created_at=created_at,
                workspace=workspace,
            )
            tx.execute(f"INSERT INTO machines ({_COLUMNS}) VALUES ({_MARKS})", astuple(row))  # noqa: S608  names of ours
        return row

    def _free_slot(self) -> int:
        rows = self._database.query("SELECT slot FROM machines WHERE host_id = ?", (self._host.host_id,))
        taken = {row["slot"] for row in rows}
        return next(slot for slot in itertools.count() if slot not in taken)

    def set_state(self, machine_id: str, state: MachineState) -> None:
        """Move a machine on in its life.

        Raises:
            ConflictError: this run of the daemon does not own it.
        """
        self._set(machine_id, "state = ?", state)

    def assign(self, row: MachineRow, purpose: Purpose, now: float) -> MachineRow:
        """Give a spare to somebody, from now on (seconds since 1970); errors as for ``set_state``."""
        self._set(row.machine_id, "purpose = ?, created_at = ?", purpose, now)
        return replace(row, purpose=purpose, created_at=now)

    def _set(self, machine_id: str, what: str, *values: object) -> None:
        with self._database.transaction() as tx:
            done = tx.execute(
                f"UPDATE machines SET {what} WHERE machine_id = ? AND host_id = ? AND epoch = ?",  # noqa: S608
                (*values, machine_id, self._host.host_id, self._host.epoch),
            )
            if done.rowcount == 0:
                raise ConflictError(f"machine {machine_id} is not this daemon's any more")

    def claim(self, machine_id: str) -> MachineRow | None:
        """Take a machine over from an earlier run of this host's daemon; None if there is no such machine."""
        with self._database.transaction() as tx:
            tx.execute(
                "UPDATE machines SET epoch = ? WHERE machine_id = ? AND host_id = ? AND epoch < ?",
                (self._host.epoch, machine_id, self._host.host_id, self._host.epoch),
            )
        return self.by_id(machine_id)

    def remove(self, machine_id: str) -> None:
        """Forget a machine of which nothing is left; nothing happens if it is not there."""
        with self._database.transaction() as tx:
            tx.execute("DELETE FROM machines WHERE machine_id = ?", (machine_id,))

    def by_id(self, machine_id: str) -> MachineRow | None:
        """The machine of that id."""
        return self._one("machine_id", machine_id)

    def by_name(self, name: str) -> MachineRow | None:
        """The machine of that name."""
        return self._one("name", name)

    def _one(self, column: str, value: str) -> MachineRow | None:
        rows = self._database.query(f"SELECT * FROM machines WHERE {column} = ?", (value,))  # noqa: S608
        return MachineRow.of(rows[0]) if rows else None

    def all(self) -> list[MachineRow]:
        """This host's machines, oldest first."""
        rows = self._database.query(
            "SELECT * FROM machines WHERE host_id = ? ORDER BY created_at, machine_id", (self._host.host_id,)
        )
        return [MachineRow.of(row) for row in rows]


class ProcessRows:
    """The child processes of this host's daemon."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def plan(self, process_id: str, role: Role, owner_id: str) -> None:
        """Record a process that is about to be made."""
        with self._database.transaction() as tx:
            tx.execute(
                "INSERT INTO processes (process_id, role, owner_id, state) VALUES (?, ?, ?, 'planned')",
                (process_id, role, owner_id),
            )

    def start(self, process_id: str, *, pid: int, start_time: int, boot_id: str) -> None:
        """Record who a planned process turned out to be."""
        with self._database.transaction() as tx:
            tx.execute(
                "UPDATE processes SET state = 'started', pid = ?, start_time = ?, boot_id = ? WHERE process_id = ?",
                (pid, start_time, boot_id, process_id),
            )

    def remove(self, process_id: str) -> None:
        """Forget a process that is gone and reaped; nothing happens if it is not there."""
        with self._database.transaction() as tx:
            tx.execute("DELETE FROM processes WHERE process_id = ?", (process_id,))

    def of(self, owner_id: str) -> list[ProcessRow]:
        """The processes of one owner."""
        rows = self._database.query("SELECT * FROM processes WHERE owner_id = ?", (owner_id,))
        return [ProcessRow.of(row) for row in rows]

    def all(self) -> list[ProcessRow]:
        """Every process."""
        return [ProcessRow.of(row) for row in self._database.query("SELECT * FROM processes")]
