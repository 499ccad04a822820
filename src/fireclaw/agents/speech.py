"""From a model's words to lines of chat: Markdown to plain text, controls out, split and cut. Sans-I/O."""

from __future__ import annotations

import re

from fireclaw.irc.text import speakable, split_text

MAX_LINES = 6
LINE_BYTES = 400

_FENCE = re.compile(r"^\s*(?:```|~~~)[^\n]*$\n?", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6}\s+", re.MULTILINE)
_BULLET = re.compile(r"^(\s*)[*+]\s+", re.MULTILINE)
_LINK = re.compile(r"!?\[([^\]\n]*)\]\(\s*<?([^)\s>]+)>?[^)\n]*\)")
# Underscores are left alone: __init__ is more often a name than emphasis. So are backticks: chat has taken to them.
_STRONG = re.compile(r"\*\*(?=\S)(.+?)(?<=\S)\*\*")


def plain_text(markdown: str) -> str:
    """Turn Markdown into text that reads well without it; code in fences is left as it is."""
    parts = _FENCE.split(markdown)  # prose, code, prose, code ...
    return "".join(part if number % 2 else _plain_prose(part) for number, part in enumerate(parts))


def _plain_prose(text: str) -> str:
    text = _HEADING.sub("", text)
    text = _BULLET.sub(r"\1- ", text)
    text = _LINK.sub(lambda link: link[2] if link[1] in ("", link[2]) else f"{link[1]} ({link[2]})", text)
    return _STRONG.sub(r"\1", text)


def lines_of(text: str, *, address: str = "") -> list[str]:
    """Cut an answer into the lines to be said.

    Args:
        text: what the model wrote.
        address: a nick to begin with, or nothing.

    Returns:
        At most MAX_LINES lines of at most LINE_BYTES bytes, and one more that says how many are left out.
        Empty where nothing can be said. No line holds a control character.
    """
    words = speakable(plain_text(text)).strip().expandtabs(4)
    lines = split_text(f"{address}: {words}" if address and words else words, LINE_BYTES)
    if len(lines) <= MAX_LINES:
        return lines
    return [*lines[:MAX_LINES], f"… ({len(lines) - MAX_LINES} more lines)"]


def one_line(text: str, limit: int) -> str:
    """Fit a text of unknown origin into part of one line of chat."""
    words = " ".join(speakable(text).split())
    return words if len(words) <= limit else words[: limit - 1] + "…"


def cut_middle(text: str, limit: int) -> str:
    """Keep head and tail of a long text: the beginning says what it is, the end how it went.

    Args:
        text: any text.
        limit: bytes of it to keep; the note in the middle comes on top.
    """
    data = text.encode(errors="replace")
    if len(data) <= limit:
        return text
    head = data[: limit // 2].decode(errors="ignore")
    tail = data[len(data) - (limit - limit // 2) :].decode(errors="ignore")
    return f"{head}\n[... {len(data) - limit} bytes left out ...]\n{tail}"
