"""The fake Firecracker where no real one can be asked: its guest, its vsock device, its scripted faults, its jail."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from exec_rules import sh
from firecracker_program import HANGS_S, request, run, running

from fireclaw.machines import calls
from fireclaw.machines.calls import Exec
from fireclaw.machines.channel import Channel
from fireclaw.testing.firecracker import Connect, Guest, Script, install, runs_for_others
from fireclaw.wire.hello import new_magic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from firecracker_program import Program, Wire

_UNKNOWN: Final = "An error occurred when deserializing the json body of a request: unknown field `{}`, expected"


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[[Script], Program]]:
    """Makes a program with a script; one a test."""
    folder = tmp_path / "run"
    with running(tmp_path / "programs", folder) as program:

        def make(script: Script) -> Program:
            install(program.programs, script)
            return program

        yield make


@pytest.fixture
def program(scripted: Callable[[Script], Program]) -> Program:
    """A program with nothing scripted, running."""
    return scripted(Script()).start()


@pytest.fixture
def machine(program: Program) -> Program:
    """A machine with guestd in it."""
    return program.boot()


async def _open(wire: Wire, magic: bytes = b"") -> Channel:
    """The channel behind a CONNECT; a machine keeps the magic of its first one."""
    assert wire.line().startswith(b"OK ")
    wire.sock.setblocking(False)
    return await Channel.open(wire.sock.dup(), magic or new_magic())


# The guest


async def test_guestd_answers_behind_a_connect(machine: Program) -> None:
    """A CONNECT to guestd's port leads to the real guestd, which runs commands."""
    channel = await _open(machine.vsock())
    assert await sh(channel, "echo out; echo err >&2; exit 7") == (7, b"out\n", b"err\n")
    await channel.aclose()


async def test_bytes_go_both_ways_in_bulk(machine: Program) -> None:
    """More than any buffer holds passes unchanged, in both directions at once."""
    channel = await _open(machine.vsock())
    data = os.urandom(4 << 20)
    assert (await sh(channel, "cat", stdin=data))[1] == data
    await channel.aclose()


async def test_a_newer_connection_replaces_the_older(machine: Program) -> None:
    """Only the newest connection is served."""
    magic = new_magic()
    older = await _open(machine.vsock(), magic)
    newer = await _open(machine.vsock(), magic)
    await asyncio.wait_for(older.lost.wait(), 5)
    assert await sh(newer, "echo here") == (0, b"here\n", b"")
    await older.aclose()
    await newer.aclose()


async def test_guestds_shutdown_is_the_end(machine: Program) -> None:
    """When guestd is told to end the machine, the process ends with status 0 and leaves its sockets."""
    channel = await _open(machine.vsock())
    await calls.shutdown(channel)
    assert machine.wait() == 0
    assert (machine.folder / "api").is_socket()
    assert (machine.folder / "ch").is_socket()
    await channel.aclose()


