"""``fireclaw ps`` and ``fireclaw prune``: the machines that are there, and what nobody owns any more."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Final

from fireclaw.cli.parser import Parser
from fireclaw.cli.start import request
from fireclaw.cli.terminal import clean, print_table
from fireclaw.paths import Home

if TYPE_CHECKING:
    from collections.abc import Sequence

_UNITS: Final = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def ps(arguments: Sequence[str]) -> int:
    """List the machines."""
    parser = Parser("ps", "List the machines.", examples="  fireclaw ps\n  fireclaw ps --json")
    parser.add_argument("--json", action="store_true", help="print JSON for programs")
    options = parser.parse_args(arguments)
    with request(Home.find(), "GET", "/v1/machines") as connection:
        machines = connection.read_json()["machines"]
    if options.json:
        print(json.dumps(machines, indent=2))
        return 0
    now = time.time()
    print_table(
        ["id", "name", "purpose", "image", "state", "memory", "vmm", "age"],
        [
            [
                machine["id"][:12],
                machine["name"] or "-",
                machine["purpose"],
                machine["image"],
                machine["state"],
                f"{machine['memory_mib']} MiB",
                f"{machine['vmm']}/{machine['accel']}",
                age(now - machine["created_at"]),
            ]
            for machine in machines
        ],
    )
    return 0


def prune(arguments: Sequence[str]) -> int:
    """Remove what dead machines and builds left behind."""
    parser = Parser(
        "prune",
        "Remove what nobody owns any more: processes, folders and records of dead machines, unfinished builds.",
        examples="  fireclaw prune",
    )
    parser.parse_args(arguments)
    with request(Home.find(), "POST", "/v1/prune") as connection:
        for name in connection.read_json()["removed"]:
            print(clean(name))
    return 0


def age(seconds: float) -> str:
    """Write a duration in its largest whole unit, e.g. ``3 min``."""
    size, unit = next((unit for unit in _UNITS if seconds >= unit[0]), _UNITS[-1])
    return f"{max(int(seconds), 0) // size} {unit}"
