"""The programs under test, as ``--firecracker`` gives them."""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fireclaw.errors import SetupError

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("firecracker", "jailer")

_ELF = b"\x7fELF\x02\x01"
# elf(5): a note of 16 bytes, type 1 (NT_GNU_ABI_TAG), owner GNU, for Linux. glibc's start code has it, linked
# statically or not; musl's has not.
_GNU_TAG = struct.pack("<III4sI", 4, 16, 1, b"GNU", 0)
_GNU = "built for gnu, for which upstream has no seccomp filter: it runs without one"


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        name: of its file.
        sha256: of its file, in hex.
        note: what a reader of the results must know about it; may be empty.
    """

    name: str
    sha256: str
    note: str


def examine(folder: Path) -> list[Program]:
    """Describe the programs in a folder.

    Raises:
        SetupError: one is missing, or is no program for x86-64.
    """
    return [_examine(folder / name) for name in NAMES]


def _examine(path: Path) -> Program:
    if not path.is_file() or not os.access(path, os.X_OK):
        raise SetupError(
            f"the folder {str(path.parent)!r} has no program {path.name!r}",
            hint="unpack a release of Firecracker there, and name the files 'firecracker' and 'jailer'",
        )
    data = path.read_bytes()
    if not data.startswith(_ELF):
        raise SetupError(f"the file {str(path)!r} is not a program for x86-64")
    note = _GNU if path.name == "firecracker" and _GNU_TAG in data else ""
    return Program(path.name, hashlib.sha256(data).hexdigest(), note)
