"""Facts about the host: the memo that keeps them, the time stamp counter, the verdict on KVM."""

from __future__ import annotations

import asyncio
import json
import os
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import GuestTimeoutError
from fireclaw.vmm.accel import Verdict, find_obstacle, find_verdict, prove_kvm
from fireclaw.vmm.host import HostMemo, boot_id, measure_tsc_khz, tsc_khz

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def memo(tmp_path: Path) -> HostMemo:
    """A memo with nothing in it."""
    return HostMemo(tmp_path / "host.json")


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A device node that everybody may open."""
    device = tmp_path / "kvm"
    device.touch()
    device.chmod(0o666)
    return device


def _remedy(device: Path) -> str:
    obstacle = find_obstacle(device)
    assert obstacle is not None
    return obstacle.remedy


class TestMemo:
    """Facts in a file."""

    def test_it_keeps_what_it_was_given(self, memo: HostMemo, tmp_path: Path) -> None:
        """Facts are there for the next reader, side by side, and nothing else is left in the folder."""
        memo.put("a", 1)
        memo.put("b", {"c": [2]})
        again = HostMemo(tmp_path / "host.json")
        assert (again.get("a"), again.get("b"), again.get("d")) == (1, {"c": [2]}, None)
        assert [file.name for file in tmp_path.iterdir()] == ["host.json"]

    @pytest.mark.parametrize("garbage", [b"", b"{", b"[1]", b"\xff\xfe"])
    def test_garbage_is_as_good_as_nothing(self, memo: HostMemo, tmp_path: Path, garbage: bytes) -> None:
        """A damaged file is replaced, as all of it can be found out again."""
        (tmp_path / "host.json").write_bytes(garbage)
        assert memo.get("a") is None
        memo.put("a", 1)
        assert memo.get("a") == 1


class TestCounter:
    """The time stamp counter."""

    def test_two_measurements_agree(self) -> None:
        """The measurement is good to one in a hundred thousand."""
        first, second = measure_tsc_khz(), measure_tsc_khz()
        assert first > 100_000
        assert abs(first - second) < first * 1e-5

    def test_it_is_measured_once_a_boot(self, memo: HostMemo) -> None:
        """Within a boot the kept figure is the answer, whatever a measurement would say."""
        memo.put("tsc", {"khz": 1234, "boot_id": boot_id()})
        assert tsc_khz(memo) == 1234

    def test_a_new_boot_keeps_a_figure_that_agrees(self, memo: HostMemo) -> None:
        """Noise of the measurement does not invalidate the snapshots that are keyed by the figure."""
        close = measure_tsc_khz() + 30
        memo.put("tsc", {"khz": close, "boot_id": "an earlier one"})
        assert tsc_khz(memo) == close
        assert memo.get("tsc")["boot_id"] == boot_id()

    def test_another_processor_replaces_the_figure(self, memo: HostMemo) -> None:
        """A home that moved to another host measures anew."""
        memo.put("tsc", {"khz": 1_000, "boot_id": "another host's"})
        assert tsc_khz(memo) > 100_000


class Guest:
    """A guest to boot: answers, hangs or fails, and counts."""

    def __init__(self, *, hangs: bool = False, fails: bool = False) -> None:
        self.hangs = hangs
        self.fails = fails
        self.boots = 0
        self.cleaned = 0

    async def boot(self) -> None:
        """Boot it."""
        self.boots += 1
        try:
            if self.hangs:
                await asyncio.Event().wait()
            if self.fails:
                raise GuestTimeoutError("the guest did not say hello")
        finally:
            self.cleaned += 1


class TestVerdict:
    """Whether KVM works here."""

    async def test_a_guest_that_boots_proves_it(self, memo: HostMemo) -> None:
        """KVM is used once a guest has booted on it; that guest need not boot again in this boot of the host."""
        guest = Guest()
        assert await prove_kvm(memo, "qemu", guest.boot) == Verdict(works=True)
        assert await prove_kvm(memo, "qemu", guest.boot) == Verdict(works=True)
        assert guest.boots == 1

    async def test_a_guest_that_hangs_is_ended_in_time(self, memo: HostMemo) -> None:
        """After the deadline the boot is cancelled, the reason told, and the verdict kept."""
        guest = Guest(hangs=True)
        verdict = await prove_kvm(memo, "qemu", guest.boot, deadline_s=0.01)
        assert (verdict.works, verdict.hangs) == (False, True)
        assert verdict.reason == "a guest hangs on this host's KVM (0.01 s without a sign)"
        assert guest.cleaned == 1
        assert await prove_kvm(memo, "qemu", guest.boot, deadline_s=0.01) == verdict
        assert guest.boots == 1

    async def test_a_guest_that_fails_gives_its_reason(self, memo: HostMemo) -> None:
        """What the guest or the VMM said becomes part of the reason, which may be gone at the next start."""
        verdict = await prove_kvm(memo, "qemu", Guest(fails=True).boot)
        assert (verdict.works, verdict.hangs) == (False, False)
        assert "did not say hello" in verdict.reason
        assert find_verdict(memo, "qemu") is None
        assert await prove_kvm(memo, "qemu", Guest().boot) == Verdict(works=True)

    async def test_each_vmm_has_a_verdict_of_its_own(self, memo: HostMemo) -> None:
        """What was found out for one says nothing of another."""
        await prove_kvm(memo, "firecracker", Guest().boot)
        assert find_verdict(memo, "qemu") is None
        assert find_verdict(memo, "firecracker") == Verdict(works=True)

    async def test_the_verdict_of_an_earlier_boot_is_void(self, memo: HostMemo, tmp_path: Path) -> None:
        """After a restart of the host a guest is booted anew."""
        await prove_kvm(memo, "qemu", Guest(hangs=True).boot, deadline_s=0.01)
        kept = (tmp_path / "host.json").read_text()
        (tmp_path / "host.json").write_text(kept.replace(boot_id(), "an earlier one"))
        assert find_verdict(memo, "qemu") is None
        assert await prove_kvm(memo, "qemu", Guest().boot) == Verdict(works=True)

    async def test_the_kept_verdict_is_plain_json(self, memo: HostMemo, tmp_path: Path) -> None:
        """Other programs can read it."""
        await prove_kvm(memo, "qemu", Guest().boot)
        kept = json.loads((tmp_path / "host.json").read_text())
        assert kept["kvm with qemu"] == {
            "works": True,
            "reason": "",
            "remedy": "",
            "hangs": False,
            "boot_id": boot_id(),
        }


class TestDevice:
    """Whether the device can be tried at all."""

    def test_a_missing_device_is_told(self, tmp_path: Path) -> None:
        """Without a device the module is the remedy."""
        obstacle = find_obstacle(tmp_path / "none")
        assert obstacle is not None
        assert (obstacle.works, obstacle.hangs) == (False, False)
        assert obstacle.reason == f"this host has no {tmp_path / 'none'}"
        assert "modprobe kvm" in obstacle.remedy

    def test_a_device_that_is_open_to_all_is_no_obstacle(self, device: Path) -> None:
        """Then it can be tried, with or without a jail."""
        assert find_obstacle(device) is None
        assert find_obstacle(device, jailed=True) is None

    @pytest.mark.skipif(os.geteuid() != 0, reason="changes the owner of a file")
    def test_a_closed_device_names_the_remedy(self, device: Path) -> None:
        """As root, VMMs get the device's group: it must be one, not root's, and have the right."""
        device.chmod(0o600)
        assert _remedy(device).startswith("sudo chgrp kvm")
        device.chmod(0o660)
        assert _remedy(device).startswith("sudo chgrp kvm")
        os.chown(device, 0, 4321)
        assert find_obstacle(device) is None

    @pytest.mark.skipif(os.geteuid() != 0, reason="root's jails have device nodes of their own")
    def test_a_closed_device_does_not_matter_to_a_jail(self, device: Path) -> None:
        """A jail's node is made for its machine, whatever the host's own allows."""
        device.chmod(0o600)
        assert find_obstacle(device, jailed=True) is None
