"""Making a Debian image from a recipe, with mmdebstrap.

mmdebstrap installs the packages in a tree that it alone touches and hands back a tar; the tar goes straight into
squashfs. Keys, lists, host names and addresses of this host stay out.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import tarfile
from typing import TYPE_CHECKING

from fireclaw.errors import SetupError
from fireclaw.images import squashfs
from fireclaw.images.tool import remove_tree, root_room, watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from fireclaw.images.archive import Archive
    from fireclaw.images.recipe import Recipe

ROOT_FILE = "root.squashfs"

BUILDER_VERSION = 1
"""Part of the key: raise it when this module makes something else of the same recipe."""

_NAMESPACES = "in a container, start it privileged; on a host, let your user make user namespaces"

# A folder of ours under apt's downloads: what came before a kill is there for the next attempt.
_PREPARE = """\
set -eu
mkdir -p "$1/var/cache/apt/archives"
mount --bind {downloads} "$1/var/cache/apt/archives"
"""

# mmdebstrap copies the host's name and resolver into the tree, and our apt settings (which may name a proxy).
# An address in sources.list may carry a password.
_FINISH = """\
set -eu
umount "$1/var/cache/apt/archives"
chroot "$1" useradd --create-home --uid 1000 --shell /bin/bash {user}
cd "$1/etc"
rm -f apt/apt.conf.d/99mmdebstrap hostname resolv.conf machine-id
echo localhost > hostname
printf '127.0.0.1 localhost\\n::1 localhost\\n' > hosts
: > resolv.conf
: > machine-id
sed -i -E 's,//[^/@]*@,//,' apt/sources.list
"""


def build(
    recipe: Recipe, archive: Archive, folder: Path, downloads: Path, progress: Callable[[str], None]
) -> tuple[Path, dict[str, str]]:
    """Build the image of a recipe.

    Args:
        recipe: what to make.
        archive: where its packages come from.
        folder: an empty folder on the target's file system.
        downloads: where packages are kept from the first byte to the finished image.
        progress: told about each step.

    Returns:
        The folder with ``root.squashfs``, and the installed packages, name to version.

    Raises:
        SetupError: a program, a right or a mirror is missing, or mmdebstrap failed.
    """
    tar, out = folder / "root.tar", folder / "out"
    settings = folder / "apt.conf"
    # Without the second, apt calls it an error that a chroot has no terminals.
    settings.write_text(f'{archive.configuration()}Dpkg::Use-Pty "false";\n')

    def on_line(line: str) -> None:
        if line.startswith("E: "):
            # Ends it here and now: its own tidying would also empty our downloads.
            raise SetupError(f"mmdebstrap failed: {line.removeprefix('E: ')}", hint=archive.hint)
        if line.startswith("unshare: "):
            raise SetupError(f"mmdebstrap got no namespaces: {line}", hint=_NAMESPACES)
        if step := re.fullmatch(r"I: ((?:downloading|extracting|installing|creating) [^/]+)\.\.\.", line):
            progress(f"image {recipe.name}: {step[1]}")

    downloads.mkdir(parents=True, exist_ok=True)
    # Left alone, a killed mmdebstrap leaves mounts on the host and children that go on installing.
    watch(
        list(_mmdebstrap(recipe, settings, downloads, tar, archive.sources())),
        on_line,
        env={"TMPDIR": str(folder), "SOURCE_DATE_EPOCH": str(recipe.epoch)},
        prefix=root_room(),
    )
    remove_tree(downloads)
    out.mkdir()
    squashfs.pack_tar(tar, out / ROOT_FILE, epoch=recipe.epoch)
    return out, _installed(tar)


def key(recipe: Recipe) -> str:
    """Return what tells whether an image is of this recipe and this builder."""
    return hashlib.sha256(f"builder {BUILDER_VERSION}\n{recipe.digest}\n".encode()).hexdigest()


def _mmdebstrap(
    recipe: Recipe, settings: Path, downloads: Path, tar: Path, sources: Sequence[str]
) -> Iterator[str | Path]:
    yield from ("mmdebstrap", "--mode=root", f"--variant={recipe.variant}", "--format=tar")
    yield f"--include={','.join(recipe.packages)}"
    yield from (f"--dpkgopt=path-exclude={glob}" for glob in recipe.exclude)
    yield from (f"--dpkgopt=path-include={glob}" for glob in recipe.include)
    yield f"--aptopt={settings}"
    yield "--skip=essential/unlink"  # the downloads stay, see _PREPARE
    yield f"--setup-hook={_PREPARE.format(downloads=shlex.quote(str(downloads)))}"
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
