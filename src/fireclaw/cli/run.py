"""``fireclaw run`` and ``fireclaw exec``: a command in a machine. The hot path: standard library only."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from fireclaw.cli.parser import Parser, seconds
from fireclaw.cli.relay import Relay, Stopped
from fireclaw.cli.start import lost, request
from fireclaw.errors import InvalidError
from fireclaw.paths import Home

if TYPE_CHECKING:
    from collections.abc import Sequence

_SHELL: Final = ("/bin/sh", "-c")

_STATUS: Final = """\
exit status:
  the command's own; 128+N when signal N ended it; 124 when it ran out of time; 126 when it
  cannot be executed, 127 when it is not found; 125 when Fireclaw itself failed."""


def run(arguments: Sequence[str]) -> int:
    """Run a command in a machine of its own, which is gone afterwards."""
    parser = Parser(
        "run",
        "Run a command in a new machine that is destroyed when the command ends.",
        usage="[OPTIONS] 'SHELL COMMAND' | [OPTIONS] -- COMMAND [ARGUMENT...]",
        examples='  fireclaw run "uname -a"\n  fireclaw run --timeout 5 -- sleep 60\n'
        f"  tar c . | fireclaw run -- tar t\n\n{_STATUS}",
    )
    parser.add_argument("--image", metavar="NAME", default="debian", help="the image (default: %(default)s)")
    options = _parse(parser, arguments)
    return _converse("/v1/run", _call(options) | {"image": options.image})


def exec_(arguments: Sequence[str]) -> int:
    """Run a command in a machine that exists."""
    parser = Parser(
        "exec",
        "Run a command in a machine that exists; 'fireclaw ps' lists them.",
        usage="[OPTIONS] NAME 'SHELL COMMAND' | [OPTIONS] NAME -- COMMAND [ARGUMENT...]",
        examples=f'  fireclaw exec worker -- ls -l /home/agent\n  fireclaw exec worker "df -h | tail -1"\n\n{_STATUS}',
    )
    parser.add_argument("name", metavar="NAME", help="the machine's name")
    options = _parse(parser, arguments)
    return _converse(f"/v1/machines/{quote(options.name, safe='')}/exec", _call(options))


def _parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    parser.add_argument(
        "-e",
        "--env",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="set a variable; NAME alone passes yours on",
    )
    parser.add_argument("-w", "--workdir", metavar="FOLDER", help="the working directory")
    parser.add_argument("-u", "--user", metavar="NAME|UID[:GID]", help="the user to run as")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=seconds, help="kill the command after this time (status 124)"
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _call(options: argparse.Namespace) -> dict[str, Any]:
    """Build the request; it holds only what was given."""
    call: dict[str, Any] = {"argv": _argv(options.command), "env": _environment(options.env)}
    given = {"cwd": options.workdir, "user": options.user, "timeout_s": options.timeout}
    return call | {key: value for key, value in given.items() if value is not None}


def _argv(command: Sequence[str]) -> list[str]:
    """Tell the two forms apart: words after ``--`` are the command's own, one lone string is for the shell."""
    if command[:1] == ["--"]:
        argv = list(command[1:])
    elif len(command) == 1:
        argv = [*_SHELL, command[0]]
    else:
        argv = list(command)
    if not argv:
        raise InvalidError("no command given", hint='for example: fireclaw run "uname -a"')
    return argv


def _environment(words: Sequence[str]) -> dict[str, str]:
    """Read NAME=VALUE, or NAME for a variable of our own; one that is not set here is not set there, as in docker."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name:
            raise InvalidError(f"{word!r} is not NAME=VALUE")
        if equals:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
    return found


def _converse(target: str, call: dict[str, Any]) -> int:
    home = Home.find()
    line = json.dumps(call, separators=(",", ":")).encode() + b"\n"
    with request(home, "POST", target, line, more=True) as connection:
        try:
            return Relay(connection).run()
        except Stopped as end:
            return end.status
        except ConnectionError as error:
            raise lost(home) from error
