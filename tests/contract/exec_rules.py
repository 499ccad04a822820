"""The exec rules, for whatever gives a ``channel`` fixture: the double, and clones of each VMM."""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import GuestError, InvalidError
from fireclaw.machines import calls
from fireclaw.machines.calls import Exec
from fireclaw.wire.frames import Kind, pack

if TYPE_CHECKING:
    from fireclaw.machines.channel import Channel


async def run(channel: Channel, *argv: str, stdin: bytes | None = None, **more: str) -> tuple[int, bytes, bytes]:
    """Run a command to its end; return status, stdout, stderr."""
    execution = await calls.start(channel, Exec(argv, stdin=stdin is not None, **more))  # type: ignore[arg-type]  # cwd, user

    async def feed() -> None:
        if stdin is not None:
            await execution.write(stdin)
            await execution.close_stdin()

    feeding = asyncio.create_task(feed())
    output = {Kind.STDOUT: bytearray(), Kind.STDERR: bytearray()}
    async for kind, data in execution.output():
        output[kind] += data
    feeding.cancel()
    assert execution.exit is not None
    return execution.exit.status, bytes(output[Kind.STDOUT]), bytes(output[Kind.STDERR])


async def sh(channel: Channel, script: str, stdin: bytes | None = None) -> tuple[int, bytes, bytes]:
    """Run a shell script."""
    return await run(channel, "/bin/sh", "-c", script, stdin=stdin)


async def test_streams_and_status_are_separate(channel: Channel) -> None:
    """stdout, stderr and the exit status arrive each in its own place."""
    assert await sh(channel, "echo out; echo err >&2; exit 7") == (7, b"out\n", b"err\n")


async def test_killed_by_a_signal_is_128_plus_n(channel: Channel) -> None:
    """A command that a signal killed has the status a shell would show."""
    assert (await sh(channel, "kill -9 $$"))[0] == 137
    assert (await sh(channel, "kill -15 $$"))[0] == 143


async def test_what_cannot_start_is_126_or_127(channel: Channel) -> None:
    """An unknown command is 127, a file that is not executable 126, each with the reason."""
    for argv, status, reason in (
        (["no-such-command"], 127, "no-such-command"),
        (["/no/such/file"], 127, "No such file"),
        (["/etc/passwd"], 126, "Permission denied"),
        (["/"], 126, "Permission denied"),
    ):
        execution = await calls.start(channel, Exec(argv))
        assert [item async for item in execution.output()] == []
        assert execution.exit is not None
        assert execution.exit.status == status
        assert reason in execution.exit.error


async def test_stdin_reaches_the_command_and_ends(channel: Channel) -> None:
    """The command reads exactly the bytes that were sent, then end-of-file."""
    data = bytes(range(256)) * 4000
    status, out, _ = await run(channel, "sha256sum", stdin=data)
    assert (status, out.split()[0].decode()) == (0, hashlib.sha256(data).hexdigest())


async def test_without_stdin_the_command_reads_nothing(channel: Channel) -> None:
    """A command that was given no stdin sees end-of-file at once."""
    assert await run(channel, "cat") == (0, b"", b"")


async def test_large_binary_output_comes_out_whole(channel: Channel) -> None:
    """Megabytes of arbitrary bytes pass both ways unchanged."""
    data = os.urandom(1 << 20) * 5
    status, out, _ = await run(channel, "cat", stdin=data)
    assert status == 0
    assert hashlib.sha256(out).digest() == hashlib.sha256(data).digest()


async def test_a_command_that_ignores_stdin_ends(channel: Channel) -> None:
    """Unread input does not keep a finished command."""
    assert (await run(channel, "true", stdin=bytes(5_000_000)))[0] == 0


async def test_a_grandchild_that_holds_the_pipe_does_not_hang(channel: Channel) -> None:
    """The stream ends with the command, though a background process still holds its stdout."""
    async with asyncio.timeout(20):
        assert await sh(channel, "sleep 60 & echo done") == (0, b"done\n", b"")


async def test_output_is_complete_before_the_exit(channel: Channel) -> None:
    """What a command wrote just before its end is not cut off."""
    status, out, _ = await sh(channel, "head -c 300000 /dev/zero; printf end; exit 3")
    assert (status, len(out), out[-3:]) == (3, 300003, b"end")


async def test_a_reader_that_stops_stops_the_command(channel: Channel) -> None:
    """While nobody reads, at most some windows and pipes of output are on the way."""
    execution = await calls.start(channel, Exec(["sh", "-c", "yes | head -c 3000000"]))
    output = execution.output()
    total = len((await anext(output))[1])
    # Another command gets through while the first one is stuck.
    assert await sh(channel, "echo through") == (0, b"through\n", b"")
    async for _, data in output:
        total += len(data)
    assert total == 3_000_000


