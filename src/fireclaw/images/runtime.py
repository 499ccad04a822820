"""Assembling the runtime: kernel, initrd, and the small root file system with Python and guestd.

Nothing is installed and nothing of the packages runs, except the Python that compiles its own library, started
through its own loader. So it needs no root rights, works on any x86-64 host, and equal inputs make equal bytes.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tarfile
from importlib.resources import as_file, files
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from fireclaw.errors import SetupError
from fireclaw.images import initrd, modules, squashfs
from fireclaw.images.kernel import extract_vmlinux
from fireclaw.images.tool import reading, run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from fireclaw.images.archive import Archive, Package

SUITE = "bookworm"
"""The runtime's own Debian suite, whatever the host runs."""

BUILDER_VERSION = 2
"""Part of the key: raise it when other packages are wanted, or something else is made of the same ones."""

PACKAGES = (
    "busybox-static",
    "libc6",
    "libexpat1",
    "libffi8",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "python3.11-minimal",
    "zlib1g",
)
KERNEL = "linux-image-cloud-amd64"
"""The package that depends on the newest kernel."""

KERNEL_FILE, INITRD_FILE, ROOT_FILE = "vmlinux", "initrd.cpio", "root.squashfs"

_PYTHON = PurePosixPath("usr/lib/python3.11")
_LIBRARIES = PurePosixPath("usr/lib/x86_64-linux-gnu")
_LOADER = PurePosixPath("usr/lib64/ld-linux-x86-64.so.2")
_PROGRAMS = (PurePosixPath("usr/bin/busybox"), PurePosixPath("usr/bin/python3.11"))
_GUEST = PurePosixPath("usr/lib/fireclaw")
_MOUNT_POINTS = ("dev", "mnt", "proc", "run", "sys", "tmp")
_MERGED = ("bin", "lib", "lib64", "sbin")

# Of the standard library: what needs a terminal, a C compiler or a library that is not here, and tests.
_DROPPED_PACKAGES = {
    "__phello__",
    "config-3.11-x86_64-linux-gnu",
    "curses",
    "dbm",
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "sitecustomize.py",
    "sqlite3",
    "test",
    "tkinter",
    "turtledemo",
    "venv",
}
_DROPPED_EXTENSIONS = re.compile(
    r"(_bz2|_codecs_\w+|_crypt|_ctypes_test|_curses\w*|_dbm|_gdbm|_hashlib|_lzma|_sqlite3|_ssl|_test\w*|_tkinter"
    r"|_uuid|_xx\w*|nis|ossaudiodev|readline|xx\w*)\."
)

_START = """\
import sys

sys.path.insert(0, "/usr/lib/fireclaw")

from fireclaw.guest.init import main

main()
"""


def guest_sources() -> dict[str, bytes]:
    """Return our own part of the runtime: path below /usr/lib/fireclaw to contents, sorted by path."""
    sources = {"guestd.py": _START.encode(), "fireclaw/__init__.py": b""}
    with as_file(files("fireclaw")) as package:
        for room in ("guest", "wire"):
            for path in (package / room).rglob("*.py"):
                sources[f"fireclaw/{path.relative_to(package).as_posix()}"] = path.read_bytes()
    return dict(sorted(sources.items()))


