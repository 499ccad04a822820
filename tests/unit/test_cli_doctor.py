"""``fireclaw doctor``: each check finds what it is for, and says what to do."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fireclaw.daemon import doctor
from fireclaw.daemon.doctor import Check, State, run_checks
from fireclaw.llm import catalogue
from fireclaw.llm.fetch import model_path
from fireclaw.llm.memory import total_memory
from fireclaw.paths import Home
from fireclaw.vmm.accel import Verdict
from fireclaw.vmm.base import Accel
from fireclaw.vmm.host import HostMemo, boot_id

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def home() -> Iterator[Home]:
    """A home with a short path that nothing has been put in yet."""
    with tempfile.TemporaryDirectory(prefix="fc", dir="/tmp") as folder:
        yield Home(Path(folder), Path(folder) / "run", Path(folder))


def find(home: Home, name: str) -> Check:
    """Run all checks and return one."""
    return next(check for check in run_checks(home) if check.name == name)


def test_fresh_home(home: Home) -> None:
    """On a fresh home nothing fails but what the host lacks, and the checks change nothing."""
    checks = {check.name: check for check in run_checks(home)}

    assert list(checks) == [
        "platform",
        "packages",
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


def test_kvm_tells_the_kept_verdict(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a booted machine has shown counts until the host starts anew; without it KVM is only a hope."""
    monkeypatch.setattr(doctor, "find_obstacle", lambda: None)
    memo = HostMemo(home.data / "host.json")
    hope = find(home, "kvm")
    memo.put("accel", {"accel": "tcg", "reason": "a guest hangs", "boot_id": boot_id()})
    hangs = find(home, "kvm")
    memo.put("accel", {"accel": "tcg", "reason": "a guest hangs", "boot_id": "another"})

    assert hope == find(home, "kvm") == Check("kvm", State.OK, "it is tried with the first machine")
    assert (hangs.state, hangs.reason) == (State.WARN, "a guest hangs")


def test_kvm_that_is_insisted_on_must_be_there(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """An obstacle is a warning under ``auto``, a failure under ``kvm``, and of no interest under ``tcg``."""
    monkeypatch.setattr(doctor, "find_obstacle", lambda: Verdict(Accel.TCG, "it is closed", "open it"))
    found = {}
    for accel in ("auto", "kvm", "tcg"):
        monkeypatch.setenv("FIRECLAW_MACHINE_ACCEL", accel)
        found[accel] = find(home, "kvm")

    assert found["auto"] == Check("kvm", State.WARN, "it is closed", "open it")
    assert found["kvm"].state is State.FAIL
    assert found["tcg"].state is State.OK


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
