"""L1: QEMU with a software CPU that has SVM, three drives, no network card.

The order of the drives is what the initrd and L1's own programs count on: root, payload, results.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lab.inside import BEAT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from lab.disk import Disk

# An EPYC without what the software CPU lacks, so that QEMU has nothing to warn about.
_CPU = "EPYC,+svm,-rdseed,-sha-ni,-fxsr-opt,-misalignsse,-3dnowprefetch,-osvw,-topoext,-nrip-save,-xsavec"

# One CPU: with more, QEMU runs them in threads of their own, and Linux loops for ever on a breakpoint once in a while.
# It patches its own code (KVM's first and last guest switch a static key in the scheduler) by way of an int3; QEMU 7.2
# translates that again between noticing the write and doing it, and keeps the stale translation.
CPUS = 1
MEMORY_MIB = 4096

_COMMAND_LINE = "console=ttyS0 quiet loglevel=3 reboot=t panic=-1 mitigations=off random.trust_cpu=on tsc=reliable"


def command(disk: Disk, payload: Path, results: Path, console: Path) -> list[str]:
    """Return the argv that starts L1; what its jobs print comes out of its stdout.

    Args:
        disk: from ``disk.build``.
        payload: from ``payload.build``; written to.
        results: an empty sparse file; becomes a tar.
        console: where the kernel's messages go.
    """
    return [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "q35", "-accel", "tcg", "-cpu", _CPU),
        *("-smp", str(CPUS), "-m", str(MEMORY_MIB), "-nic", "none"),
        *("-kernel", str(disk.kernel), "-initrd", str(disk.initrd), "-append", _COMMAND_LINE),
        *_drive("root", disk.root, "readonly=on"),
        *_drive("payload", payload, "cache=unsafe"),
        *_drive("results", results, "cache=unsafe"),
        *("-chardev", f"file,id=console,path={console}", "-serial", "chardev:console"),
        *("-chardev", "stdio,id=shown,signal=off", "-device", "virtio-serial-pci"),
        *("-device", "virtconsole,chardev=shown"),
    ]


def _drive(name: str, path: Path, options: str) -> Iterator[str]:
    yield from ("-drive", f"if=none,id={name},format=raw,file={path},{options}")
    yield from ("-device", f"virtio-blk-pci,drive={name}")


def run(argv: Sequence[str], show: Callable[[bytes], None], *, limit_s: float, silence_s: float = 90.0) -> str:
    """Run L1 to its end; whatever happens, it is gone afterwards.

    Args:
        argv: from ``command``.
        show: takes what its jobs print.
        limit_s: how long it may take.
        silence_s: after how long without a sign of life it counts as hung.

    Returns:
        What went wrong; an empty string if nothing did.
    """
    deadline = time.monotonic() + limit_s
    with _started(argv) as process:
        assert process.stdout is not None
        while True:
            patience = min(silence_s, deadline - time.monotonic())
            if patience <= 0 or not select.select([process.stdout], [], [], patience)[0]:
                return f"gave no sign for {silence_s:g} s" if patience == silence_s else f"took more than {limit_s:g} s"
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                break
            show(piece.replace(BEAT, b""))
        status = process.wait()
    return f"ended with status {status}" if status else ""


@contextmanager
def _started(argv: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "--", *argv],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
