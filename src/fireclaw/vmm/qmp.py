"""QEMU's control protocol (QMP) on a unix socket: commands, their answers, events.

Only what the driver needs: JSON lines both ways, answers matched by id, a file descriptor sent along with
``getfd``. Every command has a time limit, as a QEMU that hangs in its accelerator still accepts connections.
"""

from __future__ import annotations

import asyncio
import json
import socket
from typing import TYPE_CHECKING, Any, Final

from fireclaw.errors import VmmError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_MAX_LINE: Final = 4 << 20  # a QEMU that a guest has taken over must not fill our memory
_READ: Final = 256 * 1024


class Qmp:
    """A connection to one QEMU.

    ::

        qmp = Qmp(folder / "qmp")
        await qmp.execute("qmp_capabilities")
        await qmp.execute("stop")
        qmp.close()

    When QEMU ends the connection, what waits for an answer fails with VmmError, and what watches for an event
    gets None.
    """

    def __init__(self, path: Path) -> None:
        """Connect. QEMU need not be up yet: the socket listens before it starts.

        Raises:
            OSError: nobody listens there.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.setblocking(False)
            self._socket.connect(str(path))
        except BaseException:
            self._socket.close()
            raise
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._last_id = 0
        self._answers: dict[int, tuple[str, asyncio.Future[Any]]] = {}
        self._watches: list[tuple[str, Callable[[dict[str, Any]], bool], asyncio.Future[dict[str, Any] | None]]] = []
        self._open = True
        self._loop.add_reader(self._socket, self._on_readable)

    async def execute(self, command: str, *, timeout_s: float, fd: int | None = None, **arguments: Any) -> Any:
        """Run a command and return its answer.

        Args:
            command: its QMP name.
            timeout_s: how long QEMU may take.
            fd: a file descriptor that travels with it.
            **arguments: its arguments; ``_`` stands for ``-``.

        Raises:
            VmmError: QEMU refused it, ended, or did not answer in time.
        """
        answer = self._send(command, {name.replace("_", "-"): value for name, value in arguments.items()}, fd)
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            raise VmmError(f"QEMU did not answer {command!r} within {timeout_s:g} s") from error

    @property
    def connected(self) -> bool:
        """Whether QEMU has not ended the connection."""
        return self._open

    def watch(
        self, event: str, matches: Callable[[dict[str, Any]], bool] = lambda _: True
    ) -> asyncio.Future[dict[str, Any] | None]:
        """Wait for the next event of that name whose data matches: its data, or None when the connection ends.

        Begin to watch before the command that leads to the event.
        """
        future: asyncio.Future[dict[str, Any] | None] = self._loop.create_future()
        if self._open:
            self._watches.append((event, matches, future))
        else:
            future.set_result(None)
        return future

    def close(self) -> None:
        """End the connection; QEMU listens for the next one."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._socket)
        self._socket.close()
        for command, answer in self._answers.values():
            if not answer.done():
                answer.set_exception(VmmError(f"QEMU ended the connection during {command!r}"))
        for _, _, future in self._watches:
            if not future.done():
                future.set_result(None)
        self._answers.clear()
        self._watches.clear()

    def _send(self, command: str, arguments: dict[str, Any], fd: int | None) -> asyncio.Future[Any]:
        if not self._open:
            raise VmmError(f"QEMU has ended the connection; {command!r} cannot be asked")
        self._last_id += 1
        line = json.dumps({"execute": command, "arguments": arguments, "id": self._last_id}).encode() + b"\n"
        try:
            sent = socket.send_fds(self._socket, [line], [] if fd is None else [fd])
        except OSError as error:  # gone, or it has not read for so long that the socket is full
            raise VmmError(f"QEMU does not take {command!r}: {error.strerror}") from error
        if sent < len(line):
            self.close()
            raise VmmError(f"QEMU does not take {command!r}: it stopped reading")
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._answers[self._last_id] = command, answer
        return answer

    def _on_readable(self) -> None:
        try:
            data = self._socket.recv(_READ)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        sane = len(self._buffer) <= _MAX_LINE and all(self._on_line(line) for line in lines)
        if not data or not sane:
            self.close()

    def _on_line(self, line: bytearray) -> bool:
        """Take one message; false if it is none, as no QEMU in its right mind would send."""
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):  # the latter for very many opening brackets
            return False
        if not isinstance(message, dict):
            return False
        if "event" in message:
            self._on_event(message)
        elif isinstance(number := message.get("id"), int) and number in self._answers:
            command, answer = self._answers.pop(number)
            if answer.done():  # nobody waits any more
                return True
            if "error" in message:
                answer.set_exception(VmmError(f"QEMU refused {command!r}: {_description(message['error'])}"))
            else:
                answer.set_result(message.get("return"))
        return True

    def _on_event(self, message: dict[str, Any]) -> None:
        data = message.get("data")
        data = data if isinstance(data, dict) else {}
        for watch in list(self._watches):
            event, matches, future = watch
            if future.done():
                self._watches.remove(watch)
            elif event == message["event"] and matches(data):
                self._watches.remove(watch)
                future.set_result(data)


def _description(error: object) -> object:
    return error.get("desc") if isinstance(error, dict) else error
