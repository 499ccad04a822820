"""The demo: a person on IRC makes an agent, asks it, and sees its answer; everything on the way is real.

The person is a plain socket that speaks IRC, so what is printed is what any IRC client would have seen. The machine of
the agent holds a file with a random word, written there by ``fireclaw exec``; the agent is asked to read it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

NICK = "you"
_LINE = re.compile(r":(?P<nick>[^! ]+)\S* (?P<command>\S+) (?P<target>\S+) ?:?(?P<text>.*)")
_ANSWER_SECONDS = 240
_JOIN_SECONDS = 60


class DemoError(Exception):
    """The demo did not show what it should."""


def fireclaw(*arguments: str, quiet: bool = False) -> str:
    """Run the fireclaw command line of this checkout; what it says of itself goes to our stderr."""
    command = [sys.executable, "-m", "fireclaw", *arguments]
    stderr = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=stderr, text=True).stdout


class Person:
    """A person with an IRC client."""

    def __init__(self, host: str, port: int, password: str) -> None:
        self._socket = socket.create_connection((host, port))
        self._lines = self._socket.makefile("r", encoding="utf-8", errors="replace", newline="\r\n")
        self.command(f"PASS {password}")
        self.command(f"NICK {NICK}")
        self.command(f"USER {NICK} 0 * :the demo")
        self.wait(lambda _, command, __: command == "001", _JOIN_SECONDS)

    def command(self, line: str) -> None:
        """Send one line."""
        self._socket.sendall(f"{line}\r\n".encode())

    def say(self, target: str, text: str) -> None:
        """Say something, and show it."""
        print(f"{target:>9} <{NICK}> {text}", flush=True)
        self.command(f"PRIVMSG {target} :{text}")

    def wait(self, wanted: Callable[[str, str, str], bool], seconds: float) -> str:
        """Show what is said until ``wanted(nick, command, text)``; return that text."""
        deadline = time.monotonic() + seconds
        while True:
            self._socket.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                line = self._lines.readline().rstrip("\r\n")
            except TimeoutError:
                raise DemoError(f"nothing came for {seconds} s") from None
            if not line:
                raise DemoError("the IRC server closed the connection")
            if line.startswith("PING"):
                self.command("PONG" + line[4:])
            elif match := _LINE.match(line):
                self._show(match)
                if wanted(match["nick"], match["command"], match["text"]):
                    return match["text"]

    def _show(self, match: re.Match[str]) -> None:
        nick, target, text = match["nick"], match["target"], match["text"]
        if match["command"] == "PRIVMSG" and text.startswith("\x01ACTION"):
            print(f"{target:>9} * {nick} {text[8:].rstrip(chr(1))}", flush=True)
        elif match["command"] == "PRIVMSG":
            print(f"{target:>9} <{nick}> {text}", flush=True)
        elif match["command"] == "NOTICE" and "." not in nick:
            print(f"{target:>9} -{nick}- {text}", flush=True)
        elif match["command"] == "JOIN" and nick != NICK:
            print(f"{target.lstrip(':'):>9} * {nick} joins", flush=True)


def show(status: dict[str, dict[str, str]]) -> None:
    """Hold the conversation."""
    irc = status["irc"]
    word = f"heron-{secrets.token_hex(4)}"
    person = Person(irc["host"], int(irc["port"]), irc["password"])
    operator_password = Path(irc["operator_password_file"]).read_text().strip()
    person.command(f"OPER {irc['operator']} {operator_password}")
    person.wait(lambda _, command, __: command == "381", _JOIN_SECONDS)
    person.command("JOIN #control,#agents")
    person.wait(lambda _, command, text: command == "366" and "#agents" in text, _JOIN_SECONDS)
    print("\nWhat an IRC client saw:\n")
    person.say("#control", "!invoke worker")
    invited = person.wait(lambda nick, command, _: nick == "overseer" and command == "NOTICE", _JOIN_SECONDS)
    agent = invited.split()[0]
    person.wait(lambda nick, command, _: nick == agent and command == "JOIN", _JOIN_SECONDS)
    try:
        write_word(agent, word)
        person.say("#agents", f"{agent}: read the file /tmp/word.txt and tell me the word in it")
        answer = person.wait(lambda nick, _, text: nick == agent and word in text, _ANSWER_SECONDS)
        person.say("#agents", f"{agent}: what is the kernel version of your machine?")
        person.wait(lambda nick, _, text: nick == agent and "cloud-amd64" in text, _ANSWER_SECONDS)
    finally:
        person.say("#control", f"!destroy {agent}")
        person.wait(lambda nick, command, _: nick == "overseer" and command == "NOTICE", _JOIN_SECONDS)
    print(f"\nThe word {word} was written into the agent's machine a moment before; the agent said: {answer}")


def write_word(agent: str, word: str) -> None:
    """Put the word into the agent's machine, as soon as that is there."""
    deadline = time.monotonic() + _JOIN_SECONDS
    while True:
        try:
            fireclaw("exec", agent, "--", "sh", "-c", f"echo {word} > /tmp/word.txt", quiet=True)
        except subprocess.CalledProcessError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)
        else:
            return


def main() -> int:
    """Show it; return the exit status."""
    parser = argparse.ArgumentParser(prog="bin/demo", description=__doc__.partition("\n")[0])
    parser.add_argument("--keep", action="store_true", help="leave Fireclaw running afterwards")
    keep = parser.parse_args().keep
    os.environ["OLLAMA_HOST"] = "127.0.0.1:9"  # the demo shows what comes with Fireclaw, not what else is on this host
    began = time.monotonic()
    try:
        fireclaw("setup")
        fireclaw("up", "--detach")
        status = json.loads(fireclaw("status", "--json"))
        show(status)
    except (DemoError, OSError, subprocess.CalledProcessError) as error:
        print(f"bin/demo: {error}", file=sys.stderr)
        return 1
    finally:
        if not keep:
            fireclaw("down")
    irc = status["irc"]
    print(f"\nDone in {time.monotonic() - began:.0f} s.")
    if keep:
        print(
            "Fireclaw is running. Join with any IRC client:\n"
            f"  server {irc['host']}, port {irc['port']}, password {irc['password']}, no TLS\n"
            f"  e.g. irssi -c {irc['host']} -p {irc['port']} -w {irc['password']} -n {NICK}\n"
            "  /join #agents            and talk: worker: hello\n"
            f"  /oper {irc['operator']} PASSWORD   with the one in {irc['operator_password_file']};\n"
            "                           then /join #control and type !help\n"
            "bin/fireclaw down stops it."
        )
    else:
        print("Everything has been stopped. bin/demo --keep leaves it running, to join with any IRC client.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
