"""What an agent may spend a day, and the check before each call. Sans-I/O.

A limit is checked before a call, so the call that reaches it is the last one, and may go over it by its own size.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from fireclaw.errors import ModelError
from fireclaw.store.spending import NANO

if TYPE_CHECKING:
    from fireclaw.store.spending import Spent

KIND: Final = "budget"
_ANEW: Final = "it starts anew at midnight UTC; an operator can raise it"


@dataclass(frozen=True)
class Budget:
    """Limits a day (of UTC). None: there is none.

    Attributes:
        tokens: read and written, those from a cache included.
        money: US dollars.
        turns: turns that ask a model.
        seconds: time of its model calls.
    """

    tokens: int | None = None
    money: Decimal | None = None
    turns: int | None = None
    seconds: float | None = None


class BudgetError(ModelError):
    """A budget is spent; the message is a sentence that the agent can say of itself."""

    code = "budget"

    def __init__(self, message: str, *, hint: str = _ANEW) -> None:
        super().__init__(message, hint=hint, kind=KIND)


def check(budget: Budget, spent: Spent, *, model: str, is_priced: bool) -> None:
    """Refuse a call that the budget has no room for.

    Args:
        budget: the limits.
        spent: what was spent today, without the turn under way.
        model: who is to be asked.
        is_priced: its price is known. A limit in money cannot be kept with a model whose price is not.

    Raises:
        BudgetError: a limit is reached.
    """
    if budget.tokens is not None and spent.tokens >= budget.tokens:
        raise _reached(f"{spent.tokens:,} of {budget.tokens:,} tokens")
    if budget.turns is not None and spent.turns >= budget.turns:
        raise _reached(f"{spent.turns:,} of {budget.turns:,} turns")
    if budget.seconds is not None and spent.seconds >= budget.seconds:
        raise _reached(f"{spent.seconds:,.0f} of {budget.seconds:,.0f} seconds of thinking")
    if budget.money is None:
        return
    if not is_priced:
        raise BudgetError(
            f"the price of {model} is not known, and I have a limit in money",
            hint="an operator can put the price into prices.toml, or choose another model",
        )
    if spent.nanodollars >= budget.money * NANO:
        raise _reached(f"{dollars(spent.nanodollars)} of {dollars(int(budget.money * NANO))}")


def dollars(nanodollars: int) -> str:
    """Write money for people: cents, and below a dollar as many digits as tell something, e.g. ``$0.0042``."""
    amount = Decimal(nanodollars) / NANO
    if not amount:
        return "$0"
    if amount >= 1:
        return f"${amount:,.2f}"
    return f"${amount:.{max(2, 1 - amount.adjusted())}f}"


def _reached(what: str) -> BudgetError:
    return BudgetError(f"my budget for today is spent: {what}")
