"""Which VMM new machines get, what is said about it, and what the settings can ask for."""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import SetupError, VmmError
from fireclaw.paths import Home
from fireclaw.store.database import Database
from fireclaw.store.machines import ProcessRows
from fireclaw.testing.firecracker import Script, install
from fireclaw.vmm import family
from fireclaw.vmm.accel import find_obstacle, prove_kvm
from fireclaw.vmm.base import Accel
from fireclaw.vmm.family import Family
from fireclaw.vmm.firecracker import release
from fireclaw.vmm.host import HostMemo
from fireclaw.vmm.process import Gate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fireclaw.vmm.base import Vmm
    from fireclaw.vmm.family import WantedAccel, WantedVmm

_NOT_INSTALLED = "Firecracker is not installed (remedy: fireclaw setup --vmm firecracker)"


class Host:
    """A host: what is installed on it, what its KVM does, and what people were told.

    Attributes:
        home: with programs under ``vmms``.
        tried: the VMMs whose guest was to be heard.
        said: the lines.
        works: the VMMs whose guests boot.
        hangs: guests on KVM do nothing at all.
        device: its KVM.
    """

    def __init__(self, folder: Path, device: Path, gate: Gate) -> None:
        self.home = Home(folder, folder / "run", folder)
        self.tried: list[str] = []
        self.said: list[str] = []
        self.works: set[str] = set()
        self.hangs = False
        self.device = device
        self._gate = gate

    def lose_kvm(self) -> None:
        """Have no KVM device any more."""
        self.device.unlink()

    def install(self, version: str = "1.16.1") -> None:
        """Have Firecracker installed."""
        install(release.folder(self.home.vmms), Script(version=version))

    def family(self, vmm: WantedVmm = "auto", accel: WantedAccel = "auto") -> Family:
        """Its VMMs, as a daemon with these settings finds them."""
        memo = HostMemo(self.home.memo)
        return Family(self._gate, self.home, memo, vmm=vmm, accel=accel, say=self.said.append)

    async def choose(self, vmm: WantedVmm = "auto", accel: WantedAccel = "auto") -> tuple[str, Accel]:
        """Choose as such a daemon does."""
        chosen, accelerator = await self.family(vmm, accel).choose(self.prove)
        return chosen.name, accelerator

    async def prove(self, vmm: Vmm, accel: Accel) -> None:
        """Boot a guest and hear it, or not."""
        assert accel is Accel.KVM
        self.tried.append(vmm.name)
        if self.hangs:
            await asyncio.Event().wait()
        if vmm.name not in self.works:
            raise VmmError("no luck")


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A device node that everybody may open."""
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(0o666)
    return device


@pytest.fixture
def host(tmp_path: Path, device: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host with a KVM device, and no Firecracker unless it is installed."""
    monkeypatch.setattr(family, "find_obstacle", partial(find_obstacle, device))
    monkeypatch.setattr(family, "prove_kvm", partial(prove_kvm, deadline_s=0.01))
    monkeypatch.setenv("PATH", str(tmp_path))
    database = Database(tmp_path / "db")
    yield Host(tmp_path, device, Gate(ProcessRows(database), "unittest"))
    database.close()


