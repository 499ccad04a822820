"""Two Ollamas for one suite: the real program, where it is installed, and a double that speaks its API.

The real one is found by ``FIRECLAW_TEST_OLLAMA`` or on PATH; ``go install github.com/ollama/ollama@v0.6.5`` builds it
in two minutes with Go and a C++ compiler. Its models are scripted ones: the same weights as for llama.cpp, and a Go
template that chooses the reply, so that loading, template, tool parser, grammar and API are Ollama's own.

The double answers the same scripts from a table. It has no grammar: a script for a schema must say legal JSON.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Protocol

from fireclaw.testing.scripted_model import Rule, write_scripted_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

CONTEXT = 16384  # tokens; with a scripted vocabulary a token of a prompt is a character
_START_S = 30


class Ollama(Protocol):
    """One Ollama of a test."""

    @property
    def address(self) -> str:
        """Where it listens."""

    def create(self, name: str, rules: Sequence[Rule], *, tools: bool = True) -> None:
        """Make a model that says the rules; without ``tools`` its template knows none."""

    def kill(self) -> None:
        """End it, whatever it is doing; from now on its port refuses connections."""

    def start(self) -> None:
        """Start it, again on the same port with the same models; returns when it answers."""


def find_ollama() -> str | None:
    """The real program."""
    return os.environ.get("FIRECLAW_TEST_OLLAMA") or shutil.which("ollama")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class RealOllama:
    """The real program, with a home of its own and no way out."""

    def __init__(self, folder: Path, program: str) -> None:
        self._folder = folder
        self._program = program
        self._port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def _env(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self._folder),
            "OLLAMA_HOST": f"127.0.0.1:{self._port}",
            "OLLAMA_MODELS": str(self._folder / "models"),
            "OLLAMA_NO_CLOUD": "1",
            "HTTPS_PROXY": "http://127.0.0.1:9",  # a pull fails at once, on every host alike
        }

    def start(self) -> None:
        """Start it."""
        with (self._folder / "serve.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._program, "serve"],
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.address}/api/version", timeout=_START_S):
                    return
            except urllib.error.URLError:
                assert self._process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def kill(self) -> None:
        """End it and its runners: they are of its session."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def create(self, name: str, rules: Sequence[Rule], *, tools: bool = True) -> None:
        """Make a model by a Modelfile."""
        weights = self._folder / f"{name.replace(':', '-')}.gguf"
        write_scripted_model(weights, rules)
        modelfile = self._folder / "Modelfile"
        parameters = f"PARAMETER temperature 0\nPARAMETER num_thread 1\nPARAMETER num_ctx {CONTEXT}\n"
        template = go_template(rules, tools=tools)
        modelfile.write_text(f'FROM {weights}\n{parameters}PARAMETER stop <|im_end|>\nTEMPLATE """{template}"""\n')
        command = [self._program, "create", name, "-f", str(modelfile)]
        subprocess.run(command, env=self._env, check=True, capture_output=True, timeout=60)


def go_template(rules: Sequence[Rule], *, tools: bool) -> str:
    """The chat template, ChatML with the calls of Hermes, that ends in the start token of the first rule that matches.

    Ollama reads from it what the model can do: tools if it names ``.Tools``, the tag of calls from ``.ToolCalls``.
    """
    calls = (
        '{{- if .ToolCalls }}{{ range .ToolCalls }}<tool_call>\n{"name": "{{ .Function.Name }}", '
        '"arguments": {{ .Function.Arguments }}}\n</tool_call>{{ end }}{{ end }}'
    )
    offered = "{{- range .Tools }}\n{{ . }}\n{{- end }}"
    head = (
        '{{- $last := "" }}{{- $user := "" }}{{- $results := "" }}\n'
        "{{- range .Messages }}{{- $last = .Content }}"
        '{{- if eq .Role "user" }}{{- $user = .Content }}{{- $results = "" }}'
        '{{- else if eq .Role "tool" }}{{- $results = printf "%sx" $results }}{{- end }}{{- end }}\n'
        "<|im_start|>system\n{{ .System }}" + (offered if tools else "") + "<|im_end|>\n"
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}" + (calls if tools else "") + "<|im_end|>\n"
        "{{ end }}<|im_start|>assistant\n"
    )
    conditions = [_condition(number, rule, tools=tools) for number, rule in enumerate(rules)]
    searches = "".join(search for search, _ in conditions)
    choice = "".join(
        f"{{{{- {'else if' if number else 'if'} {condition} }}}}<|reply{number}|>"
        for number, (_, condition) in enumerate(conditions)
    )
    return head + searches + choice + "{{- end }}"


