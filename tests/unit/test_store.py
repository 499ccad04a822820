"""The store's file, the host's epoch, and the rows of machines and processes."""

from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import ConfigError, ConflictError, CorruptError, SetupError
from fireclaw.store.database import Database
from fireclaw.store.hosts import Host, open_host
from fireclaw.store.machines import MachineRow, MachineRows, MachineState, ProcessRow, ProcessRows, Purpose, Role

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """An empty store."""
    database = Database(tmp_path / "store.db")
    yield database
    database.close()


def add(rows: MachineRows, machine_id: str, name: str | None = None, workspace: str | None = None) -> MachineRow:
    """Add a machine of which only id, name and workspace matter."""
    return rows.add(
        machine_id=machine_id,
        name=name,
        purpose=Purpose.NAMED if name else Purpose.RUN,
        image="i" * 64,
        runtime="r" * 64,
        vmm="qemu",
        accel="tcg",
        memory_mib=256,
        vcpus=1,
        magic="ab" * 16,
        created_at=1.5,
        workspace=workspace,
    )


class BoomError(Exception):
    """Raised inside a transaction."""


class TestDatabase:
    """Opening, checking, transactions."""

    def test_its_files_are_private(self, tmp_path: Path) -> None:
        """Nobody else may read the store or its side files, not even when the file was there with a wider mode."""
        path = tmp_path / "store.db"
        path.touch(mode=0o644)
        database = Database(path)
        with database.transaction() as tx:
            tx.execute("INSERT INTO host (host_id, epoch) VALUES ('h', 1)")
        modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
        database.close()
        assert modes == {"store.db": 0o600, "store.db-wal": 0o600, "store.db-shm": 0o600}

    def test_a_transaction_is_all_or_nothing(self, database: Database) -> None:
        """What a failing block wrote is gone, inner blocks included."""

        def fail() -> None:
            with database.transaction():
                with database.transaction() as tx:
                    tx.execute("INSERT INTO host (host_id, epoch) VALUES ('h', 1)")
                raise BoomError

        with pytest.raises(BoomError):
            fail()
        assert database.query("SELECT * FROM host") == []

    def test_a_commit_is_seen_by_the_next_opener(self, tmp_path: Path) -> None:
        """A committed row is in the file."""
        first = Database(tmp_path / "store.db")
        host = open_host(first)
        second = Database(tmp_path / "store.db")
        assert second.query("SELECT host_id FROM host")[0]["host_id"] == host.host_id
        first.close()
        second.close()

    def test_foreign_keys_hold(self, database: Database) -> None:
        """A machine of a host that is not in the store is refused."""
        with pytest.raises(sqlite3.IntegrityError):
            add(MachineRows(database, Host("stranger", 1)), "m")

    def test_a_newer_store_is_refused(self, tmp_path: Path) -> None:
        """A store of a schema that this version does not know is left alone, with a reason."""
        path = tmp_path / "store.db"
        database = Database(path)
        with database.transaction() as tx:
            tx.execute("UPDATE schema_version SET version = 99")
        database.close()
        with pytest.raises(ConfigError, match=r"newer Fireclaw \(schema 99"):
            Database(path)

    def test_garbage_is_told_as_such(self, tmp_path: Path) -> None:
        """A file that is no database is reported as damaged, not overwritten."""
        path = tmp_path / "store.db"
        path.write_bytes(b"not a database at all" * 500)
        with pytest.raises(CorruptError, match="damaged"):
            Database(path)
        assert path.read_bytes().startswith(b"not a database")

    def test_a_damaged_page_is_found(self, tmp_path: Path) -> None:
        """Bytes overwritten inside the file are found when it is opened."""
        path = tmp_path / "store.db"
        database = Database(path)
        rows = MachineRows(database, open_host(database))
        for number in range(100):
            add(rows, f"machine-{number}")
        database.close()
        whole = bytearray(path.read_bytes())
        whole[4096:] = b"\xa5" * (len(whole) - 4096)
        path.write_bytes(whole)
        with pytest.raises(CorruptError, match="damaged"):
            Database(path)

    def test_a_folder_that_is_missing_is_told(self, tmp_path: Path) -> None:
        """A store that cannot be opened says where and why."""
        with pytest.raises(SetupError, match="cannot open the store"):
            Database(tmp_path / "missing" / "store.db")