class TestAuto:
    """Nothing is asked for."""

    async def test_firecracker_comes_first(self, host: Host) -> None:
        """Where it is installed and its guest boots, it is used, and QEMU is not even tried."""
        host.install()
        host.works = {"firecracker", "qemu"}
        assert await host.choose() == ("firecracker", Accel.KVM)
        assert host.tried == ["firecracker"]
        assert host.said == ["machines run on Firecracker with KVM"]

    async def test_without_it_qemu_runs_on_kvm(self, host: Host) -> None:
        """The line names what is missing, and the command that gets it."""
        host.works = {"qemu"}
        assert await host.choose() == ("qemu", Accel.KVM)
        assert host.said == [f"machines run on QEMU with KVM: {_NOT_INSTALLED}"]

    async def test_a_firecracker_without_luck_leaves_kvm_to_qemu(self, host: Host) -> None:
        """A guest that does not start on one VMM is tried on the other, and the first one's reason is told."""
        host.install()
        host.works = {"qemu"}
        assert await host.choose() == ("qemu", Accel.KVM)
        assert host.tried == ["firecracker", "qemu"]
        assert host.said == ["machines run on QEMU with KVM: a guest does not start on this host's KVM (no luck)"]

    async def test_a_kvm_that_hangs_is_tried_once(self, host: Host) -> None:
        """A guest that hangs is KVM's fault: QEMU's would wait in vain for as long again."""
        host.install()
        host.hangs = True
        assert await host.choose() == ("qemu", Accel.TCG)
        assert host.tried == ["firecracker"]
        (line,) = host.said
        assert line.startswith("machines run on QEMU with the software CPU, several times slower: a guest hangs on")

    async def test_no_kvm_is_one_line_with_the_remedy(self, host: Host) -> None:
        """Without a device nothing is tried, whatever is installed, and the reason is the device."""
        host.install()
        host.lose_kvm()
        assert await host.choose() == ("qemu", Accel.TCG)
        assert host.tried == []
        why = f"this host has no {host.device} (remedy: sudo modprobe kvm_intel, or kvm_amd)"
        assert host.said == [f"machines run on QEMU with the software CPU, several times slower: {why}"]

    async def test_a_wrong_version_is_named(self, host: Host) -> None:
        """A Firecracker that will not do is not used, and the line says which it is."""
        host.install("1.10.0")
        host.works = {"qemu"}
        assert await host.choose() == ("qemu", Accel.KVM)
        assert "is version 1.10.0; Fireclaw works with 1.14.0 and newer" in host.said[0]

    async def test_the_choice_is_made_once(self, host: Host) -> None:
        """One daemon chooses once and says so once; the next one need not boot a guest for it."""
        host.install()
        host.works = {"firecracker"}
        daemon = host.family()
        assert daemon.choice is None
        assert await daemon.choose(host.prove) == await daemon.choose(host.prove)
        assert len(host.said) == 1
        await host.choose()
        assert host.tried == ["firecracker"]

    async def test_what_hangs_is_remembered(self, host: Host) -> None:
        """A later daemon of the same host boot does not wait for the deadline again."""
        host.install()
        host.hangs = True
        assert await host.choose() == ("qemu", Accel.TCG)
        host.hangs = False
        assert await host.choose() == ("qemu", Accel.TCG)
        assert host.tried == ["firecracker"]
        assert host.said[0] == host.said[1]

    async def test_no_luck_is_tried_again(self, host: Host) -> None:
        """What kept a guest from starting may be gone when the next daemon starts; until then each reason is told."""
        host.install()
        assert await host.choose() == ("qemu", Accel.TCG)
        assert host.tried == ["firecracker", "qemu"]
        assert host.said[0].count("a guest does not start on this host's KVM (no luck)") == 1
        host.works = {"firecracker"}
        assert await host.choose() == ("firecracker", Accel.KVM)

    async def test_both_reasons_are_told(self, host: Host) -> None:
        """Where neither VMM can have KVM, the line says why for each."""
        host.install("1.10.0")
        assert await host.choose() == ("qemu", Accel.TCG)
        assert "is version 1.10.0" in host.said[0]
        assert "(no luck)" in host.said[0]


class TestSettings:
    """Something is asked for."""

    async def test_the_software_cpu(self, host: Host) -> None:
        """Then nothing is tried and nothing said."""
        host.install()
        assert await host.choose(accel="tcg") == ("qemu", Accel.TCG)
        assert await host.choose("qemu", "tcg") == ("qemu", Accel.TCG)
        assert (host.tried, host.said) == ([], [])

    async def test_qemu(self, host: Host) -> None:
        """Firecracker is not tried, and KVM has to prove itself."""
        host.install()
        host.works = {"firecracker", "qemu"}
        assert await host.choose("qemu") == ("qemu", Accel.KVM)
        assert host.tried == ["qemu"]

    async def test_qemu_on_kvm(self, host: Host) -> None:
        """What was asked for is done without a proof."""
        assert await host.choose("qemu", "kvm") == ("qemu", Accel.KVM)
        assert (host.tried, host.said) == ([], [])

    async def test_kvm_alone(self, host: Host) -> None:
        """Firecracker where it is installed, without a proof."""
        assert await host.choose(accel="kvm") == ("qemu", Accel.KVM)
        host.install()
        assert await host.choose(accel="kvm") == ("firecracker", Accel.KVM)
        assert host.tried == []

    async def test_firecracker(self, host: Host) -> None:
        """It is proved and used, or the reason is an error: what was asked for is never replaced in silence."""
        with pytest.raises(SetupError, match=r"not installed \(fireclaw setup"):
            await host.choose("firecracker")
        host.install()
        with pytest.raises(SetupError, match="cannot be used: a guest does not start"):
            await host.choose("firecracker")
        host.works = {"firecracker"}
        assert await host.choose("firecracker") == ("firecracker", Accel.KVM)
        assert host.said == []

    async def test_firecracker_without_kvm(self, host: Host) -> None:
        """The error tells what is in the way, and what to do about it."""
        host.install()
        with pytest.raises(SetupError, match="set vmm to qemu"):
            await host.choose("firecracker", "tcg")
        host.lose_kvm()
        for accel in ("auto", "kvm"):
            with pytest.raises(SetupError, match=r"cannot be used: this host has no .*modprobe"):
                await host.choose("firecracker", accel)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root's machines are jailed")
    async def test_firecracker_as_root_needs_its_jailer(self, host: Host) -> None:
        """Without the jailer it is as if it were not installed."""
        host.install()
        (release.folder(host.home.vmms) / "jailer").unlink()
        with pytest.raises(SetupError, match="jailer is missing: as root Firecracker runs in a jail only"):
            await host.choose("firecracker")


def test_machines_of_both_are_found_by_name(host: Host) -> None:
    """A row's word gives the VMM that runs its machine, whatever new machines get."""
    found = host.family()
    assert [vmm.name for vmm in found.all()] == ["firecracker", "qemu"]
    assert all(found.named(vmm.name) is vmm for vmm in found.all())
