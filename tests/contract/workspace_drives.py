"""Rooms on whichever VMM is tried, and a look at workspace drives from outside."""

from __future__ import annotations

import os
import subprocess
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fireclaw.config import load_config
from fireclaw.daemon.rooms import open_rooms

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fireclaw.daemon.rooms import Rooms
    from fireclaw.paths import Home


@asynccontextmanager
async def open_tried_rooms(home: Home) -> AsyncIterator[Rooms]:
    """The daemon's rooms, opened in this process: on the software CPU unless the environment names something else."""
    home.make()
    async with open_rooms(home, load_config(home, {"FIRECLAW_MACHINE_ACCEL": "tcg", **os.environ})) as rooms:
        await rooms.machines.adopt()
        yield rooms
        await rooms.machines.aclose(keep=False)


def file_on(drive: Path, name: str) -> str:
    """What a file on a drive holds that nobody uses; its journal is not looked at, so it must have been synced."""
    return subprocess.run(
        ["/sbin/debugfs", "-R", f"cat {name}", drive], capture_output=True, text=True, check=True
    ).stdout
