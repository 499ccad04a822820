"""The places that a Firecracker runs in: what lies there, and that nothing of it is left."""

from __future__ import annotations

import fcntl
import itertools
import os
import socket
import uuid
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from review_limits import descriptors

from fireclaw.errors import SetupError, VmmError
from fireclaw.store.database import Database
from fireclaw.store.machines import ProcessRows
from fireclaw.vmm.base import FIRST_USER, Accel, VmSpec
from fireclaw.vmm.firecracker import jail as module
from fireclaw.vmm.firecracker.jail import Block, Jail, can_limit
from fireclaw.vmm.firecracker.places import Folder, Place
from fireclaw.vmm.firecracker.release import Programs
from fireclaw.vmm.process import Gate, home_tag

if TYPE_CHECKING:
    from collections.abc import Iterator

MARK = "fireclaw-0123abcd-one"
PROGRAMS = Programs(Path("/opt/firecracker"), Path("/opt/jailer"), (1, 16, 1))
OPTIONS = ["--api-sock", "api"]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make jails")


@pytest.fixture
def spec(tmp_path: Path) -> VmSpec:
    """A machine with a file for everything, and a workspace."""
    folder = tmp_path / "machine"
    folder.mkdir()
    for name in ("kernel", "image", "workspace"):
        (tmp_path / name).write_text(name)
        (tmp_path / name).chmod(0o444)
    (tmp_path / "workspace").chmod(0o600)
    return VmSpec(
        machine_id="one",
        kernel=tmp_path / "kernel",
        initrd=tmp_path / "kernel",
        root=tmp_path / "image",
        image=tmp_path / "image",
        workspace=tmp_path / "workspace",
        memory_mib=256,
        vcpus=2,
        accel=Accel.KVM,
        tsc_khz=0,
        folder=folder,
        slot=7,
    )


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    """A store, which the gates want."""
    database = Database(tmp_path / "db")
    yield database
    database.close()


@pytest.fixture
def block(tmp_path: Path, database: Database) -> Block:
    """The jails of one home, beside the machine's files."""
    return Block(tmp_path / "jails", Gate(ProcessRows(database), "0123abcd"))


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plain folder in the place of the host's cgroups."""
    monkeypatch.setattr(module, "CGROUPS", tmp_path / "cgroup")
    return tmp_path / "cgroup"


@pytest.fixture
def jail(block: Block, spec: VmSpec) -> Jail:
    """A jail of the machine, made."""
    jail = Jail(block, spec, "firecracker")
    jail.make()
    return jail


@pytest.fixture(params=["folder", pytest.param("jail", marks=as_root)])
def place(request: pytest.FixtureRequest, spec: VmSpec) -> Place:
    """Each kind of place, made."""
    place: Place = Folder(spec) if request.param == "folder" else request.getfixturevalue("jail")
    if request.param == "folder":
        place.make()
    return place


class TestEach:
    """What all places do."""

    async def test_files_lie_there_under_their_names(self, place: Place, spec: VmSpec) -> None:
        """A file can be read there, costs no copy, and is unharmed when the place is removed."""
        place.add("kernel", spec.kernel)
        assert (place.root / "kernel").read_text() == "kernel"
        assert (place.root / "kernel").samefile(spec.kernel)
        await place.remove()
        assert spec.kernel.read_text() == "kernel"

    async def test_a_missing_file_is_told(self, place: Place, tmp_path: Path) -> None:
        """The path and the next step are in the error."""
        with pytest.raises(SetupError, match=r"(?i)/none.*no such file.*fireclaw setup"):
            place.add("kernel", tmp_path / "none")
        await place.remove()

    async def test_open_files_lie_there_too(self, place: Place, spec: VmSpec) -> None:
        """What we have open is there under a name, to be read; our descriptor stays ours."""
        fd = os.open(spec.kernel, os.O_RDONLY)
        place.add_open("memory", fd)
        assert (place.root / "memory").read_text() == "kernel"
        await place.remove()
        assert os.read(fd, 10) == b"kernel"
        os.close(fd)

    async def test_a_fifo_brings_what_is_written(self, place: Place) -> None:
        """Our end is non-blocking and inherited by nobody, and there before the writer's."""
        fd = place.add_fifo("console")
        writer = os.open(place.root / "console", os.O_RDWR | os.O_NONBLOCK)  # as Firecracker opens it
        os.write(writer, b"one")
        assert os.read(fd, 100) == b"one"
        with pytest.raises(BlockingIOError):
            os.read(fd, 100)
        assert not os.get_inheritable(fd)
        for end in (fd, writer):
            os.close(end)
        await place.remove()

    async def test_a_later_daemon_finds_what_was_written_meanwhile(self, place: Place) -> None:
        """A FIFO that its writer holds keeps some bytes while no daemon reads."""
        first = place.add_fifo("console")
        writer = os.open(place.root / "console", os.O_RDWR | os.O_NONBLOCK)
        os.close(first)
        os.write(writer, b"meanwhile")
        again = place.open_fifo("console")
        assert os.read(again, 100) == b"meanwhile"
        os.close(again)
        os.close(writer)
        await place.remove()

    async def test_a_socket_is_reached_however_long_its_path_is(self, place: Place) -> None:
        """A socket in the place is connected to without following links."""
        listener = socket.socket(socket.AF_UNIX)
        folder = os.open(place.root, os.O_PATH)
        listener.bind(f"/proc/self/fd/{folder}/ch")
        os.close(folder)
        (place.root / "link").symlink_to("ch")
        with pytest.raises(ConnectionRefusedError):
            place.connect("ch")
        listener.listen()
        with place.connect("ch") as sock:
            assert not sock.getblocking()
        for name in ("none", "link"):
            with pytest.raises(OSError, match=r"No such file|Connection refused|not permitted"):
                place.connect(name)
        listener.close()
        await place.remove()

    async def test_a_snapshot_is_offered_and_taken(self, place: Place) -> None:
        """What the VMM writes under an offered name comes back as a descriptor, and outlives the place."""
        place.offer("memory")
        (place.root / "memory").write_bytes(b"memory")
        fd = place.take("memory")
        await place.remove()
        assert os.pread(fd, 100, 0) == b"memory"
        os.close(fd)

    async def test_nothing_is_left(self, place: Place, spec: VmSpec) -> None:
        """After the removal neither file nor descriptor is there, whatever was in it; a second one does no harm."""
        before = descriptors()
        place.add("image", spec.image)
        os.close(place.add_fifo("log"))
        place.offer("memory")
        (place.root / "memory").write_bytes(b"half")
        for _ in range(2):
            await place.remove()
        assert list(spec.folder.iterdir()) == []
        assert list((spec.folder.parent).glob("jails/*/*")) == []
        assert descriptors() == before


