"""The ledger: what it writes, what it refuses, and that no change to it goes unseen."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireclaw.errors import ConflictError, CorruptError, InvalidError, SetupError
from fireclaw.store import ledger as ledger_module
from fireclaw.store.database import Database
from fireclaw.store.ledger import Head, Ledger, find_anchor, read, save_anchor, verify

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def clock() -> float:
    """Stand still."""
    return 1_795_512_600.25


def write(path: Path, count: int) -> Head:
    """Write a ledger with ``count`` entries."""
    ledger = Ledger(path, clock)
    for number in range(count):
        ledger.append("test.event", {"n": number, "text": "zwölf"}, agent="worker", machine="m1")
    ledger.close()
    return ledger.head


def test_a_line_is_what_the_format_says(tmp_path: Path) -> None:
    """A line holds the ten members in order, and its hash is that of its bytes without the hash."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, clock)
    entry = ledger.append("tool.result", {"z": 1, "a": "é"}, agent="worker", machine="m1", origin="guest")
    ledger.close()
    line = path.read_bytes()
    members = json.loads(line)
    assert list(members) == ["v", "seq", "ts", "type", "agent", "machine", "origin", "data", "prev", "hash"]
    assert members["ts"] == "2026-11-24T09:30:00.250000Z"
    assert members["data"] == {"a": "é", "z": 1}
    assert members["prev"] == "0" * 64
    without = line[:-1].replace(f',"hash":"{members["hash"]}"'.encode(), b"")
    assert hashlib.sha256(without).hexdigest() == members["hash"] == entry.hash
    assert list(read(path)) == [entry]


def test_the_file_is_private_whatever_it_was(tmp_path: Path) -> None:
    """The file is 0600, also where it existed with other rights."""
    path = tmp_path / "ledger.jsonl"
    path.touch(mode=0o644)
    write(path, 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_chain_goes_on_after_reopening(tmp_path: Path) -> None:
    """A new writer continues the sequence and the chain of the one before."""
    path = tmp_path / "ledger.jsonl"
    write(path, 3)
    head = write(path, 2)
    verdict = verify(path)
    assert verdict.ok
    assert (verdict.entries, verdict.head) == (5, head)


def test_a_long_last_line_is_found(tmp_path: Path) -> None:
    """Reopening finds the last line even where it is longer than one read."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, clock)
    for _ in range(3):
        ledger.append("big", {str(n): "x" * 8172 for n in range(8)})
    ledger.close()
    assert min(map(len, path.read_bytes().splitlines())) > 64 * 1024
    assert write(path, 1).seq == 4
    assert verify(path).ok


def test_there_is_one_writer(tmp_path: Path) -> None:
    """A second writer is refused while the first lives, and let in after it."""
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path, clock)
    with pytest.raises(ConflictError, match="another process"):
        Ledger(path, clock)
    first.close()
    first.close()
    Ledger(path, clock).close()


def test_a_half_line_is_cut_off_and_the_cut_is_recorded(tmp_path: Path) -> None:
    """What a crash left behind the last newline is removed, and an entry says how much and what it was."""
    path = tmp_path / "ledger.jsonl"
    write(path, 2)
    with path.open("ab") as file:
        file.write(b'{"v":1,"seq":3')
    before = verify(path)
    assert (before.ok, before.entries, before.tail) == (True, 2, 14)
    write(path, 1)
    entries = list(read(path))
    assert [entry.type for entry in entries] == ["test.event", "test.event", "ledger.cut", "test.event"]
    assert entries[2].data["bytes"] == 14
    assert entries[2].data["sha256"] == hashlib.sha256(b'{"v":1,"seq":3').hexdigest()
    assert verify(path).ok


def test_a_spoiled_last_line_is_not_built_upon(tmp_path: Path) -> None:
    """A writer refuses to continue after a last line that is no entry, and leaves the file free."""
    path = tmp_path / "ledger.jsonl"
    write(path, 2)
    with path.open("ab") as file:
        file.write(b"hello\n")
    for _ in range(2):
        with pytest.raises(CorruptError, match="last line"):
            Ledger(path, clock)
    with pytest.raises(CorruptError, match="line 3"):
        list(read(path))


def test_a_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    """A link in the ledger's place is refused with the reason."""
    target = tmp_path / "target"
    target.touch()
    (tmp_path / "ledger.jsonl").symlink_to(target)
    with pytest.raises(SetupError, match="cannot write the ledger"):
        Ledger(tmp_path / "ledger.jsonl", clock)


def test_a_full_disk_leaves_the_chain_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails half way is taken back, said with its reason, and the next one continues the chain."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, clock)
    ledger.append("first", {})
    real_write = os.write
    calls = iter([10, None])

    def short_write(fd: int, data: memoryview) -> int:
        size = next(calls)
        if size is None:
            raise OSError(28, "No space left on device")
        return real_write(fd, data[:size])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short_write)
        with pytest.raises(SetupError, match="No space left on device"):
            ledger.append("lost", {})
    ledger.append("second", {})
    ledger.close()
    assert [entry.type for entry in read(path)] == ["first", "second"]
    assert verify(path).ok


