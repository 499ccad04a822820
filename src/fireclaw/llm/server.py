"""The embedded model server: llama.cpp in a process of its own (``python -m fireclaw.llm.server``).

Its parent (``embedded.py``) writes one JSON line with the settings to stdin and keeps stdin open. The answer is one
JSON line on stdout: ``{"port": 41234}`` once the model is loaded, or ``{"error": "..."}``. The end of stdin ends it at
once, so it never outlives its parent. Nothing secret stands in its argv or environment.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from typing import BinaryIO, NoReturn

# More threads than free cores make them wait for each other: with two on a busy two-core host decoding falls from 90 to
# under 5 tokens a second (measured), and machines compete for the same cores.
_THREADS = 1


@dataclass(frozen=True)
class ServerSettings:
    """What the server is to serve.

    Attributes:
        model_path: the GGUF file.
        api_key: the key that callers must show.
        alias: the model's name in answers.
        context: tokens of context a slot.
        slots: calls served at once.
        template: a chat template (Jinja) instead of the file's own, or an empty string.
    """

    model_path: str
    api_key: str
    alias: str
    context: int
    slots: int
    template: str = ""

    def to_line(self) -> bytes:
        """Encode for the server's stdin."""
        return json.dumps(asdict(self)).encode() + b"\n"


def main() -> NoReturn:
    """Serve until stdin ends or SIGTERM, at its default action, comes."""
    lifeline = sys.stdin.buffer
    settings = ServerSettings(**json.loads(lifeline.readline()))
    answers = _claim_stdout()
    threading.Thread(target=_leave_at_end, args=(lifeline,), name="lifeline", daemon=True).start()
    try:
        server, port = _serve(settings)
    except Exception as error:  # noqa: BLE001 - whatever the library raises is for the parent to report
        _answer(answers, {"error": str(error) or type(error).__name__})
        os._exit(1)
    _answer(answers, {"port": port})
    while server:  # keeps the reference: the server lives as long as its object
        signal.pause()
    os._exit(0)


def _serve(settings: ServerSettings) -> tuple[object, int]:
    """Load the model and listen on a free port of the loopback."""
    import xllamacpp  # noqa: PLC0415 - loads 100 MB of native code, which only this process needs

    params = xllamacpp.CommonParams()
    params.model.path = settings.model_path
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.api_keys = [settings.api_key]
    params.model_alias = {settings.alias}
    params.n_parallel = settings.slots
    params.n_ctx = settings.context * settings.slots  # llama.cpp divides it among the slots
    params.cpuparams.n_threads = _THREADS
    params.cpuparams_batch.n_threads = _THREADS
    params.n_gpu_layers = 0
    params.use_jinja = True
    params.ui = False
    params.cache_ram_mib = 0  # a prompt cache beside the slots, 8 GiB by default
    if settings.template:
        params.chat_template = settings.template
    server = xllamacpp.Server(params)
    return server, int(server.listening_address.rpartition(":")[2])


def _claim_stdout() -> BinaryIO:
    """Keep stdout for our one line; what native code prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return answers


def _answer(answers: BinaryIO, value: dict[str, object]) -> None:
    answers.write(json.dumps(value).encode() + b"\n")


def _leave_at_end(lifeline: BinaryIO) -> NoReturn:
    while lifeline.read(4096):
        pass
    # Not an orderly exit: that waits for running generations, which may take minutes.
    os._exit(0)


if __name__ == "__main__":
    main()
