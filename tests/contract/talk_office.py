"""An office for tests of talk: a home, a scripted model on a server of somebody else, people with IRC clients."""

from __future__ import annotations

import tempfile
import time
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine_home import private_home, rows, until
from talk_ii import Ii
from talk_model import ModelServer

from conftest import command_line

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from conftest import Cli
    from fireclaw.paths import Home
    from fireclaw.store.ledger import Entry
    from fireclaw.testing.scripted_model import Rule


class Office:
    """What a test of talk works with.

    ::

        with furnished([Rule("hello there", user="hello")]) as office:
            office.cli("up", "--detach")
            with office.person("ann") as ann:
                ...

    Attributes:
        cli: the command line on its home.
        model: the model server.
        folder: for files of the test.
    """

    def __init__(self, cli: Cli, model: ModelServer, folder: Path) -> None:
        self.cli = cli
        self.model = model
        self.folder = folder

    @property
    def home(self) -> Home:
        """Its home."""
        return self.cli.home

    @cached_property
    def irc(self) -> dict[str, Any]:
        """What a person needs to join; stays the same over a restart of the daemon."""
        irc: dict[str, Any] = self.cli.json("status", "--json")["irc"]
        return irc

    def person(self, nick: str) -> Ii:
        """A person with a client of somebody else, connected."""
        return Ii(self.folder / f"ii-{nick}-{time.monotonic_ns()}", self.irc, nick)

    def entries(self, type_: str, **data: object) -> list[Entry]:
        """The entries of the ledger of a type whose data say this; a dot in a name is written as ``__``."""
        wanted = {name.replace("__", "."): value for name, value in data.items()}
        return [entry for entry in self.cli.ledger() if entry.type == type_ and wanted.items() <= entry.data.items()]

    def entry(self, type_: str, **data: object) -> Entry:
        """The only entry like that."""
        (entry,) = self.entries(type_, **data)
        return entry

    def machine_of(self, agent: str) -> str:
        """The id of an agent's machine; waits until it has one."""

        def look() -> str:
            agents = self.cli.json("status", "--json")["agents"]
            return next(str(each["machine"]) for each in agents if each["name"] == agent)

        return until(look, f"{agent} has a machine", seconds=60)

    def children(self, role: str = "%") -> list[int]:
        """The processes that the daemon made: all, or those of a role (``vmm``, ``ngircd``)."""
        query = f"SELECT pid FROM processes WHERE role LIKE '{role}' AND state = 'started'"
        return [pid for (pid,) in rows(self.home, query)]


@contextmanager
def furnished(rules: Sequence[Rule], *, key: str = "key", **environment: str) -> Iterator[Office]:
    """An office that is not open yet; everything is down afterwards, and the daemon's logs tell of no mistake.

    Args:
        rules: what its model says.
        key: the model server's.
        environment: what the daemon finds in its environment.
    """
    with (
        tempfile.TemporaryDirectory(prefix="fct-talk-") as folder,
        private_home() as home,
        ModelServer(Path(folder), rules, key=key) as model,
    ):
        home.config_file.write_text(
            f'[machine]\naccel = "tcg"\n\n[model]\nbase_url = "{model.base_url}"\napi_key_file = "{model.key_file}"\n'
        )
        with command_line(home) as cli:
            cli.env |= environment
            yield Office(cli, model, Path(folder))
        logs = "".join(path.read_text() for path in home.data.glob("daemon.log*"))
        assert "Traceback" not in logs, logs
