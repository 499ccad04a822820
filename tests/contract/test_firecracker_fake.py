"""The fake Firecracker held to the real one: the same exchanges, byte for byte, with both.

The real one takes part where FIRECLAW_TEST_FIRECRACKER names a folder with ``firecracker`` and ``jailer`` v1.16.1. Its
guest is a kernel that halts at once, so these tests need /dev/kvm but no guest that gets anywhere.
"""

from __future__ import annotations

import os
import re
import signal
from typing import TYPE_CHECKING, Any

import pytest
from firecracker_exchanges import (
    DEVICES,
    EARLY,
    FAILED_JAILS,
    FAILED_STARTS,
    GARBLED,
    GATE,
    LATE,
    LOADER,
    REFUSED,
    REFUSED_LATER,
    RESTORE,
    STATE,
)
from firecracker_program import api_description, real_programs, request, run, running
from jsonschema import Draft4Validator

from fireclaw.testing.firecracker import Guest, Script, install, runs_for_others
from fireclaw.testing.firecracker.bodies import BODIES
from fireclaw.testing.firecracker.json_reader import Choice, Kind, Scalar, Sequence, Struct

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from firecracker_program import Program


@pytest.fixture(scope="module", params=["fake", "real"])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``firecracker`` and ``jailer``."""
    if request.param == "fake":
        return install(tmp_path_factory.mktemp("fake"), Script(guest=Guest.SILENT))
    folder = real_programs()
    if folder is None:
        pytest.skip("no real Firecracker: set FIRECLAW_TEST_FIRECRACKER to the folder that has it")
    return folder


@pytest.fixture(scope="module")
def idle(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """One that is only asked for what it refuses."""
    with running(programs, tmp_path_factory.mktemp("idle")) as program:
        yield program.start()


@pytest.fixture
def program(programs: Path, tmp_path: Path) -> Iterator[Program]:
    """One of this test's own, not started yet."""
    with running(programs, tmp_path, real=programs == real_programs()) as program:
        yield program


@pytest.fixture
def machine(program: Program) -> Program:
    """One that runs a machine."""
    if program.real and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("a real Firecracker starts machines only with /dev/kvm")
    return program.start().boot()


@pytest.fixture
def template(machine: Program) -> Program:
    """One that has written a snapshot into its folder and is started anew, to load it."""
    machine.pause()
    machine.create()
    return machine.restart()


# What every client sees first


