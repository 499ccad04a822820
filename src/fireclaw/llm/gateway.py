"""The one way to models: it finds the server, queues the calls, has replies repaired, and meters and records each call.

::

    gateway = Gateway(settings, ledger_record, models=home.models, start=gate.start, spending=Spending(db, host))
    await gateway.start(on_progress)      fetches and loads the embedded model, or finds the configured server
    reply = await gateway.chat(request)   waits its turn; raises ModelError in words for people
    await gateway.aclose()

A request may name its model (``ollama:qwen2.5``); one without a name goes to the *default*: what the settings say,
else the best of a running Ollama, else the embedded one. A model that failed heals itself: the next call starts it
anew, and a call whose server died under it is made once more.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from fireclaw.errors import FireclawError, InvalidError, ModelError, NotFoundError
from fireclaw.llm.backends.anthropic import AnthropicBackend
from fireclaw.llm.backends.base import State
from fireclaw.llm.backends.embedded import EmbeddedBackend
from fireclaw.llm.backends.ollama import OllamaBackend
from fireclaw.llm.backends.openai import OpenAIBackend
from fireclaw.llm.call import Call, Record
from fireclaw.llm.embedded import start_process
from fireclaw.llm.fetch import pip_download
from fireclaw.llm.meter import Meter
from fireclaw.llm.models import ModelList, list_models
from fireclaw.llm.names import ProviderKind, is_cloud, parse
from fireclaw.llm.prices import Prices
from fireclaw.llm.route import Route

if TYPE_CHECKING:
    from pathlib import Path

    from fireclaw.llm.backends.base import Backend
    from fireclaw.llm.call import Connection
    from fireclaw.llm.catalogue import Entry
    from fireclaw.llm.chat import ChatReply, ChatRequest
    from fireclaw.llm.embedded import StartProcess
    from fireclaw.llm.fetch import DownloadPackage, OnProgress
    from fireclaw.llm.settings import ModelSettings
    from fireclaw.store.spending import Spending

__all__ = ["Gateway", "State"]

_PATIENCE_S: Final = 30.0  # how long a call waits for a model that is still being fetched or loaded


class Gateway:
    """The way to the models that serve the agents of this daemon.

    Args:
        settings: which models.
        record: the ledger.
        models: the folder of model files.
        start: starts an embedded server's process.
        download: how packages of a mirror are downloaded.
        entry: the model for the embedded server, instead of one of the catalogue.
        spending: where calls are written down; None: nowhere, and budgets are not kept.
        prices: what models cost; None: the public list.
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
        spending: Spending | None = None,
        prices: Prices | None = None,
    ) -> None:
        self._settings = settings
        self._record = record
        self._meter = Meter(spending, prices or Prices())
        self._embedded = EmbeddedBackend(settings, models=models, start=start, download=download, entry=entry)
        self._openai = OpenAIBackend(settings, settings.base_url) if settings.base_url else None
        self._ollama = OllamaBackend(settings, settings.ollama) if settings.ollama else None
        key_file = settings.anthropic_key_file
        self._anthropic = AnthropicBackend(settings, key_file) if key_file else None
        self._routes: dict[tuple[ProviderKind, str], Route] = {}
        self._default: Route | None = None
        self._choosing = asyncio.Lock()
        self._notice = ""
        self._available: list[str] = []

    # How the default is

    @property
    def state(self) -> State:
        """How the default model is."""
        return self._default.state if self._default else State.OFF

    @property
    def detail(self) -> str:
        """More on the state, one line for people: how far the fetch is, why it failed."""
        return self._default.detail if self._default else ""

    @property
    def provider(self) -> str:
        """What kind of server the default model runs on."""
        if self._default:
            return self._default.backend.kind.label
        return (ProviderKind.OPENAI if self._openai else ProviderKind.EMBEDDED).label

    @property
    def model(self) -> str:
        """The default model's name; empty as long as it is not known."""
        return self._default.model if self._default else self._settings.model or ""

    @property
    def running(self) -> int:
        """Calls that servers are working on."""
        return sum(backend.queue.running for backend in self._backends())

    @property
    def waiting(self) -> int:
        """Calls that wait for their turn."""
        return sum(backend.queue.waiting for backend in self._backends())

    def position(self, agent: str) -> int:
        """The place in the line of an agent's call: 1 is the next one; 0: none of its calls waits."""
        return max(backend.queue.position(agent) for backend in self._backends())

    def take_notice(self) -> str:
        """What people should be told about how the default was chosen; each notice is given once, empty: nothing."""
        notice, self._notice = self._notice, ""
        return notice

    # Beginning and end

    async def start(self, on_progress: OnProgress | None = None) -> None:
        """Make the default model ready; returns when it is, or when it failed (``state`` and ``detail`` tell).

        Args:
            on_progress: told how far a fetch is, on the event loop.

        Raises:
            InvalidError: the settings name a kind of server that is not configured.
        """
        route = await self._default_route()
        await asyncio.shield(route.begin(on_progress))
        await self.list_models()

    async def fetch(self, on_progress: OnProgress | None = None) -> None:
        """Have the default model's file, without loading it; nothing to do where it is not the embedded one.

        Raises:
            FireclawError: it cannot be fetched.
        """
        route = await self._default_route()
        if route.backend is self._embedded:
            await self._fetch(route.model or await self._embedded.choose(), on_progress)

    async def aclose(self) -> None:
        """Stop everything: a fetch under way (its pieces stay), the embedded servers, the connections."""
        routes, self._routes, self._default = self._routes, {}, None
        for route in routes.values():
            await route.aclose()
        for backend in self._backends():
            await backend.aclose()

    # Calls

    async def chat(self, request: ChatRequest) -> ChatReply:
        """Ask the model, when it is this agent's turn.

        Returns:
            A reply that can be used: some text, or calls of tools.

        Raises:
            BudgetError: the agent's budget is spent; nothing was asked.
            ModelError: with the kind and a reason for people.
        """
        route = await self._route(request.model)
        await route.wait_ready(_PATIENCE_S)
        async with route.backend.queue.place(request.agent):
            return await route.ask(lambda server: self._call(server, request).run())

    async def warm(self, request: ChatRequest) -> None:
        """Have a model of this host know how an agent's prompts begin, before the first question comes.

        Nothing is asked of a server where it could cost money. A failure is of no matter: the first question meets it
        again, and tells.
        """
        with suppress(ModelError):
            route = await self._route(request.model)
            if route.backend.kind not in (ProviderKind.EMBEDDED, ProviderKind.OLLAMA) or is_cloud(route.model):
                return
            await route.wait_ready(_PATIENCE_S)
            async with route.backend.queue.place(request.agent):
                await self._call(await route.backend.connect(route.model), request).warm()

    def _call(self, server: Connection, request: ChatRequest) -> Call:
        return Call(server, request, self._record, self._meter)

    async def _route(self, name: str) -> Route:
        try:
            return await self._resolve(name) if name else await self._default_route()
        except ModelError:
            raise
        except FireclawError as error:
            raise ModelError(error.message, hint=error.hint, kind="refused") from error

    # Models

    async def check(self, name: str) -> str:
        """Find the model that a name means.

        Returns:
            Its whole name, with the provider.

        Raises:
            NotFoundError: there is none; the nearest name is offered.
            FireclawError: it cannot be had, and why.
        """
        return (await self._resolve(name)).name

    def available(self) -> list[str]:
        """The whole names of the models that can be asked at once, the preferred places first.

        As they were when the gateway started, or when they were last listed or fetched.
        """
        return list(self._available)

    async def list_models(self) -> ModelList:
        """All models there are, and those that could be fetched, with what went wrong on the way."""
        ollama = self._ollama
        backends = [each for each in self._backends() if each is not ollama]
        if ollama is not None and await ollama.is_running():
            backends.insert(0, ollama)
        default = self._default.name if self._default and self._default.model else ""
        found = await list_models(backends, default)
        self._available = [model.name for model in found.models if model.installed]
        return found

    async def pull(self, name: str, on_progress: OnProgress) -> str:
        """Fetch a model: one of the embedded catalogue, or whatever a running Ollama can find.

        Args:
            name: with or without its provider.
            on_progress: told how far it is.

        Returns:
            Its whole name.

        Raises:
            NotFoundError: nobody here can fetch it.
            FireclawError: it cannot be fetched, and why.
        """
        full_name = await self._pull(name, on_progress)
        await self.list_models()
        return full_name

    async def _pull(self, name: str, on_progress: OnProgress) -> str:
        wanted = parse(name)
        if wanted.provider in (ProviderKind.OPENAI, ProviderKind.ANTHROPIC):
            raise InvalidError(f"the model {name!r} is not fetched", hint="it runs on its provider's machines")
        if wanted.provider is ProviderKind.EMBEDDED or (wanted.provider is None and self._is_embedded(wanted.model)):
            model = wanted.model or await self._embedded.choose()
            await self._fetch(model, on_progress)
            return self._embedded.full_name(model)
        ollama = self._ollama
        if ollama is not None and wanted.model and await ollama.is_running():
            await ollama.pull(wanted.model, on_progress)
            return ollama.full_name(wanted.model)
        if wanted.provider is ProviderKind.OLLAMA:
            raise self._no_ollama()
        error = NotFoundError.named("model", name, (entry.name for entry in self._embedded.entries()))
        raise NotFoundError(error.message, hint=f"{error.hint}; others need a running Ollama")

    async def _fetch(self, model: str, on_progress: OnProgress | None) -> None:
        await self._embedded.fetch(self._embedded.find(model), lambda *_: None, on_progress)

    # Which model a name means

    async def _default_route(self) -> Route:
        async with self._choosing:
            if self._default is None:
                self._default = await self._choose_default()
            return self._default

    async def _choose_default(self) -> Route:
        wanted = parse(self._settings.model or "")
        if wanted.provider is None and self._openai:
            return self._way(self._openai, wanted.model)
        if wanted.model:
            with suppress(FireclawError):
                return await self._resolve(str(wanted))
        if wanted.provider is not None or wanted.model:  # it says itself what is wrong, each time that it is asked
            return self._way(self._backend(wanted.provider or ProviderKind.EMBEDDED), wanted.model)
        return await self._prefer_ollama() or self._way(self._embedded, "")

    async def _prefer_ollama(self) -> Route | None:
        ollama = self._ollama
        if ollama is None or not await ollama.is_running():
            return None
        try:
            model = await ollama.choose()
        except FireclawError as error:
            self._notice = f"{error}; the embedded model serves"
            return None
        self._notice = f'found an Ollama at {ollama.address}: its {model} serves (model.name = "embedded" prevents it)'
        return self._way(ollama, model)

    async def _resolve(self, name: str) -> Route:
        """The way to the model that a name means.

        Raises:
            NotFoundError: there is none.
            FireclawError: it cannot be had, and why.
        """
        wanted = parse(name)
        if wanted.provider is None:
            return await self._search(name)
        if known := self._routes.get((wanted.provider, wanted.model)):
            return known
        model = wanted.model
        if wanted.provider is ProviderKind.OLLAMA:
            model = await self._ollamas(wanted.model)
        elif wanted.provider is ProviderKind.EMBEDDED and wanted.model:
            model = self._embedded.find(wanted.model).name
        elif wanted.provider is ProviderKind.ANTHROPIC and not (self._anthropic and self._anthropic.has_key):
            where = self._settings.anthropic_key_file
            hint = f"put it there: (umask 077; cat > {where}), paste, Ctrl-D" if where else ""
            raise NotFoundError(f"there is no key for {name!r}", hint=hint)
        return self._way(self._backend(wanted.provider), model)

    async def _search(self, name: str) -> Route:
        """The way to a model that was named without its provider."""
        ollama = self._ollama
        if ollama is not None and await ollama.is_running() and (found := await ollama.find(name)):
            return self._way(ollama, found)
        if self._is_embedded(name):
            return self._way(self._embedded, name)
        if self._openai and name in await self._offered(self._openai):
            return self._way(self._openai, name)
        raise await self._unknown(name)

    async def _ollamas(self, name: str) -> str:
        """The installed model of Ollama's that a name means; an empty name means its best."""
        ollama = self._ollama
        if ollama is None or not await ollama.is_running():
            raise self._no_ollama()
        if not name:
            return await ollama.choose()
        if found := await ollama.find(name):
            return found
        hint = f"fetch it: fireclaw models pull ollama:{name}"
        raise NotFoundError(f"the Ollama at {ollama.address} has no model {name!r}", hint=hint)

    def _way(self, backend: Backend, model: str) -> Route:
        """The one route to a model; without a name, to the backend's best."""
        return self._routes.setdefault((backend.kind, model), Route(backend, model))

    def _backend(self, kind: ProviderKind) -> Backend:
        found = next((backend for backend in self._backends() if backend.kind is kind), None)
        if found is None:
            raise InvalidError(f"no server of the kind {kind.value!r} is configured", hint="see docs/models.md")
        return found

    def _backends(self) -> list[Backend]:
        return [each for each in (self._openai, self._embedded, self._ollama, self._anthropic) if each]

    def _is_embedded(self, name: str) -> bool:
        return any(entry.name == name for entry in self._embedded.entries())

    async def _offered(self, backend: OpenAIBackend) -> list[str]:
        return [parse(model.name).model for model in await backend.models()]

    async def _unknown(self, name: str) -> NotFoundError:
        if name.startswith("claude"):
            return NotFoundError(f"no model named {name!r}", hint=f"did you mean 'anthropic:{name}'?")
        found = await self.list_models()
        there = (model for model in found.models if model.installed or model.provider is ProviderKind.EMBEDDED)
        return NotFoundError.named("model", name, {parse(model.name).model for model in there})

    def _no_ollama(self) -> ModelError:
        where = f"at {self._settings.ollama}" if self._settings.ollama else "here"
        return ModelError(f"no Ollama answers {where}", hint="start it: ollama serve", kind="unreachable")
