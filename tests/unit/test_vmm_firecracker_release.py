"""Which Firecracker is used: the installed release or the one on PATH, and which will not do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import SetupError
from fireclaw.testing.firecracker import Script, install
from fireclaw.vmm.firecracker import release

if TYPE_CHECKING:
    from pathlib import Path

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's machines are jailed")


@pytest.fixture
def vmms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where releases are installed; nothing of the host's is on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "vmms"


def test_the_installed_release_comes_first(vmms: Path, tmp_path: Path) -> None:
    """What setup has installed is used, whatever else is on PATH."""
    place = install(release.folder(vmms))
    install(tmp_path / "bin", Script(version="1.15.0"))
    assert release.find(vmms) == release.Programs(place / "firecracker", place / "jailer", (1, 16, 1))


def test_one_on_path_will_do(vmms: Path, tmp_path: Path) -> None:
    """A distribution's package is used, and links are followed: the jailer wants the program's real path."""
    real = install(tmp_path / "opt", Script(version="1.15.1"))
    (tmp_path / "bin").mkdir()
    for name in ("firecracker", "jailer"):
        (tmp_path / "bin" / name).symlink_to(real / name)
    assert release.find(vmms) == release.Programs(real / "firecracker", real / "jailer", (1, 15, 1))


def test_none_is_told_with_the_command(vmms: Path) -> None:
    """The hint is the verb that installs it."""
    with pytest.raises(SetupError, match=r"not installed \(fireclaw setup --vmm firecracker\)"):
        release.find(vmms)


@pytest.mark.parametrize("version", ["1.13.9", "0.25.0", "2.0.0"])
def test_a_version_that_will_not_do_is_named(vmms: Path, version: str) -> None:
    """Too old or of another age: the error says which it is and which it must be."""
    install(release.folder(vmms), Script(version=version))
    with pytest.raises(SetupError, match=rf"is version {version}; Fireclaw works with 1\.14\.0 and newer, below 2\.0"):
        release.find(vmms)


@pytest.mark.parametrize("version", ["1.14.0", "1.16.1", "1.99.0"])
def test_a_version_that_will_do(vmms: Path, version: str) -> None:
    """From the oldest that has what we send to the last of its age."""
    install(release.folder(vmms), Script(version=version))
    assert release.dotted(release.find(vmms).version) == version


@as_root
def test_root_needs_a_jailer(vmms: Path) -> None:
    """As root nothing runs without its jail."""
    (install(release.folder(vmms)) / "jailer").unlink()
    with pytest.raises(SetupError, match=r"jailer is missing: as root Firecracker runs in a jail only"):
        release.find(vmms)


@pytest.mark.skipif(os.geteuid() == 0, reason="root needs one")
def test_others_need_no_jailer(vmms: Path) -> None:
    """A person's machines run under his own user id."""
    (install(release.folder(vmms)) / "jailer").unlink()
    assert release.find(vmms).jailer is None


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("", "cannot be run: Exec format error"),
        ("#!/bin/sh\necho hello\n", "names no version but says 'hello'"),
        ("#!/bin/sh\necho no KVM >&2; exit 1\n", "names no version but says 'no KVM'"),
        ("#!/no/such/interpreter\n", "cannot be run: No such file or directory"),
    ],
)
def test_what_is_no_firecracker_is_told(vmms: Path, program: str, reason: str) -> None:
    """A file of that name that is something else: the path, and what it did."""
    place = release.folder(vmms)
    place.mkdir(parents=True)
    for name in ("firecracker", "jailer"):
        (place / name).write_text(program)
        (place / name).chmod(0o755)
    with pytest.raises(SetupError, match=rf"{place / 'firecracker'}.* {reason}"):
        release.find(vmms)


def test_a_program_that_says_nothing_is_given_up(vmms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that hangs does not hold up the daemon."""
    monkeypatch.setattr(release, "_ANSWER_S", 0.2)
    place = release.folder(vmms)
    place.mkdir(parents=True)
    (place / "firecracker").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (place / "firecracker").chmod(0o755)
    with pytest.raises(SetupError, match=r"cannot be run: no answer within 0\.2 s"):
        release.find(vmms)
