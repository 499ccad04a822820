"""Files of the workload: the read and write calls.

Paths are resolved by the spawner's thread, which lives in the workload's root: what a path means there is what the
image and its commands made of it, symbolic links included.
"""

from __future__ import annotations

import contextlib
import os
import stat
from typing import TYPE_CHECKING, Any

from fireclaw.guest.spawner import UserError, find_account
from fireclaw.wire.calls import pack_line

if TYPE_CHECKING:
    from fireclaw.guest.session import Session
    from fireclaw.wire.mux import Stream

_PIECE = 65536
_ROOM = 4096


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return {"error": f"{where}{error.strerror}", "errno": error.errno or 0}
    if isinstance(error, UserError | ValueError):
        return {"error": str(error)}
    raise error


def _open_regular(path: str) -> tuple[int, int]:
    """Open for reading; return (fd, size). Devices and pipes are refused: they could keep guestd waiting."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise ValueError(f"{path}: not a regular file")
    return fd, status.st_size


class ReadFile:
    """Serves the read call: a line with the size, then at most ``limit`` bytes."""

    def __init__(self, session: Session, stream: Stream, call: dict[str, Any]) -> None:
        self._session = session
        self._stream = stream
        self._fd = -1
        self._left = int(call["limit"])
        path = str(call["path"])
        session.host.spawner(confined=False).do(lambda: _open_regular(path), self._opened)

    def _opened(self, result: tuple[int, int] | Exception) -> None:
        if isinstance(result, Exception):
            self._session.answer(self._stream, _failure(result))
            return
        self._fd, size = result
        if not self._stream.open:
            self.reset()
            return
        self._session.mux.send(self._stream, pack_line({"size": size}))
        self.writable()

    def writable(self) -> None:
        """Send what the window and the port take."""
        while self._fd >= 0 and self._stream.send_window >= _ROOM:
            if self._session.congested:
                self._session.park(self._stream)
                break
            try:
                data = os.read(self._fd, min(_PIECE, self._left, self._stream.send_window))
            except OSError as error:  # it could be opened, like /proc/self/mem; its line is under way already
                self._session.host.log(f"read: {error}")
                self.reset()
                self._session.mux.reset(self._stream)
                break
            if not data:
                self.reset()
                self._session.mux.finish(self._stream)
                break
            self._left -= len(data)
            self._session.mux.send(self._stream, data)
            self._session.flush()
        self._session.flush()

    def data(self, payload: bytes | memoryview) -> None:
        """Nothing is expected; grant it back."""
        self._session.mux.consumed(self._stream, len(payload))

    def finished(self) -> None:
        """The host has said all it will; go on sending."""

    def reset(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class WriteFile:
    """Serves the write call: a new file beside the old one, renamed over it once it is whole."""

    def __init__(self, session: Session, stream: Stream, call: dict[str, Any]) -> None:
        self._session = session
        self._stream = stream
        self._path = str(call["path"])
        self._mode = int(call.get("mode", 0o644))
        self._user = str(call.get("user") or "")
        self._temporary = f"{self._path}.{os.urandom(6).hex()}.part"
        self._fd = -1
        self._size = 0
        self._early: list[bytes] = []  # what came before the file was open
        self._finished = False
        session.host.spawner(confined=False).do(self._open, self._opened)

    def _open(self) -> int:
        account = find_account(self._user)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._temporary, flags, self._mode)
        if account.uid or account.gid:
            os.fchown(fd, account.uid, account.gid)
        os.fchmod(fd, self._mode)
        return fd

    def _opened(self, result: int | Exception) -> None:
        early, self._early = self._early, []
        if isinstance(result, Exception):
            self._session.answer(self._stream, _failure(result))
            # Granted back, or a host that is still sending would never come to read the answer.
            self._session.mux.consumed(self._stream, sum(map(len, early)))
            self._session.flush()
            return
        self._fd = result
        if not self._stream.open:
            self.reset()
            return
        for payload in early:
            self._write(payload)
        if self._finished:
            self._commit()
        self._session.flush()

    def data(self, payload: bytes | memoryview) -> None:
        """Write; before the file is open, keep (the window bounds how much)."""
        if self._fd >= 0:
            self._write(payload)
        elif self._stream.finished:  # it failed and was answered
            self._session.mux.consumed(self._stream, len(payload))
        else:
            self._early.append(bytes(payload))

    def _write(self, payload: bytes | memoryview) -> None:
        size = len(payload)
        view = memoryview(payload)
        try:
            while view and self._fd >= 0:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            self._session.answer(self._stream, _failure(error))
            self.reset()
        self._size += size
        self._session.mux.consumed(self._stream, size)

    def finished(self) -> None:
        """The file is whole."""
        self._finished = True
        if self._fd >= 0:
            self._commit()

    def _commit(self) -> None:
        os.close(self._fd)
        self._fd = -1
        spawner = self._session.host.spawner(confined=False)
        spawner.do(lambda: os.rename(self._temporary, self._path), self._renamed)

    def _renamed(self, result: Exception | None) -> None:
        if result is not None:
            self._session.answer(self._stream, _failure(result))
            self._remove()
        else:
            self._session.answer(self._stream, {"size": self._size})

    def writable(self) -> None:
        """Nothing waits."""

    def reset(self) -> None:
        """Leave nothing half written."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._remove()

    def _remove(self) -> None:
        def unlink() -> None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)

        self._session.host.spawner(confined=False).do(unlink, lambda _: None)
