"""A model server of somebody else: a real llama.cpp that serves a scripted model on a port of its own.

Fireclaw knows no more of it than an address and a key. It can be ended and started again on the same port. Run as a
program, this module is the server's process: ``python talk_model.py MODEL PORT KEY_FILE``.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Self

from fireclaw.testing.scripted_model import Rule, write_scripted_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

_SLOTS = 2
_CONTEXT = 65536  # tokens a slot; with a scripted vocabulary a token of a prompt is a character
_START_S = 60


class ModelServer:
    """One server.

    ::

        with ModelServer(folder, [Rule("hello there", user="hello")], key="secret") as server:
            ...                     # server.base_url, server.key_file
            server.kill()
            server.start()          # the same port, the same model

    Attributes:
        base_url: what ``model.base_url`` is set to.
        key_file: holds the key that it wants to see.
    """

    def __init__(self, folder: Path, rules: Sequence[Rule], *, key: str) -> None:
        self._model = folder / "somebody-elses.gguf"
        self.key_file = folder / "model-key"
        self.key_file.touch(0o600)
        self.key_file.write_text(f"{key}\n")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self._port}/v1"
        self._process: subprocess.Popen[bytes] | None = None
        write_scripted_model(self._model, rules)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_running:
            self.kill()

    @property
    def is_running(self) -> bool:
        """Whether it was started and not ended since."""
        return self._process is not None

    def start(self) -> None:
        """Start it; returns when it answers."""
        command = [sys.executable, __file__, str(self._model), str(self._port), str(self.key_file)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"loaded\n"
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health", timeout=_START_S) as answer:
            assert answer.status == 200

    def kill(self) -> None:
        """End it, whatever it is doing; from now on its port refuses connections."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._process = None


def main() -> None:
    """Serve until killed, or until whoever started us is gone."""
    import xllamacpp  # noqa: PLC0415 - 100 MB of native code, which only the server's process needs

    model, port, key_file = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = int(port)
    params.api_keys = [Path(key_file).read_text().strip()]
    params.model_alias = {"somebody-elses"}
    params.n_parallel = _SLOTS
    params.n_ctx = _SLOTS * _CONTEXT
    # Two threads on two busy cores wait for each other.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_gpu_layers = 0
    params.use_jinja = True
    params.ui = False
    params.cache_ram_mib = 0
    server = xllamacpp.Server(params)
    print("loaded", flush=True)  # noqa: T201 - our parent waits for it
    sys.stdin.read()
    assert server, "it lives as long as its object"
    os._exit(0)  # an orderly end would wait for what it is still writing


if __name__ == "__main__":
    main()
