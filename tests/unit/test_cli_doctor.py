"""``fireclaw doctor``: each check finds what it is for, and says what to do."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fireclaw.daemon import doctor
from fireclaw.daemon.doctor import Check, State, run_checks
from fireclaw.llm import catalogue
from fireclaw.llm.fetch import model_path
from fireclaw.llm.memory import total_memory
from fireclaw.paths import Home
from fireclaw.testing.firecracker import Script, install
from fireclaw.vmm.accel import Verdict
from fireclaw.vmm.advice import Advice
from fireclaw.vmm.firecracker import release
from fireclaw.vmm.host import HostMemo, boot_id

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def home() -> Iterator[Home]:
    """A home with a short path that nothing has been put in yet."""
    with tempfile.TemporaryDirectory(prefix="fc", dir="/tmp") as folder:
        yield Home(Path(folder), Path(folder) / "run", Path(folder))


@pytest.fixture(autouse=True)
def _hide_firecracker(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Firecracker of this host's own is found."""
    folders = (folder for folder in os.environ["PATH"].split(":") if not Path(folder, "firecracker").exists())
    monkeypatch.setenv("PATH", ":".join(folders))


def find(home: Home, name: str) -> Check:
    """Run all checks and return one."""
    return next(check for check in run_checks(home) if check.name == name)


def find_all(home: Home, name: str) -> list[Check]:
    """Run all checks and return those of a name."""
    return [check for check in run_checks(home) if check.name == name]


def no_kvm(*, jailed: bool = False) -> Verdict:
    """What a host without KVM answers."""
    del jailed
    return Verdict(False, "this host has no /dev/kvm", "load it")


def some_kvm(*, jailed: bool = False) -> None:
    """What a host with KVM answers."""
    del jailed


def keep(home: Home, vmm: str, verdict: Verdict, boot: str = "") -> None:
    """Have a verdict in the home, as a daemon leaves it."""
    HostMemo(home.memo).put(f"kvm with {vmm}", {**asdict(verdict), "boot_id": boot or boot_id()})


@pytest.fixture
def programs(home: Home) -> Path:
    """Firecracker and its jailer, installed."""
    return install(release.folder(home.vmms))


