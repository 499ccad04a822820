"""The meter: what each call of a model costs, written down, and the budgets, kept before it.

::

    meter = Meter(spending, prices)
    reading = await meter.begin(request, "ollama:qwen2.5:7b", where)    raises BudgetError: nothing was asked
    ...                                                                 the call
    price = reading.end("done", usage)
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fireclaw.llm.budget import check
from fireclaw.store.spending import Asked, Bill, day_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from fireclaw.llm.chat import ChatRequest, Usage
    from fireclaw.llm.prices import Price, PriceList, Prices
    from fireclaw.store.spending import Spending


class Meter:
    """One meter for all calls.

    Args:
        spending: where it is written down; None: nowhere, and budgets are not kept.
        prices: what models cost.
        clock: seconds since the epoch.
    """

    def __init__(self, spending: Spending | None, prices: Prices, clock: Callable[[], float] = time.time) -> None:
        self._spending = spending
        self._prices = prices
        self._clock = clock

    async def begin(self, request: ChatRequest, model: str, where: str) -> Reading:
        """Check the budget, and write down that a call begins.

        Args:
            request: what is to be asked, with the agent's budget.
            model: the model's whole name.
            where: its server's address.

        Raises:
            BudgetError: the budget has no room for it.
        """
        prices = await self._prices.find(model, where)
        spending_id = ""
        if self._spending is not None:
            now = self._clock()
            if request.budget is not None:
                spent = self._spending.spent(request.agent, day_of(now), request.turn_id)
                check(request.budget, spent, model=model, is_priced=prices.is_known)
            asked = Asked(request.agent, request.person, request.turn_id, request.call_id, model)
            spending_id = self._spending.begin(asked, now)
        return Reading(self._spending, spending_id, prices)


class Reading:
    """One call on the meter; ended once."""

    def __init__(self, spending: Spending | None, spending_id: str, prices: PriceList) -> None:
        self._spending = spending
        self._spending_id = spending_id
        self._prices = prices
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def end(self, outcome: str, usage: Usage) -> Price:
        """Write down what the call came to.

        Args:
            outcome: ``done``, ``unusable``, or the kind of the error.
            usage: its tokens.
        """
        price = self._prices.price(usage)
        if self._spending is not None:
            bill = Bill(
                outcome=outcome,
                input_tokens=usage.input_tokens - usage.cached_tokens - usage.written_tokens,
                cached_tokens=usage.cached_tokens,
                written_tokens=usage.written_tokens,
                output_tokens=usage.output_tokens,
                duration_s=round(self.seconds, 3),
                nanodollars=price.nanodollars,
                price_source=price.source,
            )
            self._spending.finish(self._spending_id, bill)
        return price
