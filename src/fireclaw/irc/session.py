"""One connection to an IRC server as a state machine: lines and time in, events and commands out. Sans-I/O.

``client.py`` is its shell. Life::

    session = Session(identity, channels, clock)
    session.start(password)      → CAP, PASS, NICK, USER
    session.receive(raw_line)    → events (Ready, Message ...), Send, Close
    session.tick()               → what ``session.deadline`` was for
    ... until a Close, or until the bytes end

Where 26.1 of ngircd is meant, it was measured; numerics are those of RFC 2812 and modern.ircdocs.horse.
"""

from __future__ import annotations

import contextlib
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fireclaw.errors import InvalidError
from fireclaw.irc.events import (
    Close,
    Invited,
    Joined,
    Kicked,
    Message,
    Output,
    Parted,
    Pong,
    Quit,
    Ready,
    Renamed,
    Reply,
    Retry,
    Send,
)
from fireclaw.irc.message import Kind, Prefix, fold, format_line, is_channel, parse_line
from fireclaw.irc.roster import Roster
from fireclaw.irc.text import clean_text, parse_ctcp
from fireclaw.irc.whois import WHOIS_NUMERICS, WhoisCollector

if TYPE_CHECKING:
    from collections.abc import Callable

    from fireclaw.irc.message import Line

_REGISTRATION_S = 30.0
_SILENCE_S = 60.0  # then we ask; as long again without an answer and the connection is dead
_REJOIN_S = 5.0
_KICK_MEMORY_S = 600.0
_REGAIN_S = 60.0
_CTCP_EVERY_S = 2.0
_NICK_TRIES = 10
_SHORT_NICK = 9  # RFC 2812 1.2.1: every server takes nine characters
_NICK_MAX = 30

_WANTED_CAPS = frozenset({"message-tags"})
_KEEPALIVE = "alive"

# Before our own JOIN comes back we do not know how others see us; assume the longest (user 20, host 63).
LONGEST_USER = "u" * 20
LONGEST_HOST = "h" * 63

_NETSPLIT = re.compile(r"[\w-]+(\.[\w-]+)+ [\w-]+(\.[\w-]+)+", re.ASCII)
_OPER_OK = 381
_FIRST_ERROR = 400
_REFUSED_PASSWORD = 464
_BANNED = 465
_NICK_INVALID = 432
_NICK_TAKEN = frozenset({433, 436, 437})


@dataclass(frozen=True)
class Identity:
    """Who we are on a network.

    Attributes:
        nick: the wanted nick.
        user: the user name of ``nick!user@host``.
        realname: shown by WHOIS.
    """

    nick: str
    user: str
    realname: str


