"""Puts the fake programs into a folder, as an installation of the real ones would lie there."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Final

from fireclaw.testing.firecracker.script import Script

# -I: nothing of the environment counts. -S: no site packages, which saves a third of the start.
_SHIM: Final = """\
#!{python} -IS
import sys
sys.path[:0] = {path!r}
from fireclaw.testing.firecracker.script import Script
from fireclaw.testing.firecracker.{module} import main
sys.exit(main(Script.from_json({script!r})))
"""
_PACKAGE: Final = Path(__file__).resolve().parents[3]
_NOBODY: Final = 65534
_PROGRAMS: Final = {"firecracker": "program", "jailer": "jailer"}


def install(folder: Path, script: Script | None = None) -> Path:
    """Write the executables ``firecracker`` and ``jailer``; installing again gives them another script.

    Args:
        folder: where; it is made if need be.
        script: what they do beside being faithful.

    Returns:
        The folder.
    """
    script = script or Script()
    if not runs_for_others():
        script = replace(script, keep_user=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, module in _PROGRAMS.items():
        text = _SHIM.format(python=sys.executable, path=[str(_PACKAGE)], module=module, script=script.to_json())
        path = folder / name
        path.unlink(missing_ok=True)  # a running one keeps its own
        path.write_text(text)
        path.chmod(0o755)
    return folder


@cache
def runs_for_others() -> bool:
    """Whether users other than root can run this interpreter with this package; where it is root's own, none can.

    Without that the fake jailer keeps its user.
    """
    if os.geteuid() != 0:
        return True
    code = f"import sys; sys.path[:0] = [{str(_PACKAGE)!r}]; import {__name__}"
    try:
        subprocess.run(
            [sys.executable, "-IS", "-c", code], user=_NOBODY, group=_NOBODY, cwd="/", capture_output=True, check=True
        )
    except (PermissionError, subprocess.CalledProcessError):
        return False
    return True
