"""The image store: finds, builds, checks and prunes runtimes and images.

Synchronous; the daemon calls it in a worker thread. Any number of processes and threads may use one home.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING

from fireclaw.errors import CorruptError, NotFoundError
from fireclaw.images import debian, recipe, runtime
from fireclaw.images.archive import Archive, Package
from fireclaw.images.shelf import FileRecord, Manifest, Shelf

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    from fireclaw.paths import Home

_PACKAGES = "packages.json"
_NAMES = "names.json"


@dataclass(frozen=True)
class Runtime:
    """Kernel, initrd and the root file system with guestd; the same for every machine.

    Attributes:
        digest: SHA-256 of everything that went in, in hex.
        kernel: an uncompressed ELF file (``vmlinux``) with a PVH entry.
        initrd: an uncompressed cpio archive.
        root: a squashfs, to be the first drive (``/dev/vda``).
        kernel_release: what ``uname -r`` says.
    """

    digest: str
    kernel: Path
    initrd: Path
    root: Path
    kernel_release: str


@dataclass(frozen=True)
class Image:
    """What the workload sees as its root file system.

    Attributes:
        digest: SHA-256 of ``root``, in hex.
        name: what people call it.
        root: a squashfs.
    """

    digest: str
    name: str
    root: Path


class ImageStore:
    """All runtimes and images of one home.

    ::

        store = ImageStore(Home.find())
        runtime = store.find_runtime() or store.build_runtime(print)
        image = store.build_image("debian", print)

    Args:
        home: where they are kept.
        mirror: address of a Debian archive; from the host's apt sources otherwise.
    """

    def __init__(self, home: Home, *, mirror: str | None = None) -> None:
        self._runtimes = Shelf(home.runtimes)
        self._images = Shelf(home.images)
        self._cache = home.data / "cache"
        self._mirror = mirror

    def find_runtime(self) -> Runtime | None:
        """Return the runtime of our present sources and the recorded packages, if it is built.

        Fast and offline.
        """
        packages = self._recorded_packages()
        if packages is None:
            return None
        key = _present_key(tuple(packages))
        return self._runtime(key, packages) if self._runtimes.has(key) else None

    def build_runtime(self, progress: Callable[[str], None]) -> Runtime:
        """Return the runtime, after building it where it is missing or damaged.

        Args:
            progress: called with one line a step.

        Raises:
            SetupError: the host lacks something.
        """
        with self._runtimes.locked("runtime", progress):
            found = self.find_runtime()
            if found is not None and self._sound(found, progress):
                return found
            packages = self._fetched_packages(progress)
            sources = runtime.guest_sources()
            key = runtime.key(packages, sources)
            archive = self._archive(runtime.SUITE)
            with self._runtimes.staging() as folder:
                debs = [archive.path(package) for package in packages]
                out = runtime.assemble(folder, debs, sources, progress)
                manifest = Manifest(_records(out), {package.name: package.version for package in packages})
                with self._runtimes.guarded():
                    self._runtimes.publish(out, key, manifest)
            progress(f"runtime: {_sizes(manifest)}")
            return self._runtime(key, packages)

    def find_image(self, name: str) -> Image:
        """Return the image of that name.

        Raises:
            NotFoundError: there is neither an image nor a recipe of that name, or it is not built yet.
        """
        names = self._names()
        if name in names:
            return self._image(name, names[name]["image"])
        if name in recipe.names():
            raise NotFoundError(f"the image {name!r} is not built yet", hint="run 'fireclaw setup'")
        raise NotFoundError.named("image", name, {*names, *recipe.names()})

    def build_image(self, name: str, progress: Callable[[str], None]) -> Image:
        """Return the image of a recipe, after building it where it is missing, damaged or of an older recipe.

        Args:
            name: of the recipe.
            progress: called with one line a step.

        Raises:
            NotFoundError: there is no such recipe.
            SetupError: the host lacks something.
        """
        wanted = recipe.Recipe.find(name)
        with self._images.locked(name, progress):
            entry = self._names().get(name)
            if entry is not None and entry["recipe"] == debian.key(wanted):
                found = self._image(name, entry["image"])
                if self._sound(found, progress):
                    return found
            with self._images.staging() as folder:
                downloads = self._cache / f"image-{name}"
                out, versions = debian.build(wanted, self._archive(wanted.suite), folder, downloads, progress)
                manifest = Manifest(_records(out), versions)
                digest = manifest.files[debian.ROOT_FILE].sha256
                with self._images.guarded():
                    self._images.publish(out, digest, manifest)
                    names = self._names() | {name: {"recipe": debian.key(wanted), "image": digest}}
                    self._images.write(_NAMES, names)
            progress(f"image {name}: {len(versions)} packages, {_sizes(manifest)}")
            return self._image(name, digest)

    def images(self) -> list[Image]:
        """Return all images that have a name, by name."""
        return [self._image(name, entry["image"]) for name, entry in sorted(self._names().items())]

    def verify(self, thing: Runtime | Image, *, full: bool = False) -> None:
        """Check that the files are there in the right size; with ``full`` read and digest them.

        Raises:
            CorruptError: they are not what was built; the hint says how to mend that.
        """
        if isinstance(thing, Runtime):
            self._runtimes.verify("the runtime", thing.digest, full=full)
        else:
            self._images.verify(f"the image {thing.name!r}", thing.digest, full=full)

    def prune(self, keep: Collection[str] = ()) -> list[str]:
        """Remove what killed builders left, and runtimes and images that newer ones replaced.

        Args:
            keep: digests of replaced ones that somebody still uses.

        Returns:
            The names of the folders that went.
        """

        def runtimes() -> set[str]:
            current = self.find_runtime()
            return {*keep, current.digest} if current is not None else {*keep}

        def images() -> set[str]:
            return {*keep, *(image.digest for image in self.images())}

        return self._runtimes.prune(runtimes) + self._images.prune(images)

    def _runtime(self, key: str, packages: Sequence[Package]) -> Runtime:
        folder = self._runtimes.folder(key)
        return Runtime(
            digest=key,
            kernel=folder / runtime.KERNEL_FILE,
            initrd=folder / runtime.INITRD_FILE,
            root=folder / runtime.ROOT_FILE,
            kernel_release=runtime.kernel_release(packages),
        )

    def _image(self, name: str, digest: str) -> Image:
        return Image(digest, name, self._images.folder(digest) / debian.ROOT_FILE)

    def _archive(self, suite: str) -> Archive:
        return Archive(self._cache, suite, self._mirror)

    def _sound(self, thing: Runtime | Image, progress: Callable[[str], None]) -> bool:
        try:
            self.verify(thing, full=True)
        except CorruptError as error:
            progress(f"{error.message}; building it anew")
            return False
        return True

    def _fetched_packages(self, progress: Callable[[str], None]) -> list[Package]:
        """Return the runtime's packages, all of them in the cache, after recording them.

        Recorded ones are used as long as the cache has them all, so that a rebuild after an edit of guestd is
        quick and offline; what is lost is replaced by the newest set, for a mirror keeps no older ones.
        """
        archive = self._archive(runtime.SUITE)
        recorded = self._recorded_packages()
        if recorded is not None and not archive.missing(recorded):
            return recorded
        progress(f"runtime: reading the package lists of Debian {runtime.SUITE}")
        archive.update()
        packages = runtime.resolve(archive)
        for package in archive.missing(packages):
            progress(f"runtime: fetching {package.name} {package.version}, {_megabytes(package.size)}")
            archive.fetch(package)
        record = {"builder": runtime.BUILDER_VERSION, "packages": [asdict(package) for package in packages]}
        self._runtimes.write(_PACKAGES, record)
        archive.keep_only(packages)
        return packages

    def _recorded_packages(self) -> list[Package] | None:
        """Return the recorded package set, if this version of the builder chose it."""
        record = self._runtimes.read(_PACKAGES)
        if record is None or record.get("builder") != runtime.BUILDER_VERSION:
            return None
        return [Package(**row) for row in record["packages"]]

    def _names(self) -> dict[str, dict[str, str]]:
        names: dict[str, dict[str, str]] = self._images.read(_NAMES) or {}
        return names


@cache
def _present_key(packages: tuple[Package, ...]) -> str:
    """The key of the runtime made of these packages and the sources that this process runs on; each clone asks."""
    return runtime.key(packages, runtime.guest_sources())


def _records(folder: Path) -> dict[str, FileRecord]:
    return {path.name: FileRecord.of(path) for path in sorted(folder.iterdir())}


def _sizes(manifest: Manifest) -> str:
    return ", ".join(f"{name} {_megabytes(record.size)}" for name, record in manifest.files.items())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