@pytest.mark.parametrize("end", ["kill", "exit"])
async def test_commands_end_with_the_machine(machine: Program, tmp_path: Path, end: str) -> None:
    """What guestd started does not outlive the process, whatever ended that."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    channel = await _open(machine.vsock())
    await calls.start(channel, Exec(["/bin/sh", "-c", f"exec >{fifo}; echo here; sleep 1000"]))
    await asyncio.to_thread(_wait_readable, reader)
    assert os.read(reader, 64) == b"here\n"
    await sh(channel, "true")  # by now the first one is known to whoever has to end it
    if end == "kill":
        machine.kill()
    else:
        machine.do("PUT", "/actions", {"action_type": "SendCtrlAltDel"})
    await asyncio.to_thread(_wait_readable, reader)
    assert os.read(reader, 64) == b""  # no writer is left
    os.close(reader)
    await channel.aclose()


def _wait_readable(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(10_000)


def test_the_console_is_a_file_or_a_fifo(program: Program) -> None:
    """It says that the kernel began and that guestd is ready; without a path it is stdout."""
    os.mkfifo(program.folder / "console")
    reader = os.open(program.folder / "console", os.O_RDWR | os.O_NONBLOCK)
    program.boot()
    assert os.read(reader, 4096) == b"[    0.000000] Linux version 6.1.0 (fake)\r\nguestd: ready\r\n"
    os.close(reader)
    program.restart().configure()
    program.do("PUT", "/actions", {"action_type": "InstanceStart"})
    assert b"guestd: ready" in (program.folder / "stdout").read_bytes()


def test_a_full_fifo_loses_what_it_does_not_take(scripted: Callable[[Script], Program]) -> None:
    """A flood is never waited for; what was lost is counted."""
    program = scripted(Script(console="scripted words\r\n", console_flood=1 << 20)).start()
    os.mkfifo(program.folder / "console")
    reader = os.open(program.folder / "console", os.O_RDWR | os.O_NONBLOCK)
    program.do("PUT", "/metrics", {"metrics_path": "metrics"})
    program.boot()
    text = os.read(reader, 1 << 20)
    assert b"scripted words\r\n" in text
    assert len(text) <= 65536
    assert _metrics(program)[0]["uart"]["missed_write_count"] > 0
    os.close(reader)


def _metrics(program: Program) -> list[Any]:
    return [json.loads(line) for line in (program.folder / "metrics").read_text().splitlines()]


@pytest.mark.parametrize(
    ("guest", "words"), [(Guest.PANIC, b"Kernel panic - not syncing"), (Guest.REBOOT, b"reboot: Restarting system")]
)
def test_a_panic_and_a_reboot_look_the_same(scripted: Callable[[Script], Program], guest: Guest, words: bytes) -> None:
    """Both end the process with status 0; only the console tells them apart."""
    program = scripted(Script(guest=guest)).start().boot()
    assert program.wait() == 0
    assert words in (program.folder / "console").read_bytes()


def test_a_guest_that_is_off_leaves_the_process_running(scripted: Callable[[Script], Program]) -> None:
    """After a poweroff the API still calls the machine running, and connections hang."""
    program = scripted(Script(guest=Guest.POWEROFF)).start()
    os.mkfifo(program.folder / "console")
    reader = os.open(program.folder / "console", os.O_RDWR)
    program.boot()
    text = b""
    while b"reboot: Power down" not in text:
        text += os.read(reader, 4096)
    os.close(reader)
    assert program.ask("GET", "/").json["state"] == "Running"
    assert program.vsock().hangs()


def test_a_paused_guest_ends_when_it_goes_on(scripted: Callable[[Script], Program]) -> None:
    """A pause stops the guest's clock: its end waits."""
    program = scripted(Script(guest=Guest.REBOOT, guest_after_s=HANGS_S)).start().boot()
    program.pause()
    assert program.process is not None
    with pytest.raises(TimeoutError):
        _wait_end(program, 2 * HANGS_S)
    program.resume()
    assert program.wait() == 0


def _wait_end(program: Program, timeout_s: float) -> None:
    assert program.process is not None
    fd = os.pidfd_open(program.process.pid)
    try:
        if not select.select([fd], [], [], timeout_s)[0]:
            raise TimeoutError
    finally:
        os.close(fd)


def test_a_boot_may_take_time(scripted: Callable[[Script], Program]) -> None:
    """A connection that waits for the guest's driver is answered when it is up."""
    program = scripted(Script(boot_s=2 * HANGS_S)).start().boot()
    wire = program.vsock()
    assert wire.hangs()
    assert b"ready" not in (program.folder / "console").read_bytes()
    assert wire.line().startswith(b"OK ")
    assert b"guestd: ready" in (program.folder / "console").read_bytes()


def test_a_guest_may_die_before_it_is_ready(scripted: Callable[[Script], Program]) -> None:
    """A panic during the boot ends the process with status 0, and nobody was ready."""
    program = scripted(Script(guest=Guest.PANIC, boot_s=60)).start().boot()
    assert program.wait() == 0
    assert b"ready" not in (program.folder / "console").read_bytes()


