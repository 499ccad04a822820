"""The rules that every VMM keeps, for test modules that name ``SUBJECTS`` (``vm_subjects``) and import all of this.

A rule with ``needs`` is not run on a subject that lacks that; tests/conftest.py reports what was not run, and why.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import time
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from review_limits import few_descriptors
from vm_fixtures import BOOT_S, CHANNEL_S, END_S, WARM, greet, running, shell, talk
from vm_subjects import NOTHING, WORKSPACE_BYTES, Fate, Lab, Need, Watch, make_memfd, needs

from fireclaw.errors import (
    ChannelLostError,
    ConflictError,
    FireclawError,
    GuestTimeoutError,
    InvalidError,
    SetupError,
    VmmError,
)
from fireclaw.machines import calls
from fireclaw.machines.calls import Exec
from fireclaw.machines.channel import Channel
from fireclaw.vmm.base import FIRST_USER, KVM, MIN_MEMORY_MIB, Cause, MemorySnapshot, usage_of
from fireclaw.wire.hello import new_magic

if TYPE_CHECKING:
    from fireclaw.machines.snapshots import Snapshot


def checksum(fd: int) -> int:
    """Something that a change of a file's bytes would change; quick, as much of this runs on a software CPU."""
    return zlib.crc32(os.pread(fd, os.fstat(fd).st_size, 0))


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def opened(pid: int) -> list[Path]:
    """What a process has open."""
    return list(Path(f"/proc/{pid}/fd").iterdir())


def inside(pid: int) -> list[Path]:
    """What lies in a process's root folder."""
    return list(Path(f"/proc/{pid}/root").iterdir())


def limit_of(pid: int, name: str) -> str:
    """What a file of a process's cgroup says."""
    group = Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::/")
    return (Path("/sys/fs/cgroup") / group / name).read_text()


