"""A configured OpenAI-compatible server: somebody else's, so that nothing is started, and its key is read anew."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from fireclaw.errors import ModelError
from fireclaw.llm.backends.base import Backend, Become, ModelInfo
from fireclaw.llm.call import Connection, Force
from fireclaw.llm.catalogue import ToolSupport
from fireclaw.llm.embedded import Endpoint
from fireclaw.llm.keys import read_key
from fireclaw.llm.names import ProviderKind
from fireclaw.llm.providers.openai import OpenAIProvider

if TYPE_CHECKING:
    from fireclaw.llm.fetch import OnProgress
    from fireclaw.llm.settings import ModelSettings


class OpenAIBackend(Backend):
    """See ``Backend``."""

    kind: ClassVar[ProviderKind] = ProviderKind.OPENAI

    def __init__(self, settings: ModelSettings, base_url: str) -> None:
        super().__init__(settings)
        self._base_url = base_url
        self._provider: OpenAIProvider | None = None
        self._endpoint: Endpoint | None = None
        self._lock = asyncio.Lock()

    async def choose(self) -> str:
        """The first that the server offers."""
        provider = await self._connect()
        if not (names := await provider.names()):
            raise ModelError(f"the model server at {self._base_url} offers no model", kind="refused")
        return names[0]

    async def prepare(self, model: str, become: Become, on_progress: OnProgress | None) -> None:
        """Nothing is to be done: the server loads what it is asked for, and refuses what it does not have."""

    async def connect(self, model: str) -> Connection:
        """The way to the server."""
        return Connection(
            await self._connect(),
            kind=self.kind,
            where=self._base_url,
            model=model,
            tools=ToolSupport.NATIVE,
            force=Force.NO,  # what others than llama.cpp make of a schema is unknown
            timeout_s=self._settings.timeout_s,
        )

    async def models(self) -> list[ModelInfo]:
        """What the server offers; it does not tell what they can do."""
        names = await (await self._connect()).names()
        return [ModelInfo(self.full_name(name), self.kind, self._base_url, running=True) for name in names]

    async def aclose(self) -> None:
        """Close the connections."""
        provider, self._provider = self._provider, None
        if provider:
            await provider.aclose()

    async def _connect(self) -> OpenAIProvider:
        async with self._lock:
            path = self._settings.api_key_file
            endpoint = Endpoint(self._base_url, read_key(path) if path else "")
            if self._provider is None or endpoint != self._endpoint:
                await self.aclose()
                self._provider = await OpenAIProvider.connect(endpoint, local=False)
                self._endpoint = endpoint
            return self._provider
