"""IRC lines as values: parse, format, compare names. Sans-I/O; the lowest module of this room.

Sources: RFC 1459 and 2812 (grammar), modern.ircdocs.horse (case mappings), IRCv3 message-tags (escapes).
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from fireclaw.errors import InvalidError

if TYPE_CHECKING:
    from collections.abc import Mapping

# RFC 1459 2.3: 512 bytes with the CR LF. ngircd closes the connection on byte 513.
LINE_MAX = 510
# A tagged line may be longer (IRCv3: 8191 bytes of tags). Nothing legitimate is longer than this.
_READ_MAX = 16 * 1024

_TAG_ESCAPES = {":": ";", "s": " ", "r": "\r", "n": "\n"}
_RFC1459_FOLD = str.maketrans(string.ascii_uppercase + "[]\\~", string.ascii_lowercase + "{}|^")
_STRICT_FOLD = str.maketrans(string.ascii_uppercase + "[]\\", string.ascii_lowercase + "{}|")
_ASCII_FOLD = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_FOLDS = {"rfc1459": _RFC1459_FOLD, "strict-rfc1459": _STRICT_FOLD, "rfc1459-strict": _STRICT_FOLD}

_NO_LINE_ENDS = str.maketrans("", "", "\r\n\0")

# What would split a line, name several targets, or name a mask (RFC 2812 3.3.1: "$*.fi", "#*.edu",
# "user%host@server", "nick!user@host") has no place in the one target of a message.
_TARGET_MAX = 100  # ngircd: 50 for a channel, 31 for a nick
_BAD_IN_TARGET = re.compile(r"[\x00-\x20\x7f,!@%$*?:]")


class Kind(StrEnum):
    """How a text is said."""

    PRIVMSG = "PRIVMSG"
    NOTICE = "NOTICE"
    ACTION = "ACTION"

    @property
    def command(self) -> str:
        """The IRC command that carries it: an ACTION travels inside a PRIVMSG."""
        return Kind.PRIVMSG if self is Kind.ACTION else self


@dataclass(frozen=True)
class Prefix:
    """Who sent a line: a server (only ``nick``), or a person's full ``nick!user@host``."""

    nick: str
    user: str = ""
    host: str = ""

    @classmethod
    def parse(cls, text: str) -> Prefix:
        """Read a prefix without its colon."""
        nick, _, rest = text.partition("!")
        if not rest:
            nick, _, host = text.partition("@")
            return cls(nick, "", host)
        user, _, host = rest.partition("@")
        return cls(nick, user, host)

    @property
    def is_person(self) -> bool:
        """Whether a user sent it; a server has neither user nor host."""
        return bool(self.user and self.host)

    def __str__(self) -> str:
        return f"{self.nick}!{self.user}@{self.host}" if self.is_person else self.nick


@dataclass(frozen=True)
class Line:
    """One line from the server.

    Attributes:
        command: upper-case word, or a three-digit numeric.
        params: its parameters, the trailing one without its colon.
        prefix: who sent it, None where the line does not say.
        tags: IRCv3 message tags, unescaped.
    """

    command: str
    params: tuple[str, ...] = ()
    prefix: Prefix | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


def parse_line(raw: bytes) -> Line | None:
    """Read one line as servers send them, or worse; never raises.

    Args:
        raw: the bytes without their line end. Bytes that are not UTF-8 become U+FFFD.

    Returns:
        The line, or None where there is no command in it.
    """
    rest = raw.decode("utf-8", "replace").translate(_NO_LINE_ENDS).lstrip(" ")
    tags: dict[str, str] = {}
    prefix = None
    if rest.startswith("@"):
        word, _, rest = rest[1:].partition(" ")
        tags = _parse_tags(word)
        rest = rest.lstrip(" ")
    if rest.startswith(":"):
        word, _, rest = rest[1:].partition(" ")
        prefix = Prefix.parse(word)
    middle, colon, trailing = rest.partition(" :")
    # split(" ") and not split(): U+00A0 and U+3000 are ordinary characters of a name here.
    command, *params = [word for word in middle.split(" ") if word] or [""]
    if not command:
        return None
    if colon:
        params.append(trailing)
    return Line(command.upper(), tuple(params), prefix, tags)


def _parse_tags(text: str) -> dict[str, str]:
    """Read ``a=1;b`` with its escapes."""
    pairs = (item.partition("=") for item in text.split(";") if item)
    return {key: re.sub(r"\\(.?)", _unescape, value) for key, _, value in pairs}


def _unescape(match: re.Match[str]) -> str:
    return _TAG_ESCAPES.get(match[1], match[1])


def format_line(command: str, *params: str) -> bytes:
    r"""Write one line, its CR LF included.

    Args:
        command: the command.
        params: its parameters; only the last may be empty, hold spaces or start with a colon.

    Raises:
        InvalidError: a CR, LF or NUL (they would smuggle in a second command), a space where none may be, or
            more than 510 bytes.
    """
    for param in params:
        if re.search(r"[\r\n\0]", param):
            raise InvalidError(f"line break or NUL in the IRC parameter {param!r}")
    for param in params[:-1]:
        if not param or " " in param or param.startswith(":"):
            raise InvalidError(f"{param!r} cannot be a parameter of the IRC command {command}")
    words = [command, *params[:-1], *(f":{last}" for last in params[-1:])]
    data = " ".join(words).encode("utf-8", "replace")
    if len(data) > LINE_MAX:
        raise InvalidError(f"the IRC line is too long: {len(data)} bytes, {LINE_MAX} at most")
    return data + b"\r\n"


def check_target(target: str) -> str:
    """Check that a text is the name of exactly one user or channel, and return it.

    Raises:
        InvalidError: it is empty, a list, a mask, or not a name at all.
    """
    if not 0 < len(target.encode()) <= _TARGET_MAX or target[0] in "+-" or _BAD_IN_TARGET.search(target):
        raise InvalidError(f"{target!r} is not the name of one person or channel on IRC")
    return target


def is_channel(name: str) -> bool:
    """Whether a name is a channel's."""
    return name.startswith(("#", "&"))


def fold(name: str, casemapping: str = "rfc1459") -> str:
    """Fold a nick or channel for comparison, as the server does.

    Args:
        name: the name.
        casemapping: CASEMAPPING of the server's 005; RFC 1459's until it has spoken. ngircd says ascii, where
            ``fo[o]`` and ``fo{o}`` are two people.
    """
    return name.translate(_FOLDS.get(casemapping, _ASCII_FOLD))


class LineBuffer:
    """Cuts the byte stream into lines; a bare LF ends one too, an endless one is skipped."""

    def __init__(self) -> None:
        self._rest = b""
        self._skipping = False

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes as they came; return the lines that are now complete, without their line ends."""
        *complete, self._rest = (self._rest + data).split(b"\n")
        lines = [line.rstrip(b"\r") for line in complete]
        if lines and self._skipping:
            self._skipping = False
            del lines[0]
        if len(self._rest) > _READ_MAX:
            self._rest = b""
            self._skipping = True
        return [line for line in lines if line and len(line) <= _READ_MAX]
