"""The QMP client against scripted ends of a real unix socket."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from fireclaw.errors import VmmError
from fireclaw.vmm.qmp import Qmp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path


class Peer:
    """QEMU's end, driven by the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.socket = socket.socket()

    def accept(self) -> None:
        """Take the connection that is waiting."""
        self.socket.close()
        self.socket, _ = self.listener.accept()

    async def read(self) -> dict[str, Any]:
        """Read the next command; they are short enough to come in one piece."""
        self.socket.setblocking(False)
        data = await asyncio.get_running_loop().sock_recv(self.socket, 65536)
        command = json.loads(data)
        assert isinstance(command, dict)
        return command

    def send(self, *messages: object) -> None:
        """Send messages in one piece."""
        self.socket.sendall(b"".join(json.dumps(message).encode() + b"\r\n" for message in messages))

    def close(self) -> None:
        """Hang up."""
        self.socket.close()
        self.listener.close()


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    """A socket that listens."""
    peer = Peer(tmp_path / "qmp")
    yield peer
    peer.close()


@pytest.fixture
async def qmp(peer: Peer) -> AsyncIterator[Qmp]:
    """A client that is connected to the peer."""
    qmp = Qmp(peer.path)
    peer.accept()
    yield qmp
    qmp.close()


async def test_an_answer_goes_to_the_command_of_its_id(qmp: Qmp, peer: Peer) -> None:
    """Two commands in flight get their own answers, whatever the order, with the greeting and events between."""
    first = asyncio.create_task(qmp.execute("query-status", timeout_s=5))
    one = await peer.read()
    second = asyncio.create_task(qmp.execute("block_resize", timeout_s=5, node_name="n"))
    two = await peer.read()
    assert two == {"execute": "block_resize", "arguments": {"node-name": "n"}, "id": two["id"]}
    peer.send(
        {"QMP": {"version": {}}},
        {"return": "second", "id": two["id"]},
        {"event": "STOP", "data": {}},
        {"return": "first", "id": one["id"]},
    )
    assert await first == "first"
    assert await second == "second"


async def test_a_refusal_tells_command_and_reason(qmp: Qmp, peer: Peer) -> None:
    """QEMU's own words reach the caller."""
    task = asyncio.create_task(qmp.execute("cont", timeout_s=5))
    command = await peer.read()
    peer.send({"error": {"class": "GenericError", "desc": "no such thing"}, "id": command["id"]})
    with pytest.raises(VmmError, match="QEMU refused 'cont': no such thing"):
        await task


async def test_a_descriptor_travels_with_its_command(qmp: Qmp, peer: Peer) -> None:
    """The peer receives a working copy of the descriptor."""
    reader, writer = os.pipe()
    task = asyncio.create_task(qmp.execute("getfd", timeout_s=5, fd=writer, fdname="x"))
    await asyncio.sleep(0)  # the command is on its way
    data, fds, _, _ = socket.recv_fds(peer.socket, 65536, 4)
    os.close(writer)
    os.write(fds[0], b"through")
    assert os.read(reader, 100) == b"through"
    os.close(fds[0])
    os.close(reader)
    peer.send({"return": {}, "id": json.loads(data)["id"]})
    assert await task == {}


async def test_silence_has_a_limit(qmp: Qmp, peer: Peer) -> None:
    """A QEMU that hangs is told from one that answers; a late answer does no harm."""
    with pytest.raises(VmmError, match=r"did not answer 'stop' within 0.01 s"):
        await qmp.execute("stop", timeout_s=0.01)
    late = await peer.read()
    peer.send({"return": {}, "id": late["id"]})
    task = asyncio.create_task(qmp.execute("cont", timeout_s=5))
    peer.send({"return": "fresh", "id": (await peer.read())["id"]})
    assert await task == "fresh"


async def test_the_end_of_the_connection_fails_what_waits(qmp: Qmp, peer: Peer) -> None:
    """Commands fail, watchers get None, and later commands are refused at once."""
    event = qmp.watch("SHUTDOWN")
    task = asyncio.create_task(qmp.execute("quit", timeout_s=5))
    await peer.read()
    peer.socket.close()
    with pytest.raises(VmmError, match="ended the connection during 'quit'"):
        await task
    assert await event is None
    assert await qmp.watch("SHUTDOWN") is None
    assert not qmp.connected
    with pytest.raises(VmmError, match="'cont' cannot be asked"):
        await qmp.execute("cont", timeout_s=5)


async def test_an_event_in_the_same_piece_as_the_answer_is_not_missed(qmp: Qmp, peer: Peer) -> None:
    """Who watches before the command sees the event that follows at once, and only one that matches."""
    done = qmp.watch("MIGRATION", lambda data: data["status"] == "completed")
    task = asyncio.create_task(qmp.execute("migrate-incoming", timeout_s=5))
    command = await peer.read()
    peer.send(
        {"return": {}, "id": command["id"]},
        {"event": "RESUME"},
        {"event": "MIGRATION", "data": {"status": "active"}},
        {"event": "MIGRATION", "data": {"status": "completed"}},
    )
    await task
    assert await done == {"status": "completed"}


@pytest.mark.parametrize("nonsense", [b"no json\n", b"[1, 2]\n", b"\xff\xfe\n", b"x" * (5 << 20)])
async def test_nonsense_ends_the_connection(qmp: Qmp, peer: Peer, nonsense: bytes) -> None:
    """A QEMU that a guest has taken over costs bounded memory and a clear end."""
    event = qmp.watch("SHUTDOWN")
    sending = asyncio.create_task(asyncio.to_thread(_send_until_closed, peer.socket, nonsense))
    assert await event is None
    assert not qmp.connected
    await sending


def _send_until_closed(sock: socket.socket, data: bytes) -> None:
    try:
        sock.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        return


async def test_a_peer_that_does_not_read_is_given_up(qmp: Qmp) -> None:
    """A full socket is an error, not a wait without end."""
    with suppress(BlockingIOError):
        while True:
            qmp._socket.send(b"x" * 65536)
    with pytest.raises(VmmError, match="does not take 'cont'"):
        await qmp.execute("cont", timeout_s=5)


async def test_nobody_there_is_an_oserror(tmp_path: Path) -> None:
    """A socket that is missing is told by the usual exception."""
    with pytest.raises(FileNotFoundError):
        Qmp(tmp_path / "none")
