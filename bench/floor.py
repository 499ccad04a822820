"""The floor: a bare clone of a static-init guest to its first finished /bin/true. No product code on its path.

One class a VMM, with what they share here: the initrd, made of ``floor.c`` and our own modules, and the folder. Kernel,
image and memory size are those of a machine of ours; what is left out is all that a product adds: no Python, no
identity, no sandbox, jail or other user, one byte a command. Nothing that clones such a VMM can be faster by much.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from fireclaw.images.cpio import CpioWriter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from fireclaw.images import Image, Runtime

MEMORY_MIB: Final = 256
BOOT_SECONDS: Final = 120.0
COMMAND_SECONDS: Final = 60.0
WARM_UP: Final = 5
KERNEL_WORDS: Final = (
    "console=ttyS0 quiet loglevel=3 panic=-1 random.trust_cpu=on "
    "i8042.noaux i8042.nomux i8042.dumbkbd cryptomgr.notests"
)


class Floor(ABC):
    """The floor of one VMM.

    ::

        with QemuFloor(runtime, image, tsc_khz, "tcg") as floor:  # boots a guest, makes its snapshot
            milliseconds = floor.measure()

    Attributes:
        steps: what is measured, for people.
    """

    steps: ClassVar[str]

    def __init__(self, runtime: Runtime, image: Image) -> None:
        self._runtime = runtime
        self._image = image.root
        self._folder = Path(tempfile.mkdtemp(prefix="fireclaw-floor-", dir="/dev/shm"))

    def __enter__(self) -> Self:
        try:
            self._build_initrd()
            self._make_snapshot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder)

    @property
    @abstractmethod
    def version(self) -> str:
        """Of the VMM."""

    @abstractmethod
    def _make_snapshot(self) -> None:
        """Boot a guest, have it run /bin/true ``WARM_UP`` times, and keep its memory and state in the folder."""

    @abstractmethod
    def measure(self) -> float:
        """Clone, run /bin/true once; return milliseconds from the start of the VMM."""

    def _build_initrd(self) -> None:
        init = self._folder / "init"
        source = Path(__file__).with_name("floor.c")
        subprocess.run(["gcc", "-O2", "-static", "-o", init, source], check=True)
        cpio = CpioWriter()
        cpio.folder("m")
        for number, module in enumerate(_modules(self._runtime.initrd.read_bytes())):
            cpio.file(f"m/{number:02}.ko", module)
        cpio.file("init", init.read_bytes(), mode=0o755)
        (self._folder / "initrd").write_bytes(cpio.finish())


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
