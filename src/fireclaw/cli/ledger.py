"""``fireclaw ledger``: checking and reading the record of what happened.

It reads the files themselves: a record must be checkable while no daemon runs, and by someone who does not trust it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from fireclaw.cli.parser import Parser
from fireclaw.cli.terminal import clean
from fireclaw.errors import FireclawError
from fireclaw.paths import Home
from fireclaw.store.ledger import Problem, Verdict, find_anchor, read, verify

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_VALUE_MAX: Final = 72
# Of the names that OpenTelemetry gives, those that tell a person something.
_TELLING: Final = {
    "gen_ai.request.model",
    "gen_ai.tool.name",
    "gen_ai.tool.call.arguments",
    "gen_ai.tool.call.result",
    "gen_ai.usage.input_tokens",
    "gen_ai.usage.output_tokens",
}


def ledger(arguments: Sequence[str]) -> int:
    """Verify or show the record."""
    parser = Parser(
        "ledger",
        "Verify the record of what happened (exit status 1 when it was changed), or show it.",
        examples="  fireclaw ledger verify\n  fireclaw ledger show\n"
        "  fireclaw ledger show --json | jq 'select(.type == \"tool.call\")'",
    )
    parser.add_argument("action", choices=["verify", "show"])
    parser.add_argument("--json", action="store_true", help="print JSON for programs; show prints one line an event")
    options = parser.parse_args(arguments)
    home = Home.find()
    act = _verify if options.action == "verify" else _show
    try:
        return act(home, as_json=options.json)
    except FileNotFoundError as error:
        raise FireclawError(f"there is no ledger at {home.ledger}", hint="the daemon writes it") from error


def _verify(home: Home, *, as_json: bool) -> int:
    anchor = find_anchor(home.database)  # before the file is read: the file may be ahead of it, never behind
    if anchor is not None and not home.ledger.exists():
        gone = f"the whole ledger is missing; the anchor knows {anchor.seq} entries"
        verdict = Verdict(0, None, Problem(1, gone))
    else:
        verdict = verify(home.ledger, anchor)
    if as_json:
        print(json.dumps({"ok": verdict.ok} | asdict(verdict), indent=2))
    elif verdict.problem is not None:
        print(f"line {verdict.problem.line}: {clean(verdict.problem.what)}")
        print(f"{verdict.entries} entries before it are good")
    else:
        against = f"the anchor at entry {anchor.seq}" if anchor else "no anchor: a cut end would not be seen"
        print(f"{verdict.entries} entries, unbroken; {against}")
    return 0 if verdict.ok else 1


def _show(home: Home, *, as_json: bool) -> int:
    for entry in read(home.ledger):
        if as_json:
            print(json.dumps(asdict(entry)))
        else:
            who = entry.agent or (entry.machine or "-")[:12]
            print(clean(f"{entry.seq:>6} {entry.ts[:19]}Z {entry.type:<18} {who:<12} {_brief(entry.data)}"))
    return 0


def _brief(data: Mapping[str, object]) -> str:
    """Show what people look for in an event; ``--json`` has all of it."""
    words = []
    for key, value in data.items():
        if key.endswith("_id") or (key.startswith("gen_ai.") and key not in _TELLING):
            continue
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        text = text if len(text) <= _VALUE_MAX else f"{text[:_VALUE_MAX]}…"
        words.append(f"{key.removeprefix('gen_ai.')}={text}")
    return " ".join(words)