class TestLife:
    """How machines come and go."""

    async def test_a_boot_says_hello(self, lab: Lab) -> None:
        """A machine boots from the runtime, with and without a third drive, and takes commands."""
        for spec in (lab.spec(), replace(lab.spec(), workspace=None)):
            vm = await lab.vmm.boot(spec)
            await greet(vm, new_magic(), BOOT_S)
            await vm.shutdown()

    async def test_a_clone_takes_commands(self, lab: Lab, template: Snapshot) -> None:
        """A clone answers to its template's magic, in one session after the other."""
        async with running(lab, template) as clone:
            for _ in range(3):
                await greet(clone, template.magic)

    async def test_it_is_found_by_its_mark(self, lab: Lab, template: Snapshot) -> None:
        """One process of a machine carries its id, whatever rows say."""
        async with running(lab, template) as clone:
            assert lab.gate.find_marked() == {lab.pid(clone.spec): clone.spec.machine_id}

    @pytest.mark.parametrize("grace_s", [0, 20])
    async def test_it_is_ended(self, lab: Lab, template: Snapshot, grace_s: float) -> None:
        """Ended with or without a grace, it was asked to, and everybody who waits is told the same."""
        clone = await lab.vmm.clone(lab.spec(), template.memory)
        waiting = [asyncio.create_task(clone.wait()) for _ in range(2)]
        async with asyncio.timeout(10):  # no VMM here needs all of its grace
            ending = await clone.shutdown(grace_s=grace_s)
        assert ending.cause is Cause.ASKED
        assert await asyncio.gather(*waiting) == [ending, ending]
        assert await clone.shutdown() == ending

    async def test_it_is_ended_while_it_is_paused(self, lab: Lab, template: Snapshot) -> None:
        """A machine that stands still ends as well."""
        clone = await lab.vmm.clone(lab.spec(), template.memory, paused=True)
        assert (await clone.shutdown()).cause is Cause.ASKED

    async def test_a_process_that_hangs_is_ended(self, lab: Lab, template: Snapshot) -> None:
        """A process that answers nothing any more is killed after its grace."""
        clone = await lab.vmm.clone(lab.spec(), template.memory)
        lab.kill(clone.spec, signal.SIGSTOP)
        async with asyncio.timeout(END_S):
            ending = await clone.shutdown(grace_s=0.2)
        assert ending.cause is Cause.ASKED
        assert ending.status in {-signal.SIGKILL, -signal.SIGTERM}

    async def test_whoever_stops_waiting_ends_nothing(self, lab: Lab, template: Snapshot) -> None:
        """To give up waiting for a machine's end leaves it alone."""
        async with running(lab, template) as clone:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(clone.wait(), 0.01)
            await greet(clone, template.magic)

    async def test_a_killed_one_is_noticed(self, lab: Lab, template: Snapshot) -> None:
        """Whoever waits for the machine is told, with the signal; nothing can be done with it any more."""
        clone = await lab.vmm.clone(lab.spec(), template.memory)
        waiting = asyncio.create_task(clone.wait())
        lab.kill(clone.spec)
        async with asyncio.timeout(END_S):
            ending = await waiting
        assert (ending.cause, ending.status) == (Cause.VMM, -signal.SIGKILL)
        with pytest.raises(ChannelLostError):
            await clone.open_channel(timeout_s=10)
        with pytest.raises(VmmError):
            await clone.pause()
        with pytest.raises(VmmError, match="has ended"):
            clone.usage()
        assert await clone.shutdown() == ending

    async def test_a_killed_one_takes_its_session_along(self, lab: Lab, template: Snapshot) -> None:
        """A command in a machine whose process dies never looks as if it had finished."""
        async with running(lab, template) as clone, talk(clone, template.magic) as channel:
            execution = await calls.start(channel, Exec(["/bin/sh", "-c", "echo on; sleep 60"]))
            output = execution.output()
            assert (await anext(output))[1] == b"on\n"
            lab.kill(clone.spec)
            with pytest.raises(ChannelLostError):
                await asyncio.wait_for(anext(output), END_S)

    @pytest.mark.parametrize(
        ("fate", "cause"),
        [
            (Fate.REBOOT, Cause.GUEST_RESET),
            (Fate.PANIC, Cause.GUEST_PANIC),
            (Fate.POWEROFF, Cause.GUEST_SHUTDOWN),
        ],
    )
    async def test_a_guest_that_ends_itself(self, lab: Lab, fate: Fate, cause: Cause) -> None:
        """A machine whose guest reboots, panics or switches itself off ends, with that cause and its last words."""
        vmm, spec = lab.subject.doom(lab, fate)
        vm = await vmm.boot(spec)
        async with asyncio.timeout(BOOT_S):
            ending = await vm.wait()
        assert ending.cause is cause
        if fate is Fate.PANIC:
            assert "Kernel panic" in ending.console
        assert "\r" not in ending.console
        assert await vm.console() == ending.console

    @needs(Need.KERNEL)
    async def test_a_guest_that_is_asked_to_end(self, lab: Lab, template: Snapshot) -> None:
        """The guest ends the machine by a reset, once what it had cached is written."""
        clone = await lab.vmm.clone(lab.spec(), template.memory)
        async with talk(clone, template.magic) as channel:
            with suppress(ChannelLostError):  # it may be gone before its answer is here
                await calls.shutdown(channel, END_S)
        async with asyncio.timeout(END_S):
            assert (await clone.wait()).cause is Cause.GUEST_RESET


