"""A conversation: one command of a client's, with frames in both directions on one open HTTP request.

The request's body is a JSON line and then frames; the answer's body is frames (``fireclaw.wire.frames``). The answer
begins before the command does, so a client that saw no answer knows that nothing was started.

The conversation ends the command when its client leaves or the daemon ends, and waits until it is gone.
"""

from __future__ import annotations

import asyncio
import json
import logging
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import Response

from fireclaw.errors import ChannelLostError, FireclawError, InvalidError
from fireclaw.wire.calls import CallError, LineReader
from fireclaw.wire.frames import Kind, pack, pack_json

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from starlette.types import Receive, Scope, Send

    from fireclaw.daemon.bodies import Exit

_HEADERS: Final = [(b"content-type", b"application/octet-stream"), (b"connection", b"close")]

log = logging.getLogger(__name__)


class Conversation:
    """The client's end of a command, as the supervisor sees it.

    ::

        async def run(request, talk):
            while data := await talk.receive():   # in a task of its own
                await guest.write(data)
            await talk.send(frames_of_the_guest)
            return Exit(status)
    """

    def __init__(self, receive: Receive, send: Send, rest: bytes) -> None:
        self._receive = receive
        self._send = send
        self._rest = rest
        self._ended = False

    async def receive(self) -> bytes:
        """Return the next bytes of the client's frames, cut anywhere; none: it sends nothing more.

        Not reading is back-pressure: the client stops sending. Bytes are the client's own, unchecked.
        """
        while not self._rest and not self._ended:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                # Not an end of input that a command could take for a good one: it is cancelled in a moment.
                await asyncio.get_running_loop().create_future()
            self._rest = message.get("body", b"")
            self._ended = not message.get("more_body", False)
        data, self._rest = self._rest, b""
        return data

    async def send(self, frames: bytes) -> None:
        """Send whole frames to the client; waits while it does not take them."""
        # ASGI's send returns at once while the buffers have room, and for ever once the client has left: without a
        # step of the loop in between, a busy command would starve everything, its own end included.
        await asyncio.sleep(0)
        await self._send({"type": "http.response.body", "body": frames, "more_body": True})

    async def note(self, text: str) -> None:
        """Tell the person something; it appears on their stderr."""
        await self.send(pack(Kind.NOTE, text.encode()))


async def read_call(receive: Receive) -> tuple[dict[str, Any], bytes]:
    """Read the JSON line that begins a conversation.

    Returns:
        The line's object, and the bytes that came after it.

    Raises:
        InvalidError: the body does not begin with one, or it is too long.
    """
    reader = LineReader()
    more = True
    while more:
        message = await receive()
        try:
            call = reader.feed(message.get("body", b""))
        except CallError as error:
            raise InvalidError(f"the request's first line is {error}") from error
        if call is not None:
            return call, reader.rest
        more = message.get("more_body", False)
    raise InvalidError("the request ended before its first line")


class ConversationResponse(Response):
    """The answer that holds a conversation to its end.

    Args:
        work: the command; cancelled when the client leaves or the daemon ends.
        rest: the first bytes of the client's frames.
        closing: the daemon ends.
    """

    def __init__(
        self, work: Callable[[Conversation], Coroutine[Any, Any, Exit]], rest: bytes, closing: asyncio.Event
    ) -> None:
        super().__init__()
        self._work = work
        self._rest = rest
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer. The scope's state holds ``gone``, the event that the client left (fireclaw.daemon.server)."""
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        gone: asyncio.Event = scope["state"]["gone"]
        talk = Conversation(receive, send, self._rest)
        task = asyncio.create_task(self._work(talk), name="conversation")
        watchers = [asyncio.create_task(event.wait(), name="conversation watch") for event in (gone, self._closing)]
        try:
            await asyncio.wait([task, *watchers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for other in (task, *watchers):
                other.cancel()
            await asyncio.wait([task, *watchers])
        await send({"type": "http.response.body", "body": _last_frame(task), "more_body": False})


def _last_frame(task: asyncio.Task[Exit]) -> bytes:
    """Say how the command ended."""
    if task.cancelled():
        return _error_frame(ChannelLostError("the daemon ended while the command ran"))
    error = task.exception()
    if error is None:
        end = task.result()
        value = {"status": end.status, "timed_out": end.timed_out, "reason": end.reason}
        return pack_json(Kind.EXIT, value)
    if isinstance(error, FireclawError):
        return _error_frame(error)
    log.error("a command failed inside the daemon", exc_info=error)
    return _error_frame(internal_error(error))


def _error_frame(error: FireclawError) -> bytes:
    return pack(Kind.ERROR, json.dumps(error_object(error)).encode())


def error_object(error: FireclawError) -> dict[str, str]:
    """Turn an error into what the API sends."""
    return {"code": error.code, "message": error.message, "hint": error.hint}


def internal_error(error: BaseException) -> FireclawError:
    """Build what a client is told of a mistake in the daemon; the log has the traceback."""
    found = FireclawError(
        f"a mistake inside the daemon: {type(error).__name__}: {error}", hint="its log has the details"
    )
    found.code = "internal"
    return found
