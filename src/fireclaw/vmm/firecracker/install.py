"""Installing the pinned release: from upstream by checksum, or from what the operator has downloaded.

::

    <vmms>/firecracker-v1.16.1/         the programs; it appears by a rename, once both have told their version
    <vmms>/firecracker-v1.16.1.new/     what is being made; the next installation removes what a killed one left
    <vmms>/firecracker-v1.16.1.lock     held (flock) by whoever installs

Nothing is unpacked by the names in an archive: the two programs are copied out of it, to names of ours. Everything
here blocks: the daemon calls it in a thread.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import shutil
import tarfile
import time
import zlib
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Final

from fireclaw.download import DownloadError, read_url
from fireclaw.errors import CorruptError, SetupError
from fireclaw.vmm.firecracker.release import (
    INSTALL,
    JAILER,
    PROGRAM,
    RELEASE,
    Programs,
    Release,
    ask_version,
    dotted,
    folder,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from io import BufferedReader

    Say = Callable[[str], None]

_CHUNK: Final = 1 << 20
_LARGEST: Final = 256 << 20  # of an archive; the pinned one has 7 MB
_SUMS: Final = "SHA256SUMS"
_SUMS_LARGEST: Final = 1 << 20
_MAGIC_GZIP: Final = b"\x1f\x8b"
_MAGIC_PROGRAM: Final = (b"\x7fELF", b"#!")
_TELL_S: Final = 1.0
_OWN_HINT: Final = f"download it on another computer and give it: {INSTALL} --file PATH"


def install(vmms: Path, say: Say, *, file: Path | None = None, release: Release = RELEASE) -> Programs:
    """Have the release installed; harmless where it is.

    Args:
        vmms: where releases are kept.
        say: takes a line for people.
        file: an archive of the release, an unpacked one, or its program ``firecracker`` with ``jailer`` beside it;
            fetched from upstream if None.
        release: which one.

    Raises:
        SetupError: it cannot be had, or is not what it should be; nothing is left of it.
        CorruptError: bytes are not those that their digest promises.
    """
    place = folder(vmms)
    try:
        vmms.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(place, say):
            if (found := _find_sound(place, release)) is not None:
                say(f"Firecracker {dotted(release.version)} is there already, in {place}")
                return found
            with _staging(place) as new:
                _gather(file, new, release, say)
                programs = _try(new, release, str(file or _name(release)))
                _replace(place, new)
    except OSError as error:
        raise SetupError(
            f"cannot install Firecracker in {str(vmms)!r}: {error.strerror}", hint="make room there, or mend its rights"
        ) from error
    say(f"installed Firecracker {dotted(release.version)} in {place}{'' if programs.jailer else ', without a jailer'}")
    return _moved(programs, place)


def _find_sound(place: Path, release: Release) -> Programs | None:
    """What is installed, if it is whole."""
    try:
        return _try(place, release, str(place))
    except SetupError:
        return None


def _try(place: Path, release: Release, source: str) -> Programs:
    """Run the programs of a folder; both must be the release's."""
    for name in (PROGRAM, JAILER):
        program = place / name
        if name == JAILER and not program.exists():
            if os.geteuid() == 0:
                raise SetupError(f"{source} has no jailer: as root Firecracker runs in a jail only", hint=INSTALL)
            return Programs(place / PROGRAM, None, release.version)
        version = ask_version(program, f"{name} of {source}")
        if version != release.version:
            raise SetupError(
                f"{name} of {source} is version {dotted(version)}, not {dotted(release.version)}",
                hint="other versions are used from PATH, not installed; docs/firecracker.md tells which",
            )
    return Programs(place / PROGRAM, place / JAILER, release.version)


def _moved(programs: Programs, place: Path) -> Programs:
    return Programs(place / PROGRAM, programs.jailer and place / JAILER, programs.version)


def _gather(file: Path | None, new: Path, release: Release, say: Say) -> None:
    """Bring the programs into a folder, out of whatever there is."""
    if file is None:
        archive = new / _name(release)
        _download(release, archive, say)
        with archive.open("rb") as stream:
            _unpack(stream, archive.name, new, release)
        archive.unlink()
    elif file.is_dir():
        names = (PROGRAM, _member(PROGRAM, release))
        program = next((file / name for name in names if (file / name).is_file()), None)
        if program is None:
            raise SetupError(f"{str(file)!r} holds no {names[0]!r} and no {names[1]!r}", hint=_release_hint(release))
        _take_program(program, new, say)
    else:
        _take_file(file, new, release, say)


def _take_file(file: Path, new: Path, release: Release, say: Say) -> None:
    """Take an archive or a program, whichever it is."""
    with _open(file) as stream:
        magic = stream.read(4)
        stream.seek(0)
        if magic.startswith(_MAGIC_GZIP):
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            known = (
                "as upstream published it" if digest == release.sha256 else "not the archive that upstream published"
            )
            say(f"{file}: sha256 {digest}, {known}")
            stream.seek(0)
            _unpack(stream, str(file), new, release)
            return
    if not magic.startswith(_MAGIC_PROGRAM):
        raise SetupError(f"{str(file)!r} is neither a .tgz archive nor a program", hint=_release_hint(release))
    _take_program(file, new, say)