class TestClones:
    """Machines from one snapshot."""

    async def test_they_change_nothing(self, lab: Lab, template: Snapshot) -> None:
        """Two clones side by side run commands, and the snapshot's bytes are the same afterwards."""
        before = checksum(template.memory.memory), checksum(template.memory.state)
        clones = await asyncio.gather(*(lab.vmm.clone(lab.spec(), template.memory) for _ in range(2)))
        await asyncio.gather(*(greet(clone, template.magic) for clone in clones))
        endings = await asyncio.gather(*(clone.shutdown() for clone in clones))
        assert [ending.cause for ending in endings] == [Cause.ASKED, Cause.ASKED]
        assert (checksum(template.memory.memory), checksum(template.memory.state)) == before

    async def test_nobody_can_write_to_a_snapshot(self, lab: Lab, template: Snapshot) -> None:
        """Its files are sealed, for us as for a VMM that a guest has taken over; or they are root's, and read-only."""
        for fd in (template.memory.memory, template.memory.state):
            with pytest.raises(OSError, match=r"not permitted|Bad file"):
                os.pwrite(fd, b"x", 0)
            with pytest.raises(OSError, match=r"not permitted|Invalid argument"):
                os.ftruncate(fd, 0)
            if not lab.vmm.wants_sealed:
                assert (os.fstat(fd).st_uid, os.fstat(fd).st_mode & 0o777) == (0, 0o444)

    @needs(Need.MEMORY)
    async def test_they_remember_what_the_template_knew(self, lab: Lab, template: Snapshot) -> None:
        """A clone goes on where the template stood still, and what one writes is not in the next."""
        for _ in range(2):
            async with running(lab, template) as clone, talk(clone, template.magic) as channel:
                assert await shell(channel, "cat /run/word; printf poison >/run/word") == WARM

    @needs(Need.KERNEL, Need.MEMORY)
    @pytest.mark.parametrize("count", [2, 8])
    async def test_each_is_somebody(self, lab: Lab, template: Snapshot, count: int) -> None:
        """Made at once and given identities, clones differ in all that tells machines apart, and know the time."""
        script = "hostname; cat /etc/machine-id /proc/sys/kernel/random/uuid; mktemp -u; od -An -tx1 -N16 /dev/urandom"

        async def live(number: int) -> list[bytes]:
            async with running(lab, template) as clone, talk(clone, template.magic) as channel:
                await calls.give_identity(channel, f"clone-{number}", new_magic())
                lines = (await shell(channel, script)).splitlines()
                asked = time.time()
                (said,) = (await shell(channel, "date +%s.%N")).splitlines()
                assert asked - 1 < float(said) < time.time() + 1
                return lines

        answers = await asyncio.gather(*(live(number) for number in range(count)))
        assert [answer[0] for answer in answers] == [f"clone-{number}".encode() for number in range(count)]
        for kind in zip(*answers, strict=True):
            assert len(set(kind)) == count

    @needs(Need.KERNEL, Need.MEMORY)
    async def test_each_has_a_magic_of_its_own(self, lab: Lab, template: Snapshot) -> None:
        """Once a clone is somebody, who knows only the template's magic cannot begin a session with it."""
        own = new_magic()
        async with running(lab, template) as clone:
            async with talk(clone, template.magic) as channel:
                await calls.give_identity(channel, "clone", own)
            with pytest.raises((GuestTimeoutError, ChannelLostError)):
                async with talk(clone, template.magic, 1):
                    pass
            await greet(clone, own)

    async def test_they_outlive_their_snapshot(self, lab: Lab, template: Snapshot) -> None:
        """A clone works after its snapshot was closed and its files are gone."""
        snapshot = lab.copy(template)
        async with running(lab, snapshot) as clone:
            snapshot.close()
            lab.forget_snapshots()
            for _ in range(2):
                await greet(clone, template.magic)

    async def test_a_paused_one_answers_once_it_wakes(self, lab: Lab, template: Snapshot) -> None:
        """A channel that is opened to a clone that stands still answers what was written once the clone runs."""
        clone = await lab.vmm.clone(lab.spec(), template.memory, paused=True)
        channel = await Channel.begin(await clone.open_channel(timeout_s=CHANNEL_S), template.magic)
        await clone.resume()
        await channel.wait_ready(CHANNEL_S)
        assert await shell(channel, "echo on") == b"on\n"
        await channel.aclose()
        await clone.shutdown()

    async def test_a_process_can_wait_for_its_snapshot(self, lab: Lab, template: Snapshot) -> None:
        """What was prepared becomes a clone when it is given the snapshot, or ends without one."""
        first, second = [await lab.vmm.prepare(lab.spec(), template.memory) for _ in range(2)]
        await second.shutdown()
        await first.load(template.memory, paused=True)
        await first.resume()
        await greet(first, template.magic)
        await first.shutdown()

    @needs(Need.MEMORY)
    async def test_their_memory_is_shared_until_written(self, lab: Lab, template: Snapshot) -> None:
        """A clone costs less private memory than its guest has."""
        async with running(lab, template) as clone:
            await greet(clone, template.magic)
            usage = clone.usage()
        assert 0 < usage.private_bytes < clone.spec.memory_mib << 19
        assert usage.private_bytes < usage.resident_bytes

    async def test_one_cannot_become_a_snapshot(self, lab: Lab, template: Snapshot) -> None:
        """A machine that was not booted for it says so, and lives on."""
        async with running(lab, template) as clone:
            with pytest.raises(ConflictError, match="not started to become a snapshot"):
                await clone.snapshot()
            await greet(clone, template.magic)

    @pytest.mark.parametrize("damage", ["foreign state", "empty state", "short memory"])
    async def test_what_is_no_snapshot_is_refused(self, lab: Lab, template: Snapshot, damage: str) -> None:
        """A state that is none, or memory that is too short, is the VMM's error, and the clone is gone."""
        size = os.fstat(template.memory.memory).st_size // (2 if damage == "short memory" else 1)
        content = {"foreign state": b"no state at all" * 1000, "empty state": b""}
        state = content.get(damage, os.pread(template.memory.state, 1 << 20, 0))
        snapshot = lab.freeze(MemorySnapshot(make_memfd(b"", size), make_memfd(state, len(state))), template.magic)
        with pytest.raises(VmmError) as caught:
            await lab.vmm.clone(lab.spec(), snapshot.memory)
        snapshot.close()
        assert caught.value.status not in {0, None}


