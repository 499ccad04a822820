"""A real ngircd for the contract tests: on a free loopback port, without penalties, ended whatever happens."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fireclaw.irc.ngircd import LOOPBACK, NgircdServer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


def free_port() -> int:
    """A loopback port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def spawn_ngircd(server: NgircdServer, config: Path, wrapper: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start one as the daemon does: in a session of its own, with nothing open but its configuration."""
    fd = os.open(config, os.O_RDONLY)
    try:
        return subprocess.Popen(
            [*wrapper, *server.argv(fd)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[fd],
            start_new_session=True,
        )
    finally:
        os.close(fd)


def uid_of(pid: int) -> int:
    """Whom a process runs as."""
    return Path(f"/proc/{pid}").stat().st_uid


class RunningNgircd:
    """A real ngircd that can be stopped, killed and started again.

    Attributes:
        server: what it runs with.
        config: its configuration file.
    """

    def __init__(self, folder: Path, max_penalty_s: int = 0) -> None:
        self.server = NgircdServer(
            "box.fireclaw.local", free_port(), "server-pass", "oper-pass", max_penalty_s=max_penalty_s
        )
        self.config = folder / "ngircd.conf"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it and wait until it answers."""
        self.server.write_config(self.config)
        self._process = spawn_ngircd(self.server, self.config)
        await self.server.wait_ready(10)

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """End it; return its exit status."""
        assert self._process is not None
        self._process.send_signal(signal_number)
        return self._process.wait(10)

    def freeze(self) -> None:
        """Let it hang, as a half-dead host would."""
        os.kill(self.pid, signal.SIGSTOP)

    def is_running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None


@contextlib.asynccontextmanager
async def running_ngircd(folder: Path, max_penalty_s: int = 0) -> AsyncIterator[RunningNgircd]:
    """Run one; skips the test where ngircd is not installed."""
    if shutil.which("ngircd") is None:
        pytest.skip("ngircd is not installed: apt install ngircd")
    running = RunningNgircd(folder, max_penalty_s)
    await running.start()
    try:
        yield running
    finally:
        if running.is_running():
            running.stop(signal.SIGKILL)
