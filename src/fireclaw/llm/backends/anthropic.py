"""Anthropic's models, for whoever has put a key into the secrets."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from fireclaw.errors import InvalidError
from fireclaw.llm.backends.base import Backend, Become, ModelInfo
from fireclaw.llm.call import Connection, Force
from fireclaw.llm.catalogue import ToolSupport
from fireclaw.llm.embedded import Endpoint
from fireclaw.llm.keys import read_key
from fireclaw.llm.names import ProviderKind
from fireclaw.llm.providers.anthropic import AnthropicProvider

if TYPE_CHECKING:
    from pathlib import Path

    from fireclaw.llm.fetch import OnProgress
    from fireclaw.llm.settings import ModelSettings


class AnthropicBackend(Backend):
    """See ``Backend``."""

    kind: ClassVar[ProviderKind] = ProviderKind.ANTHROPIC

    def __init__(self, settings: ModelSettings, key_file: Path) -> None:
        super().__init__(settings)
        self._key_file = key_file
        self._provider: AnthropicProvider | None = None
        self._endpoint: Endpoint | None = None
        self._lock = asyncio.Lock()

    @property
    def has_key(self) -> bool:
        """Whether there is a file with a key; it may be refused all the same."""
        return self._key_file.exists()

    async def choose(self) -> str:
        """None: the newest may be the dearest."""
        raise InvalidError("which of Anthropic's models?", hint="name it: anthropic:NAME")

    async def prepare(self, model: str, become: Become, on_progress: OnProgress | None) -> None:
        """Only the key is needed."""
        del model, become, on_progress
        read_key(self._key_file)

    async def connect(self, model: str) -> Connection:
        """The way to the server."""
        return Connection(
            await self._connect(),
            kind=self.kind,
            where=self._settings.anthropic_url,
            model=model,
            tools=ToolSupport.NATIVE,
            force=Force.NO,
            timeout_s=self._settings.timeout_s,
        )

    async def models(self) -> list[ModelInfo]:
        """What the key may use; nothing without a key."""
        if not self.has_key:
            return []
        names = await (await self._connect()).names()
        tools = ToolSupport.NATIVE.words
        where = self._settings.anthropic_url
        return [ModelInfo(self.full_name(name), self.kind, where, running=True, tools=tools) for name in names]

    async def aclose(self) -> None:
        """Close the connections."""
        provider, self._provider = self._provider, None
        if provider:
            await provider.aclose()

    async def _connect(self) -> AnthropicProvider:
        async with self._lock:
            endpoint = Endpoint(self._settings.anthropic_url, read_key(self._key_file))
            if self._provider is None or endpoint != self._endpoint:
                await self.aclose()
                self._provider = await AnthropicProvider.connect(endpoint)
                self._endpoint = endpoint
            return self._provider
