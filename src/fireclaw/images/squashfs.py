"""Packing read-only root file systems: squashfs with lz4, the quickest to read under software CPU.

Equal inputs make equal bytes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fireclaw.images.tool import run

if TYPE_CHECKING:
    from pathlib import Path

_OPTIONS = ("-comp", "lz4", "-noappend", "-no-progress", "-quiet")


def pack_folder(folder: Path, target: Path) -> None:
    """Pack a folder; everything in it belongs to root and is dated 1970.

    Raises:
        SetupError: mksquashfs is missing or failed.
    """
    run(["mksquashfs", folder, target, *_OPTIONS, "-all-root", "-no-xattrs", "-mkfs-time", "0", "-all-time", "0"])


def pack_tar(archive: Path, target: Path, *, epoch: int) -> None:
    """Pack the contents of a tar, with its owners and times; nothing is extracted on the host.

    Args:
        archive: the tar.
        target: the squashfs to be made.
        epoch: no file is newer (seconds since 1970).

    Raises:
        SetupError: mksquashfs is missing, older than 4.5, or failed.
    """
    # The root folder does not come from the tar: left alone, everybody may write to it, and it belongs to
    # whoever runs mksquashfs (4.5 ignores -root-uid here).
    prefix = () if os.geteuid() == 0 else ("unshare", "--map-root-user")
    env = {"SOURCE_DATE_EPOCH": str(epoch)}
    run(["mksquashfs", "-", target, "-tar", *_OPTIONS, "-root-mode", "0755"], stdin=archive, env=env, prefix=prefix)
