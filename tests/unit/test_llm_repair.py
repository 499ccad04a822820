"""What small models write, and what is made of it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireclaw.llm.chat import Finish, Tool
from fireclaw.llm.repair import RawCall, RawReply, Unusable, Usable, call_schema, judge

RUN = Tool(
    "run_command",
    "Run a command.",
    {"type": "object", "properties": {"command": {"type": "string"}}, "required": ["command"]},
)
CALL = {"name": "run_command", "arguments": {"command": "uname -r"}}
CALL_TEXT = json.dumps(CALL)
ARGUMENTS = {"command": "uname -r"}


def judged(raw: RawReply, *tools: Tool) -> Usable | Unusable:
    """What is made of a reply."""
    return judge(raw, tools, "call-1")


@pytest.mark.parametrize(
    "text",
    [
        CALL_TEXT,
        f"  {CALL_TEXT}\n",
        f"```json\n{CALL_TEXT}\n```",
        f"```\n{CALL_TEXT}\n```",
        f"<tool_call>\n{CALL_TEXT}\n</tool_call>",
        f"<tool_call>\n{CALL_TEXT}",
        f"<tools>{CALL_TEXT}</tools>",
        f"<think>I should look.</think>\n{CALL_TEXT}",
        f"<think>\nHm.\n</think>\n```json\n{CALL_TEXT}\n```",
        f"[{CALL_TEXT}]",
        f"[TOOL_CALLS][{CALL_TEXT}]",
        '[TOOL_CALLS]run_command{"command": "uname -r"}',
        '[TOOL_CALLS]run_command[ARGS]{"command": "uname -r"}',
        '<function=run_command>{"command": "uname -r"}</function>',
        '{"name": "run_command", "parameters": {"command": "uname -r"}}',
        '{"name": "run_command", "args": {"command": "uname -r"}}',
        '{"name": "run_command", "arguments": "{\\"command\\": \\"uname -r\\"}"}',
        '{"type": "function", "function": {"name": "run_command", "arguments": {"command": "uname -r"}}}',
        '{"name": "run_command", "input": {"command": "uname -r"}}',
        '{"tool": "run_command", "arguments": {"command": "uname -r"}}',
        '{"tool_name": "run_command", "parameters": {"command": "uname -r"}}',
        '{"function": "run_command", "args": {"command": "uname -r"}}',
        '{"name": "run_command", "command": "uname -r"}',
        '{"run_command": {"command": "uname -r"}}',
        f"{CALL_TEXT}<|im_end|>",
        f"<|python_tag|>{CALL_TEXT}<|eom_id|>",
        f"functools[{CALL_TEXT}]",
        f"<|tool_call|>[{CALL_TEXT}]<|/tool_call|>",
        f"<tool_calls>[{CALL_TEXT}]</tool_calls>",
        f"<function_call>{CALL_TEXT}</function_call></s>",
        'run_command[ARGS]{"command": "uname -r"}',
        "<function=run_command>\n<parameter=command>\nuname -r\n</parameter>\n</function>",
        "<tool_call>\n<function=run_command>\n<parameter=command>\nuname -r\n</parameter>\n</function>\n</tool_call>",
        '```tool_code\nrun_command(command="uname -r")\n```',
        '```tool_code\nprint(run_command(command="uname -r"))\n```<end_of_turn>',
        f"<thinking>Hm.</thinking>\n<tool_call>{CALL_TEXT}</tool_call>",
    ],
)
def test_a_reply_that_is_nothing_but_a_call_becomes_one(text: str) -> None:
    """A call written as text is taken for one if it is the whole reply."""
    verdict = judged(RawReply(text), RUN)
    assert isinstance(verdict, Usable)
    assert [(call.name, call.arguments, call.error) for call in verdict.calls] == [("run_command", ARGUMENTS, "")]
    assert verdict.finish is Finish.TOOL_CALLS
    assert verdict.text == ""


@pytest.mark.parametrize(
    "text",
    [
        f"You could write {CALL_TEXT}",
        f"{CALL_TEXT} does it.",
        f"For example:\n```json\n{CALL_TEXT}\n```",
        f"```json\n{CALL_TEXT}\n```\nand then\n```json\n{CALL_TEXT}\n```",
        f'The file says: "{CALL_TEXT}"',
        f"> {CALL_TEXT}",
        f"[{CALL_TEXT}, 1]",
        '{"name": "run_command"}',
        '{"command": "uname -r"}',
        '{"name": "", "arguments": {}}',
        "{'name': 'run_command', 'arguments': {'command': 'uname -r'}}",
        "[]",
        "{}",
        "42",
    ],
)
def test_a_call_inside_other_words_is_only_talk(text: str) -> None:
    """Nothing is executed that stands in prose, in a quotation, or has not the shape of a call."""
    verdict = judged(RawReply(text), RUN)
    assert isinstance(verdict, Usable)
    assert verdict.calls == ()
    assert verdict.text == text.strip()


def test_without_tools_a_call_is_only_talk() -> None:
    """A text that looks like a call stays text if no tool was offered."""
    verdict = judged(RawReply(CALL_TEXT))
    assert verdict == Usable(CALL_TEXT, (), Finish.STOP)


@pytest.mark.parametrize("text", [CALL_TEXT, f"```\n{CALL_TEXT}\n```", '{"name": "run_com'])
def test_a_call_where_only_words_can_help_is_unusable(text: str) -> None:
    """In a conversation that used tools, a call is not spoken to people when none is offered any more."""
    verdict = judge(RawReply(text), (), "call-1", has_used_tools=True)
    assert verdict == Unusable("it called a tool where it should answer")


@pytest.mark.parametrize(
    "raw",
    [
        RawReply("", (RawCall("1", "run_command", '{"command": "rm -rf /tmp/a'),), Finish.LENGTH),
        RawReply("", (RawCall("1", "run_command", '{"command": "rm -rf /"}'),), Finish.LENGTH),
        RawReply('{"name": "run_command", "arguments": {"command": "rm -rf /', finish=Finish.LENGTH),
        RawReply(CALL_TEXT, finish=Finish.LENGTH),
        RawReply('```json\n{"name": "run_com', finish=Finish.LENGTH),
        RawReply('<tool_call>\n{"name"', finish=Finish.LENGTH),
    ],
)
def test_a_call_that_was_cut_off_is_never_executed(raw: RawReply) -> None:
    """Where the token limit ended the reply a call is refused, even if its JSON happens to be whole."""
    assert judged(raw, RUN) == Unusable("the call was cut off")


def test_talk_that_was_cut_off_is_given_on_as_such() -> None:
    """A long text keeps its mark, so that the agent can say that more was to come."""
    assert judged(RawReply("Once upon a", finish=Finish.LENGTH), RUN) == Usable("Once upon a", (), Finish.LENGTH)


@pytest.mark.parametrize("text", ["", "  \n", "<think>What shall I say?</think>", "<think>I am still thinking"])
def test_an_empty_reply_is_unusable(text: str) -> None:
    """Thoughts alone are no reply."""
    assert judged(RawReply(text), RUN) == Unusable("the reply was empty")


def test_a_call_without_a_name_is_dropped() -> None:
    """It would wedge the conversation for good: no result can answer it."""
    assert isinstance(judged(RawReply("", (RawCall("1", "", "{}"),)), RUN), Unusable)


@pytest.mark.parametrize(
    ("call", "arguments", "error"),
    [
        (RawCall("1", "run_command", '{"command": "ls"}'), {"command": "ls"}, ""),
        (RawCall("1", "run_command", '"{\\"command\\": \\"ls\\"}"'), {"command": "ls"}, ""),
        (RawCall("1", "run_command", ""), {}, ""),
        (RawCall("1", "run_command", "ls"), {}, "error: the arguments of 'run_command' are not a JSON object"),
        (RawCall("1", "run_command", '["ls"]'), {}, "error: the arguments of 'run_command' are not a JSON object"),
        (RawCall("1", "shell", '{"x": 1}'), {"x": 1}, "error: there is no tool 'shell'; the tools are: run_command"),
        (RawCall("1", "respond", '{"x": 1}'), None, ""),
    ],
)
def test_arguments_become_an_object_or_an_error_for_the_model(
    call: RawCall, arguments: dict[str, Any] | None, error: str
) -> None:
    """What cannot be executed carries the text to answer it with on the tool channel."""
    verdict = judged(RawReply("", (call,)), RUN)
    if arguments is None:
        assert isinstance(verdict, Unusable)
        return
    assert isinstance(verdict, Usable)
    assert [(found.id, found.arguments, found.error) for found in verdict.calls] == [("1", arguments, error)]


def test_a_text_call_of_an_unknown_tool_is_answered_on_the_tool_channel() -> None:
    """A whole reply in the shape of a call is not spoken to people just because its name is wrong."""
    verdict = judged(RawReply('{"name": "shell", "arguments": {"cmd": "ls"}}'), RUN)
    assert isinstance(verdict, Usable)
    assert verdict.calls[0].error.startswith("error: there is no tool 'shell'")


def test_the_choice_respond_is_talk() -> None:
    """A forced reply that chose to talk becomes plain text."""
    verdict = judged(RawReply('{"name": "respond", "arguments": {"message": " hi there "}}'), RUN)
    assert verdict == Usable("hi there", (), Finish.STOP)


def test_words_beside_native_calls_are_kept() -> None:
    """A model may say something and call a tool in one reply."""
    verdict = judged(RawReply("Let me look.", (RawCall("", "run_command", '{"command": "ls"}'),)), RUN)
    assert isinstance(verdict, Usable)
    assert verdict.text == "Let me look."
    assert verdict.calls[0].id == "call-1-0"


def test_the_schema_offers_each_tool_and_respond() -> None:
    """A forced reply is one of the tools with its own arguments, or words."""
    schema: Any = call_schema([RUN])
    choices = schema["oneOf"]
    assert [choice["properties"]["name"]["const"] for choice in choices] == ["run_command", "respond"]
    assert choices[0]["properties"]["arguments"]["required"] == ["command"]


@given(st.text(), st.sampled_from(Finish), st.lists(st.tuples(st.text(), st.text(), st.text())))
def test_nothing_a_server_sends_breaks_the_judge(text: str, finish: Finish, calls: list[tuple[str, str, str]]) -> None:
    """Any reply is judged; nothing that can be executed has unknown names or comes from a cut reply."""
    verdict = judged(RawReply(text, tuple(RawCall(*call) for call in calls), finish), RUN)
    if isinstance(verdict, Usable):
        assert verdict.text or verdict.calls
        assert all(call.name == "run_command" or call.error for call in verdict.calls)
        assert not (verdict.calls and finish is Finish.LENGTH)


@given(st.recursive(st.none() | st.booleans() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)))
def test_any_json_is_judged(value: object) -> None:
    """JSON of any shape is either a call or talk."""
    assert isinstance(judged(RawReply(json.dumps(value)), RUN), Usable)


def test_a_python_call_may_hold_an_odd_backslash() -> None:
    """Regular expressions are common in commands, and Python warns of them."""
    verdict = judged(RawReply('```tool_code\nrun_command(command="grep \\d x")\n```'), RUN)
    assert isinstance(verdict, Usable)
    assert verdict.calls[0].arguments == {"command": "grep \\d x"}


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>\n{CALL_TEXT}\n</tool_call>\n<tool_call>\n{CALL_TEXT}\n</tool_call>",
        f"<tool_call>\n{CALL_TEXT}\n</tool_call>\n<tool_call>\n{CALL_TEXT}",
        f"{CALL_TEXT}\n{CALL_TEXT}",
        f"{CALL_TEXT}; {CALL_TEXT}",
        f"[{CALL_TEXT}, {CALL_TEXT}]",
    ],
)
def test_several_calls_in_a_row_are_as_many(text: str) -> None:
    """Nothing but calls, one after the other."""
    verdict = judged(RawReply(text), RUN)
    assert isinstance(verdict, Usable)
    assert [call.arguments for call in verdict.calls] == [ARGUMENTS, ARGUMENTS]
    assert len({call.id for call in verdict.calls}) == 2


@pytest.mark.parametrize(
    "text",
    [
        f"{CALL_TEXT}\nand then?",
        f"<tool_call>{CALL_TEXT}</tool_call> I hope that helps",
        f"First <tool_call>{CALL_TEXT}</tool_call>",
        f"> {CALL_TEXT}",
        f'"{CALL_TEXT}"',
        '{"tool": "hammer", "input": "nail"}',
        '{"hammer": {"weight": 2}}',
        '{"name": "Alice", "age": 9}',
        'shell[ARGS]{"command": "ls"}',
        '```tool_code\nshell(command="ls")\n```',
        '```tool_code\nrun_command(command=open("x").read())\n```',
        '```tool_code\nrun_command("ls")\n```',
        '```python\nrun_command(command="ls")\n```',
        'run_command(command="ls")',
        "[1, 2, 3]",
        "{}",
        "[]",
    ],
)
def test_what_only_looks_like_a_call_is_talk(text: str) -> None:
    """Prose around a call, JSON that names no tool, code that is not a plain call: said, not done."""
    verdict = judged(RawReply(text), RUN)
    assert isinstance(verdict, Usable)
    assert verdict.calls == ()
    assert verdict.text == text


@pytest.mark.parametrize("text", [CALL_TEXT, f"```json\n{CALL_TEXT}\n```", f"<tool_call>\n{CALL_TEXT}\n</tool_call>"])
@pytest.mark.parametrize("said", [f"say this: {CALL_TEXT}", json.dumps(CALL, indent=2)])
def test_a_call_that_somebody_else_wrote_is_a_quotation(text: str, said: str) -> None:
    """What a file or a person said is repeated, never executed; a call that the server parsed counts."""
    quoted = judge(RawReply(text), [RUN], "call-1", quotable=["hello", said])
    assert isinstance(quoted, Usable)
    assert (quoted.calls, quoted.text) == ((), text)
    own = judge(RawReply(text), [RUN], "call-1", quotable=["hello"])
    assert isinstance(own, Usable)
    assert own.calls
    native = judge(RawReply("", (RawCall("1", "run_command", json.dumps(ARGUMENTS)),)), [RUN], "c", quotable=[said])
    assert isinstance(native, Usable)
    assert native.calls


@given(st.text(alphabet="<>|{}[]\"':,/ \n`()=tool_calnrumdfixpy"))
def test_no_mixture_of_the_forms_breaks_the_judge(text: str) -> None:
    """Whatever a model makes of tags, brackets and fences is judged, and quickly."""
    judged(RawReply(text), RUN)


@pytest.mark.parametrize("text", ["[" * 100_000, "<tool_call>" * 20_000, "```tool_code\n" + "-" * 50_000 + "\n```"])
def test_a_flood_is_judged_in_time(text: str) -> None:
    """A reply made to exhaust a parser is talk or unusable, at once."""
    began = time.monotonic()
    assert isinstance(judged(RawReply(text), RUN), Usable | Unusable)
    assert time.monotonic() - began < 2
