"""``fireclaw run`` and ``exec``: the real command line against the real API, with a supervisor that has no machines."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from api_office import Office, served_office

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import AsyncIterator

MIB = 1 << 20
CLIENT_MAX_KIB = 40 * 1024  # of resident memory; Python itself needs about 15 MiB

# What the hot path may import of ours; everything else must be the standard library's, and none of SLOW.
ALLOWED = {"cli", "cli.client", "cli.parser", "cli.relay", "cli.run", "cli.start", "cli.terminal"}
ALLOWED |= {"errors", "paths", "wire", "wire.frames"}
SLOW = {"asyncio", "email", "http", "importlib.metadata", "logging", "ssl", "subprocess", "tempfile", "threading"}


@pytest.fixture
async def office() -> AsyncIterator[Office]:
    """A served API and a command line that reaches it."""
    async with served_office() as office:
        yield office


def peak_memory_kib(process: Process) -> int:
    """Return the most resident memory that a process has had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    assert found is not None
    return int(found[1])


async def read_line(process: Process) -> bytes:
    """Read one line of the command's standard output."""
    assert process.stdout is not None
    return await process.stdout.readline()


async def show(office: Office, *words: str | bytes) -> dict[str, object]:
    """Run a command that prints its own request."""
    status, out, err = await office.call(*words)
    assert (status, err) == (0, "")
    found: dict[str, object] = json.loads(out)
    return found


async def test_streams_stay_apart_and_exact(office: Office) -> None:
    """Both outputs come out byte by byte, each on its own descriptor, our note on stderr, the status as the status."""
    status, out, err = await office.call("run", "--", "both")

    assert (status, out) == (42, b"out\x00\xff")
    assert err == "fireclaw: software only\nerr\\xfe"


async def test_megabytes_pass_both_ways_in_bounded_memory(office: Office) -> None:
    """Twenty megabytes come back from ``cat`` unchanged, and the client never holds more than a piece of them."""
    data = os.urandom(20 * MIB)
    process = await office.start("run", "--", "cat")
    assert process.stdin is not None
    assert process.stdout is not None

    process.stdin.write(data)
    echoed = await process.stdout.readexactly(len(data))
    peak = peak_memory_kib(process)
    process.stdin.close()

    assert await process.wait() == 0
    assert echoed == data
    assert peak < CLIENT_MAX_KIB


async def test_unread_input_is_held_back_and_does_not_hide_a_dead_client(office: Office) -> None:
    """A command that reads nothing stops the sender; a client killed then still ends the command."""
    process = await office.start("run", "--", "deaf")
    assert process.stdin is not None
    process.stdin.write(bytes(20 * MIB))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await process.stdin.drain()
    await office.fake.started.wait()

    process.kill()
    await office.fake.cancelled.wait()

    await process.wait()
    assert office.fake.received == 0


async def test_one_string_goes_through_the_shell(office: Office) -> None:
    """A lone string is the shell's; words after ``--``, or several words, are the command's own."""
    assert (await show(office, "run", "show a; b"))["argv"] == ["/bin/sh", "-c", "show a; b"]
    assert (await show(office, "run", "--", "show"))["argv"] == ["show"]
    assert (await show(office, "run", "--", "show", "--", "-x"))["argv"] == ["show", "--", "-x"]
    assert (await show(office, "run", "show", "--timeout", "-v"))["argv"] == ["show", "--timeout", "-v"]


async def test_options_reach_the_command(office: Office) -> None:
    """Variables, folder, user and time limit arrive; bytes that are not UTF-8 arrive as they are."""
    words = ("-e", "A=1=2", "-e", "FIRECLAW_HOME", "-e", "NOT_SET", "-w", "/work", "-u", "agent", "--timeout", "1.5")
    found = await show(office, "run", *words, "--", "show", b"\xff\xfe", "é")

    assert found == {
        "argv": ["show", "\udcff\udcfe", "é"],
        "env": {"A": "1=2", "FIRECLAW_HOME": str(office.home.data)},
        "cwd": "/work",
        "user": "agent",
        "timeout_s": 1.5,
    }


async def test_ctrl_c_once_is_passed_to_the_command(office: Office) -> None:
    """The first Ctrl-C reaches the command, whose own end and output count."""
    process = await office.start("run", "--", "wait")
    assert await read_line(process) == b"waiting\n"

    process.send_signal(signal.SIGINT)
    out, err = await process.communicate()

    assert (process.returncode, out) == (130, b"bye\n")
    assert b"press it again" in err


async def test_ctrl_c_twice_ends_at_once(office: Office) -> None:
    """The second Ctrl-C does not wait for a command that ignores the first; the command is gone afterwards."""
    process = await office.start("run", "--", "stubborn")
    assert await read_line(process) == b"waiting\n"
    process.send_signal(signal.SIGINT)
    assert await read_line(process) == b"no\n"

    process.send_signal(signal.SIGINT)

    assert await process.wait() == 130
    await office.fake.cancelled.wait()


async def test_second_ctrl_c_works_while_output_is_stuck(office: Office) -> None:
    """The second Ctrl-C, not the first, ends a client that is blocked in writing to an output that nobody reads."""
    reader, writer = os.pipe()
    process = await office.start("run", "--", "flood", stdout=writer)
    os.close(writer)
    await office.fake.stalled.wait()

    process.send_signal(signal.SIGINT)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(process.wait(), 0.5)
    process.send_signal(signal.SIGINT)

    assert await process.wait() == 130
    os.close(reader)


