"""The contract of a provider: a client of one model server, with our values in and out, and its errors in our words.

A provider knows how a server spells a chat, and nothing else. Which model, when and how often, is the gateway's and the
backends' to decide (``fireclaw.llm.backends``). The official client library is imported when ``connect`` is called, in
a thread: each of them takes between half a second and three.
"""

from __future__ import annotations

import asyncio
import importlib
import os
from typing import TYPE_CHECKING, Protocol

from fireclaw.errors import ModelError

if TYPE_CHECKING:
    from types import ModuleType

    from fireclaw.llm.chat import ChatRequest, JsonObject
    from fireclaw.llm.repair import RawReply

LIST_TIMEOUT_S = 10.0
_REASON_MAX = 300


class Provider(Protocol):
    """One server. Made by a ``connect`` of its class; ``aclose`` when done."""

    async def complete(
        self, model: str, request: ChatRequest, *, schema: JsonObject | None, timeout_s: float
    ) -> RawReply:
        """Ask once.

        Args:
            model: the model's name on this server.
            request: what to ask.
            schema: a JSON schema that the server holds the reply to; None: the reply is free.
            timeout_s: seconds for all of it.

        Raises:
            ModelError: with the kind that says how it failed.
        """
        ...

    async def names(self) -> list[str]:
        """The names of the models that the server offers, as it orders them.

        Raises:
            ModelError: it does not answer.
        """
        ...

    async def aclose(self) -> None:
        """Close the connections."""
        ...


async def load_library(name: str) -> ModuleType:
    """Import a client library, in a thread."""
    return await asyncio.to_thread(importlib.import_module, name)


def no_answer(where: str, seconds: float) -> ModelError:
    """Build the error for a server that was too slow."""
    return ModelError(f"the model server at {where} did not answer within {seconds:.0f} s", kind="timeout")


def unreachable(where: str, error: BaseException) -> ModelError:
    """Build the error for a connection that failed or broke."""
    return ModelError(
        f"the model server at {where} does not answer: {root_reason(error)}", hint="is it running?", kind="unreachable"
    )


def no_reply(where: str) -> ModelError:
    """Build the error for an answer that has nothing of a reply in it."""
    return ModelError(f"the model server at {where} sent no reply in its answer", kind="bad-output")


def not_json(where: str) -> ModelError:
    """Build the error for an answer that is no JSON."""
    return ModelError(f"the model server at {where} sent what is no JSON", kind="bad-output")


def server_words(message: str, key: str) -> str:
    """A server's own words, on one line; people read them, and some servers quote the key in them."""
    if key:
        message = message.replace(key, "[key]")
    return " ".join(message.split())[:_REASON_MAX]


def root_reason(error: BaseException) -> str:
    """The operating system's reason at the bottom of a chain of exceptions."""
    cause: BaseException | None = error
    reason = str(error)
    while cause:
        if isinstance(cause, OSError) and cause.errno and cause.errno > 0:
            return os.strerror(cause.errno).lower()
        if isinstance(cause, OSError) and cause.strerror:  # a name that does not resolve
            return cause.strerror.lower()
        reason = str(cause) or reason
        cause = cause.__cause__ or cause.__context__
    return reason
