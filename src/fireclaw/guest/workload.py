"""The world in which commands run: its own namespaces over the image, made once at boot.

guestd forks twice; the grandchild becomes the workload's PID 1 in new mount, PID, UTS, IPC and network namespaces.
Its root is an overlay of the read-only image and a tmpfs. Nothing of the runtime can be seen from inside, and an
image without Python or with a broken libc works just as well. The workspace comes with the identity: it is a clone's
own, and what the clone was made from must not have had it in use.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import sys
import traceback
from typing import TYPE_CHECKING

from fireclaw.guest import linux

if TYPE_CHECKING:
    from collections.abc import Callable

IMAGE_DEVICE = "/dev/vdb"
WORKSPACE_DEVICE = "/dev/vdc"
WORKSPACE = "/workspace"
_BASE = "/run/workload"  # outside: lower (image), upper tmpfs, workspace, and the identity files
_OUTSIDE_WORKSPACE = f"{_BASE}/workspace"
IDENTITY_FILES = ("hostname", "hosts", "machine-id")

_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1
_NAMESPACES = (
    # PID first: it counts for what the thread starts from then on. The mount namespace last: it changes paths.
    ("pid", linux.CLONE_NEWPID),
    ("uts", linux.CLONE_NEWUTS),
    ("ipc", linux.CLONE_NEWIPC),
    ("net", linux.CLONE_NEWNET),
    ("mnt", linux.CLONE_NEWNS),
)


def identity_path(name: str) -> str:
    """Where guestd writes an identity file; inside it is bound over /etc/<name>."""
    return f"{_BASE}/{name}"


class Workload:
    """The namespaces, kept open.

    Attributes:
        pid: the workload's PID 1, as guestd numbers it.
    """

    def __init__(self) -> None:
        self._has_workspace = False
        # PID 1 shares its root with the kernel's threads, and who shares it may not enter another mount namespace.
        linux.unshare(linux.CLONE_FS)
        _prepare()
        self.pid = _fork_init()
        self._inside = {kind: os.open(f"/proc/{self.pid}/ns/{name}", os.O_RDONLY) for name, kind in _NAMESPACES}
        self._outside = {kind: os.open(f"/proc/self/ns/{name}", os.O_RDONLY) for name, kind in _NAMESPACES}

    def enter(self) -> None:
        """Move the calling thread into the namespaces; what it starts is inside, too."""
        linux.unshare(linux.CLONE_FS)  # a thread that shares its root with others may not enter
        for kind, fd in self._inside.items():
            linux.setns(fd, kind)

    def enter_confined(self) -> None:
        """Do ``enter``, and give up for good what only a privileged command needs."""
        linux.drop_bounding_set()
        linux.set_no_new_privs()
        self.enter()

    def set_hostname(self, name: str) -> None:
        """Name the workload's UTS namespace."""
        self._visit(linux.CLONE_NEWUTS, lambda: linux.sethostname(name))

    def mount_workspace(self) -> None:
        """Mount the workspace drive where commands see it, unless a machine that was asleep has it there already.

        Raises:
            OSError: there is no such drive, or no file system on it.
        """
        if self._has_workspace:
            return
        linux.mount(WORKSPACE_DEVICE, _OUTSIDE_WORKSPACE, "ext4", linux.MS_NOSUID | linux.MS_NODEV)
        mount = linux.copy_mount(_OUTSIDE_WORKSPACE)
        try:
            self._visit(linux.CLONE_NEWNS, lambda: _place_workspace(mount))
        finally:
            os.close(mount)
        self._has_workspace = True

    def seal_workspace(self) -> None:
        """Leave the workspace on its drive as an unmount would, although commands may hold files of it open."""
        if self._has_workspace:
            linux.freeze(_OUTSIDE_WORKSPACE)

    def _visit(self, kind: int, action: Callable[[], None]) -> None:
        """Do something in one of the namespaces. In there it must import nothing: guestd's own files are outside."""
        linux.setns(self._inside[kind], kind)
        try:
            action()
        finally:
            linux.setns(self._outside[kind], kind)


