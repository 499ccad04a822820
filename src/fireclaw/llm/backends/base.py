"""The contract of a backend: a place where models run, how to have one ready there, and who may call it next.

A backend knows which models it has and what they can do, starts and replaces what it must, and hands out connections;
the client that speaks to it is a provider (``fireclaw.llm.providers``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from fireclaw.llm.names import ModelName
from fireclaw.llm.queue import FairQueue

if TYPE_CHECKING:
    from fireclaw.llm.call import Connection
    from fireclaw.llm.fetch import OnProgress
    from fireclaw.llm.names import ProviderKind
    from fireclaw.llm.settings import ModelSettings


class State(StrEnum):
    """How a model is, or the way to it."""

    OFF = "off"
    FETCHING = "fetching"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


Become = Callable[[State, str], None]
"""Told what a model's preparation is at, with more on it for people."""


@dataclass(frozen=True)
class ModelInfo:
    """One model, as ``fireclaw models`` shows it.

    Attributes:
        name: its whole name, which can be given to an agent.
        provider: the kind of place.
        where: the place, for people.
        installed: it is there; otherwise it can be fetched.
        running: it is in memory.
        tools: whether it can use tools, for people.
        context: the longest context it was trained for, tokens; 0: not known.
        size: bytes on the disk; 0: not known.
        note: what else to know.
        is_default: it serves agents without a wish of their own.
    """

    name: str
    provider: ProviderKind
    where: str
    installed: bool = True
    running: bool = False
    tools: str = ""
    context: int = 0
    size: int = 0
    note: str = ""
    is_default: bool = False


class Backend(ABC):
    """One place where models run.

    Attributes:
        kind: what kind of place it is.
        queue: who may call it next.
    """

    kind: ClassVar[ProviderKind]

    def __init__(self, settings: ModelSettings) -> None:
        self._settings = settings
        self.queue = FairQueue(settings.parallel)

    def full_name(self, model: str) -> str:
        """The whole name of a model of this place."""
        return str(ModelName(self.kind, model))

    @abstractmethod
    async def choose(self) -> str:
        """The name of its best model.

        Raises:
            FireclawError: it has none.
        """

    @abstractmethod
    async def prepare(self, model: str, become: Become, on_progress: OnProgress | None) -> None:
        """Have a model ready: fetched, known, loadable.

        Args:
            model: its name here.
            become: told what the preparation is at.
            on_progress: told how far a fetch is, on the event loop.

        Raises:
            FireclawError: it cannot be had, and why.
        """

    @abstractmethod
    async def connect(self, model: str) -> Connection:
        """The way to a model that was prepared, as it is now; a server of ours that died is started again.

        Raises:
            FireclawError: there is none.
        """

    @abstractmethod
    async def models(self) -> list[ModelInfo]:
        """Its models.

        Raises:
            FireclawError: it does not tell.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close the connections, and end what it started."""

    def watched(self, model: str) -> AbstractAsyncContextManager[None]:
        """Watch over a call in the body: what hangs is ended, so that the call fails and can be retried."""
        del model
        return nullcontext()
