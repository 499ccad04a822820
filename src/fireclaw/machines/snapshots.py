"""Snapshots on disk and in memory.

On disk a snapshot is a folder named by its key: ``memory`` (sparse), ``state`` and ``manifest.json`` with the digests.
Opened it is two descriptors (``fireclaw.vmm.base.MemorySnapshot``) of what no clone can change: sealed memfds, or these
files, where the VMM's user may only read them. A folder that is truncated or foreign is refused here and rebuilt by the
caller; a reader never sees half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from fireclaw.errors import CorruptError, SetupError
from fireclaw.vmm.base import MemorySnapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_PIECE = 1 << 20
_TEMPORARY = "tmp-"


@dataclass(frozen=True, kw_only=True)
class About:
    """What must be the same for a snapshot to be of use.

    Attributes:
        runtime: digest of the runtime that runs in it.
        image: digest of the image that its workload sees.
        vmm: fingerprint of the VMM and the host (``Vmm.fingerprint``).
        workspace_bytes: size of the drive in the place of its clones' workspaces; 0 for none.
    """

    runtime: str
    image: str
    vmm: str
    workspace_bytes: int = 0

    @property
    def key(self) -> str:
        """The name of such a snapshot."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a snapshot on disk says of itself.

    Attributes:
        about: what it is a snapshot of.
        magic: of the guest's boot, hexadecimal (``fireclaw.wire.hello``).
        memory_size: bytes of guest memory.
        memory_digest: SHA-256 over (offset, bytes) of each piece that holds data.
        state_digest: the same over the device state.
        state_size: bytes of device state.
    """

    about: About
    magic: str
    memory_size: int
    memory_digest: str
    state_size: int
    state_digest: str


@dataclass(frozen=True)
class Snapshot:
    """A snapshot ready to be cloned.

    Attributes:
        memory: the guest's memory and device state.
        magic: that its clones are born with.
    """

    memory: MemorySnapshot
    magic: bytes

    @property
    def is_removed(self) -> bool:
        """Whether its files have no name (any more); memfds never have one."""
        return os.fstat(self.memory.memory).st_nlink == 0

    def close(self) -> None:
        """Give its memory back; clones that run keep what they mapped."""
        self.memory.close()


class SnapshotFolder:
    """The snapshots of one home. Its methods block: call them in a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, about: About, memory: MemorySnapshot, magic: bytes) -> None:
        """Write a snapshot to disk; an older one of the same kind is replaced.

        Raises:
            SetupError: the disk is full or cannot be written; nothing is left behind.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = self._folder / tempfile.mkdtemp(prefix=_TEMPORARY, dir=self._folder)
            try:
                _write(temporary, about, memory, magic)
                self.remove(about.key)
                temporary.rename(self._folder / about.key)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise SetupError(
                f"cannot write a snapshot to {str(self._folder)!r}: {error.strerror}", hint="make room there"
            ) from error

    def load(self, about: About, *, seal: bool) -> Snapshot | None:
        """Open a snapshot after checking it; None when there is none of this kind.

        Args:
            about: which one.
            seal: read it into sealed memory; otherwise its files themselves are opened, for reading.

        Raises:
            CorruptError: it is not what its manifest says.
        """
        folder = self._folder / about.key
        opening = _read if seal else _open
        with ExitStack() as undo:
            try:
                manifest = _manifest(folder)
                memory = opening(folder / "memory", manifest.memory_size, manifest.memory_digest)
                undo.callback(os.close, memory)
                state = opening(folder / "state", manifest.state_size, manifest.state_digest)
                undo.callback(os.close, state)
                snapshot = MemorySnapshot(memory, state)
                if seal:
                    snapshot.seal()
                loaded = Snapshot(snapshot, bytes.fromhex(manifest.magic))
            except FileNotFoundError:
                if folder.exists():
                    raise CorruptError(f"the snapshot {about.key[:12]} is incomplete") from None
                return None
            except (ValueError, TypeError, KeyError, OSError) as error:
                raise CorruptError(f"the snapshot {about.key[:12]} cannot be read: {error}") from error
            undo.pop_all()
        return loaded

    def remove_outdated(self, about: About) -> bool:
        """Remove snapshots that differ only in the VMM and the host; say whether there was one.

        A host has one VMM that is used; another's snapshot is of no use once that was updated or the CPU changed.
        """

        def keep(other: About) -> bool:
            return replace(other, vmm=about.vmm) != about or other == about

        return bool(self.prune(keep))

    def remove(self, key: str) -> None:
        """Remove a snapshot; nothing happens if there is none."""
        shutil.rmtree(self._folder / key, ignore_errors=True)

    def prune(self, keep: Callable[[About], bool]) -> list[str]:
        """Remove what is half written, and every snapshot that ``keep`` does not want; return what went."""
        gone = []
        if self._folder.is_dir():
            for entry in self._folder.iterdir():
                if entry.is_dir() and not _wanted(entry, keep):
                    shutil.rmtree(entry)
                    gone.append(f"snapshot {entry.name[:12]}")
        return gone


def _write(folder: Path, about: About, memory: MemorySnapshot, magic: bytes) -> None:
    digests = {}
    for name, source in (("memory", memory.memory), ("state", memory.state)):
        with (folder / name).open("xb") as file:
            digests[name] = _copy(source, file.fileno())
            os.fchmod(file.fileno(), 0o444)  # a VMM under another user id reads it, and cannot change it
    manifest = Manifest(
        about=about,
        magic=magic.hex(),
        memory_size=os.fstat(memory.memory).st_size,
        memory_digest=digests["memory"],
        state_size=os.fstat(memory.state).st_size,
        state_digest=digests["state"],
    )
    with (folder / "manifest.json").open("x") as file:
        json.dump(asdict(manifest), file, indent=1)


def _manifest(folder: Path) -> Manifest:
    values = json.loads((folder / "manifest.json").read_text())
    return Manifest(**{**values, "about": About(**values["about"])})


def _wanted(folder: Path, keep: Callable[[About], bool]) -> bool:
    if folder.name.startswith(_TEMPORARY):
        return False
    try:
        return keep(_manifest(folder).about)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _extents(fd: int) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each piece of a file that holds data."""
    size = os.fstat(fd).st_size
    position = 0
    while position < size:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError:  # ENXIO: only a hole is left
            return
        position = os.lseek(fd, start, os.SEEK_HOLE)
        for piece in range(start, position, _PIECE):
            yield piece, min(piece + _PIECE, position)


