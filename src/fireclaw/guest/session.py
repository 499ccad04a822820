"""A session with the host: the multiplexer, and for each stream the conversation that serves its call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from fireclaw.guest.files import ReadFile, WriteFile
from fireclaw.guest.process import Process
from fireclaw.wire.calls import CallError, LineReader, pack_line
from fireclaw.wire.mux import Event, Mux, Stream

if TYPE_CHECKING:
    from collections.abc import Callable

    from fireclaw.guest.loop import Loop
    from fireclaw.guest.spawner import Spawner


class Host(Protocol):
    """What a session needs of the guestd around it."""

    loop: Loop

    def spawner(self, *, confined: bool) -> Spawner:
        """The thread that starts commands or opens files in the workload."""

    def identity(self, call: dict[str, Any]) -> dict[str, Any]:
        """Take a new identity after a clone."""

    def info(self) -> dict[str, Any]:
        """Describe the guest."""

    def seal(self) -> None:
        """Write what is cached to where it outlives the machine."""

    def shutdown(self) -> None:
        """End the machine, soon."""

    def log(self, text: str) -> None:
        """Write a line to the console."""


class Conversation(Protocol):
    """What serves one stream; each method is called in the loop's thread."""

    def data(self, payload: bytes | memoryview) -> None:
        """The host sent bytes; they are granted back by ``mux.consumed``."""

    def finished(self) -> None:
        """The host sends no more."""

    def writable(self) -> None:
        """The window grew, or the port drained."""

    def reset(self) -> None:
        """The stream is gone."""


class Session:
    """Serves one connection of the host.

    Args:
        host: the guestd around it.
        flush: writes what is pending.
        rekey: takes the magic that later sessions begin with.

    Attributes:
        congested: more is pending than the port takes; bulk senders must wait for ``writable``.
    """

    def __init__(self, host: Host, flush: Callable[[], None], rekey: Callable[[bytes], None]) -> None:
        self.host = host
        self.mux = Mux(client=False)
        self.flush = flush
        self.rekey = rekey
        self.congested = False
        self._parked: list[Stream] = []

    def receive(self, data: bytes) -> None:
        """Handle bytes of the connection.

        Raises:
            MuxError: they are not a multiplexer's.
        """
        for kind, stream, value in self.mux.receive(data):
            if stream is None:
                continue
            if kind is Event.OPENED:
                stream.owner = Request(self, stream)
            elif kind is Event.DATA:
                stream.owner.data(value)
            elif kind is Event.FINISHED:
                stream.owner.finished()
            elif kind is Event.WRITABLE:
                stream.owner.writable()
            elif kind is Event.RESET:
                stream.owner.reset()

    def park(self, stream: Stream) -> None:
        """Call the stream's ``writable`` once the port has drained."""
        self._parked.append(stream)

    def resume(self) -> None:
        """Let parked streams go on."""
        if self._parked:
            parked, self._parked = self._parked, []
            for stream in parked:
                if stream.open:
                    stream.owner.writable()

    def answer(self, stream: Stream, value: dict[str, Any]) -> None:
        """Send a call's answer and finish the stream."""
        if stream.open and not stream.finished:
            self.mux.send(stream, pack_line(value))
            self.mux.finish(stream)
            self.flush()

    def close(self) -> None:
        """End all conversations; the host is gone."""
        for stream in self.mux.streams:
            stream.open = False
            stream.owner.reset()


class Request:
    """The beginning of a stream: collects the call's line, then hands over to the conversation that serves it."""

    def __init__(self, session: Session, stream: Stream) -> None:
        self._session = session
        self._stream = stream
        self._line = LineReader()
        self._received = 0

    def data(self, payload: bytes | memoryview) -> None:
        """Collect; at the end of the line, dispatch."""
        self._received += len(payload)
        try:
            call = self._line.feed(payload)
            if call is None:
                self._session.mux.consumed(self._stream, len(payload))
                self._received = 0
                return
            self._session.mux.consumed(self._stream, self._received - len(self._line.rest))
            self._dispatch(call)
        except CallError as error:
            self._session.answer(self._stream, {"error": str(error)})
        except (KeyError, TypeError, ValueError) as error:
            self._session.answer(self._stream, {"error": f"bad call: {error!r}"})
        except OSError as error:
            self._session.answer(self._stream, {"error": error.strerror or str(error), "errno": error.errno or 0})

    def _dispatch(self, call: dict[str, Any]) -> None:
        session, stream, name = self._session, self._stream, call.get("call")
        conversation: Conversation | None = None
        if name == "exec":
            conversation = Process(session, stream, call)
        elif name == "read":
            conversation = ReadFile(session, stream, call)
        elif name == "write":
            conversation = WriteFile(session, stream, call)
        if conversation is not None:
            stream.owner = conversation
            if self._line.rest:
                conversation.data(self._line.rest)
        elif name == "identity":
            magic = bytes.fromhex(call["magic"])
            answer = session.host.identity(call)
            session.rekey(magic)
            session.answer(stream, answer)
        elif name == "info":
            session.answer(stream, session.host.info())
        elif name == "shutdown":
            session.host.seal()
            session.answer(stream, {})  # from now on the host may kill the machine
            session.host.shutdown()
        else:
            session.answer(stream, {"error": f"unknown call {name!r}"})

    def finished(self) -> None:
        """The host gave up before the line was whole."""
        self._session.mux.reset(self._stream)

    def writable(self) -> None:
        """Nothing waits."""

    def reset(self) -> None:
        """Nothing to undo."""
