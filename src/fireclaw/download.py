"""Reading a file from the web, piece by piece. It blocks: the daemon reads in a thread.

What comes is not trusted: callers hold it against a digest that they know.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from http import HTTPStatus
from http.client import HTTPException
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Generator

_CHUNK: Final = 1 << 20
_SILENCE_S: Final = 5.0  # for a connection to open, and between two pieces of data


class DownloadError(Exception):
    """A server did not deliver; the reason, for people."""


class Piece(NamedTuple):
    """Some bytes of a file.

    Attributes:
        offset: where in the file they stand.
        data: the bytes.
        total: the size of the file, as its server tells it; 0 where it does not.
    """

    offset: int
    data: bytes
    total: int


def read_url(url: str, start: int = 0) -> Generator[Piece, None, None]:
    """Yield a file's pieces from ``start`` on, or from 0 where the server cannot; close it to leave early.

    Raises:
        DownloadError: the server cannot be reached, refuses, or falls silent.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "fireclaw"})  # noqa: S310 - the caller's constant
    if start:
        request.add_header("Range", f"bytes={start}-")
    try:
        with urllib.request.urlopen(request, timeout=_SILENCE_S) as response:  # noqa: S310 - the same
            offset = start if response.status == HTTPStatus.PARTIAL_CONTENT else 0
            length = response.headers["Content-Length"]
            total = offset + int(length) if length else 0
            while data := response.read(_CHUNK):
                yield Piece(offset, data, total)
                offset += len(data)
    except (OSError, HTTPException, ValueError) as error:
        raise DownloadError(_reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    return str(error) or type(error).__name__
