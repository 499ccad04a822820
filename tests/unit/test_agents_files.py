"""What the file tools say: parts of files, edits, listings, matches, and what went wrong."""

from __future__ import annotations

import pytest
from agents_world import output
from hypothesis import given
from hypothesis import strategies as st

from fireclaw.agents import scripts
from fireclaw.agents.commands import describe_job
from fireclaw.agents.files import (
    Content,
    ToolError,
    check_status,
    edited,
    parse_read,
    show_content,
    show_listing,
    show_matches,
)


@given(st.lists(st.text("abcdé", max_size=30), min_size=1, max_size=40), st.integers(80, 200))
def test_parts_of_a_file_add_up_to_it(lines: list[str], limit: int) -> None:
    """Read on from where each answer says: every line appears once, in order, and no part is over the limit."""
    data = "".join(f"{line}\n" for line in lines).encode()
    start, seen = 1, ""
    while start <= len(lines):
        rest = b"\n".join(data.split(b"\n")[start - 1 :])[: limit + 1]
        text = show_content("f", Content(len(data), len(lines), rest), start, None, limit)
        body, note, where = text.rpartition("[lines ")
        seen += (body if note else text).removesuffix("\n" if note else "") + ("\n" if note else "")
        assert len((body or text).encode()) <= limit + 1
        start = int(where.partition(" to ")[2].partition(" ")[0]) + 1 if note else len(lines) + 1
    assert seen.split() == data.decode().split()


@pytest.mark.parametrize(
    ("data", "start", "count", "shown"),
    [
        (b"", 1, None, "[the file is empty]"),
        (b"a\nb\n", 1, None, "a\nb\n"),
        (b"a\nb", 1, None, "a\nb"),
        (b"a\nb\n", 1, 1, "a\n[lines 1 to 1 of 2; go on with start=2]"),
        (b"b\n", 2, None, "b\n[lines 2 to 2 of 2]"),
        (b"caf\xe9\n\n", 1, None, "caf\ufffd\n\n"),
    ],
)
def test_lines_are_shown_with_the_way_on(data: bytes, start: int, count: int | None, shown: str) -> None:
    """The whole file has no note, a part says which it is."""
    assert show_content("f", Content(9, 2, data), start, count, 100) == shown


@given(st.text("ab\n", max_size=30), st.text("ab\n", min_size=1, max_size=4), st.text("abc", max_size=4))
def test_an_edit_replaces_what_python_would(data: str, old: str, new: str) -> None:
    """One place, or all of them; everything else is refused and changes nothing."""
    count = data.count(old)
    for everywhere in (False, True):
        if old == new or not count or (count > 1 and not everywhere):
            with pytest.raises(ToolError):
                edited("f", data.encode(), old, new, everywhere=everywhere)
        else:
            assert edited("f", data.encode(), old, new, everywhere=everywhere)[0] == data.replace(old, new).encode()


def test_an_edit_that_misses_shows_the_nearest_line() -> None:
    """A model that misremembers a line sees the one that is there."""
    with pytest.raises(ToolError, match=r"The nearest is line 2:     return x"):
        edited("f", b"def f(x):\n    return x\n", "    return  x", "y", everywhere=False)


def test_a_listing_has_folders_links_and_sizes() -> None:
    """One line an entry, in order; what the machine prints besides is let go."""
    printed = (
        b"directory|4096|'./b dir'\nregular file|12|'./a'\nregular empty file|0|'./c'\nsymbolic link|3|'./l' -> 'a'\n"
        b'fifo|0|"./it\'s"\nnonsense\n'
    )
    assert show_listing(output(printed, 1, b"find: './x': Permission denied"), 1000) == (
        "a  12 bytes\nb dir/\nc  0 bytes\nit's  (fifo)\nl -> a\n[there are folders that you may not look into]"
    )
    assert show_listing(output(printed), 20).endswith("[3 more; list a folder in it]")
    assert show_listing(output(b""), 20) == "[the folder is empty]"


def test_matches_are_cut_and_counted() -> None:
    """Long lines are cut, many are counted, none is said."""
    assert show_matches(output(b"./a:1:x\n"), 1000) == "a:1:x"
    assert show_matches(output(b"a:1:" + b"x" * 999), 1000) == "a:1:" + "x" * 196
    assert show_matches(output(b"a:1:x\n" * 50), 20) == (
        "a:1:x\na:1:x\na:1:x\n[47 more lines match; look for something narrower]"
    )
    assert show_matches(output(b""), 1000) == "[no line matches]"


@pytest.mark.parametrize("printed", [b"", b"1\n", b"x\ny\nz\n", b"1 -2\ndata"])
def test_a_machine_that_prints_nonsense_is_not_believed(printed: bytes) -> None:
    """What comes from the machine is checked before it is used."""
    with pytest.raises(ToolError, match="makes no sense"):
        parse_read(output(printed))
    with pytest.raises(ToolError, match="makes no sense"):
        describe_job("job-1", output(printed), cancelled=False)


@pytest.mark.parametrize("status", range(scripts.MISSING, scripts.DANGLING + 1))
def test_every_status_has_words(status: int) -> None:
    """No status of a script is told as a number alone."""
    with pytest.raises(ToolError) as caught:
        check_status("some/file", output(b"", status, b"sh: the reason\n"))
    assert str(caught.value).startswith("error: ")
    assert "some/file" in str(caught.value)
    assert str(status) not in str(caught.value)