def _condition(number: int, rule: Rule, *, tools: bool) -> tuple[str, str]:
    searches, parts = "", ["true"]
    for variable, text in (("user", rule.user), ("last", rule.last)):
        if text:
            found = f"{variable}{number}"
            searches += f"{{{{- ${found} := false }}}}" + _search(variable, text, found)
            parts.append(f"${found}")
    if rule.results is not None:
        parts.append(f"(eq (len $results) {rule.results})")
    if rule.tools is not None:
        assert tools, "the template must not name .Tools"
        parts.append("(gt (len $.Tools) 0)" if rule.tools else "(eq (len $.Tools) 0)")
    return searches, f"and {' '.join(parts)}"


def _search(variable: str, text: str, found: str) -> str:
    """Go templates have no "contains": slide a window."""
    size = len(text.encode())
    return (
        f"{{{{- range $i := len ${variable} }}}}{{{{- $rest := slice ${variable} $i }}}}"
        f"{{{{- if lt (len $rest) {size} }}}}{{{{- break }}}}{{{{- end }}}}"
        f"{{{{- if eq (slice $rest 0 {size}) {json.dumps(text)} }}}}"
        f"{{{{- ${found} = true }}}}{{{{- break }}}}{{{{- end }}}}"
        "{{- end }}\n"
    )


@dataclass
class _Model:
    rules: Sequence[Rule]
    tools: bool


