"""Which model an agent thinks with: the first of its preferences that is there. Sans-I/O.

A name is ``qwen2.5-coder:7b`` (one version), ``qwen2.5-coder`` (any version of it), or either behind the name of a
provider, ``ollama:qwen2.5-coder``: then no other provider will do. A provider's name alone is any model of it.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from fireclaw.llm.names import parse

if TYPE_CHECKING:
    from collections.abc import Iterable


def pick_model(preferences: Iterable[str], available: Iterable[str]) -> str | None:
    """Return the first of the preferences that is available, as it is named there.

    Args:
        preferences: names, the best first.
        available: what can be asked now, in the order in which equals are to be taken.

    Returns:
        A name from ``available``, or None where none of the preferences is there.
    """
    there = list(available)
    for wanted in preferences:
        for name in there:
            if _fits(wanted, name):
                return name
    return None


def unknown_model(name: str, known: Iterable[str]) -> str | None:
    """Say why a name cannot be a preference, or return None.

    A name behind a provider's is taken as it is: who writes ``ollama:my-own`` knows what is there. Without one it must
    be a name that we know, as a whole or by its family.

    Args:
        name: what stands in a template.
        known: names of models, with or without versions.
    """
    wanted = parse(name)
    if wanted.provider is not None:
        return None
    families = sorted({parse(other).model.partition(":")[0] for other in known})
    family = wanted.model.partition(":")[0]
    if family in families:
        return None
    near = difflib.get_close_matches(family, families, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(families)}"
    return f"there is no model {name!r} ({hint}; one of your own: 'ollama:NAME')"


def _fits(wanted: str, name: str) -> bool:
    wish, there = parse(wanted), parse(name)
    if wish.provider is not None and there.provider not in {None, wish.provider}:
        return False
    if not wish.model:
        return there.provider is wish.provider
    return wish.model == there.model or (":" not in wish.model and wish.model == there.model.partition(":")[0])
