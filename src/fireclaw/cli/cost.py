"""``fireclaw cost``: what the agents' models came to."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, Final

from fireclaw.cli.parser import Parser
from fireclaw.cli.start import request
from fireclaw.cli.terminal import print_table
from fireclaw.paths import Home

if TYPE_CHECKING:
    from collections.abc import Sequence

_BY: Final = ("agent", "model", "day", "person")


def cost(arguments: Sequence[str]) -> int:
    """Show what the models came to."""
    parser = Parser(
        "cost",
        "Show what the agents' models came to: calls, tokens, time, US dollars. Models of one's own cost nothing.",
        examples="  fireclaw cost\n  fireclaw cost --by day\n  fireclaw cost --by person --json",
    )
    parser.add_argument("--by", choices=_BY, default="agent", help="what a row stands for (default: agent)")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    options = parser.parse_args(arguments)
    with request(Home.find(), "GET", f"/v1/cost?by={options.by}") as connection:
        found = connection.read_json()
    if options.json:
        print(json.dumps(found, indent=2))
        return 0
    print_table(
        [options.by, "calls", "turns", "read", "cached", "written", "output", "time", "price"],
        [_row(row) for row in found["rows"]],
    )
    return 0


def _row(row: dict[str, Any]) -> list[str]:
    counts = ("calls", "turns", "input_tokens", "cached_tokens", "written_tokens", "output_tokens")
    return [row["key"] or "-", *(f"{row[name]:,}" for name in counts), f"{row['seconds']:,.0f} s", _price(row)]


def _price(row: dict[str, Any]) -> str:
    """Dollars, as exact as they are small; a question mark where the price of some call is not known."""
    price = row["price_usd"]
    digits = 2 if price >= 1 or not price else max(2, 1 - math.floor(math.log10(price)))
    text = f"${price:,.{digits}f}"
    return f"{text} + ?" if row["unpriced"] else text
