"""The line that begins a stream: read however it is cut, refused where it lies."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_chunks import SIZES, chunks

from fireclaw.wire.calls import MAX_LINE, CallError, LineReader, pack_line

QUICK = settings(deadline=None, max_examples=60)

_OBJECTS = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
        max_leaves=8,
    ),
    max_size=5,
)


def _feed(pieces: list[bytes]) -> tuple[dict[str, Any] | None, bytes]:
    """Return the object, and what follows it: the reader's rest and the pieces after that."""
    reader = LineReader()
    for number, piece in enumerate(pieces):
        value = reader.feed(piece)
        if value is not None:
            return value, reader.rest + b"".join(pieces[number + 1 :])
        assert reader.rest == b""
    return None, b""


@QUICK
@given(value=_OBJECTS, rest=st.binary(max_size=60), sizes=SIZES)
def test_roundtrip(value: dict[str, Any], rest: bytes, sizes: list[int]) -> None:
    """However line and what follows are cut, the object comes out and no byte behind it is lost."""
    assert _feed(list(chunks(pack_line(value) + rest, sizes))) == (value, rest)


@QUICK
@given(value=_OBJECTS, sizes=SIZES, cut=st.integers(1, 200))
def test_truncation(value: dict[str, Any], sizes: list[int], cut: int) -> None:
    """A line without its end is waited for."""
    assert _feed(list(chunks(pack_line(value)[:-cut], sizes))) == (None, b"")


@QUICK
@given(data=st.binary(max_size=200) | st.text(alphabet='{}[]":,\\u0d8 1e-.', max_size=60).map(str.encode), sizes=SIZES)
def test_garbage(data: bytes, sizes: list[int]) -> None:
    """Arbitrary bytes raise nothing but CallError; what is accepted is an object."""
    try:
        value, _ = _feed(list(chunks(data + b"\n", sizes)))
    except CallError:
        return
    assert isinstance(value, dict)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"exec",
        b'{"call": "exec"',
        b'{"call": "\xff"}',
        b'{"a":1}{"b":2}',
        b'{"a":' + b"[" * 500_000,
        b'{"n":' + b"9" * 10_000 + b"}",
    ],
    ids=["empty", "word", "cut", "not UTF-8", "two", "deep", "huge number"],
)
def test_not_json(line: bytes) -> None:
    """What is not JSON, or nests or counts beyond reason, is a CallError and nothing worse."""
    with pytest.raises(CallError, match="not JSON"):
        LineReader().feed(line + b"\n")


@pytest.mark.parametrize("line", [b"[]", b'"exec"', b"1", b"null", b"true"])
def test_not_an_object(line: bytes) -> None:
    """JSON that is not an object is refused."""
    with pytest.raises(CallError, match="not a JSON object"):
        LineReader().feed(line + b"\n")


def _line(size: int) -> bytes:
    return b'{"a":"' + b"x" * (size - 8) + b'"}'


def test_the_longest_line() -> None:
    """A line of exactly MAX_LINE bytes is read, its newline in the same chunk or later."""
    line = _line(MAX_LINE)
    assert len(line) == MAX_LINE
    reader = LineReader()
    assert reader.feed(line) is None
    assert reader.feed(b"\nrest") is not None
    assert reader.rest == b"rest"
    assert LineReader().feed(line + b"\n") is not None


def test_a_line_too_long() -> None:
    """One byte more is refused, with or without a newline, and however far away that is."""
    for data in (_line(MAX_LINE + 1), _line(MAX_LINE + 1) + b"\n", bytes(MAX_LINE + 1) + b"\n{}\n"):
        with pytest.raises(CallError, match=f"over {MAX_LINE} bytes"):
            LineReader().feed(data)


def test_what_is_too_long_is_refused_before_it_grows() -> None:
    """A line without end is refused with the chunk that exceeds the limit."""
    reader = LineReader()
    for _ in range(MAX_LINE // 65536):
        assert reader.feed(bytes(65536)) is None
    with pytest.raises(CallError, match="over"):
        reader.feed(b"x")


def _seconds_byte_by_byte(size: int, times: int) -> float:
    start = time.process_time()
    for _ in range(times):
        reader = LineReader()
        for byte in _line(size):
            assert reader.feed(b"%c" % byte) is None
        assert reader.feed(b"\n") is not None
    return time.process_time() - start


def test_a_long_line_byte_by_byte() -> None:
    """The longest line in single bytes costs the time of as many bytes in short lines, not its square."""
    assert _seconds_byte_by_byte(MAX_LINE, 1) < 5 * _seconds_byte_by_byte(1024, MAX_LINE // 1024)


def test_views() -> None:
    """Memoryviews, as the multiplexer reports them, are read."""
    reader = LineReader()
    assert reader.feed(memoryview(b'{"call":"in')) is None
    assert reader.feed(memoryview(b'fo"}\n\x00\xff')) == {"call": "info"}
    assert reader.rest == b"\x00\xff"


def test_one_line() -> None:
    """A newline within a value is escaped: the line ends only at its end."""
    line = pack_line({"env": {"A": "1\n2"}})
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
