"""What the host keeps to itself is found nowhere near a guest, nor in what is written down.

Every secret of the host is a canary: one random word, with what it is behind it. The daemon must have all of them in
its memory, or the test would prove nothing; the same search must find a word that was put into the guest, into a
drive, into a command line.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import shutil
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from machine_home import until
from talk_office import furnished
from talk_scanner import argv_holders, file_holds, folder_holds, process_holds, squashfs_holds

from fireclaw.testing.scripted_model import Rule, call

if TYPE_CHECKING:
    from collections.abc import Iterator

    from talk_office import Office

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may read the memory of another process"),
]

CANARY = f"canary{secrets.token_hex(8)}"
SECRETS = [f"{CANARY}{what}" for what in ("server", "operator", "key", "variable")]
SERVER, OPERATOR, KEY, VARIABLE = SECRETS
RULES = [
    Rule(call("run_command", command="env; cat /proc/*/environ | tr '\\0' '\\n'; find / -xdev | wc -l"), results=0),
    Rule("looked"),
]
GUEST_MEMORY = 256 << 20


@pytest.fixture(scope="module")
def office() -> Iterator[Office]:
    """An open office whose every secret is a canary, with a snapshot of its own and an agent that has looked around."""
    with furnished(RULES, key=KEY, FOO_SECRET=VARIABLE) as office:
        for snapshot in office.home.snapshots.iterdir():
            shutil.rmtree(snapshot)
        office.home.secrets.mkdir(mode=0o700)
        for name, word in (("irc-server", SERVER), ("irc-operator", OPERATOR)):
            path = office.home.secrets / name
            path.touch(0o600)
            path.write_text(f"{word}\n")
        done = office.cli("up", "--detach")
        assert done.returncode == 0, done.stderr.decode()
        with office.person("ann") as ann:
            ann.become_operator(office.irc)
            ann.join("#control", "#agents")
            ann.say("#control", "!invoke worker")
            ann.wait("#agents", "news", r"^worker\(\S+\) has joined")
            assert ann.ask("worker", "look around you") == "looked"
        yield office


def test_the_host_holds_what_is_searched_for(office: Office) -> None:
    """The daemon has every canary in its memory, and uses it."""
    assert office.irc["password"] == SERVER
    held = {secret for secret in SECRETS if process_holds(office.cli.daemon_pid, secret)}
    assert held == set(SECRETS)


def test_the_search_finds_what_is_there(office: Office, tmp_path: Path) -> None:
    """A word written in the guest is found in its memory; one in a drive, in a command line, in base64 is found too."""
    word = f"control{secrets.token_hex(8)}"
    (vmm,) = office.children("vmm")
    assert not process_holds(vmm, word, mapped=GUEST_MEMORY)
    # Put together in the guest: the host's side of the channel does not carry the word as it is searched for.
    done = office.cli("exec", "worker", "--", "sh", "-c", f'printf "%s%s\\n" {word[:9]} {word[9:]} > /tmp/control')
    assert done.returncode == 0, done.stderr.decode()
    assert process_holds(vmm, word, mapped=GUEST_MEMORY)
    folder = tmp_path / "drive"
    folder.mkdir()
    (folder / "note").write_text(word)
    drive = tmp_path / "drive.squashfs"
    subprocess.run(["mksquashfs", folder, drive, "-no-progress", "-quiet"], check=True, stdout=subprocess.DEVNULL)
    assert [path.name for path in squashfs_holds(drive, word)] == ["note"]
    with subprocess.Popen(["sh", "-c", "read -r _", word], stdin=subprocess.PIPE) as process:
        until(lambda: argv_holders(word) == [process.pid], "it shows its command line")
        process.kill()
    for shift in range(3):
        (tmp_path / f"encoded{shift}").write_bytes(base64.b64encode(b"x" * shift + word.encode() + b"y"))
    assert len([path for path in folder_holds(tmp_path, word) if path.name.startswith("encoded")]) == 3


def test_no_secret_is_in_the_memory_of_a_guest(office: Office) -> None:
    """Neither a running agent's machine, its VMM included, nor the snapshots that machines come from hold a canary."""
    (vmm,) = office.children("vmm")
    assert not process_holds(vmm, CANARY)
    memories = list(office.home.snapshots.glob("*/memory"))
    assert [memory.stat().st_size for memory in memories] == [GUEST_MEMORY] * 2  # without a workspace, and with one
    assert not any(file_holds(memory, CANARY) for memory in memories)
    assert folder_holds(office.home.snapshots, CANARY) == []


