"""What a model wrote, made usable or refused. Sans-I/O.

Small models write calls of tools as text, wrap them in fences or tags, forget quotes around nothing and everything, or
are cut off in the middle. Four rules keep that safe:

* a text is taken for a call only if the *whole* reply, after thoughts and one fence or tag are taken off, is the call;
  an example inside prose never is;
* neither is a call that stands word for word in what a person or a tool said: the model quotes it;
* a call that was cut off is never executed, even if its JSON happens to be whole;
* a call that cannot be executed is answered on the tool channel, so that the model can do better.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fireclaw.llm.chat import Finish, JsonObject, Tool, ToolCall, Usage

RESPOND: Final = "respond"
"""The choice of a forced reply that is talk and not a tool."""

_THOUGHTS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
_LAST_TOKENS = re.compile(r"(?:\s*(?:<\|(?:im_end|eot_id|eom_id|end|endoftext)\|>|<end_of_turn>|</s>))+\Z")
_FENCE = re.compile(r"```([\w-]*)\s*\n(.*?)\n?\s*```", re.DOTALL)
# Hermes and Qwen, Phi, and what models make of them; of several in a row only the last may be left open.
_TAGS = re.compile(r"<(\|?)(tool_calls?|tools|function_call)\1>(.*?)(?:<(?:/\1|\1/)\2\1>|\Z)", re.DOTALL)
_FUNCTION_TAG = re.compile(r"<function=([\w.-]+)>(.*?)(?:</function>)?", re.DOTALL)
_PARAMETER_TAG = re.compile(r"<parameter=([\w.-]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_BRACKET = re.compile(r"\[TOOL_CALLS\]\s*(?:([\w.-]+)\s*(?:\[ARGS\]\s*)?)?([\[{].*)", re.DOTALL)
_REHEARSAL = re.compile(r"([\w.-]+)\[ARGS\]\s*(\{.*)", re.DOTALL)
_PREFIX = re.compile(r"(?:<\|python_tag\|>|functools)\s*(?=[\[{])")
_BEGINNING = re.compile(
    r"(?:```[\w-]*\s*)?(?:<\|?(?:tool_call|tools|function)|<\|python_tag|\[TOOL_CALLS\]|functools\[|[\w.-]+\[ARGS\]|[\[{]\s*[{\"])"
)
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")
_NAME_KEYS = ("name", "tool", "tool_name", "function", "function_name")


@dataclass(frozen=True)
class RawCall:
    """A tool call as the server sent it; ``arguments`` should be a JSON object in a string."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class RawReply:
    """A reply as the server sent it; ``declined``: the model will not answer this, however often it is asked."""

    text: str
    calls: tuple[RawCall, ...] = ()
    finish: Finish = Finish.STOP
    usage: Usage = field(default_factory=Usage)
    model: str = ""
    declined: bool = False


@dataclass(frozen=True)
class Usable:
    """What can be given to the agent."""

    text: str
    calls: tuple[ToolCall, ...]
    finish: Finish


@dataclass(frozen=True)
class Unusable:
    """Why a reply cannot be given to the agent, for people and for the ledger."""

    reason: str


def judge(
    raw: RawReply,
    tools: Sequence[Tool],
    call_prefix: str,
    *,
    has_used_tools: bool = False,
    quotable: Iterable[str] = (),
) -> Usable | Unusable:
    """Make a reply usable, or say why it is not.

    Args:
        raw: the reply as it came.
        tools: what was offered to the model.
        call_prefix: ids of calls that came without one begin with this.
        has_used_tools: the conversation has calls in it, so that a call now, without an offer, is no talk either.
        quotable: what people and tools said: a call written as text that stands in it is a quotation.
    """
    text = _LAST_TOKENS.sub("", _THOUGHTS.sub("", raw.text)).strip()
    names = {tool.name for tool in tools}
    wishes: list[tuple[str, str, object]] = [(call.id, call.name, call.arguments) for call in raw.calls if call.name]
    if not wishes and tools:
        wishes = [("", name, arguments) for name, arguments in _calls_in(text, names)]
        if wishes and _is_quoted(text, quotable):
            wishes = []
        elif wishes:
            text = ""
        elif raw.finish is Finish.LENGTH and _begins_like_a_call(text):
            return Unusable("the call was cut off")
    if not tools and (wishes or (has_used_tools and (_calls_in(text, ()) or _begins_like_a_call(text)))):
        return Unusable("it called a tool where it should answer")
    if wishes and raw.finish is Finish.LENGTH:
        return Unusable("the call was cut off")
    said = [_spoken(arguments) for _, name, arguments in wishes if name == RESPOND]
    calls = tuple(
        _tool_call(given or f"{call_prefix}-{number}", name, arguments, names)
        for number, (given, name, arguments) in enumerate(wishes)
        if name != RESPOND or RESPOND in names
    )
    if not calls:
        text = "\n".join(filter(None, [text, *said]))
    if not calls and not text:
        return Unusable("the reply was empty")
    return Usable(text, calls, Finish.TOOL_CALLS if calls else _finish_of_talk(raw.finish))


