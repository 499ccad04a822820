"""What the host must have installed, from ``data/system-packages.txt``."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Debian keeps daemons and mkfs out of a person's PATH.
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"


@dataclass(frozen=True)
class SystemPackage:
    """A Debian package of the host.

    Attributes:
        name: the package.
        probe: a command on PATH or an absolute path; the package is there when it exists.
        when: ``host``, ``person`` (not needed by root), or what of a checkout needs it.
        why: what Fireclaw does with it, for people.
    """

    name: str
    probe: str
    when: str
    why: str

    @property
    def present(self) -> bool:
        """Whether the host has it."""
        return has_program(self.probe)


def system_packages() -> list[SystemPackage]:
    """Return the whole list."""
    text = (files("fireclaw") / "data" / "system-packages.txt").read_text("utf-8")
    rows = (line.split(maxsplit=3) for line in text.splitlines() if line and not line.startswith("#"))
    return [SystemPackage(*row) for row in rows]


def missing_packages() -> list[SystemPackage]:
    """Return what this host lacks for this user."""
    wanted = {"host"} if os.geteuid() == 0 else {"host", "person"}
    return [package for package in system_packages() if package.when in wanted and not package.present]


def install_command(packages: Iterable[SystemPackage]) -> str:
    """Return the shell command that installs ``packages``."""
    sudo: Sequence[str] = () if os.geteuid() == 0 else ("sudo",)
    names = (package.name for package in packages)
    return " ".join([*sudo, "apt-get install -y --no-install-recommends", *names])


def install_hint(probe: str) -> str:
    """Return the next step for someone whose host lacks ``probe``, or an empty string."""
    packages = [package for package in system_packages() if package.probe == probe]
    return f"run: {install_command(packages)}" if packages else ""


def has_program(probe: str, *, path: str | None = None) -> bool:
    """Whether ``probe``, a command or an absolute path, exists.

    Args:
        probe: what to look for.
        path: where to look for commands; the caller's PATH and the system folders otherwise.
    """
    if probe.startswith("/"):
        return Path(probe).exists()
    return shutil.which(probe, path=path or f"{os.environ.get('PATH', os.defpath)}:{_SBIN}") is not None
