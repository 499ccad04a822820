"""Jails: where Firecrackers run as root, each shut in by Firecracker's own jailer (docs/jailer.md there).

A jail is a chroot with a user and group id of its own, without capabilities, in a cgroup with limits where the host's
cgroup v2 can be used. Files get in as hard links, so images and snapshots must lie on the jails' file system; they stay
root's and read-only, and a workspace is given to the machine's user.

All jails of a home make its ``Block``. After the death of a machine, of whatever cause, its chroot and its cgroup are
found there by its mark.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fireclaw.errors import SetupError, VmmError
from fireclaw.vmm.base import told_by_host
from fireclaw.vmm.firecracker.places import OPEN_FILES, Place

if TYPE_CHECKING:
    from fireclaw.vmm.base import VmSpec
    from fireclaw.vmm.firecracker.release import Programs
    from fireclaw.vmm.process import Gate

CGROUPS: Final = Path("/sys/fs/cgroup")
_CONTROLLERS: Final = {"cpu", "memory", "pids"}
_PERIOD_US: Final = 100_000
_VMM_MIB: Final = 64  # its own memory is 5 MiB; page tables and a margin
_THREADS: Final = 16  # its own are two, and one a virtual processor
_EMPTY_S: Final = 2.0  # a killed process leaves its cgroup in some milliseconds


class Block:
    """All jails of one home, and the cgroup that theirs lie in.

    Args:
        jails: where jails are made.
        gate: tells the marks of machines.
    """

    def __init__(self, jails: Path, gate: Gate) -> None:
        self._jails = jails
        self._gate = gate
        self._taken: set[str] = set()
        self.cgroup = f"fireclaw-{gate.home_tag}"

    def find(self) -> set[str]:
        """The ids of the machines of which a jail or a cgroup is there, living or dead."""
        prefix = self._gate.mark("")
        places = [*self._jails.glob(f"*/{prefix}*"), *(CGROUPS / self.cgroup).glob(f"{prefix}*")]
        return {place.name.removeprefix(prefix) for place in places if place.is_dir()}

    def cell(self, machine_id: str, program: str) -> Path:
        """The folder of a machine's jail: the one that is there, or where the jailer of ``program`` makes it."""
        mark = self._gate.mark(machine_id)
        return next(self._jails.glob(f"*/{mark}"), self._jails / program / mark)

    def take(self, machine_id: str) -> None:
        """Note that a machine's jail is in use: our cgroup stays as long as one is."""
        self._taken.add(machine_id)

    def raze(self, machine_id: str) -> None:
        """Remove what is left of a machine's jail. It blocks for some milliseconds.

        Raises:
            OSError: something cannot be removed.
        """
        mark = self._gate.mark(machine_id)
        for cell in self._jails.glob(f"*/{mark}"):
            shutil.rmtree(cell, ignore_errors=True)
        _remove_cgroup(CGROUPS / self.cgroup / mark)
        self._taken.discard(machine_id)
        if not self._taken:  # a jailer that is just starting would miss it
            with suppress(OSError):
                (CGROUPS / self.cgroup).rmdir()