def test_bytes_of_the_four_kinds_of_answer(program: Program) -> None:
    """Reason phrases are empty, 204 has no length, and JSON is compact."""
    program.start()
    head = b"HTTP/1.1 %d \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n"
    info = b'{"id":"probe","state":"Not started","vmm_version":"1.16.1","app_name":"Firecracker"}'
    fault = b'{"fault_message":"Invalid request method and/or path: GET nope."}'
    typed = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
    assert program.ask("GET", "/").raw == head % 200 + typed % (len(info), info)
    assert program.ask("PUT", "/entropy", {}).raw == head % 204 + b"\r\n"
    assert program.ask("GET", "/nope").raw == head % 400 + typed % (len(fault), fault)
    deprecated = program.ask("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 128, "cpu_template": "T2"})
    assert deprecated.raw == head % 204 + b"Deprecation: true\r\n\r\n"


def test_answers_to_questions(idle: Program) -> None:
    """The GETs that need no machine."""
    assert idle.ask("GET", "/version").body == b'{"firecracker_version":"1.16.1"}'
    assert idle.ask("GET", "/machine-config").body == (
        b'{"vcpu_count":1,"mem_size_mib":128,"smt":false,"track_dirty_pages":false,"huge_pages":"None"}'
    )
    assert idle.ask("GET", "/vm/config").body == (
        b'{"balloon":null,"drives":[],"boot-source":{"kernel_image_path":"","initrd_path":null,"boot_args":null},'
        b'"cpu-config":null,"logger":null,"machine-config":{"vcpu_count":1,"mem_size_mib":128,"smt":false,'
        b'"track_dirty_pages":false,"huge_pages":"None"},"metrics":null,"mmds-config":null,"network-interfaces":[],'
        b'"vsock":null,"entropy":null,"pmem":[],"memory-hotplug":null}'
    )
    assert idle.ask("GET", "/mmds").body == b"{}"
    assert idle.ask("GET", "/version/").body == idle.ask("GET", "/version").body
    assert idle.ask("GET", "//").body == idle.ask("GET", "/").body


@pytest.mark.parametrize(("method", "path", "body", "message"), REFUSED)
def test_refusals_before_a_start(idle: Program, method: str, path: str, body: object, message: str) -> None:
    """What is wrong, unknown or too early is refused with the exact words."""
    answer = idle.ask(method, path, body)
    assert (answer.status, answer.fault) == (400, message)


@pytest.mark.parametrize(("data", "message"), GARBLED)
def test_what_is_no_request_is_answered_with_what_is_no_json(idle: Program, data: bytes, message: str) -> None:
    """The transport's own errors have a raw newline in their text; a good request before a bad one is lost."""
    wire = idle.connect().send(data)
    answer = wire.answer()
    assert answer.status == 400
    assert answer.body.decode() == f'{{ "error": "{message}\nAll previous unanswered requests will be dropped." }}'
    with pytest.raises(ValueError, match="Invalid control character"):
        answer.json  # noqa: B018 - reading it is the test
    wire.sock.close()


def test_bodies_may_follow_later_and_clients_may_ask_first(idle: Program) -> None:
    """Expect: 100-continue is answered; headers that mean nothing here are ignored, Connection: close among them."""
    wire = idle.connect()
    wire.send(b"PATCH /vm HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 18\r\nConnection: close\r\n\r\n")
    assert wire.answer().raw == b"HTTP/1.1 100 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n"
    assert wire.send(b'{"state":"Paused"}').answer().fault == EARLY
    assert wire.ask("GET", "/version").status == 200
    wire.sock.close()


def test_the_eleventh_connection_is_turned_away(program: Program) -> None:
    """Ten connections are served, idle ones count, and a closed one makes room."""
    program.start()
    wires = [program.connect() for _ in range(10)]
    assert wires[9].ask("GET", "/").status == 200
    refused = program.connect()
    assert refused.sock.recv(4096) == (
        b"HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n"
        b'{ "error": "Too many open connections" }'
    )
    assert refused.ended()
    wires[0].sock.close()
    wires[1].ask("GET", "/")  # by then it has noticed
    assert program.connect().ask("GET", "/").status == 200


# Configuration


def test_a_configuration_is_shown_as_it_was_given(program: Program) -> None:
    """Defaults are filled in, drives keep the order of their PUTs but for a root device, which goes first."""
    program.start().configure()
    program.do("PATCH", "/machine-config", {"mem_size_mib": 256})
    disk = {"drive_id": "disk", "is_root_device": True, "path_on_host": "image"}
    program.do("PUT", "/drives/disk", disk)
    second = program.ask("PUT", "/drives/other", {**disk, "drive_id": "other"})
    assert second.fault == "Drive config error: A root block device already exists!"
    config = program.ask("GET", "/vm/config").json
    assert config["machine-config"]["mem_size_mib"] == 256
    assert config["vsock"] == {"guest_cid": 3, "uds_path": "ch"}
    assert config["boot-source"] == {
        "kernel_image_path": "kernel",
        "initrd_path": None,
        "boot_args": "console=ttyS0",
    }
    assert [drive["drive_id"] for drive in config["drives"]] == ["disk", "root", "image"]
    assert config["drives"][1] == {
        "drive_id": "root",
        "partuuid": None,
        "is_root_device": False,
        "cache_type": "Unsafe",
        "is_read_only": True,
        "path_on_host": "root",
        "rate_limiter": None,
        "io_engine": "Sync",
        "socket": None,
    }


def test_a_drive_need_not_be_whole_sectors(program: Program) -> None:
    """A file that is no multiple of 512 bytes is taken; only the log says that its end will not be seen."""
    program.start()
    (program.folder / "odd").write_bytes(bytes(1000))
    program.do("PUT", "/drives/odd", {"drive_id": "odd", "is_root_device": False, "path_on_host": "odd"})
    assert b"Disk size 1000 is not a multiple of sector size 512" in program.wait_logged(b"Disk size")


def test_the_vsock_socket_is_bound_at_once(program: Program) -> None:
    """A file in its place is an error; another PUT moves the device, and the old socket's file goes."""
    program.start()
    (program.folder / "taken").touch()
    taken = program.ask("PUT", "/vsock", {"guest_cid": 3, "uds_path": "taken"})
    assert taken.fault == (
        "Vsock config error: Cannot create backend for vsock device: Error binding to the host-side Unix socket: "
        "Address already in use (os error 98)"
    )
    program.do("PUT", "/vsock", {"guest_cid": 3, "uds_path": "first"})
    assert (program.folder / "first").is_socket()
    program.do("PUT", "/vsock", {"guest_cid": 3, "uds_path": "second"})
    assert not (program.folder / "first").exists()
    assert program.ask("PUT", "/vsock", {"guest_cid": 3, "uds_path": "second", "vsock_id": "v"}).deprecated


def test_a_kernel_of_the_wrong_kind_is_noticed_at_the_start(program: Program) -> None:
    """A bzImage is taken and refused by InstanceStart; the process lives on."""
    program.start().configure()
    (program.folder / "bzImage").write_bytes(b"MZ" + bytes(4096))
    program.do("PUT", "/boot-source", {"kernel_image_path": "bzImage"})
    assert program.ask("PUT", "/actions", {"action_type": "InstanceStart"}).fault == LOADER + "Invalid Elf magic number"
    assert program.ask("GET", "/").json["state"] == "Not started"


def test_a_start_without_a_kernel_is_refused(idle: Program) -> None:
    """InstanceStart needs a boot source."""
    fault = idle.ask("PUT", "/actions", {"action_type": "InstanceStart"}).fault
    assert fault == "Start microvm error: Cannot start microvm without kernel configuration."


def test_a_console_that_cannot_be_opened_is_noticed_at_the_start(program: Program) -> None:
    """PUT /serial takes any path; InstanceStart opens it."""
    program.start().configure()
    program.do("PUT", "/serial", {"serial_out_path": "no/console"})
    fault = program.ask("PUT", "/actions", {"action_type": "InstanceStart"}).fault
    assert fault == (
        "Start microvm error: Failed to create device manager: Error with EventFd: "
        "No such file or directory (os error 2)"
    )


def test_metadata_are_merged(program: Program) -> None:
    """PATCH /mmds is a JSON merge patch, of what must be there; the size of the whole is limited."""
    program.start("--mmds-size-limit", "30")
    assert program.ask("PATCH", "/mmds", {"a": 1}).fault == "MMDS error: The MMDS data store is not initialized."
    program.do("PUT", "/mmds", {"a": 1, "c": {"d": 1}})
    program.do("PATCH", "/mmds", {"a": None, "c": {"e": 2}})
    assert program.ask("GET", "/mmds").body == b'{"c":{"d":1,"e":2}}'
    large = program.ask("PATCH", "/mmds", {"f": "x" * 30})
    assert (large.status, large.fault) == (413, "MMDS limit exceeded error: The MMDS patch request doesn't fit.")


def test_metrics_are_set_up_once(program: Program) -> None:
    """A second PUT /metrics is refused; nothing is written before the start."""
    program.start()
    program.do("PUT", "/metrics", {"metrics_path": "metrics"})
    fault = program.ask("PUT", "/metrics", {"metrics_path": "metrics"}).fault
    assert fault.endswith("Reinitialization of metrics not allowed.")
    assert (program.folder / "metrics").read_bytes() == b""


def test_the_log_is_opened_and_never_truncated(program: Program) -> None:
    """A new log path begins at the start of whatever is there; lines name the instance and the thread."""
    program.start()
    (program.folder / "second").write_text("x" * 4096)
    program.do("PUT", "/logger", {"log_path": "second", "level": "Info", "show_level": True})
    program.ask("GET", "/nope")
    text = (program.folder / "second").read_text()
    assert len(text) == 4096
    line = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9} \[probe:fc_api:INFO\] The request was executed successfully\. "
    assert re.match(line + r"Status code: 204 No Content\.\n", text)
    assert ':INFO] The API server received a Get request on "/nope".\n' in text


