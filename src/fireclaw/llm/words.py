"""Tools in words, for models whose server has no place for them: told in the system text, called and answered in JSON.

With the reply held to ``repair.call_schema`` this works with any model that can follow an example at all. Sans-I/O.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from fireclaw.llm.chat import ChatMessage, Role
from fireclaw.llm.repair import RESPOND

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fireclaw.llm.chat import ChatRequest, JsonObject, Tool

_INTRODUCTION: Final = """\
Answer with one JSON object and nothing else. To use a tool: {{"name": TOOL, "arguments": {{…}}}}. \
To talk: {{"name": "{respond}", "arguments": {{"message": TEXT}}}}. The tools:
{tools}"""
_RESULT: Final = "[result of {name}]\n{text}"


def in_words(request: ChatRequest) -> ChatRequest:
    """The same request without tools and calls as such; the same bytes each time, so that a server can keep them."""
    names = {call.id: call.name for message in request.messages for call in message.tool_calls}
    messages = [_told(message, names, is_choice=bool(request.tools)) for message in request.messages]
    if request.tools:
        introduction = _INTRODUCTION.format(respond=RESPOND, tools="\n".join(map(_described, request.tools)))
        if messages and messages[0].role is Role.SYSTEM:
            introduction = f"{messages.pop(0).text}\n\n{introduction}"
        messages.insert(0, ChatMessage(Role.SYSTEM, introduction))
    return replace(request, messages=tuple(messages), tools=())


def _described(tool: Tool) -> str:
    parameters = tool.parameters.get("properties")
    return f"- {tool.name}: {tool.description} arguments: {json.dumps(parameters or {}, ensure_ascii=False)}"


def _told(message: ChatMessage, names: Mapping[str, str], *, is_choice: bool) -> ChatMessage:
    """A message in words.

    Args:
        message: as it is.
        names: of the tools, by the calls' ids.
        is_choice: the model is to answer with a choice, so its earlier talk has that form: it learns from it.
    """
    if message.role is Role.TOOL:
        name = names.get(message.tool_call_id, "the tool")
        return ChatMessage(Role.USER, _RESULT.format(name=name, text=message.text))
    if message.tool_calls:
        calls = "\n".join(_call(call.name, call.arguments) for call in message.tool_calls)
        return ChatMessage(message.role, calls)
    if message.role is Role.ASSISTANT and is_choice:
        return ChatMessage(message.role, _call(RESPOND, {"message": message.text}))
    return message


def _call(name: str, arguments: JsonObject) -> str:
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
