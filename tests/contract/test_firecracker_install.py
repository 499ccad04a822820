"""Installing Firecracker: from a web server on the loopback, and from what somebody downloaded.

The programs in the archives are the fake's: they tell their version as the real ones do.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from api_office import served_office

from fireclaw.errors import CorruptError, FireclawError, SetupError
from fireclaw.testing.firecracker import Script
from fireclaw.testing.firecracker import install as install_fake
from fireclaw.vmm.firecracker.install import install
from fireclaw.vmm.firecracker.release import RELEASE, Release, find

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_TOP = "release-v1.16.1-x86_64"
_NAME = "firecracker-v1.16.1-x86_64.tgz"


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, bytes]:
    """The bytes of firecracker and jailer, version 1.16.1."""
    return read_programs(tmp_path)


def read_programs(tmp_path: Path, version: str = "1.16.1") -> dict[str, bytes]:
    """The bytes of the fake's programs of a version."""
    folder = install_fake(tmp_path / f"programs-{version}", Script(version=version))
    return {name: (folder / name).read_bytes() for name in ("firecracker", "jailer")}


def pack(members: Mapping[str, bytes]) -> bytes:
    """An archive of regular files."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return packed.getvalue()


def release_members(programs: Mapping[str, bytes], version: str = "1.16.1") -> dict[str, bytes]:
    """What a release's archive holds, as upstream packs it."""
    files = {f"{name}-v{version}-x86_64": data for name, data in programs.items()}
    files["LICENSE"] = b"Apache-2.0"
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    top = f"release-v{version}-x86_64"
    return {f"{top}/{name}": data for name, data in files.items()} | {f"{top}/SHA256SUMS": sums.encode()}


@dataclass
class Upstream:
    """A release page.

    Attributes:
        data: the archive it serves.
        cut: bytes after which the connection is dropped.
        status: its answer's status.
        asked: the paths that were asked for.
    """

    data: bytes = b""
    cut: int | None = None
    status: int = 200
    asked: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def release(self) -> Release:
        """The release as we would pin it."""
        url = f"http://127.0.0.1:{self.port}/v1.16.1/{_NAME}"
        return Release(RELEASE.version, url, hashlib.sha256(self.data).hexdigest())


@pytest.fixture
def upstream(programs: dict[str, bytes]) -> Iterator[Upstream]:
    """A web server of a thread of its own that has the release."""
    site = Upstream(pack(release_members(programs)))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append(self.path)
            if site.status != 200:
                self.send_error(site.status)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(site.data)))
            self.end_headers()
            self.wfile.write(site.data[: site.cut])

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def vmms(tmp_path: Path) -> Path:
    """Where programs are installed; not there yet."""
    return tmp_path / "home/vmms"


@dataclass
class Lines:
    """What was said."""

    lines: list[str] = field(default_factory=list)

    def __call__(self, line: str) -> None:
        """Take a line."""
        self.lines.append(line)


@pytest.fixture
def said() -> Lines:
    """Takes what is said."""
    return Lines()


def left(vmms: Path) -> list[str]:
    """What lies where programs are installed, without the lock."""
    return sorted(path.name for path in vmms.iterdir() if path.suffix != ".lock") if vmms.exists() else []


def refusal(vmms: Path, file: Path, kind: type[FireclawError] = SetupError) -> FireclawError:
    """Install what will not do; nothing is left of it."""
    with pytest.raises(kind) as caught:
        install(vmms, lambda _: None, file=file)
    assert left(vmms) == []
    return caught.value


def write(tmp_path: Path, members: Mapping[str, bytes]) -> Path:
    """Put an archive on the disk."""
    file = tmp_path / _NAME
    file.write_bytes(pack(members))
    return file


# -- what works -----------------------------------------------------------------------------------------------


def test_the_release_is_fetched_once(upstream: Upstream, vmms: Path, said: Lines) -> None:
    """Both programs are installed as what the driver looks for, runnable; asking again needs no network."""
    found = install(vmms, said, release=upstream.release)

    assert found == find(vmms)
    assert (found.version, found.jailer) == ((1, 16, 1), found.firecracker.parent / "jailer")
    for program in (found.firecracker, found.jailer):
        assert program is not None
        assert program.stat().st_mode & 0o777 == 0o755
        assert "v1.16.1" in subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    assert left(vmms) == ["firecracker-v1.16.1"]
    assert {path.name for path in found.firecracker.parent.iterdir()} == {"firecracker", "jailer"}
    assert said.lines == [
        f"fetching {upstream.release.url}",
        f"installed Firecracker 1.16.1 in {found.firecracker.parent}",
    ]
    assert install(vmms, said, release=upstream.release) == found
    assert said.lines[2:] == [f"Firecracker 1.16.1 is there already, in {found.firecracker.parent}"]
    assert upstream.asked == [f"/v1.16.1/{_NAME}"]


