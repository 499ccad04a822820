"""L1's kernel, initrd and root file system, made of Debian packages once and kept on a shelf.

The kernel is Debian's generic one: it has KVM (the cloud flavour has none for AMD) and VMGENID. The root is a
squashfs that L1 mounts under an overlay in memory, so it stays as it was built.
"""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fireclaw.images import debian, modules
from fireclaw.images.archive import Archive
from fireclaw.images.cpio import CpioWriter
from fireclaw.images.host import system_packages
from fireclaw.images.recipe import Recipe
from fireclaw.images.shelf import FileRecord, Manifest, Shelf

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_SUITE = "bookworm"
_KINDS = {"host", "test", "bench"}
_KERNEL = "linux-image-amd64"
_TOOLS = ("busybox-static", "e2fsprogs", "iproute2", "kmod", "procps", "python3", "strace")

# Documentation, and drivers of hardware that L1 does not have: a third of the bytes.
_EXCLUDE = (
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/lib/modules/*/kernel/drivers/gpu/*",
    "/lib/modules/*/kernel/drivers/media/*",
    "/lib/modules/*/kernel/drivers/net/ethernet/*",
    "/lib/modules/*/kernel/drivers/net/wireless/*",
    "/lib/modules/*/kernel/sound/*",
)

_MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_console"),
    *("squashfs", "overlay", "crc32c_generic", "ext4"),  # ext4 asks for crc32c by name: no dependency of its file
    *("kvm_amd", "tun", "loop"),
)

# The payload comes with what goes on from there, so that a change of it needs no new initrd.
_INIT = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
fail() {{
    echo "lab: $1" >/dev/console
    $b poweroff -f
}}
for module in {modules}; do
    $b insmod /modules/$module || fail "cannot load $module"
done
waited=0
until [ -e /dev/vda ] && [ -e /dev/vdb ] && [ -e /dev/vdc ]; do
    [ $waited -lt 500 ] || fail "the drives did not appear"
    waited=$((waited + 1))
    $b usleep 20000
done
$b mount -t squashfs -o ro /dev/vda /lower || fail "cannot mount the root"
$b mount -t tmpfs upper /upper
$b mkdir /upper/files /upper/work
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root || fail "no overlay"
$b mkdir /root/lab
$b mount -t ext4 /dev/vdb /root/lab || fail "cannot mount the payload"
$b mount --move /dev /root/dev
$b mount --move /proc /root/proc
exec $b switch_root /root /bin/sh /lab/checkout/tools/lab/boot.sh
"""


@dataclass(frozen=True)
class Disk:
    """What L1 boots from.

    Attributes:
        kernel: a bzImage.
        initrd: an uncompressed cpio archive.
        root: a squashfs, the first drive.
    """

    kernel: Path
    initrd: Path
    root: Path


def build(cache: Path, progress: Callable[[str], None]) -> Disk:
    """Return L1's disk, after building it where its recipe changed or nothing was built yet (minutes).

    Args:
        cache: a folder for what is kept.
        progress: told about each step.

    Raises:
        SetupError: the host lacks a program, a right or a network.
    """
    recipe = _recipe()
    shelf = Shelf(cache / "disks")
    key = hashlib.sha256(f"{debian.key(recipe)} {_MODULES} {_INIT}".encode()).hexdigest()
    with shelf.locked("disk", progress):
        if not shelf.has(key):
            with shelf.staging() as folder:
                archive = Archive(cache, _SUITE)
                out, versions = debian.build(recipe, archive, folder, cache / "downloads", progress)
                progress("disk: picking kernel and modules")
                _boot_files(folder / "root.tar", folder / "kernel", out)
                records = {path.name: FileRecord.of(path) for path in sorted(out.iterdir())}
                with shelf.guarded():
                    shelf.publish(out, key, Manifest(records, versions))
            shelf.prune(lambda: {key})
    folder = shelf.folder(key)
    return Disk(folder / "vmlinuz", folder / "initrd.cpio", folder / debian.ROOT_FILE)


def _recipe() -> Recipe:
    listed = [package.name for package in system_packages() if package.when in _KINDS]
    packages = (_KERNEL, *_TOOLS, *listed)
    return Recipe(
        name="lab",
        digest=hashlib.sha256(f"{packages} {_EXCLUDE}".encode()).hexdigest(),
        suite=_SUITE,
        variant="minbase",
        packages=packages,
        user="agent",
        epoch=1767225600,  # 2026-01-01
        exclude=_EXCLUDE,
        include=(),
    )


def _boot_files(tar: Path, scratch: Path, out: Path) -> None:
    """Pick the kernel, and make the initrd, from the root's own tar."""
    busybox = b""
    with tarfile.open(tar) as archive:
        for member in archive:
            name = Path(member.name).name
            if not member.isreg():
                continue
            if member.name.startswith("./boot/vmlinuz-"):
                (out / "vmlinuz").write_bytes(_contents(archive, member))
            elif member.name.endswith("/bin/busybox"):
                busybox = _contents(archive, member)
            elif name.endswith(".ko"):
                scratch.mkdir(exist_ok=True)
                (scratch / name).write_bytes(_contents(archive, member))
    order = modules.load_order(scratch, _MODULES)
    (out / "initrd.cpio").write_bytes(_initrd(busybox, order))


def _initrd(busybox: bytes, order: Sequence[Path]) -> bytes:
    cpio = CpioWriter()
    for folder in ("bin", "dev", "lower", "modules", "proc", "root", "upper"):
        cpio.folder(folder)
    cpio.character_device("dev/console", 5, 1)
    cpio.file("bin/busybox", busybox, mode=0o755)
    for path in order:
        cpio.file(f"modules/{path.name}", path.read_bytes())
    init = _INIT.format(modules=" ".join(path.name for path in order))
    cpio.file("init", init.encode(), mode=0o755)
    return cpio.finish()


def _contents(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    source = archive.extractfile(member)
    assert source is not None
    return source.read()
