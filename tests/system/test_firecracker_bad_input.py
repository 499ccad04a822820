"""What goes wrong with Firecracker, as a user sees it: each a clear line, and nothing left behind.

Firecracker is the fake (``fireclaw.testing.firecracker``), by which everything above the API is the product's own: the
command line, the daemon, the choice of a VMM, jails, snapshots. Its guest has no memory, so a disk that the memory of a
guest fills is played by a scripted refusal; the real one is for the contract suite in the lab.
"""

from __future__ import annotations

import grp
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from machine_home import private_home, until, vmms

from conftest import Cli, leftovers
from fireclaw.testing.firecracker import Guest, Script, install
from fireclaw.vmm.accel import find_obstacle
from fireclaw.vmm.base import KVM
from fireclaw.vmm.firecracker import release
from fireclaw.vmm.process import home_tag

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT = os.geteuid() == 0
_BUILT = b"making a snapshot of the image 'debian'"
_NO_ROOM = "Cannot write memory file: No space left on device (os error 28)"

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        find_obstacle(jailed=_ROOT) is not None, reason="without a KVM that can be opened Firecracker is not even tried"
    ),
]
as_root = pytest.mark.skipif(not _ROOT, reason="jails and mount namespaces are root's")


@pytest.fixture
def cli() -> Iterator[Cli]:
    """The command line on a home with a snapshot for QEMU; machines that a fake made are counted nowhere."""
    with private_home() as home:
        cli = Cli(home)
        folders = (folder for folder in cli.env["PATH"].split(":") if not Path(folder, "firecracker").exists())
        cli.env["PATH"] = ":".join(folders)  # none of this host's own is found
        try:
            yield cli
        finally:
            done = cli("down")
        assert done.returncode == 0, done.stderr.decode()
        assert leftovers(home) == []
        assert_no_jail(cli)


def give(cli: Cli, script: Script | None = None) -> Path:
    """Install the fake; returns its folder."""
    return install(release.folder(cli.home.vmms), script)


def insist(cli: Cli) -> None:
    """Have the settings ask for Firecracker."""
    cli.env["FIRECLAW_MACHINE_VMM"] = "firecracker"


def assert_no_jail(cli: Cli) -> None:
    """Nothing of a jail is left."""
    assert list(cli.home.jails.glob("*/*")) == []


def refusal(cli: Cli) -> str:
    """Run a command that no machine can be made for; returns the line that says why."""
    done = cli("run", "--", "true")
    assert (done.returncode, done.stdout) == (125, b"")
    assert b"Traceback" not in done.stderr
    until(lambda: cli.json("ps", "--json") == [], "no machine is listed")
    assert vmms(cli.home) == {}
    assert_no_jail(cli)
    return done.stderr.decode().splitlines()[-1].removeprefix("fireclaw: ")


def finding(cli: Cli, name: str) -> dict[str, str]:
    """Return doctor's first finding of a name."""
    done = cli("doctor", "--json")
    found: list[dict[str, str]] = json.loads(done.stdout)
    return next(check for check in found if check["name"] == name)


def ran(cli: Cli) -> str:
    """Run a command that must work, in a new machine of whatever kind; returns what was said."""
    done = cli("run", "--", "echo", "on")
    assert (done.returncode, done.stdout) == (0, b"on\n"), done.stderr.decode()
    return done.stderr.decode()


# -- the programs ---------------------------------------------------------------------------------------------


def test_a_missing_firecracker(cli: Cli) -> None:
    """Insisted on and not there: the verb that installs it is the next step, and doctor says the same."""
    insist(cli)
    assert refusal(cli) == "Firecracker is not installed (fireclaw setup --vmm firecracker)"
    found = finding(cli, "vmm")
    assert (found["state"], found["remedy"]) == ("fail", "fireclaw setup --vmm firecracker")


def test_a_firecracker_that_was_downloaded(cli: Cli, tmp_path: Path) -> None:
    """What setup installs from a file is what the next machine runs on, and a daemon that chose before says so."""
    folder = install(tmp_path / "downloads")
    cli.env["FIRECLAW_MACHINE_ACCEL"] = "auto"
    first = cli("setup", "--vmm", "firecracker", "--file", str(folder))
    again = cli("setup", "--vmm", "firecracker")

    place = release.folder(cli.home.vmms)
    assert first.returncode == again.returncode == 0
    assert f"fireclaw: installed Firecracker 1.16.1 in {place}\n" in first.stderr.decode()
    assert again.stderr.decode() == f"fireclaw: Firecracker 1.16.1 is there already, in {place}\nfireclaw: ready\n"
    assert "machines run on Firecracker with KVM" in ran(cli)
    assert cli.json("status", "--json")["vmm"] == {"kind": "firecracker", "accel": "kvm"}


