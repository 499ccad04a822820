"""The report of the VMM contract: what was not run does not read as passed."""

from __future__ import annotations

from typing import Literal

import pytest
import vm_report
from vm_report import report_lines
from vm_subjects import Control, Need, Subject, doom_by_cmdline

from fireclaw.vmm.base import Accel


def a_subject(**more: object) -> Subject:
    """A subject of which only what it lacks matters."""
    return Subject(
        name="one",
        make=lambda lab: lab.vmm,
        doom=doom_by_cmdline,
        control=Control(object, "send"),
        accel=Accel.TCG,
        **more,  # type: ignore[arg-type]  # fields of it
    )


def test_a_rule_is_run_where_nothing_is_missing() -> None:
    """What a subject lacks keeps it from those rules only that need it, and the first thing missing is the reason."""
    subject = a_subject(lacks={Need.JAIL: "it has no walls", Need.CGROUP: "it has no limits"})
    assert subject.why_not(()) == ""
    assert subject.why_not((Need.KERNEL,)) == ""
    assert subject.why_not((Need.KERNEL, Need.JAIL, Need.CGROUP)) == "it needs a jail around the VMM: it has no walls"


def test_what_is_not_there_runs_nothing() -> None:
    """A subject that cannot be tried here says why, whatever a rule needs."""
    subject = a_subject(unavailable="it is not installed")
    assert subject.why_not(()) == subject.why_not((Need.JAIL,)) == "it is not installed"


def a_report(
    node: str,
    when: Literal["setup", "call", "teardown"] = "call",
    outcome: Literal["passed", "failed", "skipped"] = "passed",
    reason: str = "",
) -> pytest.TestReport:
    """What pytest says about a test."""
    where = ("vm_rules.py", 1, f"Skipped: {reason}")
    longrepr = where if outcome == "skipped" else None
    return pytest.TestReport(node, ("", 0, ""), {}, outcome, longrepr, when)


def test_rules_are_counted_by_subject_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures count as run, errors once, tests of other things not at all; each reason has its number."""
    nodes = {"a": "one", "b": "one", "c": "one", "d": "one", "e": "two"}
    monkeypatch.setattr(vm_report, "_subjects", nodes)
    stats = {
        "passed": [a_report("a"), a_report("another")],
        "failed": [a_report("b", outcome="failed")],
        "error": [a_report("b", "teardown", "failed")],
        "skipped": [
            a_report("c", "setup", "skipped", "one: no walls"),
            a_report("d", "setup", "skipped", "one: no walls"),
            a_report("e", "setup", "skipped", "two: not here"),
        ],
        "": [a_report("a", "setup")],
    }
    assert list(report_lines(stats)) == [
        "VMM contract, one: 2 rules run",
        "    2 not run: no walls",
        "VMM contract, two: 0 rules run",
        "    1 not run: not here",
    ]


def test_without_rules_there_is_no_report() -> None:
    """A run of something else says nothing of it."""
    assert list(report_lines({"passed": [a_report("another")]})) == []