def test_secrets_do_not_reach_the_file(tmp_path: Path) -> None:
    """A registered secret is replaced in values and keys at any depth, also where a long string is cut."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, clock)
    ledger.redact("hunter2")
    ledger.redact("hunter2-and-more")
    entry = ledger.append(
        "test",
        {"a": ["x hunter2 y"], "hunter2": {"b": "hunter2-and-more"}, "long": "." * 8190 + "hunter2" + "." * 99},
    )
    ledger.close()
    assert b"hunter2" not in path.read_bytes()
    assert b"hun" not in path.read_bytes()
    assert entry.data["a"] == ["x [redacted] y"]
    assert entry.data["[redacted]"] == {"b": "[redacted]"}
    with pytest.raises(InvalidError):
        ledger.redact("")


def test_long_strings_are_cut_with_their_digest(tmp_path: Path) -> None:
    """A long string keeps its head, its length in bytes and its digest; a short one stays as it is."""
    text = "é" * 5000
    ledger = Ledger(tmp_path / "ledger.jsonl", clock)
    entry = ledger.append("test", {"long": text, "short": "é" * 4096})
    ledger.close()
    encoded = text.encode()
    assert entry.data["long"] == {
        "cut": "é" * 4096,
        "bytes": 10_000,
        "sha256": hashlib.sha256(encoded).hexdigest(),
    }
    assert entry.data["short"] == "é" * 4096


def test_an_entry_is_bounded_as_a_whole(tmp_path: Path) -> None:
    """Many strings that are each short enough do not make a line without bound."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(path, clock)
    entry = ledger.append("test", {"all": ["x" * 8000] * 100})
    ledger.close()
    assert set(entry.data) == {"cut", "bytes", "sha256"}
    assert path.stat().st_size < 20_000


def test_any_text_is_written_and_read_back(tmp_path: Path) -> None:
    """Newlines, NUL, lone surrogates and quotes neither break a line nor change."""
    path = tmp_path / "ledger.jsonl"
    text = 'a\nb\0c\ud800"\\\u2028,"hash":"'
    ledger = Ledger(path, clock)
    ledger.append("test", {"text": text})
    ledger.close()
    assert [entry.data["text"] for entry in read(path)] == [text]
    assert verify(path).ok


def test_what_json_does_not_know_is_the_callers_mistake(tmp_path: Path) -> None:
    """A value that JSON cannot hold raises and writes nothing."""
    ledger = Ledger(tmp_path / "ledger.jsonl", clock)
    with pytest.raises(TypeError):
        ledger.append("test", {"bytes": b"x"})
    with pytest.raises(ValueError, match="JSON"):
        ledger.append("test", {"nan": float("nan")})
    ledger.close()
    assert ledger.head.seq == 0


def edit(lines: list[bytes]) -> list[bytes]:
    """Change one character of a value."""
    return [lines[0], lines[1].replace(b'"n":1', b'"n":7'), *lines[2:]]


def edit_and_rehash(lines: list[bytes]) -> list[bytes]:
    """Change a value and give the line a fitting hash."""
    members = json.loads(lines[1])
    body = lines[1].replace(b'"n":1', b'"n":7').replace(f',"hash":"{members["hash"]}"'.encode(), b"")
    digest = hashlib.sha256(body[:-1]).hexdigest()
    return [lines[0], body[:-2] + f',"hash":"{digest}"}}\n'.encode(), *lines[2:]]


