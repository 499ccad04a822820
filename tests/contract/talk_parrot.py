"""A model server in a few lines, for where no llama.cpp is to be had: it runs what it is asked to, and repeats it.

It speaks as much of OpenAI's chat API as Fireclaw uses. A question with a command between backquotes is answered by a
call of ``run_command``, and the result of that by "it said " and the result.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

NAME = "parrot"


class Parrot:
    """The server.

    ::

        with Parrot() as parrot:
            ...  # parrot.base_url

    Attributes:
        base_url: what ``model.base_url`` is set to.
    """

    def __init__(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name=NAME)
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    def do_GET(self) -> None:
        """The list of models."""
        models = {"object": "list", "data": [{"id": NAME, "object": "model", "created": 0, "owned_by": "us"}]}
        self._answer("application/json", json.dumps(models))

    def do_POST(self) -> None:
        """A reply, streamed in one piece."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        choice = {"index": 0, "delta": {"role": "assistant", **_reply(request["messages"])}, "finish_reason": "stop"}
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": NAME, "choices": [choice]}
        self._answer("text/event-stream", f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")

    def _answer(self, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        """Nobody reads it."""


def _reply(messages: list[Mapping[str, Any]]) -> dict[str, object]:
    """What the model says to a conversation."""
    if messages[-1]["role"] == "tool":
        return {"content": f"it said {messages[-1]['content']}"}
    command = re.search(r"`(.+?)`", str(messages[-1]["content"]))
    if command is None:
        return {"content": "I only know how to run a command"}
    function = {"name": "run_command", "arguments": json.dumps({"command": command[1]})}
    return {"content": "", "tool_calls": [{"index": 0, "id": "call1", "type": "function", "function": function}]}