def test_no_secret_is_in_a_drive(office: Office) -> None:
    """Image, runtime, initrd and the agent's workspace hold no canary."""
    drives = [*office.home.images.glob("*/root.squashfs"), *office.home.runtimes.glob("*/root.squashfs")]
    assert len(drives) >= 2
    for drive in drives:
        assert squashfs_holds(drive, CANARY) == []
    initrds = list(office.home.runtimes.glob("*/initrd.cpio"))
    assert initrds
    assert not any(file_holds(initrd, CANARY) for initrd in initrds)
    (workspace,) = office.home.workspaces.glob("*.ext4")
    assert not file_holds(workspace, CANARY)


def test_no_secret_is_in_a_command_line_or_a_child_s_environment(office: Office) -> None:
    """While all runs no process of this host shows a canary in its argv, and the children did not inherit one."""
    assert argv_holders(CANARY) == []
    children = office.children()
    assert len(children) == 2
    for pid in children:
        assert CANARY.encode() not in Path(f"/proc/{pid}/environ").read_bytes()


def test_no_secret_is_written_down(office: Office) -> None:
    """Only the files of the secrets and ngircd's configuration hold one, and only their owner may read them."""
    holders = folder_holds(office.home.data, CANARY)
    allowed = {
        office.home.secrets / "irc-server",
        office.home.secrets / "irc-operator",
        office.home.run / "ngircd.conf",
    }
    assert set(holders) == allowed
    assert all(path.stat().st_mode & 0o077 == 0 for path in holders)


def test_a_secret_that_somebody_types_is_not_kept_in_the_ledger(office: Office) -> None:
    """Who says a password or the key aloud finds it taken out of the record."""
    with office.person("ben") as ben:
        ben.join("#agents")
        for secret in (SERVER, OPERATOR, KEY):
            assert ben.ask("worker", f"the word is {secret}, do not tell") == "looked"
    said = [entry.data["text"] for entry in office.entries("irc.line")]
    assert said[-3:] == ["the word is [redacted], do not tell"] * 3
    assert not file_holds(office.home.ledger, CANARY)


class _Quoting(BaseHTTPRequestHandler):
    """A model server that refuses every question and quotes the key, as some do."""

    def do_GET(self) -> None:
        self._answer(200, {"object": "list", "data": [{"id": "liar", "object": "model"}]})

    def do_POST(self) -> None:
        self._answer(401, {"error": {"message": f"Incorrect API key provided: {self.headers['authorization']}"}})

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def _answer(self, status: int, body: object) -> None:
        self.rfile.read(int(self.headers["content-length"] or 0))
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def test_a_server_that_quotes_the_key_does_not_spread_it() -> None:
    """What a model server says of a key it refuses reaches neither IRC nor the record with the key in it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Quoting) as liar, furnished([], key=KEY) as office:
        threading.Thread(target=liar.serve_forever, name="liar").start()
        try:
            office.cli.env["FIRECLAW_MODEL_BASE_URL"] = f"http://127.0.0.1:{liar.server_port}/v1"
            assert office.cli("up", "--detach").returncode == 0
            with office.person("ann") as ann:
                ann.become_operator(office.irc)
                ann.join("#control", "#agents")
                ann.say("#control", "!invoke worker")
                ann.wait("#agents", "news", r"^worker\(\S+\) has joined")
                answer = ann.ask("worker", "hello")
            assert "refuses the key: Incorrect API key provided" in answer
            assert KEY not in answer
            assert folder_holds(office.home.data, CANARY) == []
        finally:
            liar.shutdown()
