"""The list of system packages, and what is said about missing ones."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fireclaw.images import SystemPackage, host, install_command, missing_packages

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

QEMU = SystemPackage("qemu-system-x86", "qemu-system-x86_64", "host", "runs the machines")
NGIRCD = SystemPackage("ngircd", "/usr/sbin/ngircd", "host", "the IRC server")


def test_every_line_of_the_list_is_whole() -> None:
    """Each package has a probe, a known occasion and a reason, and is named once."""
    packages = host.system_packages()

    assert {"qemu-system-x86", "mmdebstrap", "ngircd", "squashfs-tools"} <= {package.name for package in packages}
    assert len({package.name for package in packages}) == len(packages)
    assert {package.when for package in packages} == {"host", "person", "checkout", "test", "bench"}
    assert all(package.probe and package.why for package in packages)


def test_root_needs_no_sudo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The install command can be pasted as it is, by root and by a person."""
    command = "apt-get install -y --no-install-recommends qemu-system-x86 ngircd"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert install_command([QEMU, NGIRCD]) == command

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert install_command([QEMU, NGIRCD]) == f"sudo {command}"


def test_the_hint_for_a_missing_program_names_its_package() -> None:
    """Whoever lacks a program is told the command that installs it, if we know it."""
    assert host.install_hint("mksquashfs").endswith("--no-install-recommends squashfs-tools")
    assert host.install_hint("no-such-program") == ""


def test_programs_are_looked_for_on_path_and_files_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command is searched on PATH, an absolute path is looked at."""
    program = tmp_path / "fireclaw-probe"
    program.touch(mode=0o755)

    assert host.has_program(str(program))
    assert not host.has_program(str(tmp_path / "other"))
    assert not host.has_program(program.name)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert host.has_program(program.name)


def test_what_only_some_need_is_missing_only_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root does not miss a person's packages, nor a user what the tests need."""
    monkeypatch.setattr(host, "has_program", lambda _: False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert {package.when for package in missing_packages()} == {"host"}

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert {package.when for package in missing_packages()} == {"host", "person"}


def test_nothing_is_missing_where_everything_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that has it all is told nothing."""
    monkeypatch.setattr(host, "has_program", lambda _: True)

    assert missing_packages() == []
