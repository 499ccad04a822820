"""The lab's results in the documentation: a JSON file, and the table made of it in docs/firecracker.md.

::

    PYTHONPATH=tools python -m lab.table .cache/lab/out/lab.json    # takes a run's results into both
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = _DOCS / "firecracker-lab.json"
PAGE = _DOCS / "firecracker.md"

_BEGIN, _END = "<!-- lab table -->\n", "<!-- end of lab table -->"
_BETWEEN = re.compile(f"(?<={re.escape(_BEGIN)}).*?(?={re.escape(_END)})", re.DOTALL)


def render(report: dict[str, Any]) -> str:
    """Return what stands between the markers.

    Args:
        report: a lab.json.
    """
    host, l1 = report["host"], report["l1"]
    where = f"{report['date']}, {report['seconds'] / 60:.0f} minutes on {host['cpus']} cores ({host['cpu']})"
    inside = f"L1 with {l1['cpus']} CPU, {l1['memory_mib']} MiB, Linux {l1['kernel']}"
    blocks = [f"{where}; {inside}.", "\n".join(_programs(report)), "\n".join(_jobs(report["jobs"]))]
    for job in report["jobs"]:
        blocks += ["\n".join(lines) for lines in (_failed(job), _not_run(job), _bench(job)) if lines]
    return "\n\n".join(blocks) + "\n"


def find(page: str) -> str:
    """Return what stands between the markers of a page.

    Raises:
        ValueError: it has no markers.
    """
    if found := _BETWEEN.search(page):
        return found[0]
    raise ValueError(f"the page has no {_BEGIN.strip()!r} with {_END!r} after it")


def put(page: str, table: str) -> str:
    """Return the page with the table between its markers.

    Raises:
        ValueError: it has no markers.
    """
    find(page)
    return _BETWEEN.sub(lambda _: table, page)


def main() -> None:
    """Take a run's results, or the kept ones, into the documentation."""
    report = json.loads((Path(sys.argv[1]) if sys.argv[1:] else RESULTS).read_bytes())
    page = put(PAGE.read_text(), render(report))
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    PAGE.write_text(page)


def _programs(report: dict[str, Any]) -> Iterator[str]:
    yield from ("| program | version | sha256 | |", "|---|---|---|---|")
    versions = report["l1"]["versions"]
    for program in report["programs"]:
        yield f"| `{program['name']}` | {versions[program['name']]} | `{program['sha256']}` | {program['note']} |"


def _jobs(jobs: list[dict[str, Any]]) -> Iterator[str]:
    yield from ("| job | result | passed | failed | not run | seconds |", "|---|---|---|---|---|---|")
    for job in jobs:
        tests = f"{job['passed']} | {len(job['failed'])} | {len(job['not_run'])}"
        yield f"| {job['name']} | {job['end']} | {tests} | {job['seconds']:.0f} |"


def _failed(job: dict[str, Any]) -> list[str]:
    lines = [f"- {_test(name)}: {_text(why)}" for name, why in job["failed"].items()]
    return [f"Failed in {job['name']}:", "", *lines] if lines else []


def _not_run(job: dict[str, Any]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, why in job["not_run"].items():
        reasons.setdefault(why, []).append(_test(name))
    lines = [f"- {_text(why)}: {', '.join(tests)}" for why, tests in reasons.items()]
    return [f"Not run in {job['name']}:", "", *lines] if lines else []


def _bench(job: dict[str, Any]) -> list[str]:
    rows = [f"| `{row['name']}` | {row['p50_ms']} | {row['p95_ms']} | {row['n']} |" for row in job["bench"]]
    return ["| row | p50 ms | p95 ms | n |", "|---|---|---|---|", *rows] if rows else []


def _test(name: str) -> str:
    return f"`{name.rpartition('::')[2]}`"


def _text(text: str) -> str:
    """Keep a line of a program's from being read as markup."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", text)


if __name__ == "__main__":
    main()
