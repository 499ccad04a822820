"""How a connection may cut a byte stream: any way it likes. Shared by the tests of the wire."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Sizes of successive chunks, repeated as often as needed; [1] is one byte at a time, [1 << 20] everything at once.
SIZES = st.lists(st.integers(1, 48) | st.just(1 << 20), min_size=1, max_size=6)


def chunks(data: bytes, sizes: Sequence[int]) -> Iterator[bytes]:
    """Cut ``data`` into pieces of these sizes."""
    position = 0
    for size in cycle(sizes):
        if position >= len(data):
            return
        yield data[position : position + size]
        position += size
