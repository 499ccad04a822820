"""An open office for tests of talk: a home, a scripted model on a server of somebody else, ``fireclaw up``."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
import time
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from conftest import Cli, assert_nothing_left
from images_home import built, shared_home
from talk_ii import Ii
from talk_model import ModelServer

from fireclaw.paths import Home

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fireclaw.store.ledger import Entry
    from fireclaw.testing.scripted_model import Rule

_POLL_S = 0.05
Found = TypeVar("Found")


class Office:
    """What a test of talk works with.

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
        """The entries of the ledger of a type whose data say this; dots in names are written as ``__``."""
        wanted = {name.replace("__", "."): value for name, value in data.items()}
        return [
            entry
            for entry in self.cli.ledger()
            if entry.type == type_ and wanted.items() <= dict(entry.data).items()
        ]

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
        with closing(sqlite3.connect(self.home.database)) as store:
            found = store.execute("SELECT pid FROM processes WHERE role LIKE ? AND state = 'started'", (role,))
            return [pid for (pid,) in found]


@contextmanager
def short_home(shares: Sequence[str]) -> Iterator[Home]:
    """A home of its own: short, so that socket paths fit; it shares these folders with all tests."""
    built()
    base = Path(tempfile.mkdtemp(prefix="fct-"))
    shared = shared_home().data
    for name in shares:
        (shared / name).mkdir(exist_ok=True)
        (base / name).symlink_to(shared / name)
    try:
        yield Home(base, base / "run", base)
        assert_nothing_left(base)
    finally:
        shutil.rmtree(base)


@contextmanager
def furnished(
    rules: Sequence[Rule],
    *,
    key: str = "key",
    shares: Sequence[str] = ("images", "runtimes", "snapshots"),
    **environment: str,
) -> Iterator[Office]:
    """An office that is not open yet; everything is down afterwards.

    Args:
        rules: what its model says.
        key: the model server's.
        shares: the folders that its home shares with those of all tests.
        environment: what the daemon finds in its environment.
    """
    with tempfile.TemporaryDirectory(prefix="fct-talk-") as folder, short_home(shares) as home:
        with ModelServer(Path(folder), rules, key=key) as model:
            cli = Cli(home)
            cli.env |= environment
            home.config_file.write_text(
                f'[model]\nbase_url = "{model.base_url}"\napi_key_file = "{model.key_file}"\n\n[machine]\naccel = "tcg"\n'
            )
            try:
                yield Office(cli, model, Path(folder))
            finally:
                done = cli("down")
            assert done.returncode == 0, done.stderr.decode()
            logs = "".join(path.read_text() for path in sorted(home.data.glob("daemon.log*"), reverse=True))
            assert "Traceback" not in logs, logs


def until(look: Callable[[], Found], what: str, *, seconds: float = 30.0) -> Found:
    """Look again and again until there is something to see, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(_POLL_S)
    return found
