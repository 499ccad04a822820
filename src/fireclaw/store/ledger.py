"""The ledger: the append-only, hash-chained record of what happened on this host. Written by the daemon only.

One JSON line an event::

    {"v":1,"seq":7,"ts":"2026-11-24T09:30:00.123456Z","type":"tool.call","agent":"worker","machine":"4f…",
     "origin":"host","data":{…},"prev":"<hash of line 6>","hash":"<hash of this line>"}

``hash`` is the SHA-256 of the line's bytes without its newline and without the ``,"hash":"…"`` member, so any tool can
check it with no JSON library. ``prev`` chains the lines: an edited, removed or moved line is found by ``verify``.
A cut tail looks like a shorter chain and is found only with an *anchor*, the place of the head kept elsewhere: the
daemon keeps it in the store (``save_anchor``). ``origin`` is ``host`` for what the daemon itself did or saw, and
``guest`` for what a guest claims (the output of a command, for instance).

Whoever may write the file *and* the anchor can rewrite both; that is said in the security notes, not prevented here.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from fireclaw.errors import ConflictError, CorruptError, InvalidError, SetupError

if TYPE_CHECKING:
    from pathlib import Path

    from fireclaw.store.database import Database

VERSION = 1
MAX_STRING = 8 * 1024  # bytes of one string in ``data``; the head of a longer one is kept with its digest
MAX_DATA = 64 * 1024  # bytes of all of ``data``; a larger one is kept the same way
REDACTED = "[redacted]"
GENESIS = "0" * 64  # ``prev`` of the first entry

_HASH_START = b',"hash":"'
_HASH_TAIL = len(_HASH_START) + 64 + len(b'"}')
_CHUNK = 64 * 1024

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS ledger_anchor (
    host_id TEXT PRIMARY KEY,
    seq BIGINT NOT NULL,
    hash TEXT NOT NULL
);
"""


@dataclass(frozen=True)
class Entry:
    """One event as it stands in the ledger.

    Attributes:
        seq: 1 for the first, without gaps.
        ts: UTC, RFC 3339 with microseconds.
        type: dotted, e.g. ``turn.started``.
        agent: the agent's name, or None.
        machine: the machine's id, or None.
        origin: ``host`` or ``guest``.
        data: what happened; bounded, secrets taken out.
        prev: the hash of the entry before.
        hash: this entry's hash.
    """

    seq: int
    ts: str
    type: str
    agent: str | None
    machine: str | None
    origin: str
    data: Mapping[str, object]
    prev: str
    hash: str


@dataclass(frozen=True)
class Head:
    """A place in the chain: the last entry's, or an anchor."""

    seq: int
    hash: str


@dataclass(frozen=True)
class Problem:
    """The first thing that is wrong with a ledger.

    Attributes:
        line: its line number, from 1.
        what: one sentence.
    """

    line: int
    what: str


