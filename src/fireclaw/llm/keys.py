"""Keys of model servers: each in a file of its own that nobody else may read."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from fireclaw.errors import ConfigError, SetupError

if TYPE_CHECKING:
    from pathlib import Path

_SIZE_MAX = 4096
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def read_key(path: Path) -> str:
    """Read the key in a file.

    Raises:
        SetupError: there is no such file, or others may read it.
        ConfigError: it cannot be read, or holds something that is no key.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            data = file.read(_SIZE_MAX + 1)
    except FileNotFoundError as error:
        raise SetupError(
            f"there is no key in {str(path)!r}", hint=f"put it there: (umask 077; cat > {path}), paste, Ctrl-D"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read the key in {str(path)!r}: {error.strerror}") from error
    if mode & _OTHERS:
        raise SetupError(
            f"the key in {str(path)!r} is refused: its mode {mode:04o} lets others at it", hint=f"chmod 600 {path}"
        )
    key = data.decode("ascii", errors="replace").strip()
    # It goes into a header: a line break in it would begin another one.
    if not key or len(data) > _SIZE_MAX or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"{str(path)!r} must hold a key and nothing else")
    return key