def _copy(source: int, target: int) -> str:
    """Copy a file, holes and zero pieces left out; return its digest."""
    os.ftruncate(target, os.fstat(source).st_size)
    digest = hashlib.sha256()
    for start, data in _pieces(source):
        digest.update(start.to_bytes(8, "big") + data)
        written = 0
        while written < len(data):
            written += os.pwrite(target, memoryview(data)[written:], start + written)
    return digest.hexdigest()


def _pieces(fd: int) -> Iterator[tuple[int, bytes]]:
    """Yield the pieces of a file that are not all zeros, with their offsets."""
    for start, end in _extents(fd):
        data = os.pread(fd, end - start, start)
        if data.count(0) != len(data):
            yield start, data


def _open(path: Path, size: int, digest: str) -> int:
    """Open a file, checked; that also has it in the page cache for the first clone."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check_size(path, fd, size)
        found = hashlib.sha256()
        for start, data in _pieces(fd):
            found.update(start.to_bytes(8, "big") + data)
        _check_digest(path, found.hexdigest(), digest)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _read(path: Path, size: int, digest: str) -> int:
    """Read a file into a new memfd, checked."""
    with path.open("rb") as file:
        _check_size(path, file.fileno(), size)
        memory = os.memfd_create(f"fireclaw-{path.name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            _check_digest(path, _copy(file.fileno(), memory), digest)
        except BaseException:
            os.close(memory)
            raise
        return memory


def _check_size(path: Path, fd: int, size: int) -> None:
    if os.fstat(fd).st_size != size:
        raise CorruptError(f"the snapshot file {path.name!r} is truncated")


def _check_digest(path: Path, found: str, digest: str) -> None:
    if found != digest:
        raise CorruptError(f"the snapshot file {path.name!r} was changed")
