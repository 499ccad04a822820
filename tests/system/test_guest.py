"""The guest's own part, on booted machines: the workspace drive, and which channel it serves."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from typing import TYPE_CHECKING

import pytest
from exec_rules import sh

from fireclaw.errors import GuestError, GuestTimeoutError
from fireclaw.images.tool import run
from fireclaw.machines import calls
from fireclaw.machines.calls import Exec
from fireclaw.machines.channel import Channel
from fireclaw.store.database import Database
from fireclaw.store.machines import ProcessRows
from fireclaw.vmm.base import Accel, Cause, Vm, VmSpec
from fireclaw.vmm.host import measure_tsc_khz
from fireclaw.vmm.process import Gate, home_tag
from fireclaw.vmm.qemu import Qemu
from fireclaw.wire.hello import new_magic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from fireclaw.images import Image, Runtime

pytestmark = pytest.mark.timeout(240)

BOOT_S = 120.0  # 3 s on an idle host
MAGIC = new_magic()


class Bench:
    """Where single guests are booted."""

    def __init__(self, folder: Path, runtime: Runtime, image: Image, rows: ProcessRows) -> None:
        self.folder = folder
        self._runtime = runtime
        self._image = image
        self._rows = rows

    @contextlib.asynccontextmanager
    async def booted(self, *, workspace: Path | None = None, cmdline: tuple[str, ...] = ()) -> AsyncIterator[Vm]:
        """A guest that was just started."""
        machine_id = uuid.uuid4().hex[:12]
        folder = self.folder / machine_id
        folder.mkdir(mode=0o700)
        spec = VmSpec(
            machine_id=machine_id,
            kernel=self._runtime.kernel,
            initrd=self._runtime.initrd,
            root=self._runtime.root,
            image=self._image.root,
            workspace=workspace,
            memory_mib=256,
            vcpus=1,
            accel=Accel.TCG,
            tsc_khz=measure_tsc_khz(),
            folder=folder,
            slot=0,
            cmdline=cmdline,
        )
        vm = await Qemu(Gate(self._rows, home_tag(self.folder))).boot(spec)
        try:
            yield vm
        finally:
            await vm.shutdown()


@pytest.fixture
def bench(tmp_path: Path, runtime: Runtime, image: Image) -> Iterator[Bench]:
    """A folder of one's own for it."""
    with contextlib.closing(Database(tmp_path / "db")) as database:
        yield Bench(tmp_path, runtime, image, ProcessRows(database))


async def greet(vm: Vm, seconds: float = BOOT_S) -> Channel:
    """Begin a session."""
    return await Channel.open(await vm.open_channel(timeout_s=seconds), MAGIC, seconds)


async def wait_for_console(vm: Vm, text: str) -> None:
    """Wait until the guest has written this to its console."""
    async with asyncio.timeout(BOOT_S):
        while text not in await vm.console():  # noqa: ASYNC110 - a ring that is read tells nobody
            await asyncio.sleep(0.1)


async def test_the_workspace_outlives_its_machine(bench: Bench) -> None:
    """The agent owns it, nothing on it gives rights, and a shutdown leaves it whole although a command writes on."""
    drive = bench.folder / "workspace"
    run(["mkfs.ext4", "-q", "-F", "-E", "root_owner=1000:1000", drive, "16M"])
    async with bench.booted(workspace=drive) as vm:
        channel = await greet(vm)
        assert (await sh(channel, "ls -d /workspace"))[0] != 0
        await calls.give_identity(channel, "one", MAGIC, workspace=True)
        await calls.give_identity(channel, "one", MAGIC, workspace=True)  # as after a sleep: it is there already

        script = "echo kept > /workspace/file; stat -c '%u %g' /workspace/file; ls /dev; cat /proc/mounts"
        execution = await calls.start(channel, Exec(["sh", "-c", script], user="1000", confined=True))
        said = b"".join([data async for _, data in execution.output()]).decode()
        (mount,) = (line for line in said.splitlines() if " /workspace " in line)
        assert said.startswith("1000 1000\n")
        assert {"ext4", "rw,nosuid,nodev,relatime"} <= set(mount.split())
        assert "vdc\n" not in said

        await calls.start(channel, Exec(["sh", "-c", "while echo on; do :; done > /workspace/open"]))
        await calls.shutdown(channel)
        assert (await vm.wait()).cause is Cause.GUEST_RESET

    run(["e2fsck", "-fn", drive])
    assert "needs_recovery" not in run(["dumpe2fs", "-h", drive])
    assert run(["debugfs", "-R", "cat file", drive]) == "kept\n"


async def test_a_workspace_that_cannot_be_mounted_is_told(bench: Bench) -> None:
    """Without a file system on the drive the identity fails with the reason; guestd goes on."""
    drive = bench.folder / "workspace"
    drive.write_bytes(bytes(1 << 20))
    async with bench.booted(workspace=drive) as vm:
        channel = await greet(vm)
        with pytest.raises(GuestError, match=r"mount /dev/vdc on .*: Invalid argument") as caught:
            await calls.give_identity(channel, "one", MAGIC, workspace=True)
        assert caught.value.errno == 22

        await calls.give_identity(channel, "one", MAGIC)
        assert (await sh(channel, "hostname; ls -d /workspace"))[:2] == (2, b"one\n")
        await channel.aclose()


async def test_on_a_vmm_with_vsock_the_port_is_not_served(bench: Bench) -> None:
    """The kernel's command line says which channel is the host's; the other one answers nobody."""
    async with bench.booted(cmdline=("fireclaw.channel=vsock",)) as vm:
        await wait_for_console(vm, "guestd: ready")
        with pytest.raises(GuestTimeoutError):
            await greet(vm, 1)
