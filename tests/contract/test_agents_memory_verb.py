"""``fireclaw memory`` against its routes on a real socket."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from starlette.applications import Starlette

from fireclaw.agents.memory import Memory
from fireclaw.cli.memory import memory
from fireclaw.daemon.api import _answer_error
from fireclaw.daemon.memory_api import memory_routes
from fireclaw.daemon.server import ApiServer
from fireclaw.errors import ConflictError, FireclawError, InvalidError, NotFoundError
from fireclaw.store.database import Database
from fireclaw.store.memory import MemoryRows

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

DM = "alice!~a@localhost"


@pytest.fixture
async def ada(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Memory]:
    """The memory of an agent, with its routes served in a home that the command line finds."""
    with tempfile.TemporaryDirectory(prefix="fct-", dir="/tmp") as folder:
        monkeypatch.setenv("FIRECLAW_HOME", folder)
        database = Database(Path(folder) / "fireclaw.db")
        found = Memory(MemoryRows(database), "ada", lambda: 0.0)

        def find(name: str) -> Memory:
            if name != "ada":
                raise NotFoundError.named("agent", name, ["ada"])
            return found

        (Path(folder) / "run").mkdir()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{folder}/run/api.sock")
        server = ApiServer(
            Starlette(routes=memory_routes(find), exception_handlers={FireclawError: _answer_error}), listener
        )
        await server.start()
        yield found
        await server.aclose()
        database.close()


async def run(*arguments: str) -> int:
    """Run the verb, as a process of its own would."""
    return await asyncio.to_thread(memory, arguments)


async def feed(monkeypatch: pytest.MonkeyPatch, data: bytes, *arguments: str) -> int:
    """Run the verb with something on its standard input."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    return await run(*arguments)


async def test_a_memory_is_shown_changed_and_restored(
    ada: Memory, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a person writes holds, the log has all versions, and an older one comes back."""
    assert await run("ada") == 0
    assert capfd.readouterr().err == "fireclaw: nothing is remembered here\n"
    assert await feed(monkeypatch, b"one\n", "ada", "edit") == 0
    assert await feed(monkeypatch, b"one\ntwo \x1b[31m\n", "ada", "edit") == 0
    assert ada.text("") == "one\ntwo \x1b[31m"
    capfd.readouterr()
    assert await run("ada", "show") == 0
    assert capfd.readouterr().out == "one\ntwo \\x1b[31m\n"
    assert await run("ada", "diff") == 0
    assert capfd.readouterr().out.splitlines()[-2:] == [" one", "+two \\x1b[31m"]
    assert await run("ada", "restore", "1") == 0
    assert ada.text("") == "one"
    assert await run("ada", "log") == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["VERSION", "3", "2", "1"]
    assert lines[1].endswith("operator  3           restored version 1")
    assert await run("ada", "diff", "1", "3", "--json") == 0
    assert json.loads(capfd.readouterr().out) == {"diff": ""}


async def test_private_talks_are_apart(ada: Memory, capfd: pytest.CaptureFixture[str]) -> None:
    """The shared memory tells that there are others; each is shown by the name of its talk."""
    ada.write(DM, "a secret", by="ada", reason="asked by alice")
    assert await run("ada") == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert DM in err
    assert await run("ada", "--private", DM) == 0
    assert capfd.readouterr().out == "a secret\n"


async def test_a_wrong_wish_is_refused(ada: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown agent or version, a text too long, what is no text: each is refused, and nothing changes."""
    ada.write("", "one", by="ada", reason="x")
    with pytest.raises(NotFoundError, match="did you mean 'ada'"):
        await run("adda")
    with pytest.raises(NotFoundError, match="no version 7"):
        await run("ada", "restore", "7")
    with pytest.raises(ConflictError, match="says that already"):
        await run("ada", "restore", "1")
    with pytest.raises(InvalidError, match="2000 characters at most"):
        await feed(monkeypatch, b"x" * 3000, "ada", "edit")
    with pytest.raises(InvalidError, match="not UTF-8"):
        await feed(monkeypatch, b"\xff", "ada", "edit")
    with pytest.raises(InvalidError, match="another number of versions"):
        await run("ada", "restore")
    assert ada.text("") == "one"


async def test_a_change_meanwhile_is_not_lost(
    ada: Memory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What the agent saved while a person's editor was open is not written over."""
    ada.write("", "one", by="ada", reason="x")
    changed = tmp_path / "editor"
    changed.write_text('#!/bin/sh\necho mine > "$1"\n')
    changed.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(changed))
    terminal = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdin", terminal)
    assert await run("ada", "edit") == 0
    assert ada.text("") == "mine"
    loop = asyncio.get_running_loop()

    async def save() -> None:
        ada.write("", "two", by="ada", reason="x")

    def edit_slowly(content: str) -> str:
        asyncio.run_coroutine_threadsafe(save(), loop).result()
        return content + "!"

    monkeypatch.setattr("fireclaw.cli.memory._edited", edit_slowly)
    with pytest.raises(FireclawError, match="changed meanwhile"):
        await run("ada", "edit")
    assert ada.text("") == "two"
    capfd.readouterr()