def test_a_firecracker_of_a_wrong_version(cli: Cli) -> None:
    """One that is too old is named with its version and those that will do."""
    program = give(cli, Script(version="1.13.1")) / "firecracker"
    insist(cli)
    reason = f"{program} is version 1.13.1; Fireclaw works with 1.14.0 and newer, below 2.0"
    assert refusal(cli) == f"{reason} (install 1.16.1: fireclaw setup --vmm firecracker)"
    assert finding(cli, "vmm")["reason"] == reason


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (Script(version="1.13.1"), "is version 1.13.1; Fireclaw works with 1.14.0 and newer, below 2.0"),
        (Script(exit_at={"start": 148}), "it exited with status 148 (a system call that its filter forbids)"),
    ],
    ids=["old", "ends"],
)
def test_where_firecracker_will_not_do_qemu_takes_over(cli: Cli, script: Script, reason: str) -> None:
    """Machines run all the same, on QEMU, and one line tells why not on the Firecracker that is installed."""
    give(cli, script)
    said = ran(cli)
    assert said.count("machines run on QEMU ") == 1
    assert said.count(reason) == 1
    assert cli.json("status", "--json")["vmm"]["kind"] == "qemu"
    assert ran(cli) == ""


def test_a_firecracker_that_cannot_run(cli: Cli) -> None:
    """A damaged program is named, in the words of the host."""
    program = give(cli) / "firecracker"
    program.write_bytes(b"\x7fELF\2\1\1" + bytes(100))
    insist(cli)
    assert refusal(cli) == f"{program} cannot be run: Exec format error (fireclaw setup --vmm firecracker)"


@as_root
def test_root_without_a_jailer(cli: Cli) -> None:
    """As root Firecracker runs in a jail or not at all."""
    jailer = give(cli) / "jailer"
    jailer.unlink()
    insist(cli)
    reason = f"{jailer} is missing: as root Firecracker runs in a jail only"
    assert refusal(cli) == f"{reason} (fireclaw setup --vmm firecracker)"
    assert finding(cli, "vmm")["reason"] == reason


# -- KVM ------------------------------------------------------------------------------------------------------

# A mount namespace in which the device belongs to a group, as distributions have it.
_CLOSED_KVM = (
    'mount -t tmpfs none /mnt && mknod -m 660 /mnt/kvm c 10 232 && chgrp "$0" /mnt/kvm'
    ' && mount --bind /mnt/kvm /dev/kvm && umount -l /mnt; exec "$@"'
)


@as_root
def test_a_kvm_that_is_closed_to_a_person() -> None:
    """Doctor tells a person which group opens the device, and the command that puts him in it."""
    group = next(name for name in ("kvm", "disk", "daemon") if name in {entry.gr_name for entry in grp.getgrall()})
    person = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]
    argv = ["unshare", "--mount", "sh", "-c", _CLOSED_KVM, group, *person, sys.executable, "-m", "fireclaw", "doctor"]
    with tempfile.TemporaryDirectory(prefix="fct-", dir="/tmp") as home:
        shutil.chown(home, "nobody", "nogroup")
        env = os.environ | {"FIRECLAW_HOME": home, "FIRECLAW_IRC_PORT": "0", "OLLAMA_HOST": "127.0.0.1:9"}
        done = subprocess.run([*argv, "--json"], env=env, capture_output=True, timeout=60, check=False, cwd="/")

    (found,) = (check for check in json.loads(done.stdout) if check["name"] == "kvm")
    assert found == {
        "name": "kvm",
        "state": "warn",
        "reason": f"{KVM} is closed to nobody",
        "remedy": f"sudo usermod -aG {group} nobody, then log in again",
    }


def test_a_kvm_that_hangs(cli: Cli) -> None:
    """A guest that does nothing within the deadline: QEMU takes over, which is said once and remembered."""
    give(cli, Script(guest=Guest.SILENT))
    first = ran(cli)
    reason = "a guest hangs on this host's KVM (30 s without a sign)"
    assert first.splitlines()[1:] == [
        f"fireclaw: machines run on QEMU with the software CPU, several times slower: {reason}"
    ]
    assert cli.json("status", "--json")["vmm"] == {"kind": "qemu", "accel": "tcg"}
    assert ran(cli) == ""
    found = finding(cli, "kvm")
    assert (found["state"], found["reason"]) == ("warn", reason)

    assert cli("down").returncode == 0
    began = time.monotonic()
    assert reason in ran(cli)  # once for each daemon
    assert time.monotonic() - began < 15  # known, not tried again


