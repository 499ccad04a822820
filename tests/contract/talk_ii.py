"""A person with an IRC client that is not ours: ``ii``, which is driven by files.

What is written into ``CHANNEL/in`` is said there; what is seen in a channel or said by a nick is in ``CHANNEL/out``,
``NICK/out``, a line each: ``1700000000 <nick> text``, and ``1700000000 -!- "text")`` for a NOTICE.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from types import TracebackType

_LINE = re.compile(r'\d+ (?:<(?P<nick>[^>]+)> (?P<said>.*)|-!- "(?P<notice>.*)"\)|-!- (?P<news>.*)|(?P<raw>.*))')
_POLL_S = 0.05
_START_S = 20.0


@dataclass(frozen=True)
class Line:
    """A line that the client showed.

    Attributes:
        nick: who said it; empty for a notice, whose sender ii does not show, and for news.
        text: what was said.
        kind: ``said``, ``notice``, ``news`` (joins, parts, quits), ``raw`` (the server's words).
    """

    nick: str
    text: str
    kind: str


class Ii:
    """One person.

    ::

        with Ii(folder, irc, "ann") as ann:
            ann.become_operator(irc)
            ann.join("#control", "#agents")
            ann.say("#control", "!list")
            ann.wait("#control", "notice", "no agents")

    Args:
        folder: where its files are; a folder of its own.
        irc: ``irc`` of ``fireclaw status --json``.
        nick: its nick.
    """

    def __init__(self, folder: Path, irc: dict[str, Any], nick: str) -> None:
        self.nick = nick
        self._home = folder / str(irc["host"])
        self._seen: dict[str, int] = {}
        self._process = subprocess.Popen(
            ["ii", "-i", folder, "-s", irc["host"], "-p", str(irc["port"]), "-n", nick, "-f", nick, "-k", "PASSWORD"],
            env={**os.environ, "PASSWORD": irc["password"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self.wait("", "raw", "Welcome", seconds=_START_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def become_operator(self, irc: dict[str, Any]) -> None:
        """Type /oper."""
        password = Path(irc["operator_password_file"]).read_text().strip()
        self.command(f"OPER {irc['operator']} {password}")
        self.wait("", "raw", "IRC Operator")

    def join(self, *channels: str) -> None:
        """Join channels; returns when in all of them."""
        for channel in channels:
            self.command(f"j {channel}")
            self.wait(channel, "news", rf"{self.nick}\(.*has joined")

    def command(self, words: str) -> None:
        """Type a /command into the server's window; one that ii does not know reaches the server as it is."""
        _write(self._home / "in", f"/{words}")

    def say(self, target: str, text: str) -> None:
        """Say something in a channel, or to a person."""
        if target.startswith("#"):
            _write(self._home / target / "in", text)
        else:
            self.command(f"PRIVMSG {target} :{text}")

    def lines(self, window: str) -> list[Line]:
        """Everything that a window shows: a channel's, a person's, or the server's (``""``)."""
        path = self._home / window / "out"
        text = path.read_text(errors="replace") if path.exists() else ""
        return [_parse(line) for line in text.split("\n")[:-1]]

    def wait(self, window: str, kind: str, pattern: str, *, nick: str = "", seconds: float = 30.0) -> Line:
        """Wait for the next line of a window that nobody has waited for yet.

        Args:
            window: where.
            kind: its kind.
            pattern: a regular expression, found anywhere in it.
            nick: who says it; empty for anybody.
            seconds: how long.
        """
        deadline = time.monotonic() + seconds
        while True:
            lines = self.lines(window)
            for number in range(self._seen.get(window, 0), len(lines)):
                line = lines[number]
                if line.kind == kind and re.search(pattern, line.text) and nick in ("", line.nick):
                    self._seen[window] = number + 1
                    return line
            if time.monotonic() > deadline:
                shown = "\n".join(map(str, lines[self._seen.get(window, 0) :]))
                raise AssertionError(f"{self.nick} saw no {kind} like {pattern!r} in {window!r}, but:\n{shown}")
            assert self._process.poll() is None, "ii has ended"
            time.sleep(_POLL_S)

    def ask(self, agent: str, text: str, *, seconds: float = 60.0) -> str:
        """Ask an agent in ``#agents`` and return the answer."""
        self.say("#agents", f"{agent}: {text}")
        return self.wait("#agents", "said", f"^{self.nick}: ", nick=agent, seconds=seconds).text.partition(": ")[2]


def _parse(line: str) -> Line:
    match = _LINE.fullmatch(line)
    assert match is not None, line
    for kind in ("said", "notice", "news", "raw"):
        if match[kind] is not None:
            return Line(match["nick"] or "", match[kind], kind)
    raise AssertionError("unreachable")


def _write(pipe: Path, text: str) -> None:
    with pipe.open("w") as file:
        file.write(f"{text}\n")
