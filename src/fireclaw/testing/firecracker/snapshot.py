"""The two files of a snapshot: a state file with the original's head and a body of our own, and the guest's memory.

The head (magic, length-prefixed format version) is where the original has it, and so are a checksum at the end and a
size of some 14 kB. What lies between is JSON: the machine's configuration, from which a load builds it again.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any, Final

_MAGIC: Final = 0x0710_1984_8664_0000
_HEAD: Final = struct.Struct("<xQB")
_SIZE: Final = 13_900
_LIMIT: Final = 10_000_000
_CHECKSUM: Final = 8
_PAGE: Final = 4096


class StateError(Exception):
    """A state file that is none, or not of this version; ``debug`` is for the last line on stderr."""

    def __init__(self, text: str, debug: str = "") -> None:
        super().__init__(text)
        self.debug = debug or text


class MemoryFileError(Exception):
    """A memory file that is too short."""


def write_state(path: str, config: dict[str, Any], version: str) -> None:
    """Write a state file, from its beginning.

    Raises:
        OSError: it cannot be written.
    """
    body = json.dumps(config).encode()
    data = _HEAD.pack(_MAGIC, len(version)) + version.encode() + struct.pack("<I", len(body)) + body
    data += bytes(max(0, _SIZE - _CHECKSUM - len(data)))
    with Path(path).open("wb") as file:
        file.write(data + _checksum(data))
        os.fsync(file.fileno())


def read_version(path: str) -> str:
    """The format version that a state file claims.

    Raises:
        OSError: it cannot be read.
        StateError: it is no state file.
    """
    return _decode(_content(path))[0]


def read_state(path: str, version: str) -> dict[str, Any]:
    """Read a state file.

    Raises:
        OSError: it cannot be read.
        StateError: it is truncated, damaged, or of another version.
    """
    data = _content(path)
    found, config = _decode(data)
    if found.partition(".")[0] != version.partition(".")[0]:
        raise StateError(f"Invalid data version: {found}")
    if _checksum(data[:-_CHECKSUM]) != data[-_CHECKSUM:]:
        raise StateError("CRC64 validation failed")
    return config


def write_memory(path: str, mib: int) -> None:
    """Write a memory file of full size: sparse but for its first page, and a file of that size is kept in its place.

    Raises:
        OSError: it cannot be written.
    """
    with Path(path).open("r+b" if Path(path).exists() else "w+b") as file:
        file.truncate(mib << 20)
        file.write(os.urandom(_PAGE))
        os.fsync(file.fileno())


def check_memory(path: str, mib: int) -> None:
    """See that a memory file is there and long enough.

    Raises:
        OSError: it cannot be opened.
        MemoryFileError: it is too short.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
    finally:
        os.close(fd)
    if size < mib << 20:
        raise MemoryFileError("Total sum of memory regions exceeds largest possible file offset")


def _content(path: str) -> bytes:
    with Path(path).open("rb") as file:
        data = file.read(_LIMIT + 1)
    if len(data) > _LIMIT:
        raise StateError(f"Snapshot size exceeds limit of {_LIMIT} bytes")
    if len(data) < _CHECKSUM:
        reason = "File too short to contain CRC"
        raise StateError(f"IO Error: {reason}", f'Io(Custom {{ kind: UnexpectedEof, error: "{reason}" }})')
    return data


def _decode(data: bytes) -> tuple[str, dict[str, Any]]:
    damaged = StateError(
        "An error occurred during bitcode serialization: bitcode error", 'Bitcode(Error("bitcode error"))'
    )
    if len(data) < _SIZE:
        raise damaged
    magic, length = _HEAD.unpack_from(data)
    at = _HEAD.size + length
    (size,) = struct.unpack_from("<I", data, at)
    try:
        config = json.loads(data[at + 4 : at + 4 + size])
    except ValueError:
        raise damaged from None
    if magic != _MAGIC:
        raise StateError(f"Magic value does not match arch: {magic}")
    return data[_HEAD.size : at].decode(errors="replace"), config


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(_CHECKSUM, "little")
