"""Snapshots on disk: what is saved is what is loaded, and what was changed is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from review_limits import descriptors

from fireclaw.errors import CorruptError, SetupError
from fireclaw.machines.snapshots import About, SnapshotFolder
from fireclaw.vmm.base import MemorySnapshot

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_SIZE = 8 << 20
_MAGIC = bytes(range(16))
_ABOUT = About(runtime="runtime-digest", image="image-digest", vmm="a VMM on a host")


def _memfd(size: int, *pieces: tuple[int, bytes]) -> int:
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    for offset, data in pieces:
        os.pwrite(fd, data, offset)
    return fd


@pytest.fixture
def memory() -> Iterator[MemorySnapshot]:
    """Eight megabytes with little in them, and a state."""
    pieces = (0, b"first"), (3 << 20, os.urandom(5000)), (_SIZE - 4, b"last")
    snapshot = MemorySnapshot(_memfd(_SIZE, *pieces), _memfd(700, (0, os.urandom(700))))
    yield snapshot
    snapshot.close()


@pytest.fixture
def folder(tmp_path: Path, memory: MemorySnapshot) -> SnapshotFolder:
    """A folder with one snapshot."""
    folder = SnapshotFolder(tmp_path / "snapshots")
    folder.save(_ABOUT, memory, _MAGIC)
    return folder


@pytest.mark.parametrize("seal", [True, False])
def test_what_is_loaded_is_what_was_saved(
    folder: SnapshotFolder, memory: MemorySnapshot, tmp_path: Path, *, seal: bool
) -> None:
    """Memory, state and magic come back byte by byte; holes cost no disk, and nobody else may look into the folder."""
    loaded = folder.load(_ABOUT, seal=seal)
    assert loaded is not None
    assert loaded.magic == _MAGIC
    for ours, theirs in ((loaded.memory.memory, memory.memory), (loaded.memory.state, memory.state)):
        assert os.pread(ours, _SIZE + 1, 0) == os.pread(theirs, _SIZE + 1, 0)
    loaded.close()
    on_disk = tmp_path / "snapshots" / _ABOUT.key / "memory"
    assert on_disk.stat().st_size == _SIZE
    assert on_disk.stat().st_blocks * 512 < _SIZE // 2
    assert on_disk.parent.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("seal", [True, False])
def test_what_is_loaded_cannot_be_written(folder: SnapshotFolder, *, seal: bool) -> None:
    """Both files are sealed in memory, or open for reading only."""
    loaded = folder.load(_ABOUT, seal=seal)
    assert loaded is not None
    for fd in (loaded.memory.memory, loaded.memory.state):
        with pytest.raises(OSError, match=r"not permitted|Bad file"):
            os.pwrite(fd, b"x", 0)
        with pytest.raises(OSError, match=r"not permitted|Invalid argument"):
            os.ftruncate(fd, 1)
    loaded.close()


def test_what_is_not_sealed_can_be_linked_into_a_jail(folder: SnapshotFolder, tmp_path: Path) -> None:
    """Unsealed, both are the files themselves, and only their owner could change them."""
    loaded = folder.load(_ABOUT, seal=False)
    assert loaded is not None
    for fd, name in ((loaded.memory.memory, "memory"), (loaded.memory.state, "state")):
        # Given a folder Python calls linkat(2), which follows the link in /proc.
        os.link(f"/proc/self/fd/{fd}", tmp_path / name, src_dir_fd=fd, follow_symlinks=True)
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o444
    loaded.close()


@pytest.mark.parametrize(
    "change", [{"vmm": "another"}, {"runtime": "r"}, {"image": "i"}, {"workspace_bytes": 1}], ids=str
)
def test_there_is_none_of_another_kind(folder: SnapshotFolder, change: dict[str, Any]) -> None:
    """Whatever must be the same tells snapshots apart; one that is not there is no error."""
    assert folder.load(replace(_ABOUT, **change), seal=True) is None


@pytest.mark.parametrize("seal", [True, False])
@pytest.mark.parametrize("name", ["memory", "state"])
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_damage_is_found(folder: SnapshotFolder, tmp_path: Path, name: str, damage: str, *, seal: bool) -> None:
    """A file that is shorter, changed by one byte, or not there at all makes the snapshot worthless."""
    path = tmp_path / "snapshots" / _ABOUT.key / name
    if damage == "truncated":
        os.truncate(path, path.stat().st_size - 1)
    elif damage == "changed":
        with path.open("r+b") as file:
            file.write(b"X")
    else:
        path.unlink()
    before = descriptors()
    with pytest.raises(CorruptError):
        folder.load(_ABOUT, seal=seal)
    assert descriptors() == before


@pytest.mark.parametrize("manifest", ["", "{}", "[]", '{"magic": 1}', "\xff"])
def test_a_manifest_that_makes_no_sense_is_refused(folder: SnapshotFolder, tmp_path: Path, manifest: str) -> None:
    """Whatever stands in the manifest, the answer is an error that says so."""
    (tmp_path / "snapshots" / _ABOUT.key / "manifest.json").write_text(manifest, encoding="latin-1")
    with pytest.raises(CorruptError):
        folder.load(_ABOUT, seal=True)


def test_a_second_save_replaces_the_first(folder: SnapshotFolder) -> None:
    """A rebuilt snapshot takes the place of the damaged one."""
    other = MemorySnapshot(_memfd(4096, (0, b"new")), _memfd(10, (0, b"state")))
    folder.save(_ABOUT, other, _MAGIC)
    loaded = folder.load(_ABOUT, seal=True)
    assert loaded is not None
    assert os.pread(loaded.memory.memory, 3, 0) == b"new"
    loaded.close()
    other.close()


def test_only_what_another_vmm_or_host_made_is_outdated(folder: SnapshotFolder) -> None:
    """Making a snapshot anew after an upgrade removes the old one, and none of another image or size."""
    assert not folder.remove_outdated(_ABOUT)
    assert not folder.remove_outdated(replace(_ABOUT, vmm="another", image="i"))
    assert not folder.remove_outdated(replace(_ABOUT, vmm="another", workspace_bytes=1))
    assert folder.remove_outdated(replace(_ABOUT, vmm="another"))
    assert folder.load(_ABOUT, seal=True) is None


def test_prune_keeps_what_is_wanted(folder: SnapshotFolder, tmp_path: Path) -> None:
    """Half-written and unwanted snapshots go; a second prune finds nothing."""
    half = tmp_path / "snapshots" / "tmp-half"
    half.mkdir()
    broken = tmp_path / "snapshots" / "b0b0"
    broken.mkdir()
    assert sorted(folder.prune(lambda about: about.image == "image-digest")) == [
        "snapshot b0b0",
        "snapshot tmp-half",
    ]
    assert folder.prune(lambda about: about.image == "image-digest") == []
    assert folder.prune(lambda _: False) == [f"snapshot {_ABOUT.key[:12]}"]
    assert folder.load(_ABOUT, seal=True) is None


def test_a_folder_that_cannot_be_written_is_said(memory: MemorySnapshot, tmp_path: Path) -> None:
    """The error names the folder and the reason, and nothing is left."""
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="cannot write a snapshot"):
        SnapshotFolder(tmp_path / "file").save(_ABOUT, memory, _MAGIC)
