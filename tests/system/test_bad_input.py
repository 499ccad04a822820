"""What people get wrong and hosts run out of: each a clear error, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from machine_home import kill, private_home, until, vmms

from conftest import command_line, leftovers
from fireclaw.vmm.process import home_tag

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Cli

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def cli() -> Iterator[Cli]:
    """The command line on a home in which nothing has run yet."""
    with private_home() as home, command_line(home) as cli:
        yield cli


@pytest.fixture(scope="module")
def running() -> Iterator[Cli]:
    """The command line on one home with a daemon, for all tests that damage nothing."""
    with private_home() as home, command_line(home) as cli:
        assert cli("run", "--", "true").returncode == 0
        until(lambda: not vmms(home), "the machine is gone")
        yield cli


def refusal(cli: Cli, *arguments: str, status: int = 125) -> str:
    """Run a verb that must fail; returns the last line of its stderr, without our name."""
    done = cli(*arguments)
    assert (done.returncode, done.stdout) == (status, b"")
    assert b"Traceback" not in done.stderr
    line = done.stderr.decode().splitlines()[-1]
    assert line.startswith("fireclaw: ")
    return line.removeprefix("fireclaw: ")


def assert_no_machine(cli: Cli) -> None:
    """No machine was made, or none is left."""
    until(lambda: cli.json("ps", "--json") == [], "no machine is listed")
    assert vmms(cli.home) == {}
    assert [path for path in leftovers(cli.home) if not path.is_socket()] == []


# -- arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--image", "debain", "--", "true"], "no image named 'debain' (did you mean 'debian'?)"),
        (["run", "--image", "../x", "--", "true"], "no image named '../x' (known: debian)"),
        (["run"], 'no command given (for example: fireclaw run "uname -a")'),
        (["run", "--", ""], "argv: the command's name is empty"),
        (["run", "--timeout", "0", "--", "true"], "argument --timeout: '0' is not a number of seconds above 0"),
        (["run", "--workdir", "etc", "--", "true"], "cwd: must be an absolute path"),
        (["run", "--env", "=x", "--", "true"], "'=x' is not NAME=VALUE"),
        (["run", "--colour", "--", "true"], "unrecognized arguments: --colour"),
        (["exec"], "the following arguments are required: NAME"),
        (["exec", "nobody", "--", "true"], "no machine named 'nobody' (there is no machine yet)"),
        (["exec", "../nobody", "--", "true"], "no machine named '../nobody' (there is no machine yet)"),
        (["rnu", "--", "true"], "no verb named 'rnu' (did you mean 'run'?)"),
        ([], "no verb given (see 'fireclaw --help')"),
    ],
)
def test_arguments_that_can_never_work(running: Cli, arguments: list[str], message: str) -> None:
    """A mistake in the arguments is 125, names the argument and the reason, and makes no machine."""
    made = [entry.type for entry in running.ledger()].count("machine.made")
    assert refusal(running, *arguments).startswith(message)
    assert [entry.type for entry in running.ledger()].count("machine.made") == made
    assert_no_machine(running)


def test_a_user_or_folder_that_the_image_lacks(running: Cli) -> None:
    """What only the guest can know is refused by the guest, with the reason, and the machine goes."""
    assert refusal(running, "run", "-u", "nobody-here", "id", status=126) == (
        "the machine says: the image has no user 'nobody-here'"
    )
    assert "/no/such/folder" in refusal(running, "run", "-w", "/no/such/folder", "pwd", status=127)
    assert_no_machine(running)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"argv": ["echo", "a\\u0000b"]}\n', "argv[1]: holds a NUL byte"),
        (b'{"argv": ["true"], "env": {"A": "\\u0000"}}\n', "env.A: holds a NUL byte"),
        (b'{"argv": ["true"], "cwd": "/\\u0000"}\n', "cwd: holds a NUL byte"),
        (b'{"argv": []}\n', "argv"),
        (b'{"argv": ["true"], "memory": 1}\n', "memory"),
        (b"\0\0\0\0\n", "the request's first line"),
        (b'{"argv": ["true"]}', "the request ended before its first line"),
    ],
)
def test_requests_that_can_never_work(running: Cli, body: bytes, reason: str) -> None:
    """A raw request that can never work is refused with its field and reason, and makes no machine."""
    answer = ask_raw(running, b"POST /v1/run HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(rest)["error"]["message"].startswith(reason)
    assert_no_machine(running)


def ask_raw(cli: Cli, request: bytes) -> bytes:
    """Send bytes to the API and return all that comes."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(cli.home.socket))
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := client.recv(65536):
            answer += piece
    return answer


