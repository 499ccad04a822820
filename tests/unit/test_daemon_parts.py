"""Small parts of the daemon: the narrator, and what is kept of a command's output."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from fireclaw.daemon.hands import Kept
from fireclaw.daemon.narrator import Narrator


async def test_all_who_listen_are_told_from_any_thread() -> None:
    """Lines said in threads reach every listener, in order, before its block ends."""
    narrator = Narrator()
    heard: list[str] = []
    plain: list[str] = []

    async def note(line: str) -> None:
        await asyncio.sleep(0)
        heard.append(line)

    def say_both() -> None:
        narrator.say("one")
        narrator.say("two")

    with narrator.listen(plain.append):
        async with narrator.tell(note):
            await asyncio.to_thread(say_both)
            await asyncio.sleep(0)
    narrator.say("nobody listens")
    await asyncio.sleep(0)
    assert heard == plain == ["one", "two"]


@given(st.lists(st.binary(max_size=50)), st.integers(1, 40))
def test_head_and_tail_are_kept(pieces: list[bytes], half: int) -> None:
    """However output is cut into pieces, its beginning and end are kept and the gap is counted."""
    kept = Kept(half)
    for piece in pieces:
        kept.add(piece)
    whole = b"".join(pieces)
    if len(whole) <= 2 * half:
        assert kept.get() == whole
    else:
        gap = f"\n[... {len(whole) - 2 * half} bytes ...]\n".encode()
        assert kept.get() == whole[:half] + gap + whole[-half:]
