"""An IRC client for asyncio: the shell around ``session.py``. The overseer has one, and every agent.

Life::

    async with IrcClient(server, identity, channels=["#agents"], handler=on_event) as client:
        await client.wait_ready()
        delivery = await client.say("#agents", "hello")
        await delivery.confirmed

One task dials, reads, and dials again; while connected a second one is the only writer. What has not begun to
be sent survives a lost connection and is said on the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import ssl
from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Self

from fireclaw.errors import InvalidError, IrcError
from fireclaw.irc.answers import Answers
from fireclaw.irc.delivery import Confirmations, Delivery, DroppedError
from fireclaw.irc.events import Close, Joined, Lost, Pong, Ready, Reply, Retry, Send, Whois, WhoisEnd
from fireclaw.irc.message import Kind, LineBuffer, Prefix, check_target, fold, format_line
from fireclaw.irc.sendqueue import Parcel, SendQueue
from fireclaw.irc.session import LONGEST_HOST, LONGEST_USER, Identity, Session, join_line
from fireclaw.irc.text import room_for, speakable, split_text
from fireclaw.irc.throttle import Rate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from fireclaw.irc.events import Event, Output
    from fireclaw.irc.sendqueue import Ticket

_log = logging.getLogger(__name__)

_DIAL_S = 10.0
_ANSWER_S = 30.0  # ngircd lets a client wait for up to 10 s after an error
_FAREWELL_S = 2.0
_HEALTHY_S = 60.0
_READ_CHUNK = 64 * 1024

_OPER_OK = 381
_NO_PRIVILEGES = 481
_OPER_REFUSED = frozenset({461, 464, 491})
# The errors that name the channel one wanted to join: RFC 2812, and 477, 480, 489 of other servers.
_JOIN_REFUSED = frozenset({403, 405, 407, 437, 471, 473, 474, 475, 476, 477, 480, 489})


@dataclass(frozen=True)
class ServerAddress:
    """Where a server is.

    Attributes:
        host: name or address.
        port: TCP port.
        password: the server's, empty for none.
        tls: whether to speak TLS, with the host's usual trust.
    """

    host: str
    port: int
    password: str = field(default="", repr=False)
    tls: bool = False

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(frozen=True)
class Backoff:
    """How long to wait before dialling again: doubled each time, ±20 % so that agents do not come as a herd.

    Attributes:
        first: seconds after a connection that was healthy for a minute.
        longest: the most; also what follows a KILL or "too many connections".
    """

    first: float = 1.0
    longest: float = 60.0


class State(Enum):
    """Where a client is."""

    OFFLINE = auto()
    CONNECTING = auto()
    READY = auto()
    GAVE_UP = auto()
    CLOSED = auto()


class IrcClient:
    """One nick on one server, kept there.

    Attributes:
        server: the address it dials.
        state: where it is now.
    """

    def __init__(
        self,
        server: ServerAddress,
        identity: Identity,
        *,
        handler: Callable[[Event], None],
        channels: Iterable[str] = (),
        rate: Rate | None = None,
        backoff: Backoff | None = None,
        queue_lines: int = 200,
    ) -> None:
        """Describe the client; :meth:`start` makes it dial.

        Args:
            server: where to.
            identity: who to be.
            handler: called in the loop with each event, in order. It must neither block nor raise; an
                exception ends the client and comes out of :meth:`wait_closed`.
            channels: channels to be in, always.
            rate: how fast to speak.
            backoff: how long to wait between dials.
            queue_lines: most lines of talk that wait.

        Raises:
            InvalidError: the nick cannot be one.
        """
        check_target(identity.nick)
        self.server = server
        self.state = State.OFFLINE
        self._identity = identity
        self._handler = handler
        self._channels = dict.fromkeys(channels, "")
        self._backoff = backoff or Backoff()
        self._delay = self._backoff.first
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        self._queue: SendQueue[Delivery] = SendQueue(rate or Rate(), queue_lines, self._clock())
        self._wake = asyncio.Event()
        self._ready: asyncio.Future[None] = loop.create_future()
        self._session: Session | None = None
        self._answers = Answers()
        self._confirmations = Confirmations()
        self._kills = 0
        self._leaving = False
        self._task: asyncio.Task[None] | None = None
        self._log = _log.getChild(identity.nick)

    # Life

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def start(self) -> None:
        """Begin to dial."""
        assert self._task is None, "an IrcClient lives once"
        self._task = asyncio.create_task(self._run(), name=f"irc:{self._identity.nick}")

    async def wait_ready(self) -> None:
        """Wait until we are registered; returns at once while we are.

        Raises:
            IrcError: the server refused us for good.
            ConnectionError: the client was closed.
        """
        await asyncio.shield(self._ready)

    async def wait_closed(self) -> None:
        """Wait until the client has ended.

        Raises:
            IrcError: the server refused us for good.
            Exception: what the handler raised.
        """
        assert self._task is not None
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()

    async def quit(self, reason: str = "") -> None:
        """Say goodbye and end: what is queued gets two seconds, then QUIT, then the connection closes.

        Raises:
            InvalidError: a line break in the reason.
        """
        farewell = format_line("QUIT", reason)
        self._leaving = True
        if self.state is State.READY:
            if last := self._last_delivery():
                await last.settle(_FAREWELL_S)
            self._queue.put_urgent(farewell)
            self._wake.set()
            assert self._task is not None
            await asyncio.wait([self._task], timeout=_FAREWELL_S)
        await self.aclose()

    async def aclose(self) -> None:
        """End at once and reap the tasks. What was not said fails with ConnectionError."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            if not self._task.cancelled():
                self._task.exception()  # marks it as seen: wait_ready and wait_closed tell it to who asks
        self._finish(State.CLOSED, ConnectionError(f"the IRC client of {self._identity.nick} was closed"))

    # Talk

    async def say(
        self,
        target: str,
        text: str,
        kind: Kind = Kind.PRIVMSG,
        *,
        before_send: Callable[[], None] | None = None,
    ) -> Delivery:
        """Queue a message; it may have several lines, which stay together.

        Args:
            target: one channel or nick.
            text: split by lines and by bytes; control characters are taken out.
            kind: how to say it.
            before_send: called right before its first byte leaves, see :class:`Delivery`.

        Raises:
            InvalidError: no such target can exist, there is nothing to say, or it is longer than the queue.
            ConnectionError: the client has ended.
        """
        check_target(target)
        lines = split_text(speakable(text), room_for(self._me, kind, target))
        if not lines:
            raise InvalidError("there is nothing to say in an empty message")
        if len(lines) > self._queue.limit:
            raise InvalidError(f"a message of {len(lines)} lines is too long, {self._queue.limit} at most")
        if self.state in {State.GAVE_UP, State.CLOSED}:
            raise ConnectionError(f"the IRC client of {self._identity.nick} has ended")
        delivery = Delivery(before_send)
        for dropped in self._queue.put_talk(Parcel(target, kind, deque(lines), delivery)):
            dropped.owner.fail(DroppedError(f"a message to {dropped.target} was dropped: the queue is full"))
        self._wake.set()
        return delivery

    # Commands

    async def whois(self, nick: str) -> Whois | None:
        """Ask the server who somebody is; None where nobody has that nick.

        Raises:
            ConnectionError: not connected, or no longer.
            TimeoutError: no answer within 30 s.
        """
        line = format_line("WHOIS", check_target(nick))
        event = await self._request(line, lambda event: isinstance(event, WhoisEnd) and self._is_same(event.nick, nick))
        assert isinstance(event, WhoisEnd)
        return event.whois

    async def join(self, channel: str, key: str = "") -> None:
        """Go into a channel and stay there over reconnects.

        Raises:
            IrcError: the server does not let us in, with its reason.
            ConnectionError: not connected, or no longer.
            TimeoutError: no answer within 30 s.
        """
        line = join_line(check_target(channel), key)
        if self._session is not None and self._session.is_in(channel):
            return
        self._channels[channel] = key
        event = await self._request(line, lambda event: self._answers_join(event, channel))
        if isinstance(event, Reply):
            self._channels.pop(channel, None)
            raise IrcError(f"cannot join {channel}: {event.text}")

    def part(self, channel: str, reason: str = "") -> None:
        """Leave a channel.

        Raises:
            InvalidError: a line break in the reason.
        """
        for name in [name for name in self._channels if self._is_same(name, channel)]:
            del self._channels[name]
        self._command("PART", check_target(channel), reason)

    def mode(self, target: str, modes: str, *args: str) -> None:
        """Change modes of a channel or of ourselves.

        Raises:
            InvalidError: an argument that cannot stand in a line.
        """
        self._command("MODE", check_target(target), modes, *args)

    def regain_nick(self) -> None:
        """Ask for the wanted nick now, without waiting for the next minute."""
        if self._session is not None:
            self._apply(self._session.regain_nick())

    async def oper(self, name: str, password: str) -> None:
        """Become an IRC operator.

        Raises:
            IrcError: the server refused.
            ConnectionError: not connected, or no longer.
            TimeoutError: no answer within 30 s.
        """
        event = await self._request(
            format_line("OPER", name, password),
            lambda event: isinstance(event, Reply) and event.code in {_OPER_OK, *_OPER_REFUSED},
        )
        assert isinstance(event, Reply)
        if event.code != _OPER_OK:
            raise IrcError(f"{self.server} does not accept us as operator {name!r}: {event.text}")

    async def kill(self, nick: str, reason: str) -> None:
        """End somebody's connection, as an operator. Nobody of that nick is as good.

        Raises:
            IrcError: we are no operator.
            ConnectionError: not connected, or no longer.
            TimeoutError: no answer within 30 s.
        """
        self._kills += 1
        token = f"kill{self._kills}"
        # The server says nothing of a KILL that worked; but it answers the PING after it.
        line = format_line("KILL", check_target(nick), reason) + format_line("PING", token)
        event = await self._request(line, lambda event: self._answers_kill(event, token))
        if isinstance(event, Reply):
            raise IrcError(f"cannot free the nick {nick!r}: {event.text}")

    # What we know

    @property
    def nick(self) -> str:
        """Our nick on this connection, or the wanted one."""
        return self._me.nick

    @property
    def server_name(self) -> str:
        """The server's name by its own word; empty while not registered."""
        return self._session.server if self._session is not None else ""

    def fold(self, name: str) -> str:
        """Fold a name as the server does."""
        return self._session.fold(name) if self._session is not None else fold(name)

    def sees(self, nick: str) -> bool:
        """Whether somebody shares a channel with us, so that we hear of every change of that nick."""
        return self._session is not None and self._session.sees(nick)

    # The connection

    async def _run(self) -> None:
        try:
            while not self._leaving:
                dialled = self._clock()
                close = await self._hold_connection()
                self._lose(close.reason)
                self._handler(Lost(close.reason))
                await self._wait_to_dial(close, self._clock() - dialled)
        except Exception as error:
            self._finish(State.GAVE_UP, error)
            raise

    async def _wait_to_dial(self, close: Close, lasted: float) -> None:
        if self._leaving:
            return
        if close.retry is Retry.NEVER:
            raise IrcError(f"{self.server}: {close.reason}", hint="check the IRC settings")
        if lasted > _HEALTHY_S:
            self._delay = self._backoff.first
        if close.retry is Retry.LATER:
            self._delay = self._backoff.longest
        delay = self._delay * random.uniform(0.8, 1.2)  # noqa: S311 - a spread, not a secret
        self._delay = min(self._backoff.longest, self._delay * 2)
        self._log.warning("%s: %s; dialling again in %.1f s", self.server, close.reason, delay)
        await asyncio.sleep(delay)

    async def _hold_connection(self) -> Close:
        """Dial, and stay until the connection ends; tell why it did."""
        self.state = State.CONNECTING
        context = ssl.create_default_context() if self.server.tls else None
        try:
            async with asyncio.timeout(_DIAL_S):
                reader, writer = await asyncio.open_connection(self.server.host, self.server.port, ssl=context)
        except OSError as error:  # TimeoutError and ssl.SSLError are OSErrors too
            return Close(f"cannot connect: {str(error) or 'no answer'}")
        session = self._session = Session(self._identity, self._channels, self._clock)
        pump = asyncio.create_task(self._write(writer, session), name=f"irc-writer:{self._identity.nick}")
        try:
            return await self._read(reader, session)
        except OSError as error:
            return Close(f"the connection broke: {error}")
        finally:
            await self._reap(pump, writer)

    async def _reap(self, pump: asyncio.Task[None], writer: asyncio.StreamWriter) -> None:
        pump.cancel()
        writer.transport.abort()
        await asyncio.wait([pump])
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        if not pump.cancelled():
            pump.result()

    async def _read(self, reader: asyncio.StreamReader, session: Session) -> Close:
        lines = LineBuffer()
        close = self._apply(session.start(self.server.password))
        while close is None:
            try:
                async with asyncio.timeout_at(session.deadline):
                    data = await reader.read(_READ_CHUNK)
            except TimeoutError:
                close = self._apply(session.tick())
            else:
                close = self._take(lines.feed(data), session) if data else Close("the server closed the connection")
        return close

    def _take(self, lines: Iterable[bytes], session: Session) -> Close | None:
        """Take lines one by one: while a handler runs, the session knows what that line told and no more."""
        for line in lines:
            if close := self._apply(session.receive(line)):
                return close
        return self._apply(session.tick())

    def _apply(self, outputs: Iterable[Output]) -> Close | None:
        """Do what the session asks; returns its wish to end the connection."""
        for output in outputs:
            match output:
                case Send(data, urgent=True):
                    self._queue.put_urgent(data)
                case Send(data):
                    self._queue.put_command(data)
                case Close():
                    return output
                case _:
                    self._emit(output)
        self._wake.set()
        return None

    def _emit(self, event: Event) -> None:
        match event:
            case Ready():
                self.state = State.READY
                self._ready.set_result(None)
            case Pong(token):
                if ping := self._confirmations.take(token):
                    self._queue.put_urgent(ping)
            case _:
                pass
        self._answers.offer(event)
        self._handler(event)

    async def _write(self, writer: asyncio.StreamWriter, session: Session) -> None:
        """Be the only writer of one connection."""
        # drain() then returns only when the kernel has everything: that is what "sent" means.
        writer.transport.set_write_buffer_limits(high=0)
        try:
            while True:
                await self._write_next(writer, session)
        except OSError:
            # The reader sees the end of the same connection and says why.
            writer.transport.abort()

    async def _write_next(self, writer: asyncio.StreamWriter, session: Session) -> None:
        now = self._clock()
        ticket = self._queue.take(session.me, talk=session.is_ready, now=now)
        if ticket is None:
            self._wake.clear()
            delay = self._queue.delay(talk=session.is_ready, now=now)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(None if math.isinf(delay) else delay):
                    await self._wake.wait()
            return
        if ticket.is_first and not self._begin(ticket):
            return
        data = ticket.data
        if ticket.parcel and ticket.is_last:
            data += self._confirmations.add(ticket.parcel.owner)
        writer.write(data)
        await writer.drain()
        if ticket.parcel and ticket.is_last:
            ticket.parcel.owner.mark_sent()

    def _begin(self, ticket: Ticket[Delivery]) -> bool:
        """Let the caller commit that the message is about to leave; False where it may not."""
        assert ticket.parcel is not None
        try:
            ticket.parcel.owner.begin()
        except Exception as error:  # noqa: BLE001 - the caller's own hook: its error goes back to the caller
            self._queue.remove(ticket.parcel)
            ticket.parcel.owner.fail(error)
            return False
        return True

    # Ends

    def _lose(self, reason: str) -> None:
        """The connection is gone, with all that depended on it."""
        error = ConnectionError(f"{self.server}: {reason}")
        if cut := self._queue.drop_connection():
            cut.owner.mark_sent()  # people may have seen the beginning of it
            cut.owner.fail(error)
        self._confirmations.fail(error)
        self._answers.fail(error)
        self._session = None
        self.state = State.OFFLINE
        if self._ready.done():
            self._ready = asyncio.get_running_loop().create_future()

    def _finish(self, state: State, error: Exception) -> None:
        """Nothing will be sent any more."""
        if self.state in {State.GAVE_UP, State.CLOSED}:
            return
        was_connected = self._session is not None
        self._lose(str(error))
        self.state = state
        for parcel in self._queue.drop_talk():
            parcel.owner.fail(ConnectionError(str(error)))
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # marks it as seen: nobody has to wait for us
        if was_connected:
            self._handler(Lost(str(error)))

    # Small things

    @property
    def _me(self) -> Prefix:
        if self._session is not None:
            return self._session.me
        return Prefix(self._identity.nick, LONGEST_USER, LONGEST_HOST)

    def _last_delivery(self) -> Delivery | None:
        last = self._queue.last
        return last.owner if last is not None else self._confirmations.last

    def _command(self, command: str, *params: str) -> None:
        """Queue a command that has no answer; while offline it has no meaning and is left out."""
        line = format_line(command, *params)
        if self.state is State.READY:
            self._queue.put_command(line)
            self._wake.set()

    async def _request(self, line: bytes, wants: Callable[[Event], bool]) -> Event:
        """Queue a command and wait for the event that answers it."""
        if self.state is not State.READY:
            raise ConnectionError(f"not connected to {self.server}")
        self._queue.put_command(line)
        self._wake.set()
        return await self._answers.wait(wants, _ANSWER_S)

    def _is_same(self, one: str, other: str) -> bool:
        return self.fold(one) == self.fold(other)

    def _answers_join(self, event: Event, channel: str) -> bool:
        match event:
            case Joined(channel=name, is_me=True):
                return self._is_same(name, channel)
            case Reply(code, params) if code in _JOIN_REFUSED and params:
                return self._is_same(params[0], channel)
            case _:
                return False

    def _answers_kill(self, event: Event, token: str) -> bool:
        match event:
            case Reply(code):
                return code == _NO_PRIVILEGES
            case Pong(answered):
                return answered == token
            case _:
                return False
