"""The lab's first job, run in L1: our runtime boots on KVM, by QEMU alone.

Neither the drivers nor the test suite are used, so a failure here means that the lab is broken.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from fireclaw.images import ImageStore
from fireclaw.paths import Home
from fireclaw.wire.hello import PORT_NAME

_LIMIT_S = 60.0
_GLANCE_S = 0.05
_READY = "guestd: ready"


def main() -> None:
    """Boot it and wait for guestd.

    Raises:
        SystemExit: it did not come.
    """
    base, console = Path(os.environ["FIRECLAW_TEST_HOME"]), Path(os.environ["LAB_OUT"], "console")
    runtime = ImageStore(Home(base, base, base)).find_runtime()
    if runtime is None:
        sys.exit("the lab brought no runtime")
    (image,) = base.glob("images/*/root.squashfs")
    drives = []
    for number, path in enumerate((runtime.root, image)):
        drives += ["-drive", f"if=none,id=d{number},format=raw,readonly=on,file={path}"]
        drives += ["-device", f"virtio-blk-device,drive=d{number}"]
    argv = [
        *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "microvm,auto-kernel-cmdline=off", "-accel", "kvm", "-cpu", "host", "-m", "256"),
        *("-kernel", str(runtime.kernel), "-initrd", str(runtime.initrd)),
        *("-append", "console=ttyS0 quiet reboot=t panic=-1", "-serial", f"file:{console}", *drives),
        *("-device", "virtio-serial-device", "-chardev", "null,id=ch"),
        *("-device", f"virtserialport,chardev=ch,name={PORT_NAME}"),
    ]
    start = time.monotonic()
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None and time.monotonic() - start < _LIMIT_S:
                time.sleep(_GLANCE_S)
                if console.exists() and _READY in console.read_text(errors="replace"):
                    sys.stdout.write(f"QEMU on KVM: guestd is ready after {time.monotonic() - start:.1f} s\n")
                    return
        finally:
            process.kill()
    said = console.read_text(errors="replace") if console.exists() else "nothing"
    sys.exit(f"QEMU on KVM: no guestd, status {process.returncode}; the console says:\n{said}")


if __name__ == "__main__":
    main()
