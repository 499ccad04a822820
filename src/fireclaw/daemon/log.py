"""The daemon's log: one bounded file, 0600, that also takes what lands on stdout and stderr."""

from __future__ import annotations

import logging
import os
import sys
from io import FileIO, TextIOWrapper
from logging.handlers import RotatingFileHandler
from typing import TYPE_CHECKING, Final

from fireclaw.errors import SetupError

if TYPE_CHECKING:
    from pathlib import Path

_MAX_BYTES: Final = 4 << 20
_FORMAT: Final = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to_file(path: Path) -> None:
    """Send the log, stdout and stderr to ``path``; the file before it is kept as ``path.1``, older ones go.

    Raises:
        SetupError: it cannot be written.
    """
    try:
        handler = _StdioFileHandler(path, maxBytes=_MAX_BYTES, backupCount=1, encoding="utf-8")
        if path.stat().st_size:
            handler.doRollover()
    except OSError as error:
        raise SetupError(f"cannot write the log {path}: {error.strerror}", hint="run 'fireclaw doctor'") from error
    _set_up(handler)


def log_to_stderr() -> None:
    """Send the log to stderr, for a daemon that runs in the foreground."""
    _set_up(logging.StreamHandler(sys.stderr))


def _set_up(handler: logging.Handler) -> None:
    handler.setFormatter(logging.Formatter(_FORMAT))
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    # The model's client logs each request; the ledger has it with all that matters.
    logging.getLogger("httpx2").setLevel(logging.WARNING)


class _StdioFileHandler(RotatingFileHandler):
    """A rotating file that descriptors 1 and 2 follow, so that no child or crash writes to a file rotated away."""

    def _open(self) -> TextIOWrapper:
        # The mode is given at creation: a log that is readable for a moment is readable.
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        return TextIOWrapper(FileIO(descriptor, "ab"), encoding=self.encoding)