@dataclass(frozen=True)
class Verdict:
    """What ``verify`` found.

    Attributes:
        entries: how many good entries stand before the first problem, or in all.
        head: the last good entry's place; None if there is none.
        problem: the first problem, or None.
        tail: bytes of an unfinished last line. A crash in the middle of a write leaves one; the next daemon cuts it
            off and records the cut, so it is no problem in itself.
    """

    entries: int
    head: Head | None
    problem: Problem | None
    tail: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing was changed, removed or moved, as far as can be told."""
        return self.problem is None


class Ledger:
    """The one writer of the chain.

    ::

        ledger = Ledger(home.ledger, clock=time.time)
        ledger.redact(api_key)
        ledger.append("agent.invoked", {"by": "alice"}, agent="worker")
        ledger.checkpoint()
        ledger.close()

    An append is one write to the page cache: it survives the death of the process. ``checkpoint`` makes what was
    written survive the death of the host; the caller calls it on a bounded interval.

    Args:
        path: the file; made (0600) if missing.
        clock: seconds since the epoch.

    Raises:
        ConflictError: another process writes it.
        CorruptError: its last line is not an entry.
        SetupError: it cannot be opened.
    """

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._secrets: list[str] = []
        self._fd = _open_alone(path)
        try:
            self._size, cut = _cut_half_line(self._fd)
            self._head = _last_place(self._fd, self._size, path)
            if cut:
                digest = hashlib.sha256(cut).hexdigest()
                self.append("ledger.cut", {"reason": "half-written line", "bytes": len(cut), "sha256": digest})
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> Head:
        """The place of the last entry; seq 0 in an empty ledger."""
        return self._head

    def redact(self, secret: str) -> None:
        """Have every later occurrence of this text replaced before it is written.

        Raises:
            InvalidError: the text is empty.
        """
        if not secret:
            raise InvalidError("an empty text cannot be a secret")
        if secret not in self._secrets:
            self._secrets.append(secret)
            self._secrets.sort(key=len, reverse=True)  # a secret that contains another goes first

    def append(
        self,
        type: str,  # noqa: A002 (the member's name in the line)
        data: Mapping[str, object],
        *,
        agent: str | None = None,
        machine: str | None = None,
        origin: str = "host",
    ) -> Entry:
        """Add one event.

        Args:
            type: dotted name of the event.
            data: JSON values only.
            agent: the agent's name where there is one.
            machine: the machine's id where there is one.
            origin: ``host``, or ``guest`` for what a guest claims.

        Raises:
            SetupError: it cannot be written (disk full ...); the chain is as it was before.
            TypeError: ``data`` holds what JSON does not know.
        """
        entry_data = self._bounded(data)
        seq, prev = self._head.seq + 1, self._head.hash
        ts = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="microseconds")[:-6] + "Z"
        body = _canonical(
            {
                "v": VERSION,
                "seq": seq,
                "ts": ts,
                "type": type,
                "agent": agent,
                "machine": machine,
                "origin": origin,
                "data": entry_data,
                "prev": prev,
            }
        )
        digest = hashlib.sha256(body).hexdigest()
        self._write(body[:-1] + _HASH_START + digest.encode() + b'"}\n')
        self._head = Head(seq, digest)
        return Entry(seq, ts, type, agent, machine, origin, entry_data, prev, digest)

    def checkpoint(self) -> Head:
        """Make everything written so far survive a power cut, and return the head to be kept as the anchor.

        Raises:
            SetupError: the disk refuses.
        """
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise _unwritable(self._path, error) from error
        return self._head

    def close(self) -> None:
        """Give the file free. Closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, line: bytes) -> None:
        """Write all of the line or nothing of it."""
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            raise _unwritable(self._path, error) from error
        self._size += len(line)

    def _bounded(self, data: Mapping[str, object]) -> dict[str, object]:
        """Copy ``data`` with secrets taken out and long strings cut."""
        clean = self._clean_object(data)
        text = _canonical(clean)
        return clean if len(text) <= MAX_DATA else _cut(text)

    def _clean(self, value: object) -> object:
        if isinstance(value, str):
            value = self._redacted(value)
            # A character is at most four bytes: only a string that may be too long is encoded to be measured.
            if len(value) * 4 > MAX_STRING and len(text := value.encode(errors="backslashreplace")) > MAX_STRING:
                return _cut(text)
            return value
        if isinstance(value, Mapping):
            return self._clean_object(value)
        if isinstance(value, list | tuple):
            return [self._clean(item) for item in value]
        return value

    def _clean_object(self, value: Mapping[str, object]) -> dict[str, object]:
        return {self._redacted(key): self._clean(value[key]) for key in sorted(value)}

    def _redacted(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, REDACTED)
        return text


def verify(path: Path, anchor: Head | None = None) -> Verdict:
    """Check the whole chain.

    Args:
        path: the ledger's file.
        anchor: a place that the chain must contain; without it a cut tail cannot be told from a shorter history.

    Raises:
        OSError: it cannot be read.
    """
    head = Head(0, GENESIS)
    tail = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                tail = len(line)
                break
            found = _check(line[:-1], head)
            if isinstance(found, str):
                return Verdict(head.seq, head if head.seq else None, Problem(number, found))
            head = found
            if anchor is not None and head.seq == anchor.seq and head.hash != anchor.hash:
                what = f"entry {head.seq} is not the one that the anchor knows: the chain was written anew"
                return Verdict(head.seq - 1, None, Problem(number, what))
    problem = None
    if anchor is not None and head.seq < anchor.seq:
        what = f"the entries {head.seq + 1} to {anchor.seq}, which the anchor knows, are missing at the end"
        problem = Problem(head.seq + 1, what)
    return Verdict(head.seq, head if head.seq else None, problem, tail)