TAMPERINGS: list[tuple[Callable[[list[bytes]], list[bytes]], int, str]] = [
    (edit, 2, "entry 2 was edited"),
    (edit_and_rehash, 3, "entry 3 does not continue"),
    (lambda lines: [*lines[:2], *lines[3:]], 3, "the entries 3 to 3 are missing before entry 4"),
    (lambda lines: lines[1:], 1, "the entries 1 to 1 are missing"),
    (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], 2, "the entries 2 to 2 are missing"),
    (lambda lines: [*lines, lines[2]], 6, "entry 3 stands after entry 5"),
    (lambda lines: [*lines[:2], b"\n", *lines[2:]], 3, "not a ledger entry"),
    (lambda lines: [lines[0].replace(b":", b": ", 1), *lines[1:]], 1, "entry 1 was edited"),
    (lambda lines: [lines[0].replace(b'"v":1', b'"v":2'), *lines[1:]], 1, "not a ledger entry"),
    (lambda lines: [*lines[:4], b"[]\n"], 5, "not a ledger entry"),
]


@pytest.mark.parametrize(("tamper", "line", "what"), TAMPERINGS)
def test_tampering_is_found(tmp_path: Path, tamper: Callable[[list[bytes]], list[bytes]], line: int, what: str) -> None:
    """An edited, removed, moved, repeated or inserted line is found where it stands."""
    path = tmp_path / "ledger.jsonl"
    write(path, 5)
    assert verify(path).ok
    path.write_bytes(b"".join(tamper(path.read_bytes().splitlines(keepends=True))))
    verdict = verify(path)
    assert not verdict.ok
    assert verdict.problem is not None
    assert verdict.problem.line == line
    assert what in verdict.problem.what


def test_a_cut_tail_is_found_by_the_anchor(tmp_path: Path) -> None:
    """Without its last lines a chain is good in itself, but not with the anchor."""
    path = tmp_path / "ledger.jsonl"
    anchor = write(path, 5)
    assert verify(path, anchor).ok
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    assert verify(path).ok
    verdict = verify(path, anchor)
    assert verdict.problem is not None
    assert verdict.problem.what == "the entries 4 to 5, which the anchor knows, are missing at the end"
    assert verdict.entries == 3


def test_a_chain_written_anew_is_found_by_the_anchor(tmp_path: Path) -> None:
    """A whole new chain, longer than the old one, does not contain the anchor."""
    path = tmp_path / "ledger.jsonl"
    anchor = write(path, 3)
    path.unlink()
    ledger = Ledger(path, clock)
    for _ in range(6):
        ledger.append("forged", {})
    ledger.close()
    assert verify(path).ok
    verdict = verify(path, anchor)
    assert verdict.problem is not None
    assert verdict.problem.line == 3
    assert "written anew" in verdict.problem.what


def test_an_empty_ledger_is_good(tmp_path: Path) -> None:
    """A chain of no entries is whole and has no head."""
    path = tmp_path / "ledger.jsonl"
    write(path, 0)
    assert verify(path) == ledger_module.Verdict(entries=0, head=None, problem=None)


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, Head]:
    """A ledger of five entries: its path, bytes and head."""
    path = tmp_path_factory.mktemp("five") / "ledger.jsonl"
    head = write(path, 5)
    return path, path.read_bytes(), head


@given(position=st.integers(min_value=0), bit=st.integers(min_value=0, max_value=7))
def test_no_flipped_bit_goes_unseen(five: tuple[Path, bytes, Head], position: int, bit: int) -> None:
    """Whatever bit of the file changes, the chain with its anchor no longer verifies."""
    path, good, anchor = five
    spoiled = bytearray(good)
    spoiled[position % len(good)] ^= 1 << bit
    path.write_bytes(spoiled)
    assert not verify(path, anchor).ok


def test_the_anchor_is_the_place_saved_last(tmp_path: Path) -> None:
    """The newest anchor is read from the store's file, while it is open and after; no store, no anchor."""
    path = tmp_path / "store.db"
    assert find_anchor(path) is None
    store = Database(path)
    assert find_anchor(path) is None
    save_anchor(store, "h1", Head(3, "aa"))
    save_anchor(store, "h1", Head(9, "bb"))
    assert find_anchor(path) == Head(9, "bb")
    store.close()
