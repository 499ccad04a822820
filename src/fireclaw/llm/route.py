"""The way to one model: made ready on first need, watched, retried, and said in words while it is not ready."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from fireclaw.errors import FireclawError, ModelError
from fireclaw.llm.backends.base import State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fireclaw.llm.backends.base import Backend
    from fireclaw.llm.call import Connection
    from fireclaw.llm.chat import ChatReply
    from fireclaw.llm.fetch import OnProgress


class Route:
    """The way to one model of one backend.

    Attributes:
        backend: where the model runs.
        model: its name there; empty as long as the backend has not chosen.
        state: how it is.
        detail: more on the state, one line for people: how far the fetch is, why it failed.
    """

    def __init__(self, backend: Backend, model: str) -> None:
        self.backend = backend
        self.model = model
        self.state = State.OFF
        self.detail = ""
        self._starting: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The model's whole name."""
        return self.backend.full_name(self.model)

    def begin(self, on_progress: OnProgress | None = None) -> asyncio.Task[None]:
        """Begin to make the model ready, or join whoever did; the task ends when it is, or when it failed."""
        if self._starting is None or self._starting.done():
            self._become(State.LOADING, "")
            self._starting = asyncio.create_task(self._make_ready(on_progress), name=f"model {self.model}")
        return self._starting

    async def wait_ready(self, seconds: float) -> None:
        """Wait a little for a model on its way; start a failed one again.

        Raises:
            ModelError: it is not ready, and why.
        """
        if not self._is_ready():
            await asyncio.wait([self.begin()], timeout=seconds)
        if not self._is_ready():
            raise ModelError(f"the model is not ready: {self.detail or self.state}", kind="unreachable")

    async def ask(self, call: Callable[[Connection], Awaitable[ChatReply]]) -> ChatReply:
        """Make a call; once more if the server died under it: it is there again, or was started again, by then.

        Raises:
            ModelError: the call failed.
        """
        try:
            return await self._ask(call)
        except ModelError as error:
            if error.kind != "unreachable":
                raise
        try:
            return await self._ask(call)
        except ModelError as error:
            if error.kind == "unreachable":
                self._become(State.FAILED, str(error))
            raise

    async def aclose(self) -> None:
        """Stop making it ready."""
        if self._starting:
            self._starting.cancel()
            with suppress(asyncio.CancelledError):
                await self._starting
        self._become(State.OFF, "")

    async def _ask(self, call: Callable[[Connection], Awaitable[ChatReply]]) -> ChatReply:
        try:
            connection = await self.backend.connect(self.model)
        except ModelError:
            raise
        except FireclawError as error:  # its key is gone, say
            raise ModelError(error.message, hint=error.hint, kind="refused") from error
        async with self.backend.watched(self.model):
            return await call(connection)

    async def _make_ready(self, on_progress: OnProgress | None) -> None:
        try:
            if not self.model:
                self.model = await self.backend.choose()
            await self.backend.prepare(self.model, self._become, on_progress)
            await self.backend.connect(self.model)
        except FireclawError as error:
            self._become(State.FAILED, str(error))
        else:
            self._become(State.READY, "")

    def _is_ready(self) -> bool:
        return self.state is State.READY

    def _become(self, state: State, detail: str) -> None:
        self.state, self.detail = state, detail