def test_fresh_home(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fresh home without KVM nothing fails but what the host lacks, and the checks change nothing."""
    monkeypatch.setattr(doctor, "find_obstacle", no_kvm)

    checks = {check.name: check for check in run_checks(home)}

    assert list(checks) == [
        "platform",
        "packages",
        "vmm",
        "kvm",
        "settings",
        "folders",
        "disk",
        "runtime",
        "image",
        "model",
        "irc port",
        "daemon",
    ]
    assert {checks[name].state for name in ("platform", "settings", "folders", "daemon")} == {State.OK}
    assert (checks["runtime"].state, checks["runtime"].remedy) == (State.WARN, "fireclaw setup")
    assert (checks["image"].state, checks["image"].remedy) == (State.WARN, "fireclaw setup")
    assert (checks["model"].state, checks["model"].remedy) == (State.WARN, "fireclaw setup")
    assert not home.run.exists()


def test_what_is_not_ok_has_a_remedy(home: Home) -> None:
    """Each finding has a reason, and each bad one a next step."""
    for check in run_checks(home):
        assert check.reason
        assert bool(check.remedy) is (check.state is not State.OK)


def test_missing_packages_are_named_with_the_command(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an empty PATH the packages are missing, and the remedy is the command that installs them."""
    monkeypatch.setenv("PATH", "/nonexistent")

    found = find(home, "packages")

    assert found.state is State.FAIL
    assert "qemu-system-x86" in found.reason
    assert "apt-get install -y --no-install-recommends" in found.remedy


def test_bad_settings_fail_with_their_place(home: Home) -> None:
    """A mistake in the configuration is found, here and wherever the settings are needed."""
    home.config_file.write_text("[irc]\nprot = 1\n")

    found = find(home, "settings")

    assert (found.state, found.remedy) == (State.FAIL, "did you mean 'port'?")
    assert "line 2: unknown key 'irc.prot'" in found.reason


@pytest.mark.parametrize(("mode", "state"), [(0o755, State.WARN), (0o770, State.FAIL), (0o702, State.FAIL)])
def test_open_folders_are_found(home: Home, mode: int, state: State) -> None:
    """A state folder that others may read is a warning, one that they may write a failure, each with its remedy."""
    home.make()
    home.run.chmod(mode)

    found = find(home, "folders")

    assert (found.state, found.remedy) == (state, f"chmod 700 {home.run}")


# -- machines -------------------------------------------------------------------------------------------------


def test_kvm_tells_the_kept_verdict(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a booted machine has shown counts until the host starts anew; without it KVM is only a hope."""
    monkeypatch.setattr(doctor, "find_obstacle", some_kvm)
    hope = find(home, "kvm")
    keep(home, "qemu", Verdict(False, "a guest hangs", hangs=True))
    hangs = find(home, "kvm")
    keep(home, "qemu", Verdict(True))
    works = find(home, "kvm")
    keep(home, "qemu", Verdict(False, "a guest hangs", hangs=True), "another boot")

    assert hope == find(home, "kvm") == Check("kvm", State.OK, "it is tried with the first machine")
    assert (hangs.state, hangs.reason) == (State.WARN, "a guest hangs")
    assert works == Check("kvm", State.OK, "a machine has booted on it")


def test_kvm_that_is_insisted_on_must_be_there(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """An obstacle is a warning under ``auto``, a failure under ``kvm``, and of no interest under ``tcg``."""
    monkeypatch.setattr(doctor, "find_obstacle", no_kvm)
    found = {}
    for accel in ("auto", "kvm", "tcg"):
        monkeypatch.setenv("FIRECLAW_MACHINE_ACCEL", accel)
        found[accel] = find(home, "kvm")

    assert found["auto"] == Check("kvm", State.WARN, "this host has no /dev/kvm", "load it")
    assert found["kvm"].state is State.FAIL
    assert found["tcg"].state is State.OK


@pytest.mark.usefixtures("programs")
def test_kvm_is_told_for_each_vmm_that_is_tried(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KVM that works with QEMU alone says so for each; one that hangs is tried with Firecracker only."""
    monkeypatch.setattr(doctor, "find_obstacle", some_kvm)
    keep(home, "firecracker", Verdict(False, "a guest does not start"))
    failed = find(home, "kvm")
    used = find(home, "vmm")
    keep(home, "firecracker", Verdict(False, "a guest hangs", hangs=True))
    hangs = find(home, "kvm")

    reason = "Firecracker: a guest does not start; QEMU: it is tried with the first machine"
    assert (failed.state, failed.reason) == (State.WARN, reason)
    assert used.state is State.OK
    assert used.reason.startswith("QEMU ")
    assert used.reason.endswith("; Firecracker 1.16.1 is here, and KVM keeps it from use")
    assert (hangs.state, hangs.reason) == (State.WARN, "a guest hangs")


def test_the_vmm_is_named_with_version_and_place(home: Home, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Firecracker where it is installed and KVM may work, QEMU otherwise; each with its version and its file."""
    monkeypatch.setattr(doctor, "find_obstacle", some_kvm)
    firecracker = find(home, "vmm")
    monkeypatch.setenv("FIRECLAW_MACHINE_VMM", "qemu")
    qemu = find(home, "vmm")

    assert firecracker == Check("vmm", State.OK, f"Firecracker 1.16.1, {programs / 'firecracker'}")
    assert re.fullmatch(r"QEMU \d+\.\d+\.\d+, /\S+/qemu-system-x86_64", qemu.reason)


def test_a_missing_firecracker_is_missed_where_kvm_may_work(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """With KVM the way to Firecracker is shown; without it nobody is told of what would be of no use."""
    monkeypatch.setattr(doctor, "find_obstacle", some_kvm)
    with_kvm = find(home, "vmm")
    monkeypatch.setattr(doctor, "find_obstacle", no_kvm)
    without = find(home, "vmm")

    assert (with_kvm.state, with_kvm.remedy) == (State.WARN, "fireclaw setup --vmm firecracker")
    assert with_kvm.reason.endswith("; Firecracker is not installed")
    assert (without.state, without.remedy) == (State.OK, "")
    assert "Firecracker" not in without.reason


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "Firecracker is not installed"),
        ("old", "is version 1.13.1; Fireclaw works with 1.14.0 and newer, below 2.0"),
        ("software CPU", "Firecracker needs KVM, and the settings ask for the software CPU"),
    ],
)
def test_a_firecracker_that_is_insisted_on_must_be_there(
    home: Home, monkeypatch: pytest.MonkeyPatch, how: str, reason: str
) -> None:
    """Under ``vmm = "firecracker"`` its lack, a wrong version and a software CPU are failures with a next step."""
    monkeypatch.setenv("FIRECLAW_MACHINE_VMM", "firecracker")
    if how == "old":
        install(release.folder(home.vmms), Script(version="1.13.1"))
    elif how == "software CPU":
        monkeypatch.setenv("FIRECLAW_MACHINE_ACCEL", "tcg")

    found = find(home, "vmm")

    assert found.state is State.FAIL
    assert found.reason.endswith(reason)
    assert found.remedy
    assert find(home, "kvm").reason


@pytest.mark.usefixtures("programs")
def test_what_is_weaker_without_a_jail_is_told(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's machines are jailed, with limits where cgroup v2 has them; a person is told what his lack."""
    monkeypatch.setattr(doctor, "find_obstacle", some_kvm)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(doctor, "can_limit", lambda: True)
    limited = find_all(home, "jail")
    monkeypatch.setattr(doctor, "can_limit", lambda: False)
    unlimited = find_all(home, "jail")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    (person,) = find_all(home, "jail")

    assert [check.state for check in limited] == [State.OK, State.OK]
    assert [check.state for check in unlimited] == [State.OK, State.WARN]
    assert "cgroup v2" in unlimited[1].reason
    assert person.state is State.WARN
    assert "no chroot" in person.reason


def test_the_hosts_settings_are_told_where_kvm_may_work(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slow or leaky setting is a warning of its own, their lack one good line; without KVM there is no lecture."""
    advice = [Advice("this is slow", "mend this"), Advice("that is slow", "mend that")]
    monkeypatch.setattr(doctor, "find_obstacle", some_kvm)
    monkeypatch.setattr(doctor, "find_slow", lambda: advice)
    monkeypatch.setattr(doctor, "find_leaks", list)

    assert find_all(home, "speed") == [
        Check("speed", State.WARN, "this is slow", "mend this"),
        Check("speed", State.WARN, "that is slow", "mend that"),
    ]
    assert find_all(home, "isolation") == [Check("isolation", State.OK, "no SMT, no KSM, no swap in the clear")]
    monkeypatch.setattr(doctor, "find_obstacle", no_kvm)
    assert find_all(home, "speed") == find_all(home, "isolation") == find_all(home, "jail") == []


# -- the rest -------------------------------------------------------------------------------------------------


def test_a_model_elsewhere_needs_no_file(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model server in the settings there is nothing to fetch."""
    monkeypatch.setenv("FIRECLAW_MODEL_BASE_URL", "http://127.0.0.1:1/v1")

    assert find(home, "model") == Check("model", State.OK, "served by http://127.0.0.1:1/v1")


def test_a_truncated_model_fails(home: Home) -> None:
    """A model file of the wrong size is a failure with its remedy."""
    home.make()
    home.models.mkdir()
    entry = catalogue.pick_default(len(os.sched_getaffinity(0)), total_memory())
    model_path(entry, home.models).write_bytes(b"short")

    found = find(home, "model")

    assert found.state is State.FAIL
    assert found.remedy.endswith("; fireclaw setup")


def test_a_taken_port_fails_unless_it_is_picked(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that another program has is a failure; port 0 is always fine."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        monkeypatch.setenv("FIRECLAW_IRC_PORT", str(other.getsockname()[1]))
        taken = find(home, "irc port")
    monkeypatch.setenv("FIRECLAW_IRC_PORT", "0")

    assert taken.state is State.FAIL
    assert "Address already in use" in taken.reason
    assert find(home, "irc port") == Check("irc port", State.OK, "a free port is picked")


def test_a_silent_daemon_fails_and_is_named(home: Home) -> None:
    """A daemon that holds its lock and does not answer is a failure that names its pid."""
    home.make()
    with home.lock.open("w") as lock:
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)

        found = find(home, "daemon")

    assert found.state is State.FAIL
    assert found.reason == f"it runs (pid {os.getpid()}) and does not answer"
    assert find(home, "daemon").state is State.OK
