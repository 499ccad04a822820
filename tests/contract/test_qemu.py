"""The VMM contract, on a real QEMU with the real runtime under the software CPU."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import ChannelLostError, ConflictError, SetupError, VmmError
from fireclaw.store.database import Database
from fireclaw.store.machines import ProcessRows
from fireclaw.vmm.base import FIRST_USER, Accel, Cause, MemorySnapshot, Vm, VmSpec
from fireclaw.vmm.host import measure_tsc_khz
from fireclaw.vmm.process import Gate, home_tag
from fireclaw.vmm.qemu import Qemu
from fireclaw.vmm.qmp import Qmp
from fireclaw.wire.hello import EchoFinder, hello, new_magic, new_nonce

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Iterator

    from fireclaw.images.store import Image, Runtime

pytestmark = pytest.mark.timeout(240)

BOOT_S = 120.0  # 3 s on an idle host
MAGIC = new_magic()
TSC_KHZ = measure_tsc_khz()


class Lab:
    """A home of its own, in which machines are made; nothing of them may be left at the end."""

    def __init__(self, folder: Path, runtime: Runtime, image: Image) -> None:
        self.folder = folder
        self.database = Database(folder / "db")
        self.rows = ProcessRows(self.database)
        self.gate = Gate(self.rows, home_tag(folder))
        self._spec = VmSpec(
            machine_id="",
            kernel=runtime.kernel,
            initrd=runtime.initrd,
            root=runtime.root,
            image=image.root,
            memory_mib=256,
            vcpus=1,
            accel=Accel.TCG,
            tsc_khz=TSC_KHZ,
            folder=folder,
            slot=0,
        )
        self._slots = iter(range(1000))

    def spec(self) -> VmSpec:
        """What the next machine is."""
        machine_id = uuid.uuid4().hex[:12]
        folder = self.folder / machine_id
        folder.mkdir(mode=0o700)
        return replace(self._spec, machine_id=machine_id, folder=folder, slot=next(self._slots))

    def leftovers(self) -> object:
        """Whatever is left: processes with our mark, rows, sockets."""
        return self.gate.find_marked(), self.rows.all(), list(self.folder.glob("*/*"))


NOTHING: object = ({}, [], [])


@pytest.fixture(scope="module")
def make_lab(runtime: Runtime, image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Lab]]:
    """Make a home."""
    labs = []

    def make() -> Lab:
        labs.append(Lab(tmp_path_factory.mktemp("lab"), runtime, image))
        return labs[-1]

    yield make
    for lab in labs:
        lab.database.close()


@pytest.fixture
async def lab(make_lab: Callable[[], Lab]) -> AsyncIterator[Lab]:
    """A home that must be empty after the test."""
    lab = make_lab()
    yield lab
    left = lab.leftovers()
    for pid in lab.gate.find_marked():
        os.kill(pid, signal.SIGKILL)
    assert left == NOTHING


@pytest.fixture(scope="module")
def snapshot(make_lab: Callable[[], Lab]) -> Iterator[MemorySnapshot]:
    """A snapshot of a guest that has said hello, made once."""

    async def make() -> MemorySnapshot:
        lab = make_lab()
        vm = await Qemu.boot(lab.spec(), lab.gate, snapshottable=True)
        await greet(vm, BOOT_S)
        snapshot = await vm.snapshot()
        assert (await vm.wait()).cause is Cause.ASKED
        assert lab.leftovers() == NOTHING
        return snapshot

    with asyncio.Runner() as runner:
        snapshot = runner.run(make())
    yield snapshot
    snapshot.close()


async def greet(vm: Vm, seconds: float = 60) -> None:
    """Exchange hellos with the guest."""
    with vm.open_channel() as sock:
        await exchange(sock, seconds)


async def exchange(sock: socket.socket, seconds: float = 60) -> None:
    """Send a hello and read until its echo."""
    loop = asyncio.get_running_loop()
    nonce = new_nonce()
    finder = EchoFinder(MAGIC, nonce)
    async with asyncio.timeout(seconds):
        await loop.sock_sendall(sock, hello(MAGIC, nonce))
        while (data := await loop.sock_recv(sock, 65536)) and finder.feed(data) is None:
            pass
    assert data, "the channel ended"


def owner_of(pid: int) -> int:
    """The user id a process runs under."""
    return Path(f"/proc/{pid}").stat().st_uid


def digest(fd: int) -> str:
    """The digest of a file's bytes."""
    return hashlib.sha256(os.pread(fd, os.fstat(fd).st_size, 0)).hexdigest()


