"""What the command line writes for people: escapes made harmless, columns aligned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fireclaw.cli import VERBS, _find, _help
from fireclaw.cli.machines import age
from fireclaw.cli.terminal import clean, print_table, say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é, 漢字", "plain, é, 漢字"),
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("two\nlines\r\t\x07", "two\\nlines\\r\\t\\x07"),
        ("\u202eright to left\x9b", "\\u202eright to left\\x9b"),
    ],
)
def test_control_characters_are_shown_not_obeyed(text: str, shown: str) -> None:
    """Escape sequences, line breaks and direction marks of others come out as text."""
    assert clean(text) == shown


def test_a_sentence_is_one_line_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    """What we say is one line with our name, on stderr only, whatever is in it."""
    say("it failed:\n\x1b[2J \udcff")

    assert capfd.readouterr() == ("", "fireclaw: it failed:\\n\\x1b[2J \\udcff\n")


def test_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    """A table for programs has its columns aligned, no colours, and no trailing blanks."""
    print_table(["name", "state"], [["worker", "idle"], ["a\x1b[1m", "x"]])

    assert capsys.readouterr().out == "NAME      STATE\nworker    idle\na\\x1b[1m  x\n"


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-1, "0 s"), (59.9, "59 s"), (60, "1 min"), (7200, "2 h"), (90000, "1 d")]
)
def test_ages(seconds: float, shown: str) -> None:
    """A duration is shown in its largest whole unit."""
    assert age(seconds) == shown


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each verb is in the help, and its own ``--help`` has a usage line and an example."""
    function: Callable[[Sequence[str]], int] = _find(verb)
    with pytest.raises(SystemExit) as left:
        function(["--help"])

    shown = capsys.readouterr().out
    assert left.value.code == 0
    assert f"usage: fireclaw {verb}" in shown
    assert f"examples:\n  fireclaw {verb}" in shown or f"\n  fireclaw {verb}" in shown
    assert f"\n  {verb} " in _help()
