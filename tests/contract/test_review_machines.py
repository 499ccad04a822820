"""What must not leave a machine behind or stop everybody: found in review, each seen to fail before."""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

import pytest

from fireclaw.daemon.bodies import RunRequest
from fireclaw.daemon.conversation import Conversation
from fireclaw.daemon.office import Office
from fireclaw.daemon.supervisor import DaemonSupervisor
from fireclaw.errors import ChannelLostError, ConflictError, FireclawError, GuestTimeoutError, SetupError
from fireclaw.machines import templates
from fireclaw.machines.calls import Exec
from fireclaw.machines.machine import Machine
from fireclaw.store.ledger import read
from fireclaw.store.machines import MachineRow, MachineState, Purpose, Role
from fireclaw.testing.guest import LocalGuest
from fireclaw.vmm import qemu
from fireclaw.wire.hello import new_magic

if TYPE_CHECKING:
    from collections.abc import Callable

    from fireclaw.daemon.rooms import Rooms


class PipeVm:
    """The one thing that ``Machine.connect`` wants of a VM: its channel."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)

    async def open_channel(self, *, timeout_s: float) -> socket.socket:
        """Give the socket away."""
        del timeout_s
        return self._sock


def a_row() -> MachineRow:
    """A row as a clone has it."""
    return MachineRow(
        machine_id="0" * 32,
        name=None,
        purpose=Purpose.RUN,
        image="",
        runtime="",
        vmm="qemu",
        accel="tcg",
        memory_mib=256,
        vcpus=1,
        state=MachineState.MAKING,
        slot=0,
        magic=new_magic().hex(),
        host_id="",
        epoch=1,
        created_at=0.0,
    )


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - a person would look, too
            await asyncio.sleep(0.02)


async def test_a_clone_that_never_becomes_somebody_is_an_error_of_ours() -> None:
    """Who waits for a clone whose guest went away gets our error, not a group of errors: it can be told to people."""
    ours, theirs = socket.socketpair()
    machine = await Machine.connect(a_row(), PipeVm(ours), hostname="worker")  # type: ignore[arg-type]  # a part of it
    theirs.close()

    with pytest.raises(FireclawError) as caught:
        await machine.settled()

    assert isinstance(caught.value, ChannelLostError)
    await machine.disconnect()


async def test_the_identity_goes_before_whatever_is_sent_next() -> None:
    """A command that is started in the same turn of the loop as the machine follows the identity on the channel."""
    ours, theirs = socket.socketpair()
    with theirs:
        machine = await Machine.connect(a_row(), PipeVm(ours), hostname="box", template=bytes(16))  # type: ignore[arg-type]  # see there
        await machine.start(Exec(["true"]))
        theirs.setblocking(False)
        sent = b""
        async with asyncio.timeout(20):
            while b'"exec"' not in sent:
                sent += await asyncio.get_running_loop().sock_recv(theirs, 65536)
        assert b'"identity"' in sent.partition(b'"exec"')[0]
        await machine.disconnect()


async def test_a_client_that_leaves_while_it_is_told_something_leaves_no_machine(rooms: Rooms) -> None:
    """A client that stopped reading and then left, after its machine was made, takes the machine with it."""
    told = asyncio.Event()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        del message
        told.set()
        await asyncio.Event().wait()

    supervisor = DaemonSupervisor(rooms)
    running = asyncio.create_task(
        supervisor.run(RunRequest(argv=["true"], timeout_s=None), Conversation(receive, send, b""))
    )
    await asyncio.sleep(0)  # it listens now
    rooms.narrator.say("making something")
    await told.wait()
    await until(lambda: [row.state for row in rooms.machines.all()] == [MachineState.RUNNING])

    running.cancel()
    await asyncio.wait([running])

    await until(lambda: rooms.machines.all() == [])


async def test_a_guest_that_breaks_the_protocol_loses_its_machine(rooms: Rooms) -> None:
    """Nobody can speak to such a guest again: its machine ends, the ledger says why, and its name is free."""
    machine = await rooms.machines.create(Purpose.AGENT, name="worker")
    await machine.settled()

    machine.channel.data_received(b"\xff" * 64)

    await until(lambda: rooms.machines.all() == [])
    (died,) = [entry for entry in read(rooms.home.ledger) if entry.type == "machine.died"]
    assert "broke the protocol" in str(died.data["channel"])


async def test_a_machine_without_its_row_is_ended_all_the_same(rooms: Rooms) -> None:
    """A store that refuses to note the end does not keep the VMM alive, and other machines end, too."""
    first = await rooms.machines.create(Purpose.NAMED, name="one")
    second = await rooms.machines.create(Purpose.NAMED, name="two")
    await asyncio.gather(first.settled(), second.settled())
    rooms.machines._rows.remove(first.row.machine_id)

    with pytest.raises(ExceptionGroup):
        await rooms.machines.aclose(keep=False)

    async with asyncio.timeout(5):
        await asyncio.gather(first.vm.wait(), second.vm.wait())
    assert rooms.machines.all() == []


async def test_a_folder_that_cannot_be_made_leaves_no_row(rooms: Rooms) -> None:
    """Where the run folder has vanished (a logout may remove it) the reason is told, and no row keeps the name."""
    await rooms.machines.prepare()
    rooms.home.machines.rmdir()

    with pytest.raises(SetupError, match="cannot make the folder"):
        await rooms.machines.create(Purpose.NAMED, name="worker")

    assert rooms.machines.all() == []
    rooms.home.machines.mkdir()


async def test_a_template_that_hangs_does_not_stop_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that stops answering in the middle of its warm-up is given up in time."""
    monkeypatch.setattr(templates, "BOOT_SECONDS", 0.3)
    monkeypatch.setattr(templates, "_WARM_UP", (Exec(["sleep", "60"]),))
    with LocalGuest() as guest:
        vm = PipeVm(guest.connect())
        with pytest.raises(GuestTimeoutError):
            await asyncio.wait_for(templates._warm_up(vm, new_magic()), 5)  # type: ignore[arg-type]  # a part of it


