"""What agents say and hear: Markdown to lines, output for the model, and when a line is for whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireclaw.agents.addressing import addressed_text
from fireclaw.agents.commands import describe
from fireclaw.agents.ports import CommandResult
from fireclaw.agents.speech import LINE_BYTES, MAX_LINES, cut_middle, lines_of, one_line, plain_text
from fireclaw.irc.events import Message
from fireclaw.irc.message import Kind, Prefix

ALICE = Prefix("alice", "~a", "localhost")

MAX_OUTPUT = 2000


@pytest.mark.parametrize(
    ("markdown", "plain"),
    [
        ("## Result\nIt is **done**.", "Result\nIt is done."),
        ("* one\n* two", "- one\n- two"),
        (
            "see [the page](https://x.test/a) and <https://y.test>",
            "see the page (https://x.test/a) and <https://y.test>",
        ),
        ("[https://x.test](https://x.test)", "https://x.test"),
        ("```sh\nls **/*.py\n# not a heading\n```\nthat **is** it", "ls **/*.py\n# not a heading\nthat is it"),
        ("__init__ and 2 ** 3 ** 4 and `a_b`", "__init__ and 2 ** 3 ** 4 and `a_b`"),
    ],
)
def test_markdown_becomes_plain_text(markdown: str, plain: str) -> None:
    """Marks go where they only decorate; code and names are left alone."""
    assert plain_text(markdown) == plain


def test_a_long_answer_is_cut_and_says_so() -> None:
    """Six lines are said, and one more tells how many are left out; blank lines do not count."""
    text = "\n\n".join(f"line {number}" for number in range(9))
    assert lines_of(text, address="alice") == [
        "alice: line 0",
        *(f"line {number}" for number in range(1, 6)),
        "… (3 more lines)",
    ]


@given(st.text(alphabet=st.characters(), max_size=3000), st.sampled_from(["", "alice"]))
def test_lines_can_be_sent(text: str, address: str) -> None:
    """Whatever a model writes: few lines, short in bytes, none empty, no control character in them."""
    lines = lines_of(text, address=address)
    assert len(lines) <= MAX_LINES + 1
    for line in lines:
        assert line.strip()
        assert len(line.encode()) <= LINE_BYTES
        assert all(ord(character) >= 32 and ord(character) != 127 for character in line)


def test_indentation_stays() -> None:
    """Code keeps its shape; tabs become spaces, for IRC cannot be trusted with them."""
    assert lines_of("def f():\n\treturn 1") == ["def f():", "    return 1"]


def test_a_text_of_nothing_is_no_line() -> None:
    """An address alone is not said."""
    assert lines_of(" \n\x02\n", address="alice") == []


def test_one_line_is_one_line() -> None:
    """A command with line ends and controls fits into a sentence."""
    assert one_line("make\\\n\ttest \x1b[31m", 20) == "make\\ test [31m"
    assert one_line("x" * 30, 10) == "x" * 9 + "…"


@given(st.text(max_size=300), st.integers(0, 400))
def test_a_cut_keeps_head_and_tail(text: str, limit: int) -> None:
    """A text within the limit is unchanged; a longer one keeps whole characters of both ends and says what is gone."""
    cut = cut_middle(text, limit)
    if len(text.encode()) <= limit:
        assert cut == text
    else:
        head, _, tail = cut.partition("\n[... ")
        assert text.startswith(head)
        assert text.endswith(tail.partition(" bytes left out ...]\n")[2])
        assert len(cut.encode()) <= limit + 64


def result(stdout: bytes = b"", stderr: bytes = b"", status: int = 0, *, timed_out: bool = False) -> CommandResult:
    """Make the result of a command."""
    return CommandResult(status, stdout, stderr, timed_out=timed_out, duration_s=1.0, command_id="c")


@pytest.mark.parametrize(
    ("given_result", "told"),
    [
        (result(b"a\nb\n"), "a\nb"),
        (result(), "[no output]"),
        (result(b"\xff\n"), "\N{REPLACEMENT CHARACTER}"),
        (result(b"", b"sh: git: not found\n", 127), "[stderr]\nsh: git: not found\n[exit status 127]"),
        (result(b"a\n", status=124, timed_out=True), "a\n[stopped: the time limit of 120 s was reached]"),
    ],
)
def test_a_result_is_told_in_words(given_result: CommandResult, told: str) -> None:
    """The model hears the output first, then errors, then how the command ended if not well."""
    assert describe(given_result, 120, MAX_OUTPUT) == told


def test_a_flood_of_output_is_cut() -> None:
    """What a command prints is bounded before it is kept, whatever stream it is on."""
    told = describe(result(b"x" * 100_000, b"y" * 100_000), 120, MAX_OUTPUT)
    assert len(told) < 2 * MAX_OUTPUT
    assert told.startswith("xxx")
    assert told.endswith("yyy")


@pytest.mark.parametrize(
    ("text", "heard"),
    [
        ("worker: hello", "hello"),
        ("Worker, hello", "hello"),
        ("@worker hello", "hello"),
        ("worker hello", "hello"),
        ("worker:hello", "hello"),
        ("worker:", "worker:"),
        ("  worker: hello ", "hello"),
        ("could worker look?", "could worker look?"),
        ("ask (worker)!", "ask (worker)!"),
        ("worker's turn", "worker's turn"),
        ("worker2: hello", None),
        ("worker-1: hello", None),
        ("coworker: hello", None),
        ("[worker] hello", None),
        ("hello all", None),
        ("", None),
    ],
)
def test_a_line_in_a_channel_must_name_the_agent(text: str, heard: str | None) -> None:
    """At the beginning with or without marks, or anywhere as a whole word; a longer nick is somebody else."""
    assert addressed_text(Message(ALICE, "#agents", text, text, Kind.PRIVMSG), "worker", set()) == heard


def test_a_private_line_is_always_for_the_agent() -> None:
    """It needs no address, and loses the one it has."""
    for text in ("hello", "worker: hello"):
        assert addressed_text(Message(ALICE, "worker", text, text, Kind.PRIVMSG), "worker", set()) == "hello"


@pytest.mark.parametrize(
    "message",
    [
        Message(ALICE, "worker", "hello", "hello", Kind.NOTICE),
        Message(ALICE, "#agents", "worker: hello", "", Kind.NOTICE),
        Message(ALICE, "#agents", "worker: hello", "", Kind.PRIVMSG, is_bot=True),
        Message(Prefix("Coder", "~c", "localhost"), "worker", "hello", "", Kind.PRIVMSG),
        Message(Prefix("Worker", "~w", "localhost"), "worker", "hello", "", Kind.PRIVMSG),
        Message(Prefix("irc.test"), "worker", "hello", "", Kind.PRIVMSG),
        Message(ALICE, "#agents", "hugs worker", "", Kind.ACTION),
        Message(ALICE, "#agents", "!destroy worker", "", Kind.PRIVMSG),
    ],
)
def test_what_is_never_answered(message: Message) -> None:
    """A NOTICE, a bot, one of our own agents, itself, a server, talk about it and commands are let go."""
    assert addressed_text(message, "worker", {"worker", "coder"}) is None
