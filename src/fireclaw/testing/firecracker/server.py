"""The API socket of a fake Firecracker: at most ten connections, one request at a time, and the script's faults."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Final

from fireclaw.testing.firecracker.http import CONNECTIONS, FULL, Inbox, Reply, Request, TransportError
from fireclaw.testing.firecracker.routes import Refusal, parse

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from fireclaw.guest.loop import Loop
    from fireclaw.testing.firecracker.machine import Machine
    from fireclaw.testing.firecracker.routes import Call
    from fireclaw.testing.firecracker.script import Script
    from fireclaw.testing.firecracker.sinks import Journal, Metrics

_BACKLOG: Final = 128
_ANSWER_S: Final = 5.0  # how long an answer may wait for its reader


class Server:
    """Serves the API.

    Args:
        loop: calls back.
        listener: bound; nobody listens on it yet.
        machine: does what is asked.
        script: the faults.
        limit: the longest body.
        journal: of the program.
        metrics: of the program.
        on_fatal: called when the process has to end after an answer.
    """

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        machine: Machine,
        script: Script,
        *,
        limit: int,
        journal: Journal,
        metrics: Metrics,
        on_fatal: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._machine = machine
        self._script = script
        self._version = script.version_tuple
        self._limit = limit
        self._journal = journal
        self._metrics = metrics
        self._on_fatal = on_fatal
        self._inboxes: dict[socket.socket, Inbox] = {}
        self._calls = 0

    def start(self) -> None:
        """Listen."""
        self._listener.listen(_BACKLOG)
        self._loop.add_reader(self._listener.fileno(), self._accept)
        self._journal.info("API server started.", "fc_api")

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        if len(self._inboxes) == CONNECTIONS:
            sock.send(FULL)
            sock.close()
            return
        sock.settimeout(_ANSWER_S)
        self._inboxes[sock] = Inbox(self._limit)
        self._loop.add_reader(sock.fileno(), lambda: self._read(sock))

    def _drop(self, sock: socket.socket) -> None:
        self._loop.remove_reader(sock.fileno())
        del self._inboxes[sock]
        sock.close()

    def _read(self, sock: socket.socket) -> None:
        inbox = self._inboxes[sock]
        try:
            data = sock.recv(inbox.room)
        except OSError:
            data = b""
        if not data:
            self._drop(sock)
            return
        try:
            found = inbox.feed(data)
        except TransportError as error:
            found = [Reply.transport(str(error))]
        for each in found:
            reply = self._answer(each) if isinstance(each, Request) else each
            if reply is None or not _send(sock, reply):
                self._drop(sock)
                return

    def _answer(self, request: Request) -> Reply | None:
        """Answer a request; None where the script has its connection dropped."""
        begun = time.monotonic()
        self._journal.info(f"The API server received a {_describe(request)}.", "fc_api")
        self._calls += 1
        name = f"{request.method} {request.path}"
        if name in self._script.exit_at:
            die(self._script.exit_at[name])
        time.sleep(self._script.delay_s.get(name, 0.0))  # as a big snapshot does, it keeps everything waiting
        if self._calls == self._script.drop_at:
            return None
        if self._calls == self._script.not_json_at:
            return Reply.transport("Invalid request.")
        reply = self._act(request, name)
        self._journal.debug(f"Total previous API call duration: {_us(begun)} us.", "fc_api")
        return reply

    def _act(self, request: Request, name: str) -> Reply:
        try:
            call = self._parse(request, name)
            reply = self._machine.handle(call)
        except Refusal as refusal:
            status = "413 Payload too large" if refusal.status == 413 else "400 Bad Request"
            self._journal.error(f"Received Error. Status code: {status}. Message: {refusal}", "fc_api")
            if refusal.fatal:
                self._loop.call_from_thread(self._on_fatal)
            return Reply.fault(str(refusal), refusal.status)
        text = "200 OK" if reply.status == 200 else "204 No Content"
        self._journal.info(f"The request was executed successfully. Status code: {text}.", "fc_api")
        if call.deprecated:
            self._metrics.count("deprecated_api", "deprecated_http_api_calls")
            self._journal.warn(call.deprecated, "fc_api")
        return Reply(reply.status, reply.body, deprecated=bool(call.deprecated))

    def _parse(self, request: Request, name: str) -> Call:
        if name in self._script.fail:
            raise Refusal(self._script.fail[name])
        return parse(request, self._version)


def die(status: int) -> None:
    """End at once, with a status or (negative) by a signal."""
    if status < 0:
        os.kill(os.getpid(), -status)
        signal.pause()
    os._exit(status)


def _send(sock: socket.socket, reply: Reply) -> bool:
    try:
        sock.sendall(reply.encode())
    except OSError:
        return False
    return True


def _us(begun: float) -> int:
    return int((time.monotonic() - begun) * 1e6)


def _describe(request: Request) -> str:
    method = request.method.capitalize()
    text = f'{method} request on "{request.path}"'
    if request.body is None or request.path in ("/mmds", "/cpu-config"):  # neither belongs into a log
        return text
    body = request.body.decode(errors="replace").replace("\\", "\\\\").replace('"', '\\"')
    return f'{text} with body "{body}"'
