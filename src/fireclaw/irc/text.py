r"""Text in and out of IRC: split by bytes, clean what comes, quieten what goes. Sans-I/O.

A relayed line is cut by the server at 512 bytes, in the middle of a character if need be, so what is said is
split here, by the bytes of the line as *others* will receive it (:func:`room_for`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fireclaw.irc.message import LINE_MAX, Kind

if TYPE_CHECKING:
    from fireclaw.irc.message import Prefix

_LINE_BREAKS = re.compile(r"\r\n|[\r\n\0]")
# mIRC formatting: bold, italics ... reset; \x03 colours by number, \x04 by hex.
_FORMATTING = re.compile(
    r"\x03(?:\d{1,2}(?:,\d{1,2})?)?|\x04(?:[0-9A-Fa-f]{6}(?:,[0-9A-Fa-f]{6})?)?|[\x02\x0f\x11\x16\x1d\x1e\x1f]"
)
# Bidirectional overrides can make a line read as another one.
_BIDI = "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
# Invisible characters can hide a name from a match, or text from a reader's eye.
_INVISIBLE = re.compile(f"[{_BIDI}\u00ad\u180e\u200b-\u200d\u2060-\u2064\ufeff\U000e0000-\U000e007f]")
_UNSPEAKABLE = re.compile(f"[\x00-\x08\x0b-\x1f\x7f-\x9f{_BIDI}]")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")

CTCP = "\x01"
# A server that gives us a prefix of half a kilobyte must not make us split for ever.
_LEAST_ROOM = 64
_ACTION_FRAME = len(f"{CTCP}ACTION {CTCP}")


def room_for(sender: Prefix, kind: Kind, target: str) -> int:
    """How many bytes of text fit in one line, as the server relays it.

    Args:
        sender: our own full prefix.
        kind: how it is said.
        target: to whom.
    """
    frame = f":{sender} {kind.command} {target} :"
    room = LINE_MAX - len(frame.encode()) - (_ACTION_FRAME if kind is Kind.ACTION else 0)
    return max(room, _LEAST_ROOM)


def split_text(text: str, room: int) -> list[str]:
    """Split a text into lines that fit, never inside a character and where possible after a space.

    Indentation is kept. Blank lines are left out: IRC cannot say nothing. The pieces of one line, joined,
    are that line without its trailing spaces.

    Args:
        text: any text; CR, LF and NUL end a line.
        room: bytes that fit in one line, at least 4 (the longest character).
    """
    lines = (line.rstrip() for line in _LINE_BREAKS.split(text))
    return [piece for line in lines if line for piece in split_line(line, room)]


def split_line(line: str, room: int) -> list[str]:
    """Split one line into pieces of at most ``room`` bytes that, joined, are the line."""
    data = line.encode("utf-8", "replace")
    pieces = []
    while len(data) > room:
        end = room
        while data[end] & 0xC0 == 0x80:  # a continuation byte: the character began earlier
            end -= 1
        # A space in the last quarter is a better place; it stays at the end of the piece.
        space = data.rfind(b" ", room - room // 4, end)
        if space >= 0:
            end = space + 1
        pieces.append(data[:end])
        data = data[end:]
    pieces.append(data)
    return [piece.decode() for piece in pieces]


def clean_text(text: str) -> str:
    """Take colours, formatting, control characters and invisible characters out of what somebody said.

    Done before any matching: ``co<zero width space>der`` would otherwise pass for another name.
    """
    return _CONTROL.sub("", _INVISIBLE.sub("", _FORMATTING.sub("", text)))


def speakable(text: str) -> str:
    r"""Take out of a text what could act on people's clients; line ends and tabs stay.

    A model's or a guest's bytes must not become CTCP (``\x01``), colours, terminal escapes, or text that
    reads from the other side.
    """
    return _UNSPEAKABLE.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\n"))


def say_as(kind: Kind, text: str) -> str:
    """The trailing parameter that says one line of text."""
    return f"{CTCP}ACTION {text}{CTCP}" if kind is Kind.ACTION else text


def parse_ctcp(text: str) -> tuple[str, str] | None:
    r"""Read a client-to-client request: ``\x01PING 123\x01`` is ``("PING", "123")``; None for plain text."""
    if not text.startswith(CTCP):
        return None
    name, _, argument = text.strip(CTCP).partition(" ")
    return name.upper(), argument
