"""The floor of Firecracker: a bare client of its API, no jail; memory on tmpfs, bytes through a vsock connection.

Each process has a folder of its own and relative paths, which fit a snapshot to every clone: ``image``, ``ch``.
"""

from __future__ import annotations

import json
import resource
import shutil
import socket
import subprocess
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Self

from floor import BOOT_SECONDS, COMMAND_SECONDS, KERNEL_WORDS, MEMORY_MIB, WARM_UP, Floor

if TYPE_CHECKING:
    from pathlib import Path

    from fireclaw.images import Image, Runtime

_PORT: Final = 1024
_ATTEMPT_SECONDS: Final = 1.0  # a CONNECT before the guest's driver is up is never answered
_OPEN_FILES: Final = 2048  # Firecracker fills its descriptor table up to the limit when it starts


class FirecrackerFloor(Floor):
    """See ``Floor``.

    Args:
        runtime: whose kernel and modules the guest has.
        image: where /bin/true is.
        program: the Firecracker.
        version: what it says of itself.
    """

    steps = (
        "start of a bare Firecracker, load and resume of a snapshot - its guest's first finished /bin/true, by vsock"
    )

    def __init__(self, runtime: Runtime, image: Image, program: Path, version: str) -> None:
        super().__init__(runtime, image)
        self._program = program
        self._version = version
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(_OPEN_FILES, most), most))  # which each Firecracker inherits

    @property
    def version(self) -> str:
        """See ``Floor.version``."""
        return self._version

    def _make_snapshot(self) -> None:
        with _Firecracker(self._program, self._folder / "source", self._image) as source:
            source.put("/machine-config", vcpu_count=1, mem_size_mib=MEMORY_MIB)
            source.put(
                "/boot-source",
                kernel_image_path=str(self._runtime.kernel),
                initrd_path=str(self._folder / "initrd"),
                boot_args=f"{KERNEL_WORDS} reboot=k 8250.nr_uarts=1 vsock={_PORT}",
            )
            source.put("/drives/image", drive_id="image", path_on_host="image", is_root_device=False, is_read_only=True)
            source.put("/vsock", guest_cid=3, uds_path="ch")
            source.put("/actions", action_type="InstanceStart")
            source.wait_true()
            for _ in range(WARM_UP):
                source.true(COMMAND_SECONDS)
            source.patch("/vm", state="Paused")
            source.put(
                "/snapshot/create",
                snapshot_path=str(self._folder / "state"),
                mem_file_path=str(self._folder / "memory"),
            )

    def measure(self) -> float:
        """See ``Floor.measure``."""
        began = time.monotonic()
        with _Firecracker(self._program, self._folder / "clone", self._image) as clone:
            clone.put(
                "/snapshot/load",
                snapshot_path=str(self._folder / "state"),
                mem_backend={"backend_type": "File", "backend_path": str(self._folder / "memory")},
                resume_vm=True,
            )
            clone.true(COMMAND_SECONDS)
            return (time.monotonic() - began) * 1000


class _Firecracker:
    """One Firecracker, from its start to its death."""

    def __init__(self, program: Path, folder: Path, image: Path) -> None:
        self._folder = folder
        folder.mkdir()
        (folder / "image").symlink_to(image)
        self._process = subprocess.Popen(
            [program, "--id", "floor", "--api-sock", "api"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._api = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> Self:
        try:
            self._reach()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._api.close()
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder)

    def _reach(self) -> None:
        """Connect to its API; the socket is there a moment before it listens."""
        while self._process.poll() is None:
            with suppress(FileNotFoundError, ConnectionRefusedError):
                self._api.connect(str(self._folder / "api"))
                return
            time.sleep(0.0002)
        raise RuntimeError(f"Firecracker ended with status {self._process.returncode}")

    def put(self, path: str, **body: object) -> None:
        """One PUT of its API."""
        self._request("PUT", path, body)

    def patch(self, path: str, **body: object) -> None:
        """One PATCH of its API."""
        self._request("PATCH", path, body)

    def _request(self, method: str, path: str, body: dict[str, object]) -> None:
        data = json.dumps(body)
        self._api.sendall(f"{method} {path} HTTP/1.1\r\nContent-Length: {len(data)}\r\n\r\n{data}".encode())
        answer = self._api.recv(65536)
        if not answer.startswith(b"HTTP/1.1 204 "):
            raise RuntimeError(f"{method} {path}: {answer.decode(errors='replace')}")

    def wait_true(self) -> None:
        """Run /bin/true as soon as the guest is up."""
        deadline = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < deadline:
            with suppress(OSError, EOFError):
                self.true(_ATTEMPT_SECONDS)
                return
            time.sleep(0.02)
        raise RuntimeError(f"the floor's guest did not answer within {BOOT_SECONDS:g} s")

    def true(self, seconds: float) -> None:
        """Run /bin/true in the image.

        Raises:
            EOFError: the guest does not listen yet.
            TimeoutError: it did not answer.
        """
        with socket.socket(socket.AF_UNIX) as channel:
            channel.settimeout(seconds)
            channel.connect(str(self._folder / "ch"))
            # The line in one write, or Firecracker drops it; what follows it is the guest's.
            channel.sendall(b"CONNECT %d\nx" % _PORT)
            answer = b""
            while not answer.endswith((b"\nD", b"\nX")):
                if not (piece := channel.recv(64)):
                    raise EOFError
                answer += piece
        if not answer.endswith(b"D"):
            raise RuntimeError(f"the floor's guest said {answer!r}")
