"""The drives of agents: whose they are, what becomes of them, and which of them ``prune`` takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fireclaw.daemon.drives import DRIVE_MIB, Drives

if TYPE_CHECKING:
    from pathlib import Path

ADA, ADA2, BOB = (f"{digit}0000000-0000-4000-8000-000000000000" for digit in "123")


@pytest.fixture
def drives(tmp_path: Path) -> Drives:
    """The drives in an empty folder."""
    return Drives(tmp_path)


def test_an_agent_keeps_its_drive(drives: Drives) -> None:
    """The first machine gets a new drive, each later one the same."""
    drive = drives.have(ADA, "ada")
    assert drive.stat().st_size == DRIVE_MIB << 20
    inode = drive.stat().st_ino
    assert drives.have(ADA, "ada").stat().st_ino == inode
    assert drives.have(BOB, "bob") != drive


def test_a_drive_goes_with_its_agent(drives: Drives, tmp_path: Path) -> None:
    """Nothing is left, neither of the agent's nor of an earlier one of its name; without any drive that is harmless."""
    drives.have(ADA, "ada")
    drives.drop(ADA, "ada", keep=True)
    drives.drop(ADA2, "ada", keep=False)
    assert list(tmp_path.iterdir()) == []
    drives.drop(ADA, "ada", keep=True)
    drives.drop(ADA, "ada", keep=False)
    assert list(tmp_path.iterdir()) == []


def test_a_kept_drive_is_the_next_agents_of_that_name(drives: Drives) -> None:
    """Whoever is invoked under the name, whatever its case, has the files; nobody else does."""
    inode = drives.have(ADA, "ada").stat().st_ino
    drives.drop(ADA, "ada", keep=True)
    assert drives.have(BOB, "bob").stat().st_ino != inode
    assert drives.have(ADA2, "Ada").stat().st_ino == inode


def test_prune_takes_the_drives_of_agents_that_are_gone(drives: Drives, tmp_path: Path) -> None:
    """A living agent's drive and a kept one stay, and so does what is not an agent's."""
    drives.have(ADA, "ada")
    drives.drop(ADA, "ada", keep=True)
    orphan, living = drives.have(ADA2, "eve"), drives.have(BOB, "bob")
    (tmp_path / "half.ext4.x.unfinished").touch()
    assert drives.prune({BOB}) == [orphan.name]
    assert {path.name for path in tmp_path.iterdir()} == {living.name, "ada.kept", "half.ext4.x.unfinished"}