async def test_sigterm_ends_the_command(office: Office) -> None:
    """A terminated client exits with 143, and its command is gone."""
    process = await office.start("run", "--", "stubborn")
    await read_line(process)

    process.terminate()

    assert await process.wait() == 143
    await office.fake.cancelled.wait()


async def test_timeout_is_124(office: Office) -> None:
    """A command that runs out of time gives 124 and a sentence."""
    status, _, err = await office.call("run", "--timeout", "0.1", "--", "deaf")

    assert (status, err) == (124, "fireclaw: the command ran out of time and was killed\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
async def test_closed_standard_descriptors(office: Office, closed: str) -> None:
    """A caller may close any of stdin, stdout and stderr; a missing stdin is an empty one."""
    status, _, _ = await office.call("run", "--", "cat", shell=f'exec "$@" {closed}')

    assert status == 0


async def test_unreadable_stdin_is_said(office: Office) -> None:
    """An unreadable stdin is an empty one, and the reason is said."""
    status, _, err = await office.call("run", "--", "cat", shell='exec "$@" 0> /dev/null')

    assert (status, err) == (0, "fireclaw: cannot read standard input: Bad file descriptor\n")


async def test_reader_that_left_ends_quietly(office: Office) -> None:
    """When nobody reads our output any more, the command ends, with the status of SIGPIPE and no complaint."""
    reader, writer = os.pipe()
    process = await office.start("run", "--", "flood", stdout=writer)
    os.close(writer)
    os.close(reader)

    _, err = await process.communicate()

    assert (process.returncode, err) == (141, b"")
    await office.fake.cancelled.wait()


async def test_full_disk_under_stdout_is_an_error(office: Office) -> None:
    """Output that cannot be written ends the command with 125 and the reason."""
    status, _, err = await office.call("run", "--", "both", shell='exec "$@" > /dev/full')

    assert status == 125
    assert "fireclaw: cannot write standard output: No space left on device" in err


async def test_non_blocking_stdout_loses_nothing(office: Office) -> None:
    """An output in non-blocking mode is waited for."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = await office.start("run", "--", "cat", stdout=writer)
    os.close(writer)
    data = bytes(4 * MIB)
    sending = asyncio.create_task(process.communicate(data))

    with os.fdopen(reader, "rb") as output:
        received = await asyncio.to_thread(output.read)

    await sending
    assert (process.returncode, received) == (0, data)


async def test_reason_of_127_is_said(office: Office) -> None:
    """A command that is not found gives 127 and the guest's reason."""
    assert await office.call("run", "--", "missing") == (127, b"", "fireclaw: missing: no such file or directory\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("run", "--image", "debain", "--", "show"), "no image named 'debain' (did you mean 'debian'?)"),
        (("exec", "workr", "--", "show"), "no machine named 'workr' (did you mean 'worker'?)"),
        (("exec", "a/../b", "--", "show"), "no machine named 'a/../b' (known: worker)"),
        (("run", "-w", "here", "--", "show"), "cwd: must be an absolute path"),
        (("run", "--", ""), "argv: the command's name is empty"),
        (("run", "--", "bug"), "a mistake inside the daemon: ValueError: a bug (its log has the details)"),
        (("run",), """no command given (for example: fireclaw run "uname -a")"""),
        (("run", "--tiemout", "5", "--", "show"), "unrecognized arguments: --tiemout"),
        (("run", "--timeout", "0", "--", "show"), "'0' is not a number of seconds above 0"),
        (("run", "-e", "=1", "--", "show"), "'=1' is not NAME=VALUE"),
        (("rum", "show"), "no verb named 'rum' (did you mean 'run'?)"),
        ((), "no verb given (see 'fireclaw --help')"),
    ],
)
async def test_errors_of_ours_are_125(office: Office, words: tuple[str, ...], sentence: str) -> None:
    """Whatever fails on our side gives 125, an empty stdout, and one line with the thing and the reason."""
    status, out, err = await office.call(*words)

    assert (status, out) == (125, b"")
    assert sentence in err
    assert err.startswith("fireclaw: ")
    assert err.count("\n") == 1


async def test_exec_reaches_the_named_machine(office: Office) -> None:
    """``exec`` runs in the machine of that name."""
    assert (await show(office, "exec", "-u", "0", "worker", "--", "show"))["user"] == "0"


async def test_daemon_that_ends_tells_its_clients(office: Office) -> None:
    """A command that runs while the daemon ends gives 125 and the reason, and is cancelled."""
    process = await office.start("run", "--", "stubborn")
    await read_line(process)

    await office.api.aclose()
    _, err = await process.communicate()

    assert (process.returncode, err) == (125, b"fireclaw: the daemon ended while the command ran\n")
    assert office.fake.cancelled.is_set()


async def test_hot_path_imports_little(office: Office) -> None:
    """``run`` imports small parts of the standard library and the few modules of ours that it names."""
    code = "import sys; from fireclaw.cli import main; main(); print(*sys.modules, file=sys.stderr)"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        "run",
        "--",
        "cat",
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"FIRECLAW_HOME": str(office.home.data)},
    )
    _, err = await process.communicate()
    modules = set(err.decode().split())

    ours = {name.removeprefix("fireclaw.") for name in modules if name.startswith("fireclaw.")}
    strangers = {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"fireclaw", "__main__"}
    assert "cli.run" in ours
    assert ours <= ALLOWED
    assert not SLOW & modules
    assert {name for name in strangers if not name.startswith(("_", "sitecustomize", "distutils"))} == set()
