"""The daemon's HTTP API, version 1: routes over a supervisor. Served on a unix socket; see docs/api.md.

A ``Supervisor`` does the work; this module checks what clients send, turns errors into answers and streams what
takes long. ``POST /v1/run`` and ``…/exec`` are conversations (fireclaw.daemon.conversation), ``up``, ``down``,
``setup``, ``vmms/firecracker`` and ``models/NAME/pull`` are jobs (fireclaw.daemon.job), the rest is plain JSON. The
routes of memories and models are modules of their own (fireclaw.daemon.memory_api, models_api). An error is
``{"error": {"code": …, "message": …, "hint": …}}``.
"""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fireclaw import __version__
from fireclaw.daemon.bodies import CreateRequest, Empty, ExecRequest, InstallRequest, RunRequest, UpRequest, check_body
from fireclaw.daemon.conversation import ConversationResponse, error_object, internal_error, read_call
from fireclaw.daemon.doctor import run_checks
from fireclaw.daemon.job import Job
from fireclaw.daemon.memory_api import memory_routes
from fireclaw.daemon.models_api import model_routes
from fireclaw.errors import FireclawError, InvalidError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.types import Receive, Scope, Send

    from fireclaw.agents.memory import Memory
    from fireclaw.daemon.bodies import Exit, MachineInfo, Status
    from fireclaw.daemon.conversation import Conversation
    from fireclaw.daemon.job import Say
    from fireclaw.llm.gateway import Gateway
    from fireclaw.paths import Home
    from fireclaw.store.spending import Spending

_BODY_MAX: Final = 1 << 16  # bytes of a JSON body; a conversation's first line has a limit of its own
_STATUS: Final = {
    "invalid": 400,
    "not-found": 404,
    "conflict": 409,
    "setup": 503,
    "closing": 503,
    "machine": 502,
    "vmm": 502,
    "channel-lost": 502,
    "guest": 502,
    "guest-timeout": 504,
    "model": 502,
    "budget": 502,
    "irc": 502,
}


class Supervisor(Protocol):
    """What the API needs done. Every method may raise a FireclawError, which reaches the client as it is."""

    @property
    def busy(self) -> bool:
        """Whether something needs the daemon beyond its open requests: ``up``, agents, named machines."""

    @property
    def gateway(self) -> Gateway:
        """The way to models."""

    @property
    def spending(self) -> Spending:
        """What models cost."""

    def memory(self, name: str) -> Memory:
        """What an agent remembers."""

    def reload(self) -> None:
        """Read the templates of agents anew."""

    async def run(self, request: RunRequest, talk: Conversation) -> Exit:
        """Run a command in a new machine. However it ends, cancelled included, the machine is gone then."""

    async def exec(self, name: str, request: ExecRequest, talk: Conversation) -> Exit:
        """Run a command in a machine that exists. Cancelled: the command is killed, the machine stays."""

    async def machines(self) -> list[MachineInfo]:
        """List the machines."""

    async def create(self, request: CreateRequest) -> MachineInfo:
        """Make a machine with a name."""

    async def remove(self, name: str) -> None:
        """Destroy a machine with a name."""

    async def prune(self) -> list[str]:
        """Remove what nobody owns; names what went."""

    async def up(self, say: Say) -> None:
        """Start IRC, the model and the agents, and return when all is ready; keeps the daemon from then on."""

    async def down(self, say: Say) -> None:
        """Stop everything, machines and IRC server included; the daemon ends afterwards."""

    async def setup(self, say: Say) -> None:
        """Build the runtime and the default image, and fetch the model."""

    async def install_firecracker(self, file: Path | None, say: Say) -> None:
        """Install the pinned release, from a file or from upstream."""

    async def status(self) -> Status:
        """Tell what runs."""


class ClosingError(FireclawError):
    """The daemon is ending and begins nothing new."""

    code = "closing"


