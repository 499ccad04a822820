"""The requests that bring a Firecracker up: paths and bodies in the order of its phases, and nothing sent.

Every path in them is relative, and Firecracker's working folder is the machine's own (or the root of its jail): so what
a snapshot records fits each clone. Bodies are strict: a field that a release does not know is refused, so newer ones
are gated on its version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from fireclaw.wire.hello import VSOCK_PORT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fireclaw.vmm.base import VmSpec
    from fireclaw.vmm.firecracker.release import Version

    Body = Mapping[str, object]

KERNEL: Final = "kernel"
INITRD: Final = "initrd"
ROOT: Final = "root"
IMAGE: Final = "image"
WORKSPACE: Final = "workspace"
MEMORY: Final = "memory"
STATE: Final = "state"
CHANNEL: Final = "ch"
CONTROL: Final = "api"
CONSOLE: Final = "console"
LOG: Final = "log"

_GUEST_CID: Final = 3  # need not be unique: each machine's socket is its own
_NOWHERE: Final = "none/such"
_CONSOLE_A_SECOND: Final = 64 * 1024  # bytes; more is lost, and costs neither side anything
_SERIAL_LIMIT_SINCE: Final = (1, 16, 0)
# reboot=k: a guest that ends or panics resets by the keyboard controller, which ends the process. No probes of what is
# not there, and no "nomodule", which Firecracker's own default has.
_KERNEL_WORDS: Final = (
    "console=ttyS0 quiet loglevel=3 reboot=k panic=-1 random.trust_cpu=on 8250.nr_uarts=1 "
    "i8042.noaux i8042.nomux i8042.dumbkbd cryptomgr.notests raid=noautodetect fireclaw.channel=vsock"
)


class Put(NamedTuple):
    """One PUT."""

    path: str
    body: Body


def serial(version: Version) -> Put:
    """Have the guest's console written to a FIFO; not part of a snapshot, so clones need it, too."""
    body: dict[str, object] = {"serial_out_path": CONSOLE}
    if version >= _SERIAL_LIMIT_SINCE:
        body["rate_limiter"] = {"size": _CONSOLE_A_SECOND, "refill_time": 1000}
    return Put("/serial", body)


def boot(spec: VmSpec, version: Version) -> Iterator[Put]:
    """From a fresh process to a guest that runs."""
    yield serial(version)
    yield Put("/machine-config", {"vcpu_count": spec.vcpus, "mem_size_mib": spec.memory_mib, "smt": False})
    yield Put(
        "/boot-source",
        {"kernel_image_path": KERNEL, "initrd_path": INITRD, "boot_args": kernel_words(spec)},
    )
    for name in drives(spec):
        yield Put(f"/drives/{name}", _drive(name))
    yield Put("/vsock", {"guest_cid": _GUEST_CID, "uds_path": CHANNEL})
    yield Put("/actions", {"action_type": "InstanceStart"})


def load(*, paused: bool) -> Put:
    """From a fresh process, its console set, to a clone that runs, or stands still."""
    memory = {"backend_type": "File", "backend_path": MEMORY}
    return Put("/snapshot/load", {"snapshot_path": STATE, "mem_backend": memory, "resume_vm": not paused})


def create() -> Put:
    """Write a paused guest's snapshot."""
    return Put("/snapshot/create", {"snapshot_type": "Full", "snapshot_path": STATE, "mem_file_path": MEMORY})


def failing_create() -> Put:
    """A snapshot that cannot be written, on purpose.

    From 1.16.0 on a resumed guest's vsock takes nothing until the guest has answered an event that only a snapshot
    sends, even one that fails (firecracker issue 6100).
    """
    return Put("/snapshot/create", {"snapshot_type": "Full", "snapshot_path": _NOWHERE, "mem_file_path": _NOWHERE})


def state(word: str) -> Body:
    """For PATCH /vm: ``Paused`` or ``Resumed``."""
    return {"state": word}


def drives(spec: VmSpec) -> list[str]:
    """The names of the drives, in the guest's order."""
    return [ROOT, IMAGE] + ([WORKSPACE] if spec.workspace is not None else [])


def kernel_words(spec: VmSpec) -> str:
    """The guest's kernel command line."""
    return " ".join([_KERNEL_WORDS, *spec.cmdline])


def connect() -> bytes:
    """What a host sends on the vsock socket to be connected to guestd; one write, or it is dropped."""
    return b"CONNECT %d\n" % VSOCK_PORT


def _drive(name: str) -> Body:
    writable = name == WORKSPACE
    return {
        "drive_id": name,
        "path_on_host": name,
        "is_root_device": False,
        "is_read_only": not writable,
        # Without it the guest's flushes are not offered, and what it has synced could be lost with the host's power.
        "cache_type": "Writeback" if writable else "Unsafe",
    }