class Session:
    """The state machine.

    Attributes:
        me: our own prefix as others see it, as far as we know.
        server: the server's name, empty before 001.
        is_ready: whether registration is complete.
    """

    def __init__(self, identity: Identity, channels: dict[str, str], clock: Callable[[], float]) -> None:
        """Begin before the first byte.

        Args:
            identity: who we want to be.
            channels: names and keys (empty for none) of the channels to be in. The session takes out the
                ones it was kicked from for good; the owner keeps the rest over a reconnect.
            clock: monotonic seconds.
        """
        self._identity = identity
        self._channels = channels
        self._clock = clock
        self._out: list[Output] = []
        self.me = Prefix(identity.nick, LONGEST_USER, LONGEST_HOST)
        self.server = ""
        self.is_ready = False
        self._isupport: dict[str, str] = {}
        self._nick_tries = 0
        self._nick_max = _NICK_MAX
        self._roster = Roster(self.fold)
        self._whois = WhoisCollector(self.fold)
        self._registration_ends = clock() + _REGISTRATION_S
        self._heard_at = clock()
        self._asked_at: float | None = None
        self._rejoins: dict[str, float] = {}
        self._kicked_at: dict[str, float] = {}
        self._regain_at = math.inf
        self._ctcp_at = -math.inf
        self._handlers: dict[str, Callable[[Line], None]] = {
            "001": self._on_welcome,
            "005": self._on_isupport,
            "353": self._on_names,
            "376": self._on_introduced,
            "422": self._on_introduced,
            **dict.fromkeys(WHOIS_NUMERICS, self._on_whois),
            "CAP": self._on_cap,
            "ERROR": self._on_error,
            "INVITE": self._on_invite,
            "JOIN": self._on_join,
            "KICK": self._on_kick,
            "KILL": self._on_kill,
            "NICK": self._on_nick,
            "NOTICE": self._on_notice,
            "PART": self._on_part,
            "PING": self._on_ping,
            "PONG": self._on_pong,
            "PRIVMSG": self._on_privmsg,
            "QUIT": self._on_quit,
        }

    # What the shell calls

    def start(self, password: str) -> list[Output]:
        """Open the registration.

        Args:
            password: the server's, empty for none.

        Raises:
            InvalidError: a name or the password cannot stand in an IRC line.
        """
        self._send("CAP", "LS", "302")
        if password:
            self._send("PASS", password)
        self._send("NICK", self._identity.nick)
        self._send("USER", self._identity.user, "0", "*", self._identity.realname)
        return self._flush()

    def receive(self, raw: bytes) -> list[Output]:
        """Take one line from the server; never raises, whatever is in it."""
        self._heard_at = self._clock()
        self._asked_at = None
        line = parse_line(raw)
        if line is not None:
            handler = self._handlers.get(line.command)
            if handler is not None:
                handler(line)
            elif line.command.isdecimal():
                self._on_numeric(line)
        return self._flush()

    def tick(self) -> list[Output]:
        """Do what is due by the clock; nothing where nothing is."""
        now = self._clock()
        if not self.is_ready and now >= self._registration_ends:
            self._close(f"the server did not finish our registration within {_REGISTRATION_S:.0f} s")
        if self._asked_at is not None and now >= self._asked_at + _SILENCE_S:
            self._close(f"the server has been silent for {now - self._heard_at:.0f} s")
        elif self._asked_at is None and now >= self._heard_at + _SILENCE_S:
            self._asked_at = now
            self._send("PING", _KEEPALIVE)
        for channel in [name for name, at in self._rejoins.items() if now >= at]:
            del self._rejoins[channel]
            if channel in self._channels:
                self._out.append(Send(join_line(channel, self._channels[channel])))
        if now >= self._regain_at:
            self._regain()
        return self._flush()

    @property
    def deadline(self) -> float:
        """When :meth:`tick` is next worth a call."""
        silence = (self._heard_at if self._asked_at is None else self._asked_at) + _SILENCE_S
        registration = math.inf if self.is_ready else self._registration_ends
        return min(silence, registration, self._regain_at, *self._rejoins.values())

    def regain_nick(self) -> list[Output]:
        """Ask for the wanted nick now, if we do not have it."""
        self._regain()
        return self._flush()

    def fold(self, name: str) -> str:
        """Fold a name as this server does."""
        return fold(name, self._isupport.get("CASEMAPPING", "rfc1459"))

    def is_me(self, nick: str) -> bool:
        """Whether a nick is ours."""
        return self.fold(nick) == self.fold(self.me.nick)

    def is_in(self, channel: str) -> bool:
        """Whether we are in a channel."""
        return channel in self._roster

    def sees(self, nick: str) -> bool:
        """Whether somebody shares a channel with us, so that we hear of each change of that nick."""
        return self._roster.sees(nick)

    # Registration

    def _on_cap(self, line: Line) -> None:
        if self.is_ready or len(line.params) < 3:
            return
        _, verb, *rest = line.params
        match verb.upper():
            case "LS" if rest[0] == "*":
                pass  # IRCv3: more lines of the list follow
            case "LS":
                offered = {cap.partition("=")[0] for cap in rest[-1].split()}
                if wanted := _WANTED_CAPS & offered:
                    self._send("CAP", "REQ", " ".join(sorted(wanted)))
                else:
                    self._send("CAP", "END")
            case "ACK" | "NAK":
                self._send("CAP", "END")

    def _on_welcome(self, line: Line) -> None:
        if line.prefix is not None:
            self.server = line.prefix.nick
        if line.params:
            self.me = Prefix(line.params[0], self.me.user, self.me.host)
        if not self._has_wanted_nick:
            self._regain_at = self._clock() + _REGAIN_S

    def _on_isupport(self, line: Line) -> None:
        for word in line.params[1:-1]:
            key, _, value = word.partition("=")
            self._isupport[key] = value

    def _on_introduced(self, _line: Line) -> None:
        """The message of the day has ended, or there is none: 001 and 005 are behind us."""
        if self.is_ready or not self.server:
            return
        self.is_ready = True
        self._out.append(Ready(self.me.nick, self.server))
        for channel, key in self._channels.items():
            self._out.append(Send(join_line(channel, key)))

    def _on_numeric(self, line: Line) -> None:
        code = int(line.command)
        if not self.server:
            self._on_registration_numeric(code, line)
        elif code >= _FIRST_ERROR or code == _OPER_OK:
            self._out.append(Reply(code, line.params[1:]))

    def _on_registration_numeric(self, code: int, line: Line) -> None:
        text = line.params[-1] if line.params else ""
        if code in {_REFUSED_PASSWORD, _BANNED}:
            self._close(f"the server refused us: {text}", Retry.NEVER)
        elif code in _NICK_TAKEN:
            self._try_next_nick()
        elif code == _NICK_INVALID and self._nick_max > _SHORT_NICK:
            # Perhaps only too long: this server has not told its limit yet.
            self._nick_max = _SHORT_NICK
            self._ask_for_nick(self._identity.nick[:_SHORT_NICK])
        elif code == _NICK_INVALID:
            self._close(f"the server refuses the nick {self._identity.nick!r}: {text}", Retry.NEVER)

    def _try_next_nick(self) -> None:
        self._nick_tries += 1
        if self._nick_tries > _NICK_TRIES:
            self._close(f"{self._identity.nick!r} and {_NICK_TRIES} nicks like it are taken", Retry.LATER)
            return
        suffix = f"-{self._nick_tries}"
        self._ask_for_nick(self._identity.nick[: self._nick_max - len(suffix)] + suffix)

    def _ask_for_nick(self, nick: str) -> None:
        self.me = Prefix(nick, self.me.user, self.me.host)
        self._send("NICK", nick)

    # Our nick

    @property
    def _has_wanted_nick(self) -> bool:
        return self.is_me(self._identity.nick)

    def _regain(self) -> None:
        limit = self._isupport.get("NICKLEN", "")
        fits = not limit.isdecimal() or len(self._identity.nick) <= int(limit)
        if self.is_ready and fits and not self._has_wanted_nick:
            self._regain_at = self._clock() + _REGAIN_S
            self._send("NICK", self._identity.nick)
        else:
            self._regain_at = math.inf

    def _freed(self, nick: str) -> None:
        """Somebody let go of a nick: if it is the one we want, ask at once."""
        if self.fold(nick) == self.fold(self._identity.nick):
            self._regain()

    # People and channels

    def _on_join(self, line: Line) -> None:
        if line.prefix is None or not line.params:
            return
        channel = line.params[0]
        is_me = self.is_me(line.prefix.nick)
        if is_me:
            self._learn_mask(line.prefix)
            self._roster.open(channel)
        self._roster.add(channel, line.prefix.nick)
        self._out.append(Joined(line.prefix, channel, is_me))

    def _on_names(self, line: Line) -> None:
        if len(line.params) > 3:
            self._roster.add(line.params[2], *line.params[3].split())

    def _on_part(self, line: Line) -> None:
        if line.prefix is None or not line.params:
            return
        channel, *reason = line.params
        is_me = self._leave(line.prefix.nick, channel)
        self._out.append(Parted(line.prefix, channel, " ".join(reason), is_me))

    def _on_kick(self, line: Line) -> None:
        if line.prefix is None or len(line.params) < 2:
            return
        channel, nick, *reason = line.params
        is_me = self._leave(nick, channel)
        final = is_me and self._note_kick(channel)
        self._out.append(Kicked(nick, channel, line.prefix, " ".join(reason), is_me, final))

    def _leave(self, nick: str, channel: str) -> bool:
        """Take somebody out of a channel; tell whether it was we."""
        if self.is_me(nick):
            self._roster.close(channel)
            return True
        self._roster.remove(channel, nick)
        return False

    def _note_kick(self, channel: str) -> bool:
        """Plan to come back after the first kick; stay out after a second one soon after."""
        now = self._clock()
        folded = self.fold(channel)
        final = now - self._kicked_at.get(folded, -math.inf) < _KICK_MEMORY_S
        self._kicked_at[folded] = now
        for name in [name for name in self._channels if self.fold(name) == folded]:
            if final:
                del self._channels[name]
            else:
                self._rejoins[name] = now + _REJOIN_S
        return final

    def _on_quit(self, line: Line) -> None:
        if line.prefix is None:
            return
        self._roster.quit(line.prefix.nick)
        reason = line.params[0] if line.params else ""
        self._out.append(Quit(line.prefix, reason, is_netsplit=bool(_NETSPLIT.fullmatch(reason))))
        self._freed(line.prefix.nick)

    def _on_nick(self, line: Line) -> None:
        if line.prefix is None or not line.params:
            return
        old, new = line.prefix.nick, line.params[0]
        is_me = self.is_me(old)
        self._roster.rename(old, new)
        if is_me:
            self.me = Prefix(new, self.me.user, self.me.host)
            self._regain_at = math.inf if self._has_wanted_nick else self._clock() + _REGAIN_S
        self._out.append(Renamed(line.prefix, new, is_me))
        if not is_me:
            self._freed(old)

    def _on_invite(self, line: Line) -> None:
        if line.prefix is not None and len(line.params) > 1 and is_channel(line.params[1]):
            self._out.append(Invited(line.prefix, line.params[1]))

    def _learn_mask(self, prefix: Prefix) -> None:
        if prefix.is_person:
            self.me = prefix

    # What is said

    def _on_privmsg(self, line: Line) -> None:
        if not self._is_from_another_person(line):
            return
        assert line.prefix is not None
        target, raw = line.params[0], line.params[1]
        request = parse_ctcp(raw)
        if request is None:
            self._say(line, raw, Kind.PRIVMSG)
        elif request[0] == "ACTION":
            self._say(line, request[1], Kind.ACTION)
        elif not is_channel(target):
            self._answer_ctcp(line.prefix.nick, *request)

    def _on_notice(self, line: Line) -> None:
        if self._is_from_another_person(line) and parse_ctcp(line.params[1]) is None:
            self._say(line, line.params[1], Kind.NOTICE)

    def _is_from_another_person(self, line: Line) -> bool:
        if line.prefix is None or not line.prefix.is_person or len(line.params) < 2:
            return False
        if self.is_me(line.prefix.nick):
            self._learn_mask(line.prefix)
            return False
        return True

    def _say(self, line: Line, raw: str, kind: Kind) -> None:
        assert line.prefix is not None
        self._out.append(Message(line.prefix, line.params[0], clean_text(raw), raw, kind, "bot" in line.tags))

    def _answer_ctcp(self, nick: str, name: str, argument: str) -> None:
        """Answer the few requests that people's clients send; one in two seconds, the rest is dropped."""
        answers = {"VERSION": "Fireclaw", "PING": argument[:64], "CLIENTINFO": "ACTION CLIENTINFO PING VERSION"}
        now = self._clock()
        if name not in answers or now < self._ctcp_at + _CTCP_EVERY_S:
            return
        self._ctcp_at = now
        self._answer("NOTICE", nick, f"\x01{name} {clean_text(answers[name])}\x01", urgent=False)

    def _on_whois(self, line: Line) -> None:
        if end := self._whois.take(line):
            self._out.append(end)

    # The connection

    def _on_ping(self, line: Line) -> None:
        self._answer("PONG", *line.params[:1], urgent=True)

    def _on_pong(self, line: Line) -> None:
        if line.params and line.params[-1] != _KEEPALIVE:
            self._out.append(Pong(line.params[-1]))

    def _on_kill(self, line: Line) -> None:
        if line.params and self.is_me(line.params[0]):
            self._close(f"killed: {line.params[-1]}", Retry.LATER)

    def _on_error(self, line: Line) -> None:
        text = clean_text(line.params[-1]) if line.params else "no reason given"
        if not self.server and re.search(r"bad password|access denied|password incorrect", text, re.IGNORECASE):
            retry = Retry.NEVER
        elif re.search(r"\bkill(ed)?\b|too many|throttl|banned", text, re.IGNORECASE):
            retry = Retry.LATER
        else:
            retry = Retry.SOON
        self._close(text, retry)

    def _close(self, reason: str, retry: Retry = Retry.SOON) -> None:
        self._out.append(Close(reason, retry))

    def _send(self, command: str, *params: str) -> None:
        """Send what keeps the connection alive: it overtakes everything."""
        self._out.append(Send(format_line(command, *params), urgent=True))

    def _answer(self, command: str, *params: str, urgent: bool) -> None:
        """Answer with words that the peer chose; what cannot stand in a line gets no answer."""
        with contextlib.suppress(InvalidError):
            self._out.append(Send(format_line(command, *params), urgent))

    def _flush(self) -> list[Output]:
        out, self._out = self._out, []
        return out


def join_line(channel: str, key: str) -> bytes:
    """Write a JOIN. The key goes with the first one: on ngircd a refused JOIN uses up an invitation.

    Raises:
        InvalidError: the name or the key cannot stand in an IRC line.
    """
    return format_line("JOIN", channel, *([key] if key else []))
