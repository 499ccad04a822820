"""The kernel as VMMs start it: the uncompressed ELF file that a distribution's bzImage carries inside.

Firecracker up to 1.16 takes nothing else, and QEMU starts it, too, without the decompression in the guest. Both enter
it by PVH, at the address that a Xen note of the file names.

Formats: Documentation/arch/x86/boot.rst of the kernel for the bzImage, elf(5), and xen/include/public/elfnote.h.
"""

from __future__ import annotations

import lzma
import struct
import zlib
from typing import TYPE_CHECKING

from fireclaw.errors import CorruptError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ELF = b"\x7fELF"
# setup_sects, the mark "HdrS", the protocol's version, then payload_offset and payload_length (since version 2.08)
_HEADER = struct.Struct("<497xB16x4sH64xII")
_HEADER_MARK = b"HdrS"
_HAS_PAYLOAD = 0x0208
_SECTOR = 512
_SIZE = struct.Struct("<I")

_LZ4_BLOCK = 8 << 20  # of the legacy format: every block but the last is that large once it is decompressed
_GZIP_WINDOW = 31  # zlib's word for gzip's header and the largest window

# e_ident up to the byte order, e_type, e_machine; then e_phoff; then e_phentsize and e_phnum
_ELF_HEADER = struct.Struct("<4sBB10xHH12xQ14xHH")
_ELF_64_BIT, _ELF_LITTLE_ENDIAN, _ELF_X86_64 = 2, 1, 62
# p_type, p_offset, p_filesz
_SEGMENT = struct.Struct("<I4xQ16xQ")
_SEGMENT_NOTE = 4
_NOTE = struct.Struct("<III")  # size of the name, size of the contents, type
_XEN = b"Xen\0"
_PHYS32_ENTRY = 18


def extract_vmlinux(image: bytes) -> bytes:
    """Return the ELF kernel of a bzImage; an ELF kernel is returned as it is.

    Raises:
        CorruptError: it is neither, it is damaged, it is compressed in a way that we do not read, or VMMs could not
            start what is inside.
    """
    vmlinux = image if image.startswith(_ELF) else _decompress(_payload(image))
    _check(vmlinux)
    return vmlinux


def _payload(image: bytes) -> bytes:
    """Return the compressed kernel within a bzImage, with its size behind it."""
    if len(image) < _HEADER.size:
        raise CorruptError("the kernel is neither a bzImage nor an ELF file")
    setup_sectors, mark, version, offset, length = _HEADER.unpack_from(image)
    if mark != _HEADER_MARK or version < _HAS_PAYLOAD:
        raise CorruptError("the kernel is neither a bzImage nor an ELF file")
    start = (setup_sectors + 1) * _SECTOR + offset
    payload = image[start : start + length]
    if len(payload) < length or length <= _SIZE.size:
        raise CorruptError("the kernel's bzImage is truncated")
    return payload


def _decompress(payload: bytes) -> bytes:
    """Undo what the kernel's build did, by the payload's first bytes."""
    (size,) = _SIZE.unpack_from(payload, len(payload) - _SIZE.size)
    unknown = (f"what begins with {payload[:6].hex()}", None)
    name, decompress = next((row[1:] for row in _FORMATS if payload.startswith(row[0])), unknown)
    if decompress is None:
        raise CorruptError(f"the kernel is compressed with {name}, which is not read here")
    try:
        vmlinux = decompress(payload, size)
    except (ValueError, struct.error, lzma.LZMAError, zlib.error) as error:
        raise CorruptError(f"the kernel's {name} data is damaged: {error}") from error
    if len(vmlinux) != size:
        raise CorruptError(f"the kernel's {name} data holds {len(vmlinux)} of {size} bytes")
    return vmlinux


def _lz4(payload: bytes, size: int) -> bytes:
    """Decompress LZ4's legacy format: blocks, each behind its length."""
    from lz4 import block  # noqa: PLC0415 - only who builds a runtime needs it

    pieces, at, end = [], _SIZE.size, len(payload) - _SIZE.size
    while at < end and size > 0:
        (length,) = _SIZE.unpack_from(payload, at)
        at += _SIZE.size
        try:
            pieces.append(block.decompress(payload[at : at + length], uncompressed_size=min(size, _LZ4_BLOCK)))
        except block.LZ4BlockError as error:
            raise ValueError(str(error)) from error
        size -= len(pieces[-1])
        at += length
    return b"".join(pieces)


def _gzip(payload: bytes, size: int) -> bytes:
    return zlib.decompressobj(_GZIP_WINDOW).decompress(payload, size)


def _xz(payload: bytes, size: int) -> bytes:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload, size)


_FORMATS: tuple[tuple[bytes, str, Callable[[bytes, int], bytes] | None], ...] = (
    (b"\x02\x21\x4c\x18", "LZ4", _lz4),  # Debian's cloud kernels
    (b"\x1f\x8b", "gzip", _gzip),
    (b"\xfd7zXZ\0", "XZ", _xz),
    (b"\x28\xb5\x2f\xfd", "Zstandard", None),
    (b"BZh", "bzip2", None),
    (b"\x5d\0\0", "LZMA", None),
    (b"\x89LZO", "LZO", None),
)


def _check(vmlinux: bytes) -> None:
    """See that a VMM can start it.

    Raises:
        CorruptError: it is no ELF file for x86-64, or has no PVH entry.
    """
    try:
        notes = list(_notes(vmlinux))
    except struct.error as error:
        raise CorruptError("the kernel's ELF file is truncated") from error
    if (_XEN, _PHYS32_ENTRY) not in notes:
        raise CorruptError("the kernel has no PVH entry: it was built without CONFIG_PVH")


def _notes(elf: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield the owner and type of each note of the file's note segments."""
    magic, bits, order, _, machine, table, entry_size, count = _ELF_HEADER.unpack_from(elf)
    if (magic, bits, order, machine) != (_ELF, _ELF_64_BIT, _ELF_LITTLE_ENDIAN, _ELF_X86_64):
        raise CorruptError("the kernel is no ELF file for x86-64")
    for index in range(count):
        kind, at, size = _SEGMENT.unpack_from(elf, table + index * entry_size)
        if kind == _SEGMENT_NOTE:
            end = at + size
            while at < end:
                name_size, contents_size, note = _NOTE.unpack_from(elf, at)
                at += _NOTE.size
                yield elf[at : at + name_size], note
                at += _aligned(name_size) + _aligned(contents_size)


def _aligned(size: int) -> int:
    return (size + 3) & ~3
