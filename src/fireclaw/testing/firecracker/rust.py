"""An operating system's error in the two ways of Rust programs: for people, and for programmers."""

from __future__ import annotations

import os
from typing import Final

_KINDS: Final = {
    FileNotFoundError: "NotFound",
    FileExistsError: "AlreadyExists",
    PermissionError: "PermissionDenied",
    NotADirectoryError: "NotADirectory",
    IsADirectoryError: "IsADirectory",
}


def say(error: OSError) -> str:
    """For people, e.g. ``No such file or directory (os error 2)``."""
    return f"{os.strerror(error.errno or 0)} (os error {error.errno})"


def debug(error: OSError) -> str:
    """For programmers, as the last line on stderr has it."""
    kind = _KINDS.get(type(error), "Uncategorized")
    return f'Os {{ code: {error.errno}, kind: {kind}, message: "{os.strerror(error.errno or 0)}" }}'