# A machine


def test_phases_of_a_machine(machine: Program) -> None:
    """Running and paused: pausing and resuming twice is fine, configuration is over."""
    assert machine.ask("GET", "/").json["state"] == "Running"
    machine.resume()
    machine.pause()
    machine.pause()
    assert machine.ask("GET", "/").json["state"] == "Paused"
    machine.resume()
    assert machine.ask("GET", "/").json["state"] == "Running"


def test_refusals_after_a_start(machine: Program) -> None:
    """What comes too late is refused with the exact words, and so is what a machine cannot do."""
    for method, path, body, message in REFUSED_LATER:
        answer = machine.ask(method, path, body)
        assert (answer.status, answer.fault) == (400, message), (method, path)
    assert machine.ask("GET", "/").json["state"] == "Running"


def test_a_snapshot_is_two_files(machine: Program) -> None:
    """State of some 14 kB, memory of full size, and the machine goes on; its format version can be asked for."""
    machine.pause()
    machine.create()
    assert 8_000 < (machine.folder / "state").stat().st_size < 20_000
    assert (machine.folder / "memory").stat().st_size == 128 << 20
    machine.resume()
    described = run(machine.programs / "firecracker", ["--describe-snapshot", "state"], machine.folder)
    assert described.stdout.splitlines()[0] == "v10.0.0"


