"""Collects the numerics of WHOIS answers. Sans-I/O; a part of ``session.py``.

The numerics are those of RFC 2812, 330 (account) of many servers and 335 (bot) of ngircd and UnrealIRCd.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fireclaw.irc.events import Whois, WhoisEnd

if TYPE_CHECKING:
    from collections.abc import Callable

    from fireclaw.irc.message import Line

WHOIS_NUMERICS = ("311", "312", "313", "318", "330", "335")


class WhoisCollector:
    """Takes lines as they come, several answers at once if need be."""

    def __init__(self, fold: Callable[[str], str]) -> None:
        """Begin with none.

        Args:
            fold: folds a nick as the server does.
        """
        self._fold = fold
        self._drafts: dict[str, Whois] = {}

    def take(self, line: Line) -> WhoisEnd | None:
        """Take one line; return the answer that it completes."""
        match line.command, line.params:
            case "311", (_, nick, user, host, *_):
                self._drafts[self._fold(nick)] = Whois(nick, user, host)
            case "312", (_, nick, server, *_):
                self._amend(nick, lambda draft: replace(draft, server=server))
            case "313", (_, nick, *_):
                self._amend(nick, lambda draft: replace(draft, operator=True))
            case "330", (_, nick, account, *_):
                self._amend(nick, lambda draft: replace(draft, account=account))
            case "335", (_, nick, *_):
                self._amend(nick, lambda draft: replace(draft, bot=True))
            case "318", (_, nick, *_):
                return WhoisEnd(nick, self._drafts.pop(self._fold(nick), None))
        return None

    def _amend(self, nick: str, change: Callable[[Whois], Whois]) -> None:
        folded = self._fold(nick)
        if folded in self._drafts:
            self._drafts[folded] = change(self._drafts[folded])