def test_a_guest_that_panics_on_kvm(cli: Cli) -> None:
    """A guest that does not start is told apart from one that hangs, with Firecracker's exit status."""
    give(cli, Script(guest=Guest.PANIC))
    insist(cli)
    line = refusal(cli)
    assert line.startswith("Firecracker cannot be used: a guest does not start on this host's KVM (")


# -- snapshots ------------------------------------------------------------------------------------------------


def test_a_snapshot_of_another_vmm_or_version(cli: Cli) -> None:
    """A snapshot that QEMU made, or an older Firecracker, is replaced, which is said once."""
    give(cli, Script(version="1.15.1"))
    (of_qemu,) = cli.home.snapshots.iterdir()
    other = "(the old one is of another VMM, CPU or kernel)"
    assert other in ran(cli)
    (of_old,) = cli.home.snapshots.iterdir()
    assert ran(cli) == ""
    assert cli("down").returncode == 0

    give(cli, Script())
    assert other in ran(cli)
    assert ran(cli) == ""
    (of_new,) = cli.home.snapshots.iterdir()
    assert len({of_qemu.name, of_old.name, of_new.name}) == 3


@pytest.mark.parametrize(("name", "cut"), [("memory", 4096), ("state", 1000)])
def test_a_truncated_snapshot(cli: Cli, name: str, cut: int) -> None:
    """A snapshot whose memory or state was cut is made anew, which is said once."""
    give(cli)
    ran(cli)
    assert cli("down").returncode == 0
    (folder,) = cli.home.snapshots.iterdir()
    file = folder / name
    file.chmod(0o600)
    os.truncate(file, file.stat().st_size - cut)

    said = ran(cli)

    assert f"fireclaw: the snapshot file '{name}' is truncated" in said
    assert said.count("it is built anew") == 1
    assert ran(cli) == ""


def test_a_disk_that_is_full_when_a_snapshot_is_made(cli: Cli) -> None:
    """What Firecracker says of a full disk reaches the user, each time, and nothing stays of the attempt."""
    give(cli, Script(fail={"PUT /snapshot/create": _NO_ROOM}))
    insist(cli)
    for _ in range(2):
        assert _NO_ROOM in refusal(cli)
    kept = [path.name for path in cli.home.snapshots.iterdir()]
    give(cli)  # there is room again
    assert cli("down").returncode == 0
    assert _BUILT.decode() in ran(cli)
    assert not set(kept) & {path.name for path in cli.home.snapshots.iterdir()}


# -- jails ----------------------------------------------------------------------------------------------------


@as_root
def test_what_a_dead_machine_left_of_its_jail(cli: Cli) -> None:
    """A jail that no row names is found and removed by prune, which says so; others' jails stay."""
    give(cli)
    ran(cli)
    machine = str(uuid.uuid4())
    jail = cli.home.jails / "firecracker" / f"fireclaw-{home_tag(cli.home.data)}-{machine}"
    (jail / "root/dev").mkdir(parents=True)
    (jail / "root/kernel").write_bytes(b"a link")
    other = cli.home.jails / "firecracker/somebody-elses"
    other.mkdir()

    done = cli("prune")

    assert done.returncode == 0
    assert f"what firecracker left of machine {machine[:8]}" in done.stdout.decode() + done.stderr.decode()
    assert not jail.exists()
    assert other.exists()
    other.rmdir()
    assert ran(cli) == ""


@as_root
def test_jails_on_another_file_system(cli: Cli) -> None:
    """Images that cannot be linked into jails are an error that says what to keep together."""
    give(cli)
    insist(cli)
    cli.home.jails.mkdir()
    script = (
        'mount -t tmpfs none "$0" && "$@"; status=$?; FIRECLAW="$1 $2 $3"; $FIRECLAW down 2>/dev/null; exit $status'
    )
    argv = ["unshare", "--mount", "sh", "-c", script, str(cli.home.jails), *cli.argv("run", "--", "true")]
    done = subprocess.run(argv, env=cli.env, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)

    assert done.returncode == 125
    line = done.stderr.decode().splitlines()[-1]
    assert "into a jail: it lies on another file system" in line
    assert line.endswith("(keep images, snapshots and jails of FIRECLAW_HOME on one file system)")
