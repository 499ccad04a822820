"""Who is in which channel with us, as one server tells it. Sans-I/O; a part of ``session.py``.

Whoever shares a channel with us cannot change nick, leave or be kicked without our hearing of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_STATUS_PREFIXES = "~&@%+!"


class Roster:
    """The people of the channels we are in; forgets a channel when we leave it."""

    def __init__(self, fold: Callable[[str], str]) -> None:
        """Begin outside of all channels.

        Args:
            fold: folds a name as the server does.
        """
        self._fold = fold
        self._people: dict[str, set[str]] = {}

    def __contains__(self, channel: str) -> bool:
        return self._fold(channel) in self._people

    def open(self, channel: str) -> None:
        """We came into a channel."""
        self._people[self._fold(channel)] = set()

    def close(self, channel: str) -> None:
        """We left a channel."""
        self._people.pop(self._fold(channel), None)

    def add(self, channel: str, *nicks: str) -> None:
        """People are in a channel; the signs of their rank in front of their nicks do not matter."""
        people = self._people.get(self._fold(channel))
        if people is not None:
            people.update(self._fold(nick.lstrip(_STATUS_PREFIXES)) for nick in nicks)

    def remove(self, channel: str, nick: str) -> None:
        """Somebody left a channel."""
        self._people.get(self._fold(channel), set()).discard(self._fold(nick))

    def quit(self, nick: str) -> None:
        """Somebody left the network."""
        for people in self._people.values():
            people.discard(self._fold(nick))

    def rename(self, old: str, new: str) -> None:
        """Somebody changed nick."""
        for people in self._people.values():
            if self._fold(old) in people:
                people.remove(self._fold(old))
                people.add(self._fold(new))

    def sees(self, nick: str) -> bool:
        """Whether somebody is in a channel with us."""
        return any(self._fold(nick) in people for people in self._people.values())
