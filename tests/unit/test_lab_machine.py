"""How the lab watches L1: a small program stands in for its QEMU."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lab import machine
from lab.disk import Disk

if TYPE_CHECKING:
    from collections.abc import Sequence


def _python(script: str) -> Sequence[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\n{script}"]


def test_what_jobs_print_is_shown_without_the_signs_of_life() -> None:
    """The bytes that only say that L1 lives are not for people."""
    shown: list[bytes] = []
    script = r"os.write(1, b'one\n\0\0two\n')"
    assert machine.run(_python(script), shown.append, limit_s=60) == ""
    assert b"".join(shown) == b"one\ntwo\n"


def test_an_l1_that_fails_is_told() -> None:
    """QEMU's own exit status is part of the result."""
    assert machine.run(_python("sys.exit(3)"), lambda _: None, limit_s=60) == "ended with status 3"


@pytest.mark.parametrize(
    ("limit_s", "silence_s", "fault"),
    [(60.0, 0.05, "gave no sign for 0.05 s"), (0.05, 60.0, "took more than 0.05 s")],
)
def test_an_l1_that_hangs_is_ended(tmp_path: Path, limit_s: float, silence_s: float, fault: str) -> None:
    """Silence or the limit ends it, and its process is gone."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    # It holds the writing end for as long as it lives.
    life = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    hangs = _python(f"life = os.open({str(fifo)!r}, os.O_WRONLY)\nsignal.pause()")
    assert machine.run(hangs, lambda _: None, limit_s=limit_s, silence_s=silence_s) == fault
    assert os.read(life, 1) == b""
    os.close(life)


def test_l1_has_no_network_and_its_drives_in_order() -> None:
    """What runs in it reaches nobody, and finds root, payload and results as vda, vdb and vdc."""
    disk = Disk(kernel=Path("/k"), initrd=Path("/i"), root=Path("/root"))
    argv = machine.command(disk, Path("/payload"), Path("/results"), Path("/console"))
    assert argv[argv.index("-nic") + 1] == "none"
    files = [word.split("file=")[1].split(",")[0] for word in argv if word.startswith("if=none")]
    assert files == ["/root", "/payload", "/results"]