def test_a_snapshot_that_cannot_be_written(machine: Program) -> None:
    """The errors say which file; a missing memory path leaves a state file all the same."""
    machine.pause()
    problem = (
        "Create snapshot error: Cannot perform open on the {} backing file: No such file or directory (os error 2)"
    )
    failed = machine.ask("PUT", "/snapshot/create", {"snapshot_path": "no/state", "mem_file_path": "memory"})
    assert failed.fault == problem.format("snapshot")
    failed = machine.ask("PUT", "/snapshot/create", {"snapshot_path": "state", "mem_file_path": "no/memory"})
    assert failed.fault == problem.format("memory")
    assert (machine.folder / "state").exists()


def test_connections_wait_for_the_guests_driver(machine: Program) -> None:
    """A CONNECT to a guest without a driver hangs: no answer, no end."""
    assert machine.vsock().hangs()


def test_a_drive_can_be_replaced(machine: Program) -> None:
    """PATCH /drives changes the path, running or paused."""
    (machine.folder / "other").write_bytes(bytes(4096))
    machine.do("PATCH", "/drives/image", {"drive_id": "image", "path_on_host": "other"})
    machine.pause()
    machine.do("PATCH", "/drives/image", {"drive_id": "image", "path_on_host": "image"})


def test_metrics_are_a_line_at_the_start_and_at_each_flush(program: Program) -> None:
    """FlushMetrics adds a line of JSON, whose counters begin again from zero."""
    if program.real and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("a real Firecracker starts machines only with /dev/kvm")
    program.start()
    program.do("PUT", "/metrics", {"metrics_path": "metrics"})
    program.boot()
    program.pause()
    for _ in range(2):
        program.do("PUT", "/actions", {"action_type": "FlushMetrics"})
    lines = (program.folder / "metrics").read_text().splitlines()
    assert len(lines) == 3


# Loading


def test_a_clone_has_its_sources_configuration(template: Program) -> None:
    """It is paused, its drives and kernel are named as the source named them, its vsock socket is bound."""
    assert template.load().status == 204
    assert template.ask("GET", "/").json["state"] == "Paused"
    config = template.ask("GET", "/vm/config").json
    assert sorted(drive["path_on_host"] for drive in config["drives"]) == ["image", "root"]  # their order is lost
    assert config["boot-source"]["kernel_image_path"] == "kernel"
    assert config["vsock"] == {"guest_cid": 3, "uds_path": "ch"}
    assert (template.folder / "ch").is_socket()
    template.resume()
    assert template.ask("PUT", "/snapshot/load", {"snapshot_path": "s", "mem_file_path": "m"}).fault == LATE