def call_schema(tools: Sequence[Tool]) -> JsonObject:
    """A JSON schema that leaves the model one of the tools, or ``respond``, and nothing else."""
    message = {"type": "object", "properties": {"message": {"type": "string"}}, "required": ["message"]}
    choices = [*((tool.name, tool.parameters) for tool in tools), (RESPOND, message)]
    return {
        "oneOf": [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": {"additionalProperties": False, **parameters}},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name, parameters in choices
        ]
    }


def _finish_of_talk(finish: Finish) -> Finish:
    return Finish.LENGTH if finish is Finish.LENGTH else Finish.STOP


def _calls_in(text: str, names: Collection[str]) -> list[tuple[str, object]]:
    """The calls, as (name, arguments), that a text consists of; empty if it is anything else.

    Args:
        text: the reply.
        names: of the tools on offer; loose forms count only with one of them.
    """
    language, body = _unfenced(text)
    if language == "tool_code":  # Gemma's form, a call in Python
        call = _python_call(body)
        return [call] if call and call[0] in names else []
    if (bracket := _BRACKET.fullmatch(body)) and bracket[1]:
        return [(bracket[1], _loads(bracket[2]))]
    if (rehearsal := _REHEARSAL.fullmatch(body)) and rehearsal[1] in names:
        return [(rehearsal[1], _loads(rehearsal[2]))]
    parts = [match[3] for match in _TAGS.finditer(body)]
    if not parts or _TAGS.sub("", body).strip():
        parts = [bracket[2] if bracket else _PREFIX.sub("", body, count=1)]
    calls = [call for part in parts for call in _calls_of(part.strip(), names)]
    return [call for call in calls if call] if all(calls) else []


def _unfenced(text: str) -> tuple[str, str]:
    """The language of the one fence around a text, and what is inside; without a fence the text."""
    fenced = _FENCE.fullmatch(text)
    return (fenced[1], fenced[2].strip()) if fenced else ("", text)


def _calls_of(part: str, names: Collection[str]) -> list[tuple[str, object] | None]:
    """The calls inside one tag or fence; None for what is no call."""
    if tagged := _FUNCTION_TAG.fullmatch(part):
        pairs = _PARAMETER_TAG.findall(tagged[2])
        if pairs and not _PARAMETER_TAG.sub("", tagged[2]).strip():
            return [(tagged[1], dict(pairs))]
        return [(tagged[1], _loads(tagged[2]))]
    return [_call_shape(value, names) for value in _values(part)]


def _values(text: str) -> list[object]:
    """The JSON values that a text consists of, one after the other, lists opened; [None] where it is none."""
    decoder, found, position = json.JSONDecoder(), [], 0
    while position < len(text):
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            return [None]
        found.extend(value if isinstance(value, list) else [value])
        while position < len(text) and text[position] in " \t\r\n,;":
            position += 1
    return found or [None]


def _call_shape(value: object, names: Collection[str]) -> tuple[str, object] | None:
    """Name and arguments of an object that has the shape of a call."""
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping):
        return None
    named = next((key for key in _NAME_KEYS if isinstance(value.get(key), str) and value[key]), None)
    if named is None:
        # {"run_command": {"command": "ls"}}
        return next(((key, value[key]) for key in value if len(value) == 1 and key in names), None)
    name = value[named]
    given = next((key for key in _ARGUMENT_KEYS if key in value), None)
    if given is not None and (named == "name" or name in names):
        return name, value[given]
    if given is None and name in names and len(value) > 1:  # the arguments lie beside the name
        return name, {key: value[key] for key in value if key not in (named, "type", "id")}
    return None


def _python_call(code: str) -> tuple[str, object] | None:
    """A call like ``run_command(command="ls")``, perhaps printed, with nothing but literals in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a backslash in a string that means nothing is no matter of ours
            call = ast.parse(code, mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "print" and call.args:
            call = call.args[0]
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            return None
        return call.func.id, {key.arg: ast.literal_eval(key.value) for key in call.keywords if key.arg}
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None


def _is_quoted(text: str, quotable: Iterable[str]) -> bool:
    """Whether a call that was written as text stands in what somebody else said, white space aside."""
    _, body = _unfenced(text)
    parts = [match[3] for match in _TAGS.finditer(body)] or [body]
    said = ["".join(each.split()) for each in quotable]
    return any("".join(part.split()) in each for part in parts for each in said)


def _begins_like_a_call(text: str) -> bool:
    return bool(_BEGINNING.match(text))


def _tool_call(call_id: str, name: str, arguments: object, names: set[str]) -> ToolCall:
    decoded = _decode(arguments)
    if name not in names:
        offered = ", ".join(sorted(names)) or "none"
        return ToolCall(call_id, name, decoded or {}, f"error: there is no tool {name!r}; the tools are: {offered}")
    if decoded is None:
        return ToolCall(call_id, name, {}, f"error: the arguments of {name!r} are not a JSON object")
    return ToolCall(call_id, name, decoded)


def _decode(arguments: object) -> JsonObject | None:
    """The arguments as an object; a string is decoded, and once more if it held a string."""
    for _ in range(2):
        if isinstance(arguments, str):
            arguments = _loads(arguments or "{}")
    return arguments if isinstance(arguments, Mapping) else None


def _spoken(arguments: object) -> str:
    decoded = _decode(arguments)
    message = decoded.get("message") if decoded else None
    return message.strip() if isinstance(message, str) else ""


def _loads(text: str) -> object:
    """Decode JSON; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
