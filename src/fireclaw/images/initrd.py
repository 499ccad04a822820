"""The initrd: busybox and a handful of modules, just enough to reach the runtime's root file system."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fireclaw.images.cpio import CpioWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

MODULES = (
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",  # the channel on QEMU
    "vmw_vsock_virtio_transport",  # the channel on Firecracker
    "squashfs",
    "overlay",
)
"""What guestd needs before it can load anything itself; their dependencies come along."""

GUESTD = ("/usr/bin/python3.11", "-I", "-S", "/usr/lib/fireclaw/guestd.pyc")
"""PID 1 of the guest. ``-S``: importing site would cost a tenth of a second under software CPU."""

# 250 waits of 20 ms: a loaded host took 1 s, so after 5 s the drive is not coming. "reboot" ends a VMM that was
# told not to reboot, also one without ACPI, where "poweroff" would hang.
_INIT = """\
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t devtmpfs dev /dev
fail() {{
    echo "fireclaw: $1" >/dev/console
    $b reboot -f
}}
for module in {modules}; do
    $b insmod /modules/$module || fail "cannot load $module"
done
waited=0
until [ -e /dev/vda ]; do
    [ $waited -lt 250 ] || fail "the runtime's drive /dev/vda did not appear"
    waited=$((waited + 1))
    $b usleep 20000
done
$b mount -t squashfs -o ro /dev/vda /root || fail "cannot mount the runtime's drive"
$b mount --move /dev /root/dev
$b umount /proc
exec $b switch_root /root {guestd}
"""


def build(busybox: bytes, modules: Sequence[tuple[str, bytes]]) -> bytes:
    """Return the initrd as an uncompressed cpio archive (decompressing costs more than reading).

    Args:
        busybox: a static busybox.
        modules: file names and contents, in load order.
    """
    cpio = CpioWriter()
    for folder in ("bin", "dev", "proc", "root", "modules"):
        cpio.folder(folder)
    # The kernel opens the console for /init before devtmpfs is mounted.
    cpio.character_device("dev/console", 5, 1)
    cpio.file("bin/busybox", busybox, mode=0o755)
    for name, data in modules:
        cpio.file(f"modules/{name}", data)
    script = _INIT.format(modules=" ".join(name for name, _ in modules), guestd=" ".join(GUESTD))
    cpio.file("init", script.encode(), mode=0o755)
    return cpio.finish()