def test_a_clone_with_everything_else(template: Program) -> None:
    """It can run at once, with another vsock path, on its real clock, and track its memory."""
    answer = template.load(
        resume_vm=True, vsock_override={"uds_path": "other"}, clock_realtime=True, track_dirty_pages=True
    )
    assert answer.status == 204
    assert template.ask("GET", "/").json["state"] == "Running"
    assert template.ask("GET", "/machine-config").json["track_dirty_pages"] is True
    assert (template.folder / "other").is_socket()
    assert not (template.folder / "ch").exists()


def test_what_may_come_before_a_load(template: Program) -> None:
    """Logger, metrics, serial line and metadata; the deprecated way of naming the memory is marked as such."""
    template.do("PUT", "/logger", {"level": "Info"})
    template.do("PUT", "/metrics", {"metrics_path": "metrics"})
    template.do("PUT", "/serial", {"serial_out_path": "console"})
    template.do("PUT", "/mmds", {"a": 1})
    answer = template.ask("PUT", "/snapshot/load", {"snapshot_path": "state", "mem_file_path": "memory"})
    assert answer.status == 204
    assert answer.deprecated


def test_what_may_not_come_before_a_load(template: Program) -> None:
    """Any other configuration, even one that failed, closes the way; the process lives."""
    template.ask("PUT", "/vsock", {"guest_cid": 3, "uds_path": "no/ch"})
    assert template.load().fault == GATE
    assert template.alive()


def _cut(folder: Path, name: str, size: int) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate(size)


def _spoil(folder: Path, name: str) -> None:
    with (folder / name).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


@pytest.mark.parametrize(
    ("damage", "more", "message"),
    [
        (
            lambda folder: (folder / "state").unlink(),
            {},
            f"{STATE}Failed to open snapshot file: No such file or directory (os error 2)",
        ),
        (
            lambda folder: _cut(folder, "state", 5000),
            {},
            (
                f"{STATE}Failed to load snapshot state from file: "
                "An error occurred during bitcode serialization: bitcode error"
            ),
        ),
        (
            lambda folder: _cut(folder, "state", 0),
            {},
            f"{STATE}Failed to load snapshot state from file: IO Error: File too short to contain CRC",
        ),
        (
            lambda folder: _spoil(folder, "state"),
            {},
            f"{STATE}Failed to load snapshot state from file: CRC64 validation failed",
        ),
        (
            lambda folder: (folder / "memory").unlink(),
            {},
            (
                f"{RESTORE}Failed to load guest memory: Error creating guest memory from file: "
                "Failed to load guest memory: No such file or directory (os error 2)"
            ),
        ),
        (
            lambda folder: _cut(folder, "memory", 1 << 20),
            {},
            (
                f"{RESTORE}Failed to load guest memory: Error creating guest memory from file: "
                "Failed to restore guest memory: Total sum of memory regions exceeds largest possible file offset"
            ),
        ),
        (
            lambda folder: (folder / "image").unlink(),
            {},
            (
                f"{DEVICES}Block: Virtio backend error: Error manipulating the backing file: "
                "No such file or directory (os error 2) image"
            ),
        ),
        (
            lambda folder: (folder / "ch").touch(),
            {},
            (
                f"{DEVICES}VsockUnixBackend: Error binding to the host-side Unix socket: "
                "Address already in use (os error 98)"
            ),
        ),
        (
            lambda folder: (folder / "other").touch(),
            {"vsock_override": {"uds_path": "other"}},
            (
                f"{DEVICES}VsockUnixBackend: Error binding to the host-side Unix socket: "
                "Address already in use (os error 98)"
            ),
        ),
        (
            lambda _: None,
            {"network_overrides": [{"iface_id": "eth0", "host_dev_name": "tap0"}]},
            f"{STATE}Unknown Network Device.",
        ),
    ],
    ids=[
        "no state",
        "truncated state",
        "empty state",
        "spoilt state",
        "no memory",
        "truncated memory",
        "no drive",
        "vsock taken",
        "override taken",
        "no such interface",
    ],
)
def test_a_load_that_fails_is_the_end(template: Program, damage: Any, more: dict[str, Any], message: str) -> None:
    """The answer has the reason, and the process ends with status 1."""
    damage(template.folder)
    assert template.load(**more).fault == message
    assert template.wait() == 1
    assert (template.folder / "stderr").read_text().splitlines()[-1] == "Error: RunWithApi(BuildMicroVmError(Restore))"