async def test_two_that_end_a_machine_both_wait_for_its_end(rooms: Rooms) -> None:
    """Whoever destroys a machine that is just ending comes back when it has ended."""
    machine = await rooms.machines.create(Purpose.NAMED, name="worker")
    await machine.settled()

    rooms.machines.end_soon(machine)
    await asyncio.sleep(0)
    await rooms.machines.destroy(machine)

    assert rooms.machines.all() == []


async def test_an_end_goes_on_when_who_asked_for_it_leaves(rooms: Rooms) -> None:
    """A destroy that is cancelled half-way has the machine ended all the same."""
    machine = await rooms.machines.create(Purpose.NAMED, name="worker")
    await machine.settled()

    asking = asyncio.create_task(rooms.machines.destroy(machine))
    await asyncio.sleep(0)
    asking.cancel()

    await until(lambda: rooms.machines.all() == [])


async def test_waiting_for_a_builder_keeps_nobody_from_working(rooms: Rooms) -> None:
    """However many clients wait for a build, other work goes on, and the daemon can end."""
    rooms.images._runtimes.root = rooms.home.data / "none"
    rooms.images._runtimes.root.mkdir()
    held = os.open(rooms.images._runtimes.root / ".lock-runtime", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)

    waiting = [asyncio.create_task(rooms.machines.prepare()) for _ in range(40)]
    try:
        async with asyncio.timeout(5):
            for _ in range(40):
                await asyncio.to_thread(lambda: None)
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
            await asyncio.get_running_loop().shutdown_default_executor()
    finally:
        os.close(held)


async def test_a_model_server_that_died_with_its_daemon_leaves_no_row(rooms: Rooms) -> None:
    """The row of a model server of a killed daemon goes when the next one starts."""
    rooms.gate.rows.plan("00000000", Role.MODEL, "model")
    rooms.gate.rows.start("00000000", pid=2**22, start_time=1, boot_id="of another boot")

    await DaemonSupervisor(rooms).recover()

    assert rooms.gate.rows.all() == []


async def test_a_name_is_free_once_its_machine_began_to_end(rooms: Rooms) -> None:
    """Whoever makes a machine anew under the name of one that is just ending waits for that, and gets it."""
    first = await rooms.machines.create(Purpose.AGENT, name="worker")
    await first.settled()

    rooms.machines.end_soon(first)
    second = await rooms.machines.create(Purpose.AGENT, name="worker")

    assert rooms.machines.get("worker") is second


async def test_dead_machines_do_not_add_up_when_a_daemon_starts(rooms: Rooms, monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines that do not answer cost a starting daemon the time of one of them, and are removed."""
    monkeypatch.setattr(qemu, "_START_S", 1.0)
    for name in ("one", "two", "three"):
        machine = await rooms.machines.create(Purpose.NAMED, name=name)
        await machine.settled()
    await rooms.machines.aclose(keep=True)
    for row in rooms.gate.rows.all():
        assert row.pid is not None
        os.kill(row.pid, signal.SIGSTOP)

    async with asyncio.timeout(2.5):
        removed = await rooms.machines.adopt()

    assert len(removed) == 3
    assert rooms.machines.all() == []
    assert rooms.gate.rows.all() == []


async def test_an_agent_does_not_take_a_persons_machine(rooms: Rooms) -> None:
    """An agent of the same name neither works in a person's machine nor takes it along when it is destroyed."""
    office = Office(rooms)
    machine = await rooms.machines.create(Purpose.NAMED, name="worker")
    await machine.settled()

    with pytest.raises(ConflictError, match="not an agent's"):
        await office.make_machine("id", "worker", office._templates.get("worker"))
    await office.destroy_machine("id", "worker", keep=False)

    assert rooms.machines.get("worker") is machine
