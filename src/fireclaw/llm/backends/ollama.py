"""An Ollama that runs on this host, or where OLLAMA_HOST says."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar, Final
from urllib.parse import urlsplit

from fireclaw.errors import FireclawError, ModelError
from fireclaw.llm.backends.base import Backend, Become, ModelInfo, State
from fireclaw.llm.call import Connection, Force
from fireclaw.llm.catalogue import ToolSupport, find_seed, seeds
from fireclaw.llm.names import ProviderKind, is_cloud
from fireclaw.llm.prices import is_private
from fireclaw.llm.probe import answers
from fireclaw.llm.providers.ollama import Abilities, OllamaProvider

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from fireclaw.llm.fetch import OnProgress
    from fireclaw.llm.providers.ollama import InstalledModel
    from fireclaw.llm.settings import ModelSettings

_PORT: Final = 11434
_PORTS: Final = {"http": 80, "https": 443}
_PROBE_S: Final = 2.0
_ANY: Final = ("0.0.0.0", "::")  # noqa: S104 - what a server binds; a client must turn to the loopback


def find_address(environ: Mapping[str, str]) -> str:
    """Where an Ollama may run: OLLAMA_HOST as Ollama's own programs read it, else its usual port.

    Args:
        environ: the environment.
    """
    text = environ.get("OLLAMA_HOST", "").strip().strip("\"'")
    scheme, found, rest = text.rpartition("://")
    port = _PORTS.get(scheme, _PORT) if found else _PORT
    scheme = scheme if found else "http"
    parts = urlsplit(f"{scheme}://{rest}")
    host = parts.hostname or "127.0.0.1"
    try:
        port = parts.port or port
    except ValueError:  # no number, or too large a one; Ollama takes its usual one
        port = _PORT
    host = "127.0.0.1" if host in _ANY else host
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class OllamaBackend(Backend):
    """See ``Backend``."""

    kind: ClassVar[ProviderKind] = ProviderKind.OLLAMA

    def __init__(self, settings: ModelSettings, address: str) -> None:
        super().__init__(settings)
        self.address = address
        self._provider: OllamaProvider | None = None
        self._abilities: dict[str, Abilities] = {}
        self._lock = asyncio.Lock()

    async def is_running(self) -> bool:
        """Whether one answers there."""
        return await answers(self.address, "/api/version", seconds=_PROBE_S)

    async def choose(self) -> str:
        """The first of our seeds that it has, else its newest model with tools, else its newest that talks.

        Never one that runs elsewhere: who wants that must say so.
        """
        found = await (await self._connect()).installed()
        installed = [model.name for model in found if not is_cloud(model.name)]
        for seed in seeds():
            if name := next((name for name in installed if name.partition(":")[0] == seed.name), None):
                return name
        can = await self._learn(installed)
        talking = [name for name in installed if can[name].chat]
        if not talking:
            raise ModelError(
                f"the Ollama at {self.address} has no model", hint="fireclaw models pull qwen2.5", kind="refused"
            )
        return next((name for name in talking if can[name].tools), talking[0])

    async def find(self, name: str) -> str | None:
        """The installed model that a name means: the tag may be left out. None: there is none."""
        installed = [model.name for model in await (await self._connect()).installed()]
        wanted = (name, f"{name}:latest")
        found = next((each for each in installed if each in wanted), None)
        return found or next((each for each in installed if each.partition(":")[0] == name), None)

    async def prepare(self, model: str, become: Become, on_progress: OnProgress | None) -> None:
        """Learn what the model can do."""
        del on_progress
        become(State.LOADING, f"asking Ollama about {model}")
        can = await (await self._connect()).abilities(model)
        if not can.chat:
            raise ModelError(f"the model {model!r} is not made for talking", kind="refused")
        self._abilities[model] = can

    async def connect(self, model: str) -> Connection:
        """The way to the server."""
        return Connection(
            await self._connect(),
            kind=self.kind,
            where=self.address,
            model=model,
            tools=_tools(model, self._abilities[model]),
            force=Force.WITHOUT_TOOLS,
            timeout_s=self._settings.timeout_s,
        )

    async def models(self) -> list[ModelInfo]:
        """What it has, then what it could fetch of the seeds."""
        provider = await self._connect()
        installed = await provider.installed()
        running = await provider.running()
        can = await self._learn([model.name for model in installed])
        rows = [self._row(model, can[model.name], is_running=model.name in running) for model in installed]
        return rows + self._missing([model.name for model in installed])

    async def pull(self, model: str, on_progress: OnProgress) -> None:
        """Have it fetch a model.

        Raises:
            ModelError: it cannot, and why.
        """
        await (await self._connect()).pull(model, on_progress)

    async def aclose(self) -> None:
        """Close the connections."""
        provider, self._provider = self._provider, None
        if provider:
            await provider.aclose()

    async def _connect(self) -> OllamaProvider:
        async with self._lock:
            if self._provider is None:
                self._provider = await OllamaProvider.connect(
                    self.address, context=self._settings.context, local=is_private(self.address)
                )
            return self._provider

    async def _learn(self, names: Sequence[str]) -> dict[str, Abilities]:
        provider = await self._connect()
        found = await asyncio.gather(*(provider.abilities(name) for name in names), return_exceptions=True)
        for name, can in zip(names, found, strict=True):
            if isinstance(can, BaseException) and not isinstance(can, FireclawError):
                raise can
            if isinstance(can, Abilities):
                self._abilities[name] = can
            else:  # one that is damaged, or was removed just now, must not hide the others
                self._abilities.setdefault(name, Abilities(chat=False, tools=False, context=0))
        return self._abilities

    def _row(self, model: InstalledModel, can: Abilities, *, is_running: bool) -> ModelInfo:
        return ModelInfo(
            self.full_name(model.name),
            self.kind,
            self.address,
            running=is_running,
            tools=_tools(model.name, can).words,
            context=can.context,
            size=model.size,
            note=_note(model.name, can),
        )

    def _missing(self, installed: Sequence[str]) -> list[ModelInfo]:
        families = {name.partition(":")[0] for name in installed}
        return [
            ModelInfo(
                self.full_name(seed.name),
                self.kind,
                self.address,
                installed=False,
                tools=seed.tools.words,
                context=seed.context,
                note=seed.note,
            )
            for seed in seeds()
            if seed.name not in families
        ]


def _tools(model: str, can: Abilities) -> ToolSupport:
    """How a model uses tools: Ollama knows its template, the seed knows what the model makes of it."""
    if not can.chat:
        return ToolSupport.NONE
    if not can.tools:
        return ToolSupport.SCHEMA
    seed = find_seed(model)
    return seed.tools if seed else ToolSupport.NATIVE


def _note(model: str, can: Abilities) -> str:
    if is_cloud(model):
        return "runs on the machines of Ollama's makers"
    if not can.chat:
        return "not made for talking"
    seed = find_seed(model)
    return seed.note if seed else ""
