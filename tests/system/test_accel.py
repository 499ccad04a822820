"""``accel = "auto"``: KVM counts only if a guest of ours boots on it, and people are told once why it is not used."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Cli

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(not Path("/dev/kvm").exists(), reason="this host has no /dev/kvm to be tried"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a device node that is open to machines"),
]

# In a mount namespace of its own the device is open to the users that machines run under, whatever its mode here.
_OPEN_KVM = (
    "mount -t tmpfs none /mnt && mknod -m 666 /mnt/kvm c 10 232 && mount --bind /mnt/kvm /dev/kvm && umount -l /mnt;"
    ' exec "$@"'
)


def _run(cli: Cli, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    argv = ["unshare", "--mount", "sh", "-c", _OPEN_KVM, "sh", *cli.argv(*arguments)]
    return subprocess.run(argv, env=cli.env, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False)


def test_kvm_is_proved_by_a_booted_guest(cli: Cli) -> None:
    """A guest is tried on KVM under the deadline; where it does not live, TCG is used, said once, and remembered."""
    began = time.monotonic()
    first = _run(cli, "run", "--", "echo", "hi")
    took = time.monotonic() - began
    assert (first.returncode, first.stdout) == (0, b"hi\n")
    verdict = json.loads(cli.home.memo.read_text()).get("kvm with qemu")
    accel = cli.json("status", "--json")["vmm"]["accel"]
    second = cli("run", "--", "true")
    assert (second.returncode, second.stderr) == (0, b"")  # said once
    if accel == "kvm":
        assert verdict["works"]
        return
    assert took < 20 + 60  # the deadline, and a template on the software CPU
    line = "machines run on QEMU with the software CPU, several times slower: a guest"
    assert first.stderr.decode().count(line) == 1
    if verdict is None:  # it did not hang, and the next daemon tries again
        return
    assert verdict["hangs"]
    assert verdict["reason"] in first.stderr.decode()

    assert cli("down").returncode == 0
    began = time.monotonic()
    third = _run(cli, "run", "--", "true")  # a new daemon of the same host boot
    assert third.returncode == 0
    assert time.monotonic() - began < 15  # remembered, not tried again
