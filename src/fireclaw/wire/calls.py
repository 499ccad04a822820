"""Calls: the JSON line that begins a stream, and the JSON line that answers one.

The host calls the guest with ``exec``, ``read``, ``write``, ``identity``, ``info`` and ``shutdown``:

=========  ==========================================================  ===========================================
call       arguments                                                   answer
=========  ==========================================================  ===========================================
exec       argv, env, cwd, user ("", "name", "uid" or "uid:gid"),      frames, see ``fireclaw.wire.frames``
           confined (no_new_privs, empty bounding set), stdin
read       path, limit (bytes)                                         ``{"size": n}``, then the file's bytes
write      path, mode, user; then the file's bytes until FIN           ``{"size": n}``
identity   hostname, machine_id, entropy (base64), time (seconds),     ``{}``
           magic (hexadecimal; see ``fireclaw.wire.hello``)
info                                                                   ``{"uptime", "memory", "boot", ...}``
shutdown                                                               ``{}``, then the machine ends
=========  ==========================================================  ===========================================

An answer ``{"error": text, "errno": n}`` stands for any of them when the call failed.
"""

from __future__ import annotations

import json
from typing import Any

MAX_LINE = 1 << 20  # argv and env of one command; Linux itself stops at 2 MiB


class CallError(ValueError):
    """The line is not a call or an answer."""


def pack_line(value: dict[str, Any]) -> bytes:
    """Build the line, newline included."""
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


class LineReader:
    """Collects the first line of a stream.

    Attributes:
        rest: the bytes after the line, once it is complete.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.rest = b""

    def feed(self, data: bytes | memoryview) -> dict[str, Any] | None:
        """Return the line's object once it is complete.

        Raises:
            CallError: the line is longer than MAX_LINE or is not a JSON object.
        """
        searched = len(self._buffer)  # or a line that comes byte by byte would cost the square of its length
        self._buffer += data
        end = self._buffer.find(b"\n", searched)
        if end < 0 and len(self._buffer) <= MAX_LINE:
            return None
        if end < 0 or end > MAX_LINE:
            raise CallError(f"a line of over {MAX_LINE} bytes")
        self.rest = bytes(self._buffer[end + 1 :])
        try:
            value = json.loads(self._buffer[:end])
        except (ValueError, RecursionError) as error:  # the latter for a million opening brackets
            raise CallError(f"not JSON: {error}") from None
        if not isinstance(value, dict):
            raise CallError("not a JSON object")
        return value