def _prepare() -> None:
    """Mount the overlay, outside the namespaces."""
    os.mkdir(_BASE)
    linux.mount("tmpfs", _BASE, "tmpfs", 0, "size=75%,mode=755")
    for name in ("lower", "upper", "work", "root", "workspace"):
        os.mkdir(f"{_BASE}/{name}")
    linux.mount(IMAGE_DEVICE, f"{_BASE}/lower", "squashfs", linux.MS_RDONLY)
    linux.mount(
        "overlay",
        f"{_BASE}/root",
        "overlay",
        0,
        f"lowerdir={_BASE}/lower,upperdir={_BASE}/upper,workdir={_BASE}/work",
    )
    for name in IDENTITY_FILES:
        _touch(identity_path(name))


def _fork_init() -> int:
    """Start the workload's PID 1 and wait until its world stands; return its pid."""
    read, write = os.pipe()
    middle = os.fork()
    if middle == 0:
        try:
            linux.unshare(linux.CLONE_NEWPID)
            pid = os.fork()
            if pid == 0:
                _run_init(write)
            os.write(write, b"%d\n" % pid)
        except BaseException:  # noqa: BLE001 - a forked child must never return into its parent's code
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(middle, 0)
    report = b""
    while chunk := os.read(read, 64):
        report += chunk
    os.close(read)
    # The middle process writes the pid, PID 1 writes "ready"; either may come first.
    if b"ready" not in report:
        raise RuntimeError("the workload's first process failed")
    return int(report.replace(b"ready", b""))


def _run_init(report: int) -> None:
    try:
        os.setsid()
        linux.unshare(linux.CLONE_NEWNS | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC | linux.CLONE_NEWNET)
        linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
        _loopback_up()
        _build_root(f"{_BASE}/root")
        null = os.open("/dev/null", os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)  # the workload's PID 1 must not hold the console
        os.write(report, b"ready")
        os.closerange(3, 4096)
        _reap_forever()
    except BaseException:  # noqa: BLE001 - a forked child must never return into its parent's code
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def _build_root(root: str) -> None:
    """Mount what a user land expects, and make ``root`` the root."""
    os.chdir(root)
    for name in ("proc", "sys", "dev", "tmp", "run", "etc"):
        if not os.path.isdir(name):
            os.mkdir(name)
    guarded = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    linux.mount("proc", "proc", "proc", guarded)
    linux.mount("sysfs", "sys", "sysfs", guarded | linux.MS_RDONLY)
    linux.mount("tmpfs", "dev", "tmpfs", linux.MS_NOSUID, "mode=755,size=64k")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        _touch(f"dev/{name}")
        linux.mount(f"/dev/{name}", f"dev/{name}", None, linux.MS_BIND)
    os.mkdir("dev/pts")
    os.mkdir("dev/shm")
    options = "newinstance,ptmxmode=0666,mode=620,gid=5"
    linux.mount("devpts", "dev/pts", "devpts", linux.MS_NOSUID | linux.MS_NOEXEC, options)
    os.symlink("pts/ptmx", "dev/ptmx")
    os.symlink("/proc/self/fd", "dev/fd")
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{fd}", f"dev/{name}")
    private = linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("tmpfs", "dev/shm", "tmpfs", private, "mode=1777")
    linux.mount("tmpfs", "tmp", "tmpfs", private, "mode=1777")
    linux.mount("tmpfs", "run", "tmpfs", private, "mode=755")
    for name in IDENTITY_FILES:
        if not os.path.isfile(f"etc/{name}"):
            _touch(f"etc/{name}")
        # A bound tmpfs file: an identity is then three plain writes, without a copy-up through the overlay.
        linux.mount(identity_path(name), f"etc/{name}", None, linux.MS_BIND)
    linux.pivot_root_here()
    linux.umount(".", linux.MNT_DETACH)
    os.chdir("/")


def _place_workspace(mount: int) -> None:
    """Mount the workspace, in the workload's mount namespace."""
    if not os.path.isdir(WORKSPACE):
        os.mkdir(WORKSPACE)
    linux.place_mount(mount, WORKSPACE)


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_NOFOLLOW, 0o644))


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))


def _reap_forever() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    while True:
        signal.sigwait({signal.SIGCHLD})
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            continue
