"""The kernel out of a bzImage: formats, what VMMs need of it, and what is refused."""

from __future__ import annotations

import gzip
import lzma
import struct
from typing import TYPE_CHECKING

import pytest
from lz4 import block

from fireclaw.errors import CorruptError
from fireclaw.images.kernel import extract_vmlinux

if TYPE_CHECKING:
    from collections.abc import Callable

LZ4_BLOCK = 8 << 20


def note(owner: bytes, kind: int, contents: bytes) -> bytes:
    """Return an ELF note, padded as the format wants."""
    name = owner + b"\0"
    head = struct.pack("<III", len(name), len(contents), kind)
    return head + name + bytes(-len(name) % 4) + contents + bytes(-len(contents) % 4)


NOTES = note(b"Xen", 6, b"linux\0") + note(b"GNU", 18, bytes(20)) + note(b"Xen", 18, bytes(4))


def elf(notes: bytes = NOTES, *, machine: int = 62, padding: int = 100) -> bytes:
    """Return an ELF file with a segment to load and one of notes, and so many bytes of something behind them."""
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    notes_at = 64 + 2 * 56
    table = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 64, 64, 4096)
    table += struct.pack("<IIQQQQQQ", 4, 4, notes_at, 0, 0, len(notes), len(notes), 4)
    return head + table + notes + bytes(range(256)) * (padding // 256 + 1)


def bzimage(payload: bytes, size: int, *, version: int = 0x020F, mark: bytes = b"HdrS") -> bytes:
    """Return a bzImage: two sectors of setup, then a decompressor of 300 bytes, then the payload and its size."""
    payload += struct.pack("<I", size)
    setup = bytearray(1024)
    setup[0x1F1] = 1
    setup[0x202:0x206] = mark
    struct.pack_into("<H", setup, 0x206, version)
    struct.pack_into("<II", setup, 0x248, 300, len(payload))
    return bytes(setup) + b"\xcc" * 300 + payload + b"\xcc" * 100


def lz4(data: bytes) -> bytes:
    """Compress as ``lz4 -l`` does."""
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), LZ4_BLOCK):
        compressed = block.compress(data[at : at + LZ4_BLOCK], store_size=False)
        out += struct.pack("<I", len(compressed)) + compressed
    return out


def xz(data: bytes) -> bytes:
    """Compress as the kernel's build does: with the filter for x86 code."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)


@pytest.mark.parametrize("compress", [lz4, gzip.compress, xz])
def test_the_kernel_comes_out_as_it_went_in(compress: Callable[[bytes], bytes]) -> None:
    """What is inside a bzImage is found and decompressed."""
    assert extract_vmlinux(bzimage(compress(elf()), len(elf()))) == elf()


def test_a_kernel_of_several_blocks_is_put_together() -> None:
    """LZ4 comes in blocks, of which only the last may be shorter."""
    vmlinux = elf(padding=2 * LZ4_BLOCK)

    assert extract_vmlinux(bzimage(lz4(vmlinux), len(vmlinux))) == vmlinux


def test_an_uncompressed_kernel_stays_as_it_is() -> None:
    """An ELF kernel is what we want already."""
    assert extract_vmlinux(elf()) == elf()


@pytest.mark.parametrize(
    ("magic", "name"),
    [
        (b"\x28\xb5\x2f\xfd", "Zstandard"),
        (b"BZh9", "bzip2"),
        (b"\x5d\0\0\x80", "LZMA"),
        (b"\x89LZO\0", "LZO"),
        (b"\xde\xad\xbe\xef\1\2\3", "deadbeef0102"),
    ],
)
def test_another_compression_is_named(magic: bytes, name: str) -> None:
    """A kernel that is packed otherwise is refused with the name of how, or its first bytes."""
    with pytest.raises(CorruptError, match=name):
        extract_vmlinux(bzimage(magic + bytes(100), 1000))


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"MZ" + bytes(2000),
        bzimage(lz4(elf()), len(elf()), mark=b"Hdrs"),
        bzimage(lz4(elf()), len(elf()), version=0x0207),
    ],
)
def test_what_is_no_kernel_is_refused(image: bytes) -> None:
    """Bytes without the boot protocol's mark, or of a protocol that tells of no payload, are no kernel."""
    with pytest.raises(CorruptError, match="neither a bzImage nor an ELF file"):
        extract_vmlinux(image)


@pytest.mark.parametrize("compress", [lz4, gzip.compress, xz])
def test_a_damaged_kernel_is_refused(compress: Callable[[bytes], bytes]) -> None:
    """Bytes that were lost or changed are noticed, wherever they stand."""
    vmlinux = elf()
    payload = compress(vmlinux)

    with pytest.raises(CorruptError, match="truncated"):
        extract_vmlinux(bzimage(payload, len(vmlinux))[:-110])
    with pytest.raises(CorruptError, match="data"):
        extract_vmlinux(bzimage(payload[: len(payload) // 2], len(vmlinux)))
    with pytest.raises(CorruptError, match="data holds"):
        extract_vmlinux(bzimage(payload, len(vmlinux) + 1))


@pytest.mark.parametrize(
    ("vmlinux", "reason"),
    [
        (elf(note(b"Xen", 6, b"linux\0")), "CONFIG_PVH"),
        (elf(note(b"GNU", 18, bytes(4))), "CONFIG_PVH"),
        (elf(machine=183), "no ELF file for x86-64"),
        (b"\x7fELF" + bytes(100), "no ELF file for x86-64"),
        (elf()[:60], "truncated"),
        (elf()[:100], "truncated"),
        (b"not a kernel", "truncated"),
        (b"not a kernel, but long enough to be looked at: " * 2, "no ELF file"),
    ],
)
def test_a_kernel_that_no_vmm_could_start_is_refused(vmlinux: bytes, reason: str) -> None:
    """What is inside must be an ELF file for this processor with a PVH entry."""
    with pytest.raises(CorruptError, match=reason):
        extract_vmlinux(bzimage(lz4(vmlinux), len(vmlinux)))
