"""A QEMU that its guest has taken over may say anything: found in review, each seen to fail before."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from fireclaw.errors import VmmError
from fireclaw.store.database import Database
from fireclaw.store.machines import ProcessRows, Role
from fireclaw.vmm.base import Accel, VmSpec
from fireclaw.vmm.process import Child, Gate
from fireclaw.vmm.qemu import Qemu
from fireclaw.vmm.qmp import Qmp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

# Answers the first command as QEMU does, and every other one with what it was given; "%d" stands for the id.
_LIAR = """
import json, socket, sys
connection, _ = socket.socket(fileno=int(sys.argv[1])).accept()
said = '{"return": {}, "id": %d}'
for line in connection.makefile():
    connection.sendall((said % json.loads(line)["id"] + "\\n").encode())
    said = "[" * 100_000 + "%d" if sys.argv[2] == "deep" else sys.argv[2]
"""


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Where processes are made, with a store of its own."""
    database = Database(tmp_path / "db")
    yield Gate(ProcessRows(database), "review00")
    database.close()


@pytest.fixture
async def lie(tmp_path: Path, gate: Gate) -> AsyncIterator[Callable[[str], Child]]:
    """Start a liar that listens as QEMU does; whatever happens, the loop must have had no exception to report."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    children = []

    def start(said: str) -> Child:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tmp_path / "qmp"))
            listener.listen()
            argv = [sys.executable, "-c", _LIAR, str(listener.fileno()), said]
            children.append(gate.start(argv, role=Role.VMM, owner_id="one", fds=[listener.fileno()]))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        await child.wait()
    assert reported == []


def a_spec(folder: Path, file: Path) -> VmSpec:
    """A machine whose files are all the same one."""
    return VmSpec(
        machine_id="0" * 12,
        kernel=file,
        initrd=file,
        root=file,
        image=file,
        memory_mib=96,
        vcpus=1,
        accel=Accel.TCG,
        tsc_khz=0,
        folder=folder,
        slot=0,
    )


@pytest.mark.parametrize("said", ["deep", '{"return": {}, "id": [%d]}', '{"event": {}, "x": %d}'])
async def test_nonsense_never_reaches_the_loop(tmp_path: Path, lie: Callable[[str], Child], said: str) -> None:
    """Whatever QEMU says, a command ends with our error, and nothing is thrown past everybody into the loop."""
    lie(said)
    qmp = Qmp(tmp_path / "qmp")
    await qmp.execute("qmp_capabilities", timeout_s=10)

    with pytest.raises(VmmError):
        await qmp.execute("stop", timeout_s=0.5)

    qmp.close()


@pytest.mark.parametrize("said", ["[]", '{"status": ["running"]}', "7", "{}"])
async def test_an_adopted_qemu_that_lies_is_ended(
    tmp_path: Path, gate: Gate, lie: Callable[[str], Child], said: str
) -> None:
    """A daemon that starts is not stopped by one bad QEMU: that one ends, with an error of ours."""
    child = lie(f'{{"return": {said}, "id": %d}}')

    with pytest.raises(VmmError, match="ended"):
        await Qemu(gate).adopt(a_spec(tmp_path, Path("/nonexistent")), child)

    assert not child.running
