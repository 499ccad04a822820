"""A supervisor without machines, for tests of the API, the daemon's process and the command line.

Its "commands" are the methods of ``_Commands``, e.g. ``cat``. Run as a script, this file is a daemon.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager, closing
from typing import TYPE_CHECKING

from fireclaw.daemon.bodies import AgentStatus, Exit, IrcStatus, MachineInfo, ModelStatus, Status, VmmStatus
from fireclaw.daemon.process import main
from fireclaw.errors import FireclawError, MachineError, NotFoundError
from fireclaw.llm.gateway import Gateway
from fireclaw.llm.settings import ModelSettings
from fireclaw.store.database import Database
from fireclaw.store.hosts import open_host
from fireclaw.store.spending import Spending
from fireclaw.wire.frames import FrameReader, Kind, pack, pack_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fireclaw.agents.memory import Memory
    from fireclaw.config import Config
    from fireclaw.daemon.bodies import CreateRequest, ExecRequest, RunRequest
    from fireclaw.daemon.conversation import Conversation
    from fireclaw.daemon.job import Say
    from fireclaw.paths import Home


class FakeSupervisor:
    """Does what the API asks for without a machine.

    Attributes:
        started: a command has begun.
        cancelled: a command was cancelled, and has tidied up.
        go_on: what ``setup`` waits for between its lines.
        stalled: ``flood`` could not send for half a second.
        received: input bytes that commands have read.
        busy: as in the protocol.
        failure: what ``up`` raises.
        setups: how often ``setup`` was asked for.
        gateway: as in the protocol; never started.
        spending: as in the protocol; nothing was spent.
    """

    def __init__(self, home: Home) -> None:
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.go_on = asyncio.Event()
        self.stalled = asyncio.Event()
        self.received = 0
        self.busy = False
        self.failure: FireclawError | None = None
        self.setups = 0
        self._store = Database(home.data / "fake.db")
        self.gateway = Gateway(ModelSettings(), lambda *_: None, models=home.models)
        self.spending = Spending(self._store, open_host(self._store))
        self._names: dict[str, str] = {"worker": "debian"}

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def memory(self, name: str) -> Memory:
        """Know of nobody."""
        raise NotFoundError.named("agent", name, [])

    def reload(self) -> None:
        """Have no templates."""

    async def run(self, request: RunRequest, talk: Conversation) -> Exit:
        """Run one of ``_Commands``."""
        if request.image != "debian":
            raise NotFoundError.named("image", request.image, ["debian"])
        return await self._do(request, talk)

    async def exec(self, name: str, request: ExecRequest, talk: Conversation) -> Exit:
        """Run one of ``_Commands``."""
        if name not in self._names:
            raise NotFoundError.named("machine", name, self._names)
        return await self._do(request, talk)

    async def _do(self, request: ExecRequest, talk: Conversation) -> Exit:
        self.started.set()
        try:
            async with asyncio.timeout(request.timeout_s):
                command = getattr(_Commands(self, talk), request.argv[0].replace("/bin/", ""))
                found = await command(request)
                assert isinstance(found, Exit)
                return found
        except TimeoutError:
            return Exit(137, timed_out=True)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def machines(self) -> list[MachineInfo]:
        """List what was created."""
        return [
            MachineInfo("0123456789abcdef", name, "named", image, "running", "qemu", "tcg", 256, 0.0)
            for name, image in self._names.items()
        ]

    async def create(self, request: CreateRequest) -> MachineInfo:
        """Remember a name."""
        self._names[request.name] = request.image
        return (await self.machines())[-1]

    async def remove(self, name: str) -> None:
        """Forget a name."""
        if self._names.pop(name, None) is None:
            raise NotFoundError.named("machine", name, self._names)

    async def prune(self) -> list[str]:
        """Name two things, one of them with a terminal escape."""
        return ["machine 12", "build tmp-\x1b[31mred"]

    async def up(self, say: Say) -> None:
        """Be busy from now on."""
        if self.failure is not None:
            raise self.failure
        say("the IRC server is ready")
        self.busy = True

    async def down(self, say: Say) -> None:
        """Say one line."""
        say("stopping")

    async def setup(self, say: Say) -> None:
        """Say three lines, with a wait after the first."""
        self.setups += 1
        say("building")
        await self.go_on.wait()
        await asyncio.to_thread(say, "packing")  # from a thread, as builders do
        say("packed")

    async def install_firecracker(self, file: Path | None, say: Say) -> None:
        """Name the file."""
        say(f"installed from {file}")

    async def status(self) -> Status:
        """Tell of an office that runs."""
        return Status(
            IrcStatus("127.0.0.1", 6667, "box.fireclaw.local", "pw", "boss", "/secrets/oper"),
            [AgentStatus("worker", "worker", "qwen", "idle", "")],
            ModelStatus("embedded", "qwen", "ready"),
            VmmStatus("qemu", "tcg"),
        )


class _Commands:
    def __init__(self, fake: FakeSupervisor, talk: Conversation) -> None:
        self._fake = fake
        self._talk = talk

    async def _frames(self) -> AsyncIterator[tuple[Kind, bytes]]:
        reader = FrameReader()
        while data := await self._talk.receive():
            self._fake.received += len(data)
            for frame in reader.feed(data):
                yield frame

    async def cat(self, request: ExecRequest) -> Exit:  # noqa: ARG002 - one form for all commands
        async for kind, payload in self._frames():
            if kind is Kind.STDIN:
                await self._talk.send(pack(Kind.STDOUT, payload))
            elif kind is Kind.STDIN_CLOSED:
                return Exit(0)
        raise MachineError("the client's frames ended before its input did")

    async def show(self, request: ExecRequest) -> Exit:
        values = {
            "argv": request.argv,
            "env": request.env,
            "cwd": request.cwd,
            "user": request.user,
            "timeout_s": request.timeout_s,
        }
        await self._talk.send(pack_json(Kind.STDOUT, values))
        return Exit(0)

    async def sh(self, request: ExecRequest) -> Exit:
        return await self.show(request)

    async def both(self, request: ExecRequest) -> Exit:  # noqa: ARG002
        await self._talk.note("software only")
        await self._talk.send(pack(Kind.STDOUT, b"out\x00\xff") + pack(Kind.STDERR, b"err\xfe"))
        return Exit(42)

    async def missing(self, request: ExecRequest) -> Exit:
        return Exit(127, reason=f"{request.argv[0]}: no such file or directory")

    async def wait(self, request: ExecRequest) -> Exit:  # noqa: ARG002
        await self._talk.send(pack(Kind.STDOUT, b"waiting\n"))
        async for kind, payload in self._frames():
            if kind is Kind.SIGNAL:
                await self._talk.send(pack(Kind.STDOUT, b"bye\n"))
                return Exit(128 + json.loads(payload)["signal"])
        raise MachineError("the client's frames ended")

    async def stubborn(self, request: ExecRequest) -> Exit:  # noqa: ARG002
        await self._talk.send(pack(Kind.STDOUT, b"waiting\n"))
        async for kind, _ in self._frames():
            if kind is Kind.SIGNAL:
                await self._talk.send(pack(Kind.STDOUT, b"no\n"))
        raise MachineError("the client's frames ended")

    async def deaf(self, request: ExecRequest) -> Exit:  # noqa: ARG002
        await asyncio.Event().wait()
        raise AssertionError

    async def flood(self, request: ExecRequest) -> Exit:  # noqa: ARG002
        while True:
            try:
                async with asyncio.timeout(0.5):
                    await self._talk.send(pack(Kind.STDOUT, b"y\n" * 16384))
            except TimeoutError:
                self._fake.stalled.set()
                await asyncio.Event().wait()

    async def bug(self, request: ExecRequest) -> Exit:  # noqa: ARG002
        raise ValueError("a bug")

    async def crash(self, request: ExecRequest) -> Exit:  # noqa: ARG002
        await self._talk.send(pack(Kind.STDOUT, b"half"))
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


@asynccontextmanager
async def open_fake(home: Home, config: Config) -> AsyncIterator[FakeSupervisor]:  # noqa: ARG001
    """Stand in for ``open_supervisor``."""
    home.database.touch()
    with closing(FakeSupervisor(home)) as fake:
        yield fake


if __name__ == "__main__":
    sys.exit(main(open_fake))