def test_a_broken_installation_is_replaced(upstream: Upstream, vmms: Path, said: Lines) -> None:
    """What a damaged disk or a killed installation left is not taken for an installation."""
    place = vmms / "firecracker-v1.16.1"
    place.mkdir(parents=True)
    (place / "firecracker").write_bytes(b"\x7fELF, once")
    (vmms / "firecracker-v1.16.1.new").mkdir()
    (vmms / "firecracker-v1.16.1.new/firecracker").touch()

    install(vmms, said, release=upstream.release)

    assert find(vmms).version == (1, 16, 1)
    assert left(vmms) == ["firecracker-v1.16.1"]


def test_a_downloaded_archive_is_taken_and_told_by_its_digest(
    programs: dict[str, bytes], tmp_path: Path, vmms: Path, said: Lines
) -> None:
    """``--file`` with an archive: its sha256 is shown, with whether it is upstream's."""
    file = write(tmp_path, release_members(programs))

    install(vmms, said, file=file)

    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert said.lines[0] == f"{file}: sha256 {digest}, not the archive that upstream published"
    assert find(vmms).jailer is not None


def test_the_published_archive_is_known(programs: dict[str, bytes], tmp_path: Path, vmms: Path, said: Lines) -> None:
    """An archive with the pinned digest is told as what it is."""
    file = write(tmp_path, release_members(programs))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()

    install(vmms, said, file=file, release=Release(RELEASE.version, RELEASE.url, digest))

    assert said.lines[0] == f"{file}: sha256 {digest}, as upstream published it"


@pytest.mark.parametrize("ending", ["", "-v1.16.1-x86_64"])
@pytest.mark.parametrize("what", ["folder", "program"])
def test_an_unpacked_release_is_taken(
    programs: dict[str, bytes], tmp_path: Path, said: Lines, ending: str, what: str
) -> None:
    """``--file`` with a folder, or with the program itself: the jailer beside it comes along."""
    vmms, folder = tmp_path / "vmms", tmp_path / "mine"
    folder.mkdir()
    for name, data in programs.items():
        (folder / f"{name}{ending}").write_bytes(data)  # as a browser leaves it: not executable

    install(vmms, said, file=folder if what == "folder" else folder / f"firecracker{ending}")

    found = find(vmms)
    assert found.firecracker.read_bytes() == programs["firecracker"]
    assert found.jailer is not None
    assert found.jailer.read_bytes() == programs["jailer"]
    digest = hashlib.sha256(programs["firecracker"]).hexdigest()
    assert said.lines[0] == f"{folder / 'firecracker'}{ending}: sha256 {digest}"


