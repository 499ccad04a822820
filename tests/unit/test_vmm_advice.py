"""Advice about a host's settings, from a copy of the kernel's files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from fireclaw.vmm.advice import find_leaks, find_slow

if TYPE_CHECKING:
    from pathlib import Path

_V2 = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
_V1 = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"
_SYSTEMD = "37 31 0:34 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd"
_ROOT = "24 1 254:0 / / rw,relatime - ext4 /dev/root rw"

_FILES = {
    "proc/self/mountinfo": f"{_ROOT}\n{_V2},favordynmods\n",
    "proc/swaps": "Filename\tType\tSize\tUsed\tPriority\n",
    "proc/sys/kernel/printk": "4\t4\t1\t7\n",
    "sys/class/tty/console/active": "tty0 ttyS0\n",
    "sys/devices/system/cpu/smt/active": "0\n",
    "sys/devices/system/cpu/vulnerabilities/itlb_multihit": "KVM: Mitigation: VMX disabled\n",
    "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "0\n",
    "sys/kernel/mm/ksm/run": "0\n",
    "sys/module/kvm/parameters/nx_huge_pages": "Y\n",
}


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host on which all is well."""
    change(tmp_path, _FILES)
    return tmp_path


def change(host: Path, files: dict[str, str]) -> None:
    """Have a host's files say something else."""
    for name, text in files.items():
        (host / name).parent.mkdir(parents=True, exist_ok=True)
        (host / name).write_text(text)


def test_a_good_host_is_not_lectured(host: Path, tmp_path: Path) -> None:
    """Where all is well, or the kernel has none of these files, there is nothing to say."""
    assert find_slow(host, "6.1.0-56-amd64") == []
    assert find_leaks(host) == []
    assert find_slow(tmp_path / "nothing", "6.1.0") == find_leaks(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        ({"proc/self/mountinfo": f"{_V2}\n"}, "sudo mount -o remount,favordynmods /sys/fs/cgroup"),
        ({"proc/self/mountinfo": f"{_V1}\n{_V2}\n"}, "boot with systemd.unified_cgroup_hierarchy=1"),
        ({"proc/sys/kernel/printk": "7 4 1 7"}, "sudo dmesg -n 1"),
        (
            {"sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "512"},
            "echo 0 | sudo tee /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
        ),
    ],
)
def test_what_is_slow_is_found_with_its_remedy(host: Path, files: dict[str, str], remedy: str) -> None:
    """Each known slow setting is found, alone, with the command that mends it."""
    change(host, files)

    (found,) = find_slow(host, "6.1.0-56-amd64")

    assert (bool(found.reason), found.remedy) == (True, remedy)


@pytest.mark.parametrize(
    ("files", "kernel"),
    [
        ({"proc/self/mountinfo": f"{_V2}\n"}, "5.10.0-30-amd64"),  # before readers were favoured
        ({"proc/self/mountinfo": f"{_V2}\n", "sys/module/kvm/parameters/nx_huge_pages": "never"}, "6.1.0"),
        ({"proc/self/mountinfo": f"{_SYSTEMD}\n{_V2},favordynmods\n"}, "6.1.0"),  # no controller of v1
        ({"proc/sys/kernel/printk": "7 4 1 7", "sys/class/tty/console/active": "tty0"}, "6.1.0"),  # a quick one
    ],
)
def test_what_costs_nothing_is_not_told(host: Path, files: dict[str, str], kernel: str) -> None:
    """What looks like a slow setting and is none on this host is passed over."""
    change(host, files)

    assert find_slow(host, kernel) == []


def test_the_other_way_is_shown_where_it_is_safe(host: Path) -> None:
    """KVM's guard against iTLB multihit is to be left out only where the processor does not need it."""
    change(host, {"proc/self/mountinfo": f"{_V2}\n"})
    (guarded,) = find_slow(host, "6.1.0")
    change(host, {"sys/devices/system/cpu/vulnerabilities/itlb_multihit": "Not affected"})
    (free,) = find_slow(host, "6.1.0")

    assert "nx_huge_pages" not in guarded.remedy
    assert "nx_huge_pages=never" in free.remedy


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"sys/devices/system/cpu/smt/active": "1"}, "SMT"),
        ({"sys/kernel/mm/ksm/run": "1"}, "KSM"),
        ({"proc/swaps": "Filename\n/dev/sda2 partition 1 0 -2\n"}, "/dev/sda2"),
        ({"proc/swaps": "Filename\n/dev/dm-1 partition 1 0 -2\n", "sys/block/dm-1/dm/uuid": "LVM-x"}, "/dev/dm-1"),
    ],
)
def test_what_leaks_is_found_with_its_remedy(host: Path, files: dict[str, str], word: str) -> None:
    """Each setting by which machines learn of each other, or reach the disk, is found with what mends it."""
    change(host, files)

    (found,) = find_leaks(host)

    assert word in found.reason
    assert found.remedy


def test_swap_that_nobody_can_read_is_fine(host: Path) -> None:
    """Encrypted swap, and swap that is memory, keep what they are given."""
    change(
        host,
        {
            "proc/swaps": "Filename\n/dev/zram0 partition 1 0 100\n/dev/dm-0 partition 1 0 -2\n",
            "sys/block/dm-0/dm/uuid": "CRYPT-PLAIN-swap",
        },
    )

    assert find_leaks(host) == []
