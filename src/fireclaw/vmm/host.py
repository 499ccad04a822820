"""What must be known about this computer: which boot it is, and how fast its time stamp counter runs.

Facts that cost time to find out are kept in one small JSON file per home (``HostMemo``).
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_MEASURE_S: Final = 0.2
_TSC_TOLERANCE: Final = 1e-4


@functools.cache
def boot_id() -> str:
    """The kernel's id of the present boot."""
    return _BOOT_ID.read_text().strip()


@functools.cache
def cpu_model() -> str:
    """The name of the host's processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


class HostMemo:
    """Facts about this host that were found out once: a JSON object in one file, written atomically.

    A file that cannot be read as such is as good as none: everything in it can be found out again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self, key: str) -> Any:
        """What was kept under that key, or None."""
        return self._load().get(key)

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value under that key."""
        facts = self._load() | {key: value}
        fd, name = tempfile.mkstemp(dir=self._path.parent, prefix=self._path.name)
        try:
            with os.fdopen(fd, "w") as file:
                json.dump(facts, file)
            Path(name).replace(self._path)
        except BaseException:
            Path(name).unlink()
            raise

    def _load(self) -> dict[str, Any]:
        try:
            facts = json.loads(self._path.read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}


def tsc_khz(memo: HostMemo) -> int:
    """The frequency of the host's time stamp counter in kHz; measured once a boot, which takes 0.2 s.

    A guest under TCG reads the host's counter and cannot calibrate it on a busy host: it must be told. Snapshots
    are keyed by the figure, so a new measurement that agrees with the kept one within its error gives the kept one.
    """
    kept = memo.get("tsc") or {}
    if kept.get("boot_id") == boot_id():
        return int(kept["khz"])
    khz = measure_tsc_khz()
    if kept and abs(khz - kept["khz"]) < kept["khz"] * _TSC_TOLERANCE:
        khz = int(kept["khz"])
    memo.put("tsc", {"khz": khz, "boot_id": boot_id()})
    return khz


def measure_tsc_khz() -> int:
    """Measure the time stamp counter against CLOCK_MONOTONIC_RAW, in kHz.

    The kernel knows the figure but tells it nowhere a person may read: the log needs rights and forgets,
    ``cpu MHz`` in /proc/cpuinfo follows the governor, CPUID leaf 0x15 is missing on AMD. The raw clock is not
    steered by NTP and is itself derived from the kernel's figure; 0.2 s between two samples of some 100 ns error
    give it to about one in a million.
    """
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        # rdtsc; shl rdx, 32; or rax, rdx; ret
        page.write(b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0\xc3")
        anchor = ctypes.c_char.from_buffer(page)
        read_tsc = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))
        begin_ns, begin_ticks = _sample(read_tsc)
        time.sleep(_MEASURE_S)
        end_ns, end_ticks = _sample(read_tsc)
        del anchor  # the page cannot be unmapped while it is exported
    return round((end_ticks - begin_ticks) * 1_000_000 / (end_ns - begin_ns))


def _sample(read_tsc: Callable[[], int]) -> tuple[float, int]:
    """Read both clocks at the same moment: the closest of some tries, as the scheduler may come between."""
    best = (float("inf"), 0.0, 0)
    for _ in range(50):
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        ticks = read_tsc()
        after = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        best = min(best, (after - before, (before + after) / 2, ticks))
    return best[1], best[2]
