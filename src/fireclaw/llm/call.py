"""One call of an agent to its model: the attempts until a reply can be used, each of them metered and in the ledger."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Final

from fireclaw.errors import ModelError
from fireclaw.llm.budget import BudgetError
from fireclaw.llm.catalogue import ToolSupport
from fireclaw.llm.chat import ChatReply, ChatRequest, JsonObject, Role, Usage
from fireclaw.llm.names import ModelName
from fireclaw.llm.repair import RawReply, Unusable, Usable, call_schema, judge
from fireclaw.llm.words import in_words
from fireclaw.store.spending import NANO

if TYPE_CHECKING:
    from fireclaw.llm.meter import Meter, Reading
    from fireclaw.llm.names import ProviderKind
    from fireclaw.llm.prices import Price
    from fireclaw.llm.providers.base import Provider

Record = Callable[[str, Mapping[str, object]], object]
"""Appends an event, (type, data), to the ledger."""

_RETRIES: Final = 2
_WARMER: Final = 0.3  # the same prompt at the same temperature would fail the same way


class Force(Enum):
    """Whether a server can hold a reply to a JSON schema."""

    NO = "no"
    WITHOUT_TOOLS = "without tools"  # its tool parser and its grammar exclude each other
    WITH_TOOLS = "with tools"


@dataclass(frozen=True)
class Connection:
    """A model on its server, and how to treat it.

    Attributes:
        provider: the server's client.
        kind: what kind of server it is.
        where: its address.
        model: the model's name on it.
        tools: how the model uses tools.
        force: whether the server can hold a reply to a schema.
        timeout_s: seconds that one attempt may take.
    """

    provider: Provider
    kind: ProviderKind
    where: str
    model: str
    tools: ToolSupport
    force: Force
    timeout_s: float


class Call:
    """A call under way; ``run`` once.

    Args:
        server: whom to ask.
        request: what to ask.
        record: the ledger.
        meter: the meter.
    """

    def __init__(self, server: Connection, request: ChatRequest, record: Record, meter: Meter) -> None:
        if server.tools is ToolSupport.NONE:
            request = replace(request, tools=())
        self._server = server
        self._request = request
        self._record = record
        self._meter = meter
        self._usage = Usage()

    async def run(self) -> ChatReply:
        """Ask until the reply can be used.

        An unusable reply is asked for again, twice, warmer and held to a schema where the server can; then once without
        tools, as some words are better than nothing.

        Raises:
            ModelError: the server failed, a budget is spent, or all replies were unusable.
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
        """Ask once, meter and record it, judge it; also tell which model answered."""
        server = self._server
        request = replace(request, temperature=request.temperature + _WARMER * (attempt - 1))
        event = self._event(request, attempt)
        reading = await self._begin(request, event)
        asked, schema = self._shape(request, attempt)
        try:
            raw = await server.provider.complete(server.model, asked, schema=schema, timeout_s=server.timeout_s)
        except ModelError as error:
            self._fail(reading, event, error.kind, str(error))
            if error.kind == "bad-output":
                return Unusable(error.message), server.model
            raise
        except asyncio.CancelledError:
            self._fail(reading, event, "cancelled", "the caller gave up")
            raise
        self._usage += raw.usage
        verdict = self._judge(raw, request, attempt, is_forced=schema is not None)
        price = reading.end("done" if isinstance(verdict, Usable) else "unusable", raw.usage)
        self._record("model.call.done", event | _result(reading, raw, verdict, price))
        if raw.declined:
            raise ModelError(f"the model {server.model!r} declines to answer that", kind="refused")
        return verdict, raw.model or server.model

    async def _begin(self, request: ChatRequest, event: dict[str, object]) -> Reading:
        server = self._server
        try:
            reading = await self._meter.begin(request, str(ModelName(server.kind, server.model)), server.where)
        except BudgetError as error:
            self._record("model.call.refused", event | {"error.type": error.kind, "error.message": str(error)})
            raise
        self._record("model.call.started", event)
        return reading

    def _shape(self, request: ChatRequest, attempt: int) -> tuple[ChatRequest, JsonObject | None]:
        """The request as this model can read it, and the schema of the reply if it is held to one."""
        server = self._server
        if server.tools is ToolSupport.SCHEMA:
            return in_words(request), call_schema(request.tools) if request.tools else None
        if attempt == 1 or not request.tools or server.force is Force.NO:
            return request, None
        schema = call_schema(request.tools)
        return (request if server.force is Force.WITH_TOOLS else in_words(request)), schema

    def _judge(self, raw: RawReply, request: ChatRequest, attempt: int, *, is_forced: bool) -> Usable | Unusable:
        said = (message.text for message in request.messages if message.role in (Role.USER, Role.TOOL))
        return judge(
            raw,
            request.tools,
            f"{request.call_id}-{attempt}",
            has_used_tools=bool(self._request.tools) or any(message.tool_calls for message in request.messages),
            quotable=() if is_forced else said,  # a forced reply had the choice to talk
        )

    def _fail(self, reading: Reading, event: dict[str, object], kind: str, reason: str) -> None:
        reading.end(kind, Usage())
        failure = {"error.type": kind, "error.message": reason, "duration_s": round(reading.seconds, 3)}
        self._record("model.call.failed", event | failure)

    def _event(self, request: ChatRequest, attempt: int) -> dict[str, object]:
        """What every event of an attempt holds; names of OpenTelemetry's GenAI conventions where there are any."""
        return {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": self._server.kind.label,
            "gen_ai.request.model": self._server.model,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.request.temperature": round(request.temperature, 3),
            "gen_ai.agent.name": request.agent,
            "turn_id": request.turn_id,
            "step": request.step,
            "call_id": request.call_id,
            "attempt": attempt,
        }


def _result(reading: Reading, raw: RawReply, verdict: Usable | Unusable, price: Price) -> dict[str, object]:
    finish = verdict.finish if isinstance(verdict, Usable) else raw.finish
    result: dict[str, object] = {
        "gen_ai.response.model": raw.model,
        "gen_ai.response.finish_reasons": [finish.value],
        "gen_ai.usage.input_tokens": raw.usage.input_tokens,
        "gen_ai.usage.cache_read.input_tokens": raw.usage.cached_tokens,
        "gen_ai.usage.cache_creation.input_tokens": raw.usage.written_tokens,
        "gen_ai.usage.output_tokens": raw.usage.output_tokens,
        "price_usd": None if price.nanodollars is None else price.nanodollars / NANO,
        "price_source": price.source,
        "duration_s": round(reading.seconds, 3),
    }
    if isinstance(verdict, Unusable):
        result["unusable"] = verdict.reason
    return result
