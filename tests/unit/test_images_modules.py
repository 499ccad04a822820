"""Kernel modules: dependencies and load order."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import CorruptError
from fireclaw.images import modules

if TYPE_CHECKING:
    from pathlib import Path


def elf(section: bytes, contents: bytes) -> bytes:
    """Return the least ELF file with one named section and the table of names."""
    names = b"\0" + section + b"\0.shstrtab\0"
    body = 64
    table = body + len(contents) + len(names)
    head = b"\x7fELF" + bytes(36) + struct.pack("<QIHHHHHH", table, 0, 64, 0, 0, 64, 3, 2)
    rows = [
        bytes(64),
        struct.pack("<I20xQQ24x", 1, body, len(contents)),
        struct.pack("<I20xQQ24x", 2 + len(section), body + len(contents), len(names)),
    ]
    return head + contents + names + b"".join(rows)


def module(*needs: str) -> bytes:
    """Return a kernel module that depends on others."""
    return elf(b".modinfo", b"license=GPL\0depends=" + ",".join(needs).encode() + b"\0name=x\0")


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A folder of modules: block needs ring and core, console needs ring, ring needs core."""
    folder = tmp_path / "lib/modules/6.1/kernel/drivers"
    folder.mkdir(parents=True)
    for name, needs in {
        "virtio-core": [],
        "virtio_ring": ["virtio_core"],
        "virtio_blk": ["virtio_ring", "virtio-core"],
        "virtio_console": ["virtio_ring"],
    }.items():
        (folder / f"{name}.ko").write_bytes(module(*needs))
    return tmp_path


def test_each_module_comes_once_and_after_what_it_needs(kernel: Path) -> None:
    """Dependencies load first, shared ones once, whichever way their names spell the dash."""
    order = modules.load_order(kernel, ["virtio_blk", "virtio-console"])

    assert [path.stem for path in order] == ["virtio-core", "virtio_ring", "virtio_blk", "virtio_console"]


def test_a_module_that_is_not_there_is_named(kernel: Path) -> None:
    """A wanted module that the kernel package lacks is an error with its name."""
    with pytest.raises(CorruptError, match="no module 'floppy'"):
        modules.load_order(kernel, ["floppy"])


def test_no_dependencies_is_an_empty_list() -> None:
    """An empty list, and no list at all, both mean no dependency."""
    assert modules.dependencies(module()) == []
    assert modules.dependencies(elf(b".modinfo", b"license=GPL\0")) == []


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"\x7fELF" + bytes(60), elf(b".text", b"")[:200]])
def test_what_is_no_module_is_refused(data: bytes) -> None:
    """Bytes that are not a whole ELF file are refused instead of half understood."""
    with pytest.raises(CorruptError):
        modules.dependencies(data)


def test_a_module_without_information_is_refused() -> None:
    """An ELF file without .modinfo is not a kernel module."""
    with pytest.raises(CorruptError, match=r"no section '\.modinfo'"):
        modules.dependencies(elf(b".text", b""))
