"""The pinned release of Firecracker, and the programs of it that are installed here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fireclaw.errors import SetupError

OLDEST: Final = (1, 14, 0)
"""The oldest that has all we send: ``/serial`` came with it (firecracker CHANGELOG)."""

INSTALL: Final = "fireclaw setup --vmm firecracker"
MISSING: Final = "Firecracker is not installed"
PROGRAM: Final = "firecracker"
JAILER: Final = "jailer"
_VERSION: Final = re.compile(r"\bv(\d+)\.(\d+)\.(\d+)")

Version = tuple[int, int, int]
_ANSWER_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Release:
    """What upstream published.

    Attributes:
        version: of all programs in it.
        url: where its archive is.
        sha256: of the archive.
    """

    version: Version
    url: str
    sha256: str


RELEASE: Final = Release(
    version=(1, 16, 1),
    url="https://github.com/firecracker-microvm/firecracker/releases/download/v1.16.1/firecracker-v1.16.1-x86_64.tgz",
    # Upstream publishes it beside the archive. Ten projects that do not know each other pin the same value, among
    # them nya-a-cat/ferrobox (scripts/fetch-firecracker.sh) and canter0/canter (blackbox-firecracker-mysql/render.go).
    sha256="382a02a869e4d6d5cb14c40577f9545e8458021ea8b0b2d3fc10ec14d9c242e6",
)
"""What is installed."""

VERSION: Final = RELEASE.version


@dataclass(frozen=True, slots=True)
class Programs:
    """Firecracker's programs.

    Attributes:
        firecracker: the VMM itself.
        jailer: what shuts it in; None where there is none, which is all right where we are not root.
        version: of the VMM.
    """

    firecracker: Path
    jailer: Path | None
    version: Version


def folder(vmms: Path) -> Path:
    """Where the pinned release is installed."""
    return vmms / f"firecracker-v{dotted(VERSION)}"


def dotted(version: Version) -> str:
    """A version as people write it."""
    return ".".join(map(str, version))


def find(vmms: Path) -> Programs:
    """Find the programs: the installed release, then those on PATH.

    Raises:
        SetupError: there is none, it does not answer, or its version will not do.
    """
    place = folder(vmms)
    found = place / PROGRAM if (place / PROGRAM).exists() else shutil.which(PROGRAM)
    if found is None:
        raise SetupError(MISSING, hint=INSTALL)
    program = Path(found).resolve()
    version = ask_version(program)
    if not OLDEST <= version < (2, 0, 0):
        raise SetupError(
            f"{program} is version {dotted(version)}; Fireclaw works with {dotted(OLDEST)} and newer, below 2.0",
            hint=f"install {dotted(VERSION)}: {INSTALL}",
        )
    jailer = Path(found).parent / JAILER
    if os.geteuid() == 0 and not jailer.exists():
        raise SetupError(f"{jailer} is missing: as root Firecracker runs in a jail only", hint=INSTALL)
    if os.geteuid() == 0 and (other := ask_version(jailer)) != version:
        raise SetupError(f"{jailer} is version {dotted(other)}, {program} {dotted(version)}", hint=INSTALL)
    return Programs(program, jailer.resolve() if jailer.exists() else None, version)


def ask_version(program: Path, called: str = "") -> Version:
    """Run ``program --version``.

    Args:
        program: its file.
        called: what people know it by, if not by its path.

    Raises:
        SetupError: it cannot be run, or says no version.
    """
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, timeout=_ANSWER_S, check=False, cwd="/"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no answer within {_ANSWER_S:g} s"
        raise SetupError(f"{called or program} cannot be run: {reason}", hint=INSTALL) from error
    try:
        return parse(done.stdout)
    except ValueError:
        said = (done.stdout + done.stderr).strip()[:200]
        raise SetupError(f"{called or program} --version names no version but says {said!r}", hint=INSTALL) from None


def parse(text: str) -> Version:
    """Read the first version in a text, such as ``v1.16.1``.

    Raises:
        ValueError: there is none.
    """
    match = _VERSION.search(text)
    if match is None:
        raise ValueError(text)
    major, minor, patch = map(int, match.groups())
    return major, minor, patch
