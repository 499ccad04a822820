"""What runs in L1: the list in ``jobs.toml``, or one thing that somebody asks for."""

from __future__ import annotations

import shlex
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fireclaw.errors import NotFoundError
from lab.inside import LAST_WORDS_S

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_LIST = Path(__file__).with_name("jobs.toml")
_ASKED_LIMIT = 1200
BOOT_S = 30.0
# The tests' own limit is for a machine, not for a machine within a software CPU.
_PYTEST = 'python3 -m pytest -v -p no:cacheprovider --timeout=400 --junit-xml="$LAB_OUT/junit.xml"'


@dataclass(frozen=True)
class Job:
    """One command in L1, run by bash as root in the copy of the checkout.

    Attributes:
        name: what its folder in the results is called.
        command: the command; ``$LAB_OUT`` is that folder.
        limit: seconds, after which it is interrupted and, ``LAST_WORDS_S`` later, killed.
        env: more environment.
        extra: whether it runs only when it is asked for.
    """

    name: str
    command: str
    limit: int
    env: Mapping[str, str] = field(default_factory=dict)
    extra: bool = False


def load() -> list[Job]:
    """Return the whole list, in order."""
    return [_job(**row) for row in tomllib.loads(_LIST.read_text())["job"]]


def find(name: str) -> Job:
    """Return one job of the list.

    Raises:
        NotFoundError: there is none of that name.
    """
    known = {job.name: job for job in load()}
    if name not in known:
        raise NotFoundError.named("job", name, known)
    return known[name]


def asked(*, command: str = "", pytest: Sequence[str] = ()) -> Job:
    """Return a job that is not in the list: a shell command, or pytest with these arguments."""
    if command:
        return Job("command", command, _ASKED_LIMIT)
    return Job("pytest", f"{_PYTEST} {shlex.join(pytest)}", _ASKED_LIMIT)


def longest(chosen: Sequence[Job]) -> float:
    """Return the seconds that L1 may take for these jobs, if each runs into its limit."""
    return BOOT_S + sum(job.limit + LAST_WORDS_S for job in chosen)


def _job(*, pytest: str = "", command: str = "", **rest: Any) -> Job:
    return Job(command=command or f"{_PYTEST} {pytest}", **rest)