class Jail(Place):
    """The working folder of one Firecracker in a jail.

    Args:
        block: where it is.
        spec: what it is for.
        program: the name of Firecracker's file, which the jailer puts in the path.
    """

    def __init__(self, block: Block, spec: VmSpec, program: str) -> None:
        assert spec.user is not None  # jails are root's
        self._block = block
        self._spec = spec
        self._user = spec.user
        self._cell = block.cell(spec.machine_id, program)
        self.root = self._cell / "root"
        block.take(spec.machine_id)

    def argv(self, programs: Programs, mark: str, options: list[str]) -> list[str]:
        """See ``Place.argv``."""
        assert programs.jailer is not None  # ``release.find`` saw to it
        return [
            str(programs.jailer),
            *("--id", mark),
            *("--exec-file", str(programs.firecracker)),
            *("--uid", str(self._user), "--gid", str(self._user)),
            *("--chroot-base-dir", str(self._cell.parent.parent)),
            *("--resource-limit", f"no-file={OPEN_FILES}"),
            *("--resource-limit", f"fsize={self._largest_file()}"),
            *self._limits(),
            "--",
            *options,
        ]

    def _limits(self) -> list[str]:
        if not can_limit():
            return []
        limits = {
            "memory.max": f"{self._spec.memory_mib + _VMM_MIB}M",
            "pids.max": str(_THREADS + self._spec.vcpus),
            # The virtual processors and Firecracker's own threads: a hostile guest cannot take more.
            "cpu.max": f"{(self._spec.vcpus + 1) * _PERIOD_US} {_PERIOD_US}",
        }
        words = [word for name, value in limits.items() for word in ("--cgroup", f"{name}={value}")]
        return ["--cgroup-version", "2", "--parent-cgroup", self._block.cgroup, *words]

    def _largest_file(self) -> int:
        """The size of the largest file that it writes: a snapshot's memory, or its workspace."""
        workspace = 0 if self._spec.workspace is None else self._spec.workspace.stat().st_size
        return max(self._spec.memory_mib << 20, workspace)

    @property
    def cwd(self) -> Path:
        """See ``Place.cwd``."""
        return Path("/")

    def make(self) -> None:
        """See ``Place.make``. The jailer finds the folder and takes it over."""
        with told_by_host():
            self.root.mkdir(mode=0o700, parents=True)

    def add(self, name: str, file: Path, *, writable: bool = False) -> None:
        """See ``Place.add``."""
        try:
            (self.root / name).hardlink_to(file.resolve(strict=True))
            if writable:
                os.chown(self.root / name, self._user, self._user)
        except OSError as error:
            raise _no_link(str(file), error) from error

    def add_open(self, name: str, fd: int) -> None:
        """See ``Place.add_open``: a regular file that still has a name."""
        ours = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # Given a folder Python calls linkat(2), which follows the link in /proc; link(2) would not.
            os.link(str(fd), self.root / name, src_dir_fd=ours, follow_symlinks=True)
        except OSError as error:
            raise _no_link(f"the snapshot's {name}", error) from error
        finally:
            os.close(ours)

    def add_fifo(self, name: str) -> int:
        """See ``Place.add_fifo``."""
        path = self.root / name
        with told_by_host():
            os.mkfifo(path, 0o600)
            os.chown(path, self._user, self._user)
            return self.open_fifo(name)

    def offer(self, name: str) -> None:
        """See ``Place.offer``: the jail's root is its user's, on a file system with room for images."""

    def take(self, name: str) -> int:
        """See ``Place.take``."""
        # The folder is the VMM's user's: if its guest has taken it over, anything may lie there.
        with told_by_host():
            fd = os.open(self.root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise VmmError(f"Firecracker wrote no file {name!r}")
        return fd

    async def remove(self) -> None:
        """See ``Place.remove``."""
        await asyncio.to_thread(self._block.raze, self._spec.machine_id)


def can_limit() -> bool:
    """Whether cgroup v2 is there, has the controllers for our limits, and is ours to use.

    Controllers can be handed down from the root of all cgroups always, and from another (a container's) only where that
    is done already: it has processes of its own (cgroup-v2.rst, "No Internal Process Constraint").
    """
    try:
        controllers = set((CGROUPS / "cgroup.controllers").read_text().split())
        handed_down = set((CGROUPS / "cgroup.subtree_control").read_text().split())
    except OSError:
        return False
    is_root = not (CGROUPS / "cgroup.events").exists()
    return (controllers if is_root else handed_down) >= _CONTROLLERS and os.access(CGROUPS, os.W_OK)


def _remove_cgroup(cgroup: Path) -> None:
    """Remove a cgroup, and whoever is still in it."""
    deadline = time.monotonic() + _EMPTY_S
    while cgroup.is_dir():
        try:
            cgroup.rmdir()
        except FileNotFoundError:
            break
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            with suppress(OSError):  # kernels before 5.14 do not have it
                (cgroup / "cgroup.kill").write_text("1")
            time.sleep(0.005)


def _no_link(what: str, error: OSError) -> SetupError:
    if error.errno == errno.EXDEV:
        return SetupError(
            f"cannot link {what} into a jail: it lies on another file system",
            hint="keep images, snapshots and jails of FIRECLAW_HOME on one file system",
        )
    return SetupError(f"cannot link {what} into a jail: {error.strerror}", hint="run 'fireclaw setup' to build it anew")