class TestPause:
    """Machines that stand still."""

    async def test_it_answers_after_each_of_several_pauses(self, lab: Lab, template: Snapshot) -> None:
        """After a pause the channel is opened anew, and commands work, however often that is done."""
        async with running(lab, template) as clone:
            for _ in range(3):
                await greet(clone, template.magic)
                await clone.pause()
                await clone.resume()
            await greet(clone, template.magic)

    async def test_twice_is_as_good_as_once(self, lab: Lab, template: Snapshot) -> None:
        """To pause what stands still, or resume what runs, is no error and does no harm."""
        async with running(lab, template) as clone:
            await clone.resume()
            await clone.pause()
            await clone.pause()
            await clone.resume()
            await clone.resume()
            await greet(clone, template.magic)

    @needs(Need.KERNEL)
    async def test_it_uses_no_processor(self, lab: Lab, template: Snapshot) -> None:
        """While a busy guest is paused its processor time stands still; it goes on where it was."""
        look = 'until n=$(cat /run/n 2>/dev/null) && [ -n "$n" ]; do :; done; echo $n'
        async with running(lab, template) as clone:
            async with talk(clone, template.magic) as channel:
                await shell(channel, "setsid sh -c 'while :; do n=$((n + 1)); echo $n >/run/n; done' >/dev/null 2>&1 &")
                counted = int(await shell(channel, look))
            await clone.pause()
            before = clone.usage().cpu_seconds
            await asyncio.sleep(0.5)  # what is measured is that nothing happens
            assert clone.usage().cpu_seconds - before <= 0.05
            await clone.resume()
            async with talk(clone, template.magic) as channel:
                assert int(await shell(channel, look)) >= counted


class TestUsage:
    """What machines cost."""

    async def test_it_is_told(self, lab: Lab, template: Snapshot) -> None:
        """Memory and processor time are the process's own, and processor time grows."""
        async with running(lab, template) as clone:
            first = clone.usage()
            await greet(clone, template.magic)
            second = clone.usage()
        assert 0 < second.private_bytes <= second.resident_bytes
        assert first.cpu_seconds <= second.cpu_seconds < 60


