"""The tools of agents: what the model is offered, and whether a call can be made. Sans-I/O.

A tool is a row of the table below and a method of ``fireclaw.agents.toolbox``, which makes the calls. What is said of
a call that cannot be made is written for a small model: what is wrong, and what a right call looks like.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from fireclaw.llm.chat import Tool

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_TEXT: Final = 65536  # bytes of one argument: more than any model writes in one reply
MAX_COMMAND: Final = 8192  # bytes

_PATH = {"type": "string", "description": "the file, e.g. notes.txt or /etc/hosts"}


@dataclass(frozen=True)
class _Row:
    """One tool.

    Attributes:
        tool: what the model is told.
        repeatable: a call that a crash interrupted is simply made again: it changes nothing, or it changes something
            only in the very commit that ends it.
        polling: the very same call may be made again and again, because its result changes by itself.
    """

    tool: Tool
    repeatable: bool = False
    polling: bool = False


def _tool(name: str, description: str, required: Mapping[str, object], **optional: object) -> Tool:
    parameters = {"type": "object", "properties": {**required, **optional}, "required": list(required)}
    return Tool(name, description, parameters)


RUN_COMMAND: Final = _tool(
    "run_command",
    "Run a shell command in your Linux machine and return its output.",
    {"command": {"type": "string", "description": "the command line for /bin/sh"}},
    timeout_s={"type": "integer", "description": "seconds it may take"},
    background={"type": "boolean", "description": "true: return at once with a handle for check_command"},
)

_ROWS: Final = (
    _Row(RUN_COMMAND),
    _Row(
        _tool(
            "check_command",
            "Look at a command that runs in the background: whether it has ended, and the end of its output.",
            {"handle": {"type": "string", "description": "e.g. job-1"}},
            wait_s={"type": "integer", "description": "wait up to so many seconds for its end"},
            cancel={"type": "boolean", "description": "true: end it"},
        ),
        polling=True,
    ),
    _Row(
        _tool(
            "read_file",
            "Read a text file, or some lines of it.",
            {"path": _PATH},
            start={"type": "integer", "description": "the first line, from 1"},
            lines={"type": "integer", "description": "how many lines"},
        ),
        repeatable=True,
    ),
    _Row(
        _tool(
            "write_file",
            "Write a file, with the folders that it needs. A file that is there is replaced.",
            {"path": _PATH, "content": {"type": "string", "description": "the whole text of the file"}},
            append={"type": "boolean", "description": "true: add to its end instead"},
        ),
    ),
    _Row(
        _tool(
            "edit_file",
            "Replace a piece of text in a file. The old text must stand in the file exactly once.",
            {
                "path": _PATH,
                "old": {"type": "string", "description": "the text to replace, exactly as it stands there"},
                "new": {"type": "string", "description": "the text in its place"},
            },
            all={"type": "boolean", "description": "true: replace it wherever it stands"},
        ),
    ),
    _Row(
        _tool(
            "list_files",
            "List a folder.",
            {},
            path={"type": "string", "description": "the folder; where you are if left out"},
            depth={"type": "integer", "description": "how many levels of folders, 1 if left out"},
        ),
        repeatable=True,
    ),
    _Row(
        _tool(
            "search_files",
            "Find the lines of files that match a regular expression.",
            {"pattern": {"type": "string", "description": "what to look for"}},
            path={"type": "string", "description": "a folder or a file; where you are if left out"},
            files={"type": "string", "description": "only files of such names, e.g. *.py"},
        ),
        repeatable=True,
    ),
    _Row(
        _tool(
            "save_memory",
            "Keep something in mind for good, in one short line.",
            {"text": {"type": "string", "description": "what to remember"}},
            replaces={"type": "string", "description": "a part of your memory that goes for it; * for all of it"},
        ),
        repeatable=True,
    ),
    _Row(
        _tool(
            "search_memory",
            "Search what you have in mind, and what you had earlier.",
            {"query": {"type": "string", "description": "words to look for"}},
        ),
        repeatable=True,
    ),
    _Row(
        _tool(
            "handoff",
            "Let another agent do a task. It knows only what you write here; you get its result.",
            {
                "to": {"type": "string", "description": "the agent's name"},
                "task": {"type": "string", "description": "what is to be done"},
                "context": {"type": "string", "description": "all that it must know for it"},
                "done_when": {"type": "string", "description": "how it can tell that it is done"},
            },
        ),
        repeatable=True,
    ),
)

TOOLS: Final[Mapping[str, Tool]] = {row.tool.name: row.tool for row in _ROWS}
REPEATABLE: Final = frozenset(row.tool.name for row in _ROWS if row.repeatable)
POLLING: Final = frozenset(row.tool.name for row in _ROWS if row.polling)

_MAY_BE_EMPTY: Final = {("write_file", "content"), ("edit_file", "new"), ("save_memory", "text")}
_TYPE_WORDS: Final = {"string": "a text", "integer": "a whole number from 1", "boolean": "true or false"}


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call that was checked: each has the type that its tool names."""

    values: Mapping[str, object]

    def text(self, name: str, default: str = "") -> str:
        """Return a text."""
        return cast("str", self.values.get(name, default))

    def number(self, name: str, default: int) -> int:
        """Return a number."""
        return cast("int", self.values.get(name, default))

    def flag(self, name: str) -> bool:
        """Return whether something is wished for."""
        return bool(self.values.get(name, False))


