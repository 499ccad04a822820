"""Examples that teach a small model the form: when to call a tool, and how to answer from what the tool said.

Measured with Qwen2.5-Coder 0.5B: without them it invents answers and names of tools; with them it gets nine or ten of
ten simple requests right. It copies what it sees: an answer that quotes the output, how it names itself, several nicks
(with a single one it takes that for its own). The messages are the same bytes each time, so that a server keeps their
work in its slot. They follow the system message and come before the conversation, whose lines have the same form,
``<nick> text``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fireclaw.llm.chat import ChatMessage, Role, ToolCall

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fireclaw.llm.chat import Tool


def few_shot_messages(tools: Iterable[Tool], name: str = "worker") -> list[ChatMessage]:
    """The examples that fit the offered tools.

    Args:
        tools: what is offered; an example that needs another tool is left out.
        name: the agent's own name.
    """
    if "run_command" not in {tool.name for tool in tools}:
        return [*_talk("eve", "thank you!", "You are welcome, eve."), *_introduction(name)]
    return [
        *_work("tom", "which user do you run as?", "id -un", "agent", "I run as the user agent."),
        *_talk("eve", "thank you!", "You are welcome, eve."),
        *_work("alice", "what is 12 times 12?", "echo $((12 * 12))", "144", "12 times 12 is 144."),
        *_work("tom", "write hello into a.txt", "echo hello > a.txt && cat a.txt", "hello", "Done, a.txt says: hello"),
        *_work("eve", "show me the first line of /etc/group", "head -n 1 /etc/group", "root:x:0:", "It is: root:x:0:"),
        *_introduction(name),
        *_work(
            "tom",
            "is there a folder /data?",
            "ls -d /data",
            "[stderr]\nls: cannot access '/data': No such file or directory\n[exit status 2]",
            "No: cannot access '/data': No such file or directory",
        ),
    ]


def _talk(nick: str, text: str, answer: str) -> tuple[ChatMessage, ...]:
    return ChatMessage(Role.USER, f"<{nick}> {text}"), ChatMessage(Role.ASSISTANT, answer)


def _work(nick: str, text: str, command: str, output: str, answer: str) -> tuple[ChatMessage, ...]:
    call = ToolCall(f"example {command}", "run_command", {"command": command})
    return (
        ChatMessage(Role.USER, f"<{nick}> {text}"),
        ChatMessage(Role.ASSISTANT, "", tool_calls=(call,)),
        ChatMessage(Role.TOOL, output, tool_call_id=call.id),
        ChatMessage(Role.ASSISTANT, answer),
    )


def _introduction(name: str) -> tuple[ChatMessage, ...]:
    return _talk("alice", "hello, who are you?", f"I am {name}, an agent with a Linux machine of my own.")
