"""What a model wrote, made usable or refused. Sans-I/O.

Small models write calls of tools as text, wrap them in fences or tags, forget quotes around nothing and everything, or
are cut off in the middle. Three rules keep that safe:

* a text is taken for a call only if the *whole* reply, after thoughts and one fence or tag are taken off, is the call;
  an example inside prose never is, and neither is anything that the model quotes;
* a call that was cut off is never executed, even if its JSON happens to be whole;
* a call that cannot be executed is answered on the tool channel, so that the model can do better.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from fireclaw.llm.chat import Finish, JsonObject, Tool, ToolCall, Usage

RESPOND: Final = "respond"
"""The choice of a forced reply that is talk and not a tool."""

_THOUGHTS = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)", re.DOTALL)
_FENCE = re.compile(r"```[\w-]*\s*\n(.*?)\n?\s*```", re.DOTALL)
_TAG = re.compile(r"<(tool_call|tools|function_call)>(.*?)(?:</\1>)?", re.DOTALL)
_FUNCTION_TAG = re.compile(r"<function=([\w.-]+)>(.*?)(?:</function>)?", re.DOTALL)
_BRACKET = re.compile(r"\[TOOL_CALLS\]\s*(?:([\w.-]+)\s*(?:\[ARGS\]\s*)?)?([\[{].*)", re.DOTALL)
_ARGUMENT_KEYS = ("arguments", "parameters", "args", "input")


@dataclass(frozen=True)
class RawCall:
    """A tool call as the server sent it; ``arguments`` should be a JSON object in a string."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class RawReply:
    """A reply as the server sent it."""

    text: str
    calls: tuple[RawCall, ...] = ()
    finish: Finish = Finish.STOP
    usage: Usage = field(default_factory=Usage)
    model: str = ""


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


def judge(raw: RawReply, tools: Sequence[Tool], call_prefix: str, *, has_used_tools: bool = False) -> Usable | Unusable:
    """Make a reply usable, or say why it is not.

    Args:
        raw: the reply as it came.
        tools: what was offered to the model.
        call_prefix: ids of calls that came without one begin with this.
        has_used_tools: the conversation has calls in it, so that a call now, without an offer, is no talk either.
    """
    text = _THOUGHTS.sub("", raw.text).strip()
    wishes: list[tuple[str, str, object]] = [(call.id, call.name, call.arguments) for call in raw.calls if call.name]
    if not wishes and tools:
        wishes = [("", name, arguments) for name, arguments in _calls_in(text)]
        if wishes:
            text = ""
        elif raw.finish is Finish.LENGTH and _begins_like_a_call(text):
            return Unusable("the call was cut off")
    if not tools and (wishes or (has_used_tools and (_calls_in(text) or _begins_like_a_call(text)))):
        return Unusable("it called a tool where it should answer")
    if wishes and raw.finish is Finish.LENGTH:
        return Unusable("the call was cut off")
    said = [_spoken(arguments) for _, name, arguments in wishes if name == RESPOND]
    names = {tool.name for tool in tools}
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


def response_format(tools: Sequence[Tool]) -> JsonObject:
    """A ``response_format`` that leaves the model one of the tools, or ``respond``, and nothing else."""
    message = {"type": "object", "properties": {"message": {"type": "string"}}, "required": ["message"]}
    choices = [*((tool.name, tool.parameters) for tool in tools), (RESPOND, message)]
    schema = {
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
    return {"type": "json_schema", "json_schema": {"name": "call_or_respond", "strict": True, "schema": schema}}


def _finish_of_talk(finish: Finish) -> Finish:
    return Finish.LENGTH if finish is Finish.LENGTH else Finish.STOP


def _calls_in(text: str) -> list[tuple[str, object]]:
    """The calls, as (name, arguments), that a text consists of; empty if it is anything else."""
    body = text
    if fenced := _FENCE.fullmatch(body):
        body = fenced[1].strip()
    if tagged := _FUNCTION_TAG.fullmatch(body):
        return [(tagged[1], _loads(tagged[2]))]
    if tagged := _TAG.fullmatch(body):
        body = tagged[2].strip()
    elif bracket := _BRACKET.fullmatch(body):
        if bracket[1]:
            return [(bracket[1], _loads(bracket[2]))]
        body = bracket[2]
    value = _loads(body)
    calls = [_call_shape(item) for item in (value if isinstance(value, list) else [value])]
    return [call for call in calls if call] if all(calls) else []


def _call_shape(value: object) -> tuple[str, object] | None:
    """Name and arguments of an object that has the shape of a call."""
    if isinstance(value, Mapping) and isinstance(value.get("function"), Mapping):
        value = value["function"]
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str) or not value["name"]:
        return None
    for key in _ARGUMENT_KEYS:
        if key in value:
            return value["name"], value[key]
    return None


def _begins_like_a_call(text: str) -> bool:
    return bool(re.match(r"(?:```[\w-]*\s*)?(?:<(?:tool_call|tools|function)|\[TOOL_CALLS\]|[\[{]\s*[{\"])", text))


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