def test_too_little_memory_is_a_silent_end(program: Program) -> None:
    """With 64 MiB the start succeeds, and the process ends with status 0 and no word."""
    program.boot(memory_mib=64)
    assert program.wait() == 0
    assert (program.folder / "console").read_bytes() == b""


def test_ctrl_alt_del_reboots(machine: Program) -> None:
    """The guest reboots, which ends the process."""
    machine.do("PUT", "/actions", {"action_type": "SendCtrlAltDel"})
    assert machine.wait() == 0


# vsock


def test_ports_count_up_from_2_30(machine: Program) -> None:
    """The host's ports have numbers of their own, which clones go on with."""
    assert machine.vsock().line() == b"OK 1073741824\n"
    assert machine.vsock().line() == b"OK 1073741825\n"
    machine.pause()
    machine.create()
    machine.restart().load(resume_vm=True)
    assert machine.vsock().line() == b"OK 1073741826\n"


def test_where_nobody_listens_a_connect_just_ends(machine: Program) -> None:
    """Another port than guestd's gives end-of-file without an answer."""
    assert machine.vsock(port=77).ended()


def test_a_guest_may_have_nobody_who_listens(scripted: Callable[[Script], Program]) -> None:
    """With a driver and without guestd every CONNECT ends."""
    assert scripted(Script(guest=Guest.DEAF)).start().boot().vsock().ended()


@pytest.mark.parametrize("command", [b"CONNECT x\n", b"CONNECT 4294967296\n", b"HELLO\n", b"CONNECT " + b"1" * 40])
def test_what_is_no_connect_is_dropped(machine: Program, command: bytes) -> None:
    """The connection just ends, as it does for a command of more than 32 bytes."""
    assert machine.connect("ch").send(command).ended()


def test_a_connect_in_two_pieces_is_dropped(machine: Program) -> None:
    """The command is read once; its second half comes too late."""
    wire = machine.connect("ch").send(b"CONN")
    assert wire.ended()


def test_before_the_driver_pieces_gather(program: Program) -> None:
    """Nobody accepts before the guest's driver is up; by then the whole command is there."""
    program.configure()
    wire = program.connect("ch").send(b"CONN")
    wire.send(b"ECT 1024\n")
    assert wire.hangs()
    program.do("PUT", "/actions", {"action_type": "InstanceStart"})
    assert wire.line().startswith(b"OK ")


def test_a_bare_pause_and_resume_wedges_the_device(machine: Program) -> None:
    """Issue 6100: every connection hangs, old and new, and more of the same does not help."""
    old = machine.vsock()
    assert old.line().startswith(b"OK ")
    machine.pause()
    during = machine.vsock()
    assert during.hangs()
    machine.resume()
    assert during.hangs()
    assert machine.vsock().hangs()
    machine.pause()
    machine.resume()
    assert old.hangs()
    assert machine.vsock().hangs()


def test_other_releases_do_not_wedge(scripted: Callable[[Script], Program]) -> None:
    """The gate came with 1.16."""
    program = scripted(Script(version="1.15.1", snapshot_version="9.0.0")).start().boot()
    program.pause()
    program.resume()
    assert program.vsock().line().startswith(b"OK ")


@pytest.mark.parametrize("path", ["state", "no/state"])
def test_a_snapshot_in_between_resets_and_heals(machine: Program, path: str) -> None:
    """With a create before the resume, even one that fails, old connections end and new ones are answered."""
    old = machine.vsock()
    old.line()
    machine.pause()
    machine.resume()  # wedged
    hung = machine.vsock()
    assert hung.hangs()
    machine.pause()
    machine.ask("PUT", "/snapshot/create", {"snapshot_path": path, "mem_file_path": "memory"})
    machine.resume()
    assert old.ended()
    assert hung.line().startswith(b"OK ")
    assert machine.vsock().line().startswith(b"OK ")


