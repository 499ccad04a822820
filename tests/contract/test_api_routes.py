"""The API's routes on a real socket: what it refuses, what it answers, and jobs that several clients watch."""

from __future__ import annotations

import asyncio
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from api_office import Office, served_office

from fireclaw import __version__
from fireclaw.cli.client import Connection
from fireclaw.errors import ConflictError, FireclawError, InvalidError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DOCS = (Path(__file__).parents[2] / "docs/api.md").read_text()


@pytest.fixture
async def office() -> AsyncIterator[Office]:
    """A served API."""
    async with served_office() as office:
        yield office


async def ask(office: Office, method: str, target: str, body: bytes = b"") -> Any:
    """Send a request with the command line's own client and return the answer's JSON."""

    def talk() -> Any:
        with Connection(office.home.socket) as connection:
            connection.send(method, target, body)
            connection.receive_head()
            return connection.read_json()

    return await asyncio.to_thread(talk)


async def watch(office: Office, target: str, body: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Ask for a job; returns the streams after the answer's head."""
    reader, writer = await asyncio.open_unix_connection(office.home.socket)
    writer.write(
        b"POST %b HTTP/1.1\r\nHost: fireclaw\r\nContent-Length: %d\r\n\r\n%b" % (target.encode(), len(body), body)
    )
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


async def next_event(reader: asyncio.StreamReader) -> dict[str, Any]:
    """Read one event, which is one chunk of the answer."""
    size = int(await reader.readline(), 16)
    event: dict[str, Any] = json.loads(await reader.readexactly(size))
    await reader.readline()
    return event


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"argv": ["a\0b"]}, "argv[0]: holds a NUL byte, which no argument, variable or path can hold"),
        ({"argv": ["a"], "env": {"A": "\0"}}, "env.A: holds a NUL byte"),
        ({"argv": ["a"], "env": {"A\0": ""}}, "holds a NUL byte"),
        ({"argv": ["a"], "env": {"A=B": ""}}, "a variable's name must not be empty or hold '='"),
        ({"argv": ["a"], "env": {"": ""}}, "a variable's name must not be empty or hold '='"),
        ({"argv": ["a"], "cwd": "/\0"}, "cwd: holds a NUL byte"),
        ({"argv": ["a"], "user": "\0"}, "user: holds a NUL byte"),
        ({"argv": []}, "argv: List should have at least 1 item"),
        ({"argv": ["a"] * 5000}, "argv: List should have at most 4096 items"),
        ({"argv": [1]}, "argv[0]: must be a string"),
        ({"argv": "ls"}, "argv: must be a valid list"),
        ({"argv": ["a"], "timeout_s": 0}, "timeout_s: must be greater than 0"),
        ({"argv": ["a"], "timeout_s": "5"}, "timeout_s: must be a valid number"),
        ({"argv": ["a"], "image": ""}, "image: String should have at least 1 character"),
        ({"argv": ["a"], "memory": 1}, "memory: Extra inputs are not permitted"),
        ({}, "argv: Field required"),
    ],
)
async def test_run_refuses_what_can_never_work(office: Office, call: dict[str, Any], reason: str) -> None:
    """A bad request is refused before anything starts, with the field and the reason."""
    with pytest.raises(InvalidError) as refused:
        await ask(office, "POST", "/v1/run", json.dumps(call).encode() + b"\n")

    assert reason in refused.value.message
    assert not office.fake.started.is_set()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "ended before its first line"),
        (b"{", "ended before its first line"),
        (b"{\n", "not JSON"),
        (b"[]\n", "not a JSON object"),
        (b"x" * (2 << 20), "a line of over 1048576 bytes"),
    ],
)
async def test_run_refuses_a_bad_first_line(office: Office, body: bytes, reason: str) -> None:
    """A request whose first line is missing, broken or endless is refused."""
    with pytest.raises(InvalidError, match=reason):
        await ask(office, "POST", "/v1/run", body)


@pytest.mark.parametrize(
    ("request_line", "body", "kind", "reason"),
    [
        ("GET /v1/nothing", b"", NotFoundError, "GET /v1/nothing: Not Found"),
        ("DELETE /v1/status", b"", FireclawError, "DELETE /v1/status: Method Not Allowed"),
        ("POST /v1/machines", b"{", InvalidError, "not JSON"),
        ("POST /v1/machines", b'{"name": "a b"}', InvalidError, "name: String should match pattern"),
        ("POST /v1/up", b'{"stay": 1}', InvalidError, "stay: must be a valid boolean"),
        ("POST /v1/prune", b'{"all": true}', InvalidError, "all: Extra inputs are not permitted"),
        ("POST /v1/prune", b" " * 70000, InvalidError, "larger than 65536 bytes"),
        ("DELETE /v1/machines/wrker", b"", NotFoundError, "no machine named 'wrker'"),
    ],
)
async def test_refusals(office: Office, request_line: str, body: bytes, kind: type[FireclawError], reason: str) -> None:
    """Unknown routes, methods, keys and names, and bodies that are too large, each give an error of their kind."""
    method, target = request_line.split()
    with pytest.raises(kind) as refused:
        await ask(office, method, target, body)

    assert reason in refused.value.message


