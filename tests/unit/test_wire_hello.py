"""A session begins whole, whatever stands before it, however the bytes are cut, whoever died in between."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wire_chunks import SIZES, chunks

from fireclaw.wire.hello import (
    ECHO_SIZE,
    HELLO_SIZE,
    MAGIC_SIZE,
    NONCE_SIZE,
    PREFIX,
    VERSION,
    EchoFinder,
    HelloError,
    HelloFinder,
    echo,
    hello,
    new_magic,
    new_nonce,
)

QUICK = settings(deadline=None, max_examples=150)

# Random as in life: a magic that repeats itself could be seen where none stands.
_RANDOM = random.Random(7)
MAGIC = _RANDOM.randbytes(MAGIC_SIZE)
NONCES = [_RANDOM.randbytes(NONCE_SIZE) for _ in range(8)]
NONCE = NONCES[0]


def test_sizes() -> None:
    """A hello is the prefix and what is echoed; magic and nonce are new each time."""
    magic, nonce = new_magic(), new_nonce()
    assert len(echo(magic, nonce)) == ECHO_SIZE
    assert hello(magic, nonce) == PREFIX + echo(magic, nonce)
    assert len(hello(magic, nonce)) == HELLO_SIZE
    assert magic != new_magic()
    assert nonce != new_nonce()


# -- the host's side ------------------------------------------------------------------------------------------

# What an older session may have left: anything, also echoes of other nonces and pieces of our own. All of our own
# cannot stand there; but where only its last byte is missing, chance would complete it now and then.
_STALE = (
    st.lists(
        st.binary(max_size=60)
        | st.sampled_from([echo(MAGIC, NONCES[1]), hello(MAGIC, NONCES[1]), MAGIC])
        | st.integers(1, ECHO_SIZE - 1).map(lambda size: echo(MAGIC, NONCE)[:size]),
        max_size=6,
    )
    .map(b"".join)
    .filter(lambda stale: echo(MAGIC, NONCE) not in stale)
)


@QUICK
@given(stale=_STALE, rest=st.binary(max_size=80), sizes=SIZES)
def test_the_echo_is_found(stale: bytes, rest: bytes, sizes: list[int]) -> None:
    """The session is all that follows the echo, to the byte, and nothing that stood before it."""
    finder = EchoFinder(MAGIC, NONCE)
    session: bytes | None = None
    for piece in chunks(stale + echo(MAGIC, NONCE) + rest, sizes):
        if session is None:
            session = finder.feed(piece)
            assert len(finder._tail) < ECHO_SIZE
        else:
            session += piece
    assert session == rest
    assert finder.discarded == len(stale)


@QUICK
@given(stale=_STALE, sizes=SIZES)
def test_without_the_echo_nothing_begins(stale: bytes, sizes: list[int]) -> None:
    """Stale bytes alone, echoes of other nonces among them, begin no session and are not kept."""
    finder = EchoFinder(MAGIC, NONCE)
    for piece in chunks(stale, sizes):
        assert finder.feed(piece) is None
        assert len(finder._tail) < ECHO_SIZE
    assert finder.discarded + len(finder._tail) == len(stale)


def test_megabytes_of_stale_bytes() -> None:
    """What is discarded is counted and not kept."""
    finder = EchoFinder(MAGIC, NONCE)
    for _ in range(64):
        assert finder.feed(bytes(65536)) is None
        assert len(finder._tail) < ECHO_SIZE
    assert finder.feed(echo(MAGIC, NONCE) + b"first") == b"first"
    assert finder.discarded == 64 * 65536


def test_an_echo_of_another_version() -> None:
    """A guest of another version is not taken for ours."""
    other = MAGIC + (VERSION + 1).to_bytes(2, "big") + NONCE
    assert EchoFinder(MAGIC, NONCE).feed(other + b"first") is None


# -- the guest's side -----------------------------------------------------------------------------------------


@dataclass
class Session:
    """What one session of the guest received."""

    nonce: bytes
    data: bytearray = field(default_factory=bytearray)


class Guest:
    """Does with a finder what guestd does: one session at a time, each ended by the next hello or an error."""

    def __init__(self) -> None:
        self.finder = HelloFinder()
        self.sessions: list[Session] = []
        self.current: Session | None = None
        self.errors = 0

    def receive(self, data: bytes) -> None:
        """Take a chunk."""
        try:
            before, nonce, rest = self.finder.feed(data)
        except HelloError:
            self.errors += 1
            self.current = None
            return
        assert len(self.finder._tail) < HELLO_SIZE
        if nonce is None:
            assert rest == b""
            if self.current is not None:
                self.current.data += before
        else:
            assert before == b""
            self.current = Session(nonce, bytearray(rest))
            self.sessions.append(self.current)


def _wrong(nonce: bytes, version: int = VERSION + 1) -> bytes:
    return PREFIX + MAGIC + version.to_bytes(2, "big") + nonce


@QUICK
@given(
    junk=st.lists(st.binary(max_size=40) | st.just(PREFIX) | st.integers(1, 7).map(lambda n: PREFIX[:n]), max_size=4),
    rest=st.binary(max_size=80),
    sizes=SIZES,
)
def test_the_first_hello(junk: list[bytes], rest: bytes, sizes: list[int]) -> None:
    """The first hello is found behind any junk, teaches the magic, and begins a session of what follows."""
    guest = Guest()
    for piece in chunks(b"".join(junk) + hello(MAGIC, NONCE) + rest, sizes):
        guest.receive(piece)
    assert guest.current == Session(NONCE, bytearray(rest))
    assert guest.finder.magic == MAGIC


def test_hello_within_a_session_cut_at_every_point() -> None:
    """Wherever a chunk ends, and byte by byte, the new session has its own bytes and the old one none of them."""
    old, new = b"old \x00 bytes", b"new \xff bytes"
    data = hello(MAGIC, NONCES[0]) + old + hello(MAGIC, NONCES[1]) + new
    cuts = [[data[:at], data[at:]] for at in range(1, len(data))]
    for pieces in [*cuts, [data], list(chunks(data, [1]))]:
        guest = Guest()
        for piece in pieces:
            guest.receive(piece)
        assert guest.current == Session(NONCES[1], bytearray(new))
        for session in guest.sessions[:-1]:
            assert session.nonce == NONCES[0]
            # of the hello itself, only what cannot be told from data until the magic is whole
            assert (old + hello(MAGIC, NONCES[1])[: len(PREFIX) + MAGIC_SIZE - 1]).startswith(session.data)


def test_the_magic_alone_ends_the_old_session() -> None:
    """Once the magic came, no byte reaches the old session, though the hello is not whole yet."""
    guest = Guest()
    guest.receive(hello(MAGIC, NONCES[0]) + b"old")
    guest.receive(b"more" + PREFIX + MAGIC)
    guest.receive(VERSION.to_bytes(2, "big") + NONCES[1][:15])
    assert guest.sessions == [Session(NONCES[0], bytearray(b"old"))]
    guest.receive(NONCES[1][15:] + b"new")
    assert guest.current == Session(NONCES[1], bytearray(b"new"))


def test_a_session_is_not_held_back() -> None:
    """Every byte of a session is handed over with its chunk, even one that a hello could begin with."""
    guest = Guest()
    guest.receive(hello(MAGIC, NONCE))
    expected = b""
    for piece in (b"\x00", PREFIX, PREFIX + MAGIC[:15], b"\x00", MAGIC[:1]):
        guest.receive(piece)
        expected += piece
        assert guest.current == Session(NONCE, bytearray(expected))


def test_the_last_hello_of_a_chunk_counts() -> None:
    """Of several hellos that were waiting, only the last one's session begins."""
    guest = Guest()
    guest.receive(b"".join(hello(MAGIC, nonce) + b"data" for nonce in NONCES))
    assert guest.sessions == [Session(NONCES[-1], bytearray(b"data"))]


