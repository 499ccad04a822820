"""What the agents room needs of the rest of the house, as protocols: a voice, a mind, hands, an office, the record.

The daemon fills them with the IRC client, the gateway, the machine of the agent, and the ledger; tests with fakes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from fireclaw.agents.templates import Template
    from fireclaw.irc.events import Message
    from fireclaw.irc.message import Kind
    from fireclaw.llm.chat import ChatReply, ChatRequest


class Delivery(Protocol):
    """The fate of one message."""

    @property
    def sent(self) -> Awaitable[None]:
        """It is out; it must not be repeated.

        Raises:
            ConnectionError: the voice was closed before it began.
        """
        ...

    @property
    def confirmed(self) -> Awaitable[None]:
        """The server has handled it.

        Raises:
            ConnectionError: the connection broke first; it may not have been seen.
        """
        ...


class Voice(Protocol):
    """An agent's nick on IRC."""

    async def say(
        self, target: str, text: str, kind: Kind, *, before_send: Callable[[], None] | None = None
    ) -> Delivery:
        """Queue one line.

        Args:
            target: a channel or a nick.
            text: one line that fits.
            kind: how it is said.
            before_send: called right before the first byte goes out.
        """
        ...

    async def quit(self, reason: str) -> None:
        """Say goodbye and close."""
        ...


class Mind(Protocol):
    """The gateway to models."""

    @property
    def model(self) -> str:
        """The name of the model that answers now, for people."""
        ...

    async def warm(self, request: ChatRequest) -> None:
        """Read the beginning of an agent's prompts ahead of its first question; never fails."""
        ...

    async def chat(self, request: ChatRequest) -> ChatReply:
        """Ask a model.

        Raises:
            ModelError: it failed; ``kind`` tells how.
        """
        ...


@dataclass(frozen=True)
class CommandResult:
    """How a command in an agent's machine went.

    Attributes:
        status: exit status, 128 + N for signal N.
        stdout: its output, as far as it was kept.
        stderr: the same.
        timed_out: it was ended at its time limit.
        duration_s: how long it ran.
        command_id: its id in the record.
    """

    status: int
    stdout: bytes
    stderr: bytes
    timed_out: bool
    duration_s: float
    command_id: str


class Hands(Protocol):
    """An agent's machine, as far as the agent uses it."""

    @property
    def machine_id(self) -> str:
        """The machine."""
        ...

    async def run(self, command: str, *, timeout_s: float) -> CommandResult:
        """Run a shell command as the user ``agent``, with no_new_privs and an empty bounding set.

        Raises:
            MachineError: the machine could not do it.
        """
        ...


class Office(Protocol):
    """Who provides machines and seats on IRC."""

    async def make_machine(self, agent_id: str, name: str, template: Template) -> Hands:
        """Return the agent's machine: the one it has, if that lives, or a new one.

        Raises:
            FireclawError: there can be none.
        """
        ...

    async def destroy_machine(self, name: str) -> None:
        """Remove the agent's machine; harmless where there is none."""
        ...

    async def connect(self, nick: str, on_message: Callable[[Message], None]) -> Voice:
        """Take a seat on IRC under that nick; returns before the server has answered.

        Raises:
            FireclawError: it is not possible.
        """
        ...


class Record(Protocol):
    """The ledger's ``append``."""

    def __call__(
        self,
        type: str,  # noqa: A002 (the member's name in the ledger)
        data: Mapping[str, object],
        *,
        agent: str | None = None,
        machine: str | None = None,
        origin: str = "host",
    ) -> object:
        """Add an event.

        Raises:
            SetupError: it cannot be written.
        """
        ...
