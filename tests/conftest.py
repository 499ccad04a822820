"""What all rings share: the images built once, a home of its own for each test, the command line, leak checks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import vm_report
from images_home import built, shared_home

from fireclaw.config import Config, MachineConfig
from fireclaw.daemon.rooms import open_rooms
from fireclaw.paths import Home
from fireclaw.store.ledger import read
from fireclaw.vmm.firecracker.vm import Firecracker, FirecrackerVm
from fireclaw.vmm.process import home_tag
from fireclaw.vmm.qemu import Qemu, QemuVm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

    from fireclaw.daemon.rooms import Rooms
    from fireclaw.images import Image, Runtime
    from fireclaw.store.ledger import Entry

# Their assertions, too, tell what they saw.
pytest.register_assert_rewrite("exec_rules", "vm_accidents", "vm_fixtures", "vm_rules", "vm_subjects")

# Guests that were really started by this run; printed at its end.
guests: Counter[str] = Counter()


@pytest.fixture(scope="session")
def images() -> tuple[Runtime, Image]:
    """The real runtime and the real debian image."""
    return built()


@pytest.fixture(scope="session")
def runtime(images: tuple[Runtime, Image]) -> Runtime:
    """The real runtime."""
    return images[0]


@pytest.fixture(scope="session")
def image(images: tuple[Runtime, Image]) -> Image:
    """The real debian image."""
    return images[1]


@pytest.fixture(scope="session", autouse=True)
def _leave_nothing() -> Iterator[None]:
    """After a whole run the host has no mount, network interface or temporary folder of ours that it had not before."""
    before = find_traces()
    yield
    assert find_traces() - before == set()


@pytest.fixture(scope="session", autouse=True)
def _count_guests() -> Iterator[None]:
    """Count the guests that tests start in this process, by the only two ways there are."""
    with pytest.MonkeyPatch.context() as patch:
        for starts, method, name in (
            (Qemu, "boot", "boot"),
            (QemuVm, "load", "clone"),
            (Firecracker, "boot", "boot"),
            (FirecrackerVm, "load", "clone"),
        ):
            patch.setattr(starts, method, _counted(getattr(starts, method), name))
        yield


def _counted(start: Callable[..., Awaitable[Any]], name: str) -> Callable[..., Awaitable[Any]]:
    async def counted(*args: Any, **kwargs: Any) -> Any:
        started = await start(*args, **kwargs)
        if not _is_fake(started or args[0]):
            guests[name] += 1
        return started

    return counted


def _is_fake(vm: QemuVm | FirecrackerVm) -> bool:
    """Whether a VMM is a program of ``fireclaw.testing``: those are in Python."""
    try:
        return Path(f"/proc/{vm._child.pid}/exe").readlink().name.startswith("python")
    except FileNotFoundError:  # it has ended already
        return False


def pytest_configure(config: pytest.Config) -> None:
    """Make our marks known."""
    vm_report.register_marker(config)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have no rule run on a VMM that lacks what it needs."""
    vm_report.mark_unmet(items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was not run, and how much of it was real, and add it to what the other rings of this run had."""
    for line in vm_report.report_lines(terminalreporter.stats):
        terminalreporter.write_line(line)
    booted, cloned = guests["boot"], guests["clone"]
    terminalreporter.write_line(f"guests: {booted} really booted, {cloned} really cloned")
    if path := os.environ.get("FIRECLAW_TEST_GUESTS"):
        with Path(path).open("a") as file:
            file.write(f"{booted} {cloned}\n")


@pytest.fixture
def home(images: tuple[Runtime, Image]) -> Iterator[Home]:
    """A home of its own: short, so that socket paths fit, with the shared images and snapshots."""
    del images
    base = Path(tempfile.mkdtemp(prefix="fct-"))
    shared = shared_home().data
    for name in ("images", "runtimes", "snapshots"):
        (shared / name).mkdir(exist_ok=True)
        (base / name).symlink_to(shared / name)
    yield Home(base, base / "run", base)
    try:
        assert_nothing_left(base)
    finally:
        shutil.rmtree(base)


@pytest.fixture
async def rooms(home: Home) -> AsyncIterator[Rooms]:
    """The daemon's rooms, opened in this process."""
    home.make()
    async with open_rooms(home, Config(machine=MachineConfig(accel="tcg"))) as rooms:
        await rooms.machines.adopt()
        yield rooms
        await rooms.machines.aclose(keep=False)


class Cli:
    """The command line on one home, as a person types it.

    Attributes:
        home: its home.
        env: its environment.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        # No Ollama, were there one on this host: it would serve in the place of the model that a test names.
        quiet = {"FIRECLAW_IRC_PORT": "0", "OLLAMA_HOST": "127.0.0.1:9"}
        self.env = {**os.environ, "FIRECLAW_HOME": str(home.data), **quiet}

    def __call__(
        self, *arguments: str, stdin: bytes | None = b"", timeout: float = 120
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a verb to its end."""
        return subprocess.run(
            self.argv(*arguments), input=stdin, env=self.env, capture_output=True, timeout=timeout, check=False
        )

    def argv(self, *arguments: str) -> Sequence[str]:
        """The command that runs a verb."""
        return [sys.executable, "-m", "fireclaw", *arguments]

    def start(self, *arguments: str, **more: Any) -> subprocess.Popen[bytes]:
        """Start a verb."""
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.argv(*arguments), env=self.env, **{"stdin": pipe, "stdout": pipe, "stderr": pipe, **more}
        )

    def json(self, *arguments: str) -> Any:
        """Run a verb that prints JSON."""
        done = self(*arguments)
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    def ledger(self) -> list[Entry]:
        """What the ledger holds."""
        return list(read(self.home.ledger))

    @property
    def daemon_pid(self) -> int:
        """The pid of the daemon that holds the lock."""
        return int(self.home.lock.read_text())


