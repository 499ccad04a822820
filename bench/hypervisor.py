"""What this host itself runs on, by the words of its processor: under another hypervisor figures are worth less."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Final

SOFTWARE_CPU: Final = "TCGTCGTCGTCG"
"""The signature of QEMU's software CPU: such a host is a lab, whose times say nothing of a processor."""

# push rbx; mov eax, 0x40000000; cpuid; mov [rdi], ebx; mov [rdi+4], ecx; mov [rdi+8], edx; pop rbx; ret
_ASK: Final = bytes.fromhex("53 b8 00 00 00 40 0f a2 89 1f 89 4f 04 89 57 08 5b c3")


def hypervisor() -> str:
    """The signature of the hypervisor under this host, such as ``KVMKVMKVM``; empty on bare metal."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    if "hypervisor" not in flags.split():  # only then the leaf means anything
        return ""
    words = ctypes.create_string_buffer(12)
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(_ASK)
        anchor = ctypes.c_char.from_buffer(page)
        ctypes.CFUNCTYPE(None, ctypes.c_void_p)(ctypes.addressof(anchor))(ctypes.addressof(words))
        del anchor  # the page cannot be unmapped while it is exported
    return words.raw.rstrip(b"\0").decode("ascii", "replace") or "unnamed"
