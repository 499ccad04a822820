"""Snapshots on disk and in memory.

On disk a snapshot is a folder named by its key: ``memory`` (sparse), ``state`` and ``manifest.json`` with the digests.
In memory it is two sealed memfds (``fireclaw.vmm.base.MemorySnapshot``), which no clone can change. A folder that is
truncated or foreign is refused here and rebuilt by the caller; a reader never sees half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fireclaw.errors import CorruptError, SetupError
from fireclaw.vmm.base import MemorySnapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_PIECE = 1 << 20
_TEMPORARY = "tmp-"


@dataclass(frozen=True)
class Manifest:
    """What a snapshot on disk says of itself.

    Attributes:
        runtime: digest of the runtime that runs in it.
        image: digest of the image that its workload sees.
        magic: of the guest's boot, hexadecimal (``fireclaw.wire.hello``).
        memory_size: bytes of guest memory.
        memory_digest: SHA-256 over (offset, bytes) of each piece that holds data.
        state_digest: the same over the device state.
        state_size: bytes of device state.
    """

    runtime: str
    image: str
    magic: str
    memory_size: int
    memory_digest: str
    state_size: int
    state_digest: str


@dataclass(frozen=True)
class Loaded:
    """A snapshot ready to be cloned."""

    key: str
    memory: MemorySnapshot
    magic: bytes

    def close(self) -> None:
        """Give its memory back; clones that run keep what they mapped."""
        self.memory.close()


def make_key(**parts: object) -> str:
    """Name a snapshot by everything that must be the same for it to be of use."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class SnapshotFolder:
    """The snapshots of one home. Its methods block: call them in a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def save(self, key: str, memory: MemorySnapshot, magic: bytes, runtime: str, image: str) -> None:
        """Write a snapshot to disk; an older one of the same key is replaced.

        Raises:
            SetupError: the disk is full or cannot be written; nothing is left behind.
        """
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = self._folder / tempfile.mkdtemp(prefix=_TEMPORARY, dir=self._folder)
            try:
                self._write(temporary, memory, magic, runtime, image)
                self.remove(key)
                temporary.rename(self._folder / key)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        except OSError as error:
            raise SetupError(
                f"cannot write a snapshot to {str(self._folder)!r}: {error.strerror}", hint="make room there"
            ) from error

    def _write(self, folder: Path, memory: MemorySnapshot, magic: bytes, runtime: str, image: str) -> None:
        digests = {}
        for name, source in (("memory", memory.memory), ("state", memory.state)):
            with (folder / name).open("xb") as file:
                digests[name] = _copy(source, file.fileno())
        manifest = Manifest(
            runtime,
            image,
            magic.hex(),
            os.fstat(memory.memory).st_size,
            digests["memory"],
            os.fstat(memory.state).st_size,
            digests["state"],
        )
        with (folder / "manifest.json").open("x") as file:
            json.dump(asdict(manifest), file, indent=1)

    def load(self, key: str) -> Loaded | None:
        """Read a snapshot into sealed memory; None when there is none of this key.

        Raises:
            CorruptError: it is not what its manifest says.
        """
        folder = self._folder / key
        try:
            manifest = _manifest(folder)
            memory = _read(folder / "memory", manifest.memory_size, manifest.memory_digest)
            try:
                state = _read(folder / "state", manifest.state_size, manifest.state_digest)
            except BaseException:
                os.close(memory)
                raise
            return Loaded(key, MemorySnapshot(memory, state), bytes.fromhex(manifest.magic))
        except FileNotFoundError:
            if folder.exists():
                raise CorruptError(f"the snapshot {key[:12]} is incomplete") from None
            return None
        except (ValueError, TypeError, OSError) as error:
            raise CorruptError(f"the snapshot {key[:12]} cannot be read: {error}") from error

    def remove(self, key: str) -> None:
        """Remove a snapshot; nothing happens if there is none."""
        shutil.rmtree(self._folder / key, ignore_errors=True)

    def prune(self, keep: Callable[[Manifest], bool]) -> list[str]:
        """Remove what is half written, and every snapshot that ``keep`` does not want; return what went."""
        gone = []
        if self._folder.is_dir():
            for entry in self._folder.iterdir():
                if entry.is_dir() and not _wanted(entry, keep):
                    shutil.rmtree(entry)
                    gone.append(f"snapshot {entry.name[:12]}")
        return gone


def _manifest(folder: Path) -> Manifest:
    return Manifest(**json.loads((folder / "manifest.json").read_text()))


def _wanted(folder: Path, keep: Callable[[Manifest], bool]) -> bool:
    if folder.name.startswith(_TEMPORARY):
        return False
    try:
        return keep(_manifest(folder))
    except (OSError, ValueError, TypeError):
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
    digest = hashlib.sha256()
    os.ftruncate(target, os.fstat(source).st_size)
    for start, end in _extents(source):
        data = os.pread(source, end - start, start)
        if data.count(0) == len(data):
            continue
        digest.update(start.to_bytes(8, "big") + data)
        written = 0
        while written < len(data):
            written += os.pwrite(target, memoryview(data)[written:], start + written)
    return digest.hexdigest()


def _read(path: Path, size: int, digest: str) -> int:
    """Read a file into a new memfd, checked."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != size:
            raise CorruptError(f"the snapshot file {path.name!r} is truncated")
        memory = os.memfd_create(f"fireclaw-{path.name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            sound = _copy(file.fileno(), memory) == digest
        except BaseException:
            os.close(memory)
            raise
        if not sound:
            os.close(memory)
            raise CorruptError(f"the snapshot file {path.name!r} was changed")
        return memory
