"""Starts a Firecracker, the fake one or a real one, and talks to it in bytes: for tests of the fake itself."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DATA: Final = Path(__file__).resolve().parents[1] / "data"
HANGS_S: Final = 0.3  # an answer that has not come by then does not come
_SOON_S: Final = 10.0
_SUCCESS: Final = b"HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"


def real_programs() -> Path | None:
    """The folder with a real ``firecracker`` and ``jailer``, where there is one."""
    folder = os.environ.get("FIRECLAW_TEST_FIRECRACKER")
    return Path(folder) if folder else None


def api_description() -> dict[str, Any]:
    """Firecracker's own description of its API."""
    description: dict[str, Any] = yaml.safe_load((DATA / "firecracker-api.yaml").read_text())
    return description


def tiny_kernel() -> bytes:
    """An ELF that a real Firecracker starts: it has no driver for anything and halts."""
    code = b"\xf4\xeb\xfd"  # hlt; jmp to it
    load = 0x100000
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, load, 64, 0, 0, 64, 56, 1, 0, 0, 0
    )  # a static x86-64 program with one segment
    return header + struct.pack("<IIQQQQQQ", 1, 5, 120, load, load, len(code), len(code), 0x1000) + code


@dataclass(frozen=True)
class Answer:
    """An answer as it came.

    Attributes:
        raw: all of it.
        status: its status code.
        body: what it carries.
    """

    raw: bytes
    status: int
    body: bytes

    @property
    def json(self) -> Any:
        """The body, read."""
        return json.loads(self.body)

    @property
    def fault(self) -> str:
        """The fault message of a refusal."""
        text: str = self.json["fault_message"]
        return text

    @property
    def deprecated(self) -> bool:
        """Whether the request used what will go."""
        return b"\r\nDeprecation: true\r\n" in self.raw


def request(method: str, path: str, body: object = None) -> bytes:
    """The bytes of a request; a str is a body as it is, anything else becomes JSON."""
    head = f"{method} {path} HTTP/1.1\r\n"
    if body is None:
        return f"{head}\r\n".encode()
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


