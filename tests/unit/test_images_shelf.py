"""The folder of finished things: whole or absent, locked, pruned."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import CorruptError, SetupError
from fireclaw.images.shelf import FileRecord, Manifest, Shelf

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    """An empty shelf."""
    shelf = Shelf(tmp_path / "shelf")
    shelf.root.mkdir()
    return shelf


def put(shelf: Shelf, key: str, data: bytes = b"contents") -> Path:
    """Make a thing of one file and return the file."""
    with shelf.staging() as folder, shelf.guarded():
        out = folder / "out"
        out.mkdir()
        (out / "root").write_bytes(data)
        shelf.publish(out, key, Manifest({"root": FileRecord.of(out / "root")}, {"libc6": "2.36"}))
    return shelf.folder(key) / "root"


def names(shelf: Shelf) -> list[str]:
    """Return what stands in the folder, hidden files aside."""
    return sorted(path.name for path in shelf.root.iterdir() if not path.name.startswith("."))


def test_what_is_published_is_whole_and_read_only(shelf: Shelf) -> None:
    """A published thing has its files, its manifest, and no way to be changed by accident."""
    file = put(shelf, "key")

    assert names(shelf) == ["key"]
    assert shelf.has("key")
    assert file.stat().st_mode & 0o777 == 0o444
    assert Manifest.read(shelf.folder("key")).packages == {"libc6": "2.36"}
    shelf.verify("the thing", "key", full=True)


def test_a_failed_maker_leaves_nothing(shelf: Shelf) -> None:
    """An exception while making removes the temporary folder and publishes nothing."""

    def fail_midway() -> None:
        with shelf.staging() as folder:
            (folder / "half").touch()
            raise LookupError

    with pytest.raises(LookupError):
        fail_midway()
    assert names(shelf) == []


def test_a_truncated_file_is_told_by_its_size(shelf: Shelf) -> None:
    """The cheap check sees a file that lost its end, and says what to do."""
    file = put(shelf, "key")
    file.chmod(0o644)
    os.truncate(file, 3)

    with pytest.raises(CorruptError, match=r"the thing is truncated: 'root' has 3 of 8 bytes .*fireclaw setup"):
        shelf.verify("the thing", "key")


def test_changed_bytes_are_told_by_the_full_check(shelf: Shelf) -> None:
    """Only the full check reads the bytes."""
    file = put(shelf, "key")
    file.chmod(0o644)
    file.write_bytes(b"CONTENTS")

    shelf.verify("the thing", "key")
    with pytest.raises(CorruptError, match="the thing is damaged: 'root' is not what was built"):
        shelf.verify("the thing", "key", full=True)


def test_a_missing_file_is_told(shelf: Shelf) -> None:
    """A file that somebody removed is an error with its path."""
    put(shelf, "key").unlink()

    with pytest.raises(CorruptError, match=r"the thing is damaged: .*root' is gone"):
        shelf.verify("the thing", "key")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {"root": {"size": 1}}, "packages": {}}'])
def test_a_spoilt_manifest_is_told(shelf: Shelf, text: str) -> None:
    """A manifest that cannot be understood is an error, not a crash."""
    put(shelf, "key")
    manifest = shelf.folder("key") / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text(text)

    with pytest.raises(CorruptError, match="manifest"):
        shelf.verify("the thing", "key")


def test_publishing_again_replaces_a_damaged_one(shelf: Shelf) -> None:
    """The same key may be published again; the old folder goes."""
    file = put(shelf, "key")
    file.unlink()

    put(shelf, "key")
    shelf.verify("the thing", "key", full=True)
    assert names(shelf) == ["key"]


def test_prune_spares_the_living_and_the_wanted(shelf: Shelf) -> None:
    """Dead temporary folders and unwanted things go; a maker's folder and wanted things stay."""
    put(shelf, "old")
    put(shelf, "new")
    (shelf.root / "tmp-dead").mkdir()
    (shelf.root / "tmp-dead" / "half").touch()

    with shelf.staging() as folder:
        assert shelf.prune(lambda: {"new"}) == ["old", "tmp-dead"]
        assert names(shelf) == ["new", folder.name]


def test_prune_of_nothing_is_nothing(tmp_path: Path) -> None:
    """A shelf that was never used has nothing to prune."""
    assert Shelf(tmp_path / "absent").prune(set) == []


def test_a_published_thing_is_named_before_prune_looks(shelf: Shelf) -> None:
    """While a maker publishes and names, prune waits, so it never takes what has no name yet."""
    wanted: set[str] = set()
    gone: list[str] = []
    pruner = threading.Thread(target=lambda: gone.extend(shelf.prune(lambda: set(wanted))))
    with shelf.guarded():
        (shelf.root / "key").mkdir()
        (shelf.root / "key" / "manifest.json").touch()
        pruner.start()
        wanted.add("key")
    pruner.join()

    assert gone == []
    assert shelf.has("key")


def test_the_second_maker_waits_and_is_told(shelf: Shelf) -> None:
    """Two makers of one name take turns, and the second says that it waits."""
    waits = threading.Event()
    order: list[str] = []
    said: list[str] = []

    def progress(line: str) -> None:
        said.append(line)
        waits.set()

    def second() -> None:
        with shelf.locked("debian", progress):
            order.append("second")

    thread = threading.Thread(target=second)
    with shelf.locked("debian", said.append):
        thread.start()
        assert waits.wait(10)
        order.append("first")
    thread.join()

    assert order == ["first", "second"]
    assert said == ["debian: somebody else is making it, waiting"]


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "a folder you may write to")]
)
def test_what_the_disk_refuses_says_what_to_do(shelf: Shelf, number: int, hint: str) -> None:
    """A full or read-only disk becomes an error with the next step."""
    with pytest.raises(SetupError, match=hint), shelf.locked("debian", print), shelf.staging():
        raise OSError(number, os.strerror(number))
    assert names(shelf) == []


def test_other_errors_pass_as_they_are(shelf: Shelf) -> None:
    """An error that the disk has nothing to do with keeps its type."""
    with pytest.raises(FileNotFoundError), shelf.locked("debian", print):
        raise FileNotFoundError


def test_small_files_are_read_back(shelf: Shelf) -> None:
    """What was written is read, what was not is None, and garbage is an error that names the file."""
    assert shelf.read("names.json") is None
    shelf.write("names.json", {"debian": "key"})
    assert shelf.read("names.json") == {"debian": "key"}

    (shelf.root / "names.json").write_text("{")
    with pytest.raises(CorruptError, match=r"names\.json"):
        shelf.read("names.json")
