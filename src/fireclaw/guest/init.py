"""guestd's main program: PID 1 of the machine.

It mounts the kernel's file systems, makes the workload, opens the channel to the host and then serves it until the
machine ends. It must never exit: the kernel panics when PID 1 does, and the VMM ends with it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import time
from typing import Any

from fireclaw.guest import linux
from fireclaw.guest.identity import take_identity
from fireclaw.guest.listener import Listener, listen_vsock
from fireclaw.guest.loop import Loop
from fireclaw.guest.port import Port
from fireclaw.guest.spawner import Spawner
from fireclaw.guest.workload import Workload
from fireclaw.wire.hello import PORT_NAME, VSOCK_PORT

_VSOCK = "fireclaw.channel=vsock"  # on the kernel's command line; without it the channel is a virtio port
_PORTS = "/sys/class/virtio-ports"
_COLLECT_EVERY = 20_000  # objects: some hundred commands
# A session's 256 commands have six each; what they start inherits the same as on other systems.
_DESCRIPTORS = (4096, 524_288)
_MEMORY_FIELDS = ("MemTotal", "MemFree", "MemAvailable")


class Guest:
    """Everything a session may use (see ``fireclaw.guest.session.Host``)."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self._boot = {"start": time.clock_gettime(time.CLOCK_BOOTTIME)}
        self._workload = Workload()
        self._boot["workload"] = time.clock_gettime(time.CLOCK_BOOTTIME)
        self._spawner = Spawner(loop, self._workload.enter)
        self._confined = Spawner(loop, self._workload.enter_confined)

    def spawner(self, *, confined: bool) -> Spawner:
        """The thread that starts commands, with or without privileges."""
        return self._confined if confined else self._spawner

    def identity(self, call: dict[str, Any]) -> dict[str, Any]:
        """Take a new identity."""
        take_identity(self._workload, call)
        return {}

    def info(self) -> dict[str, Any]:
        """Describe the guest: uptime in seconds, memory in KiB, seconds since boot of its milestones."""
        memory = {}
        with open("/proc/meminfo") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name in _MEMORY_FIELDS:
                    memory[name] = int(value.split()[0])
        return {
            "uptime": time.clock_gettime(time.CLOCK_BOOTTIME),
            "memory": memory,
            "boot": self._boot,
            "kernel": os.uname().release,
        }

    def seal(self) -> None:
        """Write what is cached, and hold back whoever would write more."""
        os.sync()
        with contextlib.suppress(OSError):  # it is synced; who is root in the workload may have frozen it before us
            self._workload.seal_workspace()

    def shutdown(self) -> None:
        """End the machine."""
        linux.reboot()

    def log(self, text: str) -> None:
        """Write a line to the console."""
        with contextlib.suppress(OSError):
            print(f"guestd: {text}", flush=True)


def main() -> None:
    """Boot, then serve for ever."""
    _mount_kernel_file_systems()
    resource.setrlimit(resource.RLIMIT_NOFILE, _DESCRIPTORS)
    loop = Loop()
    guest = Guest(loop)
    _open_channel(loop, guest)
    # What lives now lives for ever: a collection in a clone would only touch, and so copy, its pages.
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_EVERY)
    guest.log("ready")
    loop.run()


def _mount_kernel_file_systems() -> None:
    guarded = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    linux.mount("proc", "/proc", "proc", guarded)
    linux.mount("sysfs", "/sys", "sysfs", guarded)
    linux.mount("tmpfs", "/run", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755")
    linux.mount("tmpfs", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV)


def _open_channel(loop: Loop, guest: Guest) -> None:
    with open("/proc/cmdline") as file:
        words = file.read().split()
    if _VSOCK in words:
        Listener(loop, guest).listen(listen_vsock(VSOCK_PORT))
    else:
        Port(loop, os.open(_find_port(), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC), guest)


def _find_port() -> str:
    """Find the device of the port named PORT_NAME; the driver may need a moment."""
    for _ in range(500):
        with contextlib.suppress(OSError):
            for device in os.listdir(_PORTS):
                with open(f"{_PORTS}/{device}/name") as file:
                    if file.read().strip() == PORT_NAME and os.path.exists(f"/dev/{device}"):
                        return f"/dev/{device}"
        time.sleep(0.02)
    raise RuntimeError(f"no virtio port named {PORT_NAME}")
