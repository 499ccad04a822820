"""A folder of finished things, each in a folder of its own with a manifest: how the store keeps its promises.

What stands here is whole, because it was made in a temporary folder and renamed. A maker holds a lock on its
temporary folder; the kernel drops that lock however the maker ends, so ``prune`` can tell the dead from the
living.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fireclaw.errors import CorruptError, SetupError
from fireclaw.images.tool import remove_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping
    from pathlib import Path

_MANIFEST = "manifest.json"
_TEMPORARY = "tmp-"
_REBUILD = "run 'fireclaw setup' to build it anew"


@dataclass(frozen=True)
class FileRecord:
    """What a file must be.

    Attributes:
        size: in bytes.
        sha256: digest in hex.
    """

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Measure a file."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path.stat().st_size, digest)


@dataclass(frozen=True)
class Manifest:
    """What a finished folder holds.

    Attributes:
        files: its files by name.
        packages: the Debian packages that went in, name to version.
    """

    files: Mapping[str, FileRecord]
    packages: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a finished folder.

        Raises:
            FileNotFoundError: there is no such folder.
            CorruptError: it cannot be understood.
        """
        path = folder / _MANIFEST
        try:
            data = json.loads(path.read_bytes())
            files = {name: FileRecord(**record) for name, record in data["files"].items()}
            return cls(files, data["packages"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptError(f"the manifest {str(path)!r} cannot be read: {error!r}", hint=_REBUILD) from error


class Shelf:
    """A folder of finished folders.

    ::

        with shelf.locked("runtime", progress):          # one maker at a time; others wait
            with shelf.staging() as folder:              # gone afterwards, whatever happens
                ...                                      # make folder/"out"
                with shelf.guarded():
                    shelf.publish(folder / "out", key, manifest)

    Args:
        root: the folder; made when first needed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, key: str) -> Path:
        """Return where the thing of that key stands, or would stand."""
        return self.root / key

    def has(self, key: str) -> bool:
        """Whether the thing of that key is finished."""
        return not key.startswith(_TEMPORARY) and (self.folder(key) / _MANIFEST).exists()

    @contextmanager
    def locked(self, name: str, progress: Callable[[str], None]) -> Iterator[None]:
        """Hold the lock of that name; ``progress`` is told if somebody else holds it now.

        Raises:
            SetupError: the folder cannot be written, or the disk got full.
        """
        with _told(self.root):
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _descriptor(self.root / f".lock-{name}", os.O_RDWR | os.O_CREAT) as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    progress(f"{name}: somebody else is making it, waiting")
                    fcntl.flock(lock, fcntl.LOCK_EX)
                yield

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep ``prune`` out, and be kept out by it: for moments in which something is not named yet."""
        with _descriptor(self.root, os.O_DIRECTORY) as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            yield

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Make a temporary folder beside the finished ones, and remove it at the end."""
        folder = self.root / f"{_TEMPORARY}{secrets.token_hex(6)}"
        with ExitStack() as stack:
            with self.guarded():
                folder.mkdir(mode=0o700)
                lock = stack.enter_context(_descriptor(folder, os.O_DIRECTORY))
                fcntl.flock(lock, fcntl.LOCK_EX)
            stack.callback(remove_tree, folder)
            yield folder

    def publish(self, folder: Path, key: str, manifest: Manifest) -> None:
        """Put a folder on the shelf in one step, in place of a damaged one of the same key; call it ``guarded``.

        Args:
            folder: in a ``staging`` folder; its files become read-only.
            key: its name on the shelf.
            manifest: what it holds.
        """
        (folder / _MANIFEST).write_text(json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n")
        for path in folder.iterdir():
            path.chmod(0o444)
            _flush(path)
        _flush(folder)
        target = self.folder(key)
        if target.exists():
            target.rename(folder.parent / "replaced")
        folder.rename(target)
        _flush(self.root)

    def write(self, name: str, data: object) -> None:
        """Write a small JSON file beside the finished folders in one step."""
        temporary = self.root / f".{name}.new"
        temporary.write_text(json.dumps(data, indent=1) + "\n")
        _flush(temporary)
        temporary.rename(self.root / name)

    def read(self, name: str) -> Any:
        """Return the JSON that ``write`` wrote, or None where nothing was written yet.

        Raises:
            CorruptError: it cannot be understood.
        """
        path = self.root / name
        try:
            return json.loads(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CorruptError(f"the file {str(path)!r} cannot be read: {error}", hint="remove it") from error

    def verify(self, what: str, key: str, *, full: bool = False) -> None:
        """Check that the files of ``key`` are there in the right size, and with ``full`` also their bytes.

        Args:
            what: how messages call it, e.g. ``"the image 'debian'"``.
            key: which.
            full: whether to read everything.

        Raises:
            CorruptError: it is not what it should be.
        """
        folder = self.folder(key)
        try:
            for name, record in Manifest.read(folder).files.items():
                size = (folder / name).stat().st_size
                if size != record.size:
                    raise CorruptError(
                        f"{what} is truncated: {name!r} has {size} of {record.size} bytes", hint=_REBUILD
                    )
                if full and FileRecord.of(folder / name) != record:
                    raise CorruptError(f"{what} is damaged: {name!r} is not what was built", hint=_REBUILD)
        except FileNotFoundError as error:
            raise CorruptError(f"{what} is damaged: {error.filename!r} is gone", hint=_REBUILD) from error

    def prune(self, wanted: Callable[[], Collection[str]]) -> list[str]:
        """Remove temporary folders that nobody makes any more, and finished ones that nobody wants.

        Args:
            wanted: returns the keys of those that stay; called while nothing can be published.

        Returns:
            The names of what went.
        """
        if not self.root.is_dir():
            return []
        gone = []
        with self.guarded():
            stay = wanted()
            for folder in sorted(self.root.iterdir()):
                if _abandoned(folder) or (self.has(folder.name) and folder.name not in stay):
                    remove_tree(folder)
                    gone.append(folder.name)
        return gone


def _abandoned(folder: Path) -> bool:
    """Whether it is a temporary folder whose lock nobody holds any more."""
    if not folder.name.startswith(_TEMPORARY):
        return False
    try:
        with _descriptor(folder, os.O_DIRECTORY) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):  # its maker works in it, or has just removed it
        return False
    return True


@contextmanager
def _descriptor(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    """Make a file or folder survive a power cut."""
    with _descriptor(path, os.O_RDONLY) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _told(root: Path) -> Iterator[None]:
    """Turn what a file system refuses into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            hint = "free some space there, or set FIRECLAW_HOME to a larger disk"
        elif error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
            hint = "set FIRECLAW_HOME to a folder you may write to"
        else:
            raise
        raise SetupError(f"cannot write below {str(root)!r}: {error.strerror}", hint=hint) from error
