"""When a line of chat is for an agent, and what of it. Sans-I/O.

A private line always is. In a channel it must begin with the nick (``worker: …``, ``worker, …``, ``@worker …``) or
mention it as a whole word; a command for the overseer is not for it. A NOTICE never is (RFC 1459 4.4.2: nobody answers
one), nor what a bot or one of our own agents says: two programs that answer each other never stop.
"""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

from fireclaw.irc.message import Kind, fold
from fireclaw.irc.verbs import is_command

if TYPE_CHECKING:
    from collections.abc import Container

    from fireclaw.irc.events import Message

_NICK_CHARACTERS = re.escape(string.ascii_letters + string.digits + "-_[]\\`^{}|")


def addressed_text(message: Message, nick: str, ours: Container[str]) -> str | None:
    """Return what is said to the agent, or None if nothing is.

    Args:
        message: what was said.
        nick: the agent's.
        ours: folded nicks (``fold(nick, "ascii")``) of our agents and the overseer, whom nobody of ours answers.
    """
    said_by = fold(message.sender.nick, "ascii")
    if message.is_notice or message.is_bot or not message.sender.is_person or said_by in ours:
        return None
    text = message.text.strip()
    if not text:
        return None
    folded, name = fold(text, "ascii"), re.escape(fold(nick, "ascii"))
    if address := re.match(rf"@?{name}(?:[:,>]|\s|$)\s*", folded):
        return text[address.end() :] or text
    if message.is_private:
        return text
    if message.kind is Kind.ACTION or is_command(text):
        return None  # "* alice hugs worker" and "!destroy worker" speak about it, not to it
    mention = re.search(rf"(?<![{_NICK_CHARACTERS}]){name}(?![{_NICK_CHARACTERS}])", folded)
    return text if mention else None
