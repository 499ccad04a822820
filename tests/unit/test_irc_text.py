"""Text in and out of IRC: splitting by bytes, cleaning, quietening."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireclaw.irc.message import Kind, Prefix
from fireclaw.irc.text import clean_text, parse_ctcp, room_for, say_as, speakable, split_line, split_text

_ANY = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=300)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0")), st.integers(4, 60))
def test_pieces_reassemble(line: str, room: int) -> None:
    """The pieces of a line, joined, are the line; none is over the limit or has half a character."""
    pieces = split_line(line, room)
    assert "".join(pieces) == line
    assert all(len(piece.encode()) <= room for piece in pieces)


@given(_ANY, st.integers(4, 60))
def test_split_text_loses_only_line_ends(text: str, room: int) -> None:
    """Splitting drops line ends, blank lines and trailing space, and nothing else."""
    pieces = split_text(text, room)
    assert "".join("".join(pieces).split()) == "".join(text.replace("\0", " ").split())
    assert all(piece and len(piece.encode()) <= room for piece in pieces)
    assert not any(char in piece for piece in pieces for char in "\r\n\0")


def test_lone_surrogates_do_not_crash() -> None:
    """Text that no UTF-8 can carry is said with a question mark."""
    assert split_text("a\udcffb", 10) == ["a?b"]


def test_long_utf8_is_cut_between_characters() -> None:
    """600 bytes of é become two lines, and an emoji on the edge moves to the next line whole."""
    assert [len(piece.encode()) for piece in split_text("é" * 300, 451)] == [450, 150]
    assert split_text("a" * 8 + "🦀", 10) == ["a" * 8, "🦀"]
    assert split_text("x" * 21, 10) == ["x" * 10, "x" * 10, "x"]
    assert split_text("x" * 20, 10) == ["x" * 10, "x" * 10]


def test_a_space_near_the_end_is_a_better_place() -> None:
    """A line breaks after a space in its last quarter, and anywhere else where there is none."""
    assert split_text("aaaa bbbbb cc", 12) == ["aaaa bbbbb ", "cc"]
    assert split_text("a bbbbbbbbbbbbb", 12) == ["a bbbbbbbbbb", "bbb"]


def test_indentation_is_kept_and_blank_lines_are_not() -> None:
    """Code keeps its indentation; IRC cannot say an empty line."""
    assert split_text("def f():\r\n    return 1\n\n \n\tx\0y", 100) == ["def f():", "    return 1", "\tx", "y"]


def test_room_is_counted_as_others_receive_the_line() -> None:
    """The relayed line has our mask in front and ends at 512 bytes with its CR LF."""
    me = Prefix("bot", "~bot", "127.0.0.1")
    frame = b":bot!~bot@127.0.0.1 PRIVMSG #agents :"
    assert room_for(me, Kind.PRIVMSG, "#agents") == 510 - len(frame)
    assert room_for(me, Kind.NOTICE, "#agents") == 510 - len(frame) + 1
    action = say_as(Kind.ACTION, "x" * room_for(me, Kind.ACTION, "#agents"))
    assert len(frame) + len(action) == 510


def test_an_absurd_mask_leaves_room() -> None:
    """A server that gives us a mask of a kilobyte cannot make the room vanish."""
    assert room_for(Prefix("n" * 1000, "u", "h"), Kind.PRIVMSG, "#x") == 64


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("\x02bold\x02 \x0304,12red\x03 \x1d\x1f\x16\x11\x1e\x0f", "bold red "),
        ("\x04FF0000hex \x04", "hex "),
        ("\x0312345", "345"),
        ("co\u200bder \u202eevil\u2066", "coder evil"),
        ("a\x07b\x1b[31mc\x7f\x9b", "ab[31mc"),
        ("tab\tstays é 🦀", "tab\tstays é 🦀"),
    ],
)
def test_formatting_and_invisible_characters_are_cleaned(raw: str, clean: str) -> None:
    """Nothing invisible is left that could hide a name from a match."""
    assert clean_text(raw) == clean


@given(_ANY)
def test_what_is_spoken_cannot_act(text: str) -> None:
    """No control character but line ends and tabs is left in what we say, so no CTCP and no terminal escape."""
    said = speakable(text)
    assert not [char for char in said if (ord(char) < 32 and char not in "\n\t") or 0x7F <= ord(char) <= 0x9F]
    assert "\u202e" not in said


def test_ctcp_is_told_from_text() -> None:
    r"""A leading \x01 makes a request, with or without its closing one."""
    assert parse_ctcp("\x01ping 1 2\x01") == ("PING", "1 2")
    assert parse_ctcp("\x01VERSION") == ("VERSION", "")
    assert parse_ctcp("hello \x01VERSION\x01") is None
