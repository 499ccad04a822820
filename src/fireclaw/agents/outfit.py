"""What an agent goes into a turn with: everything that its template and its settings decide. Sans-I/O.

A turn keeps the outfit with which it began, whatever is changed meanwhile; the next turn gets the new one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING, Final

from fireclaw.agents.context import tokens_of_tools
from fireclaw.agents.templates import Approvals, Limits
from fireclaw.agents.tools import TOOLS
from fireclaw.llm.budget import Budget
from fireclaw.llm.chat import ChatMessage, Role
from fireclaw.llm.fewshot import few_shot_messages

if TYPE_CHECKING:
    from fireclaw.agents.templates import Budget as DailyBudget
    from fireclaw.agents.templates import Template
    from fireclaw.llm.chat import Tool

# Of the context, one part in so many: what a reply may have, and what is shown of one tool's output (in bytes).
_REPLY_SHARE: Final = 8
_OUTPUT_SHARE: Final = 4
_REPLY_TOKENS: Final = (512, 4096)  # at least, at most
_OUTPUT_BYTES: Final = (2000, 16000)  # a small model on a CPU reads some 70 tokens a second


@dataclass(frozen=True)
class Outfit:
    """What one turn is made with.

    Attributes:
        tools: what is on offer.
        limits: how far it may go.
        approvals: what needs an operator's yes.
        budget: what the agent may spend a day; None: as much as it likes.
        fixed: what every prompt begins with, byte for byte.
        context_tokens: what the model can read and write at once.
        models: which models are liked best; where none of them is there, the default is asked.
        model: the one model that was set for the agent, whether it is there or not; empty: none was.
    """

    tools: tuple[Tool, ...]
    limits: Limits = field(default_factory=Limits)
    approvals: Approvals = field(default_factory=Approvals)
    budget: Budget | None = None
    fixed: tuple[ChatMessage, ...] = ()
    context_tokens: int = 4096
    models: tuple[str, ...] = ()
    model: str = ""

    @classmethod
    def of(cls, template: Template, name: str, context_tokens: int, *, model: str = "", persona: str = "") -> Outfit:
        """Make the outfit of an agent.

        Args:
            template: what it is made of.
            name: the agent's.
            context_tokens: see above.
            model: see above.
            persona: a persona in place of the template's.
        """
        tools = tuple(TOOLS[tool] for tool in template.tools)
        words = persona.replace("{name}", name) if persona else template.persona_of(name)
        return cls(
            tools=tools,
            limits=template.limits,
            approvals=template.approvals,
            budget=_daily(template.budget),
            fixed=(ChatMessage(Role.SYSTEM, words), *(few_shot_messages(tools, name) if tools else ())),
            context_tokens=context_tokens,
            models=template.models,
            model=model,
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the tools."""
        return tuple(tool.name for tool in self.tools)

    @property
    def reply_tokens(self) -> int:
        """What a reply may have."""
        low, high = _REPLY_TOKENS
        return min(high, max(low, self.context_tokens // _REPLY_SHARE))

    @property
    def prompt_tokens(self) -> int:
        """What the messages of a prompt may cost."""
        return self.context_tokens - self.reply_tokens - tokens_of_tools(self.tools)

    @property
    def output_bytes(self) -> int:
        """How much of a tool's output the model is shown."""
        low, high = _OUTPUT_BYTES
        return min(high, max(low, self.context_tokens // _OUTPUT_SHARE))


def _daily(budget: DailyBudget) -> Budget | None:
    """Return a template's budget as the gateway takes it; the money is what was written, not its nearest float."""
    if not budget.model_fields_set:
        return None
    money = None if budget.money is None else Decimal(str(budget.money))
    return Budget(budget.tokens, money, budget.turns, budget.seconds)