# The process


def test_questions_that_need_no_machine(programs: Path, tmp_path: Path) -> None:
    """Version and snapshot version, each followed by a line of the log, which has no other place to go."""
    program = programs / "firecracker"
    version = run(program, ["--version", "--bogus"], tmp_path)
    assert version.returncode == 0
    first, empty, goodbye = version.stdout.splitlines()
    assert (first, empty) == ("Firecracker v1.16.1", "")
    assert goodbye.endswith("[anonymous-instance:main] Firecracker exiting successfully. exit_code=0")
    assert run(program, ["--snapshot-version"], tmp_path).stdout.splitlines()[0] == "v10.0.0"


@pytest.mark.parametrize(
    ("words", "status", "message", "debug"),
    FAILED_STARTS,
)
def test_starts_that_fail(
    programs: Path, tmp_path: Path, *, words: list[str], status: int, message: str, debug: str
) -> None:
    """The reason is in the log, and once more on stderr for programmers; a stale socket is one."""
    (tmp_path / "stale").touch()
    done = run(programs / "firecracker", words, tmp_path)
    lines = [line.partition(":main] ")[2] for line in done.stdout.splitlines()]
    assert done.returncode == status
    assert lines[-2:] == [message, f"Firecracker exiting with error. exit_code={status}"]
    assert done.stderr == f"Error: {debug}\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [("a_b", "InvalidChar('_', 1)"), ("", "InvalidLen(0, 1, 64)"), ("x" * 65, "InvalidLen(65, 1, 64)")],
)
def test_a_wrong_id_is_a_panic(programs: Path, tmp_path: Path, name: str, message: str) -> None:
    """An instance's id has letters, digits and hyphens."""
    done = run(programs / "firecracker", ["--id", name], tmp_path)
    assert done.returncode == -signal.SIGABRT
    assert done.stdout.endswith(f"main.rs:309:48:\nInvalid instance ID: {message}\n")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_signals_kill_and_sockets_stay(program: Program, number: signal.Signals) -> None:
    """SIGTERM and SIGINT are not handled; what was bound is left behind."""
    program.start()
    program.do("PUT", "/vsock", {"guest_cid": 3, "uds_path": "ch"})
    assert program.process is not None
    program.process.send_signal(number)
    assert program.wait() == -number
    assert (program.folder / "api").is_socket()
    assert (program.folder / "ch").is_socket()


def test_a_hang_up_is_an_exit_status(program: Program) -> None:
    """Some signals are turned into an exit status of their own."""
    program.start()
    assert program.process is not None
    program.process.send_signal(signal.SIGHUP)
    assert program.wait() == 156


def test_stdout_becomes_non_blocking_only_as_a_console(machine: Program) -> None:
    """With a serial path, stdout stays as it was; without one it is made non-blocking for all who share it."""
    assert machine.process is not None
    assert not _flags(machine.process.pid) & os.O_NONBLOCK
    machine.restart().configure()
    machine.do("PUT", "/actions", {"action_type": "InstanceStart"})
    assert _flags(machine.process.pid) & os.O_NONBLOCK


def _flags(pid: int) -> int:
    with open(f"/proc/{pid}/fdinfo/1") as file:  # noqa: PTH123 - a file of the kernel
        return int(dict(line.split(":\t", 1) for line in file)["flags"], 8)


# The jailer


@pytest.mark.parametrize(
    ("words", "message"),
    FAILED_JAILS,
)
def test_jails_that_cannot_be(programs: Path, tmp_path: Path, words: list[str], message: str) -> None:
    """The jailer refuses with status 1, its reason and a programmer's line."""
    if os.geteuid() != 0:
        pytest.skip("the jailer needs root")
    done = _jail(programs, tmp_path, *words)
    assert (done.returncode, done.stderr) == (1, message + "\n")