async def test_docs_name_every_route(office: Office) -> None:
    """docs/api.md has a row for each route, and no other."""
    routes = {
        f"{method} {re.sub(r'{name(:path)?}', 'NAME', route.path)}"
        for route in office.api._routes()
        for method in (route.methods or set()) - {"HEAD"}
    }

    assert set(re.findall(r"^\| `((?:GET|POST|DELETE) [^`]+)` \|", DOCS, flags=re.MULTILINE)) == routes


async def test_machines_come_and_go(office: Office) -> None:
    """A named machine is made, listed and removed."""
    made = await ask(office, "POST", "/v1/machines", b'{"name": "box"}')
    listed = await ask(office, "GET", "/v1/machines")
    await ask(office, "DELETE", "/v1/machines/box")

    assert made["name"] == "box"
    assert [machine["name"] for machine in listed["machines"]] == ["worker", "box"]
    assert len((await ask(office, "GET", "/v1/machines"))["machines"]) == 1


async def test_status_has_the_documented_shape(office: Office) -> None:
    """``status`` tells of the daemon, IRC, agents, the model and the machines' driver."""
    assert await ask(office, "GET", "/v1/status") == {
        "daemon": {"pid": os.getpid(), "version": __version__},
        "irc": {
            "host": "127.0.0.1",
            "port": 6667,
            "server": "box.fireclaw.local",
            "password": "pw",
            "operator": "boss",
            "operator_password_file": "/secrets/oper",
        },
        "agents": [{"name": "worker", "template": "worker", "model": "qwen", "state": "idle", "machine": ""}],
        "model": {"provider": "embedded", "name": "qwen", "state": "ready", "detail": ""},
        "vmm": {"kind": "qemu", "accel": "tcg"},
    }
    assert await ask(office, "GET", "/v1/version") == {"version": __version__, "pid": os.getpid()}


async def test_doctor_answers_with_checks(office: Office) -> None:
    """``doctor`` over the API gives the same kind of findings as on the command line."""
    checks = (await ask(office, "GET", "/v1/doctor"))["checks"]

    assert {check["state"] for check in checks} <= {"ok", "warn", "fail"}
    assert {check["name"] for check in checks} >= {"packages", "kvm", "settings", "folders", "disk", "daemon"}


async def test_a_job_outlives_its_watcher_and_is_joined(office: Office) -> None:
    """A job goes on when its first watcher leaves; the next one sees it from the start, in order, to its end."""
    first, leaving = await watch(office, "/v1/setup")
    assert await next_event(first) == {"line": "building"}
    leaving.close()
    await leaving.wait_closed()

    second, writer = await watch(office, "/v1/setup")
    assert await next_event(second) == {"line": "building"}
    office.fake.go_on.set()

    assert [await next_event(second) for _ in range(3)] == [{"line": "packing"}, {"line": "packed"}, {"ready": True}]
    assert office.fake.setups == 1
    writer.close()
    await writer.wait_closed()


async def test_a_job_that_fails_says_why(office: Office) -> None:
    """An error of a job is its last event; the next request starts it anew."""
    office.fake.failure = ConflictError("the port is taken", hint="take another")
    error = {"code": "conflict", "message": "the port is taken", "hint": "take another"}

    for _ in range(2):
        reader, writer = await watch(office, "/v1/up", b'{"stay": true}')
        assert await next_event(reader) == {"error": error}
        assert await reader.readline() == b"0\r\n"
        writer.close()
        await writer.wait_closed()


async def test_up_stays_until_the_daemon_ends(office: Office) -> None:
    """A client that stays is told why the daemon ends."""
    reader, writer = await watch(office, "/v1/up", b'{"stay": true}')
    assert await next_event(reader) == {"line": "the IRC server is ready"}
    assert (await next_event(reader))["ready"] is True

    other, down = await watch(office, "/v1/down")
    assert await next_event(other) == {"line": "stopping"}
    assert await next_event(other) == {"ready": True}
    await office.api.down.wait()
    await office.api.aclose()

    assert await next_event(reader) == {"ended": "down"}
    for stream in (writer, down):
        stream.close()
        await stream.wait_closed()


async def test_garbage_is_refused(office: Office) -> None:
    """Bytes that are not HTTP get a 400, and the API goes on."""
    reader, writer = await asyncio.open_unix_connection(office.home.socket)
    writer.write(os.urandom(64) + b"\r\n\r\n")
    assert (await reader.read()).startswith(b"HTTP/1.1 400")
    writer.close()
    await writer.wait_closed()

    assert (await ask(office, "GET", "/v1/version"))["version"] == __version__
