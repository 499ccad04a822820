"""The payload: the drive that brings into L1 what is to be tested, made anew for each run.

It is L1's only writable disk, too, so it is a sparse ext4 of some gigabytes::

    /lab/checkout       what git tracks, or would track
    /lab/libraries      what the tests import
    /lab/firecracker    the programs given by --firecracker
    /lab/home           the runtime and the images that the tests share
    /lab/jobs.json      what to run
    /lab/tmp            TMPDIR: on the same file system as the images, for hard links
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fireclaw.errors import SetupError
from fireclaw.images.tool import run
from lab import programs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lab.jobs import Job
_SIZE = "12G"
_PYTHON = "3.11"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

# Heavy, and imported by no test that runs in L1.
_LEFT_OUT = ("build", "gguf", "mypy", "numpy", "ruff", "xllamacpp")

# Run by the copy of the checkout, so that the runtime has the copy's guestd whatever happens to the original.
_BUILD_IMAGES = """\
import images_home
runtime, image = images_home.built()
home = images_home.shared_home().data
for path in (runtime.root.parent, home / "runtimes/packages.json", image.root.parent, home / "images/names.json"):
    print(path.relative_to(home))
"""


def build(
    checkout: Path,
    cache: Path,
    folder: Path,
    *,
    firecracker: Path,
    jobs: Sequence[Job],
    progress: Callable[[str], None],
) -> Path:
    """Make the drive.

    Args:
        checkout: the repository's root.
        cache: a folder for what is kept between runs.
        folder: an empty folder for the drive.
        firecracker: a folder with ``firecracker`` and ``jailer``.
        jobs: what L1 shall do.
        progress: told about each step.

    Returns:
        The drive, a sparse file.

    Raises:
        SetupError: a program is missing here or in ``firecracker``, or something failed.
    """
    tree, drive = folder / "tree", folder / "payload.ext4"
    libraries = _libraries(checkout, cache, progress)
    progress("payload: copying the checkout")
    _copy_checkout(checkout, tree / "checkout")
    shutil.copytree(libraries, tree / "libraries")
    (tree / "firecracker").mkdir()
    for name in programs.NAMES:
        shutil.copy(firecracker / name, tree / "firecracker" / name)
    home = Path(os.environ.get("FIRECLAW_TEST_HOME") or checkout / ".cache/test-home")
    _copy_images(tree / "checkout", home.absolute(), tree / "home", progress)
    (tree / "tmp").mkdir(mode=0o1777)
    (tree / "tmp").chmod(0o1777)
    (tree / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs], indent=1))
    progress("payload: compiling")
    _compile(tree)
    progress("payload: making the drive")
    # No journal and lazy tables: the drive lives for one run.
    options = ("-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=1,root_owner=0:0", "-d", tree)
    room = () if os.geteuid() == 0 else ("unshare", "--map-root-user")
    run(["mkfs.ext4", *options, drive, _SIZE], prefix=room)
    shutil.rmtree(tree)
    return drive


def _libraries(checkout: Path, cache: Path, progress: Callable[[str], None]) -> Path:
    """Install what the tests import for L1's Python, once per list."""
    project = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    listed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    wanted = [line for line in listed if not line.startswith(_LEFT_OUT)]
    key = hashlib.sha256(f"{_PYTHON} {_PLATFORMS} {wanted}".encode()).hexdigest()[:16]
    target = cache / f"libraries-{key}"
    if not target.exists():
        progress("payload: installing the Python libraries")
        for old in cache.glob("libraries-*"):
            shutil.rmtree(old)
        unfinished = cache / "libraries-unfinished"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        where = ["--target", str(unfinished), "--python-version", _PYTHON, "--only-binary=:all:"]
        platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
        done = subprocess.run([*pip, *where, *platforms, *wanted], stdout=sys.stderr, check=False)
        if done.returncode != 0:
            raise SetupError(f"pip could not install the lab's libraries (status {done.returncode})")
        unfinished.rename(target)
    return target


def _copy_checkout(checkout: Path, target: Path) -> None:
    listing = ["git", "-C", str(checkout), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, capture_output=True, check=True).stdout.split(b"\0")
    for name in sorted({os.fsdecode(name) for name in names if name}):
        source, copy = checkout / name, target / name
        if source.is_file() or source.is_symlink():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)


def _copy_images(copied: Path, home: Path, target: Path, progress: Callable[[str], None]) -> None:
    """Build the runtime and the images where they are missing, and copy them: L1 has no network."""
    progress("payload: looking for runtime and images")
    env = {
        **os.environ,
        "FIRECLAW_TEST_HOME": str(home),
        "PYTHONPATH": f"{copied / 'src'}:{copied / 'tests/contract'}",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    argv = [sys.executable, "-c", _BUILD_IMAGES]
    done = subprocess.run(argv, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise SetupError(f"the runtime and the images could not be built (status {done.returncode})")
    for line in done.stdout.splitlines():
        source = home / line
        if source.is_dir():
            shutil.copytree(source, target / line)
        elif source.is_file():
            (target / line).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / line)
        else:
            progress(line)


def _compile(tree: Path) -> None:
    """Compile for L1's Python, if ours is of that version: L1 takes half a minute for what takes us seconds.

    "unchecked-hash": L1 trusts the bytecode without a look at the sources. Test modules are compiled by pytest, when
    it collects them; whether they can be collected is for L1 to tell.
    """
    if sys.version_info[:2] != tuple(int(part) for part in _PYTHON.split(".")):
        return
    checkout, libraries = tree / "checkout", tree / "libraries"
    sources = [checkout / "src", checkout / "tools"]
    env = {**os.environ, "PYTHONPATH": ":".join(map(str, [*sources, libraries])), "PYTHONDONTWRITEBYTECODE": ""}
    options = ["-q", "-j", "0", "--invalidation-mode", "unchecked-hash", "-s", str(tree), "-p", "/lab"]
    for argv in (
        ["compileall", *options, *map(str, sources), str(libraries)],
        ["pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests"],
    ):
        subprocess.run([sys.executable, "-m", *argv], cwd=checkout, env=env, stdout=subprocess.DEVNULL, check=False)