def key(packages: Iterable[Package], sources: Mapping[str, bytes]) -> str:
    """Return the runtime's digest: a SHA-256 over everything that goes in."""
    digest = hashlib.sha256(f"builder {BUILDER_VERSION}\n".encode())
    for package in packages:
        digest.update(f"{package.name} {package.version} {package.sha256}\n".encode())
    for path, data in sources.items():
        digest.update(f"{path} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def resolve(archive: Archive) -> list[Package]:
    """Return the newest packages of the runtime; the kernel is the last."""
    *packages, meta = archive.find([*PACKAGES, KERNEL])
    kernel = re.search(r"linux-image-\d\S*-cloud-amd64", meta.depends)
    if kernel is None:
        raise SetupError(f"the package {KERNEL!r} names no kernel: it depends on {meta.depends!r}")
    return [*packages, *archive.find([kernel.group()])]


def assemble(folder: Path, debs: Sequence[Path], sources: Mapping[str, bytes], progress: Callable[[str], None]) -> Path:
    """Build the runtime's files.

    Args:
        folder: an empty folder on the target's file system.
        debs: the packages of ``resolve``, in its order.
        sources: from ``guest_sources``.
        progress: told about each step.

    Returns:
        The folder with the three files.

    Raises:
        SetupError: a program is missing or failed.
        CorruptError: the kernel package does not hold what it should, or no kernel that VMMs can start.
    """
    root, kernel, out = folder / "root", folder / "kernel", folder / "out"
    out.mkdir()
    *user_land, kernel_deb = debs
    _skeleton(root)
    for deb in user_land:
        _unpack(deb, root, _in_root)
    _unpack(kernel_deb, kernel, _in_kernel)
    progress(f"runtime: unpacked {len(debs)} packages")
    _add_guest(root, sources)
    _compile(root)
    _settle_modes(root)
    progress("runtime: compiled the Python library")
    _boot_files(root, kernel, out)
    squashfs.pack_folder(root, out / ROOT_FILE)
    return out


def kernel_release(packages: Sequence[Package]) -> str:
    """Return what ``uname -r`` will say, e.g. ``6.1.0-56-cloud-amd64``."""
    return packages[-1].name.removeprefix("linux-image-")


def _skeleton(root: Path) -> None:
    """Make mount points and the merged /usr."""
    for name in (*_MOUNT_POINTS, *(f"usr/{name}" for name in _MERGED)):
        (root / name).mkdir(parents=True)
    for name in _MERGED:
        (root / name).symlink_to(f"usr/{name}")


def _in_root(path: PurePosixPath) -> bool:
    """Whether the runtime's root keeps this file of a package."""
    if path in _PROGRAMS or path == _LOADER:
        return True
    if path.parent == _LIBRARIES:
        return ".so" in path.name
    if not path.is_relative_to(_PYTHON):
        return False
    top = path.relative_to(_PYTHON).parts[0]
    if top == "lib-dynload":
        return _DROPPED_EXTENSIONS.match(path.name) is None
    return top not in _DROPPED_PACKAGES


def _in_kernel(path: PurePosixPath) -> bool:
    return path.name.startswith("vmlinuz-") or path.suffix == ".ko"


def _unpack(deb: Path, root: Path, wanted: Callable[[PurePosixPath], bool]) -> None:
    """Extract the wanted files of a package, with /bin, /lib and /sbin merged into /usr."""
    with reading(["dpkg-deb", "--fsys-tarfile", deb]) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            path = _merged(member.name)
            if not member.isdir() and wanted(path):
                _extract(archive, member, root / path)


def _merged(name: str) -> PurePosixPath:
    path = PurePosixPath("/", name).relative_to("/")
    assert ".." not in path.parts
    return PurePosixPath("usr", path) if path.parts and path.parts[0] in _MERGED else path


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if member.issym():
        target.symlink_to(member.linkname)
        return
    source = archive.extractfile(member)
    assert source is not None
    with source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
    target.chmod(member.mode)


def _add_guest(root: Path, sources: Mapping[str, bytes]) -> None:
    for path, data in sources.items():
        target = root / _GUEST / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def _compile(root: Path) -> None:
    """Replace every .py file by its bytecode, made by the runtime's own Python.

    Bytecode of one version is no use to another, and the host's Python may be any. "unchecked-hash" leaves out
    the source's time, and the hash seed fixes the order of sets in constants: equal sources make equal bytes.
    """
    python: list[str | Path] = [root / _LOADER, "--library-path", root / _LIBRARIES, root / "usr/bin/python3.11", "-S"]
    options: list[str | Path] = ["-q", "-b", "--invalidation-mode", "unchecked-hash", "-s", root, "-p", "/"]
    run(
        [*python, "-m", "compileall", *options, root / _PYTHON, root / _GUEST],
        env={"PYTHONHOME": str(root / "usr"), "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
    )
    for folder in (_PYTHON, _GUEST):
        for path in (root / folder).rglob("*.py"):
            path.unlink()


def _settle_modes(root: Path) -> None:
    """Make modes independent of the umask: everybody reads, nobody but root writes."""
    for path in (root, *root.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def _boot_files(root: Path, kernel: Path, out: Path) -> None:
    (image,) = (kernel / "boot").iterdir()
    (out / KERNEL_FILE).write_bytes(extract_vmlinux(image.read_bytes()))
    order = modules.load_order(kernel, initrd.MODULES)
    busybox = (root / "usr/bin/busybox").read_bytes()
    (out / INITRD_FILE).write_bytes(initrd.build(busybox, [(path.name, path.read_bytes()) for path in order]))
