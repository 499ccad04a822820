"""The identity message after a clone: until it has come, two clones draw the same random numbers."""

from __future__ import annotations

import base64
import fcntl
import os
import struct
import time
from typing import TYPE_CHECKING, Any

from fireclaw.guest import linux
from fireclaw.guest.workload import identity_path

if TYPE_CHECKING:
    from fireclaw.guest.workload import Workload

_RNDADDENTROPY = 0x4008_5203  # include/uapi/linux/random.h
_RNDRESEEDCRNG = 0x5207


def take_identity(workload: Workload, call: dict[str, Any]) -> dict[str, Any]:
    """Reseed the kernel's generator, set clock, names and machine-id.

    Raises:
        KeyError, ValueError: a field is missing or wrong.
        OSError: the kernel refused one of them.
    """
    hostname = str(call["hostname"])
    machine_id = str(call["machine_id"])
    _reseed(base64.b64decode(call["entropy"]))
    time.clock_settime(time.CLOCK_REALTIME, float(call["time"]))
    linux.sethostname(hostname)
    workload.set_hostname(hostname)
    _write("hostname", hostname)
    _write("hosts", f"127.0.0.1 localhost {hostname}\n::1 localhost {hostname}")
    _write("machine-id", machine_id)
    return {}


def _reseed(entropy: bytes) -> None:
    """Credit ``entropy`` and make the generator use it at once (random(4))."""
    fd = os.open("/dev/urandom", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _RNDADDENTROPY, struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy)
        fcntl.ioctl(fd, _RNDRESEEDCRNG)
    finally:
        os.close(fd)


def _write(name: str, text: str) -> None:
    with open(identity_path(name), "w") as file:
        file.write(text + "\n")
