"""Examples that teach a small model the form: when to call a tool, and how to answer from what the tool said.

Measured with Qwen2.5-Coder 0.5B: without them it invents answers and names of tools. The messages are the same bytes
each time, so a server keeps their work in its slot; they follow the system message and come before the conversation.
Lines of people have the form that the agents room gives them: ``<nick> text``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fireclaw.llm.chat import ChatMessage, Role, ToolCall

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fireclaw.llm.chat import Tool

_NICK = "alice"


def _said(text: str) -> ChatMessage:
    return ChatMessage(Role.USER, f"<{_NICK}> {text}")


def _answer(text: str) -> ChatMessage:
    return ChatMessage(Role.ASSISTANT, text)


def _command(number: int, command: str, output: str) -> tuple[ChatMessage, ChatMessage]:
    call = ToolCall(f"example-{number}", "run_command", {"command": command})
    return (
        ChatMessage(Role.ASSISTANT, "", tool_calls=(call,)),
        ChatMessage(Role.TOOL, output, tool_call_id=call.id),
    )


# Each example and the tool that it needs. Talk stands between work, or the model learns that one follows the other.
_EXAMPLES: Final[tuple[tuple[str, tuple[ChatMessage, ...]], ...]] = (
    (
        "run_command",
        (_said("who am I in the machine?"), *_command(1, "id -un", "agent"), _answer("The user is agent.")),
    ),
    (
        "",
        (
            _said("hello, who are you?"),
            _answer("I am an agent with a Linux machine of my own. Tell me what to do there."),
        ),
    ),
    (
        "run_command",
        (_said("what is 12 times 12?"), *_command(2, "echo $((12 * 12))", "144"), _answer("12 times 12 is 144.")),
    ),
    ("", (_said("thank you!"), _answer("You are welcome."))),
    (
        "run_command",
        (
            _said("make a folder notes with a file a.txt that says hello"),
            *_command(3, "mkdir -p notes && echo hello > notes/a.txt && cat notes/a.txt", "hello"),
            _answer("Done, notes/a.txt says: hello"),
        ),
    ),
    (
        "run_command",
        (
            _said("is git installed?"),
            *_command(4, "git --version", "[stderr]\nsh: git: not found\n[exit status 127]"),
            _answer("No, git is not installed: git: not found"),
        ),
    ),
)


def few_shot_messages(tools: Iterable[Tool]) -> list[ChatMessage]:
    """The examples that fit the offered tools; always the same messages for the same tools."""
    names = {tool.name for tool in tools} | {""}
    return [message for needs, messages in _EXAMPLES if needs in names for message in messages]
