"""What of the VMM contract was run on which implementation, and what was not, and why: for tests/conftest.py."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from vm_subjects import Subject

_subjects: dict[str, str] = {}  # by node id


def register_marker(config: pytest.Config) -> None:
    """Make the mark ``needs`` known."""
    config.addinivalue_line("markers", "needs(*what): what a rule of the VMM contract needs of its subject")


def mark_unmet(items: Iterable[pytest.Item]) -> None:
    """Have rules not run on subjects that lack what they need."""
    for item in items:
        if (subject := _subject_of(item)) is None:
            continue
        _subjects[item.nodeid] = subject.name
        wanted = tuple(need for mark in item.iter_markers("needs") for need in mark.args)
        if reason := subject.why_not(wanted):
            item.add_marker(pytest.mark.skip(reason=f"{subject.name}: {reason}"))


def _subject_of(item: pytest.Item) -> Subject | None:
    call = getattr(item, "callspec", None)  # only of a test with parameters
    subject: Subject | None = None if call is None else call.params.get("subject")
    return subject


def report_lines(stats: Mapping[str, Iterable[object]]) -> Iterator[str]:
    """Say for each subject how many rules were run, and for each reason how many were not."""
    ran: Counter[str] = Counter()
    not_run: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for outcome, reports in stats.items():
        for report in reports:
            if not isinstance(report, pytest.TestReport) or (name := _subjects.get(report.nodeid)) is None:
                continue
            if outcome == "skipped":
                assert isinstance(report.longrepr, tuple)
                not_run[name][report.longrepr[2].partition(": ")[2].removeprefix(f"{name}: ")] += 1
            elif report.when == "call" or (report.when == "setup" and outcome == "error"):
                ran[name] += 1
    for name in sorted({*ran, *not_run}):
        yield f"VMM contract, {name}: {ran[name]} rules run"
        for reason, count in not_run[name].most_common():
            yield f"    {count} not run: {reason}"