class TestWorkspace:
    """Machines with a drive of their own."""

    @needs(Need.KERNEL)
    async def test_it_is_the_users(self, lab: Lab, template: Snapshot) -> None:
        """The guest mounts its third drive at /workspace, and the agents' user may write there."""
        async with (
            running(lab, template, lab.workspace("one")) as clone,
            talk(clone, template.magic) as channel,
        ):
            await calls.give_identity(channel, "clone", template.magic, workspace=True)
            seen = await shell(channel, "stat -f -c %T /workspace; stat -c '%u %g' /workspace")
            assert seen == b"ext2/ext3\n1000 1000\n"
            assert (
                await shell(channel, "echo mine >/workspace/file && cat /workspace/file", user="1000:1000") == b"mine\n"
            )

    @needs(Need.KERNEL)
    async def test_without_one_there_is_no_such_folder(self, channel: Channel) -> None:
        """A machine that was given none sees nothing of its third drive."""
        assert await shell(channel, "ls -d /workspace 2>/dev/null; echo none") == b"none\n"

    @needs(Need.KERNEL)
    async def test_each_has_its_own(self, lab: Lab, template: Snapshot) -> None:
        """What two clones at once write to theirs does not meet."""

        async def live(name: str) -> bytes:
            workspace = lab.workspace(name)
            async with running(lab, template, workspace) as clone, talk(clone, template.magic) as channel:
                await calls.give_identity(channel, name, template.magic, workspace=True)
                await shell(channel, f"echo {name} >/workspace/{name}; sync")
                return await shell(channel, "ls /workspace; cat /workspace/[ot]*")

        one, two = await asyncio.gather(live("one"), live("two"))
        assert one.split() == [b"lost+found", b"one", b"one"]
        assert two.split() == [b"lost+found", b"two", b"two"]

    @needs(Need.KERNEL)
    async def test_it_outlives_its_machine(self, lab: Lab, template: Snapshot) -> None:
        """What a guest has synced is there for the next machine, though the first one's process was killed."""
        workspace = lab.workspace("one")
        async with running(lab, template, workspace) as clone, talk(clone, template.magic) as channel:
            await calls.give_identity(channel, "first", template.magic, workspace=True)
            await shell(channel, "echo kept >/workspace/file; sync /workspace/file")
            lab.kill(clone.spec)
            await clone.wait()
        async with running(lab, template, workspace) as clone, talk(clone, template.magic) as channel:
            await calls.give_identity(channel, "second", template.magic, workspace=True)
            assert await shell(channel, "cat /workspace/file") == b"kept\n"
        assert workspace.stat().st_size == WORKSPACE_BYTES

    @needs(Need.KERNEL)
    async def test_a_drive_that_is_none_is_told(self, lab: Lab, template: Snapshot) -> None:
        """A workspace without a file system is the guest's error, and the machine lives on."""
        async with running(lab, template) as clone, talk(clone, template.magic) as channel:
            with pytest.raises(FireclawError, match="workspace"):
                await calls.give_identity(channel, "clone", template.magic, workspace=True)
            assert await shell(channel, "echo on") == b"on\n"


class TestConsole:
    """The guest's console."""

    @needs(Need.KERNEL)
    async def test_it_is_bounded_and_safe(self, lab: Lab, template: Snapshot) -> None:
        """However much a guest prints, little of it is kept, the end of it is shown, and nothing moves a cursor."""
        async with running(lab, template) as clone, talk(clone, template.magic) as channel:
            # For a while, not so many bytes: where KVM itself is emulated, each takes a millisecond.
            await shell(channel, "mknod /dev/ttyS0 c 4 64; timeout 3 yes flood >/dev/ttyS0")
            assert 1024 < len(await clone.console(limit=1_000_000)) <= 64 * 1024
            await asyncio.sleep(1.5)  # a VMM may take only so many bytes a second, and lose the others
            await shell(channel, r"printf 'one\ntwo\033[2J\007\n' >/dev/ttyS0; sleep 0.1")
            assert await clone.console(limit=1) == r"two\x1b[2J\x07"
            assert "\n" not in await clone.console(limit=1)
            assert (await clone.console(limit=2)).endswith("one\n" + r"two\x1b[2J\x07")


