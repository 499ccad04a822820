"""Kernel modules: which ones a wanted one needs, and in which order they load.

Read from the modules themselves (the ``depends`` line of their ``.modinfo`` section), so neither kmod nor a
``modules.dep`` of the host's kernel is needed.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from fireclaw.errors import CorruptError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# elf(5), 64 bit, little-endian: e_shoff, then e_shentsize, e_shnum, e_shstrndx
_SECTION_TABLE_OFFSET = struct.Struct("<40xQ")
_SECTION_TABLE_SHAPE = struct.Struct("<58xHHH")
# sh_name, sh_offset, sh_size
_SECTION = struct.Struct("<I20xQQ")


def load_order(folder: Path, wanted: Iterable[str]) -> list[Path]:
    """Return the modules to load, in order: each after what it needs.

    Args:
        folder: searched below for ``*.ko`` files.
        wanted: module names; ``-`` and ``_`` are the same, as for modprobe.

    Raises:
        CorruptError: a module is not there, or is not an ELF file.
    """
    known = {_canonical(path.stem): path for path in sorted(folder.rglob("*.ko"))}
    order: list[Path] = []

    def visit(name: str) -> None:
        path = known.get(_canonical(name))
        if path is None:
            raise CorruptError(f"the kernel package has no module {name!r}")
        if path not in order:
            for needed in dependencies(path.read_bytes()):
                visit(needed)
            order.append(path)

    for name in wanted:
        visit(name)
    return order


def dependencies(module: bytes) -> list[str]:
    """Return the names of the modules that must be loaded before this one.

    Raises:
        CorruptError: it is not an ELF file with a ``.modinfo`` section.
    """
    for entry in _section(module, b".modinfo").split(b"\0"):
        key, _, value = entry.partition(b"=")
        if key == b"depends":
            return [name for name in value.decode().split(",") if name]
    return []


def _section(elf: bytes, name: bytes) -> bytes:
    try:
        (table,) = _SECTION_TABLE_OFFSET.unpack_from(elf)
        size, count, names_index = _SECTION_TABLE_SHAPE.unpack_from(elf)
        sections = [_SECTION.unpack_from(elf, table + index * size) for index in range(count)]
        names = sections[names_index][1]
    except (struct.error, IndexError) as error:
        raise CorruptError("a kernel module is not an ELF file") from error
    for name_offset, offset, length in sections:
        if elf.startswith(name + b"\0", names + name_offset):
            return elf[offset : offset + length]
    raise CorruptError(f"a kernel module has no section {name.decode()!r}")


def _canonical(name: str) -> str:
    return name.replace("-", "_")
