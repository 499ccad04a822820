"""Machines as the daemon makes them: what makes a clone somebody, and what its workload may do."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import TYPE_CHECKING

import pytest
from exec_rules import run, sh

from fireclaw.errors import ChannelLostError, NotFoundError
from fireclaw.machines import calls
from fireclaw.machines.calls import Exec
from fireclaw.machines.channel import Channel
from fireclaw.store.machines import Purpose

if TYPE_CHECKING:
    from fireclaw.daemon.rooms import Rooms

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
async def channel(rooms: Rooms) -> Channel:
    """The channel of a cloned machine."""
    machine = await rooms.machines.create(Purpose.NAMED, name="box")
    await machine.settled()
    return machine.channel


async def test_two_clones_share_nothing_that_tells_them_apart(rooms: Rooms) -> None:
    """Two clones at once differ in hostname, machine-id, UUIDs and random bytes, and know the time."""
    machines = await asyncio.gather(*(rooms.machines.create(Purpose.RUN) for _ in range(2)))
    script = (
        "hostname; cat /etc/hostname /etc/machine-id /proc/sys/kernel/random/uuid;"
        " head -c 16 /dev/urandom | od -An -tx1; getent hosts $(hostname); date +%s.%N"
    )
    began = time.time()
    first, second = await asyncio.gather(*(sh(machine.channel, script) for machine in machines))
    ended = time.time()
    lines = [output.decode().splitlines() for _, output, _ in (first, second)]
    for mine, others in zip(lines[0][:6], lines[1][:6], strict=True):
        assert mine != others
    for each in lines:
        assert each[0] == each[1]  # /etc/hostname says the same as the kernel
        assert began - 1 < float(each[-1]) < ended + 1
    await asyncio.gather(*(machine.settled() for machine in machines))


async def test_the_workload_has_no_network_card(channel: Channel) -> None:
    """Only the loopback exists, and it works."""
    assert await sh(channel, "ls /sys/class/net; cat /proc/net/dev | wc -l") == (0, b"lo\n3\n", b"")
    assert (await run(channel, "bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/9"))[2].endswith(b"Connection refused\n")


async def test_a_confined_command_has_no_privileges(channel: Channel) -> None:
    """The agent's commands run as its user, with no_new_privs and no capability in any set."""
    script = (
        "id -un; id -u; pwd; grep -E 'Cap(Prm|Eff|Bnd|Amb)|NoNewPrivs' /proc/self/status | awk '{print $2}' | sort -u"
    )
    execution = await calls.start(channel, Exec(["sh", "-c", script], user="1000:1000", confined=True))
    out = b"".join([data async for _, data in execution.output()])
    assert out.split() == [b"agent", b"1000", b"/home/agent", b"0000000000000000", b"1"]


async def test_a_setuid_program_gives_a_confined_command_nothing(channel: Channel) -> None:
    """A setuid root copy of a program runs without root for a confined command."""
    assert (await sh(channel, "cp /usr/bin/id /usr/local/bin/rootid; chmod 4755 /usr/local/bin/rootid"))[0] == 0
    execution = await calls.start(channel, Exec(["rootid", "-u"], user="1000:1000", confined=True))
    assert [data async for _, data in execution.output()] == [b"1000\n"]


async def test_users_are_found_by_name_and_number(channel: Channel) -> None:
    """A user may be named or numbered; one that the image does not know is refused with the reason."""
    for user, expected in (
        ("agent", b"1000 1000\n"),
        ("1234", b"1234 1234\n"),
        ("1000:0", b"1000 0\n"),
        ("", b"0 0\n"),
    ):
        assert (await run(channel, "sh", "-c", "echo $(id -u) $(id -g)", user=user))[1] == expected
    execution = await calls.start(channel, Exec(["true"], user="nobody-here"))
    assert [item async for item in execution.output()] == []
    assert execution.exit is not None
    assert (execution.exit.status, execution.exit.error) == (126, "the image has no user 'nobody-here'")


async def test_a_machine_survives_a_workload_that_breaks_its_image(channel: Channel) -> None:
    """Without its libc and shell the image is of no use, yet the machine answers, and files can be read."""
    await sh(channel, "rm -rf /usr/lib /lib64")
    assert (await run(channel, "true"))[0] in {126, 127}
    assert b"agent" in await calls.read_file(channel, "/etc/passwd", 4096)
    assert (await calls.call(channel, "info"))["memory"]["MemTotal"] > 200_000


async def test_twenty_megabytes_pass_both_ways(channel: Channel) -> None:
    """Twenty megabytes come back unchanged from a guest."""
    data = hashlib.shake_128(b"fireclaw").digest(20_000_000)
    status, out, _ = await run(channel, "cat", stdin=data)
    assert (status, hashlib.sha256(out).digest()) == (0, hashlib.sha256(data).digest())


async def test_a_guest_that_ends_itself_is_noticed(rooms: Rooms) -> None:
    """A command in a guest that is switched off fails with the channel, and nothing is left of the machine."""
    machine = await rooms.machines.create(Purpose.NAMED, name="box")
    await machine.settled()
    execution = await machine.start(Exec(["sleep", "60"]))
    await machine.ask_to_end()
    with pytest.raises(ChannelLostError):
        await anext(execution.output())
    await _until_gone(rooms)
    with pytest.raises(NotFoundError):
        rooms.machines.get("box")


async def test_clones_cannot_change_what_later_clones_start_from(rooms: Rooms) -> None:
    """What one clone writes into its memory is not in the next one."""
    first = await rooms.machines.create(Purpose.RUN)
    await sh(first.channel, "echo poison > /run/poison; echo poison > /etc/poison; rm /etc/os-release")
    await first.settled()
    second = await rooms.machines.create(Purpose.RUN)
    assert await sh(second.channel, "ls /run/poison /etc/poison 2>/dev/null; wc -l < /etc/os-release") == (
        0,
        b"9\n",
        b"",
    )
    await second.settled()


async def test_commands_that_are_started_before_the_first_answer_run_after_the_identity(rooms: Rooms) -> None:
    """The very first command of a clone sees the new hostname, though nothing was waited for."""
    machine = await rooms.machines.create(Purpose.NAMED, name="early")
    assert await sh(machine.channel, "hostname") == (0, b"early\n", b"")
    await machine.settled()


async def test_a_session_that_breaks_off_in_the_middle_is_followed_by_a_clean_one(rooms: Rooms) -> None:
    """After abrupt reconnects in the middle of bulk output each new session works, and old commands are dead."""
    machine = await rooms.machines.create(Purpose.NAMED, name="box")
    await machine.settled()
    rooms.machines._watchers[machine.row.machine_id].cancel()  # which would end a machine that lost its session
    await machine.channel.aclose()
    for _ in range(5):
        channel = await Channel.open(await machine.vm.open_channel(timeout_s=10), bytes.fromhex(machine.row.magic))
        assert await sh(channel, "pgrep -c yes") == (1, b"0\n", b"")
        execution = await calls.start(channel, Exec(["yes"]))
        await anext(execution.output())
        await channel.aclose()


async def _until_gone(rooms: Rooms) -> None:
    async with asyncio.timeout(20):
        while rooms.machines.all():  # noqa: ASYNC110 - rows are polled, as a client would
            await asyncio.sleep(0.02)
