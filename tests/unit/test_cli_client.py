"""The command line's HTTP client: chunked framing, cut and damaged, and the daemon's errors rebuilt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireclaw.cli.client import Dechunker, pack_chunk, remote_error
from fireclaw.errors import ConflictError, FireclawError, NotFoundError


@given(st.lists(st.binary(min_size=1, max_size=50)), st.integers(min_value=1, max_value=30))
def test_chunks_come_out_however_they_are_cut(payloads: list[bytes], step: int) -> None:
    """The payload comes out whole, whatever pieces the framing arrives in, and the end is seen exactly at the end."""
    framed = b"".join(map(pack_chunk, payloads)) + b"0\r\n\r\n"
    dechunker = Dechunker()

    found = b""
    for start in range(0, len(framed), step):
        assert not dechunker.ended or start > len(framed) - 4
        found += b"".join(dechunker.feed(framed[start : start + step]))

    assert found == b"".join(payloads)
    assert dechunker.ended


@given(st.lists(st.binary(min_size=1, max_size=50), min_size=1), st.data())
def test_a_cut_body_is_not_an_end(payloads: list[bytes], data: st.DataObject) -> None:
    """A body cut anywhere before its last chunk has not ended."""
    framed = b"".join(map(pack_chunk, payloads))
    cut = data.draw(st.integers(min_value=0, max_value=len(framed)))
    dechunker = Dechunker()

    found = b"".join(dechunker.feed(framed[:cut]))

    assert b"".join(payloads).startswith(found)
    assert not dechunker.ended


@pytest.mark.parametrize("data", [b"zz\r\n", b"\r\n", b"<html>\n", b"1" * 70000])
def test_other_bytes_are_refused(data: bytes) -> None:
    """Bytes that are not chunked framing are an error, and an endless header is not kept."""
    with pytest.raises(ConnectionError, match="not HTTP"):
        list(Dechunker().feed(data))


def test_errors_are_rebuilt_with_their_class() -> None:
    """The daemon's errors come back as the class of their code, unknown codes as the base class."""
    found = remote_error({"code": "not-found", "message": "no image named 'x'", "hint": "try y"})
    other = remote_error({"code": "novel", "message": "m"})
    empty = remote_error({})

    assert type(found) is NotFoundError
    assert str(found) == "no image named 'x' (try y)"
    assert (type(other), other.code, other.hint) == (FireclawError, "novel", "")
    assert empty.message == "the daemon gave no reason"
    assert type(remote_error({"code": "conflict"})) is ConflictError
