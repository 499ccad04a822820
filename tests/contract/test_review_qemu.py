"""A QEMU that its guest has taken over may say anything: found in review, each seen to fail before."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from review_limits import descriptors, few_descriptors

from fireclaw.errors import FireclawError, VmmError
from fireclaw.store.database import Database
from fireclaw.store.machines import ProcessRows, Role
from fireclaw.vmm.base import Accel, VmSpec
from fireclaw.vmm.process import Child, Gate
from fireclaw.vmm.qemu import Qemu
from fireclaw.vmm.qmp import Qmp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

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
async def lie(tmp_path: Path) -> AsyncIterator[Callable[[str], Child]]:
    """Start a liar that listens as QEMU does; whatever happens, the loop must have had no exception to report."""
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    database = Database(tmp_path / "db")
    gate = Gate(ProcessRows(database), "review00")
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
    database.close()
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
async def test_an_adopted_qemu_that_lies_is_ended(tmp_path: Path, lie: Callable[[str], Child], said: str) -> None:
    """A daemon that starts is not stopped by one bad QEMU: that one ends, with an error of ours."""
    child = lie(f'{{"return": {said}, "id": %d}}')

    with pytest.raises(VmmError, match="ended"):
        await Qemu.adopt(a_spec(tmp_path, Path("/nonexistent")), child)

    assert not child.running


def sockets(folder: Path) -> list[Path]:
    """The sockets in a folder."""
    return [path for path in folder.iterdir() if path.is_socket()]


@pytest.mark.parametrize("more", range(1, 14))
async def test_a_host_without_descriptors_is_told(tmp_path: Path, more: int) -> None:
    """Wherever in its start a VMM runs out of descriptors, the error is ours, and nothing is left."""
    file = tmp_path / "file"
    file.touch()
    database = Database(tmp_path / "db")
    rows = ProcessRows(database)
    before = descriptors()

    with few_descriptors(more), pytest.raises(FireclawError):
        await Qemu.boot(a_spec(tmp_path, file), Gate(rows, "review00"), snapshottable=True)

    assert descriptors() == before
    assert rows.all() == []
    assert sockets(tmp_path) == []
    database.close()