@pytest.mark.parametrize("sizes", [[1], [7], [1000]])
def test_another_version(sizes: list[int]) -> None:
    """A host of another version is refused, before the first session and within one; ours may follow at once."""
    guest = Guest()
    for piece in chunks(_wrong(NONCES[1]) + b"theirs", sizes):
        guest.receive(piece)
    assert (guest.errors, guest.sessions, guest.finder.magic) == (1, [], b"")
    for piece in chunks(hello(MAGIC, NONCES[0]) + b"ours", sizes):
        guest.receive(piece)
    assert guest.current == Session(NONCES[0], bytearray(b"ours"))
    for piece in chunks(_wrong(NONCES[2]) + b"theirs", sizes):
        guest.receive(piece)
    assert guest.errors == 2
    assert guest.current is None
    for piece in chunks(hello(MAGIC, NONCES[3]) + b"again", sizes):
        guest.receive(piece)
    assert guest.current == Session(NONCES[3], bytearray(b"again"))


def test_the_versions_are_named() -> None:
    """The error says both versions, for the console."""
    with pytest.raises(HelloError, match=f"version 77, this guest {VERSION}"):
        HelloFinder().feed(_wrong(NONCE, 77))


@pytest.mark.parametrize("first", [True, False], ids=["first hello", "within a session"])
def test_a_torn_hello_hides_no_hello(first: bool) -> None:
    """A host that dies anywhere within its hello keeps no later one out, however the bytes are cut."""
    for torn in range(1, HELLO_SIZE):
        data = hello(MAGIC, NONCES[1])[:torn] + hello(MAGIC, NONCES[2]) + b"data"
        for sizes in ([1], [3], [torn, 1], [HELLO_SIZE], [HELLO_SIZE, 1], [torn, 1000], [1000]):
            guest = Guest()
            if not first:
                guest.receive(hello(MAGIC, NONCES[0]) + b"old")
            for piece in chunks(data, sizes):
                guest.receive(piece)
            assert guest.current == Session(NONCES[2], bytearray(b"data"))
            assert guest.finder.magic == MAGIC


