"""Workspaces: drives that outlive the machines that mount them at /workspace.

A workspace is a sparse file with an ext4 file system whose root folder belongs to the workload's user. One is made here
in full before it has its name, and from then on only its machine writes to it. Everything here blocks: the daemon calls
it in a thread.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fireclaw.errors import ConflictError, SetupError
from fireclaw.images.tool import run

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_UNFINISHED: Final = ".unfinished"
_BLANK: Final = ".blank"
# Tables and journal are zeros in a sparse file already, and nothing is kept back for root: it is the user's drive.
_OPTIONS: Final = ("-q", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,root_owner=1000:1000")


def make_workspace(path: Path, mib: int = 64) -> None:
    """Make an empty workspace; takes some 20 ms and, at 64 MiB, 400 kB of disk.

    Args:
        path: its file, 0600, which appears when all of it is there.
        mib: its size; no clone can change that, for it is part of what a snapshot recorded.

    Raises:
        ConflictError: there is a file of that name.
        SetupError: mkfs.ext4 is missing or failed, or the disk refuses; nothing is left.
    """
    try:
        fd, name = tempfile.mkstemp(_UNFINISHED, f"{path.name}.", path.parent)
        new = Path(name)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # until it is closed: ``sweep`` leaves it alone
            os.truncate(fd, mib << 20)
            run(["mkfs.ext4", *_OPTIONS, new])
            path.hardlink_to(new)  # a rename would replace somebody's work
        finally:
            new.unlink()
            os.close(fd)
    except FileExistsError:
        raise ConflictError(f"there is a workspace {str(path)!r} already") from None
    except OSError as error:
        raise SetupError(
            f"cannot make the workspace {str(path)!r}: {error.strerror}", hint="make room there, or mend its rights"
        ) from error


@contextmanager
def blank_drive(folder: Path, machine_id: str, size: int) -> Iterator[Path | None]:
    """An empty drive for a template, in the place of its clones' workspaces; it goes with the block.

    Args:
        folder: where workspaces are.
        machine_id: of the template.
        size: in bytes; 0 for none.
    """
    if not size:
        yield None
        return
    blank = folder / f"{machine_id}{_BLANK}"
    try:
        with blank.open("xb") as file:
            file.truncate(size)
        yield blank
    finally:
        blank.unlink(missing_ok=True)


def sweep(folder: Path, machines: Collection[str]) -> list[str]:
    """Remove what killed makers left: half-made workspaces, and blank drives of templates that are no more.

    Args:
        folder: where workspaces are.
        machines: the ids of those that there are.

    Returns:
        the names of the files that went.
    """
    gone = [path for path in folder.glob(f"*{_UNFINISHED}") if _remove_abandoned(path)]
    for blank in folder.glob(f"*{_BLANK}"):
        if blank.name.removesuffix(_BLANK) not in machines:
            blank.unlink(missing_ok=True)
            gone.append(blank)
    return sorted(path.name for path in gone)


def _remove_abandoned(path: Path) -> bool:
    """Remove a file that nobody holds a lock on; whether it was one."""
    with suppress(FileNotFoundError, BlockingIOError), path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    return False
