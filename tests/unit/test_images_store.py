"""The image store without building: finding, naming, keys, pruning."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import CorruptError, NotFoundError
from fireclaw.images import ImageStore, runtime
from fireclaw.images.archive import Package
from fireclaw.images.shelf import FileRecord, Manifest, Shelf
from fireclaw.paths import Home

if TYPE_CHECKING:
    from pathlib import Path

PACKAGES = [
    Package("libc6", "2.36-9", "a" * 64, 100, ""),
    Package("linux-image-6.1.0-1-cloud-amd64", "6.1.1-1", "b" * 64, 200, ""),
]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty home."""
    return Home(tmp_path, tmp_path / "run", tmp_path)


@pytest.fixture
def store(home: Home) -> ImageStore:
    """An empty store."""
    return ImageStore(home)


def publish(root: Path, key: str, *names: str) -> None:
    """Put small files where a builder would put large ones."""
    shelf = Shelf(root)
    root.mkdir(exist_ok=True)
    with shelf.staging() as folder, shelf.guarded():
        out = folder / "out"
        out.mkdir()
        for name in names:
            (out / name).write_bytes(name.encode())
        shelf.publish(out, key, Manifest({name: FileRecord.of(out / name) for name in names}, {}))


def furnish_runtime(home: Home, packages: list[Package], sources: dict[str, bytes]) -> str:
    """Make a runtime of those packages and sources, and record the packages."""
    key = runtime.key(packages, sources)
    publish(home.runtimes, key, "vmlinux", "initrd.cpio", "root.squashfs")
    rows = [asdict(package) for package in packages]
    Shelf(home.runtimes).write("packages.json", {"builder": runtime.BUILDER_VERSION, "packages": rows})
    return key


def furnish_image(home: Home, name: str, key: str) -> None:
    """Make an image and name it."""
    publish(home.images, key, "root.squashfs")
    shelf = Shelf(home.images)
    shelf.write("names.json", (shelf.read("names.json") or {}) | {name: {"recipe": "r", "image": key}})


def test_a_new_home_has_nothing(store: ImageStore) -> None:
    """An empty store finds no runtime, lists no image and prunes nothing."""
    assert store.find_runtime() is None
    assert store.images() == []
    assert store.prune() == []


def test_the_runtime_of_the_present_sources_is_found(home: Home, store: ImageStore) -> None:
    """A built runtime is found by its inputs, with the paths a VMM needs."""
    key = furnish_runtime(home, PACKAGES, runtime.guest_sources())

    found = store.find_runtime()
    assert found is not None
    assert found.digest == key
    assert found.kernel_release == "6.1.0-1-cloud-amd64"
    assert [path.name for path in (found.kernel, found.initrd, found.root)] == [
        "vmlinux",
        "initrd.cpio",
        "root.squashfs",
    ]
    store.verify(found, full=True)


def test_finding_the_runtime_is_quick(home: Home, store: ImageStore) -> None:
    """Every start of a machine asks for it, so it takes less than 50 ms."""
    furnish_runtime(home, PACKAGES, runtime.guest_sources())

    def once() -> float:
        start = time.perf_counter()
        assert store.find_runtime() is not None
        return time.perf_counter() - start

    assert min(once() for _ in range(5)) < 0.05


def test_the_runtime_of_other_sources_is_not_ours(home: Home, store: ImageStore) -> None:
    """After an edit of guestd the old runtime is not found any more."""
    furnish_runtime(home, PACKAGES, runtime.guest_sources() | {"fireclaw/guest/init.py": b"older"})

    assert store.find_runtime() is None


def test_a_package_set_of_another_builder_is_not_used(home: Home, store: ImageStore) -> None:
    """A record that an older Fireclaw wrote is as good as none."""
    furnish_runtime(home, PACKAGES, runtime.guest_sources())
    Shelf(home.runtimes).write("packages.json", {"builder": 0, "packages": [{"unknown": 1}]})

    assert store.find_runtime() is None


def test_the_key_depends_on_everything_that_goes_in() -> None:
    """Another version, another digest, another source or another path each make another key."""
    libc, kernel = PACKAGES
    sources = {"a.py": b"x", "b.py": b"y"}
    keys = {
        runtime.key([libc, kernel], sources),
        runtime.key([Package("libc6", "2.37", libc.sha256, 100, ""), kernel], sources),
        runtime.key([Package("libc6", libc.version, "c" * 64, 100, ""), kernel], sources),
        runtime.key([libc], sources),
        runtime.key([libc, kernel], {"a.py": b"x", "b.py": b"z"}),
        runtime.key([libc, kernel], {"a.py": b"x", "c.py": b"y"}),
        runtime.key([libc, kernel], {"a.py": b"xb.py 1\ny"}),
    }
    assert len(keys) == 7


def test_the_guests_part_is_guest_and_wire_only() -> None:
    """What goes into the runtime is the guest, the wire and a start; nothing that reads __version__ or a key."""
    sources = runtime.guest_sources()

    assert {"guestd.py", "fireclaw/__init__.py", "fireclaw/guest/init.py", "fireclaw/wire/__init__.py"} <= set(sources)
    assert sources["fireclaw/__init__.py"] == b""
    assert {path.split("/")[1] for path in sources if "/" in path} == {"__init__.py", "guest", "wire"}
    assert list(sources) == sorted(sources)


def test_an_image_is_found_by_name(home: Home, store: ImageStore) -> None:
    """An image has a name, a digest and a file."""
    furnish_image(home, "mine", "key")

    image = store.find_image("mine")
    assert (image.name, image.digest, image.root) == ("mine", "key", home.images / "key/root.squashfs")
    assert store.images() == [image]
    store.verify(image, full=True)


def test_an_image_that_lost_bytes_is_told_by_its_name(home: Home, store: ImageStore) -> None:
    """The error of a truncated image calls it as its user does."""
    furnish_image(home, "mine", "key")
    image = store.find_image("mine")
    image.root.chmod(0o644)
    image.root.write_bytes(b"")

    with pytest.raises(CorruptError, match="the image 'mine' is truncated"):
        store.verify(image)


def test_an_unknown_image_offers_the_nearest(home: Home, store: ImageStore) -> None:
    """Built images and recipes are both offered."""
    furnish_image(home, "workshop", "key")

    with pytest.raises(NotFoundError, match=r"no image named 'workshap' .*'workshop'"):
        store.find_image("workshap")
    with pytest.raises(NotFoundError, match="did you mean 'debian'"):
        store.find_image("debiam")


def test_an_image_that_is_not_built_says_how(store: ImageStore) -> None:
    """A recipe's name is known before its image is there."""
    with pytest.raises(NotFoundError, match=r"'debian' is not built yet .*fireclaw setup"):
        store.find_image("debian")


def test_prune_keeps_what_is_current_and_what_is_asked_for(home: Home, store: ImageStore) -> None:
    """Replaced runtimes and images go, unless somebody still uses them."""
    used = furnish_runtime(home, PACKAGES, {"a.py": b"used"})
    unused = furnish_runtime(home, PACKAGES, {"a.py": b"unused"})
    current = furnish_runtime(home, PACKAGES, runtime.guest_sources())
    furnish_image(home, "debian", "older")
    furnish_image(home, "debian", "newer")
    (home.images / "tmp-dead").mkdir()

    assert sorted(store.prune(keep=[used])) == sorted([unused, "older", "tmp-dead"])
    found = store.find_runtime()
    assert found is not None
    assert found.digest == current
    assert (home.runtimes / used).is_dir()
    assert store.find_image("debian").digest == "newer"