def refusal(name: str, arguments: Mapping[str, object], offered: tuple[str, ...]) -> str:
    """Say why a call cannot be made, in words for the model; empty where it can."""
    if name not in offered:
        near = difflib.get_close_matches(name, offered, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"error: there is no tool {name!r}; {hint}your tools: {', '.join(offered) or 'none'}"
    checked = check(TOOLS[name], arguments)
    return checked if isinstance(checked, str) else ""


def check(tool: Tool, arguments: Mapping[str, object]) -> Arguments | str:
    """Check the arguments of a call against its tool.

    What is plainly meant is taken: ``"5"`` for a number, ``null`` for an argument that was left out.

    Returns:
        The arguments, or what is wrong with them, in words for the model.
    """
    properties = cast("Mapping[str, Mapping[str, str]]", tool.parameters["properties"])
    required = cast("list[str]", tool.parameters["required"])
    given = {key: value for key, value in arguments.items() if value is not None}
    wrong = [key for key in given if key not in properties]
    missing = [key for key in required if key not in given]
    if wrong or missing:
        return _misnamed(tool, wrong, missing)
    values: dict[str, object] = {}
    for key, value in given.items():
        kind = properties[key]["type"]
        taken = _taken(value, kind)
        if taken is None:
            return f'error: "{key}" of {tool.name} must be {_TYPE_WORDS[kind]}, not {_brief(value)}. {_form(tool)}'
        if isinstance(taken, str) and (problem := _bad_text(tool.name, key, taken, is_required=key in required)):
            return problem
        values[key] = taken
    return Arguments(values)


def _misnamed(tool: Tool, wrong: list[str], missing: list[str]) -> str:
    properties = cast("Mapping[str, object]", tool.parameters["properties"])
    if not missing:
        near = difflib.get_close_matches(wrong[0], properties, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else "."
        return f'error: {tool.name} has no argument "{wrong[0]}"{hint} {_form(tool)}'
    instead = f' You wrote "{wrong[0]}".' if wrong else ""
    return f'error: {tool.name} needs "{missing[0]}".{instead} {_form(tool)}'


def _taken(value: object, kind: str) -> object:
    """Return the value as that type, or None where it cannot be meant as one."""
    if kind == "string":
        return value if isinstance(value, str) else None
    if kind == "boolean":
        words = {"true": True, "false": False}
        return value if isinstance(value, bool) else words.get(value.lower()) if isinstance(value, str) else None
    if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _bad_text(tool: str, key: str, text: str, *, is_required: bool) -> str:
    if "\0" in text:
        return f'error: "{key}" of {tool} cannot hold a NUL byte'
    limit = MAX_COMMAND if key == "command" else MAX_TEXT
    if len(text.encode(errors="replace")) > limit:
        advice = "write a script file in parts and run it" if key == "command" else "do it in parts"
        return f'error: "{key}" of {tool} is longer than {limit} bytes; {advice} instead'
    if is_required and not text.strip() and (tool, key) not in _MAY_BE_EMPTY:
        return f'error: "{key}" of {tool} is empty. {_form(TOOLS[tool])}'
    return ""


def _form(tool: Tool) -> str:
    """Show what a call of the tool looks like: ``Right: {"path": "...", "content": "..."}``."""
    properties = cast("Mapping[str, Mapping[str, str]]", tool.parameters["properties"])
    required = cast("list[str]", tool.parameters["required"])
    optional = ", ".join(key for key in properties if key not in required)
    form = "{" + ", ".join(f'"{key}": {_example(properties[key]["type"])}' for key in required) + "}"
    return f"Right: {form}" + (f" (and, if needed: {optional})" if optional else "")


def _example(kind: str) -> str:
    return {"string": '"..."', "integer": "1", "boolean": "true"}[kind]


def _brief(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"
