"""``fireclaw up``, ``down`` and ``status``: the IRC server, the model and the agents, as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import select
from typing import TYPE_CHECKING, Any, Final

from fireclaw.cli.client import remote_error
from fireclaw.cli.parser import Parser
from fireclaw.cli.start import NotRunningError, lost, request
from fireclaw.cli.terminal import clean, print_table, say
from fireclaw.errors import FireclawError
from fireclaw.paths import Home

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fireclaw.cli.client import Connection

_LEAVE_S: Final = 30.0  # for the daemon's process to end after it said that all is down


def up(arguments: Sequence[str]) -> int:
    """Start the IRC server, the model and the agents."""
    parser = Parser(
        "up",
        "Start the IRC server, the model and the agents. Ctrl-C stops everything; with --detach it goes on.",
        examples="  fireclaw up\n  fireclaw up --detach && fireclaw status",
    )
    parser.add_argument("--detach", action="store_true", help="return when all is ready")
    detach = parser.parse_args(arguments).detach
    home = Home.find()
    try:
        return _follow_up(home, detach=detach)
    except KeyboardInterrupt:
        if detach:
            raise
        say("stopping everything; press Ctrl-C again to let it finish by itself")
        return _stop(home)


def down(arguments: Sequence[str]) -> int:
    """Stop everything."""
    parser = Parser("down", "Stop the agents, all machines, the IRC server and the daemon.", examples="  fireclaw down")
    parser.parse_args(arguments)
    home = Home.find()
    if not _has_traces(home):
        say("nothing is running")
        return 0
    return _stop(home)


def _has_traces(home: Home) -> bool:
    """Whether anything may run: a daemon, or what one that was told to detach, or was killed, has left."""
    machines = home.machines.is_dir() and any(home.machines.iterdir())
    return home.socket.exists() or home.irc_place.exists() or machines


def status(arguments: Sequence[str]) -> int:
    """Show what runs."""
    parser = Parser("status", "Show what runs; exit status 1 when there is no daemon.", examples="  fireclaw status")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {"daemon": None, "irc": None, "agents": [], "model": None, "vmm": None}
    with contextlib.suppress(NotRunningError), request(Home.find(), "GET", "/v1/status", start=False) as connection:
        found = connection.read_json()
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print_status(found)
    return 0 if found["daemon"] else 1


def watch(home: Home, target: str, body: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Ask for a job, show its lines on stderr, and yield every other event of it.

    Args:
        home: whose daemon.
        target: the job's path.
        body: its settings.

    Raises:
        FireclawError: the job failed, or the daemon was lost.
    """
    with request(home, "POST", target, json.dumps(body or {}).encode()) as connection:
        for event in _events(home, connection):
            if "line" in event:
                say(event["line"])
            elif "error" in event:
                raise remote_error(event["error"])
            else:
                yield event


def _events(home: Home, connection: Connection) -> Iterator[dict[str, Any]]:
    try:
        yield from connection.read_lines()
    except ConnectionError as error:
        raise lost(home) from error


def _follow_up(home: Home, *, detach: bool) -> int:
    for event in watch(home, "/v1/up", {"stay": not detach}):
        if "ready" in event:
            _print_status(event)
            if not detach:
                say("ready; Ctrl-C stops everything")
        elif event["ended"] == "down":
            say("all was stopped")
        else:
            raise FireclawError("the daemon ended, and machines go on", hint="'fireclaw up' takes them over")
    return 0


def _stop(home: Home) -> int:
    for _ in watch(home, "/v1/down"):
        _wait_gone(home)
    say("all is stopped")
    return 0


def _wait_gone(home: Home) -> None:
    """Wait for the daemon's process to end, so that what follows ``down`` finds no trace of it."""
    try:
        process = os.pidfd_open(int(home.lock.read_text()))
    except (OSError, ValueError):  # it has ended already
        return
    try:
        poll = select.poll()
        poll.register(process, select.POLLIN)
        if not poll.poll(_LEAVE_S * 1000):
            raise FireclawError("everything is stopped, but the daemon does not end", hint=f"see {home.log}")
    finally:
        os.close(process)


def _print_status(found: dict[str, Any]) -> None:
    if found["daemon"] is None:
        print("not running")
        return
    print(f"daemon   pid {found['daemon']['pid']}")
    print(clean(f"machines {found['vmm']['kind']}, accelerated by {found['vmm']['accel']}"))
    model = found["model"]
    detail = f" ({model['detail']})" if model["detail"] else ""
    name = f"{model['name']} from " if model["name"] else ""  # none is chosen before it is needed
    print(clean(f"model    {name}{model['provider']}: {model['state']}{detail}"))
    _print_irc(found["irc"])
    if found["agents"]:
        print()
        columns = ["name", "template", "model", "state", "machine"]
        print_table(columns, [[agent[column] or "-" for column in columns] for agent in found["agents"]])


def _print_irc(irc: dict[str, Any] | None) -> None:
    if irc is None:
        print("irc      not running; 'fireclaw up' starts it")
        return
    print(clean(f"irc      {irc['host']} port {irc['port']}, password {irc['password']}, then /join #agents"))
    print(clean(f"operator /oper {irc['operator']} with the password in {irc['operator_password_file']}"))
