"""What can be said of a QEMU without starting one: its arguments, its fingerprint, text made safe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import InvalidError, SetupError
from fireclaw.store.database import Database
from fireclaw.store.machines import ProcessRows
from fireclaw.vmm.base import Accel, Cause, VmSpec, cause_of_reset, escape
from fireclaw.vmm.process import Gate
from fireclaw.vmm.qemu import Qemu, _command_line, _Fds

if TYPE_CHECKING:
    from collections.abc import Iterator

SPEC = VmSpec(
    machine_id="0123456789ab",
    kernel=Path("/k"),
    initrd=Path("/i"),
    root=Path("/r"),
    image=Path("/m"),
    memory_mib=256,
    vcpus=1,
    accel=Accel.TCG,
    tsc_khz=2_596_122,
    folder=Path("/f"),
    slot=3,
)
COLD = _Fds(root=10, image=11, channel=12, control=13, boot=(14, 15), memory=None)
SOURCE = replace(COLD, memory=16)
CLONE = replace(SOURCE, boot=None)


WORKSPACE = replace(CLONE, workspace=(17, 18))


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Qemu]:
    """QEMU as it is installed here."""
    database = Database(tmp_path / "db")
    yield Qemu(Gate(ProcessRows(database), "home"))
    database.close()


def words(fds: _Fds) -> str:
    """The whole command line."""
    return " ".join(_command_line(SPEC, fds, name="fireclaw-home-0123456789ab"))


class TestCommandLine:
    """QEMU's arguments."""

    @pytest.mark.parametrize("fds", [COLD, SOURCE, CLONE, WORKSPACE])
    def test_there_is_no_network_and_no_path(self, fds: _Fds) -> None:
        """A machine has no network card, and QEMU is told no path of ours."""
        line = words(fds)
        assert "-nodefaults" in line
        assert "net" not in line
        assert not {"/k", "/i", "/r", "/m", "/f"} & set(line.replace(",", " ").replace("=", " ").split())

    @pytest.mark.parametrize("fds", [COLD, SOURCE, CLONE])
    def test_drives_are_read_only(self, fds: _Fds) -> None:
        """Neither the runtime nor the image can be written."""
        drives = [word for word in _command_line(SPEC, fds, name="n") if word.startswith("if=none")]
        assert len(drives) == 2
        assert all(drive.endswith("readonly=on") for drive in drives)

    def test_a_workspace_is_the_third_drive_and_writable(self) -> None:
        """It comes behind runtime and image, and is the only one that the guest may write to."""
        drives = [word for word in _command_line(SPEC, WORKSPACE, name="n") if word.startswith("if=none")]
        assert drives[:2] == [word for word in _command_line(SPEC, CLONE, name="n") if word.startswith("if=none")]
        assert "id=workspace" in drives[2]
        assert drives[2].endswith("readonly=off")

    def test_only_a_source_shares_its_memory(self) -> None:
        """What a clone or a cold boot writes stays its own."""
        assert "share=on" in words(SOURCE)
        assert "share=on" not in words(CLONE)
        assert "share=off" in words(CLONE)
        assert "memory-backend-ram" in words(COLD)

    def test_a_clone_reads_no_kernel(self) -> None:
        """A clone waits for its state instead."""
        assert "-incoming defer" in words(CLONE)
        assert "-kernel" not in _command_line(SPEC, CLONE, name="n")
        assert "tsc_early_khz=2596122" in words(SOURCE)

    @pytest.mark.parametrize("fds", [COLD, SOURCE, CLONE, WORKSPACE])
    def test_every_descriptor_it_names_is_inherited(self, fds: _Fds) -> None:
        """The descriptors in the arguments are those that are passed."""
        line = words(fds)
        for fd in fds.all():
            assert f"fd={fd}" in line or f"/proc/self/fd/{fd}" in line


class TestFingerprint:
    """What a snapshot depends on."""

    def test_it_is_the_same_for_all_machines_of_a_kind(self, qemu: Qemu) -> None:
        """Identity, place and the paths of files do not matter."""
        other = replace(SPEC, machine_id="x", slot=9, folder=Path("/o"), kernel=Path("/other"), image=Path("/o"))
        assert qemu.fingerprint(SPEC) == qemu.fingerprint(other)

    @pytest.mark.parametrize(
        "change",
        [{"memory_mib": 512}, {"vcpus": 2}, {"tsc_khz": 1}, {"cmdline": ("x",)}, {"accel": Accel.KVM}],
        ids=str,
    )
    def test_it_tells_kinds_apart(self, qemu: Qemu, change: dict[str, int]) -> None:
        """Whatever the guest has seen at its boot matters."""
        assert qemu.fingerprint(SPEC) != qemu.fingerprint(replace(SPEC, **change))  # type: ignore[arg-type]

    def test_a_missing_qemu_is_told_with_the_remedy(
        self, qemu: Qemu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """Without QEMU the error says how to get it."""
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(SetupError, match="apt-get install qemu-system-x86"):
            qemu.fingerprint(SPEC)


def test_a_guests_text_is_made_safe() -> None:
    """Line ends stay, whatever else could move a terminal's cursor becomes visible; no byte is an error."""
    assert escape(b"one\r\ntwo\x1b[2J\x07\xff\tend\xc2\x9b") == "one\ntwo\\x1b[2J\\x07\\xff\\tend\\x9b"
    assert escape("r\u00e9sum\u00e9 \u202e") == "r\u00e9sum\u00e9 \\u202e"


def test_too_little_memory_is_refused() -> None:
    """A guest that would die without a word is never started."""
    assert replace(SPEC, memory_mib=96).memory_mib == 96
    with pytest.raises(InvalidError, match="95 MiB are too little for a machine; 96 are the least"):
        replace(SPEC, memory_mib=95)


def test_a_panic_is_told_from_a_reboot() -> None:
    """Both reset the guest; a kernel that gave up has said so."""
    assert cause_of_reset("one\n[ 1.5] Kernel panic - not syncing: No init found\n") is Cause.GUEST_PANIC
    assert cause_of_reset("one\n[ 1.5] reboot: Restarting system\n") is Cause.GUEST_RESET