def _take_program(program: Path, new: Path, say: Say) -> None:
    """Copy a program, and the jailer that lies beside it."""
    beside = (program.with_name(name) for name in (program.name.replace(PROGRAM, JAILER, 1), JAILER))
    jailer = next((path for path in beside if path != program and path.is_file()), None)
    for source, name in ((program, PROGRAM), (jailer, JAILER)):
        if source is not None:
            with _open(source) as stream:
                say(f"{source}: sha256 {_copy(stream, new / name)}")


def _open(file: Path) -> BufferedReader:
    try:
        return file.open("rb")
    except OSError as error:
        raise SetupError(
            f"cannot read {str(file)!r}: {error.strerror}", hint="--file takes what you downloaded"
        ) from error


def _download(release: Release, archive: Path, say: Say) -> None:
    """Fetch the archive; the bytes must be the pinned ones."""
    say(f"fetching {release.url}")
    digest = hashlib.sha256()
    try:
        with archive.open("wb") as file, closing(_receive(release, say)) as pieces:
            for data in pieces:
                file.write(data)
                digest.update(data)
    except DownloadError as error:
        raise SetupError(f"cannot fetch {release.url}: {error}", hint=_OWN_HINT) from error
    if digest.hexdigest() != release.sha256:
        raise CorruptError(
            f"what came from {release.url} is not Firecracker {dotted(release.version)}: refused (its sha256 is"
            f" {digest.hexdigest()}, not {release.sha256})",
            hint=_OWN_HINT,
        )


def _receive(release: Release, say: Say) -> Generator[bytes, None, None]:
    """Yield the archive's bytes to their end, and tell each second how many have come."""
    done, total, told = 0, 0, time.monotonic()
    with closing(read_url(release.url)) as pieces:
        for piece in pieces:
            yield piece.data
            done, total = done + len(piece.data), piece.total
            if done > _LARGEST:
                raise DownloadError(f"it sends more than {_LARGEST >> 20} MiB")
            if time.monotonic() - told >= _TELL_S:
                told = time.monotonic()
                say(f"{_name(release)}: {done / 1e6:.1f} of {total / 1e6:.1f} MB")
    if done < total:
        raise DownloadError(f"the connection ended after {done} of {total} bytes")


def _unpack(archive: IO[bytes], called: str, new: Path, release: Release) -> None:
    """Copy the programs out of an archive, and hold them against the checksums that it brings."""
    wanted = {_member(name, release): name for name in (PROGRAM, JAILER)}
    found: dict[str, str] = {}
    sums: Mapping[str, str] = {}
    others: list[str] = []
    with _whole(called), tarfile.open(fileobj=archive, mode="r:gz") as members:
        for path, stream in _files(members, called):
            if path.name in wanted:
                found[path.name] = _copy(stream, new / wanted[path.name])
            elif path.name == _SUMS:
                sums = _read_sums(stream.read(_SUMS_LARGEST))
            elif path.name.startswith(tuple(f"{name}-v" for name in wanted.values())):
                others.append(path.name)
    for member in wanted:
        if member not in found:
            instead = f", but {others[0]!r}" if others else ""
            raise SetupError(f"{called} holds no {member!r}{instead}", hint=_release_hint(release))
        if sums.get(member) != found[member]:
            reason = f"is not what its {_SUMS} promises" if member in sums else f"is not named in its {_SUMS}"
            raise CorruptError(f"{member!r} in {called} {reason}: refused", hint="download it again")


@contextmanager
def _whole(called: str) -> Iterator[None]:
    """Tell of an archive that ends early, or is none."""
    try:
        yield
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise CorruptError(f"{called} is truncated or damaged: {error}", hint="download it again") from error


def _files(members: tarfile.TarFile, called: str) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    """Yield the regular files of an archive, each with its bytes."""
    for member in members:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise SetupError(
                f"{called} has a member {member.name!r}, as no release has: refused", hint="where does it come from?"
            )
        if member.isfile() and (stream := members.extractfile(member)) is not None:
            yield path, stream


def _copy(stream: IO[bytes], target: Path) -> str:
    """Write a program; return its digest."""
    digest = hashlib.sha256()
    with target.open("wb") as file:
        while data := stream.read(_CHUNK):
            digest.update(data)
            file.write(data)
        os.fchmod(file.fileno(), 0o755)
        file.flush()
        os.fsync(file.fileno())  # the rename must not outlive the bytes
    return digest.hexdigest()


def _read_sums(text: bytes) -> Mapping[str, str]:
    """Digests by file name, out of what sha256sum(1) wrote."""
    lines = (line.split(maxsplit=1) for line in text.decode(errors="replace").splitlines())
    return {PurePosixPath(line[1].lstrip("*")).name: line[0] for line in lines if len(line) == 2}


def _member(name: str, release: Release) -> str:
    return f"{name}-v{dotted(release.version)}-x86_64"


def _name(release: Release) -> str:
    return release.url.rpartition("/")[2]


def _release_hint(release: Release) -> str:
    return f"the release is {release.url}"


@contextmanager
def _locked(place: Path, say: Say) -> Iterator[None]:
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is installing Firecracker; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _staging(place: Path) -> Iterator[Path]:
    """A folder beside the place; nothing is left of it but what was moved."""
    new = place.with_name(f"{place.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(mode=0o755)
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _replace(place: Path, new: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)  # a broken one: a sound one is kept
    new.rename(place)
