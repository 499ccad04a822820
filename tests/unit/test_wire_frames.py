"""Frames survive any cutting of the stream, and a liar's frames are refused before they cost memory."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_chunks import SIZES, chunks

from fireclaw.wire.frames import HEADER, MAX_PAYLOAD, FrameError, FrameReader, Kind, pack, pack_json
from fireclaw.wire.mux import WINDOW

QUICK = settings(deadline=None, max_examples=150)

_FRAMES = st.lists(st.tuples(st.sampled_from(Kind), st.binary(max_size=80)), max_size=12)


def _read(reader: FrameReader, pieces: list[bytes]) -> list[tuple[Kind, bytes]]:
    return [found for piece in pieces for found in reader.feed(piece)]


@QUICK
@given(frames=_FRAMES, sizes=SIZES)
def test_roundtrip(frames: list[tuple[Kind, bytes]], sizes: list[int]) -> None:
    """However the bytes are cut, the same frames come out, in order, and nothing stays."""
    reader = FrameReader()
    data = b"".join(pack(kind, payload) for kind, payload in frames)
    found = _read(reader, list(chunks(data, sizes)))
    assert found == frames
    assert all(type(kind) is Kind and type(payload) is bytes for kind, payload in found)
    assert reader.pending == 0


@QUICK
@given(frames=_FRAMES, kept=st.integers(0, 400), sizes=SIZES)
def test_truncation(frames: list[tuple[Kind, bytes]], kept: int, sizes: list[int]) -> None:
    """A stream that stops anywhere has yielded exactly its whole frames; the rest counts as pending."""
    data = b"".join(pack(kind, payload) for kind, payload in frames)[:kept]
    reader = FrameReader()
    found = _read(reader, list(chunks(data, sizes)))
    assert found == frames[: len(found)]
    assert reader.pending == len(data) - len(b"".join(pack(kind, payload) for kind, payload in found))
    if len(found) < len(frames):
        assert reader.pending < len(pack(*frames[len(found)]))


@QUICK
@given(data=st.binary(max_size=300), sizes=SIZES)
def test_garbage(data: bytes, sizes: list[int]) -> None:
    """Arbitrary bytes raise nothing but FrameError, and after it nothing is kept."""
    reader = FrameReader()
    try:
        for piece in chunks(data, sizes):
            for kind, payload in reader.feed(piece):
                assert type(kind) is Kind
                assert len(payload) <= MAX_PAYLOAD
    except FrameError:
        assert reader.pending == 0


@pytest.mark.parametrize("header", [(len(Kind), 0), (255, 5), (Kind.STDOUT, MAX_PAYLOAD + 1), (Kind.EXIT, 0xFFFFFFFF)])
def test_unknown_kinds_and_huge_lengths(header: tuple[int, int]) -> None:
    """The header alone is refused, whatever follows, after the frames before it were yielded."""
    reader = FrameReader()
    found = reader.feed(pack(Kind.STDOUT, b"good") + HEADER.pack(*header) + bytes(100_000))
    assert next(found) == (Kind.STDOUT, b"good")
    with pytest.raises(FrameError, match=f"kind {int(header[0])}, length {header[1]}"):
        next(found)
    assert reader.pending == 0


def test_the_longest_frame() -> None:
    """A payload of MAX_PAYLOAD passes, and until its last byte came no more than the frame is kept."""
    payload = bytes(range(256)) * (MAX_PAYLOAD // 256)
    data = pack(Kind.STDIN, payload)
    reader = FrameReader()
    for piece in chunks(data[:-1], [4096]):
        assert list(reader.feed(piece)) == []
        assert reader.pending <= HEADER.size + MAX_PAYLOAD
    assert list(reader.feed(data[-1:])) == [(Kind.STDIN, payload)]
    assert reader.pending == 0


def test_the_longest_frame_passes_any_window() -> None:
    """A receiver that grants whole frames only never stalls: what it owes and one frame fit the window."""
    assert HEADER.size + MAX_PAYLOAD <= WINDOW - WINDOW // 2


def test_views_and_early_stop() -> None:
    """Memoryviews are read; a caller that stops in the middle finds the other frames at its next feed."""
    reader = FrameReader()
    data = pack(Kind.STDOUT, b"one") + pack(Kind.STDERR, memoryview(b"two")) + pack(Kind.NOTE)
    for item in reader.feed(memoryview(data)):
        assert item == (Kind.STDOUT, b"one")
        break
    assert list(reader.feed(b"")) == [(Kind.STDERR, b"two"), (Kind.NOTE, b"")]


def test_json() -> None:
    """A JSON frame is compact JSON behind the header."""
    value = {"status": 3, "timed_out": False, "text": "ä\n"}
    ((kind, payload),) = FrameReader().feed(pack_json(Kind.EXIT, value))
    assert kind is Kind.EXIT
    assert json.loads(payload) == value
    assert b" " not in payload