@contextmanager
def command_line(home: Home) -> Iterator[Cli]:
    """The command line on a home; everything is down afterwards, and nothing of a machine is left."""
    cli = Cli(home)
    try:
        yield cli
    finally:
        done = cli("down")
    assert done.returncode == 0, done.stderr.decode()
    if home.ledger.exists():
        for entry in cli.ledger():
            if entry.type == "machine.made":
                guests[str(entry.data["how"])] += 1
    assert leftovers(home) == []


def leftovers(home: Home) -> list[Path]:
    """What machines left in the run folder: folders of theirs, and any socket."""
    found = list(home.machines.iterdir()) if home.machines.exists() else []
    return found + [path for path in home.run.rglob("*") if path.is_socket()]


@pytest.fixture
def cli(home: Home) -> Iterator[Cli]:
    """The command line on this test's home."""
    with command_line(home) as cli:
        yield cli


def find_traces() -> set[str]:
    """Mount points, network interfaces, and temporary folders and files with names of ours."""
    mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    places = (Path(tempfile.gettempdir()), Path("/dev/shm"))
    names = {str(path) for place in places for path in place.iterdir() if path.name.startswith(("fct-", "fireclaw"))}
    return mounts | names | {f"interface {path.name}" for path in Path("/sys/class/net").iterdir()}


def assert_nothing_left(base: Path) -> None:
    """No process knows this home any more; processes that are just ending get a moment."""
    deadline = time.monotonic() + 5
    while (left := find_users(base)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == {}


def find_users(base: Path) -> dict[int, str]:
    """Processes that have something to do with a home, by command line, environment or open files."""
    marks = os.fsencode(base), f"fireclaw-{home_tag(base)}-".encode()  # a VMM's files may lie in the shared home
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
            facts = [command, (entry / "environ").read_bytes()]
            facts += [os.fsencode(link.readlink()) for link in (entry / "fd").iterdir()]
        except OSError:
            continue  # it ended while we looked
        if any(mark in fact for fact in facts for mark in marks):
            found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")[:200]
    return found
