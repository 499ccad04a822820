"""Homes, a served API, and the real command line as a process, for the tests of both."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import signal
import socket
import sys
import tempfile
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from api_fake import FakeSupervisor

from fireclaw.daemon.api import Api
from fireclaw.daemon.server import ApiServer
from fireclaw.paths import Home

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator, Iterator

PIPE = asyncio.subprocess.PIPE
FAKE_DAEMON = Path(__file__).with_name("api_fake.py")


class CommandLine:
    """The real command line on one home.

    Args:
        home: whose FIRECLAW_HOME it gets.
        words: what comes before the verb.
    """

    def __init__(self, home: Home, *words: str) -> None:
        self.home = home
        self._words = words or ("-m", "fireclaw")

    async def start(
        self,
        *words: str | bytes,
        stdin: int = PIPE,
        stdout: int = PIPE,
        env: dict[str, str] | None = None,
        shell: str = 'exec "$@"',
    ) -> Process:
        """Start ``fireclaw`` with these words; ``shell`` may redirect or limit it first."""
        command = (sys.executable, *self._words, *words)
        return await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            shell,
            "sh",
            *command,
            stdin=stdin,
            stdout=stdout,
            stderr=PIPE,
            env=os.environ | {"FIRECLAW_HOME": str(self.home.data)} | (env or {}),
        )

    async def call(
        self, *words: str | bytes, stdin: bytes = b"", env: dict[str, str] | None = None, shell: str = 'exec "$@"'
    ) -> tuple[int, bytes, str]:
        """Run ``fireclaw`` to its end: status, stdout, stderr."""
        process = await self.start(*words, env=env, shell=shell)
        out, err = await process.communicate(stdin)
        assert process.returncode is not None
        return process.returncode, out, err.decode(errors="backslashreplace")


class Office(CommandLine):
    """A command line whose API is served by this process."""

    def __init__(self, home: Home, fake: FakeSupervisor, api: Api) -> None:
        super().__init__(home)
        self.fake = fake
        self.api = api


@contextmanager
def short_home() -> Iterator[Home]:
    """Yield a home with a short path, as unix sockets need."""
    with tempfile.TemporaryDirectory(prefix="fc", dir="/tmp") as folder:
        yield Home(Path(folder), Path(folder) / "run", Path(folder))


@asynccontextmanager
async def served_office() -> AsyncIterator[Office]:
    """Serve an API over a fake supervisor."""
    with short_home() as home, socket.socket(socket.AF_UNIX) as listener:
        home.make()
        listener.bind(str(home.socket))
        listener.listen()
        fake = FakeSupervisor(home)
        api = Api(fake, home)
        server = ApiServer(api, listener)
        await server.start()
        try:
            yield Office(home, fake, api)
        finally:
            await api.aclose()
            await server.aclose()
            fake.close()


@contextmanager
def startable_home() -> Iterator[CommandLine]:
    """Yield a command line that starts fake daemons; the one that is left in the end is stopped."""
    start = (
        "import sys; from fireclaw.cli import main, start;"
        f"start.DAEMON = (sys.executable, {str(FAKE_DAEMON)!r}); sys.exit(main())"
    )
    with short_home() as home:
        try:
            yield CommandLine(home, "-c", start)
        finally:
            if pid := daemon_pid(home):
                stop_process(pid)


def daemon_pid(home: Home) -> int | None:
    """Return the pid of the daemon that holds the home's lock."""
    with contextlib.suppress(FileNotFoundError), home.lock.open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(home.lock.read_text())
    return None


def stop_process(pid: int, number: int = signal.SIGTERM) -> None:
    """Signal a process that is not our child and wait for its end."""
    process = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(process, number)
        poll = select.poll()
        poll.register(process, select.POLLIN)
        assert poll.poll(10_000), f"process {pid} does not end"
    finally:
        os.close(process)