# -- the home -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "place", "reason"),
    [
        ("[machine]\nmemory_mb = 256\n", "line 2", "unknown key 'machine.memory_mb' (did you mean 'memory_mib'?)"),
        ('[machine]\n\nmemory_mib = "256"\n', "line 3", "machine.memory_mib must be a valid integer"),
        ("[machine]\nmemory_mib = 1\n", "line 2", "machine.memory_mib must be greater than or equal to 96"),
        ("[machine\n", "line 1", "not TOML"),
        ("[mashine]\n", "line 1", "unknown section [mashine] (did you mean 'machine'?)"),
    ],
)
def test_a_wrong_configuration(cli: Cli, settings: str, place: str, reason: str) -> None:
    """A wrong setting is named with file, line and key; no daemon starts, and a mended file is all it takes."""
    cli.home.config_file.write_text(settings)
    assert refusal(cli, "run", "--", "true").startswith(f"{cli.home.config_file}, {place}: {reason}")
    assert not cli.home.socket.exists()
    cli.home.config_file.unlink()
    assert cli("run", "--", "true").returncode == 0


def test_an_unreadable_configuration(cli: Cli) -> None:
    """A configuration that cannot be read is named, with the reason."""
    file = cli.home.config_file
    file.mkdir()
    assert refusal(cli, "ps").startswith(f"cannot read {file}: Is a directory")
    file.rmdir()
    file.write_bytes(b"[machine]\n# \xff\n")
    assert refusal(cli, "ps").startswith(f"{file}, line 2: not UTF-8")
    file.unlink()


def test_a_home_too_deep_for_sockets(cli: Cli, tmp_path: Path) -> None:
    """A home whose sockets would have too long names is refused, with the way out, and not made."""
    deep = tmp_path / ("x" * 100)
    cli.env["FIRECLAW_HOME"] = str(deep)
    message = f"the folder '{deep}/run' is too long for unix sockets (108 bytes at most)"
    assert refusal(cli, "run", "--", "true") == f"{message} (set FIRECLAW_HOME to a shorter path)"
    assert not deep.exists()
    cli.env["FIRECLAW_HOME"] = str(cli.home.data)


def test_a_home_that_is_a_file(cli: Cli) -> None:
    """A home that cannot be a folder is refused, with the way out."""
    file = cli.home.data / "file"
    file.touch()
    cli.env["FIRECLAW_HOME"] = str(file)
    assert refusal(cli, "run", "--", "true").endswith("(set FIRECLAW_HOME to a folder you may write to)")
    cli.env["FIRECLAW_HOME"] = str(cli.home.data)


def test_a_second_daemon(running: Cli) -> None:
    """A daemon started by hand on a home that has one names that one, ends, and hinders nobody."""
    pid = running.daemon_pid
    second = subprocess.run(
        [sys.executable, "-m", "fireclaw.daemon"], env=running.env, capture_output=True, timeout=60, check=False
    )
    assert second.returncode == 1
    assert f"another daemon (pid {pid}) runs on {running.home.data}" in second.stderr.decode()
    assert running("run", "--", "true").returncode == 0
    assert running.daemon_pid == pid