class Api:
    """The ASGI application.

    Attributes:
        active: how many requests are open now.
        last_used: when one last ended, by the loop's clock.
        down: set once everything was stopped and the daemon is to end.
    """

    def __init__(self, supervisor: Supervisor, home: Home) -> None:
        self.active = 0
        self.last_used = asyncio.get_running_loop().time()
        self.down = asyncio.Event()
        self._supervisor = supervisor
        self._home = home
        self._closing = asyncio.Event()
        self._jobs: dict[str, Job] = {}
        self._app = Starlette(
            routes=self._routes(),
            exception_handlers={
                FireclawError: _answer_error,
                HTTPException: _answer_http_error,
                ClientDisconnect: _answer_nobody,
                Exception: _answer_mistake,
            },
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        self.active += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.active -= 1
            self.last_used = asyncio.get_running_loop().time()

    @property
    def needed(self) -> bool:
        """Whether anybody needs the daemon now."""
        working = any(job.running for job in self._jobs.values())
        return bool(self.active) or working or self._supervisor.busy

    async def aclose(self) -> None:
        """End open conversations and jobs; each client is told."""
        self._closing.set()
        for job in self._jobs.values():
            await job.aclose()

    def _routes(self) -> list[Route]:
        return [
            Route("/v1/run", self._run, methods=["POST"]),
            Route("/v1/machines", self._list_machines, methods=["GET"]),
            Route("/v1/machines", self._create, methods=["POST"]),
            Route("/v1/machines/{name:path}", self._remove, methods=["DELETE"]),
            Route("/v1/machines/{name:path}/exec", self._exec, methods=["POST"]),
            Route("/v1/prune", self._prune, methods=["POST"]),
            Route("/v1/up", self._up, methods=["POST"]),
            Route("/v1/down", self._stop, methods=["POST"]),
            Route("/v1/setup", self._setup, methods=["POST"]),
            Route("/v1/vmms/firecracker", self._install_firecracker, methods=["POST"]),
            Route("/v1/status", self._status, methods=["GET"]),
            Route("/v1/doctor", self._doctor, methods=["GET"]),
            Route("/v1/version", self._version, methods=["GET"]),
            *memory_routes(self._supervisor.memory),
            *model_routes(self._supervisor.gateway, self._supervisor.spending, self._job),
        ]

    async def _run(self, request: Request) -> Response:
        call, rest = await read_call(request.receive)
        body = check_body(RunRequest, call)
        self._check_open()
        return ConversationResponse(lambda talk: self._supervisor.run(body, talk), rest, self._closing)

    async def _exec(self, request: Request) -> Response:
        call, rest = await read_call(request.receive)
        body = check_body(ExecRequest, call)
        name = request.path_params["name"]
        self._check_open()
        return ConversationResponse(lambda talk: self._supervisor.exec(name, body, talk), rest, self._closing)

    async def _list_machines(self, request: Request) -> Response:  # noqa: ARG002 - the form of an endpoint
        return JSONResponse({"machines": [asdict(machine) for machine in await self._supervisor.machines()]})

    async def _create(self, request: Request) -> Response:
        body = check_body(CreateRequest, await _read_json(request))
        return JSONResponse(asdict(await self._supervisor.create(body)))

    async def _remove(self, request: Request) -> Response:
        await self._supervisor.remove(request.path_params["name"])
        return JSONResponse({})

    async def _prune(self, request: Request) -> Response:
        check_body(Empty, await _read_json(request))
        return JSONResponse({"removed": await self._supervisor.prune()})

    async def _up(self, request: Request) -> Response:
        body = check_body(UpRequest, await _read_json(request))
        job = self._job("up", self._start_office)
        return _stream(self._stay(job) if body.stay else job.follow())

    async def _stop(self, request: Request) -> Response:
        check_body(Empty, await _read_json(request))
        return _stream(self._job("down", self._stop_office).follow())

    async def _setup(self, request: Request) -> Response:
        check_body(Empty, await _read_json(request))
        return _stream(self._job("setup", self._set_up).follow())

    async def _install_firecracker(self, request: Request) -> Response:
        file = check_body(InstallRequest, await _read_json(request)).file

        async def work(say: Say) -> dict[str, Any]:
            await self._supervisor.install_firecracker(None if file is None else Path(file), say)
            return {}

        return _stream(self._job(f"install {file or 'firecracker'}", work).follow())

    async def _status(self, request: Request) -> Response:  # noqa: ARG002
        return JSONResponse(await self._describe())

    async def _doctor(self, request: Request) -> Response:  # noqa: ARG002
        checks = await asyncio.to_thread(run_checks, self._home)
        return JSONResponse({"checks": [asdict(check) for check in checks]})

    async def _version(self, request: Request) -> Response:  # noqa: ARG002
        return JSONResponse({"version": __version__, "pid": os.getpid()})

    def _job(self, name: str, work: Callable[[Say], Awaitable[dict[str, Any]]]) -> Job:
        """Start the job, or join the one that runs."""
        self._check_open()
        job = self._jobs.get(name)
        if job is None or not job.running:
            job = self._jobs[name] = Job(name, work)
        return job

    def _check_open(self) -> None:
        """Refuse new work once the daemon ends; the client turns to the next daemon (fireclaw.cli.start)."""
        if self._closing.is_set():
            raise ClosingError("the daemon is ending")

    async def _start_office(self, say: Say) -> dict[str, Any]:
        await self._supervisor.up(say)
        return await self._describe()

    async def _stop_office(self, say: Say) -> dict[str, Any]:
        await self._supervisor.down(say)
        self.down.set()
        return {}

    async def _set_up(self, say: Say) -> dict[str, Any]:
        await self._supervisor.setup(say)
        return {}

    async def _stay(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        """Follow ``up``, then wait for the daemon's end and say whether it was meant."""
        async for event in job.follow():
            yield event
            if "error" in event:
                return
        await self._closing.wait()
        yield {"ended": "down" if self.down.is_set() else "detached"}

    async def _describe(self) -> dict[str, Any]:
        status = asdict(await self._supervisor.status())
        return {"daemon": {"pid": os.getpid(), "version": __version__}} | status


async def _read_json(request: Request) -> Any:
    """Read a JSON body; none is an empty object."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _BODY_MAX:
            raise InvalidError(f"the request's body is larger than {_BODY_MAX} bytes")
    try:
        return json.loads(body or b"{}")
    except ValueError as error:
        raise InvalidError(f"the request's body is not JSON: {error}") from error


def _stream(events: AsyncIterator[dict[str, Any]]) -> Response:
    async def lines() -> AsyncIterator[bytes]:
        async for event in events:
            yield json.dumps(event).encode() + b"\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def _refuse(error: FireclawError, status: int) -> Response:
    return JSONResponse({"error": error_object(error)}, status_code=status, headers={"connection": "close"})


async def _answer_error(request: Request, error: Exception) -> Response:  # noqa: ARG001 - the form of a handler
    assert isinstance(error, FireclawError)
    return _refuse(error, _STATUS.get(error.code, 500))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path}"
    kind = NotFoundError if error.status_code == 404 else InvalidError
    return _refuse(kind(f"{what}: {error.detail}", hint="docs/api.md lists the routes"), error.status_code)


async def _answer_nobody(request: Request, error: Exception) -> Response:  # noqa: ARG001
    """The client left in the middle of its request; nothing reaches it."""
    return Response(status_code=400)


async def _answer_mistake(request: Request, error: Exception) -> Response:  # noqa: ARG001
    """Answer; starlette raises it again, and uvicorn logs the traceback."""
    return _refuse(internal_error(error), 500)
