"""Linux calls that Python 3.11 has no name for, by ctypes; section 2 of the manual has them. Numbers are x86-64's."""

from __future__ import annotations

import ctypes
import fcntl
import os

CLONE_FS = 0x200
CLONE_NEWNS = 0x20000
CLONE_NEWUTS = 0x0400_0000
CLONE_NEWIPC = 0x0800_0000
CLONE_NEWPID = 0x2000_0000
CLONE_NEWNET = 0x4000_0000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
RB_AUTOBOOT = 0x0123_4567

_SYS_SETGROUPS = 116
_SYS_SETRESUID = 117
_SYS_SETRESGID = 119
_SYS_PIVOT_ROOT = 155
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429

_AT_FDCWD = -100
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_FIFREEZE = 0xC004_5877  # include/uapi/linux/fs.h

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source: str, target: str, kind: str | None, flags: int = 0, data: str = "") -> None:
    """Attach a file system."""
    result = _libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )
    _check(result, f"mount {source} on {target}")


def umount(target: str, flags: int = 0) -> None:
    """Detach a file system."""
    _check(_libc.umount2(target.encode(), flags), f"umount {target}")


def copy_mount(folder: str) -> int:
    """Return a descriptor of another mount of what is mounted there; it is gone with it unless it gets a place."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    return _check(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, folder.encode(), flags), f"open_tree {folder}")


def place_mount(fd: int, target: str) -> None:
    """Give the mount of ``copy_mount`` a place, in the mount namespace of the caller."""
    result = _libc.syscall(_SYS_MOVE_MOUNT, fd, b"", _AT_FDCWD, target.encode(), _MOVE_MOUNT_F_EMPTY_PATH)
    _check(result, f"move_mount to {target}")


def freeze(folder: str) -> None:
    """Write a file system to its drive in full, as an unmount would, and hold back whoever would change it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _FIFREEZE, 0)
    finally:
        os.close(fd)


def pivot_root_here() -> None:
    """Make the current folder the root.

    The old root then lies on top of it: detach it with ``umount(".", MNT_DETACH)``.
    """
    _check(_libc.syscall(_SYS_PIVOT_ROOT, b".", b"."), "pivot_root")


def unshare(flags: int) -> None:
    """Leave namespaces that are shared with others."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, kind: int) -> None:
    """Enter a namespace, for the calling thread."""
    _check(_libc.setns(fd, kind), "setns")


def sethostname(name: str) -> None:
    """Name the host, in the calling thread's UTS namespace."""
    encoded = name.encode()
    _check(_libc.sethostname(encoded, len(encoded)), "sethostname")


def reboot() -> None:
    """End the machine: the VMM was told to end on it."""
    _check(_libc.reboot(RB_AUTOBOOT), "reboot")


def drop_bounding_set() -> None:
    """Empty the calling thread's capability bounding set, for itself and all that it starts."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        last = int(file.read())
    for capability in range(last + 1):
        _check(_libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0), "drop capability")


def set_no_new_privs() -> None:
    """No setuid program gives anything to the calling thread or to what it starts."""
    _check(_libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def become(uid: int, gid: int) -> None:
    """Take real and effective ids in the calling thread alone (glibc's wrappers change all threads).

    The saved ids stay 0, so ``become_root`` can undo it; an exec copies the effective ids over them.
    """
    _check(_libc.syscall(_SYS_SETGROUPS, 0, None), "setgroups")
    _check(_libc.syscall(_SYS_SETRESGID, gid, gid, 0), "setresgid")
    _check(_libc.syscall(_SYS_SETRESUID, uid, uid, 0), "setresuid")


def become_root() -> None:
    """Undo ``become``."""
    _check(_libc.syscall(_SYS_SETRESUID, 0, 0, 0), "setresuid")
    _check(_libc.syscall(_SYS_SETRESGID, 0, 0, 0), "setresgid")