class TestHost:
    """Which host, which run of the daemon."""

    def test_the_id_stays_and_the_epoch_goes_up(self, database: Database) -> None:
        """Each start of the daemon is a new epoch of the same host."""
        first, second = open_host(database), open_host(database)
        assert first.host_id == second.host_id
        assert (first.epoch, second.epoch) == (1, 2)


class TestMachines:
    """Rows of machines."""

    def test_a_row_comes_back_as_it_was_added(self, database: Database) -> None:
        """Every field survives the store with its type."""
        rows = MachineRows(database, open_host(database))
        added = add(rows, "m", "box")
        assert added.state is MachineState.MAKING
        assert rows.by_id("m") == rows.by_name("box") == added
        assert rows.all() == [added]
        assert rows.by_name("other") is None

    def test_a_name_is_had_by_one_machine(self, database: Database) -> None:
        """A taken name is refused; machines without a name are as many as one likes."""
        rows = MachineRows(database, open_host(database))
        add(rows, "1", "box")
        with pytest.raises(ConflictError, match="'box' exists already"):
            add(rows, "2", "box")
        add(rows, "3")
        add(rows, "4")
        assert [row.machine_id for row in rows.all()] == ["1", "3", "4"]

    def test_a_workspace_is_one_machines(self, database: Database) -> None:
        """A workspace that a machine has is refused to others until that machine is gone."""
        rows = MachineRows(database, open_host(database))
        add(rows, "m1", "box", workspace="drive")
        with pytest.raises(ConflictError, match="the workspace 'drive' is used by machine box"):
            add(rows, "m2", workspace="drive")
        add(rows, "m3", workspace="other")
        rows.remove("m1")
        assert add(rows, "m2", workspace="drive").workspace == "drive"

    def test_the_lowest_free_slot_is_used_again(self, database: Database) -> None:
        """Slots stay small however many machines have come and gone."""
        rows = MachineRows(database, open_host(database))
        assert [add(rows, name).slot for name in "abc"] == [0, 1, 2]
        rows.remove("b")
        assert [add(rows, name).slot for name in "de"] == [1, 3]

    def test_state_is_recorded(self, database: Database) -> None:
        """A machine moves on in its life."""
        rows = MachineRows(database, open_host(database))
        add(rows, "m")
        rows.set_state("m", MachineState.RUNNING)
        row = rows.by_id("m")
        assert row is not None
        assert row.state is MachineState.RUNNING

    def test_a_daemon_of_an_older_epoch_changes_nothing(self, database: Database) -> None:
        """Once a newer run has claimed a machine, the older one is refused."""
        old = MachineRows(database, open_host(database))
        add(old, "m")
        new = MachineRows(database, open_host(database))
        claimed = new.claim("m")
        assert claimed is not None
        assert claimed.epoch == 2
        with pytest.raises(ConflictError, match="not this daemon's any more"):
            old.set_state("m", MachineState.RUNNING)
        new.set_state("m", MachineState.RUNNING)

    def test_an_older_epoch_cannot_claim_back(self, database: Database) -> None:
        """Claiming goes forward only."""
        old = MachineRows(database, open_host(database))
        new = MachineRows(database, open_host(database))
        add(new, "m")
        row = old.claim("m")
        assert row is not None
        assert row.epoch == 2


class TestProcesses:
    """Rows of processes."""

    def test_planned_then_started_then_gone(self, database: Database) -> None:
        """A process is known before it has a pid, then by pid, start time and boot, then not at all."""
        rows = ProcessRows(database)
        rows.plan("p", Role.VMM, "m")
        assert rows.all() == [ProcessRow("p", Role.VMM, "m")]
        rows.start("p", pid=7, start_time=1 << 40, boot_id="b")
        assert rows.of("m") == [ProcessRow("p", Role.VMM, "m", 7, 1 << 40, "b")]
        rows.remove("p")
        assert rows.all() == []