class TestAdoption:
    """Machines that outlive the daemon."""

    async def test_a_later_daemon_adopts_from_the_row_alone(self, lab: Lab, template: Snapshot) -> None:
        """With nothing but row and folder the machine is held, spoken to, and ended; whoever waited was let go."""
        clone = await lab.vmm.clone(lab.spec(), template.memory)
        waiting = asyncio.create_task(clone.wait())
        await greet(clone, template.magic)
        child = lab.take_over(clone)
        with pytest.raises(asyncio.CancelledError):
            await waiting
        adopted = await lab.vmm.adopt(lab.adopted(clone.spec), child)
        await greet(adopted, template.magic)
        assert adopted.usage().resident_bytes > 0
        assert await adopted.console() == ""
        assert (await adopted.shutdown()).cause is Cause.ASKED

    async def test_a_paused_one_is_adopted(self, lab: Lab, template: Snapshot) -> None:
        """A machine that stood still when its daemon ended runs on once the next one says so."""
        clone = await lab.vmm.clone(lab.spec(), template.memory)
        await greet(clone, template.magic)
        await clone.pause()
        adopted = await lab.vmm.adopt(lab.adopted(clone.spec), lab.take_over(clone))
        await adopted.resume()
        await greet(adopted, template.magic)
        await adopted.shutdown()

    async def test_an_adopted_one_that_is_killed(self, lab: Lab, template: Snapshot) -> None:
        """An adopted machine's end is noticed as its own daemon's is."""
        clone = await lab.vmm.clone(lab.spec(), template.memory)
        adopted = await lab.vmm.adopt(lab.adopted(clone.spec), lab.take_over(clone))
        lab.kill(clone.spec)
        async with asyncio.timeout(END_S):
            assert (await adopted.wait()).cause is Cause.VMM

    async def test_a_dead_one_is_told(self, lab: Lab, template: Snapshot) -> None:
        """A process that dies while it is adopted is an error, and nothing is left."""
        clone = await lab.vmm.clone(lab.spec(), template.memory)
        pid = lab.pid(clone.spec)
        child = lab.take_over(clone)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(VmmError):
            await lab.vmm.adopt(lab.adopted(clone.spec), child)
        assert not child.running
        await lab.forget(clone.spec)

    async def test_one_that_nobody_can_reach_is_ended(self, lab: Lab, template: Snapshot) -> None:
        """Without the files in its folder nobody could use a machine: it is ended."""
        clone = await lab.vmm.clone(lab.spec(), template.memory)
        child = lab.take_over(clone)
        for place in (clone.spec.folder, lab.home.jails):
            shutil.rmtree(place, ignore_errors=True)
        with pytest.raises(VmmError):
            await lab.vmm.adopt(lab.adopted(clone.spec), child)
        assert not child.running

    async def test_what_nobody_cleaned_up_is_found_and_swept(self, lab: Lab, template: Snapshot) -> None:
        """What a machine leaves outside of its folder when daemon and VMM were killed together goes with a sweep."""
        clone = await lab.vmm.clone(lab.spec(), template.memory)
        child = lab.take_over(clone)
        child.kill()
        await child.wait()
        assert lab.vmm.find_left() <= {clone.spec.machine_id}
        for machine_id in (clone.spec.machine_id, clone.spec.machine_id, "never-there"):
            await lab.vmm.sweep(machine_id)
        await lab.forget(clone.spec)
        assert lab.leftovers() == NOTHING

    async def test_a_guest_that_ended_meanwhile(self, lab: Lab) -> None:
        """A guest that switched itself off while no daemon was there is an error, or its end is told at once."""
        vmm, spec = lab.subject.doom(lab, Fate.POWEROFF)
        vm = await vmm.boot(spec)
        pid = lab.pid(spec)
        child = lab.take_over(vm)
        await _until_idle(pid)
        with suppress(VmmError):
            adopted = await vmm.adopt(lab.adopted(spec), child)
            async with asyncio.timeout(END_S):
                assert (await adopted.wait()).cause is Cause.GUEST_SHUTDOWN
        assert not child.running


async def _until_idle(pid: int) -> None:
    """Wait until a process has used no processor for a while."""
    async with asyncio.timeout(BOOT_S):
        used, still = -1.0, 0
        while still < 10:
            await asyncio.sleep(0.1)
            now = usage_of(pid).cpu_seconds
            used, still = now, still + 1 if now == used else 0


