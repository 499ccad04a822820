"""Descriptors of this process: which are open, and how to run out of them."""

from __future__ import annotations

import resource
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def descriptors() -> set[int]:
    """The descriptors that this process has open; one is this look's own."""
    return {int(entry.name) for entry in Path("/proc/self/fd").iterdir()}


@contextmanager
def few_descriptors(more: int) -> Iterator[None]:
    """Let this process open only so many descriptors more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = descriptors()
    free = [fd for fd in range(len(used) + more + 1) if fd not in used]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[more], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
