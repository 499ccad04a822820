"""One call of an agent to its model: the attempts until a reply can be used, each of them in the ledger."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from fireclaw.errors import ModelError
from fireclaw.llm.chat import ChatReply, ChatRequest, Usage
from fireclaw.llm.repair import RawReply, Unusable, Usable, judge

if TYPE_CHECKING:
    from fireclaw.llm.provider import Provider

Record = Callable[[str, Mapping[str, object]], object]
"""Appends an event, (type, data), to the ledger."""

_RETRIES: Final = 2
_WARMER: Final = 0.3  # the same prompt at the same temperature would fail the same way


@dataclass(frozen=True)
class Connection:
    """A server and how to treat it.

    Attributes:
        provider: its client.
        kind: what kind of server it is, for the ledger.
        model: the model's name on it.
        can_force: it can hold a reply to a JSON schema (llama.cpp can; what others make of it is unknown).
        timeout_s: seconds that one attempt may take.
    """

    provider: Provider
    kind: str
    model: str
    can_force: bool
    timeout_s: float


class Call:
    """A call under way; ``run`` once.

    Args:
        server: whom to ask.
        request: what to ask.
        record: the ledger.
    """

    def __init__(self, server: Connection, request: ChatRequest, record: Record) -> None:
        self._server = server
        self._request = request
        self._record = record
        self._usage = Usage()

    async def run(self) -> ChatReply:
        """Ask until the reply can be used.

        An unusable reply is asked for again, twice, warmer and held to a schema where the server can; then once without
        tools, as some words are better than nothing.

        Raises:
            ModelError: the server failed, or all replies were unusable.
        """
        began = time.monotonic()
        plan = [self._request] * (1 + _RETRIES)
        if self._request.tools:
            plan.append(replace(self._request, tools=()))
        reasons = []
        for attempt, request in enumerate(plan, 1):
            verdict, model = await self._attempt(request, attempt)
            if isinstance(verdict, Usable):
                return ChatReply(
                    text=verdict.text,
                    tool_calls=verdict.calls,
                    finish=verdict.finish,
                    usage=self._usage,
                    model=model,
                    duration_s=time.monotonic() - began,
                    attempts=attempt,
                )
            reasons.append(verdict.reason)
        raise ModelError(
            f"the model {self._server.model!r} gave no usable reply in {len(plan)} attempts: {reasons[-1]}",
            hint="ask in other words, or choose a larger model",
            kind="bad-output",
        )

    async def warm(self) -> None:
        """Have the server read the prompt, for a single token; what it answers is of no use.

        Raises:
            ModelError: the server failed.
        """
        await self._attempt(replace(self._request, max_tokens=1), 1)

    async def _attempt(self, request: ChatRequest, attempt: int) -> tuple[Usable | Unusable, str]:
        """Ask once, record it, judge it; also tell which model answered."""
        server = self._server
        request = replace(request, temperature=request.temperature + _WARMER * (attempt - 1))
        event = self._event(request, attempt)
        self._record("model.call.started", event)
        began = time.monotonic()
        try:
            raw = await server.provider.complete(
                server.model, request, force=attempt > 1 and server.can_force, timeout_s=server.timeout_s
            )
        except ModelError as error:
            self._record("model.call.failed", event | _failure(began, error.kind, str(error)))
            if error.kind == "bad-output":
                return Unusable(error.message), server.model
            raise
        except asyncio.CancelledError:
            self._record("model.call.failed", event | _failure(began, "cancelled", "the caller gave up"))
            raise
        self._usage += raw.usage
        has_used_tools = bool(self._request.tools) or any(message.tool_calls for message in request.messages)
        verdict = judge(raw, request.tools, f"{request.call_id}-{attempt}", has_used_tools=has_used_tools)
        self._record("model.call.done", event | _result(began, raw, verdict))
        return verdict, raw.model or server.model

    def _event(self, request: ChatRequest, attempt: int) -> dict[str, object]:
        """What every event of an attempt holds; names of OpenTelemetry's GenAI conventions where there are any."""
        return {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": self._server.kind,
            "gen_ai.request.model": self._server.model,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.request.temperature": round(request.temperature, 3),
            "gen_ai.agent.name": request.agent,
            "turn_id": request.turn_id,
            "step": request.step,
            "call_id": request.call_id,
            "attempt": attempt,
        }


def _failure(began: float, kind: str, reason: str) -> dict[str, object]:
    return {"error.type": kind, "error.message": reason, "duration_s": _since(began)}


def _result(began: float, raw: RawReply, verdict: Usable | Unusable) -> dict[str, object]:
    finish = verdict.finish if isinstance(verdict, Usable) else raw.finish
    result: dict[str, object] = {
        "gen_ai.response.model": raw.model,
        "gen_ai.response.finish_reasons": [finish.value],
        "gen_ai.usage.input_tokens": raw.usage.input_tokens,
        "gen_ai.usage.cache_read.input_tokens": raw.usage.cached_tokens,
        "gen_ai.usage.output_tokens": raw.usage.output_tokens,
        "duration_s": _since(began),
    }
    if isinstance(verdict, Unusable):
        result["unusable"] = verdict.reason
    return result


def _since(began: float) -> float:
    return round(time.monotonic() - began, 3)
