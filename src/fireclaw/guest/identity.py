"""The identity message after a clone: until it has come, two clones draw the same random numbers."""

from __future__ import annotations

import fcntl
import os
import struct
import time
from binascii import a2b_base64
from typing import TYPE_CHECKING, Any

from fireclaw.guest.workload import identity_path

if TYPE_CHECKING:
    from fireclaw.guest.workload import Workload

_RNDADDENTROPY = 0x4008_5203  # include/uapi/linux/random.h
_RNDRESEEDCRNG = 0x5207


def take_identity(workload: Workload, call: dict[str, Any]) -> None:
    """Reseed the kernel's generator, set clock, hostname and machine-id, and mount the workspace if there is one.

    On the software CPU every line that runs for the first time after a clone costs: plain system calls, no text files.

    Raises:
        KeyError, ValueError: a field is missing or wrong.
        OSError: the kernel refused one of them.
    """
    hostname = str(call["hostname"])
    _reseed(a2b_base64(call["entropy"]))
    time.clock_settime(time.CLOCK_REALTIME, float(call["time"]))
    workload.set_hostname(hostname)
    _write("hostname", f"{hostname}\n")
    _write("hosts", f"127.0.0.1 localhost {hostname}\n::1 localhost {hostname}\n")
    _write("machine-id", f"{call['machine_id']}\n")
    if call.get("workspace"):
        workload.mount_workspace()


def _reseed(entropy: bytes) -> None:
    """Credit ``entropy`` and make the generator use it at once (random(4))."""
    fd = os.open("/dev/urandom", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


def _write(name: str, text: str) -> None:
    fd = os.open(identity_path(name), os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
