"""The embedded model server, seen from the daemon: it starts the child (``server.py``), watches it, replaces it.

::

    server = EmbeddedServer(path, entry, context=8192, slots=2, start=gate.start)
    endpoint = await server.ensure()    starts it, or finds it healthy, or replaces it
    ...                                 calls go to endpoint.base_url with endpoint.api_key
    await server.aclose()               closes its stdin, waits, kills, reaps
"""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from fireclaw.errors import ModelError, SetupError
from fireclaw.llm.memory import available_memory
from fireclaw.llm.probe import answers
from fireclaw.llm.server import ServerSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from pathlib import Path

    from fireclaw.llm.catalogue import Entry

ARGV: Final = (sys.executable, "-m", "fireclaw.llm.server")
_LOAD_TIMEOUT_S = 300.0
_HEALTH_TIMEOUT_S = 30.0  # it answers in milliseconds, but the host may be very busy, and a server ended is work lost
_LEAVE_TIMEOUT_S = 2.0
_WATCH_S = 10.0  # between two looks at it while it works


class ServerProcess(Protocol):
    """A child with pipes on stdin and stdout, in its own session; ``asyncio.subprocess.Process`` is one."""

    @property
    def stdin(self) -> asyncio.StreamWriter | None: ...  # noqa: D102
    @property
    def stdout(self) -> asyncio.StreamReader | None: ...  # noqa: D102
    @property
    def pid(self) -> int: ...  # noqa: D102
    @property
    def returncode(self) -> int | None: ...  # noqa: D102
    def kill(self) -> None: ...  # noqa: D102
    async def wait(self) -> int: ...  # noqa: D102


if TYPE_CHECKING:
    StartProcess = Callable[[Sequence[str]], Awaitable[ServerProcess]]


@dataclass(frozen=True)
class Endpoint:
    """Where a model server listens.

    Attributes:
        base_url: its address; of an OpenAI-compatible one up to and with ``/v1``.
        api_key: its key, or an empty string.
    """

    base_url: str
    api_key: str


async def start_process(argv: Sequence[str]) -> ServerProcess:
    """Start the child as a plain process of the caller; what it writes to stderr is dropped."""
    return await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )


class EmbeddedServer:
    """The one model server of this daemon.

    Args:
        path: the model's file.
        entry: what the catalogue says about it.
        context: tokens of context a slot.
        slots: calls served at once.
        start: starts the child; the daemon's process gate, so that a crash leaves nothing behind.
    """

    def __init__(
        self, path: Path, entry: Entry, *, context: int, slots: int, start: StartProcess = start_process
    ) -> None:
        self._path = path
        self._entry = entry
        self._context = min(context, entry.context)
        self._slots = slots
        self._start = start
        self._process: ServerProcess | None = None
        self._endpoint: Endpoint | None = None
        self._lock = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The child's pid while there is one."""
        return self._process.pid if self._process else None

    async def ensure(self) -> Endpoint:
        """Return the endpoint of a healthy server, started or replaced as needed.

        Raises:
            SetupError: the host has too little memory for the model.
            ModelError: the model could not be loaded.
        """
        async with self._lock:
            if self._endpoint and await self._healthy(self._endpoint):
                return self._endpoint
            await self._end()
            self._check_memory()
            return await self._launch()

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """End the server if it stops answering during the body: a call that it works on then fails, and can be retried.

        A server that hangs keeps its connections open, so that a call alone would see it only at its time limit.
        """
        watching = asyncio.create_task(self._watch(), name="watch the model server")
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait([watching])

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            async with self._lock:
                if self._endpoint and not await self._healthy(self._endpoint):
                    await self._end()

    async def aclose(self) -> None:
        """End the server."""
        async with self._lock:
            await self._end()

    def _check_memory(self) -> None:
        need = self._entry.memory_bytes(self._context * self._slots)
        free = available_memory()
        if free < need:
            raise SetupError(
                f"the model {self._entry.name!r} needs {need >> 20} MiB of memory, {free >> 20} MiB are free",
                hint="stop something, choose a smaller model, or set a server elsewhere (model.base_url)",
            )

    async def _launch(self) -> Endpoint:
        key = secrets.token_hex(16)
        settings = ServerSettings(
            str(self._path), key, self._entry.name, self._context, self._slots, self._entry.template
        )
        self._process = process = await self._start(ARGV)
        try:
            answer = await asyncio.wait_for(_introduce(process, settings), _LOAD_TIMEOUT_S)
        except BaseException as error:
            await self._end()
            if isinstance(error, TimeoutError):
                raise ModelError(
                    f"the model server did not load {self._entry.name!r} within {_LOAD_TIMEOUT_S:.0f} s",
                    kind="timeout",
                ) from error
            raise
        if "port" not in answer:
            status = await self._end()
            reason = answer.get("error") or _end_of_process(status)
            raise ModelError(f"the model server cannot load {self._entry.name!r}: {reason}", kind="unreachable")
        self._endpoint = Endpoint(f"http://127.0.0.1:{answer['port']}/v1", key)
        return self._endpoint

    async def _healthy(self, endpoint: Endpoint) -> bool:
        if self._process is None or self._process.returncode is not None:
            return False
        return await answers(endpoint.base_url.removesuffix("/v1"), "/health", seconds=_HEALTH_TIMEOUT_S)

    async def _end(self) -> int:
        """Close the life line, wait, kill, reap; return the exit status."""
        process, self._process, self._endpoint = self._process, None, None
        if process is None:
            return 0
        if process.stdin:
            process.stdin.close()
        try:
            return await asyncio.wait_for(process.wait(), _LEAVE_TIMEOUT_S)
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            return await process.wait()


async def _introduce(process: ServerProcess, settings: ServerSettings) -> dict[str, object]:
    """Give the child its settings and read its one line; an empty answer means that it ended without a word."""
    assert process.stdin
    assert process.stdout
    with suppress(ConnectionError):  # then stdout has ended too
        process.stdin.write(settings.to_line())
        await process.stdin.drain()
    line = await process.stdout.readline()
    return dict(json.loads(line)) if line else {}


def _end_of_process(status: int) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        return f"it was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"it ended with status {status}"