class TestBounds:
    """What machines are kept in."""

    @needs(Need.USER)
    async def test_each_has_a_user_id_of_its_own(self, lab: Lab, template: Snapshot) -> None:
        """No VMM runs as root or as another's user, with another group, or with any capability."""
        async with running(lab, template) as one, running(lab, template) as two:
            for clone in (one, two):
                user = str(FIRST_USER + clone.spec.slot)
                status = status_of(lab.pid(clone.spec))
                assert status["Uid"].split() == [user] * 4
                assert status["Gid"].split() == [user] * 4
                assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
                assert set(status["Groups"].split()) <= {str(KVM.stat().st_gid)} - {"0"}

    async def test_it_inherits_nothing_of_ours(self, lab: Lab, template: Snapshot) -> None:
        """A VMM has neither our standard streams nor our store, and a session of its own."""
        ours = {_identity(fd) for fd in ("/proc/self/fd/0", "/proc/self/fd/1", "/proc/self/fd/2", lab.home.database)}
        async with running(lab, template) as clone:
            pid = lab.pid(clone.spec)
            theirs = {_identity(fd) for fd in opened(pid)}
            assert os.getsid(pid) == pid
        assert theirs & ours - {_identity(os.devnull)} == set()
        assert len(theirs) > 3

    @needs(Need.JAIL)
    async def test_it_sees_nothing_but_its_jail(self, lab: Lab, template: Snapshot) -> None:
        """Its root folder holds what was given to it, of which it can change its workspace alone."""
        async with running(lab, template) as clone:
            found = {path.name: path.stat() for path in inside(lab.pid(clone.spec))}
        assert {"root", "image", "memory", "state", "workspace"} <= set(found)
        assert "proc" not in found
        for name in ("root", "image", "memory", "state"):
            assert (found[name].st_uid, found[name].st_mode & 0o022) == (0, 0)
        assert found["workspace"].st_uid == FIRST_USER + clone.spec.slot

    @needs(Need.CGROUP)
    async def test_it_has_limits(self, lab: Lab, template: Snapshot) -> None:
        """Memory, threads and processor time have bounds that fit its machine."""
        async with running(lab, template) as clone:
            limits = {name: limit_of(lab.pid(clone.spec), name) for name in ("memory.max", "pids.max", "cpu.max")}
        memory = clone.spec.memory_mib << 20
        assert memory < int(limits["memory.max"]) < memory + (256 << 20)
        assert int(limits["pids.max"]) < 64
        assert limits["cpu.max"].split()[0] != "max"

    def test_too_little_memory_is_refused(self, lab: Lab) -> None:
        """A guest that would die without a word is never started."""
        with pytest.raises(InvalidError, match=f"{MIN_MEMORY_MIB} are the least"):
            replace(lab.spec(), memory_mib=MIN_MEMORY_MIB - 1)

    @needs(Need.KERNEL)
    async def test_the_least_memory_is_enough(self, lab: Lab) -> None:
        """With as little memory as is allowed a guest boots and works."""
        vm = await lab.vmm.boot(replace(lab.spec(), memory_mib=MIN_MEMORY_MIB))
        await greet(vm, new_magic(), BOOT_S)
        await vm.shutdown()

    @pytest.mark.parametrize("name", ["kernel", "initrd", "root", "image", "workspace"])
    async def test_a_missing_file_is_told_before_anything_starts(self, lab: Lab, name: str) -> None:
        """The path and the next step are in the error."""
        spec = replace(lab.spec(), **{name: lab.home.data / "none"})  # type: ignore[arg-type]  # fields of one kind
        with pytest.raises(SetupError, match=r"(?i)/none.*: no such file.*fireclaw setup"):
            await lab.vmm.boot(spec)

    async def test_a_file_that_is_no_kernel_is_told(self, lab: Lab, tmp_path: Path) -> None:
        """A wrong kernel gives the VMM's own reason, not a machine that hangs."""
        kernel = tmp_path / "kernel"
        await asyncio.to_thread(kernel.write_bytes, b"no kernel" * 1000)
        with pytest.raises(VmmError, match=r"(?i)kernel"):
            await lab.vmm.boot(replace(lab.spec(), kernel=kernel))

    async def test_a_host_without_descriptors_is_told(self, lab: Lab) -> None:
        """Wherever in its start a VMM runs out of descriptors, the error is ours, and nothing is left."""
        lab.vmm.fingerprint(lab.spec())  # which looks for the programs, as the templates do first
        for more in itertools.count(1):
            watch, vm, spec = Watch(), None, lab.spec()
            with few_descriptors(more), suppress(FireclawError):
                vm = await lab.vmm.boot(spec, snapshottable=True)
            if vm is not None:
                await vm.shutdown()
            await lab.vmm.sweep(spec.machine_id)  # to remove a folder takes descriptors, too
            assert (watch.new(), lab.leftovers()) == (set(), NOTHING)
            if vm is not None:
                break
        assert more > 3


def _identity(path: str | Path) -> tuple[int, int]:
    found = Path(path).stat()
    return found.st_dev, found.st_ino
