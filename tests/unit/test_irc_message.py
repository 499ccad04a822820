"""IRC lines: parsing whatever comes, formatting nothing that could be two lines."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireclaw.errors import InvalidError
from fireclaw.irc.message import Kind, Line, LineBuffer, Prefix, check_target, fold, format_line, parse_line


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"PING :abc", Line("PING", ("abc",))),
        (b"ping abc", Line("PING", ("abc",))),
        (b":srv 001 me :Welcome to :it", Line("001", ("me", "Welcome to :it"), Prefix("srv"))),
        (b":a!~b@c PRIVMSG #x :  two  spaces ", Line("PRIVMSG", ("#x", "  two  spaces "), Prefix("a", "~b", "c"))),
        (b":a!~b@c  PRIVMSG   #x   hi", Line("PRIVMSG", ("#x", "hi"), Prefix("a", "~b", "c"))),
        (b"TOPIC #x :", Line("TOPIC", ("#x", ""))),
        (b":a@h QUIT", Line("QUIT", (), Prefix("a", "", "h"))),
        (
            b"@bot;k=a\\sb\\:\\\\;e= :a NOTICE b :c",
            Line("NOTICE", ("b", "c"), Prefix("a"), {"bot": "", "k": "a b;\\", "e": ""}),
        ),
        (b"PRIVMSG #x :\xc3", Line("PRIVMSG", ("#x", "\ufffd"))),
        (b"PING :a\0b\rc", Line("PING", ("abc",))),
        (b"JOIN #a\xc2\xa0b", Line("JOIN", ("#a\xa0b",))),
        (b"", None),
        (b"   ", None),
        (b":onlyprefix", None),
        (b"@tags", None),
    ],
)
def test_parses_what_servers_send(raw: bytes, expected: Line | None) -> None:
    """A line becomes its parts, however it is spaced, tagged or encoded; a line without a command is none."""
    assert parse_line(raw) == expected


@given(st.binary(max_size=600))
def test_any_bytes_parse(raw: bytes) -> None:
    """No bytes make the parser raise, and nothing that could end a line comes through it."""
    line = parse_line(raw)
    if line is not None:
        assert line.command
        assert not any(char in part for part in (line.command, *line.params) for char in "\r\n\0")


def test_formats_what_it_parses() -> None:
    """A formatted line reads back as itself, its last parameter always safe for spaces and colons."""
    assert format_line("PRIVMSG", "#x", ":) two words") == b"PRIVMSG #x ::) two words\r\n"
    assert format_line("PING") == b"PING\r\n"
    assert parse_line(format_line("KICK", "#a", "bob", "")[:-2]) == Line("KICK", ("#a", "bob", ""))


@pytest.mark.parametrize("bad", ["a\r\nQUIT", "a\nb", "a\rb", "a\0b"])
def test_injection_is_refused(bad: str) -> None:
    """A CR, LF or NUL in any parameter is refused, wherever it stands."""
    with pytest.raises(InvalidError):
        format_line("PRIVMSG", bad, "text")
    with pytest.raises(InvalidError):
        format_line("PRIVMSG", "#x", bad)
    with pytest.raises(InvalidError):
        check_target(bad)


@pytest.mark.parametrize("params", [("", "x"), ("a b", "x"), (":a", "x"), ("#x", "é" * 250)])
def test_malformed_lines_are_refused(params: tuple[str, ...]) -> None:
    """A parameter that would be read as another one, and a line over 510 bytes, are refused."""
    with pytest.raises(InvalidError):
        format_line("PRIVMSG", *params)


@given(st.lists(st.text(max_size=80), max_size=4))
def test_a_formatted_line_is_one_line(params: list[str]) -> None:
    """Whatever is formatted is exactly one line of at most 512 bytes with the same parameters."""
    try:
        data = format_line("X", *params)
    except InvalidError:
        return
    assert data.endswith(b"\r\n")
    assert len(data) <= 512
    assert not {b"\r", b"\n", b"\0"} & {data[i : i + 1] for i in range(len(data) - 2)}
    line = parse_line(data)
    assert line is not None
    assert line.params == tuple(params)


@pytest.mark.parametrize(
    "target", ["", "a,b", "$*.fi", "#*.edu", "user%host", "n!u@h", "@#x", "+x", "-x", "a b", ":a", "x" * 101, "a?"]
)
def test_masks_and_lists_are_no_targets(target: str) -> None:
    """A message goes to exactly one person or channel, never to a mask, a list or a status group."""
    with pytest.raises(InvalidError):
        check_target(target)


@pytest.mark.parametrize("target", ["ada", "#agents", "&local", "fo[o]", "coder-fc1", "{x}|^`_\\", "ünï"])
def test_names_are_targets(target: str) -> None:
    """Names of people and channels pass."""
    assert check_target(target) == target


def test_folding_follows_the_server() -> None:
    """Brackets are letters in RFC 1459 and characters of their own in ascii, as ngircd has it."""
    assert fold("Fo[O]~") == "fo{o}^"
    assert fold("Fo[O]~", "strict-rfc1459") == "fo{o}~"
    assert fold("Fo[O]~", "ascii") == "fo[o]~"
    assert fold("ÄB", "something-new") == "Äb"


def test_lines_are_cut_out_of_the_stream() -> None:
    """Lines come out whole, whatever the chunks, with CR LF or a bare LF; empty ones are left out."""
    buffer = LineBuffer()
    assert buffer.feed(b"PING :a\r\nPI") == [b"PING :a"]
    assert buffer.feed(b"NG :b\n\r\n") == [b"PING :b"]


def test_an_endless_line_is_skipped() -> None:
    """A line of 16 KiB costs bounded memory and the lines after it are read as usual."""
    buffer = LineBuffer()
    for _ in range(20):
        assert buffer.feed(b"x" * 8192) == []
        assert len(buffer._rest) <= 16 * 1024
    assert buffer.feed(b"tail\r\nPING :a\r\n") == [b"PING :a"]
    assert buffer.feed(b"PING :b\r\n") == [b"PING :b"]


@given(st.binary(max_size=400), st.integers(1, 50))
def test_chunks_do_not_matter(data: bytes, size: int) -> None:
    """The same bytes give the same lines in any chunks."""
    whole = LineBuffer().feed(data)
    buffer = LineBuffer()
    parts = [line for at in range(0, len(data), size) for line in buffer.feed(data[at : at + size])]
    assert parts == whole


def test_an_action_travels_in_a_privmsg() -> None:
    """Each kind of talk names the command that carries it."""
    assert [kind.command for kind in Kind] == ["PRIVMSG", "NOTICE", "PRIVMSG"]
