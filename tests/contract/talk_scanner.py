"""A search for words where they must not be: memory of processes, files, packed file systems, command lines.

A word is looked for as it is, in hexadecimal and in base64, so that an Authorization header or a dump does not hide it.
"""

from __future__ import annotations

import base64
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROC: Final = Path("/proc")
_CHUNK: Final = 16 << 20


def forms_of(word: str) -> list[bytes]:
    """How a word may be written: in base64 its middle looks one of three ways, by where it begins."""
    data = word.encode()
    encoded = [base64.b64encode(b"\0" * shift + data)[shift + 1 : -4] for shift in range(3)]
    return [data, data.hex().encode(), *encoded]


def process_holds(pid: int, word: str, *, mapped: int = 0) -> bool:
    """Whether a process has a word in its memory.

    Args:
        pid: the process.
        word: the word.
        mapped: look only into mappings of this many bytes, e.g. the memory of a guest; 0: into all.
    """
    needles = forms_of(word)
    with (_PROC / str(pid) / "mem").open("rb", buffering=0) as memory:
        return any(
            needle in chunk
            for start, end in _mappings(pid)
            if mapped in (0, end - start)
            for chunk in _chunks(memory.fileno(), start, end)
            for needle in needles
        )


def file_holds(path: Path, word: str) -> bool:
    """Whether a file has a word in it."""
    needles = forms_of(word)
    with path.open("rb") as file:
        chunks = _chunks(file.fileno(), 0, path.stat().st_size)
        return any(needle in chunk for chunk in chunks for needle in needles)


def folder_holds(folder: Path, word: str) -> list[Path]:
    """The files below a folder that have a word in their name or in them; links are not followed."""
    paths = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return [path for path in paths if word in path.name or (_is_file(path) and file_holds(path, word))]


def squashfs_holds(image: Path, word: str) -> list[Path]:
    """The files of a packed file system that have a word in them."""
    with tempfile.TemporaryDirectory(prefix="fct-drive-") as folder:
        unpacked = Path(folder, "root")
        command: list[str | Path] = ["unsquashfs", "-no-progress", "-no-xattrs", "-quiet", "-dest", unpacked, image]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return [path.relative_to(unpacked) for path in folder_holds(unpacked, word)]


def argv_holders(word: str) -> list[int]:
    """The processes of this host that have a word in their command line."""
    needles = forms_of(word)
    return [pid for pid, line in _command_lines() if any(needle in line for needle in needles)]


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _command_lines() -> Iterator[tuple[int, bytes]]:
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                yield int(entry.name), (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we looked


def _mappings(pid: int) -> Iterator[tuple[int, int]]:
    """The readable parts of a process's address space; those of the kernel in it cannot be read."""
    for line in (_PROC / str(pid) / "maps").read_text().splitlines():
        place, rights, *_, name = line.split()
        if rights.startswith("r") and name not in {"[vvar]", "[vvar_vclock]", "[vsyscall]"}:
            start, end = place.split("-")
            yield int(start, 16), int(end, 16)


def _chunks(descriptor: int, start: int, end: int) -> Iterator[bytes]:
    """Read in pieces that overlap, so that no word is cut in two."""
    overlap = 4096
    while start < end:
        chunk = os.pread(descriptor, min(_CHUNK, end - start), start)
        if not chunk:
            return
        yield chunk
        start += max(len(chunk) - overlap, 1) if start + len(chunk) < end else len(chunk)