class TestFolder:
    """A machine's own folder."""

    def test_the_command(self, spec: VmSpec) -> None:
        """Firecracker itself, with few descriptors, in that folder; its id is the mark."""
        folder = Folder(spec)
        assert folder.argv(PROGRAMS, MARK, OPTIONS) == [
            "prlimit",
            "--nofile=2048",
            "/opt/firecracker",
            "--id",
            MARK,
            *OPTIONS,
        ]
        assert folder.cwd == spec.folder

    async def test_what_is_offered_can_be_sealed(self, spec: VmSpec) -> None:
        """A snapshot is written to memory, as the folder may lie on a small file system."""
        folder = Folder(spec)
        folder.offer("memory")
        fd = folder.take("memory")
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        os.close(fd)
        await folder.remove()


class TestJail:
    """A chroot of root's."""

    pytestmark = as_root

    def test_the_command(self, block: Block, spec: VmSpec, cgroups: Path) -> None:
        """The jailer with the machine's own user, and limits where the host's cgroups can be used."""
        jail = Jail(block, spec, "firecracker")
        words = jail.argv(PROGRAMS, MARK, OPTIONS)
        user = str(FIRST_USER + 7)
        assert words[0] == "/opt/jailer"
        assert option(words, "--id") == [MARK]
        assert option(words, "--exec-file") == ["/opt/firecracker"]
        assert option(words, "--chroot-base-dir") == [str(jail.root.parents[2])]
        assert (option(words, "--uid"), option(words, "--gid")) == ([user], [user])
        assert option(words, "--resource-limit") == ["no-file=2048", f"fsize={256 << 20}"]
        assert "--cgroup-version" not in words
        assert words[words.index("--") + 1 :] == OPTIONS

        _make_cgroups(cgroups, "cpu io memory pids")
        words = jail.argv(PROGRAMS, MARK, OPTIONS)
        assert option(words, "--cgroup-version") == ["2"]  # the jailer's own default is 1
        assert option(words, "--parent-cgroup") == ["fireclaw-0123abcd"]
        limits = dict(word.split("=", 1) for word in option(words, "--cgroup"))
        assert set(limits) == {"memory.max", "pids.max", "cpu.max"}
        assert 256 < int(limits["memory.max"].removesuffix("M")) < 512
        assert limits["cpu.max"] == "300000 100000"  # of two virtual processors, and one for Firecracker

    def test_a_workspace_may_be_larger_than_the_memory(self, block: Block, spec: VmSpec) -> None:
        """The largest file that it may write is the larger of the two."""
        assert spec.workspace is not None
        os.truncate(spec.workspace, 1 << 30)
        words = Jail(block, spec, "firecracker").argv(PROGRAMS, MARK, OPTIONS)
        assert f"fsize={1 << 30}" in option(words, "--resource-limit")

    def test_the_mark_is_an_id_that_the_jailer_takes(self, database: Database) -> None:
        """Its alphabet is letters, digits and the dash, and 64 of them."""
        mark = Gate(ProcessRows(database), home_tag(Path("/"))).mark(str(uuid.uuid4()))
        assert len(mark) <= 64
        assert mark.replace("-", "").isalnum()

    async def test_only_the_workspace_is_the_machines(self, jail: Jail, spec: VmSpec) -> None:
        """Shared files stay root's, read-only to the jail's user; the workspace and the FIFOs are the user's own."""
        assert spec.workspace is not None
        jail.add("image", spec.image)
        jail.add("workspace", spec.workspace, writable=True)
        os.close(jail.add_fifo("console"))
        owners = {path.name: path.stat().st_uid for path in jail.root.iterdir()}
        assert owners == {"image": 0, "workspace": FIRST_USER + 7, "console": FIRST_USER + 7}
        await jail.remove()

    async def test_files_of_another_file_system_are_told(self, jail: Jail) -> None:
        """A hard link cannot leave a file system; the error says what to do."""
        with pytest.raises(SetupError, match="one file system"):
            jail.add("kernel", Path("/proc/version"))
        fd = os.memfd_create("memory")
        with pytest.raises(SetupError, match="snapshot's memory into a jail"):
            jail.add_open("memory", fd)
        os.close(fd)
        await jail.remove()

    async def test_two_jails_of_one_mark_cannot_be(self, block: Block, jail: Jail, spec: VmSpec) -> None:
        """What an earlier one left is never used."""
        with pytest.raises(SetupError):
            Jail(block, spec, "firecracker").make()
        await jail.remove()

    async def test_one_of_an_older_program_is_found(self, block: Block, spec: VmSpec) -> None:
        """A machine that an older release runs is adopted where it is."""
        old = Jail(block, spec, "firecracker-v1.15.1")
        old.make()
        assert Jail(block, spec, "firecracker").root == old.root
        await old.remove()

    async def test_what_is_left_is_found_and_swept(
        self, block: Block, jail: Jail, database: Database, spec: VmSpec, cgroups: Path
    ) -> None:
        """Jails and cgroups of dead machines are found by their marks, and only those of this home."""
        jails = jail.root.parents[2]
        Jail(Block(jails, Gate(ProcessRows(database), "99999999")), spec, "firecracker").make()
        (cgroups / block.cgroup / "fireclaw-0123abcd-two").mkdir(parents=True)
        assert block.find() == {"one", "two"}
        for machine_id in ("one", "two", "never"):
            block.raze(machine_id)
        assert block.find() == set()
        assert not jail.root.exists()
        assert [path.name for path in jails.glob("*/*")] == ["fireclaw-99999999-one"]
        assert not (cgroups / block.cgroup).exists()

    async def test_the_homes_cgroup_stays_while_one_needs_it(
        self, block: Block, jail: Jail, spec: VmSpec, cgroups: Path
    ) -> None:
        """The end of one machine takes nothing from another that is just starting."""
        (cgroups / block.cgroup).mkdir(parents=True)
        other = Jail(block, replace(spec, machine_id="two"), "firecracker")
        await jail.remove()
        assert (cgroups / block.cgroup).exists()
        await other.remove()
        assert not (cgroups / block.cgroup).exists()

    async def test_a_link_in_a_jail_is_not_followed(self, jail: Jail, tmp_path: Path) -> None:
        """A VMM that its guest has taken over cannot have us read or connect to something else."""
        secret = tmp_path / "secret"
        secret.write_text("root's")
        for name in ("memory", "console"):
            (jail.root / name).symlink_to(secret)
        with pytest.raises(SetupError):
            jail.take("memory")
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            jail.open_fifo("console")
        await jail.remove()
        assert secret.read_text() == "root's"

    async def test_a_fifo_in_a_snapshots_place_does_not_hold_us_up(self, jail: Jail) -> None:
        """Such a VMM cannot stop the daemon either: what it wrote must be a file."""
        before = descriptors()
        os.mkfifo(jail.root / "memory")
        writer = os.open(jail.root / "memory", os.O_RDWR)  # so that even a driver that waits for one does not wait
        with pytest.raises(VmmError, match="wrote no file 'memory'"):
            jail.take("memory")
        os.close(writer)
        await jail.remove()
        assert descriptors() == before