def test_an_id_is_good_for_one_jail(programs: Path, tmp_path: Path) -> None:
    """A jail that was not removed is in the way of the next one with its name."""
    if os.geteuid() != 0:
        pytest.skip("the jailer needs root")
    _jail(programs, tmp_path, "--id", "j", "--", "--version")  # a real one that is no static program fails to start
    again = _jail(programs, tmp_path, "--id", "j", "--", "--version")
    assert again.returncode == 1
    assert again.stderr.splitlines()[0] == (
        "Failed to create /dev/net/tun via mknod inside the jail: File exists (os error 17)"
    )
    root = tmp_path / "firecracker/j/root"
    assert {path.name for path in root.iterdir()} >= {"dev", "run", "firecracker", "firecracker.pid"}
    assert root.stat().st_mode & 0o777 == 0o700
    if runs_for_others():  # otherwise the fake jailer keeps its user
        assert root.stat().st_uid == 12345


def _jail(programs: Path, base: Path, *words: str) -> Any:
    own: list[str | Path] = [
        "--exec-file",
        programs / "firecracker",
        "--uid",
        "12345",
        "--gid",
        "12345",
        "--chroot-base-dir",
        base,
    ]
    return run(programs / "jailer", [*own, "--cgroup-version", "2", *words], base)


# The API description


def _properties(struct: Struct, definition: dict[str, Any], description: dict[str, Any]) -> None:
    """Hold a table to a definition, and what lies in its fields to theirs."""
    properties = definition.get("properties", {})
    fields = {field.name: field for field in struct.fields}
    assert set(fields) == set(properties), struct.name
    assert {field.name for field in struct.fields if field.required} >= set(definition.get("required", ())), struct.name
    for name, kind in ((field.name, field.kind) for field in struct.fields):
        _agrees(kind, properties[name], description)


def _agrees(kind: Kind, schema: dict[str, Any], description: dict[str, Any]) -> None:
    if "$ref" in schema:
        schema = description["definitions"][schema["$ref"].rsplit("/", 1)[1]]
    if isinstance(kind, Struct):
        _properties(kind, schema, description)
    elif isinstance(kind, Sequence):
        assert schema["type"] == "array"
    elif isinstance(kind, Choice):
        assert schema["type"] == "string"
        # YAML reads the bare word Off as False; levels are compared without case
        words = {"off" if word is False else word.lower() for word in schema["enum"]}
        assert words <= {word.lower() for word in kind.words}
    elif kind != Scalar("any"):
        types = {"bool": "boolean", "string": "string", "path": "string"}
        assert schema["type"] == types.get(kind.name, "integer")


def test_bodies_are_as_the_description_has_them() -> None:
    """Every body of ours has the fields, kinds and words of Firecracker's own description, and none is missing."""
    description = api_description()
    described = {
        f"{method.upper()} {path}": body["schema"]
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
        for body in operation.get("parameters", ())
        if body["in"] == "body"
    }
    # metadata may be anything, and hinting is a preview that nobody uses
    free = {"PUT /mmds", "PATCH /mmds", "PATCH /balloon/hinting/start"}
    assert set(described) - free == set(BODIES)
    for endpoint in BODIES:
        schema = description["definitions"][described[endpoint]["$ref"].rsplit("/", 1)[1]]
        if endpoint == "PATCH /machine-config":  # the description has one definition for both methods
            schema = {**schema, "required": []}
        _properties(BODIES[endpoint], schema, description)


def test_answers_are_as_the_description_has_them(idle: Program) -> None:
    """What is answered to GETs fits the definitions."""
    definitions = api_description()["definitions"]
    for path, name in (
        ("/", "InstanceInfo"),
        ("/version", "FirecrackerVersion"),
        ("/machine-config", "MachineConfiguration"),
    ):
        schema = {"$ref": f"#/definitions/{name}", "definitions": definitions}
        Draft4Validator(schema).validate(idle.ask("GET", path).json)
    assert request("GET", "/") == b"GET / HTTP/1.1\r\n\r\n"
