"""Puts the fake programs into a folder, as an installation of the real ones would lie there."""

from __future__ import annotations

import sys
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
_PROGRAMS: Final = {"firecracker": "program", "jailer": "jailer"}


def install(folder: Path, script: Script | None = None) -> Path:
    """Write the executables ``firecracker`` and ``jailer``; installing again gives them another script.

    Args:
        folder: where; it is made if need be.
        script: what they do beside being faithful.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    package = Path(__file__).resolve().parents[3]
    for name, module in _PROGRAMS.items():
        text = _SHIM.format(
            python=sys.executable, path=[str(package)], module=module, script=(script or Script()).to_json()
        )
        path = folder / name
        path.unlink(missing_ok=True)  # a running one keeps its own
        path.write_text(text)
        path.chmod(0o755)
    return folder
