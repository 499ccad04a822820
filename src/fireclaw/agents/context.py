"""What fits into the model's context: the fixed part, as much of the past as has room, and this turn. Sans-I/O.

Tokens are estimated from bytes, on the safe side. Messages are kept or left out in groups, never one without the
others that it needs: a tool's result without its call would break the conversation for good.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from fireclaw.agents.speech import cut_middle
from fireclaw.errors import ModelError
from fireclaw.llm.chat import Role

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fireclaw.agents.turn import Group
    from fireclaw.llm.chat import ChatMessage, Tool

_BYTES_PER_TOKEN = 3  # English text has some four bytes a token, code and other scripts fewer
_MESSAGE_TOKENS = 8  # the template's own words around a message
_CUT_NOTE_BYTES = 64  # at most, of ``cut_middle``'s note
_PAST_SHARE = 4  # a quarter of the budget may go to earlier turns
_BLOCK = 4  # earlier turns leave the prompt by so many


def tokens_of(message: ChatMessage) -> int:
    """Estimate what a message costs."""
    size = len(message.text.encode(errors="replace")) + len(message.tool_call_id)
    for call in message.tool_calls:
        size += len(call.id) + len(call.name) + len(json.dumps(call.arguments))
    return _MESSAGE_TOKENS * (1 + len(message.tool_calls)) + -(-size // _BYTES_PER_TOKEN)


def tokens_of_tools(tools: Iterable[Tool]) -> int:
    """Estimate what offering the tools costs."""
    size = sum(len(tool.name) + len(tool.description) + len(json.dumps(tool.parameters)) for tool in tools)
    return _MESSAGE_TOKENS + -(-size // _BYTES_PER_TOKEN)


def fit(
    fixed: Sequence[ChatMessage],
    past: Sequence[Group],
    question: ChatMessage,
    exchanges: Sequence[Group],
    budget: int,
    *,
    ordinal: int = 0,
) -> tuple[ChatMessage, ...]:
    """Choose the messages of a prompt.

    Args:
        fixed: the system's message and the examples; always there, always first, so that the server's cache of
            the prefix helps.
        past: earlier turns of this conversation, oldest first; the newest are kept.
        question: what this turn answers; always there.
        exchanges: calls of this turn with their results, oldest first; the newest are kept, and the newest one
            of all has its results shortened rather than be left out.
        budget: tokens that the prompt may cost.
        ordinal: which turn of the conversation the first of ``past`` is, from 0.

    Raises:
        ModelError: not even the fixed part and the question fit (``kind`` is ``context``).
    """
    room = budget - sum(map(tokens_of, fixed)) - tokens_of(question)
    if room < 0:
        raise ModelError(
            f"the persona, the tools and the question do not fit into {budget} tokens of context",
            hint="give the model a larger context, or the agent a shorter persona",
            kind="context",
        )
    now = _newest(exchanges, room) or _shortened(exchanges[-1:], room)
    room -= sum(map(tokens_of, now))
    before = _recent(past, ordinal, min(room, budget // _PAST_SHARE))
    return (*fixed, *before, question, *now)


def _recent(groups: Sequence[Group], ordinal: int, room: int) -> list[ChatMessage]:
    """Return the messages of the newest turns that fit, beginning with the first of a block of turns.

    A server keeps what it made of the last prompt as far as the next one begins with the same bytes. If the oldest
    turn left with each new one, that would be the system's message alone, and every turn of a long conversation
    would have to be read anew: half a minute on a CPU. So the beginning moves by whole blocks, and rarely.
    """
    for start in range(-ordinal % _BLOCK, len(groups) + 1, _BLOCK):
        kept = [message for group in groups[start:] for message in group]
        if kept and _cost(kept) <= room:
            return kept
    return _newest(groups, room)


def _newest(groups: Sequence[Group], room: int) -> list[ChatMessage]:
    """Return the messages of the newest groups that fit, in order."""
    kept: list[Group] = []
    for group in reversed(groups):
        room -= _cost(group)
        if room < 0:
            break
        kept.append(group)
    return [message for group in reversed(kept) for message in group]


def _shortened(groups: Sequence[Group], room: int) -> list[ChatMessage]:
    """Return the one group, if any, with its results cut so that it fits, or nothing where even that cannot be."""
    group = [message for group in groups for message in group]
    results = [message for message in group if message.role is Role.TOOL]
    # One token more a result: each of them is rounded up when it is counted again.
    rest = (
        _cost(group)
        + len(results)
        - sum(len(message.text.encode(errors="replace")) // _BYTES_PER_TOKEN for message in results)
    )
    each = (room - rest) * _BYTES_PER_TOKEN // max(1, len(results)) - _CUT_NOTE_BYTES
    if each < 0:
        return []
    return [
        replace(message, text=cut_middle(message.text, each)) if message.role is Role.TOOL else message
        for message in group
    ]


def _cost(group: Sequence[ChatMessage]) -> int:
    return sum(map(tokens_of, group))
