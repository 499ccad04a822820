"""The order, the pace and the bounds of what an IRC session sends."""

from __future__ import annotations

import math
from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from fireclaw.irc.message import Kind, Prefix
from fireclaw.irc.sendqueue import Parcel, SendQueue
from fireclaw.irc.throttle import CommandLimit, Rate, TokenBucket, Verdict

ME = Prefix("bot", "~bot", "127.0.0.1")


def parcel(name: str, *lines: str, target: str = "#a", kind: Kind = Kind.PRIVMSG) -> Parcel[str]:
    """A message that is known by a name."""
    return Parcel(target, kind, deque(lines or [name]), name)


def queue(limit: int = 10, rate: Rate | None = None) -> SendQueue[str]:
    """A queue that is fast enough not to matter."""
    return SendQueue(rate or Rate(per_second=1000, burst=1000), limit, 0.0)


def drain(waiting: SendQueue[str], *, me: Prefix = ME, talk: bool = True) -> list[str]:
    """Everything that may go, as lines."""
    lines = []
    while ticket := waiting.take(me, talk=talk, now=0.0):
        lines.append(ticket.data.decode().rstrip())
    return lines


def test_urgent_lines_overtake_commands_overtake_talk() -> None:
    """PONG goes first, then commands, then talk, each in its order."""
    waiting = queue()
    waiting.put_talk(parcel("hello"))
    waiting.put_command(b"WHOIS :ann\r\n")
    waiting.put_urgent(b"PONG :1\r\n")
    waiting.put_urgent(b"PONG :2\r\n")
    assert drain(waiting) == ["PONG :1", "PONG :2", "WHOIS :ann", "PRIVMSG #a :hello"]


def test_before_registration_only_urgent_lines_go() -> None:
    """Talk that waits for a connection waits until it is registered."""
    waiting = queue()
    waiting.put_talk(parcel("hello"))
    waiting.put_urgent(b"NICK :bot\r\n")
    assert drain(waiting, talk=False) == ["NICK :bot"]
    assert waiting.delay(talk=False, now=0.0) == math.inf
    assert drain(waiting) == ["PRIVMSG #a :hello"]


def test_the_pace_is_two_lines_a_second_after_four() -> None:
    """Four short lines go at once, then one each half second; an urgent line never waits."""
    waiting = queue(limit=100, rate=Rate())
    for number in range(10):
        waiting.put_talk(parcel(str(number)))
    now, times = 0.0, []
    while waiting.talk_lines:
        if waiting.take(ME, talk=True, now=now):
            times.append(now)
        else:
            now += waiting.delay(talk=True, now=now)
    assert times == [0, 0, 0, 0, 0.5, 1, 1.5, 2, 2.5, 3]
    waiting.put_urgent(b"PONG :x\r\n")
    assert waiting.delay(talk=True, now=now) == 0
    assert waiting.take(ME, talk=True, now=now) is not None


def test_long_lines_cost_more() -> None:
    """Each 256 bytes begun is a token, and the debt is waited for afterwards."""
    bucket = TokenBucket(Rate(per_second=2, burst=4), 0.0)
    for _ in range(2):
        assert bucket.delay(0.0) == 0
        bucket.pay(400, 0.0)
    assert bucket.delay(0.0) == 0.5
    bucket.pay(512, 0.5)
    assert bucket.delay(0.5) == 1.0
    assert bucket.delay(1000.0) == 0
    for _ in range(4):
        assert bucket.delay(1000.0) == 0
        bucket.pay(1, 1000.0)
    assert bucket.delay(1000.0) == 0.5


def test_a_message_of_several_lines_stays_together() -> None:
    """A message begins with its first line, ends with its last, and nothing comes between but what is urgent."""
    waiting = queue()
    waiting.put_talk(parcel("two", "one", "two"))
    waiting.put_talk(parcel("three"))
    first = waiting.take(ME, talk=True, now=0)
    second = waiting.take(ME, talk=True, now=0)
    third = waiting.take(ME, talk=True, now=0)
    assert first
    assert second
    assert third
    assert [(ticket.is_first, ticket.is_last) for ticket in (first, second, third)] == [
        (True, False),
        (False, True),
        (True, True),
    ]
    assert [ticket.parcel.owner for ticket in (first, second, third) if ticket.parcel] == ["two", "two", "three"]