class TestClone:
    """Machines from a snapshot."""

    async def test_clones_run_side_by_side_and_change_nothing(self, lab: Lab, snapshot: MemorySnapshot) -> None:
        """Two clones of one snapshot speak, and its bytes are the same after they have run."""
        before = digest(snapshot.memory), digest(snapshot.state)
        clones = await asyncio.gather(*(Qemu.clone(lab.spec(), lab.gate, snapshot) for _ in range(2)))
        await asyncio.gather(*(greet(clone) for clone in clones))
        assert set(lab.gate.find_marked().values()) == {clone.spec.machine_id for clone in clones}
        endings = await asyncio.gather(*(clone.shutdown() for clone in clones))
        assert [ending.cause for ending in endings] == [Cause.ASKED, Cause.ASKED]
        assert (digest(snapshot.memory), digest(snapshot.state)) == before

    async def test_nobody_can_write_to_a_snapshot(self, snapshot: MemorySnapshot) -> None:
        """Memory and state are sealed, for us as for a VMM that a guest has taken over."""
        for fd in (snapshot.memory, snapshot.state):
            with pytest.raises(PermissionError):
                os.pwrite(fd, b"x", 0)
            with pytest.raises(PermissionError):
                os.ftruncate(fd, 0)

    async def test_a_paused_clone_wakes_with_its_first_bytes_at_hand(self, lab: Lab, snapshot: MemorySnapshot) -> None:
        """What was written to the channel before it runs is answered once it does."""
        clone = await Qemu.clone(lab.spec(), lab.gate, snapshot, paused=True)
        with clone.open_channel() as sock:
            answer = asyncio.create_task(exchange(sock))
            await asyncio.sleep(0)
            await clone.resume()
            await answer
        await clone.shutdown()

    async def test_its_memory_is_shared_until_written(self, lab: Lab, snapshot: MemorySnapshot) -> None:
        """A clone costs far less private memory than its guest has, and its use is told."""
        clone = await Qemu.clone(lab.spec(), lab.gate, snapshot)
        await greet(clone)
        usage = clone.usage()
        await clone.shutdown()
        assert 0 < usage.private_bytes < 100 << 20
        assert usage.private_bytes < usage.resident_bytes
        assert 0 < usage.cpu_seconds < 60
        with pytest.raises(VmmError, match="has ended"):
            clone.usage()

    async def test_a_clone_cannot_become_a_snapshot(self, lab: Lab, snapshot: MemorySnapshot) -> None:
        """A machine whose memory is private says so, and lives on."""
        clone = await Qemu.clone(lab.spec(), lab.gate, snapshot)
        with pytest.raises(ConflictError, match="memory is private"):
            await clone.snapshot()
        await greet(clone)
        await clone.shutdown()

    async def test_a_foreign_state_is_refused_with_the_reason(self, lab: Lab) -> None:
        """A state that is none ends the clone, and the error holds QEMU's status and words."""
        memory, state = (os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC) for name in "ms")
        os.ftruncate(memory, 256 << 20)
        os.write(state, b"no state at all" * 100)
        foreign = MemorySnapshot(memory, state)
        with pytest.raises(VmmError, match=r"QEMU ended with status 1: .*load of migration failed") as caught:
            await Qemu.clone(lab.spec(), lab.gate, foreign)
        assert caught.value.status == 1
        foreign.close()

    async def test_a_cancelled_clone_leaves_nothing(self, lab: Lab, snapshot: MemorySnapshot) -> None:
        """Whoever gives up while a clone is being made need not clean up after it."""
        making = asyncio.create_task(Qemu.clone(lab.spec(), lab.gate, snapshot))
        await asyncio.sleep(0)  # it runs until QEMU has been started, and waits for its first answer
        assert lab.rows.all()
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making


