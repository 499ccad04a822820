"""The multiplexer against hostile peers, and one end against the other by a model."""

from __future__ import annotations

import random
import sys
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from wire_chunks import SIZES, chunks

from fireclaw.wire import mux as wire
from fireclaw.wire.mux import (
    ACK,
    DATA,
    FIN,
    GO_AWAY,
    HEADER,
    MAX_ID,
    MAX_REPLIES,
    MAX_STREAMS,
    PING,
    RST,
    SYN,
    WINDOW,
    WINDOW_UPDATE,
    Event,
    Mux,
    MuxError,
    Stream,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

Reported = list[tuple[Event, Stream | None, Any]]

QUICK = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


def frame(kind: int, flags: int, stream_id: int, length: int, payload: bytes = b"") -> bytes:
    """Build one frame, honest or not."""
    return HEADER.pack(0, kind, flags, stream_id, length) + payload


def data_frame(stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    """Build an honest DATA frame."""
    return frame(DATA, flags, stream_id, len(payload), payload)


def opened(mux: Mux, stream_id: int) -> Stream:
    """Let the peer open a stream."""
    ((kind, stream, _),) = mux.receive(frame(WINDOW_UPDATE, SYN, stream_id, 0))
    assert kind is Event.OPENED
    assert stream is not None
    mux.take()
    return stream


class Watch:
    """Checks that events make sense one after the other, and that the multiplexer's memory stays bounded."""

    def __init__(self, mux: Mux) -> None:
        self.mux = mux
        self.known: set[Stream] = set(mux.streams)
        self.finished: set[Stream] = set()
        self.gone: set[Stream] = set()

    def receive(self, data: bytes) -> Reported:
        """Receive through the checks."""
        closed = {stream for stream in self.known if not stream.open}
        events = self.mux.receive(data)
        for kind, stream, value in events:
            self._event(kind, stream, value, closed)
        self.bounded()
        return events

    def _event(self, kind: Event, stream: Stream | None, value: object, closed: set[Stream]) -> None:
        assert type(kind) is Event
        if kind in {Event.PONG, Event.GONE_AWAY}:
            assert stream is None
            assert isinstance(value, int)
            return
        assert stream is not None
        assert stream not in closed
        assert stream not in self.gone
        if kind is Event.OPENED:
            assert stream not in self.known
            self.known.add(stream)
        assert stream in self.known
        if kind is Event.DATA:
            assert isinstance(value, memoryview)
            assert len(value)
            assert stream not in self.finished
        else:
            assert value is None
        if kind is Event.FINISHED:
            assert stream not in self.finished
            self.finished.add(stream)
        if kind is Event.RESET:
            self.gone.add(stream)

    def bounded(self) -> None:
        """Nothing that the peer sent is kept, and what is kept has a limit."""
        mux = self.mux
        theirs = [stream for stream in mux.streams if (stream.id & 1) != mux._client]
        assert mux._accepted == len(theirs) <= MAX_STREAMS
        assert len(mux._header) < HEADER.size
        assert mux._replies <= MAX_REPLIES + HEADER.size
        assert 0 <= mux._left <= WINDOW
        for stream in mux.streams:
            assert stream.open
            assert 0 <= stream.send_window <= WINDOW
            assert 0 <= stream.receive_window <= WINDOW


# -- a hostile peer -------------------------------------------------------------------------------------------


@QUICK
@given(data=st.binary(max_size=400), sizes=SIZES, client=st.booleans())
def test_garbage_is_refused_or_understood(data: bytes, sizes: list[int], client: bool) -> None:
    """Arbitrary bytes raise nothing but MuxError and leave nothing behind."""
    watch = Watch(Mux(client=client))
    for chunk in chunks(data, sizes):
        try:
            watch.receive(chunk)
        except MuxError:
            watch.bounded()
            return


_LENGTHS = st.sampled_from([0, 1, 5, 60, WINDOW // 2, WINDOW - 1, WINDOW, WINDOW + 1, 0xFFFFFFFF])


@st.composite
def _frames(draw: st.DrawFn) -> bytes:
    """One frame that is plausible, or nearly so."""
    kind = draw(st.sampled_from([DATA, DATA, DATA, WINDOW_UPDATE, WINDOW_UPDATE, PING, GO_AWAY, 4]))
    flags = draw(st.sampled_from([0, 0, 0, SYN, SYN, ACK, FIN, RST, SYN | FIN, SYN | RST, FIN | RST, 15, 16]))
    length = draw(_LENGTHS)
    payload = bytes(length if length <= WINDOW else 9) if kind == DATA else b""
    return frame(kind, flags, draw(st.integers(0, 6)), length, payload)


_ACTIONS = st.tuples(st.sampled_from(["consume", "finish", "reset", "send", "take", "open", "ping"]), st.integers(0, 9))


def _act(mux: Mux, watch: Watch, unread: dict[Stream, int], action: str, pick: int) -> None:
    """Let the attacked end's caller do something of its own."""
    if action == "take":
        mux.take()
    elif action == "ping":
        mux.ping(pick)
    elif action == "open" and len(mux.streams) < 6:
        watch.known.add(mux.open())
    elif mux.streams:
        stream = mux.streams[pick % len(mux.streams)]
        if action == "consume":
            mux.consumed(stream, unread.pop(stream, 0))
        elif action == "finish":
            mux.finish(stream)
        elif action == "reset":
            mux.reset(stream)
        elif not stream.finished:
            assert mux.send(stream, bytes(WINDOW)) <= WINDOW


@QUICK
@given(
    script=st.lists(st.tuples(_frames(), _ACTIONS), max_size=30),
    sizes=st.lists(st.integers(1, 40) | st.just(1 << 20), min_size=1, max_size=4),
    client=st.booleans(),
)
def test_plausible_frames_of_a_liar(
    script: list[tuple[bytes, tuple[str, int]]], sizes: list[int], client: bool
) -> None:
    """Well-formed frames in any order, among any calls of our own, raise nothing but MuxError."""
    mux = Mux(client=client)
    watch = Watch(mux)
    unread: dict[Stream, int] = {}
    for data, (action, pick) in script:
        # cutting a payload of 256 KiB into single bytes would teach nothing and take for ever
        head, payload = data[: HEADER.size], data[HEADER.size :]
        for chunk in [*chunks(head, sizes), payload[:1], payload[1:]]:
            try:
                events = watch.receive(chunk)
            except MuxError:
                watch.bounded()
                return
            for kind, stream, value in events:
                if kind is Event.DATA and stream is not None:
                    unread[stream] = unread.get(stream, 0) + len(value)
        _act(mux, watch, unread, action, pick)
        watch.bounded()


def _guest() -> Mux:
    """A guest that has opened a stream and filled half its window, so that it may be granted more."""
    guest = Mux(client=False)
    guest.send(guest.open(), bytes(WINDOW // 2))
    return guest


def _honest_traffic() -> bytes:
    """What a host sends to that guest that opens, writes, grants, pings, finishes and resets."""
    host, guest = Mux(client=True), _guest()
    sent = bytearray()
    for _, stream, value in host.receive(guest.take()):
        if value is not None and stream is not None:
            host.consumed(stream, len(value))

    def pass_on() -> Reported:
        data = host.take()
        sent.extend(data)
        events = guest.receive(data)
        host.receive(guest.take())
        return events

    one, two, three = host.open(), host.open(), host.open()
    host.send(one, b"first words")
    host.send(two, b"\x00" * 40)
    events = pass_on()
    streams = [stream for kind, stream, _ in events if kind is Event.OPENED and stream is not None]
    host.ping(7)
    host.send(one, b"more")
    host.finish(one)
    host.send(three, b"unfinished business")
    pass_on()
    host.reset(three)
    host.send(host.open(), b"last")
    pass_on()
    guest.finish(streams[0])
    host.receive(guest.take())
    return bytes(sent)


_HONEST = _honest_traffic()


@st.composite
def _damaged(draw: st.DrawFn) -> bytes:
    """Honest traffic with a few bytes changed, cut out, repeated or put in."""
    data = bytearray(_HONEST)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(1, 14))
        how = draw(st.sampled_from(["change", "cut", "repeat", "insert"]))
        if how == "change":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif how == "cut":
            del data[at : at + length]
        elif how == "repeat":
            data[at:at] = data[at : at + length]
        else:
            data[at:at] = draw(st.binary(min_size=1, max_size=14))
    return bytes(data)


@QUICK
@given(data=_damaged(), sizes=SIZES)
def test_damaged_traffic(data: bytes, sizes: list[int]) -> None:
    """Honest traffic with damage raises nothing but MuxError, and its events still make sense."""
    watch = Watch(_guest())
    for chunk in chunks(data, sizes):
        try:
            watch.receive(chunk)
        except MuxError:
            watch.bounded()
            return


def _story(pieces: Iterable[bytes]) -> tuple[list[tuple[str, int, object]], bytes]:
    """Tell what came, with neighbouring DATA joined, and what the multiplexer answers to all of it."""
    mux = _guest()
    mux.take()
    story: list[tuple[str, int, object]] = []
    for piece in pieces:
        for kind, stream, value in mux.receive(piece):
            stream_id = stream.id if stream is not None else 0
            if kind is Event.DATA and story and story[-1][:2] == ("DATA", stream_id):
                before = story.pop()[2]
                assert isinstance(before, bytes)
                story.append(("DATA", stream_id, before + value))
            else:
                story.append((kind.name, stream_id, bytes(value) if kind is Event.DATA else value))
    return story, mux.take()


def test_cut_at_every_point() -> None:
    """Two chunks, cut anywhere, mean what one chunk means; so do single bytes."""
    whole = _story([_HONEST])
    assert {name for name, _, _ in whole[0]} == {"OPENED", "DATA", "FINISHED", "RESET", "WRITABLE"}
    for at in range(len(_HONEST)):
        assert _story([_HONEST[:at], _HONEST[at:]]) == whole
    assert _story(chunks(_HONEST, [1])) == whole


@QUICK
@given(sizes=SIZES)
def test_cut_any_way(sizes: list[int]) -> None:
    """However the connection cuts the bytes, they mean the same."""
    assert _story(chunks(_HONEST, sizes)) == _story([_HONEST])


def test_an_unfinished_frame_is_only_waited_for() -> None:
    """Traffic that ends anywhere yields the events of what came, and no error."""
    for at in range(len(_HONEST)):
        Watch(_guest()).receive(_HONEST[:at])


def test_received_bytes_are_not_kept() -> None:
    """Once the caller lets go of the events, nothing holds the chunk."""
    mux = Mux(client=False)
    data = bytes(bytearray(frame(WINDOW_UPDATE, SYN, 1, 0) + frame(DATA, 0, 1, 500, bytes(400))))
    before = sys.getrefcount(data)
    mux.receive(data)
    mux.receive(bytes(100) + b"\x00\x00\x00")  # the rest, and a piece of a header
    assert sys.getrefcount(data) == before


def _flood(make: Callable[[int], bytes], *, fetch: bool, chunk: int = 2000, rounds: int = 40) -> MuxError | None:
    """Send endless frames; return the refusal, if one comes."""
    watch = Watch(Mux(client=False))
    opened(watch.mux, 1)
    watch.known.update(watch.mux.streams)
    for number in range(rounds):
        try:
            watch.receive(b"".join(make(number * chunk + i) for i in range(chunk)))
        except MuxError as error:
            watch.bounded()
            return error
        if fetch:
            assert len(watch.mux.take()) <= MAX_REPLIES + HEADER.size
    assert watch.mux.pending <= MAX_REPLIES
    return None


_FLOODS: dict[str, Callable[[int], bytes]] = {
    "pings": lambda n: frame(PING, SYN, 0, n),
    "streams": lambda n: frame(WINDOW_UPDATE, SYN, 2 * n + 3, 0),
    "streams that are reset at once": lambda n: frame(DATA, SYN | RST, 2 * n + 3, 0),
    "one stream again and again": lambda _: frame(DATA, SYN | RST, 3, 0),
}


@pytest.mark.parametrize("name", _FLOODS)
def test_flood_of_questions_without_fetching_answers(name: str) -> None:
    """A peer that provokes answers and does not read them is refused before they amount to much."""
    error = _flood(_FLOODS[name], fetch=False)
    assert error is not None
    assert "does not fetch" in str(error)


@pytest.mark.parametrize("name", _FLOODS)
def test_flood_of_questions_with_fetching_answers(name: str) -> None:
    """A peer that reads its answers may go on; streams over the limit are refused one by one."""
    assert _flood(_FLOODS[name], fetch=True) is None


_USELESS: dict[str, Callable[[int], bytes]] = {
    "updates of nothing": lambda _: frame(WINDOW_UPDATE, 0, 1, 0),
    "updates of strange streams": lambda n: frame(WINDOW_UPDATE, 0, 2 * n + 3, WINDOW),
    "data of strange streams": lambda n: data_frame(2 * n + 3, b"x"),
    "empty data": lambda _: frame(DATA, 0, 1, 0),
    "ends of strange streams": lambda n: frame(DATA, FIN if n & 1 else RST, 2 * n + 3, 0),
    "unasked pongs": lambda n: frame(PING, ACK, 0, n),
    "goodbyes": lambda n: frame(GO_AWAY, 0, 0, n),
}


@pytest.mark.parametrize("name", _USELESS)
def test_flood_of_useless_frames(name: str) -> None:
    """Frames that ask for nothing cost nothing that stays."""
    assert _flood(_USELESS[name], fetch=False, rounds=5) is None


def test_flood_of_window_updates() -> None:
    """A window that grows beyond 256 KiB, even byte by byte, is refused."""
    error = _flood(lambda _: frame(WINDOW_UPDATE, 0, 1, 1), fetch=True)
    assert error is not None
    assert "the window grew" in str(error)


def test_sending_without_fetching_grants() -> None:
    """A peer that sends for ever and never reads the grants is refused before they amount to much."""
    mux = Mux(client=False)
    stream = opened(mux, 1)
    half = data_frame(1, bytes(WINDOW // 2))

    def go_on() -> None:
        for _ in range(MAX_REPLIES):
            mux.receive(half)
            mux.consumed(stream, WINDOW // 2)

    with pytest.raises(MuxError, match="does not fetch"):
        go_on()
    assert mux.pending <= MAX_REPLIES + HEADER.size


def test_streams_over_the_limit_are_reset() -> None:
    """The peer's 257th open stream is refused by RST, its data dropped; when one ends, there is room again."""
    mux = Mux(client=False)
    for number in range(MAX_STREAMS):
        opened(mux, 2 * number + 1)
    over = 2 * MAX_STREAMS + 1
    assert mux.receive(data_frame(over, b"early", SYN)) == []
    assert mux.take() == frame(DATA, RST, over, 0)
    assert mux.receive(data_frame(over, b"late")) == []
    assert len(mux.streams) == MAX_STREAMS
    mux.receive(frame(DATA, RST, 1, 0))
    opened(mux, over + 2)


def test_our_own_limit() -> None:
    """Opening more than 256 streams is refused here; the peer's streams do not count, ended ones make room."""
    mux = Mux(client=True)
    opened(mux, 2)
    streams = [mux.open() for _ in range(MAX_STREAMS)]
    with pytest.raises(MuxError, match="256 streams are open"):
        mux.open()
    mux.reset(streams[7])
    assert mux.open().id == 2 * MAX_STREAMS + 1


def test_ids_run_out() -> None:
    """The last stream id is used once, and then the connection must be made anew."""
    mux = Mux(client=True)
    mux._next = MAX_ID
    assert mux.open().id == MAX_ID
    with pytest.raises(MuxError, match="all stream ids"):
        mux.open()


@pytest.mark.parametrize("kind", [DATA, WINDOW_UPDATE])
@pytest.mark.parametrize(("client", "stream_id"), [(False, 0), (False, 2), (False, 4), (True, 0), (True, 1), (True, 3)])
def test_ids_that_the_peer_may_not_use(kind: int, client: bool, stream_id: int) -> None:
    """The host opens odd ids only, the guest even ones, and nobody zero, whether in use or not."""
    mux = Mux(client=client)
    mux.open()
    with pytest.raises(MuxError, match="cannot be opened"):
        mux.receive(frame(kind, SYN, stream_id, 0))


def test_opening_an_open_stream() -> None:
    """A second SYN for a stream in use is refused."""
    mux = Mux(client=False)
    opened(mux, 1)
    with pytest.raises(MuxError, match="cannot be opened"):
        mux.receive(frame(DATA, SYN, 1, 0))


@pytest.mark.parametrize(
    "header",
    [HEADER.pack(1, DATA, 0, 1, 0), HEADER.pack(0, 4, 0, 1, 0), HEADER.pack(0, DATA, 0x10, 1, 0)],
    ids=["version", "type", "flags"],
)
def test_not_a_frame(header: bytes) -> None:
    """An unknown version, type or flag is refused."""
    mux = Mux(client=False)
    opened(mux, 1)
    with pytest.raises(MuxError, match="not a frame"):
        mux.receive(header)


def test_overrun_of_the_window() -> None:
    """One byte over what was granted is refused at its header, before any of it is taken."""
    mux = Mux(client=False)
    stream = opened(mux, 1)
    mux.receive(data_frame(1, bytes(WINDOW)))
    assert stream.receive_window == 0
    mux.consumed(stream, WINDOW // 2 - 1)  # not enough for a grant yet
    with pytest.raises(MuxError, match="1 bytes exceed the window"):
        mux.receive(frame(DATA, 0, 1, 1))
    with pytest.raises(MuxError, match="exceed the window"):
        Mux(client=False).receive(frame(DATA, SYN, 1, WINDOW + 1))
    with pytest.raises(MuxError, match="exceed any window"):
        Mux(client=False).receive(frame(DATA, 0, 9, WINDOW + 1))


def test_window_over_256_kib() -> None:
    """An update that lifts the window over 256 KiB is refused, in one step or with the SYN."""
    mux = Mux(client=False)
    stream = opened(mux, 1)
    assert mux.send(stream, bytes(10)) == 10
    assert mux.receive(frame(WINDOW_UPDATE, 0, 1, 10)) == [(Event.WRITABLE, stream, None)]
    with pytest.raises(MuxError, match="the window grew"):
        mux.receive(frame(WINDOW_UPDATE, 0, 1, 1))
    with pytest.raises(MuxError, match="the window grew"):
        mux.receive(frame(WINDOW_UPDATE, SYN, 3, 1))


def test_finishing_twice() -> None:
    """A second FIN says nothing new, whatever kind of frame it stands on."""
    for kinds in ((DATA, WINDOW_UPDATE), (WINDOW_UPDATE, DATA)):
        mux = Mux(client=False)
        stream = opened(mux, 1)
        data = b"".join(frame(kind, FIN, 1, 0) for kind in kinds)
        assert mux.receive(data) == [(Event.FINISHED, stream, None)]
        assert mux.streams == [stream]


@pytest.mark.parametrize("kind", [DATA, WINDOW_UPDATE])
def test_reset_by_the_peer(kind: int) -> None:
    """An RST, whatever kind of frame it stands on and with or without FIN, ends the stream at once."""
    for flags in (RST, RST | FIN):
        mux = Mux(client=False)
        stream = opened(mux, 1)
        assert mux.receive(frame(kind, flags, 1, 0)) == [(Event.RESET, stream, None)]
        assert mux.streams == []


def test_nothing_is_granted_to_a_finished_peer() -> None:
    """A peer that has finished needs no window, so its last bytes are not answered."""
    mux = Mux(client=False)
    stream = opened(mux, 1)
    mux.receive(data_frame(1, bytes(WINDOW), FIN))
    mux.consumed(stream, WINDOW)
    assert mux.take() == b""


def test_data_after_finishing() -> None:
    """Bytes after a FIN are refused; an empty frame is not, nor a grant, for the peer may still read."""
    mux = Mux(client=False)
    stream = opened(mux, 1)
    mux.send(stream, bytes(10))
    mux.receive(data_frame(1, b"the end", FIN))
    assert mux.receive(frame(DATA, 0, 1, 0)) == []
    assert mux.receive(frame(WINDOW_UPDATE, 0, 1, 10)) == [(Event.WRITABLE, stream, None)]
    with pytest.raises(MuxError, match="exceed the window"):
        mux.receive(data_frame(1, b"!"))


def test_late_frames_of_a_stream_that_we_reset() -> None:
    """What was under way when we reset a stream is dropped without a word: data, grants, ends."""
    mux = Mux(client=False)
    stream = opened(mux, 1)
    events = mux.receive(frame(DATA, FIN, 1, 8, b"half"))
    assert [kind for kind, _, _ in events] == [Event.DATA]
    mux.reset(stream)
    late = b"half" + data_frame(1, b"late") + frame(WINDOW_UPDATE, 0, 1, 9) + frame(DATA, FIN, 1, 0)
    assert mux.receive(late + frame(DATA, RST, 1, 0)) == []
    assert mux.streams == []
    assert mux.take() == frame(DATA, RST, 1, 0)


def test_a_reset_stream_swallows_what_it_is_given() -> None:
    """After the peer's RST, sending, granting, finishing and resetting are without effect."""
    mux = Mux(client=False)
    stream = opened(mux, 1)
    mux.receive(data_frame(1, bytes(WINDOW)))
    assert mux.receive(frame(DATA, RST, 1, 0)) == [(Event.RESET, stream, None)]
    assert mux.send(stream, b"lost") == 4
    mux.consumed(stream, WINDOW)
    mux.finish(stream)
    mux.reset(stream)
    assert mux.take() == b""


def test_sending_after_finishing() -> None:
    """A caller that finished a stream and sends on it is told so."""
    mux = Mux(client=True)
    stream = mux.open()
    mux.finish(stream)
    with pytest.raises(MuxError, match="was finished"):
        mux.send(stream, b"x")


def test_goodbye_and_pong() -> None:
    """The peer's code and the answer to a ping come as events without a stream."""
    mux = Mux(client=True)
    mux.ping(0xFFFFFFFF)
    assert mux.take() == frame(PING, SYN, 0, 0xFFFFFFFF)
    events = mux.receive(frame(PING, ACK, 0, 0xFFFFFFFF) + frame(GO_AWAY, 0, 0, 2))
    assert events == [(Event.PONG, None, 0xFFFFFFFF), (Event.GONE_AWAY, None, 2)]


def test_pending_counts_what_take_returns() -> None:
    """``pending`` is the length of what ``take`` will return."""
    mux = Mux(client=True)
    stream = mux.open()
    mux.send(stream, memoryview(b"0123456789")[2:7])
    mux.ping(1)
    pending = mux.pending
    data = mux.take()
    assert len(data) == pending == 3 * HEADER.size + 5
    assert data[2 * HEADER.size :].startswith(b"23456")
    assert (mux.pending, mux.take()) == (0, b"")


# -- two honest ends, by a model ------------------------------------------------------------------------------

_SMALL_WINDOW = 64  # so that a few steps fill it and the half that is granted back
_SMALL_STREAMS = 4
_PATTERN = random.Random(1).randbytes(1 << 16)


@dataclass
class Flow:
    """One direction of one stream, as the model sees it. Its bytes are those of the pattern from ``salt``."""

    salt: int
    sent: int = 0
    received: int = 0
    consumed: int = 0
    finished: bool = False  # by the sender
    finished_seen: bool = False

    def bytes_at(self, position: int, count: int) -> bytes:
        """Return the bytes that stand at a position of the flow."""
        start = (self.salt + position) % (len(_PATTERN) // 2)
        return _PATTERN[start : start + count]


@dataclass
class Side:
    """One end: its multiplexer, its streams, and the pipe that leads away from it."""

    mux: Mux
    streams: dict[int, Stream] = field(default_factory=dict)
    flows: dict[int, Flow] = field(default_factory=dict)  # what this end sends
    resets: set[int] = field(default_factory=set)  # that this end made
    resets_seen: set[int] = field(default_factory=set)
    pings: deque[int] = field(default_factory=deque)
    pipe: bytearray = field(default_factory=bytearray)


_SIDES = st.integers(0, 1)
_PICKS = st.integers(0, 1 << 20)


class TwoEnds(RuleBasedStateMachine):
    """Two ends that do what callers do, on pipes that deliver as they like."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(wire, "WINDOW", _SMALL_WINDOW)
        self.patch.setattr(wire, "MAX_STREAMS", _SMALL_STREAMS)
        self.sides = (Side(Mux(client=True)), Side(Mux(client=False)))
        self.count = 0

    def _pick(self, side: Side, pick: int) -> Stream:
        assume(side.streams)
        return list(side.streams.values())[pick % len(side.streams)]

    # What callers do.

    @rule(which=_SIDES)
    def open(self, which: int) -> None:
        """Open a stream, if the limit allows one more."""
        side = self.sides[which]
        ours = [stream for stream in side.mux.streams if (stream.id & 1) == (which == 0)]
        if len(ours) < _SMALL_STREAMS:
            stream = side.mux.open()
            side.streams[stream.id] = stream
            for sender in self.sides:
                sender.flows[stream.id] = Flow(salt=stream.id * 777 + self.sides.index(sender))
        else:
            with pytest.raises(MuxError, match="streams are open"):
                side.mux.open()

    @rule(which=_SIDES, pick=_PICKS, size=st.integers(0, 2 * _SMALL_WINDOW))
    def send(self, which: int, pick: int, size: int) -> None:
        """Send as much as the window takes."""
        side = self.sides[which]
        stream = self._pick(side, pick)
        flow = side.flows[stream.id]
        if flow.finished:
            with pytest.raises(MuxError, match="was finished"):
                side.mux.send(stream, b"more")
            return
        window = stream.send_window
        taken = side.mux.send(stream, memoryview(flow.bytes_at(flow.sent, size)))
        assert taken == min(size, window)
        if stream.open:
            flow.sent += taken

    @rule(which=_SIDES, pick=_PICKS)
    def finish(self, which: int, pick: int) -> None:
        """Finish one direction, perhaps again."""
        side = self.sides[which]
        stream = self._pick(side, pick)
        side.mux.finish(stream)
        side.flows[stream.id].finished = stream.finished

    @rule(which=_SIDES, pick=_PICKS)
    def reset(self, which: int, pick: int) -> None:
        """Reset a stream, perhaps again."""
        side = self.sides[which]
        stream = self._pick(side, pick)
        if stream.open:
            side.resets.add(stream.id)
        side.mux.reset(stream)
        assert not stream.open

    @rule(which=_SIDES, pick=_PICKS, count=st.integers(1, _SMALL_WINDOW))
    def consume(self, which: int, pick: int, count: int) -> None:
        """Grant some of what was received back."""
        side = self.sides[which]
        stream = self._pick(side, pick)
        flow = self.sides[1 - which].flows[stream.id]
        count = min(count, flow.received - flow.consumed)
        flow.consumed += count
        side.mux.consumed(stream, count)

    @rule(which=_SIDES)
    def ping(self, which: int) -> None:
        """Ask for a sign of life."""
        self.count += 1
        self.sides[which].mux.ping(self.count)
        self.sides[which].pings.append(self.count)

    # What the connection does.

    @rule(which=_SIDES)
    def write(self, which: int) -> None:
        """Put what is pending on the pipe."""
        side = self.sides[which]
        side.pipe += side.mux.take()

    @precondition(lambda self: any(side.pipe for side in self.sides))
    @rule(which=_SIDES, size=st.integers(1, 3 * _SMALL_WINDOW))
    def deliver(self, which: int, size: int) -> None:
        """Let some bytes of a pipe arrive."""
        sender, receiver = self.sides[which], self.sides[1 - which]
        assume(sender.pipe)
        data = bytes(sender.pipe[:size])
        del sender.pipe[:size]
        closed = {stream.id for stream in receiver.streams.values() if not stream.open}
        for kind, stream, value in receiver.mux.receive(data):
            if stream is not None:
                assert stream.id not in closed
                assert stream.id not in receiver.resets_seen
            self._event(sender, receiver, kind, stream, value)

    def _event(self, sender: Side, receiver: Side, kind: Event, stream: Stream | None, value: Any) -> None:
        if kind is Event.PONG:
            assert value == receiver.pings.popleft()
            return
        assert stream is not None
        if kind is Event.OPENED:
            assert stream.id in sender.streams
            assert stream.id not in receiver.streams
            receiver.streams[stream.id] = stream
            return
        assert receiver.streams[stream.id] is stream
        flow = sender.flows[stream.id]
        if kind is Event.DATA:
            assert not flow.finished_seen
            assert value == flow.bytes_at(flow.received, len(value))
            flow.received += len(value)
        elif kind is Event.FINISHED:
            assert flow.finished
            assert flow.received == flow.sent
            flow.finished_seen = True
        elif kind is Event.RESET:
            assert stream.id in sender.resets
            assert not stream.open
            receiver.resets_seen.add(stream.id)
        else:
            assert kind is Event.WRITABLE

    @rule()
    def settle(self) -> None:
        """Deliver all there is; then both ends must think alike."""
        while any(side.pipe or side.mux.pending for side in self.sides):
            for which, side in enumerate(self.sides):
                side.pipe += side.mux.take()
                if side.pipe:
                    self.deliver(which, len(side.pipe))
        one, two = self.sides
        assert set(one.streams) == set(two.streams)
        assert {stream.id for stream in one.mux.streams} == {stream.id for stream in two.mux.streams}
        assert not one.pings
        assert not two.pings
        for stream_id, stream in one.streams.items():
            other = two.streams[stream_id]
            assert stream.open == other.open
            if not {stream_id} & (one.resets | two.resets):
                assert stream.finished == other.peer_finished
                assert other.finished == stream.peer_finished
                assert stream.open == (not (stream.finished and other.finished))
                for side in self.sides:
                    assert side.flows[stream_id].received == side.flows[stream_id].sent
            for sender, receiver in ((stream, other), (other, stream)):
                if sender.open and not sender.finished:
                    assert sender.send_window == receiver.receive_window

    @invariant()
    def windows_hold(self) -> None:
        """No end has more under way than the other has room for, and the counts are right."""
        for which, side in enumerate(self.sides):
            for flow in side.flows.values():
                assert flow.consumed <= flow.received <= flow.sent <= flow.consumed + _SMALL_WINDOW
            live = side.mux.streams
            assert all(side.streams[stream.id] is stream and stream.open for stream in live)
            assert sum(stream.open for stream in side.streams.values()) == len(live)
            assert side.mux._accepted == sum((stream.id & 1) != (which == 0) for stream in live)

    def teardown(self) -> None:
        """After everybody has read, finished and been heard, no stream is left and every window has moved on."""
        try:
            for _ in range(2):
                self.settle()
                for side, peer in (self.sides, self.sides[::-1]):
                    for stream in side.streams.values():
                        flow = peer.flows[stream.id]
                        side.mux.consumed(stream, flow.received - flow.consumed)
                        flow.consumed = flow.received
            for side in self.sides:
                for stream in side.streams.values():
                    if stream.open and not stream.finished:
                        assert stream.send_window > _SMALL_WINDOW // 2  # a reader that reads never blocks its writer
                        side.mux.finish(stream)
                        side.flows[stream.id].finished = True
            self.settle()
            assert [side.mux.streams for side in self.sides] == [[], []]
            assert [side.mux._accepted for side in self.sides] == [0, 0]
        finally:
            self.patch.undo()


TestTwoEnds = TwoEnds.TestCase
TestTwoEnds.settings = settings(
    deadline=None, max_examples=120, stateful_step_count=60, suppress_health_check=list(HealthCheck)
)
