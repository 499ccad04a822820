"""What an IRC session tells (events) and asks for (commands): frozen values between the core and its shell."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from fireclaw.irc.message import Kind, is_channel

if TYPE_CHECKING:
    from fireclaw.irc.message import Prefix


@dataclass(frozen=True)
class Ready:
    """Registered, the server has introduced itself, channels are being joined.

    Attributes:
        nick: ours on this connection; not the wanted one while somebody holds that.
        server: the server's name, by its own word.
    """

    nick: str
    server: str


@dataclass(frozen=True)
class Message:
    """Somebody said something. CTCP requests and our own echo never become one.

    Attributes:
        sender: the full prefix.
        target: the channel, or our nick.
        text: cleaned of formatting and invisible characters.
        raw: as it came, for the record.
        kind: how it was said; nobody answers a NOTICE.
        is_bot: the server vouches that a bot said it (IRCv3 ``bot`` tag).
    """

    sender: Prefix
    target: str
    text: str
    raw: str
    kind: Kind
    is_bot: bool = False

    @property
    def is_notice(self) -> bool:
        """Whether it must never be answered (RFC 1459 4.4.2)."""
        return self.kind is Kind.NOTICE

    @property
    def is_private(self) -> bool:
        """Whether it was said to us alone."""
        return not is_channel(self.target)

    @property
    def reply_to(self) -> str:
        """Where an answer belongs."""
        return self.sender.nick if self.is_private else self.target


@dataclass(frozen=True)
class Joined:
    """Somebody, perhaps we, came into a channel that we are in."""

    who: Prefix
    channel: str
    is_me: bool


@dataclass(frozen=True)
class Parted:
    """Somebody, perhaps we, left a channel that we are in."""

    who: Prefix
    channel: str
    reason: str
    is_me: bool


@dataclass(frozen=True)
class Kicked:
    """Somebody, perhaps we, was kicked.

    Attributes:
        nick: who had to go.
        by: who did it.
        final: it was we, for the second time within ten minutes: we stay out.
    """

    nick: str
    channel: str
    by: Prefix
    reason: str
    is_me: bool
    final: bool = False


@dataclass(frozen=True)
class Quit:
    """Somebody whom we could see left the network.

    Attributes:
        is_netsplit: two servers lost each other (the reason is two server names); it will be back.
    """

    who: Prefix
    reason: str
    is_netsplit: bool


@dataclass(frozen=True)
class Renamed:
    """Somebody, perhaps we, changed nick."""

    who: Prefix
    nick: str
    is_me: bool


@dataclass(frozen=True)
class Invited:
    """Somebody asks us into a channel. Who may is for the layer above to decide."""

    by: Prefix
    channel: str


@dataclass(frozen=True)
class Whois:
    """What our server knows about somebody.

    Attributes:
        server: the server that person is on (312). A linked server cannot make it ours.
        operator: it is an IRC operator (313), by the word of *its* server.
        account: the services account (330), empty for none.
        bot: it says it is a bot (335).
    """

    nick: str
    user: str
    host: str
    server: str = ""
    operator: bool = False
    account: str = ""
    bot: bool = False


@dataclass(frozen=True)
class WhoisEnd:
    """The answer to a WHOIS is complete; ``whois`` is None where nobody has that nick."""

    nick: str
    whois: Whois | None


@dataclass(frozen=True)
class Reply:
    """A numeric that answers or refuses something: 381 and all errors.

    Attributes:
        code: the numeric.
        params: its parameters after our nick; the last is for people.
    """

    code: int
    params: tuple[str, ...]

    @property
    def text(self) -> str:
        """The server's words."""
        return self.params[-1] if self.params else f"error {self.code}"


@dataclass(frozen=True)
class Pong:
    """The server has handled everything we sent before the PING with this token."""

    token: str


@dataclass(frozen=True)
class Lost:
    """The connection is gone, or could not be made; the client dials again unless it has given up."""

    reason: str


Event = Ready | Message | Joined | Parted | Kicked | Quit | Renamed | Invited | WhoisEnd | Reply | Pong | Lost


class Retry(Enum):
    """When to dial again after a connection ended."""

    SOON = auto()
    LATER = auto()
    NEVER = auto()


@dataclass(frozen=True)
class Send:
    """Write this line; an urgent one overtakes whatever is queued and costs no token."""

    data: bytes
    urgent: bool = False


@dataclass(frozen=True)
class Close:
    """End this connection."""

    reason: str
    retry: Retry = Retry.SOON


Output = Event | Send | Close
