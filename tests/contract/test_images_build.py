"""The real builds: what is in the runtime and in the debian image, and what a crash leaves.

The first run downloads 80 MB and takes a minute; later ones find the results in the shared home.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from images_home import shared_home

from fireclaw.errors import SetupError
from fireclaw.images import Image, ImageStore, Runtime, runtime
from fireclaw.images.kernel import extract_vmlinux
from fireclaw.paths import Home

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.timeout(600)

BUILDER = """
import sys
from pathlib import Path
from fireclaw.images import ImageStore
from fireclaw.paths import Home
home = Path(sys.argv[1])
found = ImageStore(Home(home, home / "run", home)).build_runtime(lambda line: print(line, flush=True))
print("digest", found.digest)
"""

IMPORTS = """
import importlib, pkgutil, sys
import asyncio, ctypes, hashlib, json, logging, selectors, socket, struct, subprocess, tarfile, zlib
extensions = next(path for path in sys.path if path.endswith("lib-dynload"))
for module in pkgutil.iter_modules([extensions]):
    importlib.import_module(module.name)
print(hashlib.sha256(zlib.compress(b"x")).hexdigest(), ctypes.CDLL(None).getpid())
"""


@pytest.fixture(scope="module")
def store() -> ImageStore:
    """The store of the shared home."""
    return ImageStore(shared_home())


@pytest.fixture(scope="module")
def built(store: ImageStore) -> Runtime:
    """The real runtime."""
    return store.build_runtime(print)


@pytest.fixture(scope="module")
def debian(store: ImageStore) -> Image:
    """The real debian image."""
    return store.build_image("debian", print)


@pytest.fixture
def offline_home(tmp_path: Path, built: Runtime) -> Path:
    """A new home that has the downloaded packages of the shared one, and no mirror."""
    assert built.root.exists()
    shared = shared_home()
    (tmp_path / "cache").symlink_to(shared.data / "cache")
    (tmp_path / "runtimes").mkdir()
    (tmp_path / "runtimes/packages.json").write_bytes((shared.runtimes / "packages.json").read_bytes())
    return tmp_path


def listing(squashfs: Path) -> dict[str, str]:
    """Return path to "mode owner" of everything in a squashfs."""
    lines = subprocess.check_output(["unsquashfs", "-lln", squashfs], text=True).splitlines()
    rows = (line.split(maxsplit=5) for line in lines)
    return {row[-1].split(" -> ")[0].removeprefix("squashfs-root"): f"{row[0]} {row[1]}" for row in rows}


def contents(squashfs: Path, path: str) -> str:
    """Return the text of one file in a squashfs."""
    return subprocess.check_output(["unsquashfs", "-cat", squashfs, path], text=True)


def cpio_entries(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Read a newc archive: name to mode and data."""
    entries, offset, name = {}, 0, ""
    while name != "TRAILER!!!":
        assert data[offset : offset + 6] == b"070701"
        fields = [int(data[offset + 6 + 8 * i :][:8], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[offset + 110 : offset + 110 + name_size - 1].decode()
        start = (offset + 110 + name_size + 3) // 4 * 4
        entries[name] = mode, data[start : start + size]
        offset = (start + size + 3) // 4 * 4
    return entries


def start_builder(home: Path) -> subprocess.Popen[str]:
    """Start a process that builds the runtime and prints its progress."""
    argv = [sys.executable, "-c", BUILDER, str(home)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)


def manifest(found: Runtime) -> object:
    """Return what the builder wrote down: sizes and digests of all files."""
    return json.loads((found.root.parent / "manifest.json").read_bytes())


def test_the_runtime_has_guestd_as_bytecode_only(built: Runtime) -> None:
    """Every source of ours is there, compiled; no .py file and no cache folder is left."""
    paths = listing(built.root)

    assert {f"/usr/lib/fireclaw/{path}c" for path in runtime.guest_sources()} <= set(paths)
    assert [path for path in paths if path.endswith(".py") or "__pycache__" in path] == []


def test_the_runtime_belongs_to_root_and_nobody_else_may_write(built: Runtime) -> None:
    """Whatever the umask of the builder was."""
    rows = {path: row for path, row in listing(built.root).items() if row[0] != "l"}

    assert {row.split()[1] for row in rows.values()} == {"0/0"}
    assert {row.split()[0] for row in rows.values()} == {"drwxr-xr-x", "-rwxr-xr-x", "-rw-r--r--"}


def test_the_runtime_has_its_mount_points_and_a_merged_usr(built: Runtime) -> None:
    """The root has where to mount, and the links that programs expect."""
    paths = listing(built.root)

    assert {"/dev", "/mnt", "/proc", "/run", "/sys", "/tmp"} <= set(paths)
    assert all(paths[link][0] == "l" for link in ("/bin", "/lib", "/lib64", "/sbin"))


def test_the_runtimes_python_can_import_what_it_has(built: Runtime, tmp_path: Path) -> None:
    """No extension is left whose library is not there, and what guestd may need works."""
    root = tmp_path / "root"
    subprocess.run(["unsquashfs", "-quiet", "-no-progress", "-d", root, built.root], check=True)
    library = root / "usr/lib/x86_64-linux-gnu"
    loader: list[str | Path] = [
        root / "usr/lib64/ld-linux-x86-64.so.2",
        "--library-path",
        library,
        root / "usr/bin/python3.11",
    ]

    argv = [*loader, "-S", "-c", IMPORTS]
    said = subprocess.check_output(argv, env={"PYTHONHOME": str(root / "usr")}, text=True)
    assert len(said.split()[0]) == 64


def test_the_initrd_has_busybox_and_modules_of_its_kernel(built: Runtime) -> None:
    """The initrd is a cpio with a program to start, and modules made for the kernel beside it."""
    entries = cpio_entries(built.initrd.read_bytes())
    modules = {name: data for name, (_, data) in entries.items() if name.endswith(".ko")}

    assert entries["init"][0] == stat.S_IFREG | 0o755
    assert entries["bin/busybox"][1].startswith(b"\x7fELF")
    wanted = {"virtio_blk", "virtio_console", "virtio_mmio", "virtio_ring", "squashfs", "overlay"}
    wanted |= {"vsock", "vmw_vsock_virtio_transport", "vmw_vsock_virtio_transport_common"}
    assert {f"modules/{name}.ko" for name in wanted} <= set(modules)
    assert "modules/vsock_loopback.ko" not in modules  # or commands in the guest could connect to guestd
    assert all(f"vermagic={built.kernel_release} ".encode() in data for data in modules.values())


def test_the_kernel_is_uncompressed_and_of_that_release(built: Runtime) -> None:
    """The kernel file is what Firecracker takes: ELF, with a PVH entry; it names its release."""
    kernel = built.kernel.read_bytes()

    assert built.kernel.name == "vmlinux"
    assert extract_vmlinux(kernel) == kernel
    assert f"Linux version {built.kernel_release} ".encode() in kernel


def test_two_builders_at_once_make_one_runtime(built: Runtime, offline_home: Path) -> None:
    """The second waits and finds the first one's result, which has the same bytes as any other build of it."""
    with start_builder(offline_home) as first, start_builder(offline_home) as second:
        said = [builder.communicate()[0].splitlines() for builder in (first, second)]

    assert [lines[-1] for lines in said] == [f"digest {built.digest}"] * 2
    assert ["runtime: somebody else is making it, waiting", f"digest {built.digest}"] in said
    found = ImageStore(Home(offline_home, offline_home, offline_home)).find_runtime()
    assert found is not None
    assert manifest(found) == manifest(built)


def test_a_killed_build_is_pruned_and_done_again(built: Runtime, offline_home: Path) -> None:
    """A kill -9 in the middle leaves a folder that prune removes, and the next build works."""
    with start_builder(offline_home) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline().startswith("runtime: unpacked")
        builder.kill()
    store = ImageStore(Home(offline_home, offline_home, offline_home))

    assert store.find_runtime() is None
    (leftover,) = store.prune()
    assert leftover.startswith("tmp-")
    found = store.build_runtime(print)
    assert found.digest == built.digest
    assert store.prune() == []

    found.root.chmod(0o644)
    os.truncate(found.root, 1000)
    said: list[str] = []
    store.build_runtime(said.append)
    size = built.root.stat().st_size
    assert said[0] == f"the runtime is truncated: 'root.squashfs' has 1000 of {size} bytes; building it anew"
    store.verify(found, full=True)


def test_an_archive_out_of_reach_says_what_to_do(tmp_path: Path) -> None:
    """Without a network both builds name what they could not fetch and the next step, and leave nothing."""
    home = Home(tmp_path, tmp_path / "run", tmp_path)
    store = ImageStore(home, mirror="http://127.0.0.1:1/debian")

    with pytest.raises(SetupError, match=r"Failed to fetch http://127\.0\.0\.1:1/debian.*whether the network is up"):
        store.build_runtime(print)
    with pytest.raises(SetupError, match=r"Failed to fetch http://127\.0\.0\.1:1/debian.*whether the network is up"):
        store.build_image("debian", print)
    assert store.prune() == []
    assert [*home.images.glob("tmp-*"), *home.runtimes.glob("tmp-*")] == []


def test_the_debian_image_has_the_agents_user(debian: Image) -> None:
    """The agent is uid 1000 with a shell and a home of its own."""
    assert "agent:x:1000:1000::/home/agent:/bin/bash" in contents(debian.root, "etc/passwd").splitlines()
    assert listing(debian.root)["/home/agent"].endswith(" 1000/1000")


def test_the_debian_image_has_nothing_of_its_builder(debian: Image) -> None:
    """No name, resolver, id, key, package list or download of the host is in it, and localhost works."""
    paths = listing(debian.root)

    assert contents(debian.root, "etc/hostname") == "localhost\n"
    assert contents(debian.root, "etc/hosts") == "127.0.0.1 localhost\n::1 localhost\n"
    assert contents(debian.root, "etc/machine-id") == contents(debian.root, "etc/resolv.conf") == ""
    assert "@" not in contents(debian.root, "etc/apt/sources.list")
    assert [path for path in paths if path.startswith("/etc/ssh/")] == []
    assert [path for path in paths if path.endswith((".deb", "_Packages", "99mmdebstrap")) and "apt" in path] == []


def test_the_debian_image_is_a_whole_root(debian: Image, store: ImageStore) -> None:
    """It has mount points and a root folder that only root may write, few packages, and its digest is its name."""
    paths = listing(debian.root)

    assert paths[""] == "drwxr-xr-x 0/0"
    assert {"/dev", "/home", "/proc", "/run", "/sys", "/tmp", "/usr/bin/bash", "/usr/bin/ps"} <= set(paths)
    assert "/usr/share/perl/5.36.0" not in paths
    assert debian.root.stat().st_size < 60e6
    store.verify(debian, full=True)