@pytest.mark.parametrize("stale", ["socket", "file"])
def test_something_stale_in_the_sockets_place(cli: Cli, stale: str) -> None:
    """A socket that nobody listens on, or a file in its place, does not keep the daemon from starting."""
    cli.home.make()
    if stale == "socket":
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(cli.home.socket))
    else:
        cli.home.socket.write_text("")
    assert cli("run", "--", "echo", "on").stdout == b"on\n"


def test_a_damaged_store(cli: Cli) -> None:
    """A store that is no database is named, with what can be done; nothing is overwritten."""
    cli.home.database.write_bytes(b"not a database, but somebody's\n" * 100)
    before = cli.home.database.read_bytes()
    message = refusal(cli, "run", "--", "true")
    assert message.startswith(f"the store '{cli.home.database}' is damaged: ")
    assert "move it away" in message
    assert cli.home.database.read_bytes() == before
    cli.home.database.unlink()
    assert cli("run", "--", "true").returncode == 0


# -- what machines are made from ------------------------------------------------------------------------------


def damage(file: Path, *, cut: int = 0, change_at: int | None = None) -> None:
    """Put a damaged copy in a file's place; the file itself is shared."""
    data = bytearray(file.read_bytes())
    if cut:
        del data[-cut:]
    if change_at is not None:
        data[change_at] ^= 0xFF
    file.unlink()
    file.write_bytes(data)


def test_a_truncated_image(cli: Cli) -> None:
    """A truncated image is named, with the verb that builds it anew, and no machine is made from it."""
    (root,) = cli.home.images.glob("*/root.squashfs")
    size = root.stat().st_size
    damage(root, cut=1000)
    message = f"the image 'debian' is truncated: 'root.squashfs' has {size - 1000} of {size} bytes"
    assert refusal(cli, "run", "--", "true") == f"{message} (run 'fireclaw setup' to build it anew)"
    assert_no_machine(cli)


@pytest.mark.parametrize("how", ["truncated", "changed", "foreign", "unreadable"])
def test_a_snapshot_that_is_not_what_it_was(cli: Cli, how: str) -> None:
    """A damaged snapshot is made anew, which is said once, and the next run finds it sound."""
    (folder,) = cli.home.snapshots.iterdir()
    if how == "truncated":
        damage(folder / "memory", cut=4096)
        reason = "the snapshot file 'memory' is truncated"
    elif how == "changed":
        damage(folder / "state", change_at=20_000)
        reason = "the snapshot file 'state' was changed"
    elif how == "foreign":
        damage(folder / "manifest.json")
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
        reason = f"the snapshot {folder.name[:12]} cannot be read: "
    else:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "memory").touch()
        reason = f"the snapshot {folder.name[:12]} is incomplete"

    first, second = cli("run", "--", "echo", "on"), cli("run", "--", "echo", "on")

    assert (first.returncode, first.stdout) == (0, b"on\n")
    said = first.stderr.decode()
    assert f"fireclaw: {reason}" in said
    assert said.count("it is built anew") == 1
    assert (second.returncode, second.stdout, second.stderr) == (0, b"on\n", b"")
    kill(cli.daemon_pid)
    assert b"snapshot" not in cli("run", "--", "true").stderr
    assert [path.name for path in cli.home.snapshots.iterdir()] == [folder.name]


# -- a full disk ----------------------------------------------------------------------------------------------

# In a mount namespace of its own, as the home is a file system that nobody else sees, daemon included.
_ON_A_SMALL_DISK = """
set -eu
mount -t tmpfs -o size=$SIZE,mode=700 none "$FIRECLAW_HOME"
trap '"$@" down' EXIT
for name in images runtimes $LINKED; do ln -s "$SOURCE/$name" "$FIRECLAW_HOME/$name"; done
fill() { dd if=/dev/zero of="$FIRECLAW_HOME/filler" bs=1k 2>/dev/null || true; }
free() { rm "$FIRECLAW_HOME/filler"; }
wait_for() { for _ in $(seq 400); do if "$@"; then return; fi; sleep 0.05; done; echo "not in time: $*"; exit 1; }
no_vmm() { ! pgrep -f "fireclaw-$MARK-"; }
"""