class TestBoot:
    """Machines from a kernel."""

    async def test_a_cold_boot_says_hello(self, lab: Lab) -> None:
        """A machine with private memory boots from the runtime."""
        vm = await Qemu.boot(lab.spec(), lab.gate)
        await greet(vm, BOOT_S)
        await vm.shutdown()

    async def test_a_file_that_is_no_kernel_is_told(self, lab: Lab, tmp_path: Path) -> None:
        """A wrong kernel gives QEMU's own reason, not a machine that hangs."""
        kernel = tmp_path / "kernel"
        kernel.write_bytes(b"no kernel" * 1000)
        with pytest.raises(VmmError, match=r"QEMU ended with status 1: .*kernel"):
            await Qemu.boot(replace(lab.spec(), kernel=kernel), lab.gate)

    async def test_a_missing_file_is_told_before_anything_starts(self, lab: Lab, tmp_path: Path) -> None:
        """The path and the next step are in the error."""
        with pytest.raises(SetupError, match=r"none': No such file.*fireclaw setup"):
            await Qemu.boot(replace(lab.spec(), root=tmp_path / "none"), lab.gate)

    async def test_a_missing_qemu_is_told_with_the_remedy(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without QEMU nothing is started, and the error says how to get it."""
        monkeypatch.setenv("PATH", "/nonexistent")
        with pytest.raises(SetupError, match="apt-get install qemu-system-x86"):
            await Qemu.boot(lab.spec(), lab.gate)

    @pytest.mark.skipif(os.geteuid() != 0, reason="changes user ids")
    async def test_as_root_each_vmm_has_a_user_id_of_its_own(self, lab: Lab, snapshot: MemorySnapshot) -> None:
        """No VMM runs as root or as another's user, and none can reach another's sockets."""
        clones = [await Qemu.clone(lab.spec(), lab.gate, snapshot) for _ in range(2)]
        owners = {clone.spec.slot: owner_of(clone._child.pid) for clone in clones}
        assert owners == {clone.spec.slot: FIRST_USER + clone.spec.slot for clone in clones}
        for clone in clones:
            assert (clone.spec.folder / "ch").stat().st_mode & 0o777 == 0o600
            await greet(clone)
            await clone.shutdown()


class TestConsole:
    """The guest's console."""

    async def test_a_kernel_panic_is_kept_as_evidence(self, lab: Lab) -> None:
        """A guest whose init cannot run ends by itself, and the ending holds what it printed."""
        spec = replace(lab.spec(), cmdline=("rdinit=/none/such", "root=/dev/none", "loglevel=7"))
        vm = await Qemu.boot(spec, lab.gate)
        async with asyncio.timeout(BOOT_S):
            ending = await vm.wait()
        assert ending.cause is Cause.GUEST_RESET
        assert "Kernel panic" in ending.console
        assert "\r" not in ending.console
        assert await vm.console() == ending.console

    async def test_it_is_bounded(self, lab: Lab) -> None:
        """However much a guest prints, the last part of it is there, and no more than 64 KiB is kept."""
        noisy = ("loglevel=8", "ignore_loglevel", "debug", "initcall_debug", "dyndbg=+p")
        vm = await Qemu.boot(replace(lab.spec(), cmdline=noisy), lab.gate)
        await greet(vm, BOOT_S)
        text = await vm.console(limit=100_000)
        assert 32 * 1024 < len(text) <= 64 * 1024
        assert await vm.console(limit=3) == "\n".join(text.split("\n")[-3:])
        assert list(vm.spec.folder.iterdir()) != []
        assert not [file for file in vm.spec.folder.iterdir() if file.is_file()]
        await vm.shutdown()


class TestEnd:
    """How machines end."""

    async def test_a_killed_qemu_is_noticed(self, lab: Lab, snapshot: MemorySnapshot) -> None:
        """Whoever waits for the machine is told, with the signal, and the channel is gone."""
        clone = await Qemu.clone(lab.spec(), lab.gate, snapshot)
        waiting = asyncio.create_task(clone.wait())
        (pid,) = lab.gate.find_marked()
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            ending = await waiting
        assert (ending.cause, ending.status) == (Cause.VMM, -signal.SIGKILL)
        with pytest.raises(ChannelLostError):
            clone.open_channel()
        with pytest.raises(VmmError):
            await clone.pause()
        assert await clone.shutdown() == ending

    async def test_a_stopped_qemu_can_be_ended(self, lab: Lab, snapshot: MemorySnapshot) -> None:
        """A process that answers nothing any more is killed after its grace."""
        clone = await Qemu.clone(lab.spec(), lab.gate, snapshot)
        (pid,) = lab.gate.find_marked()
        os.kill(pid, signal.SIGSTOP)
        ending = await clone.shutdown(grace_s=0.2)
        assert (ending.cause, ending.status) == (Cause.ASKED, -signal.SIGKILL)

    async def test_with_a_grace_it_ends_by_itself(self, lab: Lab, snapshot: MemorySnapshot) -> None:
        """QEMU is asked first, and ends with status 0."""
        clone = await Qemu.clone(lab.spec(), lab.gate, snapshot)
        ending = await clone.shutdown(grace_s=20)
        assert (ending.cause, ending.status) == (Cause.ASKED, 0)

    async def test_pause_and_resume(self, lab: Lab, snapshot: MemorySnapshot) -> None:
        """A paused guest uses no processor and answers nothing; resumed, it answers what it was sent."""
        clone = await Qemu.clone(lab.spec(), lab.gate, snapshot)
        await greet(clone)
        await clone.pause()
        with clone.open_channel() as sock:
            answer = asyncio.create_task(exchange(sock))
            assert (await asyncio.wait({answer}, timeout=0.3))[1] == {answer}
            await clone.resume()
            await answer
        await clone.shutdown()


class TestAdoption:
    """Machines that outlive the daemon."""

    async def test_a_later_daemon_adopts_from_the_row_alone(self, lab: Lab, snapshot: MemorySnapshot) -> None:
        """With nothing but row and folder the machine is held, spoken to, and ended."""
        clone = await Qemu.clone(lab.spec(), lab.gate, snapshot)
        await greet(clone)
        clone.detach()
        (row,) = lab.rows.all()
        child = lab.gate.adopt(row)
        assert child is not None
        adopted = await Qemu.adopt(clone.spec, child)
        await greet(adopted)
        assert "QEMU" not in await adopted.console()
        ending = await adopted.shutdown()
        assert ending.cause is Cause.ASKED

    async def test_a_guest_that_ended_meanwhile_is_told_and_removed(self, lab: Lab) -> None:
        """A machine whose guest ended while no daemon was there is cleaned up, with its last words."""
        spec = replace(lab.spec(), cmdline=("rdinit=/none/such", "root=/dev/none", "loglevel=7"))
        vm = await Qemu.boot(spec, lab.gate)
        vm.detach()
        witness = Qmp(spec.folder / "qmp")
        await witness.execute("qmp_capabilities", timeout_s=30)
        async with asyncio.timeout(BOOT_S):
            assert await witness.watch("SHUTDOWN") is not None
        witness.close()
        (row,) = lab.rows.all()
        child = lab.gate.adopt(row)
        assert child is not None
        with pytest.raises(VmmError, match=r"ended \(shutdown\) while no daemon was there"):
            await Qemu.adopt(spec, child)

    async def test_a_folder_that_is_gone_ends_it(self, lab: Lab, snapshot: MemorySnapshot) -> None:
        """A VMM that can no longer be reached is ended, as nobody could use it."""
        clone = await Qemu.clone(lab.spec(), lab.gate, snapshot)
        clone.detach()
        for file in clone.spec.folder.iterdir():
            file.unlink()
        (row,) = lab.rows.all()
        child = lab.gate.adopt(row)
        assert child is not None
        with pytest.raises(VmmError, match="control socket does not answer"):
            await Qemu.adopt(clone.spec, child)
