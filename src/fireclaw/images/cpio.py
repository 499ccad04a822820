"""The cpio archive format that the kernel unpacks as its initrd ("newc"), written without root rights.

Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel. Every entry is owned by root
and dated 1970, so equal contents make equal bytes.
"""

from __future__ import annotations

import stat

_MAGIC = b"070701"


class CpioWriter:
    """Collects entries; ``finish`` returns the archive.

    ::

        cpio = CpioWriter()
        cpio.folder("bin")
        cpio.file("bin/busybox", data, mode=0o755)
        Path("initrd").write_bytes(cpio.finish())
    """

    def __init__(self) -> None:
        self._archive = bytearray()
        self._inode = 0

    def folder(self, name: str) -> None:
        """Add a folder, 0755; its parents must have come before."""
        self._add(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, *, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(name, stat.S_IFREG | mode, data)

    def character_device(self, name: str, major: int, minor: int, *, mode: int = 0o600) -> None:
        """Add a character device node."""
        self._add(name, stat.S_IFCHR | mode, device=(major, minor))

    def finish(self) -> bytes:
        """Close the archive and return its bytes."""
        self._add("TRAILER!!!", 0)
        return bytes(self._archive)

    def _add(self, name: str, mode: int, data: bytes = b"", *, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device, device of the node, length of the name, checksum
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        self._archive += _MAGIC + b"".join(b"%08X" % field for field in fields) + encoded
        self._pad()
        self._archive += data
        self._pad()

    def _pad(self) -> None:
        self._archive += bytes(-len(self._archive) % 4)