def test_a_connect_to_a_loaded_clone_is_answered_and_reset(machine: Program) -> None:
    """The guest gets the request and the reset together; after the resume all is well."""
    machine.pause()
    machine.create()
    machine.restart().load()
    early = machine.vsock()
    assert early.hangs()
    machine.resume()
    assert early.line().startswith(b"OK ")
    assert early.ended()
    assert machine.vsock().line().startswith(b"OK ")


async def test_a_clones_guest_works(machine: Program) -> None:
    """The guest of a clone is a guestd of its own."""
    machine.pause()
    machine.create()
    machine.restart().load(resume_vm=True)
    channel = await _open(machine.vsock())
    assert await sh(channel, "echo clone") == (0, b"clone\n", b"")
    await channel.aclose()


def test_two_clones_at_once(machine: Program, tmp_path: Path) -> None:
    """Clones share the snapshot and the read-only files; the memory file stays as it is."""
    machine.pause()
    machine.create()
    before = (machine.folder / "memory").stat()
    machine.restart().load(resume_vm=True)
    with running(machine.programs, tmp_path / "second") as second:
        for name in ("state", "memory", "root", "image"):
            (second.folder / name).symlink_to(machine.folder / name)
        assert second.start().load(resume_vm=True).status == 204
        assert second.vsock().line().startswith(b"OK ")
    assert machine.vsock().line().startswith(b"OK ")
    assert (machine.folder / "memory").stat().st_mtime_ns == before.st_mtime_ns


# Scripted faults


def test_scripted_connects(scripted: Callable[[Script], Program]) -> None:
    """The first CONNECTs end as scripted, later ones reach the guest."""
    program = scripted(Script(connects=(Connect.HANG, Connect.EOF, Connect.RESET))).start().boot()
    assert program.vsock().hangs()
    assert program.vsock().line() == b""
    reset = program.vsock()
    assert reset.line().startswith(b"OK ")
    assert reset.ended()
    assert not (good := program.vsock()).hangs()
    assert good.line().startswith(b"OK ")
    assert good.hangs()


def test_a_slow_request_keeps_everything_waiting(scripted: Callable[[Script], Program]) -> None:
    """While a snapshot is written no other call is answered and no connection accepted."""
    program = scripted(Script(delay_s={"PUT /snapshot/create": 2 * HANGS_S})).start().boot()
    program.pause()
    other = program.connect()
    slow = program.connect()
    slow.send(request("PUT", "/snapshot/create", {"snapshot_path": "state", "mem_file_path": "memory"}))
    program.wait_logged(b'"/snapshot/create"')
    other.send(request("GET", "/"))
    assert other.hangs()
    assert slow.answer().status == 204
    assert other.answer().status == 200


def test_a_request_can_be_made_to_fail(scripted: Callable[[Script], Program]) -> None:
    """With the scripted words; the process goes on."""
    program = scripted(Script(fail={"PUT /snapshot/load": "No space left on device (os error 28)"})).start()
    assert program.load().fault == "No space left on device (os error 28)"
    assert program.alive()


@pytest.mark.parametrize(("status", "expected"), [(148, 148), (-signal.SIGKILL, -signal.SIGKILL)])
def test_a_request_can_be_the_end(scripted: Callable[[Script], Program], status: int, expected: int) -> None:
    """The process ends in place of an answer, with a status or by a signal."""
    program = scripted(Script(exit_at={"PUT /boot-source": status})).start()
    wire = program.connect().send(request("PUT", "/boot-source", {"kernel_image_path": "kernel"}))
    assert wire.ended()
    assert program.wait() == expected


def test_the_start_can_be_the_end(scripted: Callable[[Script], Program]) -> None:
    """The process ends before there is a socket."""
    program = scripted(Script(exit_at={"start": 1})).spawn()
    assert program.wait() == 1
    assert not (program.folder / "api").exists()


def test_a_call_can_be_dropped_or_garbled(scripted: Callable[[Script], Program]) -> None:
    """The n-th call ends its connection, or is answered with what is no JSON."""
    program = scripted(Script(not_json_at=1, drop_at=2)).start()
    answer = program.ask("GET", "/")
    assert answer.body == b'{ "error": "Invalid request.\nAll previous unanswered requests will be dropped." }'
    assert program.connect().send(request("GET", "/")).ended()
    assert program.ask("GET", "/").status == 200


