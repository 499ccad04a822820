"""Where a fake Firecracker writes: its journal, its metrics, and the guest's serial line.

All three may be files or FIFOs. They are opened for reading and writing, created where missing, never truncated, and
never waited for: what a full FIFO does not take is lost and counted.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from typing import Final

_STDOUT: Final = 1
_SEVERITY: Final = {"off": 0, "error": 1, "warn": 2, "warning": 2, "info": 3, "debug": 4, "trace": 5}


def open_sink(path: str) -> int:
    """Open a file or FIFO to write to.

    Raises:
        OSError: it cannot be opened.
    """
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)


def write(fd: int, data: bytes) -> bool:
    """Write what fits; return whether all of it did. A signal for a broken pipe does not come: Python ignores it."""
    try:
        return os.write(fd, data) == len(data)
    except OSError:
        return False


@dataclass
class Journal:
    """The log: stdout until it has a path.

    Attributes:
        name: the instance's id.
        fd: where lines go.
        level: the least important kind of line that is written.
        show_level: lines say which kind they are.
        missed: lines that were lost.
    """

    name: str = "anonymous-instance"
    fd: int = _STDOUT
    level: str = "info"
    show_level: bool = False
    missed: int = 0

    def update(self, *, path: str | None, level: str | None, show_level: bool | None) -> None:
        """Change what is given.

        Raises:
            OSError: the path cannot be opened.
        """
        if path is not None:
            self.fd = open_sink(path)
        self.level = level or self.level
        self.show_level = self.show_level if show_level is None else show_level

    def error(self, text: str, thread: str = "main") -> None:
        """Write a line about what failed."""
        self._write("error", text, thread)

    def warn(self, text: str, thread: str = "main") -> None:
        """Write a line about what is odd."""
        self._write("warn", text, thread)

    def info(self, text: str, thread: str = "main") -> None:
        """Write a line about what happened."""
        self._write("info", text, thread)

    def debug(self, text: str, thread: str = "main") -> None:
        """Write a line that only developers want."""
        self._write("debug", text, thread)

    def _write(self, level: str, text: str, thread: str) -> None:
        if _SEVERITY[level] > _SEVERITY[self.level]:
            return
        now = time.time_ns()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now // 10**9))
        shown = f":{level.upper()}" if self.show_level else ""
        line = f"{stamp}.{now % 10**9:09} [{self.name}:{thread}{shown}] {text}\n"
        if not write(self.fd, line.encode()):
            self.missed += 1


@dataclass
class Metrics:
    """Counters, written as differences since the last time, one JSON line a flush.

    Attributes:
        fd: where lines go; -1 before there is a path, when nothing is written.
        cut: the last line of all is not written to its end.
        counts: what happened since the last flush, by group and name.
    """

    fd: int = -1
    cut: bool = False
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def count(self, group: str, name: str, amount: int = 1) -> None:
        """Count something."""
        names = self.counts.setdefault(group, {})
        names[name] = names.get(name, 0) + amount

    def store(self, group: str, name: str, value: int) -> None:
        """Keep a value, which stays what it is until the next one."""
        self.counts.setdefault(group, {})[name] = value

    def flush(self) -> None:
        """Write a line, and begin again from zero."""
        if self.fd >= 0:
            write(self.fd, self._take())

    def close(self) -> None:
        """Write the last line."""
        if self.fd >= 0:
            line = self._take()
            write(self.fd, line[: len(line) // 2] if self.cut else line)

    def _take(self) -> bytes:
        line: dict[str, object] = {"utc_timestamp_ms": time.time_ns() // 10**6}
        for group in {**_KEYS_AT_REST, **self.counts}:
            line[group] = _KEYS_AT_REST.get(group, {}) | self.counts.get(group, {})
        self.counts = {group: names for group, names in self.counts.items() if group in _STORED}
        return json.dumps(line, separators=(",", ":")).encode() + b"\n"


# Groups whose values are no counters.
_STORED: Final = frozenset({"latencies_us"})
# The groups and counters that clients read; the original has some hundred more.
_KEYS_AT_REST: Final[dict[str, dict[str, int]]] = {
    "api_server": dict.fromkeys(("process_startup_time_us", "process_startup_time_cpu_us"), 0),
    "deprecated_api": {"deprecated_http_api_calls": 0},
    "latencies_us": dict.fromkeys(
        ("full_create_snapshot", "diff_create_snapshot", "load_snapshot", "pause_vm", "resume_vm"), 0
    ),
    "logger": {"missed_log_count": 0},
    "uart": {"missed_write_count": 0},
    "vsock": dict.fromkeys(("conns_added", "conns_killed", "conns_removed", "rx_bytes_count", "tx_bytes_count"), 0),
}
