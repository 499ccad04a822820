"""What people install: the wheel, in an empty environment of its own, used far from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fireclaw import __version__
from fireclaw.images import runtime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from conftest import Cli

pytestmark = pytest.mark.timeout(300)

_CHECKOUT = Path(__file__).resolve().parents[2]
_PACKAGE = _CHECKOUT / "src/fireclaw"


@dataclass(frozen=True)
class Installation:
    """Fireclaw as a user has it.

    Attributes:
        bin: the environment's folder of programs.
        elsewhere: a working directory that has nothing to do with the checkout.
    """

    bin: Path
    elsewhere: Path

    def __call__(self, *command: str, home: Path | None = None) -> str:
        """Run a program of the environment to its end, and return what it wrote to stdout."""
        return _run([str(self.bin / command[0]), *command[1:]], cwd=self.elsewhere, home=home)


def _run(argv: Sequence[str], *, cwd: Path, home: Path | None = None) -> str:
    # Nothing of the test run's own Python may help: no variable of it, and no module in its working directory.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    if home is not None:
        env |= {"FIRECLAW_HOME": str(home), "FIRECLAW_IRC_PORT": "0", "OLLAMA_HOST": "127.0.0.1:9"}
    done = subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, as ``pip install .`` would build it."""
    folder = tmp_path_factory.mktemp("wheel")
    _run([sys.executable, "-P", "-m", "build", "--wheel", "--outdir", str(folder), str(_CHECKOUT)], cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The wheel and what it asks for, in an environment that was empty before."""
    folder = tmp_path_factory.mktemp("installed")
    _run([sys.executable, "-m", "venv", str(folder / "venv")], cwd=folder)
    installation = Installation(folder / "venv/bin", folder)
    installation("python", "-m", "pip", "install", "--quiet", str(wheel))
    return installation


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    """Every file of the package is in the wheel, data included, and no cache, test or document is."""
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = (path for path in _PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    source = {f"fireclaw/{path.relative_to(_PACKAGE).as_posix()}" for path in files}
    assert packed == source
    assert {f"fireclaw/data/{name}" for name in ("models.toml", "images/debian.toml", "templates/worker.md")} <= packed


def test_the_installed_command_works(installed: Installation) -> None:
    """The command is on the environment's path, and knows its version and its verbs."""
    assert installed("fireclaw", "--version") == f"fireclaw {__version__}\n"
    assert "run a command in a machine of its own" in installed("fireclaw", "--help")


def test_the_installed_package_finds_its_data(installed: Installation) -> None:
    """Templates, catalogue, recipes and guestd's sources are found where the wheel has put them, and are the same."""
    script = (
        "from fireclaw.agents.templates import Templates\n"
        "from fireclaw.images import host, recipe, runtime\n"
        "from fireclaw.llm import catalogue\n"
        "print(runtime.__file__)\n"
        "print(runtime.key([], runtime.guest_sources()))\n"
        "print([each.name for each in Templates.load().all()], recipe.names(), bool(host.system_packages()))\n"
        "print(catalogue.find('qwen2.5-coder-0.5b').template != '')\n"
    )
    place, key, *found = installed("python", "-c", script).splitlines()
    assert Path(place).is_relative_to(installed.bin.parent)
    assert key == runtime.key([], runtime.guest_sources())
    assert found == ["['coder', 'creative', 'quick', 'researcher', 'worker'] ['debian'] True", "True"]


def test_the_installed_command_runs_a_machine(installed: Installation, cli: Cli) -> None:
    """A command runs in a machine of the installed Fireclaw, whose daemon is the environment's, not the checkout's."""
    assert installed("fireclaw", "run", "--", "echo", "hi", home=cli.home.data) == "hi\n"
    command = Path(f"/proc/{cli.daemon_pid}/cmdline").read_bytes().split(b"\0")
    assert Path(os.fsdecode(command[0])).parent == installed.bin