def test_two_at_once_install_once(upstream: Upstream, vmms: Path, said: Lines) -> None:
    """Whoever comes second says that it waits, and finds what the first has installed."""
    vmms.mkdir(parents=True)
    outcome: list[object] = []
    waiting = threading.Event()

    def note(line: str) -> None:
        said(line)
        waiting.set()

    with (vmms / "firecracker-v1.16.1.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: outcome.append(install(vmms, note, release=upstream.release)))
        second.start()
        assert waiting.wait(20)
        assert said.lines == ["another process is installing Firecracker; waiting for it"]
    second.join(20)
    assert outcome == [find(vmms)]


# -- what does not --------------------------------------------------------------------------------------------


def test_other_bytes_from_the_web_are_refused(upstream: Upstream, vmms: Path, programs: dict[str, bytes]) -> None:
    """A sound archive of other bytes than the pinned ones is refused with both digests, and nothing of it is run."""
    pinned = upstream.release
    ran = vmms.parent / "ran"
    upstream.data = pack(release_members(programs | {"firecracker": f"#!/bin/sh\ntouch {ran}\n".encode()}))

    with pytest.raises(CorruptError, match=r"is not Firecracker 1\.16\.1: refused") as caught:
        install(vmms, lambda _: None, release=pinned)

    assert pinned.sha256 in caught.value.message
    assert hashlib.sha256(upstream.data).hexdigest() in caught.value.message
    assert "--file PATH" in caught.value.hint
    assert left(vmms) == []
    assert not ran.exists()


def test_a_server_that_fails_is_told_with_another_way(upstream: Upstream, vmms: Path) -> None:
    """A refusal, a cut connection and a server that is not there say what happened, and offer ``--file``."""
    reasons = []
    for upstream.status, upstream.cut in ((404, None), (200, 100)):
        with pytest.raises(SetupError) as caught:
            install(vmms, lambda _: None, release=upstream.release)
        reasons.append(caught.value.message.partition(f"{_NAME}: ")[2])
        assert "--file PATH" in caught.value.hint
        assert left(vmms) == []
    assert reasons == ["HTTP 404 Not Found", f"the connection ended after 100 of {len(upstream.data)} bytes"]
    with pytest.raises(SetupError, match="Connection refused"):
        install(vmms, lambda _: None, release=Release((1, 16, 1), f"http://127.0.0.1:1/{_NAME}", ""))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_archive(programs: dict[str, bytes], tmp_path: Path, vmms: Path, keep: float) -> None:
    """An archive that ends early, wherever, is refused as that."""
    file = write(tmp_path, release_members({name: data + os.urandom(100_000) for name, data in programs.items()}))
    data = file.read_bytes()
    file.write_bytes(data[: max(int(len(data) * keep), 20)])

    error = refusal(vmms, file, CorruptError)

    assert error.message.startswith(f"{file} is truncated or damaged: ")
    assert error.hint == "download it again"


def test_an_archive_that_is_no_tar(tmp_path: Path, vmms: Path) -> None:
    """Compressed, and yet no archive."""
    file = tmp_path / _NAME
    file.write_bytes(gzip.compress(b"<html>not found</html>" * 100))

    assert "is truncated or damaged" in refusal(vmms, file, CorruptError).message


@pytest.mark.parametrize("data", [b"<html>not found</html>", b""])
def test_a_file_that_is_neither(tmp_path: Path, vmms: Path, data: bytes) -> None:
    """An error page that was saved as a release is called by its name."""
    file = tmp_path / _NAME
    file.write_bytes(data)

    error = refusal(vmms, file)

    assert error.message == f"{str(file)!r} is neither a .tgz archive nor a program"
    assert RELEASE.url in error.hint


def test_a_file_that_cannot_be_read(tmp_path: Path, vmms: Path) -> None:
    """A path with nothing there is named, with the reason; so is a folder without the program."""
    assert refusal(vmms, tmp_path / "no").message == f"cannot read {str(tmp_path / 'no')!r}: No such file or directory"
    assert refusal(vmms, tmp_path).message == (
        f"{str(tmp_path)!r} holds no 'firecracker' and no 'firecracker-v1.16.1-x86_64'"
    )


@pytest.mark.parametrize("missing", ["firecracker", "jailer"])
def test_an_archive_without_one_of_the_programs(
    programs: dict[str, bytes], tmp_path: Path, vmms: Path, missing: str
) -> None:
    """Both programs must be in an archive, also for a person, who gets no jail."""
    del programs[missing]

    error = refusal(vmms, write(tmp_path, release_members(programs)))

    assert error.message == f"{tmp_path / _NAME} holds no '{missing}-v1.16.1-x86_64'"
    assert RELEASE.url in error.hint


def test_an_archive_of_another_version(tmp_path: Path, vmms: Path) -> None:
    """The archive of another release is refused, and what it holds is named."""
    file = write(tmp_path, release_members(read_programs(tmp_path, "1.15.0"), "1.15.0"))

    assert refusal(vmms, file).message == (
        f"{file} holds no 'firecracker-v1.16.1-x86_64', but 'firecracker-v1.15.0-x86_64'"
    )


@pytest.mark.parametrize("wrong", ["firecracker", "jailer"])
def test_programs_that_say_another_version(tmp_path: Path, vmms: Path, wrong: str) -> None:
    """Names promise nothing: a program that tells another version than the pinned one is refused."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, data in read_programs(tmp_path).items():
        (folder / name).write_bytes(read_programs(tmp_path, "1.15.1")[name] if name == wrong else data)

    assert refusal(vmms, folder).message == f"{wrong} of {folder} is version 1.15.1, not 1.16.1"


def test_a_program_that_cannot_run(tmp_path: Path, vmms: Path) -> None:
    """A program of another architecture, or one that is cut, is refused in the words of the host."""
    file = tmp_path / "firecracker"
    file.write_bytes(b"\x7fELF\2\1\1" + bytes(100))

    assert refusal(vmms, file).message == f"firecracker of {file} cannot be run: Exec format error"


def test_a_program_alone(programs: dict[str, bytes], tmp_path: Path, vmms: Path, said: Lines) -> None:
    """Without a jailer root is refused; a person has Firecracker, and is told what is missing."""
    file = tmp_path / "firecracker"
    file.write_bytes(programs["firecracker"])
    if os.geteuid() == 0:
        assert "has no jailer: as root Firecracker runs in a jail only" in refusal(vmms, file).message
    else:
        install(vmms, said, file=file)
        assert find(vmms).jailer is None
        assert said.lines[-1].endswith(", without a jailer")


@pytest.mark.parametrize("name", [f"{_TOP}/../../firecracker-v1.16.1-x86_64", "/etc/firecracker-v1.16.1-x86_64"])
def test_a_member_that_points_elsewhere(programs: dict[str, bytes], tmp_path: Path, vmms: Path, name: str) -> None:
    """An archive with a path that leads out of it is refused, and nothing is written there."""
    members = {name: b"#!/bin/sh\n"} | release_members(programs)

    error = refusal(vmms, write(tmp_path, members))

    assert error.message == f"{tmp_path / _NAME} has a member {name!r}, as no release has: refused"
    assert not list(tmp_path.glob("firecracker-v1.16.1-x86_64"))


def test_a_link_in_the_place_of_a_program(tmp_path: Path, vmms: Path) -> None:
    """A link is no program, wherever it leads."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        link = tarfile.TarInfo(f"{_TOP}/firecracker-v1.16.1-x86_64")
        link.type, link.linkname = tarfile.SYMTYPE, "/bin/true"
        archive.addfile(link)
    file = tmp_path / _NAME
    file.write_bytes(packed.getvalue())

    assert "holds no 'firecracker-v1.16.1-x86_64'" in refusal(vmms, file).message


@pytest.mark.parametrize("how", ["wrong", "unnamed", "no list"])
def test_checksums_inside_must_agree(programs: dict[str, bytes], tmp_path: Path, vmms: Path, how: str) -> None:
    """A program that its archive's own list does not name, or names with another digest, is refused."""
    members = release_members(programs)
    sums = f"{_TOP}/SHA256SUMS"
    if how == "wrong":
        members[f"{_TOP}/jailer-v1.16.1-x86_64"] += b"\n# changed\n"
        expected = "'jailer-v1.16.1-x86_64' in {} is not what its SHA256SUMS promises: refused"
    elif how == "unnamed":
        members[sums] = members[sums].replace(b"jailer", b"gaoler")
        expected = "'jailer-v1.16.1-x86_64' in {} is not named in its SHA256SUMS: refused"
    else:
        del members[sums]
        expected = "'firecracker-v1.16.1-x86_64' in {} is not named in its SHA256SUMS: refused"

    assert refusal(vmms, write(tmp_path, members), CorruptError).message == expected.format(tmp_path / _NAME)


def test_a_full_disk(programs: dict[str, bytes], tmp_path: Path) -> None:
    """Where there is no room the error says where it is needed, and what was begun goes."""
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("a disk of a size of one's own needs root and a mount namespace")
    file = write(tmp_path, release_members({name: data + bytes(300_000) for name, data in programs.items()}))
    script = (
        "import sys, pathlib\n"
        "from fireclaw.vmm.firecracker.install import install\n"
        "vmms = pathlib.Path(sys.argv[1]) / 'vmms'\n"
        "try:\n install(vmms, lambda _: None, file=pathlib.Path(sys.argv[2]))\n"
        "except Exception as error:\n print(error); print([path.suffix for path in vmms.iterdir()])\n"
    )
    argv = [sys.executable, "-c", script, str(small), str(file)]
    mounted = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k none "$0" && "$@"', str(small), *argv]
    done = subprocess.run(mounted, capture_output=True, text=True, timeout=60, check=True)
    said, rest = done.stdout.splitlines()
    assert said == (
        f"cannot install Firecracker in '{small}/vmms': No space left on device (make room there, or mend its rights)"
    )
    assert rest == "['.lock']"


@pytest.mark.skipif(not os.environ.get("FIRECLAW_TEST_FIRECRACKER"), reason="FIRECLAW_TEST_FIRECRACKER names none")
def test_the_real_programs_are_taken(vmms: Path, said: Lines) -> None:
    """What real programs say of their version is understood."""
    install(vmms, said, file=Path(os.environ["FIRECLAW_TEST_FIRECRACKER"]))

    assert find(vmms).version == (1, 16, 1)


# -- the verb -------------------------------------------------------------------------------------------------


async def test_the_verb_names_the_file_as_the_daemon_finds_it() -> None:
    """A path is the caller's, and the daemon works elsewhere: it gets the whole one, links and all."""
    async with served_office() as office:
        fetched = await office.call("setup", "--vmm", "firecracker")
        taken = await office.call("setup", "--vmm", "firecracker", "--file", "fc.tgz", shell='cd / && exec "$@"')

    assert fetched == (0, b"", "fireclaw: installed from None\nfireclaw: ready\n")
    assert taken == (0, b"", "fireclaw: installed from /fc.tgz\nfireclaw: ready\n")


async def test_the_verb_refuses_what_makes_no_sense() -> None:
    """A file for nothing and a VMM that nobody knows are mistakes in the arguments; nothing is asked for."""
    async with served_office() as office:
        file = await office.call("setup", "--file", "fc.tgz")
        vmm = await office.call("setup", "--vmm", "firecraker")

    assert (file[0], vmm[0]) == (125, 125)
    assert file[2] == (
        "fireclaw: --file says what a VMM is installed from, and there is no --vmm (see 'fireclaw setup --help')\n"
    )
    assert "invalid choice: 'firecraker'" in vmm[2]
