"""The ring: the last bytes of a FIFO, and words in it that are noticed."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest

from fireclaw.vmm.firecracker.ring import Ring

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


class Pipe:
    """A FIFO with a ring at one end.

    Attributes:
        ring: at the reading end.
        path: the FIFO.
        seen: how often the words came.
    """

    def __init__(self, path: Path, size: int = 100) -> None:
        os.mkfifo(path)
        self.path = path
        self.ring = Ring(os.open(path, os.O_RDONLY | os.O_NONBLOCK), size)
        self.seen = asyncio.Event()
        self._writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)

    def write(self, data: bytes) -> None:
        """Be the process that writes."""
        os.write(self._writer, data)

    def end(self) -> None:
        """End that process."""
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1


@pytest.fixture
async def pipe(tmp_path: Path) -> AsyncIterator[Pipe]:
    """A FIFO with a ring of a hundred bytes."""
    pipe = Pipe(tmp_path / "fifo")
    yield pipe
    pipe.ring.close()
    pipe.end()


async def test_the_end_is_kept(pipe: Pipe) -> None:
    """What was written last is there, and no more than fits."""
    pipe.write(b"a" * 80)
    assert pipe.ring.content() == b"a" * 80
    pipe.write(b"b" * 50)
    assert pipe.ring.content() == b"a" * 50 + b"b" * 50


async def test_more_than_a_pipe_holds_passes(pipe: Pipe) -> None:
    """The loop reads as it comes: a writer that needs room gets it without anybody asking for the content."""
    pipe.ring.watch([b"end"], pipe.seen.set)
    for _ in range(40):
        pipe.write(b"x" * 16_000)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    pipe.write(b"end")
    await asyncio.wait_for(pipe.seen.wait(), 5)
    assert pipe.ring.content() == b"x" * 97 + b"end"


@pytest.mark.parametrize("pieces", [[b"-reboot: Power down-"], [b"reboot: Pow", b"er down"], [*b"reboot: Power down"]])
async def test_a_word_is_noticed_wherever_it_is_cut(pipe: Pipe, pieces: list[bytes | int]) -> None:
    """A word that comes in pieces is as good as one that comes at once."""
    pipe.ring.watch([b"reboot: System halted", b"reboot: Power down"], pipe.seen.set)
    for piece in pieces:
        assert not pipe.seen.is_set()
        pipe.write(bytes([piece]) if isinstance(piece, int) else piece)
        pipe.ring.content()
    assert pipe.seen.is_set()


async def test_a_look_does_not_make_it_deaf(pipe: Pipe) -> None:
    """Whoever takes the bytes between the loop's look and its reading takes nothing from what comes later."""
    pipe.ring.watch([b"later"], pipe.seen.set)
    pipe.write(b"now")
    asyncio.get_running_loop().call_soon(pipe.ring.content)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    pipe.write(b"later")
    await asyncio.wait_for(pipe.seen.wait(), 5)


async def test_a_writer_that_is_gone_costs_nothing(pipe: Pipe) -> None:
    """At the end of a FIFO its last bytes are there, and the loop is not woken again and again."""
    pipe.write(b"last words")
    pipe.end()
    reads = 0
    read = pipe.ring._read

    def count() -> bytes | None:
        nonlocal reads
        reads += 1
        return read()

    pipe.ring._read = count  # type: ignore[method-assign]  # to count them
    async with asyncio.timeout(5):
        while pipe.ring._bytes != b"last words":  # noqa: ASYNC110 - the loop reads it
            await asyncio.sleep(0)
    for _ in range(100):
        await asyncio.sleep(0)
    assert reads <= 3
    assert pipe.ring.content() == b"last words"


async def test_what_is_left_is_taken_at_the_end(pipe: Pipe) -> None:
    """To close a ring keeps what the process wrote last, and closes its descriptor once."""
    pipe.write(b"last words")
    pipe.ring.close()
    pipe.ring.close()
    assert pipe.ring.content() == b"last words"
    with pytest.raises(BrokenPipeError):
        pipe.write(b"x")
