"""Where a Firecracker runs: its working folder, with all that it opens under the names of ``bodies``.

That is links to kernel and drives, to the snapshot's memory, and the FIFOs that its console and its log go to. As root
it is a jail (``jail``); a person's machines run under his own user id, in their own folders.
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fireclaw.errors import SetupError
from fireclaw.vmm.base import told_by_host

if TYPE_CHECKING:
    from fireclaw.vmm.base import VmSpec
    from fireclaw.vmm.firecracker.release import Programs

# Firecracker fills its descriptor table up to the limit when it starts: a container's 2^30 takes for ever.
OPEN_FILES: Final = 2048


class Place(ABC):
    """The working folder of one Firecracker.

    Attributes:
        root: the folder.
    """

    root: Path

    @abstractmethod
    def argv(self, programs: Programs, mark: str, options: list[str]) -> list[str]:
        """The command that starts it here, with Firecracker's own options."""

    @property
    @abstractmethod
    def cwd(self) -> Path:
        """Where that command is started."""

    @abstractmethod
    def make(self) -> None:
        """Make the folder; errors as for ``add``."""

    @abstractmethod
    def add(self, name: str, file: Path, *, writable: bool = False) -> None:
        """Let it have a file under a name.

        Raises:
            SetupError: the file is missing, or cannot be linked.
        """

    @abstractmethod
    def add_open(self, name: str, fd: int) -> None:
        """Let it have an open file of ours under a name; errors as for ``add``."""

    @abstractmethod
    def add_fifo(self, name: str) -> int:
        """Make a FIFO that it writes to; return our end, non-blocking. Errors as for ``add``."""

    def open_fifo(self, name: str) -> int:
        """Our end of a FIFO that an earlier daemon made."""
        return os.open(self.root / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)

    @abstractmethod
    def offer(self, name: str) -> None:
        """Let it write a file of that name; errors as for ``add``."""

    @abstractmethod
    def take(self, name: str) -> int:
        """Open what it wrote there, for reading; errors as for ``add``."""

    def connect(self, name: str) -> socket.socket:
        """Connect to a socket that it listens on; non-blocking.

        The path may be longer than the 107 bytes of unix(7), and a jail's folder is not ours alone: so no link is
        followed, and the socket is reached by its descriptor.

        Raises:
            OSError: it is not there, or nobody listens.
        """
        place = os.open(self.root / name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                sock.connect(f"/proc/self/fd/{place}")
            except BaseException:
                sock.close()
                raise
            return sock
        finally:
            os.close(place)

    @abstractmethod
    async def remove(self) -> None:
        """Remove what was made here; what the machine's own folder holds is its maker's."""


class Folder(Place):
    """The machine's own folder: for a person, whose machines run under his user id."""

    def __init__(self, spec: VmSpec) -> None:
        self.root = spec.folder
        self._offered: dict[str, int] = {}

    def argv(self, programs: Programs, mark: str, options: list[str]) -> list[str]:
        """See ``Place.argv``."""
        return ["prlimit", f"--nofile={OPEN_FILES}", str(programs.firecracker), "--id", mark, *options]

    @property
    def cwd(self) -> Path:
        """See ``Place.cwd``."""
        return self.root

    def make(self) -> None:
        """See ``Place.make``: it is there."""

    def add(self, name: str, file: Path, *, writable: bool = False) -> None:
        """See ``Place.add``."""
        if not os.access(file, os.R_OK | os.W_OK if writable else os.R_OK):
            reason = "no access" if file.exists() else "no such file"
            raise SetupError(f"cannot open {str(file)!r}: {reason}", hint="run 'fireclaw setup' to build it anew")
        self._link(name, file)

    def add_open(self, name: str, fd: int) -> None:
        """See ``Place.add_open``. A process of our own user may look at our descriptors."""
        self._link(name, Path(f"/proc/{os.getpid()}/fd/{fd}"))

    def _link(self, name: str, target: Path) -> None:
        with told_by_host():
            (self.root / name).symlink_to(target)

    def add_fifo(self, name: str) -> int:
        """See ``Place.add_fifo``."""
        with told_by_host():
            os.mkfifo(self.root / name, 0o600)
            return self.open_fifo(name)

    def offer(self, name: str) -> None:
        """See ``Place.offer``: a file in memory, for the folder may lie on a small file system."""
        with told_by_host():
            self._offered[name] = os.memfd_create(f"fireclaw-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.add_open(name, self._offered[name])

    def take(self, name: str) -> int:
        """See ``Place.take``."""
        return self._offered.pop(name)

    async def remove(self) -> None:
        """See ``Place.remove``."""
        for fd in self._offered.values():
            os.close(fd)
        self._offered.clear()
        with suppress(FileNotFoundError):
            for entry in self.root.iterdir():
                entry.unlink()
