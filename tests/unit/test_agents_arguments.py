"""The arguments of calls: what is taken, and what a small model is told when they are wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireclaw.agents.tools import TOOLS, Arguments, check, refusal

ALL = tuple(TOOLS)


@pytest.mark.parametrize(
    ("tool", "arguments", "told"),
    [
        (
            "write_file",
            {"file": "a", "content": "x"},
            'error: write_file needs "path". You wrote "file". Right: {"path": "...", "content": "..."} (and, if',
        ),
        ("read_file", {}, 'error: read_file needs "path". Right: {"path": "..."} (and, if needed: start, lines)'),
        (
            "read_file",
            {"path": "a", "strat": 3},
            'error: read_file has no argument "strat"; did you mean "start"?',
        ),
        ("read_file", {"path": "a", "start": 0}, 'error: "start" of read_file must be a whole number from 1, not 0.'),
        (
            "read_file",
            {"path": "a", "start": "x"},
            'must be a whole number from 1, not "x".',
        ),
        ("read_file", {"path": "a", "start": 1.5}, "must be a whole number from 1, not 1.5."),
        ("read_file", {"path": "a", "start": True}, "must be a whole number from 1, not true."),
        ("read_file", {"path": ["a"]}, 'error: "path" of read_file must be a text, not ["a"].'),
        ("read_file", {"path": " "}, 'error: "path" of read_file is empty.'),
        ("write_file", {"path": "a", "content": "x", "append": "maybe"}, "must be true or false"),
        ("write_file", {"path": "a", "content": "x" * 70000}, "is longer than 65536 bytes; do it in parts instead"),
        ("handoff", {"to": "b", "task": "t"}, 'error: handoff needs "context".'),
        ("list_files", {"depth": 1, "x": 1}, 'error: list_files has no argument "x". Right: {} (and, if needed:'),
        (
            "read_fiel",
            {"path": "a"},
            "error: there is no tool 'read_fiel'; did you mean read_file? your tools:",
        ),
    ],
)
def test_a_wrong_call_is_told_how_a_right_one_looks(tool: str, arguments: dict[str, object], told: str) -> None:
    """The words name the argument, what is wrong with it, and the form of the call."""
    assert told in refusal(tool, arguments, ALL)


@pytest.mark.parametrize(
    ("tool", "arguments", "taken"),
    [
        ("read_file", {"path": "a", "start": "12", "lines": 3.0}, {"path": "a", "start": 12, "lines": 3}),
        ("read_file", {"path": "a", "start": None}, {"path": "a"}),
        ("write_file", {"path": "a", "content": "", "append": "True"}, {"path": "a", "content": "", "append": True}),
        ("edit_file", {"path": "a", "old": "x", "new": ""}, {"path": "a", "old": "x", "new": ""}),
        ("list_files", {}, {}),
    ],
)
def test_what_is_plainly_meant_is_taken(tool: str, arguments: dict[str, object], taken: dict[str, object]) -> None:
    """A number written as a text, a null for nothing, an empty file."""
    assert refusal(tool, arguments, ALL) == ""
    assert check(TOOLS[tool], arguments) == Arguments(taken)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.sampled_from(ALL),
    st.dictionaries(st.sampled_from(["path", "command", "content", "start", "append", "to"]) | st.text(), json_values),
)
def test_no_arguments_break_the_check(tool: str, arguments: dict[str, object]) -> None:
    """Whatever a model writes is either refused in words or has the types that the tool names."""
    checked = check(TOOLS[tool], arguments)
    if isinstance(checked, str):
        assert checked.startswith("error: ")
        assert len(checked) < 500
    else:
        for name, value in checked.values.items():
            properties = TOOLS[tool].parameters["properties"]
            assert isinstance(properties, dict)
            kind = {"string": str, "integer": int, "boolean": bool}[properties[name]["type"]]
            assert type(value) is kind
