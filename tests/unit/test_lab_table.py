"""The lab's table in the documentation."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lab import table

_REPORT: dict[str, Any] = {
    "date": "2026-11-24",
    "seconds": 1200,
    "host": {"cpu": "Some CPU", "cpus": 2},
    "l1": {"cpus": 1, "memory_mib": 4096, "kernel": "6.1.0", "versions": {"firecracker": "Firecracker v1.16.1"}},
    "programs": [{"name": "firecracker", "sha256": "ab" * 32, "note": "without a filter"}],
    "jobs": [
        {
            "name": "firecracker",
            "end": "failed with status 1",
            "seconds": 61.7,
            "passed": 7,
            "failed": {"tests.test_vm::test_bad[x]": "assert a | b"},
            "not_run": {"tests.test_vm::test_a": "needs *x*", "tests.test_vm::test_b": "needs *x*"},
            "left": [],
            "bench": [{"name": "floor", "p50_ms": 1.5, "p95_ms": 2.5, "n": 3}],
        }
    ],
}


def test_the_table_tells_what_ran_what_not_and_why() -> None:
    """Programs with digests, counts by job, failures, reasons once with their tests, and bench rows."""
    lines = table.render(_REPORT).splitlines()
    assert f"| `firecracker` | Firecracker v1.16.1 | `{'ab' * 32}` | without a filter |" in lines
    assert "| firecracker | failed with status 1 | 7 | 1 | 2 | 62 |" in lines
    assert "- `test_bad[x]`: assert a \\| b" in lines
    assert "- needs \\*x\\*: `test_a`, `test_b`" in lines
    assert "| `floor` | 1.5 | 2.5 | 3 |" in lines


def test_only_what_stands_between_the_markers_is_replaced() -> None:
    """Putting a table twice is putting it once, whatever it holds."""
    page = "before\n<!-- lab table -->\nold\n<!-- end of lab table -->\nafter\n"
    once = table.put(page, "new \\1\n")
    assert once == "before\n<!-- lab table -->\nnew \\1\n<!-- end of lab table -->\nafter\n"
    assert table.put(once, "new \\1\n") == once
    assert table.find(once) == "new \\1\n"


def test_a_page_without_markers_is_refused() -> None:
    """A table with no place is an error."""
    with pytest.raises(ValueError, match="lab table"):
        table.put("nothing here\n", "new\n")


def test_the_page_holds_the_table_of_the_kept_results() -> None:
    """docs/firecracker.md shows what docs/firecracker-lab.json says, and nothing as long as there is none."""
    kept = table.render(json.loads(table.RESULTS.read_bytes())) if table.RESULTS.exists() else ""
    assert table.find(table.PAGE.read_text()) == kept