class Wire:
    """A connection to a Unix socket, read in whole answers.

    Attributes:
        sock: the socket.
    """

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_SOON_S)
        folder = os.open(path.parent, os.O_PATH)  # a Unix socket's path must be short, a test's folder may not be
        try:
            self.sock.connect(f"/proc/self/fd/{folder}/{path.name}")
        except OSError:
            self.sock.close()
            raise
        finally:
            os.close(folder)
        self._rest = b""

    def send(self, data: bytes) -> Wire:
        """Send bytes."""
        self.sock.sendall(data)
        return self

    def answer(self) -> Answer:
        """Read one answer; fails the test where none comes."""
        while b"\r\n\r\n" not in self._rest:
            self._more()
        head, _, rest = self._rest.partition(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name == b"Content-Length":
                length = int(value)
        while len(rest) < length:
            self._more()
            rest = self._rest.partition(b"\r\n\r\n")[2]
        end = len(head) + 4 + length
        raw, self._rest = self._rest[:end], self._rest[end:]
        return Answer(raw, int(raw.split(b" ", 2)[1][:3]), raw[len(head) + 4 :])

    def _more(self) -> None:
        data = self.sock.recv(65536)
        assert data, f"the connection ended after {self._rest!r}"
        self._rest += data

    def ask(self, method: str, path: str, body: object = None) -> Answer:
        """Send a request and read its answer."""
        return self.send(request(method, path, body)).answer()

    def line(self, timeout_s: float = _SOON_S) -> bytes:
        """Read to the end of a line, or of the connection, or of one's patience."""
        self.sock.settimeout(timeout_s)
        data = b""
        with suppress(TimeoutError, ConnectionError):
            while not data.endswith(b"\n") and (letter := self.sock.recv(1)):
                data += letter
        return data

    def hangs(self) -> bool:
        """Whether nothing comes, not even the end."""
        readable, _, _ = select.select([self.sock], [], [], HANGS_S)
        return not readable

    def ended(self) -> bool:
        """Whether it has ended."""
        self.sock.settimeout(_SOON_S)
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True


class Program:
    """A Firecracker process in a folder of its own, with a log that tells when it is ready.

    Attributes:
        folder: its working folder; ``api`` is its socket.
        programs: the folder with the executables.
        real: it is a real one.
        process: the process, once it was started.
    """

    def __init__(self, programs: Path, folder: Path, *, real: bool) -> None:
        self.programs = programs
        self.folder = folder
        self.real = real
        self.process: subprocess.Popen[bytes] | None = None
        self._log = -1
        self._logged = b""
        self._wires: list[Wire] = []
        self._kept: Wire | None = None

    def start(self, *arguments: str) -> Program:
        """Start it and wait until it listens."""
        self.spawn(*arguments)
        self.wait_logged(b"API server started.")
        return self

    def spawn(self, *arguments: str) -> Program:
        """Start it in this folder and wait for nothing. Sockets of an earlier one must be gone."""
        own = ["--id", "probe", "--api-sock", "api", "--log-path", "log"]
        self._spawn(self.programs / "firecracker", [*own, *arguments], self.folder)
        return self

    def start_by(self, starter: Path, words: Sequence[str | Path], cwd: Path) -> Program:
        """Start it by another program, which has to become it in this folder, and wait until it listens."""
        self._spawn(starter, words, cwd)
        self.wait_logged(b"API server started.")
        return self

    def _spawn(self, program: Path, words: Sequence[str | Path], cwd: Path) -> None:
        if self._log < 0:
            os.mkfifo(self.folder / "log", 0o666)
            (self.folder / "log").chmod(0o666)  # whoever the program becomes
            self._log = os.open(self.folder / "log", os.O_RDWR | os.O_NONBLOCK)
        with (self.folder / "stdout").open("ab") as stdout, (self.folder / "stderr").open("ab") as stderr:
            self.process = subprocess.Popen(
                [program, *words],
                cwd=cwd,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    def wait_logged(self, text: bytes) -> bytes:
        """Wait until the log has a text; return what it has."""
        deadline = time.monotonic() + _SOON_S
        while text not in self._logged:
            readable, _, _ = select.select([self._log], [], [], max(0, deadline - time.monotonic()))
            assert readable, f"no {text!r} in {self._logged!r}"
            self._logged += os.read(self._log, 65536)
        return self._logged

    def log(self) -> bytes:
        """What the log has by now."""
        with suppress(BlockingIOError):
            while True:
                self._logged += os.read(self._log, 65536)
        return self._logged

    def connect(self, name: str = "api") -> Wire:
        """A new connection, to the API or another socket of its folder."""
        wire = Wire(self.folder / name)
        self._wires.append(wire)
        return wire

    def ask(self, method: str, path: str, body: object = None) -> Answer:
        """Send a request on the connection that is kept."""
        if self._kept is None:
            self._kept = self.connect()
        return self._kept.ask(method, path, body)

    def do(self, method: str, path: str, body: object = None) -> None:
        """Send a request that must succeed."""
        answer = self.ask(method, path, body)
        assert answer.raw == _SUCCESS, (method, path, answer.raw)

    def vsock(self, port: int = 1024) -> Wire:
        """Ask for a connection to a port of the guest; nothing is read."""
        return self.connect("ch").send(b"CONNECT %d\n" % port)

    def wait(self) -> int:
        """Wait for its end; return the exit status."""
        assert self.process is not None
        return self.process.wait(_SOON_S)

    def alive(self) -> bool:
        """Whether it still answers."""
        with self.connect().sock as sock:
            sock.sendall(request("GET", "/"))
            return sock.recv(12) == b"HTTP/1.1 200"

    def kill(self) -> None:
        """End it hard, and forget its connections."""
        for wire in self._wires:
            wire.sock.close()
        self._wires.clear()
        self._kept = None
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def restart(self, *arguments: str) -> Program:
        """End it, remove what it left, and start another one in the same folder."""
        self.kill()
        for name in ("api", "ch"):
            (self.folder / name).unlink(missing_ok=True)
        self._logged = b""
        return self.start(*arguments)

    def close(self) -> None:
        """End it and give everything back."""
        self.kill()
        if self._log >= 0:
            os.close(self._log)

    # A machine

    def configure(self, memory_mib: int = 128) -> None:
        """Configure a machine with two drives and a vsock device."""
        (self.folder / "kernel").write_bytes(tiny_kernel())
        for name in ("root", "image"):
            (self.folder / name).write_bytes(bytes(4096))
        self.do("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": memory_mib})
        self.do("PUT", "/boot-source", {"kernel_image_path": "kernel", "boot_args": "console=ttyS0"})
        for name, read_only in (("root", True), ("image", False)):
            drive = {"drive_id": name, "path_on_host": name, "is_root_device": False, "is_read_only": read_only}
            self.do("PUT", f"/drives/{name}", drive)
        self.do("PUT", "/vsock", {"guest_cid": 3, "uds_path": "ch"})

    def boot(self, memory_mib: int = 128) -> Program:
        """Configure and start a machine whose guest writes to a file ``console``."""
        self.do("PUT", "/serial", {"serial_out_path": "console"})
        self.configure(memory_mib)
        self.do("PUT", "/actions", {"action_type": "InstanceStart"})
        return self

    def pause(self) -> None:
        """Pause the machine."""
        self.do("PATCH", "/vm", {"state": "Paused"})

    def resume(self) -> None:
        """Resume the machine."""
        self.do("PATCH", "/vm", {"state": "Resumed"})

    def create(self) -> None:
        """Write a snapshot into ``state`` and ``memory``."""
        self.do("PUT", "/snapshot/create", {"snapshot_path": "state", "mem_file_path": "memory"})

    def load(self, **more: object) -> Answer:
        """Load that snapshot."""
        backend = {"backend_type": "File", "backend_path": "memory"}
        return self.ask("PUT", "/snapshot/load", {"snapshot_path": "state", "mem_backend": backend, **more})


@contextmanager
def running(programs: Path, folder: Path, *, real: bool = False) -> Iterator[Program]:
    """A program that is not started yet; it is gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    program = Program(programs, folder, real=real)
    try:
        yield program
    finally:
        program.close()


def run(program: Path, arguments: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with an empty environment."""
    return subprocess.run(
        [program, *arguments], cwd=folder, env={}, capture_output=True, text=True, timeout=_SOON_S, check=False
    )
