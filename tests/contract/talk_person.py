"""A person with a bare socket, who comes back by himself whenever the IRC server was away."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_AGENTS = "#agents"
_AGAIN_S = 0.1
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Heard:
    """A line from the server.

    Attributes:
        nick: who caused it.
        command: ``PRIVMSG``, ``NOTICE``, ``JOIN``, a number …
        params: its parameters.
    """

    nick: str
    command: str
    params: tuple[str, ...]

    @property
    def text(self) -> str:
        """The last parameter."""
        return self.params[-1] if self.params else ""


class Person:
    """Somebody in ``#agents`` and ``#control``, an operator, whatever happens.

    ::

        with Person("ann", irc, operator_password) as ann:
            ann.wait(lambda: "worker" in ann.present, "worker is there")
            ann.say("#agents", "worker: hello")

    Attributes:
        heard: every line that came, oldest first.
        present: who is in ``#agents`` now; empty while there is no connection.
    """

    def __init__(self, nick: str, irc: dict[str, Any], operator_password: str) -> None:
        self.heard: list[Heard] = []
        self.present: set[str] = set()
        self._nick = nick
        self._irc = irc
        self._operator_password = operator_password
        self._socket: socket.socket | None = None
        self._changed = threading.Condition()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._live, name=f"irc of {nick}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        with contextlib.suppress(OSError), self._changed:
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def say(self, target: str, text: str) -> None:
        """Say something; into the void while there is no connection."""
        self._send(f"PRIVMSG {target} :{text}")

    def said(self, nick: str, command: str = "PRIVMSG") -> list[str]:
        """What somebody has said so far where this person could hear it."""
        return [line.text for line in self.heard if (line.nick, line.command) == (nick, command)]

    @property
    def commands(self) -> set[str]:
        """The commands and numbers that the server has sent."""
        return {line.command for line in self.heard}

    def wait(self, is_so: Callable[[], object], what: str) -> None:
        """Wait until something is so; looked at after each line that comes."""
        assert self.watch(is_so, _PATIENCE_S), f"not within {_PATIENCE_S} s: {what}; the last lines: {self.heard[-10:]}"

    def watch(self, is_so: Callable[[], object], seconds: float) -> bool:
        """Wait so long for something to be so, and tell whether it is."""
        with self._changed:
            return bool(self._changed.wait_for(is_so, timeout=seconds))

    def _live(self) -> None:
        while not self._leaving.is_set():
            with contextlib.suppress(OSError), socket.create_connection((self._irc["host"], self._irc["port"])) as link:
                self._socket = link
                self._send(f"PASS {self._irc['password']}", f"NICK {self._nick}", f"USER {self._nick} 0 * :a person")
                for line in link.makefile("r", encoding="utf-8", errors="replace", newline="\r\n"):
                    self._take(_parse(line.rstrip("\r\n")))
            with self._changed:
                self._socket = None
                self.present.clear()
                self._changed.notify_all()
            self._leaving.wait(_AGAIN_S)

    def _take(self, line: Heard) -> None:
        with self._changed:
            self.heard.append(line)
            match line:
                case Heard(_, "PING", _):
                    self._send(f"PONG :{line.text}")
                case Heard(_, "376" | "422", _):
                    self._send("JOIN #agents,#control", f"OPER {self._irc['operator']} {self._operator_password}")
                case Heard(_, "353", (_, _, channel, names)) if channel == _AGENTS:
                    self.present |= {name.lstrip("~&@%+") for name in names.split()}
                case Heard(nick, "JOIN", (channel,)) if channel == _AGENTS:
                    self.present.add(nick)
                case Heard(nick, "QUIT", _):
                    self.present.discard(nick)
                case Heard(_, "KILL", (nick, *_)):
                    self.present.discard(nick)
                case Heard(nick, "NICK", (other,)) if nick in self.present:
                    self.present = self.present - {nick} | {other}
            self._changed.notify_all()

    def _send(self, *lines: str) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it broke; the reader comes back
                self._socket.sendall("".join(f"{line}\r\n" for line in lines).encode())


def _parse(line: str) -> Heard:
    prefix = ""
    if line.startswith(":"):
        prefix, _, line = line[1:].partition(" ")
    head, colon, last = line.partition(" :")
    command, *params = head.split()
    return Heard(prefix.partition("!")[0], command, (*params, last) if colon else tuple(params))