@dataclass
class OllamaDouble:
    """A double that speaks the API from a table of scripts.

    Attributes:
        models: what it has.
        fetchable: what a pull finds; anything else is not there.
        errors: answers of the next chats instead of replies: status and text; status 200 is an error in mid-stream.
        asked: the bodies of all chats.
    """

    models: dict[str, _Model] = field(default_factory=dict)
    fetchable: dict[str, Sequence[Rule]] = field(default_factory=dict)
    errors: list[tuple[int, str]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    loaded: set[str] = field(default_factory=set)
    port: int = field(default_factory=_free_port)
    _server: ThreadingHTTPServer | None = None
    _thread: threading.Thread | None = None
    _lines: list[socket.socket] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it."""
        double = self

        class Handler(_Handler):
            ollama = double

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def kill(self) -> None:
        """End it; open connections break."""
        assert self._server is not None
        assert self._thread is not None
        self._server.shutdown()
        self._thread.join()
        for line in self._lines:
            if line.fileno() >= 0:
                line.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        self.loaded.clear()

    def create(self, name: str, rules: Sequence[Rule], *, tools: bool = True) -> None:
        """Make a model."""
        self.models = {_tagged(name): _Model(rules, tools), **self.models}


def _tagged(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


class _Handler(BaseHTTPRequestHandler):
    ollama: OllamaDouble

    def setup(self) -> None:
        super().setup()
        self.ollama._lines.append(self.connection)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        pass

    def do_GET(self) -> None:
        double = self.ollama
        answers: dict[str, Any] = {
            "/api/version": {"version": "0.6.5"},
            "/api/tags": {"models": [_described(name) for name in double.models]},
            "/api/ps": {"models": [_described(name) for name in sorted(double.loaded)]},
        }
        if self.path in answers:
            self._answer(200, answers[self.path])
        else:
            self._answer(404, {"error": "not found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = _tagged(body["model"])
        if self.path == "/api/pull":
            self._pull(body["model"], name)
        elif name not in self.ollama.models:
            self._answer(404, {"error": f"model {body['model']!r} not found"})
        elif self.path == "/api/show":
            can = ["completion", *(["tools"] if self.ollama.models[name].tools else [])]
            self._answer(200, {"model_info": {"llama.context_length": 131072}, "capabilities": can, "details": {}})
        else:
            with suppress(ConnectionError):  # whoever asked may leave
                self._chat(body, name)

    def _chat(self, body: dict[str, Any], name: str) -> None:
        double = self.ollama
        double.asked.append(body)
        if double.errors and double.errors[0][0] != 200:
            status, text = double.errors.pop(0)
            self._answer(status, {"error": text})
            return
        model = double.models[name]
        if body.get("tools") and not model.tools:
            self._answer(400, {"error": f"registry.ollama.ai/library/{name} does not support tools"})
            return
        double.loaded.add(name)
        self._begin()
        if double.errors:
            self._line({"model": body["model"], "message": {"role": "assistant", "content": "Let"}, "done": False})
            self._line({"error": double.errors.pop(0)[1]})
            return
        self._reply(body, _said(model.rules, body))

    def _reply(self, body: dict[str, Any], rule: Rule | None) -> None:
        says = rule.says if rule else ""
        limit = body.get("options", {}).get("num_predict", 128)
        written, reason = 0, "stop"
        if body.get("tools") and says.startswith("<tool_call>"):
            call = json.loads(says.removeprefix("<tool_call>").removesuffix("</tool_call>"))
            function = {"name": call["name"], "arguments": call["arguments"]}
            self._part(body, {"content": "", "tool_calls": [{"function": function}]})
            written = 9
        else:
            for piece in _pieces(says, endless=bool(rule and rule.endless)):
                if written == limit:
                    reason = "length"
                    break
                self._part(body, {"content": piece})
                written += 1
        # Counts of zero are left out, as Go's omitempty does.
        counts = {
            "prompt_eval_count": len(json.dumps(body["messages"])),
            **({"eval_count": written} if written else {}),
        }
        self._part(body, {"content": ""}, done=True, done_reason=reason, total_duration=10**6, **counts)

    def _part(self, body: dict[str, Any], message: dict[str, Any], *, done: bool = False, **more: object) -> None:
        now = "2026-01-01T00:00:00Z"
        self._line(
            {
                "model": body["model"],
                "created_at": now,
                "message": {"role": "assistant", **message},
                "done": done,
                **more,
            }
        )

    def _pull(self, wanted: str, name: str) -> None:
        double = self.ollama
        self._begin()
        self._line({"status": "pulling manifest"})
        if wanted not in double.fetchable:
            self._line({"error": "pull model manifest: file does not exist"})
            return
        for done in (0, 500, 1000):
            self._line({"status": "pulling 5ee4f07cdb9b", "digest": "sha256:5e", "total": 1000, "completed": done})
        double.create(name, double.fetchable[wanted])
        self._line({"status": "success"})

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.end_headers()

    def _line(self, value: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(value).encode() + b"\n")

    def _answer(self, status: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _described(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "size": 1000,
        "digest": "5e",
        "modified_at": "2026-01-01T00:00:00Z",
        "expires_at": "2026-01-01T00:05:00Z",
        "size_vram": 0,
        "details": {"family": "llama"},
    }


def _said(rules: Sequence[Rule], body: dict[str, Any]) -> Rule | None:
    """The first rule that matches a conversation."""
    messages = body["messages"]
    places = [number for number, message in enumerate(messages) if message["role"] == "user"]
    user = messages[places[-1]].get("content", "") if places else ""
    results = sum(message["role"] == "tool" for message in messages[places[-1] + 1 if places else 0 :])
    last = messages[-1].get("content", "")
    return next(
        (
            rule
            for rule in rules
            if rule.user in user
            and rule.last in last
            and rule.results in (None, results)
            and rule.tools in (None, bool(body.get("tools")))
        ),
        None,
    )


def _pieces(text: str, *, endless: bool) -> Iterator[str]:
    while True:
        yield from (text[start : start + 6] for start in range(0, len(text), 6))
        if not endless:
            return
