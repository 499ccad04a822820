"""Frames inside an exec stream, and between the command line and the daemon: kind, length, payload.

A frame is one byte of kind and four bytes of length (big endian), then that many bytes. The same frames travel
on a guest stream and on the daemon's API, so bytes are relayed without being taken apart.
"""

from __future__ import annotations

import json
import struct
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER = struct.Struct(">BI")
# A peer that announces more is broken or hostile. Well under half a stream's window, so that a receiver that grants
# only whole frames back never waits for the rest of one that the window does not let through.
MAX_PAYLOAD = 1 << 16


class Kind(IntEnum):
    """What a frame carries."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    EXIT = 3  # JSON: {"status": int, "timed_out": bool}
    STDIN_CLOSED = 4  # empty
    SIGNAL = 5  # JSON: {"signal": int}
    RESIZE = 6  # JSON: {"rows": int, "cols": int}
    ERROR = 7  # JSON: {"code": str, "message": str, "hint": str}
    NOTE = 8  # UTF-8 text of ours for the person


_KINDS = {kind.value: kind for kind in Kind}  # looking up is several times quicker than Kind(...)


class FrameError(ValueError):
    """The bytes are not frames."""


def pack(kind: int, payload: bytes | memoryview = b"") -> bytes:
    """Build one frame."""
    return HEADER.pack(kind, len(payload)) + payload


def pack_json(kind: int, value: Any) -> bytes:
    """Build one frame with a JSON payload."""
    return pack(kind, json.dumps(value, separators=(",", ":")).encode())


class FrameReader:
    """Cuts a byte stream into frames.

    Memory is bounded by one frame: a header that announces more than MAX_PAYLOAD bytes is refused, and nothing is kept.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[Kind, bytes]]:
        """Yield each frame that ``data`` completes.

        Raises:
            FrameError: an unknown kind or a payload over MAX_PAYLOAD.
        """
        self._buffer += data
        position = 0
        try:
            while len(self._buffer) - position >= HEADER.size:
                kind, length = HEADER.unpack_from(self._buffer, position)
                if kind not in _KINDS or length > MAX_PAYLOAD:
                    position = len(self._buffer)
                    raise FrameError(f"not a frame: kind {kind}, length {length}")
                end = position + HEADER.size + length
                if len(self._buffer) < end:
                    break
                payload = bytes(memoryview(self._buffer)[position + HEADER.size : end])
                position = end
                yield _KINDS[kind], payload
        finally:
            del self._buffer[:position]

    @property
    def pending(self) -> int:
        """Bytes of an unfinished frame."""
        return len(self._buffer)
