"""Argument parsers whose mistakes are our errors: exit status 125, the reason, the next step. On the hot path."""

from __future__ import annotations

import argparse
import math
from typing import NoReturn

from fireclaw.errors import InvalidError


class Parser(argparse.ArgumentParser):
    """A parser for one verb, e.g. ``Parser("run", "Run a command …", examples="…")``.

    Args:
        verb: the verb, as it stands after ``fireclaw``.
        about: one sentence.
        usage: what follows the verb; argparse's own when empty.
        examples: command lines, shown under the options.
    """

    def __init__(self, verb: str, about: str, *, usage: str = "", examples: str = "") -> None:
        super().__init__(
            prog=f"fireclaw {verb}",
            usage=f"fireclaw {verb} {usage}" if usage else None,
            description=about,
            epilog=f"examples:\n{examples}" if examples else None,
            formatter_class=_Formatter,
            allow_abbrev=False,  # a script must not break when an option with the same start appears
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving with argparse's status 2, which a command may use.

        Raises:
            InvalidError: always.
        """
        raise InvalidError(message, hint=f"see '{self.prog} --help'")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' lines. Its width is fixed: asking the terminal for it costs the hot path four imports."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)


def seconds(text: str) -> float:
    """Read a positive number of seconds.

    Raises:
        argparse.ArgumentTypeError: it is not one.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value
