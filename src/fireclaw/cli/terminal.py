"""What the command line writes for people: sentences on stderr, tables on stdout. Standard library only.

The command's own bytes never pass through here; they are written as they came.
"""

from __future__ import annotations

import contextlib
import os
import sys

_STDERR = 2


def clean(text: str) -> str:
    """Make text that a guest or a model may have written safe for a terminal.

    Control characters, newlines among them, come out as backslash escapes.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def say(text: str) -> None:
    """Write one sentence of ours to stderr.

    It goes to the descriptor itself: ``sys.stderr`` is None when the caller closed it, and nothing that happens
    to stderr may change what the verb does.
    """
    with contextlib.suppress(OSError):
        os.write(_STDERR, f"fireclaw: {clean(text)}\n".encode(errors="backslashreplace"))


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    """Print rows under their columns, aligned; with rich when stdout is a terminal."""
    cells = [[clean(cell) for cell in row] for row in rows]
    if sys.stdout is not None and sys.stdout.isatty():
        _print_rich(columns, cells)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in [[name.upper() for name in columns], *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_rich(columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console  # noqa: PLC0415 - slow to import, and only a terminal needs it
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415 - plain text: a cell must not be read as markup

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name.upper())
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