class TestLimits:
    """Whether cgroups can be used."""

    @pytest.mark.parametrize(
        ("controllers", "handed_down", "root", "usable"),
        [
            ("cpu io memory pids", "", True, True),
            ("cpu io memory pids", "", False, False),
            ("cpu io memory pids", "cpu memory pids", False, True),
            ("memory pids", "memory pids", True, False),
            ("", "", True, False),
        ],
    )
    def test_the_controllers_must_be_there(
        self, cgroups: Path, controllers: str, handed_down: str, *, root: bool, usable: bool
    ) -> None:
        """All three of our limits or none; within a container they must be handed down already."""
        _make_cgroups(cgroups, controllers, handed_down, root=root)
        assert can_limit() is usable

    def test_without_cgroup_v2_there_are_none(self, cgroups: Path) -> None:
        """A host with version 1, or with none, has no limits and no error."""
        cgroups.mkdir()
        assert not can_limit()


def _make_cgroups(folder: Path, controllers: str, handed_down: str = "", *, root: bool = True) -> None:
    folder.mkdir()
    (folder / "cgroup.controllers").write_text(f"{controllers}\n")
    (folder / "cgroup.subtree_control").write_text(f"{handed_down}\n")
    if not root:
        (folder / "cgroup.events").write_text("populated 1\n")


def option(words: list[str], name: str) -> list[str]:
    """The words that follow an option, wherever it stands."""
    return [following for word, following in itertools.pairwise(words) if word == name]
