"""Making a Debian image from a recipe, with mmdebstrap.

mmdebstrap installs the packages in a tree that it alone touches and hands back a tar; the tar goes straight into
squashfs. Keys, lists, host names and addresses of this host stay out.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from typing import TYPE_CHECKING

from fireclaw.images import squashfs
from fireclaw.images.tool import root_room, watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from fireclaw.images.archive import Archive
    from fireclaw.images.recipe import Recipe

ROOT_FILE = "root.squashfs"

BUILDER_VERSION = 1
"""Part of the key: raise it when this module makes something else of the same recipe."""

# mmdebstrap copies the host's name and resolver into the tree, and our apt settings (which may name a proxy).
# An address in sources.list may carry a password.
_FINISH = """\
set -eu
chroot "$1" useradd --create-home --uid 1000 --shell /bin/bash {user}
cd "$1/etc"
rm -f apt/apt.conf.d/99mmdebstrap hostname resolv.conf machine-id
echo localhost > hostname
printf '127.0.0.1 localhost\n::1 localhost\n' > hosts
: > resolv.conf
: > machine-id
sed -i -E 's,//[^/@]*@,//,' apt/sources.list
"""


def build(
    recipe: Recipe, archive: Archive, folder: Path, progress: Callable[[str], None]
) -> tuple[Path, dict[str, str]]:
    """Build the image of a recipe.

    Args:
        recipe: what to make.
        archive: where its packages come from.
        folder: an empty folder on the target's file system.
        progress: told about each step.

    Returns:
        The folder with ``root.squashfs``, and the installed packages, name to version.

    Raises:
        SetupError: a program, a right or a mirror is missing, or mmdebstrap failed.
    """
    tar, out = folder / "root.tar", folder / "out"
    settings = folder / "apt.conf"
    settings.write_text(archive.configuration())

    def on_line(line: str) -> None:
        if step := re.fullmatch(r"I: ([^/]+)\.\.\.", line):
            progress(f"image {recipe.name}: {step[1]}")

    # Left alone, a killed mmdebstrap leaves mounts on the host and children that go on installing.
    watch(
        list(_mmdebstrap(recipe, settings, tar, archive.sources())),
        on_line,
        env={"TMPDIR": str(folder), "SOURCE_DATE_EPOCH": str(recipe.epoch)},
        prefix=root_room(),
    )
    out.mkdir()
    squashfs.pack_tar(tar, out / ROOT_FILE, epoch=recipe.epoch)
    return out, _installed(tar)


def key(recipe: Recipe) -> str:
    """Return what tells whether an image is of this recipe and this builder."""
    return hashlib.sha256(f"builder {BUILDER_VERSION}\n{recipe.digest}\n".encode()).hexdigest()


def _mmdebstrap(recipe: Recipe, settings: Path, tar: Path, sources: Sequence[str]) -> Iterator[str | Path]:
    yield from ("mmdebstrap", "--mode=root", f"--variant={recipe.variant}", "--format=tar")
    yield f"--include={','.join(recipe.packages)}"
    yield from (f"--dpkgopt=path-exclude={glob}" for glob in recipe.exclude)
    yield from (f"--dpkgopt=path-include={glob}" for glob in recipe.include)
    yield f"--aptopt={settings}"
    yield "--hook-dir=/usr/share/mmdebstrap/hooks/maybe-merged-usr"  # else usrmerge brings 50 MB of perl
    yield f"--customize-hook={_FINISH.format(user=recipe.user)}"
    yield recipe.suite
    yield tar
    yield from sources


def _installed(tar: Path) -> dict[str, str]:
    """Read the installed packages from dpkg's own record in the tar."""
    with tarfile.open(tar) as archive:
        record = archive.extractfile("./var/lib/dpkg/status")
        assert record is not None
        status = record.read().decode()
    return dict(re.findall(r"^Package: (\S+)$.*?^Version: (\S+)$", status, re.MULTILINE | re.DOTALL))
