"""The workspace drives of agents: one an agent, made when its first machine needs it, mounted by each later one.

A drive is the agent's and not a machine's, so it bears the agent's id and outlives every machine. What a destroyed
agent leaves by wish waits under its name for the next agent of that name. Everything here blocks.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

from fireclaw.irc.message import fold
from fireclaw.machines.workspace import make_workspace

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

DRIVE_MIB: Final = 64  # part of the snapshot's key: one size for all agents means one template
_DRIVE: Final = ".ext4"
_KEPT: Final = ".kept"


class Drives:
    """The drives of this host's agents.

    Args:
        folder: where workspaces are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def have(self, agent_id: str, name: str) -> Path:
        """Return the agent's drive: its own, else what the last agent of its name left, else an empty one.

        Raises:
            SetupError: it cannot be made, and why.
        """
        drive = self._drive(agent_id)
        if not drive.exists():
            try:
                self._kept(name).rename(drive)
            except FileNotFoundError:
                make_workspace(drive, DRIVE_MIB)
        return drive

    def drop(self, agent_id: str, name: str, *, keep: bool) -> None:
        """Remove an agent's drive, and what one of its name left before; harmless where there is none.

        Args:
            agent_id: the agent's.
            name: the agent's.
            keep: put the drive by for the next agent of that name.
        """
        if keep:
            with suppress(FileNotFoundError):  # it never had a machine
                self._drive(agent_id).rename(self._kept(name))
        else:
            self._drive(agent_id).unlink(missing_ok=True)
            self._kept(name).unlink(missing_ok=True)

    def prune(self, agents: Collection[str]) -> list[str]:
        """Remove the drives of agents that are no more, and return their names.

        Args:
            agents: the ids of those that there are.
        """
        gone = sorted(each for each in self._folder.glob(f"*{_DRIVE}") if each.stem not in agents)
        for drive in gone:
            drive.unlink(missing_ok=True)
        return [drive.name for drive in gone]

    def _drive(self, agent_id: str) -> Path:
        return self._folder / f"{agent_id}{_DRIVE}"

    def _kept(self, name: str) -> Path:
        return self._folder / f"{fold(name, 'ascii')}{_KEPT}"
