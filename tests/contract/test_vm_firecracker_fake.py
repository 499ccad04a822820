"""The VMM contract on Firecracker's driver with the fake program: what needs no real guest, and what goes wrong."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Any

import pytest
from firecracker_subjects import CONTROL, NOT_IN_A_JAIL, NOT_ROOT, InFolder, bare_pause, maker
from vm_accidents import *  # noqa: F403 - the suite
from vm_fixtures import *  # noqa: F403 - the suite's
from vm_fixtures import greet
from vm_rules import *  # noqa: F403 - the suite
from vm_subjects import Fate, Need, Subject

from fireclaw.errors import ChannelLostError, GuestTimeoutError, VmmError
from fireclaw.testing.firecracker import Connect, Guest, Script, install, runs_for_others
from fireclaw.vmm.base import Accel, Cause
from fireclaw.vmm.firecracker import vm as vm_module
from fireclaw.vmm.firecracker.vm import Firecracker
from fireclaw.wire.hello import new_magic

if TYPE_CHECKING:
    from collections.abc import Callable

    from vm_subjects import Lab

    from fireclaw.vmm.base import Vmm, VmSpec

MAGIC = new_magic()
_FATES = {Fate.REBOOT: Guest.REBOOT, Fate.PANIC: Guest.PANIC, Fate.POWEROFF: Guest.POWEROFF}
_LACKS = {
    Need.KERNEL: "the fake's guest is guestd on this host",
    Need.MEMORY: "the fake keeps no memory",
    Need.JAIL: "the fake jailer has no walls",
    Need.CGROUP: "the fake jailer makes no cgroups",
}


def _doom(kind: type[Firecracker]) -> Callable[[Lab, Fate], tuple[Vmm, VmSpec]]:
    def doom(lab: Lab, fate: Fate) -> tuple[Vmm, VmSpec]:
        return maker(kind, lambda folder: install(folder, Script(guest=_FATES[fate], guest_after_s=0.3)))(
            lab
        ), lab.spec()

    return doom


SUBJECTS = [
    Subject(
        name="fake Firecracker in a jail",
        make=maker(Firecracker, install),
        doom=_doom(Firecracker),
        control=CONTROL,
        accel=Accel.KVM,
        lacks=_LACKS | ({} if runs_for_others() else {Need.USER: "only root can run this interpreter"}),
        unavailable=NOT_ROOT,
    ),
    Subject(
        name="fake Firecracker",
        make=maker(InFolder, install),
        doom=_doom(InFolder),
        control=CONTROL,
        accel=Accel.KVM,
        lacks=_LACKS | NOT_IN_A_JAIL,
    ),
]


@pytest.fixture
def scripted(lab: Lab) -> Callable[..., Firecracker]:
    """Install a fake with a script in the lab."""

    def make(**more: Any) -> Firecracker:
        assert isinstance(lab.vmm, Firecracker)
        return maker(type(lab.vmm), lambda folder: install(folder, Script(**more)))(lab)

    return make


class TestFaults:
    """What a Firecracker may do wrong, by script."""

    @pytest.mark.parametrize("version", ["1.14.0", "1.15.1", "1.16.0", "1.99.0"])
    async def test_other_versions_are_spoken_to_in_their_words(
        self, lab: Lab, scripted: Callable[..., Firecracker], version: str
    ) -> None:
        """A boot, a snapshot and a clone need no field that an older version refuses."""
        vmm = scripted(version=version)
        source = await vmm.boot(lab.spec(), snapshottable=True)
        await greet(source, MAGIC)
        snapshot = lab.freeze(await source.snapshot(), MAGIC)
        clone = await vmm.clone(lab.spec(), snapshot.memory)
        await greet(clone, MAGIC)
        await clone.shutdown()
        snapshot.close()

    async def test_a_guest_that_is_slow_to_listen_is_asked_again(
        self, lab: Lab, scripted: Callable[..., Firecracker]
    ) -> None:
        """A CONNECT that is never answered, or refused, is no reason to give up before the time is over."""
        vm = await scripted(connects=(Connect.HANG, Connect.EOF, Connect.EOF)).boot(lab.spec())
        await greet(vm, MAGIC)
        await vm.shutdown()

    @pytest.mark.parametrize("guest", [Guest.SILENT, Guest.DEAF])
    async def test_a_guest_that_never_listens_is_given_up_in_time(
        self, lab: Lab, scripted: Callable[..., Firecracker], guest: Guest
    ) -> None:
        """When the time is over that is the error, and the machine can be ended."""
        vm = await scripted(guest=guest).boot(lab.spec())
        async with asyncio.timeout(5):
            with pytest.raises(GuestTimeoutError, match=r"did not answer within 0\.7 s"):
                await vm.open_channel(timeout_s=0.7)
        await vm.shutdown()

    async def test_a_guest_that_ends_while_it_is_waited_for(
        self, lab: Lab, scripted: Callable[..., Firecracker]
    ) -> None:
        """Whoever waits for a guest's channel is not kept waiting by a machine that has ended."""
        vm = await scripted(guest=Guest.PANIC, boot_s=60, guest_after_s=0.3).boot(lab.spec())
        async with asyncio.timeout(10):
            with pytest.raises((ChannelLostError, VmmError)):
                await vm.open_channel(timeout_s=60)
        assert (await vm.wait()).cause is Cause.GUEST_PANIC

    @pytest.mark.parametrize(
        ("fault", "message"),
        [
            ({"fail": {"PUT /boot-source": "no such thing"}}, r"PUT /boot-source: no such thing"),
            ({"fail": {"PUT /actions": "not today\x1b[2J"}}, r"PUT /actions: not today\\x1b\[2J"),
            ({"exit_at": {"PUT /vsock": 148}}, r"status 148 \(a system call that its filter forbids\)"),
            ({"exit_at": {"PUT /drives/root": -15}}, r"PUT /drives/root: .* ended by signal 15"),
            ({"exit_at": {"start": 153}}, r"ended before it took commands.*status 153 \(bad arguments\)"),
            ({"drop_at": 3}, r"PUT /machine-config: the connection ended"),
            ({"not_json_at": 2}, r"PUT /serial: Invalid request\. All previous"),
        ],
        ids=["refused", "refused at the start", "killed by its filter", "killed", "never there", "dropped", "no JSON"],
    )
    async def test_a_boot_that_fails_tells_why(
        self, lab: Lab, scripted: Callable[..., Firecracker], fault: dict[str, Any], message: str
    ) -> None:
        """The request, Firecracker's own words and how it ended, where it did."""
        with pytest.raises(VmmError, match=message):
            await scripted(**fault).boot(lab.spec())

    async def test_one_that_never_listens_is_given_up(
        self, lab: Lab, scripted: Callable[..., Firecracker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A process whose API is not to be had is ended."""
        monkeypatch.setattr(vm_module, "_START_S", 0.7)
        with pytest.raises(VmmError, match=r"did not start within 0\.7 s"):
            await scripted(never_listens=True).boot(lab.spec())

    async def test_one_that_listens_late_is_waited_for(self, lab: Lab, scripted: Callable[..., Firecracker]) -> None:
        """The socket is there before anybody listens."""
        vm = await scripted(listen_after_s=0.3).boot(lab.spec())
        await vm.shutdown()

    async def test_a_snapshot_that_fails_tells_why(self, lab: Lab, scripted: Callable[..., Firecracker]) -> None:
        """A full disk is told in Firecracker's words, and the machine is gone."""
        reason = "Cannot write memory file: No space left on device (os error 28)"
        vm = await scripted(fail={"PUT /snapshot/create": reason}).boot(lab.spec(), snapshottable=True)
        with pytest.raises(VmmError, match=re.escape(reason)):
            await vm.snapshot()
        assert (await vm.wait()).cause is Cause.ASKED

    async def test_a_snapshot_may_take_its_time(self, lab: Lab, scripted: Callable[..., Firecracker]) -> None:
        """A create that stalls everything else is waited for."""
        vm = await scripted(delay_s={"PUT /snapshot/create": 0.5}).boot(lab.spec(), snapshottable=True)
        (await vm.snapshot()).close()

    async def test_a_bare_pause_wedges_it_and_ours_does_not(
        self, lab: Lab, scripted: Callable[..., Firecracker]
    ) -> None:
        """Its issue 6100: after Paused and Resumed alone no connection is answered; ours heals even that."""
        vm = await scripted().boot(lab.spec())
        await greet(vm, MAGIC)
        await bare_pause(vm)
        with pytest.raises(GuestTimeoutError):
            await vm.open_channel(timeout_s=1)
        await vm.pause()
        await vm.resume()
        await greet(vm, MAGIC)
        await vm.shutdown()

    async def test_a_console_is_bounded_and_safe(self, lab: Lab, scripted: Callable[..., Firecracker]) -> None:
        """However much a guest prints, little of it is kept, and nothing of it moves a cursor."""
        vm = await scripted(console="one\x1b[2J\r\n", console_flood=400_000).boot(lab.spec())
        await greet(vm, MAGIC)
        assert "flood" in await vm.console()
        assert 0 < len(await vm.console(limit=100_000)) <= 64 * 1024
        await vm.shutdown()

        vm = await scripted(console="one\x1b[2J\r\ntwo\r\n").boot(lab.spec())
        await greet(vm, MAGIC)
        assert (await vm.console()).splitlines()[1:] == [r"one\x1b[2J", "two", "guestd: ready"]
        assert await vm.console(limit=1) == "guestd: ready"
        ending = await vm.shutdown()
        assert ending.console.endswith("two\nguestd: ready")
