"""The hello's magic is a clone's own: what one machine's guest knows is of no use in another. Found in review."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from fireclaw.machines import calls
from fireclaw.machines.calls import Exec, Exit
from fireclaw.machines.channel import Channel
from fireclaw.store.machines import Purpose
from fireclaw.testing.guest import LocalGuest
from fireclaw.wire.hello import hello, new_magic, new_nonce
from fireclaw.wire.mux import Mux

if TYPE_CHECKING:
    from pathlib import Path

    from fireclaw.daemon.rooms import Rooms


def session_that_runs(magic: bytes, *argv: str) -> bytes:
    """Make bytes that begin a session and run a command in it, to whoever believes the magic."""
    mux = Mux(client=True)
    stream = mux.open()
    mux.send(stream, Exec(argv).line())
    return hello(magic, new_nonce()) + mux.take()


async def test_bytes_of_another_machine_cannot_speak_to_guestd(tmp_path: Path) -> None:
    """Input that holds the template's magic, which every clone's guest has seen, is input and nothing more."""
    template = new_magic()
    target = tmp_path / "made by input"
    evil = session_that_runs(template, "touch", str(target))
    with LocalGuest() as guest:
        channel = await Channel.open(guest.connect(), template)
        await calls.give_identity(channel, "worker", new_magic())

        execution = await calls.start(channel, Exec(["cat"], stdin=True))
        await execution.write(evil)
        await execution.close_stdin()
        output = b"".join([data async for _, data in execution.output()])

        assert (output, execution.exit) == (evil, Exit(0))
        assert not target.exists()
        await channel.aclose()


async def test_a_later_session_needs_the_clones_own_magic() -> None:
    """After the identity the guest answers to its own magic, as an adopting daemon needs, and not to the template's."""
    template, own = new_magic(), new_magic()
    with LocalGuest() as guest:
        channel = await Channel.open(guest.connect(), template)
        await calls.give_identity(channel, "worker", own)
        await channel.aclose()

        channel = await Channel.open(guest.connect(), own)
        assert "uptime" in await calls.call(channel, "info")
        await channel.aclose()


async def test_clones_of_one_snapshot_have_magics_of_their_own(rooms: Rooms) -> None:
    """Two clones of one template share no magic with each other, nor with the template."""
    first, second = await asyncio.gather(rooms.machines.create(Purpose.RUN), rooms.machines.create(Purpose.RUN))
    await asyncio.gather(first.settled(), second.settled())

    (loaded,) = rooms.machines._templates._loaded.values()
    assert len({first.row.magic, second.row.magic, loaded.magic.hex()}) == 3
