"""The floor of QEMU, on KVM or its software CPU: memory on tmpfs, state by migration, bytes through a virtio port."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any, Final, Self

from fireclaw.vmm.qemu import SOFTWARE_CPU
from floor import BOOT_SECONDS, COMMAND_SECONDS, KERNEL_WORDS, MEMORY_MIB, WARM_UP, Floor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fireclaw.images import Image, Runtime

_PROGRAM: Final = "qemu-system-x86_64"
_MACHINE: Final = (
    "microvm,memory-backend=m0,x-option-roms=off,pit=off,pic=off,rtc=on,isa-serial=on,auto-kernel-cmdline=off"
)


class QemuFloor(Floor):
    """See ``Floor``."""

    steps = "start of a bare QEMU clone - its guest's first finished /bin/true"

    def __init__(self, runtime: Runtime, image: Image, tsc_khz: int, accel: str) -> None:
        super().__init__(runtime, image)
        self._tsc_khz = tsc_khz
        self._accel = accel

    @property
    def version(self) -> str:
        """See ``Floor.version``."""
        said = subprocess.run([_PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout
        found = re.search(r"version (\S+)", said)
        return found[1] if found else said

    def _make_snapshot(self) -> None:
        with _Qemu(self._argv(share=True)) as source:
            for _ in range(WARM_UP):
                source.true(BOOT_SECONDS)
            source.execute("stop")
            source.execute("migrate", uri=f"exec:cat>{self._folder}/state")
            while (status := source.execute("query-migrate")["status"]) != "completed":
                if status == "failed":
                    raise RuntimeError("the floor's snapshot failed")
                time.sleep(0.001)

    def measure(self) -> float:
        """See ``Floor.measure``."""
        began = time.monotonic()
        with _Qemu([*self._argv(share=False), "-incoming", "defer"]) as clone:
            clone.execute("migrate-incoming", uri=f"exec:cat {self._folder}/state")
            while clone.execute("query-status")["status"] == "inmigrate":
                time.sleep(0.001)
            clone.execute("cont")
            clone.true(COMMAND_SECONDS)
            return (time.monotonic() - began) * 1000

    def _argv(self, *, share: bool) -> list[str]:
        memory = f"memory-backend-file,id=m0,size={MEMORY_MIB}M,mem-path={self._folder}/memory"
        return [
            *(_PROGRAM, "-nodefaults", "-no-user-config", "-nographic", "-no-reboot"),
            *("-M", f"{_MACHINE},accel={self._accel}"),
            *("-cpu", "host" if self._accel == "kvm" else SOFTWARE_CPU, "-smp", "1", "-m", f"{MEMORY_MIB}M"),
            *("-object", f"{memory},share={'on' if share else 'off'}"),
            *("-kernel", str(self._runtime.kernel), "-initrd", f"{self._folder}/initrd"),
            *("-append", f"{KERNEL_WORDS} reboot=t i8042.nopnp tsc_early_khz={self._tsc_khz} tsc=reliable"),
            *("-serial", "null"),
            *("-drive", f"if=none,id=d0,file={self._image},format=raw,readonly=on"),
            *("-device", "virtio-blk-device,drive=d0"),
        ]


class _Qemu:
    """One QEMU, from its start to its death."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._port, port = socket.socketpair()
        self._control, control = socket.socketpair()
        more = [
            *("-device", "virtio-serial-device", "-device", "virtserialport,chardev=c0,name=floor"),
            *("-chardev", f"socket,id=c0,fd={port.fileno()}"),
            *("-chardev", f"socket,id=q0,fd={control.fileno()}", "-mon", "chardev=q0,mode=control"),
        ]
        self._process = subprocess.Popen(
            [*argv, *more],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(port.fileno(), control.fileno()),
        )
        port.close()
        control.close()
        self._lines = self._control.makefile("r")

    def __enter__(self) -> Self:
        try:
            self._lines.readline()
            self.execute("qmp_capabilities")
            self.execute("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for end in (self._port, self._control, self._lines):
            end.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """Run one QMP command."""
        self._control.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def true(self, seconds: float) -> None:
        """Run /bin/true in the image."""
        self._port.settimeout(seconds)
        self._port.sendall(b"x")
        if (got := self._port.recv(1)) != b"D":
            raise RuntimeError(f"the floor's guest said {got!r}")
