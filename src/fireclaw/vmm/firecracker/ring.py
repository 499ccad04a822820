"""The last bytes of what a process writes to a FIFO: bounded, whoever writes however much."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_PIECE: Final = 16 * 1024


class Ring:
    """Reads a FIFO as the event loop finds time, and keeps the end of it.

    Args:
        fd: our end, non-blocking; owned.
        size: how many bytes are kept.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        self._bytes = b""
        self._words: Sequence[bytes] = ()
        self._on_word: Callable[[], None] = lambda: None
        self._open = True
        try:
            asyncio.get_running_loop().add_reader(fd, self._ready)
        except OSError:  # no FIFO but a file: put there by a VMM that was taken over
            os.close(fd)
            raise

    def watch(self, words: Sequence[bytes], on_word: Callable[[], None]) -> None:
        """Call back when one of the words comes (again)."""
        self._words = words
        self._on_word = on_word

    def content(self) -> bytes:
        """What is kept, after a look for more."""
        if self._open:
            self._read()
        return self._bytes

    def close(self) -> None:
        """Take what is left and give the FIFO back."""
        if self._open:
            while self._read():
                pass
            self._end()

    def _ready(self) -> None:
        """Take a piece. A FIFO that is ready and empty has lost its last writer, and would be ready for ever."""
        if self._read() == b"":
            asyncio.get_running_loop().remove_reader(self._fd)

    def _read(self) -> bytes | None:
        """Take a piece: nothing at the end of the file, None where there is none for now."""
        try:
            piece = os.read(self._fd, _PIECE)
        except BlockingIOError:
            return None
        if not piece:
            return piece
        seam = max(map(len, self._words), default=1) - 1
        new = self._bytes[max(0, len(self._bytes) - seam) :] + piece
        self._bytes = (self._bytes + piece)[-self._size :]
        if any(word in new for word in self._words):
            self._on_word()
        return piece

    def _end(self) -> None:
        self._open = False
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
