"""Tools in words, for models whose server has no place for them."""

from __future__ import annotations

import json

from fireclaw.llm.chat import ChatMessage, ChatRequest, Role, Tool, ToolCall
from fireclaw.llm.words import in_words

RUN = Tool("run_command", "Run a command.", {"type": "object", "properties": {"command": {"type": "string"}}})
WISH = ToolCall("1", "run_command", {"command": "df"})
TALK = (
    ChatMessage(Role.SYSTEM, "You are worker."),
    ChatMessage(Role.USER, "hello"),
    ChatMessage(Role.ASSISTANT, "hi"),
    ChatMessage(Role.USER, "the disk?"),
    ChatMessage(Role.ASSISTANT, "", (WISH,)),
    ChatMessage(Role.TOOL, "50 %", tool_call_id="1"),
)


def request(messages: tuple[ChatMessage, ...] = TALK, *tools: Tool) -> ChatRequest:
    """A request."""
    return ChatRequest("worker", "t", 0, "c", messages, tools=tools)


def test_everything_is_said_in_the_form_that_is_asked_for() -> None:
    """Calls, and talk as well, are JSON; results are words of the user's side; nothing of tools is left elsewhere."""
    told = in_words(request(TALK, RUN))
    system, hello, hi, disk, wish, result = told.messages
    assert told.tools == ()
    assert system.role is Role.SYSTEM
    assert system.text.startswith("You are worker.\n\nAnswer with one JSON object")
    assert '- run_command: Run a command. arguments: {"command": {"type": "string"}}' in system.text
    assert (hello.text, disk.text) == ("hello", "the disk?")
    assert json.loads(hi.text) == {"name": "respond", "arguments": {"message": "hi"}}
    assert json.loads(wish.text) == {"name": "run_command", "arguments": {"command": "df"}}
    assert wish.tool_calls == ()
    assert (result.role, result.text) == (Role.USER, "[result of run_command]\n50 %")


def test_the_beginning_is_the_same_bytes_each_time() -> None:
    """A server keeps its work on what two prompts have in common."""
    first, second = in_words(request(TALK[:2], RUN)), in_words(request(TALK, RUN))
    assert second.messages[:2] == first.messages


def test_without_tools_talk_stays_talk() -> None:
    """The last answer is asked for in plain words; what was called before is still told."""
    told = in_words(request())
    assert told.messages[0].text == "You are worker."
    assert told.messages[2].text == "hi"
    assert told.messages[5].text.startswith("[result of")


def test_a_conversation_without_a_system_text_gets_one() -> None:
    """The tools have to be told somewhere."""
    told = in_words(request(TALK[1:2], RUN))
    assert [message.role for message in told.messages] == [Role.SYSTEM, Role.USER]
