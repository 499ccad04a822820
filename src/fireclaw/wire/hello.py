"""How a session begins on a channel that may hold bytes of an older one.

A virtio-serial port keeps what nobody read, and a quick reconnect is not seen as a hang-up, so the ends
resynchronise in band. The host sends a hello and discards everything until the guest's echo of its nonce::

    host -> guest   PREFIX  magic (16 bytes)  version (2)  nonce (16)
    guest -> host           magic             version      nonce

``magic`` is random per boot: the guest learns it from the first hello, and from then on those 16 bytes, wherever
they stand in the stream, end the old session and begin a new one. A connection lost and made again, a clone that
wakes and a daemon that adopts are therefore one case.

Whoever knows the magic can put a session of his own into any bytes that the host sends, a command's input for one.
So each clone is given a magic of its own with its identity (``HelloFinder.magic`` is set anew): that of the template
stands in the memory of every clone, where a workload with root's rights finds it. Until a guest has confirmed its
identity the host sends it nothing but JSON, in which 16 random bytes cannot stand.
"""

from __future__ import annotations

import os
import struct

PORT_NAME = "fireclaw.0"  # of the virtio-serial port
VSOCK_PORT = 1024  # where guestd listens on a VMM with vsock
PREFIX = b"\x00\xffFCLAW\n"
MAGIC_SIZE = 16
VERSION = 1
NONCE_SIZE = 16
_ECHO = struct.Struct(f">{MAGIC_SIZE}sH{NONCE_SIZE}s")
ECHO_SIZE = _ECHO.size
HELLO_SIZE = len(PREFIX) + ECHO_SIZE


class HelloError(Exception):
    """The other end speaks another version."""


def new_magic() -> bytes:
    """Make the magic of a boot."""
    return os.urandom(MAGIC_SIZE)


def new_nonce() -> bytes:
    """Make the nonce of a session."""
    return os.urandom(NONCE_SIZE)


def echo(magic: bytes, nonce: bytes) -> bytes:
    """Build the guest's answer; the host's hello is PREFIX before the same bytes."""
    return _ECHO.pack(magic, VERSION, nonce)


def hello(magic: bytes, nonce: bytes) -> bytes:
    """Build the host's hello."""
    return PREFIX + echo(magic, nonce)


class EchoFinder:
    """The host's side: discards bytes until the echo of this session's hello has come."""

    def __init__(self, magic: bytes, nonce: bytes) -> None:
        self._want = echo(magic, nonce)
        self._tail = b""
        self.discarded = 0

    def feed(self, data: bytes) -> bytes | None:
        """Return the session's first bytes once the echo was found, else None. Keeps at most one echo of bytes."""
        data = self._tail + data
        at = data.find(self._want)
        if at >= 0:
            self.discarded += at
            return data[at + len(self._want) :]
        keep = min(len(data), len(self._want) - 1)
        self.discarded += len(data) - keep
        self._tail = data[len(data) - keep :]
        return None


class HelloFinder:
    """The guest's side: finds hellos in what the host sends, before and within sessions.

    A host may die in the middle of a hello, and the next one then begins anywhere within what looks like its fields.
    So no byte that may begin a hello is ever skipped, and a magic is learned only from a hello of our version.

    Attributes:
        magic: what begins a session: the boot's, or what it was replaced by; empty until the first hello.
    """

    def __init__(self) -> None:
        self.magic = b""
        self._tail = b""

    def feed(self, data: bytes) -> tuple[bytes, bytes | None, bytes]:
        """Look for a hello.

        Returns:
            (before, nonce, rest): without a hello, nonce is None and ``before`` is all that belongs to the session
            in progress. With one, ``before`` is void: the old session is over, and ``rest`` begins the new one.

        Raises:
            HelloError: the host speaks another version; the old session is over, and another hello may follow.
        """
        seam = self._tail + data
        if not self.magic and not self._learn(seam):
            return b"", None, b""
        at = seam.rfind(self.magic)
        if at < 0:
            self._tail = seam[1 - MAGIC_SIZE :]
            return data, None, b""
        end = at + ECHO_SIZE
        if len(seam) < end:
            self._tail = seam[at:]  # the hello is not complete; it never belongs to a session
            return b"", None, b""
        self._tail = seam[1 - MAGIC_SIZE :]
        _, version, nonce = _ECHO.unpack_from(seam, at)
        if version != VERSION:
            raise _wrong_version(version)
        return b"", nonce, seam[end:]

    def _learn(self, seam: bytes) -> bool:
        """Learn the magic from the first whole hello; say whether there was one."""
        wrong: int | None = None
        at = seam.find(PREFIX)
        while at >= 0:
            if len(seam) < at + HELLO_SIZE:
                self._tail = seam[at:]
                return False
            magic, version, _ = _ECHO.unpack_from(seam, at + len(PREFIX))
            if version == VERSION:
                self.magic = magic
                return True
            wrong = version
            at = seam.find(PREFIX, at + 1)
        self._tail = seam[1 - len(PREFIX) :]
        if wrong is not None:
            raise _wrong_version(wrong)
        return False


def _wrong_version(version: int) -> HelloError:
    return HelloError(f"the host speaks version {version}, this guest {VERSION}")
