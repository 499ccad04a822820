"""The VMM contract on QEMU with the real runtime, on the software CPU or on KVM, and what only QEMU has.

``FIRECLAW_TEST_ACCEL=kvm`` asks for KVM.
"""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from exec_rules import *  # noqa: F403 - the suite, over a clone
from vm_accidents import *  # noqa: F403 - the suite
from vm_fixtures import *  # noqa: F403 - the suite's
from vm_fixtures import BOOT_S, CHANNEL_S, running
from vm_rules import *  # noqa: F403 - the suite
from vm_subjects import Control, Fate, Lab, Need, Subject, doom_by_cmdline, make_memfd

from fireclaw.errors import GuestTimeoutError, SetupError, VmmError
from fireclaw.machines.channel import Channel
from fireclaw.vmm.base import Accel, MemorySnapshot
from fireclaw.vmm.qemu import Qemu
from fireclaw.vmm.qmp import Qmp

if TYPE_CHECKING:
    from pathlib import Path

    from fireclaw.machines.snapshots import Snapshot

_ACCEL = Accel(os.environ.get("FIRECLAW_TEST_ACCEL", Accel.TCG))
_LACKS = {
    Need.JAIL: "QEMU is given open files instead of paths, and needs none",
    Need.CGROUP: "QEMU has the limits of its daemon",
}

SUBJECTS = [
    Subject(
        name=f"QEMU on {_ACCEL.upper()}",
        make=lambda lab: Qemu(lab.gate),
        doom=doom_by_cmdline,
        control=Control(Qmp, "execute"),
        accel=_ACCEL,
        lacks=_LACKS if os.geteuid() == 0 else _LACKS | {Need.USER: "the tests do not run as root"},
    )
]


class TestQemu:
    """What only QEMU has."""

    async def test_with_a_grace_it_ends_by_itself(self, lab: Lab, template: Snapshot) -> None:
        """QEMU is asked first, and ends with status 0; without a grace it is killed."""
        clone = await lab.vmm.clone(lab.spec(), template.memory)
        assert (await clone.shutdown(grace_s=20)).status == 0
        clone = await lab.vmm.clone(lab.spec(), template.memory)
        assert (await clone.shutdown()).status == -signal.SIGKILL

    async def test_a_paused_clone_wakes_with_its_first_bytes_at_hand(self, lab: Lab, template: Snapshot) -> None:
        """What is written to a clone that stands still does not wake it, and is answered once it runs."""
        async with running(lab, template) as clone:
            for _ in range(2):
                await clone.pause()
                channel = await Channel.begin(await clone.open_channel(timeout_s=CHANNEL_S), template.magic)
                before = clone.usage().cpu_seconds
                with pytest.raises(GuestTimeoutError):
                    await channel.wait_ready(0.2)
                assert clone.usage().cpu_seconds - before <= 0.05
                await clone.resume()
                await channel.wait_ready(CHANNEL_S)
                await channel.aclose()

    async def test_a_foreign_state_is_told_in_its_words(self, lab: Lab) -> None:
        """The error of a clone that did not come to be holds QEMU's status and last words."""
        foreign = MemorySnapshot(make_memfd(b"", lab.spec().memory_mib << 20), make_memfd(b"no state" * 100, 800))
        foreign.seal()
        with pytest.raises(VmmError, match=r"QEMU ended with status 1: .*load of migration failed") as caught:
            await lab.vmm.clone(lab.spec(), foreign)
        assert caught.value.status == 1
        foreign.close()

    async def test_a_file_that_is_no_kernel_is_told_in_its_words(self, lab: Lab, tmp_path: Path) -> None:
        """QEMU's own reason is in the error."""
        kernel = tmp_path / "kernel"
        await asyncio.to_thread(kernel.write_bytes, b"no kernel" * 1000)
        with pytest.raises(VmmError, match=r"QEMU ended with status 1: .*kernel"):
            await lab.vmm.boot(replace(lab.spec(), kernel=kernel))

    async def test_a_missing_qemu_is_told_with_the_remedy(self, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without QEMU nothing is started, and the error says how to get it."""
        monkeypatch.setenv("PATH", "/nonexistent")
        with pytest.raises(SetupError, match="apt-get install qemu-system-x86"):
            await lab.vmm.boot(lab.spec())

    async def test_its_sockets_are_ours_alone(self, lab: Lab, template: Snapshot) -> None:
        """Its folder holds two sockets that nobody else may connect to, and no file."""
        async with running(lab, template) as clone:
            found = {path.name: path.stat().st_mode for path in _entries(clone.spec.folder)}
        assert {name: oct(mode) for name, mode in found.items()} == {"ch": "0o140600", "qmp": "0o140600"}

    async def test_a_guest_that_ended_meanwhile_is_told(self, lab: Lab) -> None:
        """QEMU stays where its guest has ended, and says so to a later daemon, which removes it."""
        vmm, spec = lab.subject.doom(lab, Fate.PANIC)
        child = lab.take_over(await vmm.boot(spec))
        witness = Qmp(spec.folder / "qmp")
        await witness.execute("qmp_capabilities", timeout_s=30)
        async with asyncio.timeout(BOOT_S):
            assert await witness.watch("SHUTDOWN") is not None
        witness.close()
        with pytest.raises(VmmError, match=r"ended \(shutdown\) while no daemon was there"):
            await vmm.adopt(lab.adopted(spec), child)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir())