# A host's life: sessions of data, some begun by a hello behind a torn one or by one of another version. The data may
# hold anything but the magic, which nobody else knows.
_DATA = st.lists(
    st.binary(max_size=30)
    | st.sampled_from([PREFIX, PREFIX + MAGIC[:15], PREFIX + bytes(34), MAGIC[1:], b"\x00\x01"])
    | st.integers(1, 15).map(lambda size: MAGIC[:size]),
    max_size=5,
).map(b"+".join)
_LIVES = st.lists(
    st.tuples(st.sampled_from(["whole", "whole", "torn", "wrong"]), st.integers(1, HELLO_SIZE - 1), _DATA),
    min_size=1,
    max_size=len(NONCES),
)


@QUICK
@given(life=_LIVES, sizes=SIZES)
def test_any_life_of_a_host(life: list[tuple[str, int, bytes]], sizes: list[int]) -> None:
    """Among any interleaving of data and hellos, each session has only bytes of its own, and the last has them all."""
    stream = b""
    begins: dict[bytes, int] = {}  # where the session of a nonce begins in the stream
    for (how, size, data), nonce in zip(life, NONCES, strict=False):
        if how == "torn":
            stream += hello(MAGIC, nonce[::-1])[:size]
        elif how == "wrong":
            stream += _wrong(nonce[::-1])
        stream += hello(MAGIC, nonce)
        begins[nonce] = len(stream)
        stream += data
    guest = Guest()
    for piece in chunks(stream, sizes):
        guest.receive(piece)
    for session in guest.sessions:
        if session.nonce in begins:  # not one made up of a torn hello and what followed it
            assert stream[begins[session.nonce] :].startswith(session.data)
    assert guest.current == Session(nonce, bytearray(stream[begins[nonce] :]))