def test_an_overflow_drops_the_oldest_and_says_so() -> None:
    """A thousand lines leave the newest, with one note where the gap is."""
    waiting = queue(limit=3)
    dropped = [victim for number in range(1000) for victim in waiting.put_talk(parcel(str(number)))]
    assert [victim.owner for victim in dropped] == [str(number) for number in range(997)]
    assert drain(waiting) == [
        "PRIVMSG #a :… 997 lines dropped",
        "PRIVMSG #a :997",
        "PRIVMSG #a :998",
        "PRIVMSG #a :999",
    ]


def test_a_note_goes_where_the_gap_is() -> None:
    """People in a channel hear of their own gap only, and by the kind of line they would have had."""
    waiting = queue(limit=2)
    waiting.put_talk(parcel("a", target="ann", kind=Kind.NOTICE))
    waiting.put_talk(parcel("b", target="bob"))
    waiting.put_talk(parcel("c", target="ann", kind=Kind.NOTICE))
    assert drain(waiting) == ["PRIVMSG bob :b", "NOTICE ann :… 1 line dropped", "NOTICE ann :c"]


def test_what_has_begun_is_not_dropped() -> None:
    """An overflow never cuts a message in two."""
    waiting = queue(limit=3)
    waiting.put_talk(parcel("begun", "1", "2", "3"))
    assert waiting.take(ME, talk=True, now=0)
    waiting.put_talk(parcel("x"))
    assert [victim.owner for victim in waiting.put_talk(parcel("y"))] == ["x"]
    assert drain(waiting) == ["PRIVMSG #a :2", "PRIVMSG #a :3", "PRIVMSG #a :… 1 line dropped", "PRIVMSG #a :y"]


def test_a_longer_mask_splits_again() -> None:
    """A line that was split for a short nick still fits when it is said under a long one."""
    waiting = queue()
    text = "é" * 200
    waiting.put_talk(parcel("long", text, kind=Kind.ACTION))
    me = Prefix("n" * 30, "u" * 20, "h" * 63)
    lines = drain(waiting, me=me)
    assert len(lines) == 2
    assert all(len(f":{me} {line}".encode()) <= 510 for line in lines)
    assert "".join(line.split("ACTION ")[1].strip("\x01") for line in lines) == text


def test_a_lost_connection_keeps_what_had_not_begun() -> None:
    """Commands die with their connection, a message cut in the middle is handed back, the rest waits."""
    waiting = queue()
    waiting.put_talk(parcel("cut", "1", "2"))
    waiting.put_talk(parcel("kept"))
    assert waiting.take(ME, talk=True, now=0)
    waiting.put_command(b"WHOIS :ann\r\n")
    waiting.put_urgent(b"PONG :x\r\n")
    cut = waiting.drop_connection()
    assert cut is not None
    assert cut.owner == "cut"
    assert waiting.drop_connection() is None
    assert drain(waiting) == ["PRIVMSG #a :kept"]


def test_a_closed_client_empties_the_queue() -> None:
    """What will never be said is handed back."""
    waiting = queue()
    waiting.put_talk(parcel("a"))
    assert [each.owner for each in waiting.drop_talk()] == ["a"]
    assert waiting.last is None
    assert drain(waiting) == []


@given(st.lists(st.tuples(st.sampled_from(["#a", "ann"]), st.integers(1, 4)), max_size=40), st.integers(4, 12))
def test_the_queue_is_bounded(messages: list[tuple[str, int]], limit: int) -> None:
    """However it is filled, the talk never exceeds its limit and nothing vanishes unaccounted."""
    waiting = queue(limit=limit)
    dropped = 0
    for target, count in messages:
        dropped += sum(len(victim.lines) for victim in waiting.put_talk(parcel("x", *["x"] * count, target=target)))
        assert waiting.talk_lines <= limit
    said = [line for line in drain(waiting) if not line.endswith("dropped")]
    assert len(said) + dropped == sum(count for _, count in messages)


def test_too_many_commands_are_refused_once() -> None:
    """The thirteenth command in a minute is refused, later ones ignored, and after a minute all is well."""
    limit = CommandLimit(12)
    verdicts = [limit.judge("ann", float(at)) for at in range(15)]
    assert verdicts == [Verdict.SERVE] * 12 + [Verdict.REFUSE, Verdict.IGNORE, Verdict.IGNORE]
    assert limit.judge("bob", 15.0) is Verdict.SERVE
    assert limit.judge("ann", 60.0) is Verdict.REFUSE
    assert limit.judge("ann", 200.0) is Verdict.SERVE


def test_the_limit_forgets() -> None:
    """People who are silent for a minute cost no memory."""
    limit = CommandLimit(12)
    for number in range(1000):
        limit.judge(str(number), 0.0)
    limit.judge("ann", 61.0)
    assert list(limit._times) == ["ann"]