async def test_signals_reach_the_process_group(channel: Channel) -> None:
    """A signal frame reaches the command, which may handle it."""
    script = "trap 'echo caught; exit 5' INT; echo ready; while :; do sleep 0.05; done"
    execution = await calls.start(channel, Exec(["sh", "-c", script]))
    text = b""
    async for _, data in execution.output():
        text += data
        if data == b"ready\n":
            await execution.signal(2)
    assert execution.exit is not None
    assert (execution.exit.status, text) == (5, b"ready\ncaught\n")


async def test_abort_kills_the_whole_group(channel: Channel) -> None:
    """After a reset neither the command nor its children live on."""
    execution = await calls.start(channel, Exec(["sh", "-c", "sleep 54321 & echo $!; wait"]))
    _, pid = await anext(execution.output())
    execution.abort()
    status, _, _ = await sh(
        channel,
        f"i=0; while kill -0 {int(pid)} 2>/dev/null && ! grep -q 'State:.Z' /proc/{int(pid)}/status; do"
        " i=$((i+1)); [ $i -gt 100 ] && exit 1; sleep 0.05; done",
    )
    assert status == 0


async def test_environment_and_folder(channel: Channel) -> None:
    """Environment and working folder are the ones asked for; PATH is always there."""
    execution = await calls.start(channel, Exec(["sh", "-c", "echo $A $PWD; echo $PATH"], env={"A": "b c"}, cwd="/usr"))
    out = b"".join([data async for _, data in execution.output()])
    assert out.splitlines()[0] == b"b c /usr"
    assert b"/usr/bin" in out.splitlines()[1]


async def test_a_missing_folder_is_named(channel: Channel) -> None:
    """A working folder that does not exist is the reason given, with docker's status."""
    execution = await calls.start(channel, Exec(["true"], cwd="/no/such/folder"))
    assert [item async for item in execution.output()] == []
    assert execution.exit is not None
    assert execution.exit.status in {126, 127}
    assert "/no/such/folder" in execution.exit.error


async def test_files_are_written_and_read(channel: Channel) -> None:
    """A written file is read back whole; parts, limits and errors are as asked."""
    path = "/tmp/fireclaw-exec-rules"
    content = os.urandom(700_000)
    await calls.write_file(channel, path, content, mode=0o600)
    try:
        assert await calls.read_file(channel, path, 1 << 20) == content
        assert await calls.read_file(channel, path, 10) == content[:10]
        assert await sh(channel, f"stat -c %a {path}; ls {path}*") == (0, f"600\n{path}\n".encode(), b"")
    finally:
        await sh(channel, f"rm {path}")
    with pytest.raises(GuestError, match="No such file"):
        await calls.read_file(channel, path, 10)
    with pytest.raises(GuestError, match="not a regular file"):
        await calls.read_file(channel, "/dev/zero", 10)
    with pytest.raises(GuestError, match="No such file"):
        await calls.write_file(channel, "/no/such/folder/file", b"x")


async def test_many_commands_at_once(channel: Channel) -> None:
    """Commands side by side keep their output apart."""
    results = await asyncio.gather(*(sh(channel, f"echo {i}; exit {i}") for i in range(20)))
    assert results == [(i, f"{i}\n".encode(), b"") for i in range(20)]


async def test_nonsense_is_refused_and_the_channel_lives(channel: Channel) -> None:
    """Unknown calls, bad arguments and bad frames are answered with errors; other calls go on."""
    with pytest.raises(GuestError, match="unknown call"):
        await calls.call(channel, "nonsense")
    with pytest.raises(GuestError, match="bad call"):
        await calls.call(channel, "exec")
    stream = channel.stream()
    await stream.send(Exec(["sleep", "60"], stdin=True).line() + b"\xff" * 64)
    with pytest.raises(Exception, match="reset"):
        await stream.receive()
    stream = channel.stream()
    await stream.send(Exec(["cat"], stdin=True).line() + pack(Kind.SIGNAL, b'{"signal": 9999}'))
    with pytest.raises(Exception, match="reset"):
        await stream.receive()
    assert (await run(channel, "true"))[0] == 0


async def test_nul_is_refused_before_it_is_sent() -> None:
    """A NUL byte can never be an argument."""
    with pytest.raises(InvalidError, match="NUL"):
        Exec(["echo", "a\0b"])
