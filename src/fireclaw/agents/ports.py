"""What the agents room needs of the rest of the house, as protocols: a voice, a mind, hands, an office, the record.

The daemon fills them with the IRC client, the gateway, the machine of the agent, and the ledger; tests with fakes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from fireclaw.agents.templates import Template
    from fireclaw.irc.events import Message
    from fireclaw.irc.message import Kind
    from fireclaw.llm.chat import ChatReply, ChatRequest
    from fireclaw.store.agents import LineRow


KEPT_BYTES: Final = 64 * 1024


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
        transcript: both outputs as they came, with more of them than the two before have.
    """

    status: int
    stdout: bytes
    stderr: bytes
    timed_out: bool
    duration_s: float
    command_id: str
    transcript: bytes = b""


class Hands(Protocol):
    """An agent's machine, as far as the agent uses it."""

    @property
    def machine_id(self) -> str:
        """The machine."""
        ...

    async def run(
        self, script: str, *arguments: str, timeout_s: float, stdin: bytes = b"", keep: int = KEPT_BYTES
    ) -> CommandResult:
        """Run ``/bin/sh -c script sh arguments`` as the user ``agent``, with no_new_privs and an empty bounding set.

        It runs in the workspace, or where there is none, in the user's home.

        Args:
            script: for the shell.
            arguments: its ``$1`` and so on.
            timeout_s: it is killed after so many seconds.
            stdin: what it can read; then, or at once, the end.
            keep: how many bytes of each output are kept, half of them from its beginning, half from its end.

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

    async def destroy_machine(self, agent_id: str, name: str, *, keep: bool) -> None:
        """Remove the agent's machine and its workspace; harmless where there is none.

        Args:
            agent_id: the agent's.
            name: the agent's.
            keep: the workspace stays, for the next agent of that name.
        """
        ...

    async def connect(self, nick: str, on_message: Callable[[Message], None]) -> Voice:
        """Take a seat on IRC under that nick; returns before the server has answered.

        Raises:
            FireclawError: it is not possible.
        """
        ...

    def announce(self, text: str) -> None:
        """Tell the operators something, in ``#control``, soon."""
        ...


class Colleagues(Protocol):
    """The other agents, as far as one can turn to them."""

    async def hand_over(self, handoff: Handoff) -> str:
        """Have another agent do something, and wait for its result.

        Handing over the same again, after a crash, waits for the result of the first time.

        Raises:
            FireclawError: it cannot be handed over, or it was not done; the message is for the model.
        """
        ...


@dataclass(frozen=True)
class Handoff:
    """Work for another agent.

    Attributes:
        handoff_id: the id of the call that hands it over.
        sender: the name of the one who hands it over.
        line: the line that the sender works on.
        receiver: the name of the one who is to do it.
        task: what is to be done.
        context: what the receiver must know.
        done_when: how to tell that it is done.
    """

    handoff_id: str
    sender: str
    line: LineRow
    receiver: str
    task: str
    context: str
    done_when: str


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