def read(path: Path) -> Iterator[Entry]:
    """Yield the entries in order, without checking the chain; an unfinished last line is left out.

    Raises:
        CorruptError: a line is not an entry, with its number.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            entry = _parse(line[:-1])
            if entry is None:
                raise CorruptError(
                    f"line {number} of {str(path)!r} is not a ledger entry",
                    hint="run 'fireclaw ledger verify' to see what was changed",
                )
            yield entry


def save_anchor(db: Database, host_id: str, head: Head) -> None:
    """Keep the head's place in the store, away from the ledger's own file."""
    with db.transaction() as tx:
        tx.execute(
            "INSERT INTO ledger_anchor (host_id, seq, hash) VALUES (?, ?, ?)"
            " ON CONFLICT (host_id) DO UPDATE SET seq = excluded.seq, hash = excluded.hash",
            (host_id, head.seq, head.hash),
        )


def find_anchor(path: Path) -> Head | None:
    """Read the anchor from the store's file, daemon or no daemon; None where there is none.

    Args:
        path: the store's file; it holds one host.
    """
    if not path.exists():
        return None
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
    try:
        row = database.execute("SELECT seq, hash FROM ledger_anchor").fetchone()
    except sqlite3.DatabaseError:  # a store without anchors, or none at all
        return None
    finally:
        database.close()
    return Head(*row) if row else None


def _canonical(value: Mapping[str, object]) -> bytes:
    """Serialise: compact, ASCII (so that a lone surrogate cannot break the file), members in the given order."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def _cut(text: bytes) -> dict[str, object]:
    """Stand in for a text that is too long: an object, so that no text can pass itself off as one."""
    head = text[:MAX_STRING].decode(errors="ignore")
    return {"cut": head, "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}


def _check(line: bytes, head: Head) -> Head | str:
    """Return the line's place if it follows ``head``, else what is wrong with it."""
    body = line[:-_HASH_TAIL] + b"}"
    entry = _parse(line)
    if entry is None:
        return "this is not a ledger entry"
    if hashlib.sha256(body).hexdigest() != entry.hash:
        return f"entry {entry.seq} was edited: its bytes do not fit its hash"
    if entry.seq > head.seq + 1:
        return f"the entries {head.seq + 1} to {entry.seq - 1} are missing before entry {entry.seq}"
    if entry.seq <= head.seq:
        return f"entry {entry.seq} stands after entry {head.seq}: lines were moved or repeated"
    if entry.prev != head.hash:
        return f"entry {entry.seq} does not continue the entry before it: one of them was replaced"
    return Head(entry.seq, entry.hash)


def _parse(line: bytes) -> Entry | None:
    """Read one line; None if it is not an entry in exactly our form."""
    if line[-_HASH_TAIL : -_HASH_TAIL + len(_HASH_START)] != _HASH_START:
        return None
    try:
        members = json.loads(line)
        if members.pop("v") != VERSION or not isinstance(members["seq"], int):
            return None
        return Entry(**members)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _open_alone(path: Path) -> int:
    """Open for appending, as the only writer."""
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise ConflictError(
            f"the ledger {str(path)!r} is being written by another process",
            hint="a daemon of this home is running; see 'fireclaw status'",
        ) from error
    os.fchmod(fd, 0o600)
    return fd


def _cut_half_line(fd: int) -> tuple[int, bytes]:
    """Cut off what follows the last newline; return the new size and what was cut."""
    size = os.fstat(fd).st_size
    end = _after_last_newline(fd, size)
    cut = os.pread(fd, size - end, end)
    if cut:
        os.ftruncate(fd, end)
    return end, cut


def _last_place(fd: int, size: int, path: Path) -> Head:
    """Read the last line's place; ``size`` ends with a newline or is 0."""
    if not size:
        return Head(0, GENESIS)
    start = _after_last_newline(fd, size - 1)
    entry = _parse(os.pread(fd, size - 1 - start, start))
    if entry is None:
        raise CorruptError(
            f"the last line of the ledger {str(path)!r} is not an entry",
            hint="run 'fireclaw ledger verify'; move the file away to begin a new chain",
        )
    return Head(entry.seq, entry.hash)


def _after_last_newline(fd: int, end: int) -> int:
    """Return the offset behind the last newline before ``end``, 0 if there is none."""
    while end > 0:
        start = max(0, end - _CHUNK)
        found = os.pread(fd, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _unwritable(path: Path, error: OSError) -> SetupError:
    return SetupError(
        f"cannot write the ledger {str(path)!r}: {error.strerror}",
        hint="nothing is done that cannot be recorded; free some space or mend the folder's rights",
    )