def on_a_small_disk(cli: Cli, script: str, *, size: str, linked: str = "snapshots") -> list[str]:
    """Run a script in which ``"$@"`` is ``fireclaw`` on a home of that size; returns its output's lines."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("a disk of a size of one's own needs root and a mount namespace")
    place = cli.home.data / "small"
    place.mkdir()
    env = cli.env | {
        "FIRECLAW_HOME": str(place),
        "SOURCE": str(cli.home.data),
        "SIZE": size,
        "LINKED": linked,
        "MARK": home_tag(place),
    }
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", _ON_A_SMALL_DISK + script, "sh", *cli.argv()],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=False,
    )
    place.rmdir()
    text = done.stdout.decode()
    assert done.returncode == 0, text
    assert "Traceback" not in text
    assert text.endswith(("fireclaw: all is stopped\n", "fireclaw: nothing is running\n"))
    return [line for line in text.splitlines() if "software CPU" not in line and "started the daemon" not in line]


def test_a_disk_that_is_full_from_the_start(cli: Cli) -> None:
    """Where nothing can be written, no daemon starts, each verb says what could not be written, and room mends it."""
    lines = on_a_small_disk(
        cli, 'fill; "$@" run -- true || echo $?; "$@" ps || echo $?; free; "$@" run -- echo on', size="1m"
    )
    run, status, ps, ps_status, *rest = lines
    assert run == ps
    assert run.startswith("fireclaw: cannot write ")
    assert "No space left on device" in run
    assert (status, ps_status) == ("125", "125")
    assert rest == ["on", "fireclaw: all is stopped"]


def test_a_disk_too_small_for_the_store(cli: Cli) -> None:
    """Where not even the empty store fits, that is the error."""
    run, status, *_ = on_a_small_disk(cli, '"$@" run -- true || echo $?', size="64k")
    assert "cannot write the store" in run
    assert "database or disk is full" in run
    assert status == "125"


def test_a_disk_that_fills_under_the_daemon(cli: Cli) -> None:
    """A run on a disk that is full says so and leaves no machine; what runs then ends, and nothing of it is left."""
    lines = on_a_small_disk(
        cli,
        """
        mkfifo "$FIRECLAW_HOME/go"
        "$@" run "echo ready; read _; echo out" < "$FIRECLAW_HOME/go" > "$FIRECLAW_HOME/out" &
        exec 9> "$FIRECLAW_HOME/go"
        wait_for [ -s "$FIRECLAW_HOME/out" ]
        fill
        "$@" run -- true || echo $?
        echo go >&9
        wait $! && echo finished || echo failed
        wait_for no_vmm
        free
        "$@" prune > /dev/null
        "$@" prune
        "$@" ps | wc -l
        "$@" run -- echo on
        """,
        size="1m",
    )
    refused, status, *rest = lines
    assert refused.startswith("fireclaw: cannot write the ")
    assert status == "125"
    assert "on" in rest
    assert rest[rest.index("1") - 1] in {"finished", "failed"}  # nothing but the head of ps after the second prune


def test_a_disk_too_small_for_a_snapshot(cli: Cli) -> None:
    """A snapshot that does not fit is an error that says where room is needed, each time, and nothing stays of it."""
    lines = on_a_small_disk(
        cli,
        '"$@" run -- true || echo $?; ls "$FIRECLAW_HOME/snapshots"; "$@" ps | wc -l; "$@" prune',
        size="20m",
        linked="",
    )
    making, refused, status, *rest = lines
    assert making == "fireclaw: making a snapshot of the image 'debian' (once)"
    assert refused.startswith("fireclaw: cannot write a snapshot to ")
    assert refused.endswith("No space left on device (make room there)")
    assert (status, rest) == ("125", ["1", "fireclaw: all is stopped"])
