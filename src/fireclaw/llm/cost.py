"""What was spent, as lines for a chat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fireclaw.llm.budget import dollars
from fireclaw.store.spending import CostBy, CostRow

if TYPE_CHECKING:
    from collections.abc import Sequence


def cost_lines(rows: Sequence[CostRow], by: CostBy) -> list[str]:
    """One line for each row, then all of them together where there are several.

    Args:
        rows: as the store sums them up.
        by: what a row stands for.
    """
    if not rows:
        return ["nothing was spent"]
    lines = [f"{row.key or _NOBODY[by]}: {_facts(row)}" for row in rows]
    return [*lines, f"together: {_facts(_total(rows))}"] if len(rows) > 1 else lines


_NOBODY = {CostBy.AGENT: "no agent", CostBy.MODEL: "no model", CostBy.DAY: "no day", CostBy.PERSON: "nobody"}


def _facts(row: CostRow) -> str:
    money = dollars(row.nanodollars)
    if row.unpriced:
        money += f" and {_count(row.unpriced, 'call')} of unknown price"
    tokens = row.input_tokens + row.cached_tokens + row.written_tokens + row.output_tokens
    calls = _count(row.calls, "call")
    if row.turns:
        calls += f" in {_count(row.turns, 'turn')}"
    return f"{money}, {calls}, {_count(tokens, 'token')}, {row.seconds:,.0f} s"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _total(rows: Sequence[CostRow]) -> CostRow:
    """All rows as one. A turn may stand in several of them (two models, say), so turns have no sum."""
    return CostRow(
        key="",
        calls=sum(row.calls for row in rows),
        turns=0,
        input_tokens=sum(row.input_tokens for row in rows),
        cached_tokens=sum(row.cached_tokens for row in rows),
        written_tokens=sum(row.written_tokens for row in rows),
        output_tokens=sum(row.output_tokens for row in rows),
        seconds=sum(row.seconds for row in rows),
        nanodollars=sum(row.nanodollars for row in rows),
        unpriced=sum(row.unpriced for row in rows),
    )