def test_nobody_may_listen(scripted: Callable[[Script], Program]) -> None:
    """The socket's file exists, and connections are refused."""
    program = scripted(Script(never_listens=True)).spawn()
    program.wait_logged(b"Listening on API socket")
    with pytest.raises(ConnectionRefusedError):
        program.connect()


def test_the_file_is_there_before_anybody_listens(scripted: Callable[[Script], Program]) -> None:
    """A client that is too quick is refused and comes again."""
    program = scripted(Script(listen_after_s=HANGS_S)).spawn()
    program.wait_logged(b"Listening on API socket")
    with pytest.raises(ConnectionRefusedError):
        program.connect()
    program.wait_logged(b"API server started.")
    assert program.ask("GET", "/").status == 200


@pytest.mark.parametrize(
    ("version", "method", "path", "body", "field"),
    [
        ("1.15.1", "PUT", "/snapshot/load", {"snapshot_path": "s", "vsock_override": {}}, "vsock_override"),
        ("1.15.0", "PUT", "/snapshot/load", {"snapshot_path": "s", "clock_realtime": True}, "clock_realtime"),
        ("1.12.0", "PUT", "/snapshot/load", {"snapshot_path": "s", "track_dirty_pages": True}, "track_dirty_pages"),
        ("1.11.0", "PUT", "/snapshot/load", {"snapshot_path": "s", "network_overrides": []}, "network_overrides"),
        ("1.15.1", "PUT", "/serial", {"rate_limiter": None}, "rate_limiter"),
        ("1.15.1", "PUT", "/network-interfaces/e", {"iface_id": "e", "mtu": 1500}, "mtu"),
    ],
)
def test_older_versions_know_fewer_fields(
    scripted: Callable[[Script], Program], *, version: str, method: str, path: str, body: object, field: str
) -> None:
    """A field that came later is unknown to them."""
    program = scripted(Script(version=version)).start()
    assert program.ask("GET", "/version").json == {"firecracker_version": version}
    assert program.ask(method, path, body).fault.startswith(_UNKNOWN.format(field))


def test_older_versions_know_fewer_paths(scripted: Callable[[Script], Program]) -> None:
    """PUT /serial came with 1.14."""
    program = scripted(Script(version="1.13.1")).start()
    fault = program.ask("PUT", "/serial", {"serial_out_path": "console"}).fault
    assert fault == "Invalid request method and/or path: PUT serial."


def test_a_snapshot_of_another_version(machine: Program) -> None:
    """It is refused with its version, and the process ends."""
    machine.pause()
    machine.create()
    install(machine.programs, Script(snapshot_version="11.0.0"))
    assert (
        machine.restart().load().fault.endswith("Failed to load snapshot state from file: Invalid data version: 10.0.0")
    )
    assert machine.wait() == 1


def test_metrics_are_differences(machine: Program) -> None:
    """Counters begin again at each line; latencies stay what they were."""
    machine.restart()
    machine.do("PUT", "/metrics", {"metrics_path": "metrics"})
    machine.boot()
    machine.pause()
    machine.create()
    machine.resume()
    machine.vsock().line()
    for _ in range(2):
        machine.do("PUT", "/actions", {"action_type": "FlushMetrics"})
    _, first, second = _metrics(machine)
    assert (first["vsock"]["conns_added"], second["vsock"]["conns_added"]) == (1, 0)
    assert first["latencies_us"]["full_create_snapshot"] == second["latencies_us"]["full_create_snapshot"] > 0


def test_the_last_line_of_the_metrics_may_be_cut(scripted: Callable[[Script], Program]) -> None:
    """As a crash may leave it."""
    program = scripted(Script(cut_metrics=True)).start()
    program.do("PUT", "/metrics", {"metrics_path": "metrics"})
    program.boot().do("PUT", "/actions", {"action_type": "SendCtrlAltDel"})
    assert program.wait() == 0
    whole, cut = (program.folder / "metrics").read_text().split("\n")
    assert json.loads(whole)
    with pytest.raises(ValueError, match="line 1 column"):
        json.loads(cut)


