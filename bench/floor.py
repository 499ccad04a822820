"""The floor: a bare QEMU clone of a static-init guest to its first finished /bin/true. No product code on its path.

Same kernel, modules, image, machine type and memory as a machine of ours; memory on tmpfs, no sandbox, no other user,
no identity, one byte a command. Nothing that clones a QEMU can be faster than this by much.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fireclaw.images.cpio import CpioWriter
from fireclaw.vmm.qemu import SOFTWARE_CPU

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from fireclaw.images import Image, Runtime

_MEMORY_MIB = 256
_MACHINE = "microvm,memory-backend=m0,x-option-roms=off,pit=off,pic=off,rtc=on,isa-serial=on,auto-kernel-cmdline=off"
_KERNEL_WORDS = (
    "console=ttyS0 quiet loglevel=3 reboot=t panic=-1 random.trust_cpu=on "
    "i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd cryptomgr.notests"
)
_BOOT_SECONDS = 120
_COMMAND_SECONDS = 60


class _Vm:
    """One bare QEMU: the snapshot's source, or a clone of it."""

    def __init__(self, folder: Path, kernel: Path, image: Path, tsc_khz: int, accel: str, *, clone: bool) -> None:
        self.started = time.monotonic()
        self._port, port = socket.socketpair()
        self._control, control = socket.socketpair()
        share = "off" if clone else "on"
        self._process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
                *("-M", f"{_MACHINE},accel={accel}"),
                *("-cpu", "host" if accel == "kvm" else SOFTWARE_CPU, "-smp", "1", "-m", f"{_MEMORY_MIB}M"),
                "-object",
                f"memory-backend-file,id=m0,size={_MEMORY_MIB}M,mem-path={folder}/memory,share={share}",
                *("-kernel", str(kernel), "-initrd", f"{folder}/initrd"),
                *("-append", f"{_KERNEL_WORDS} tsc_early_khz={tsc_khz} tsc=reliable"),
                *("-serial", "null"),
                *("-drive", f"if=none,id=d0,file={image},format=raw,readonly=on"),
                *("-device", "virtio-blk-device,drive=d0", "-device", "virtio-serial-device"),
                *("-chardev", f"socket,id=c0,fd={port.fileno()}", "-device", "virtserialport,chardev=c0,name=floor"),
                *("-chardev", f"socket,id=q0,fd={control.fileno()}", "-mon", "chardev=q0,mode=control"),
                *(("-incoming", "defer") if clone else ()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(port.fileno(), control.fileno()),
        )
        port.close()
        control.close()
        self._lines = self._control.makefile("r")
        self._lines.readline()
        self.execute("qmp_capabilities")
        self.execute("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])

    def execute(self, command: str, **arguments: object) -> Any:
        """Run one QMP command."""
        self._control.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def expect(self, byte: bytes, seconds: float) -> None:
        """Wait for one byte of the guest."""
        self._port.settimeout(seconds)
        if (got := self._port.recv(1)) != byte:
            raise RuntimeError(f"the floor's guest said {got!r}")

    def true(self) -> None:
        """Run /bin/true in the image."""
        self._port.sendall(b"x")
        self.expect(b"D", _COMMAND_SECONDS)

    def kill(self) -> None:
        """End and reap it."""
        self._process.kill()
        self._process.wait()
        for end in (self._port, self._control, self._lines):
            end.close()


class Floor:
    """The floor's snapshot; use it as a context manager, then ``measure`` as often as needed."""

    def __init__(self, runtime: Runtime, image: Image, tsc_khz: int, accel: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fireclaw-floor-", dir="/dev/shm"))
        self._kernel, self._image, self._tsc_khz, self._accel = runtime.kernel, image.root, tsc_khz, accel
        self._initrd = runtime.initrd

    def __enter__(self) -> Self:
        try:
            self._build_initrd()
            source = self._start(clone=False)
            try:
                source.expect(b"R", _BOOT_SECONDS)
                for _ in range(5):
                    source.true()
                source.execute("stop")
                source.execute("migrate", uri=f"exec:cat>{self._folder}/state")
                while (status := source.execute("query-migrate")["status"]) != "completed":
                    if status == "failed":
                        raise RuntimeError("the floor's snapshot failed")
                    time.sleep(0.001)
            finally:
                source.kill()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder)

    def _start(self, *, clone: bool) -> _Vm:
        return _Vm(self._folder, self._kernel, self._image, self._tsc_khz, self._accel, clone=clone)

    def _build_initrd(self) -> None:
        init = self._folder / "init"
        source = Path(__file__).with_name("floor.c")
        subprocess.run(["gcc", "-O2", "-static", "-o", init, source], check=True)
        cpio = CpioWriter()
        cpio.folder("m")
        for number, module in enumerate(_modules(self._initrd.read_bytes())):
            cpio.file(f"m/{number:02}.ko", module)
        cpio.file("init", init.read_bytes(), mode=0o755)
        (self._folder / "initrd").write_bytes(cpio.finish())

    def measure(self) -> float:
        """Clone, run /bin/true once; return milliseconds from the start of QEMU."""
        vm = self._start(clone=True)
        try:
            vm.execute("migrate-incoming", uri=f"exec:cat {self._folder}/state")
            while vm.execute("query-status")["status"] == "inmigrate":
                time.sleep(0.001)
            vm.execute("cont")
            vm.true()
            return (time.monotonic() - vm.started) * 1000
        finally:
            vm.kill()


def _modules(initrd: bytes) -> Iterator[bytes]:
    """The kernel modules of our own initrd, in their order (cpio "newc")."""
    position = 0
    while (fields := initrd[position : position + 110]).startswith(b"070701"):
        size, name_size = int(fields[54:62], 16), int(fields[94:102], 16)
        name = initrd[position + 110 : position + 110 + name_size - 1]
        start = -(-(position + 110 + name_size) // 4) * 4
        if name.endswith(b".ko"):
            yield initrd[start : start + size]
        position = -(-(start + size) // 4) * 4
