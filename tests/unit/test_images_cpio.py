"""The initrd's archive format, byte by byte."""

from __future__ import annotations

from fireclaw.images import initrd
from fireclaw.images.cpio import CpioWriter


def header(**fields: int) -> bytes:
    """Return a newc header; fields not given are 0."""
    names = "ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check"
    return b"070701" + b"".join(b"%08X" % fields.get(name, 0) for name in names.split())


TRAILER = header(ino=2, nlink=1, namesize=11) + b"TRAILER!!!\0" + bytes(3)


def test_a_file_is_header_name_and_data_padded_to_four_bytes() -> None:
    """A file's name and data each end at a multiple of four bytes."""
    cpio = CpioWriter()
    cpio.file("init", b"hello", mode=0o755)

    head = header(ino=1, mode=0o100755, nlink=1, filesize=5, namesize=5)
    assert cpio.finish() == head + b"init\0" + bytes(1) + b"hello" + bytes(3) + TRAILER


def test_a_folder_and_a_device_have_no_data() -> None:
    """A folder carries its mode, a device its numbers."""
    folder, device = CpioWriter(), CpioWriter()
    folder.folder("dev")
    device.character_device("con", 5, 1)

    assert folder.finish() == header(ino=1, mode=0o040755, nlink=1, namesize=4) + b"dev\0" + bytes(2) + TRAILER
    head = header(ino=1, mode=0o020600, nlink=1, rdevmajor=5, rdevminor=1, namesize=4)
    assert device.finish() == head + b"con\0" + bytes(2) + TRAILER


def test_init_loads_the_modules_in_their_order_and_starts_guestd() -> None:
    """The script loads modules in the given order before it looks for the drive, and ends in guestd."""
    data = initrd.build(b"", [("b.ko", b""), ("a.ko", b"")])
    script = data[data.index(b"#!/bin/busybox") :].decode()

    assert "for module in b.ko a.ko; do" in script
    assert script.index("insmod") < script.index("/dev/vda") < script.index("switch_root")
    assert "exec $b switch_root /root /usr/bin/python3.11 -I -S /usr/lib/fireclaw/guestd.pyc\n" in script
