"""Homes of their own for tests that kill, prune and damage: the built files are links, so nobody else loses any."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import shutil
import signal
import sqlite3
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from images_home import built, shared_home

from conftest import Cli, assert_nothing_left, command_line
from fireclaw.cli.start import request
from fireclaw.paths import Home
from fireclaw.vmm.process import home_tag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Found = TypeVar("Found")
_POLL_S = 0.05


@contextmanager
def private_home() -> Iterator[Home]:
    """A home with a short path and the built runtime, image and snapshot; no process of it is left afterwards."""
    runtime, image = built()
    _have_snapshot(runtime.digest, image.digest)
    with _short_home() as home:
        (home.data / "cache").symlink_to(shared_home().data / "cache")
        for source in _built(runtime.digest, image.digest):
            target = home.data / source.relative_to(shared_home().data)
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, copy_function=_link)
            else:
                _link(source, target)
        try:
            yield home
        finally:
            assert_nothing_left(home.data)  # which kills what is, also after a test that failed


@functools.cache
def _have_snapshot(runtime: str, image: str) -> None:
    """Have the shared home's snapshot of these made, so that no private home needs to: that takes a boot."""
    del runtime, image
    with _short_home() as home:
        for name in ("images", "runtimes", "snapshots"):
            source = shared_home().data / name
            source.mkdir(exist_ok=True)
            (home.data / name).symlink_to(source)
        with command_line(home) as cli:
            done = cli("run", "--", "true")
            assert done.returncode == 0, done.stderr.decode()


@contextmanager
def _short_home() -> Iterator[Home]:
    with tempfile.TemporaryDirectory(prefix="fct-") as folder:
        yield Home(Path(folder), Path(folder) / "run", Path(folder))


def _built(runtime: str, image: str) -> Iterator[Path]:
    """What of the shared home machines are made from now; it keeps older ones, too."""
    home = shared_home()
    yield from (home.runtimes / "packages.json", home.runtimes / runtime)
    yield from (home.images / "names.json", home.images / image)
    for manifest in home.snapshots.glob("*/manifest.json"):
        with contextlib.suppress(FileNotFoundError):  # somebody prunes there
            about = json.loads(manifest.read_text()).get("about", {})
            if (about.get("runtime"), about.get("image"), about.get("workspace_bytes")) == (runtime, image, 0):
                yield manifest.parent


def _link(source: str | Path, target: str | Path) -> None:
    """Share a file; the store replaces its files and never changes one."""
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)


def api(home: Home, method: str, target: str, body: bytes = b"") -> Any:
    """Ask the running daemon's API; returns the answer's JSON.

    Raises:
        FireclawError: the daemon's refusal.
    """
    with request(home, method, target, body, start=False) as connection:
        return connection.read_json()


def make_machine(cli: Cli, name: str) -> dict[str, Any]:
    """Make a machine with a name."""
    assert cli("ps").returncode == 0  # which starts the daemon
    made: dict[str, Any] = api(cli.home, "POST", "/v1/machines", b'{"name": "%s"}' % name.encode())
    return made


def vmms(home: Home) -> dict[int, str]:
    """The VMMs of a home that run: machine id by pid."""
    mark = f"fireclaw-{home_tag(home.data)}-".encode()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it ended while we looked
            found |= {int(entry.name): word.removeprefix(mark).decode() for word in words if word.startswith(mark)}
    return found


def rows(home: Home, query: str) -> list[tuple[Any, ...]]:
    """Ask the store behind the daemon's back, or change it."""
    with sqlite3.connect(home.database, timeout=10) as connection:
        found = connection.execute(query).fetchall()
    connection.close()
    return found


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal a process, and wait until it has ended."""
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, number)
        poll = select.poll()
        poll.register(process, select.POLLIN)
        assert poll.poll(30_000), f"process {pid} does not end"
    finally:
        os.close(process)


def until(look: Callable[[], Found], what: str, *, seconds: float = 30.0) -> Found:
    """Look again and again until there is something to see, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(_POLL_S)
    return found