# The jail


def _jail(program: Program, base: Path, *words: str) -> list[str | Path]:
    own: list[str | Path] = [
        "--id",
        "j1",
        "--exec-file",
        program.programs / "firecracker",
        "--uid",
        "12345",
        "--gid",
        "12345",
    ]
    return [*own, "--chroot-base-dir", base, "--cgroup-version", "2", *words]


def test_a_jail_is_a_working_folder(scripted: Callable[[Script], Program], tmp_path: Path) -> None:
    """The jailer becomes the program, in its folder, with its limits, its cgroup, and without an environment."""
    script = Script(keep_user=True, cgroup_root=str(tmp_path / "cgroup"))
    program = scripted(script)
    root = tmp_path / "jails/firecracker/j1/root"
    root.mkdir(parents=True)
    (root / "kernel").write_text("put there by the caller")
    cgroup = ["--parent-cgroup", "fireclaw", "--cgroup", "memory.max=1000000", "--cgroup", "cpu.max=90000 100000"]
    words = _jail(program, tmp_path / "jails", *cgroup, "--", "--api-sock", "api", "--no-seccomp", "--log-path", "log")
    with running(program.programs, root) as jailed:
        jailed.start_by(program.programs / "jailer", words, cwd=tmp_path)
        assert jailed.ask("GET", "/").json["id"] == "j1"
        assert jailed.process is not None
        pid = jailed.process.pid
        process = Path(f"/proc/{pid}")
        assert (process / "cwd").readlink() == root
        assert (process / "environ").read_bytes() == b""
        assert (process / "comm").read_text() == "firecracker\n"
        limits = (process / "limits").read_text().splitlines()
        assert [line.split()[3:5] for line in limits if line.startswith("Max open files")] == [["2048", "2048"]]
        assert b"\0--id\0j1\0" in (process / "cmdline").read_bytes()
        assert (root / "firecracker.pid").read_text() == str(pid)
    group = tmp_path / "cgroup/fireclaw/j1"
    assert {path.name: path.read_text() for path in group.iterdir()} == {
        "memory.max": "1000000\n",
        "cpu.max": "90000 100000\n",
        "cgroup.procs": f"{pid}\n",
    }
    assert (root / "dev/net/tun").exists()
    assert (root / "run").is_dir()


def test_a_jail_takes_the_user(scripted: Callable[[Script], Program], tmp_path: Path) -> None:
    """As root the jailer gives up its user, its groups and its rights, and the jail belongs to the new one."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    if not runs_for_others():
        pytest.skip("only root can run this interpreter")
    program = scripted(Script())
    root = tmp_path / "jails/firecracker/j1/root"
    root.mkdir(parents=True)
    words = _jail(program, tmp_path / "jails", "--", "--api-sock", "api", "--log-path", "log")
    with running(program.programs, root) as jailed:
        jailed.start_by(program.programs / "jailer", words, cwd=tmp_path)
        assert jailed.process is not None
        lines = Path(f"/proc/{jailed.process.pid}/status").read_text().splitlines()
        status = dict(line.split(":", 1) for line in lines)
        assert status["Uid"].split() == status["Gid"].split() == ["12345"] * 4
        assert status["Groups"].split() == []
        assert int(status["CapEff"], 16) == 0
        assert (root / "api").stat().st_uid == root.stat().st_uid == 12345


def test_a_jails_program_answers(scripted: Callable[[Script], Program], tmp_path: Path) -> None:
    """What stands behind -- is the program's."""
    program = scripted(Script(keep_user=True))
    done = run(program.programs / "jailer", _jail(program, tmp_path, "--", "--version"), tmp_path)
    assert done.stdout.splitlines()[0] == "Firecracker v1.16.1"
