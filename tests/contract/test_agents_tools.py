"""The tools of agents in a real machine: what small tools and a shell of the image make of odd files and commands."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest

from fireclaw.agents.hands import LateHands
from fireclaw.agents.memory import Memory
from fireclaw.agents.outfit import Outfit
from fireclaw.agents.templates import Limits
from fireclaw.agents.toolbox import Toolbox
from fireclaw.agents.tools import TOOLS
from fireclaw.agents.turn import Turn
from fireclaw.daemon.hands import MachineHands
from fireclaw.errors import FireclawError
from fireclaw.machines.calls import Exec
from fireclaw.store.agents import LineRow, LineState, StepKind, StepRow, StepState, TurnRow, TurnState
from fireclaw.store.machines import Purpose
from fireclaw.store.memory import MemoryRows

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fireclaw.agents.events import ToolEnded
    from fireclaw.agents.ports import Handoff
    from fireclaw.daemon.rooms import Rooms

LINE = LineRow("1", "a1", "alice", "person", "#agents", "#agents", "do it", LineState.TAKEN, 0.0)
OUTFIT = Outfit(tuple(TOOLS.values()), Limits(command_seconds=60))


class Nobody:
    """No colleagues."""

    async def hand_over(self, handoff: Handoff) -> str:
        """Refuse."""
        raise FireclawError(f"nobody is {handoff.receiver}")


@dataclass
class Bench:
    """An agent's tools with a machine, and the machine's root for what only root can arrange."""

    toolbox: Toolbox
    hands: MachineHands
    calls: int = 0

    async def use(self, tool: str, **arguments: object) -> str:
        """Make a call and return what the model is told."""
        return str((await self.end(tool, **arguments)).result["output"])

    async def end(self, tool: str, **arguments: object) -> ToolEnded:
        """Make a call and return its end."""
        self.calls += 1
        request = {"id": "c", "name": tool, "arguments": arguments, "error": "", "asked_by": "t1/0"}
        step = StepRow("t1", self.calls, StepKind.TOOL, StepState.STARTED, request)
        turn = Turn(TurnRow("t1", "a1", "1", "#agents", TurnState.RUNNING, "", 0.0), LINE, OUTFIT)
        return await self.toolbox.use(step, turn)

    async def sh(self, script: str) -> str:
        """Arrange something in the machine."""
        result = await self.hands.run(script, timeout_s=60)
        assert result.status == 0, result.stderr
        return result.stdout.decode()


@pytest.fixture
async def bench(rooms: Rooms) -> AsyncIterator[Bench]:
    """A bench with a new machine."""
    machine = await rooms.machines.create(Purpose.AGENT, name="worker")
    await machine.settled()
    hands = MachineHands(machine, rooms.ledger, "worker")

    async def give() -> MachineHands:
        return hands

    late = LateHands("worker", give)
    memory = Memory(MemoryRows(rooms.database), "worker", lambda: 0.0)
    yield Bench(Toolbox("worker", late, memory, Nobody()), hands)
    await late.aclose()


async def test_files_are_written_read_and_edited(bench: Bench) -> None:
    """What is written is read back, whatever the path and the text are, and an edit changes one place."""
    for path in ("a.txt", 'new folder/it\'s a "file" ü.txt', "-n", "~/home.txt", "/tmp/$HOME `x`"):
        text = "first\nsecond 'quoted' \\n $HOME\nthird"
        told = await bench.use("write_file", path=path, content=text)
        assert told == f"wrote {path}; it has {len(text)} bytes now"
        assert await bench.use("read_file", path=path) == text
        assert await bench.use("edit_file", path=path, old="second", new="2nd") == f"changed {path} in line 2"
        assert await bench.use("read_file", path=path, start=2, lines=1) == (
            "2nd 'quoted' \\n $HOME\n[lines 2 to 2 of 3; go on with start=3]"
        )
    assert await bench.use("write_file", path="a.txt", content="\nmore\n", append=True) == (
        f"added to a.txt; it has {len(text) - 3 + 6} bytes now"
    )
    assert (await bench.use("read_file", path="a.txt")).endswith("third\nmore\n")
    assert await bench.sh("pwd; cat ~/home.txt; ls -A | grep fireclaw || true; id -un") == (
        f"/home/agent\n{text.replace('second', '2nd')}agent\n"
    )


async def test_what_cannot_be_read_is_told(bench: Bench) -> None:
    """Missing, a folder, a pipe, no permission, a dangling link, binary, empty: each has words that lead on."""
    await bench.sh(
        "mkdir d; mkfifo pipe; echo x > secret; chmod 0 secret; ln -s nowhere dangling; ln -s secret to-secret;"
        " printf 'a\\0b' > binary; : > empty; mkdir shut; echo y > shut/file; chmod 0 shut; echo hi > notes.txt"
    )
    for path, told in {
        "note.txt": "error: there is no 'note.txt'. Did you mean 'notes.txt'? ",
        "no/such/file": "error: there is no 'no/such/file'. Its folder is empty or does not exist.",
        "d": "error: 'd' is a folder; list_files shows what is in it",
        "pipe": "error: 'pipe' is not a regular file (a device, a pipe or a socket)",
        "/dev/zero": "error: '/dev/zero' is not a regular file (a device, a pipe or a socket)",
        "secret": "error: you have no permission for 'secret'; you are the user agent",
        "to-secret": "error: you have no permission for 'to-secret'; you are the user agent",
        "shut/file": "error: you have no permission for 'shut/file'; you are the user agent",
        "/etc/shadow": "error: you have no permission for '/etc/shadow'; you are the user agent",
        "dangling": "error: 'dangling' is a symbolic link to something that does not exist",
        "binary": "error: 'binary' is a binary file of 3 bytes; look at it with a command, e.g. od",
        "empty": "[the file is empty]",
    }.items():
        assert await bench.use("read_file", path=path) == told, path
    assert await bench.use("read_file", path="notes.txt", start=9) == "error: 'notes.txt' has only 1 lines"


async def test_big_files_are_read_in_parts(bench: Bench) -> None:
    """A file longer than what the model is shown comes in whole lines, with the way to the next; so does a huge one."""
    await bench.sh("seq 1 1000000 > big; head -c 50000 /dev/zero | tr '\\0' x > line")
    first = await bench.use("read_file", path="big")
    assert first.startswith("1\n2\n")
    assert first.endswith("[lines 1 to 527 of 1000000; go on with start=528]")
    assert (await bench.use("read_file", path="big", start=528)).startswith("528\n529\n")
    assert await bench.use("read_file", path="big", start=1000000) == "1000000\n[lines 1000000 to 1000000 of 1000000]"
    line = await bench.use("read_file", path="line")
    assert len(line) < 2200
    assert "line 1 is cut after 2000 bytes" in line
    told = await bench.use("edit_file", path="big", old="5", new="6")
    assert told == "error: 'big' is larger than 1048576 bytes; change it with a command, e.g. sed"


async def test_what_cannot_be_written_changes_nothing(bench: Bench) -> None:
    """Where a file may not be written the old content stays, and the reason is told."""
    await bench.sh("echo old > locked; chmod 400 locked; mkdir d; mkfifo pipe; ln -s nowhere dangling; echo x > file")
    for path, told in {
        "locked": "error: you have no permission for 'locked'; you are the user agent",
        "/etc/motd": "error: you have no permission for '/etc/motd'; you are the user agent",
        "/etc/new": "error: you have no permission for '/etc/new'; you are the user agent",
        "d": "error: 'd' is a folder; list_files shows what is in it",
        "pipe": "error: 'pipe' is not a regular file (a device, a pipe or a socket)",
    }.items():
        assert await bench.use("write_file", path=path, content="new") == told, path
    assert "File exists" in await bench.use("write_file", path="file/x", content="new")
    assert await bench.sh("cat locked; ls -A d") == "old\n"


async def test_a_link_and_a_mode_stay(bench: Bench) -> None:
    """Writing through a link changes what it points to, and a script stays executable."""
    await bench.sh("mkdir real; echo 'echo one' > real/run.sh; chmod 750 real/run.sh; ln -s real/run.sh run.sh")
    assert await bench.use("edit_file", path="run.sh", old="one", new="two") == "changed run.sh in line 1"
    assert await bench.sh("readlink run.sh; stat -c %a real/run.sh; ./run.sh") == "real/run.sh\n750\ntwo\n"
    assert (await bench.use("write_file", path="run.sh", content="echo three\n")).startswith("wrote")
    assert await bench.sh("readlink run.sh; stat -c %a real/run.sh; ./run.sh") == "real/run.sh\n750\nthree\n"


async def test_an_edit_keeps_what_it_does_not_name(bench: Bench) -> None:
    """Bytes that are not UTF-8 and line ends of two characters stay; a text that is not there is not guessed."""
    await bench.sh("printf 'caf\\351\\r\\nold line\\r\\nend\\r\\n' > latin")
    assert await bench.use("edit_file", path="latin", old="old line\nend", new="new\nend") == "changed latin in line 2"
    assert await bench.sh("od -An -c latin | tr -d ' \\n'") == r"caf351\r\nnew\r\nend\r\n"
    told = await bench.use("edit_file", path="latin", old="old lime", new="x")
    assert told.startswith("error: the text in \"old\" is not in 'latin'.")
    await bench.sh("printf 'a\\na\\n' > twice")
    assert "2 times (lines 1, 2)" in await bench.use("edit_file", path="twice", old="a", new="b")
    assert await bench.use("edit_file", path="twice", old="a", new="b", all=True) == "changed twice in 2 places"
    assert await bench.sh("cat twice") == "b\nb\n"


async def test_folders_are_listed_and_searched(bench: Bench) -> None:
    """A listing shows kinds and sizes, a search path, line and text; odd names and binary files do no harm."""
    assert await bench.use("list_files", path="/mnt") == "[the folder is empty]"
    await bench.sh(
        "mkdir -p 'p q/sub' p/.git; cd 'p q'; echo 'needle in hay' > 'a b.txt'; printf '\\0needle\\0' > bin;"
        " echo 'def needle():' > sub/x.py; ln -s sub link; mkfifo pipe; printf 'x\\n' > \"$(printf 'odd\\nname')\""
    )
    listing = await bench.use("list_files", path="p q")
    assert {"a b.txt  14 bytes", "bin  8 bytes", "link -> sub", "pipe  (fifo)", "sub/"} <= set(listing.splitlines())
    assert "sub/x.py  14 bytes" in await bench.use("list_files", path="p q", depth=2)
    assert await bench.use("list_files", path="p q/a b.txt") == "p q/a b.txt  14 bytes"
    found = await bench.use("search_files", pattern="need+le", path="p q")
    assert sorted(found.splitlines()) == ["p q/a b.txt:1:needle in hay", "p q/sub/x.py:1:def needle():"]
    assert await bench.use("search_files", pattern="needle(", path="p q") == "p q/sub/x.py:1:def needle():"
    assert await bench.use("search_files", pattern="needle", files="*.txt", path="p q") == "p q/a b.txt:1:needle in hay"
    assert await bench.use("search_files", pattern="-e", path="p q") == "[no line matches]"
    assert await bench.use("search_files", pattern="x", path="none") == (
        "error: there is no 'none'. Its folder is empty or does not exist."
    )


async def test_a_long_output_is_kept_whole(bench: Bench) -> None:
    """The model sees head and tail, and finds all of it, errors included, in a file that it can read."""
    end = await bench.end("run_command", command="seq 1 5000; echo oops >&2; exit 3")
    told = str(end.result["output"])
    assert told.startswith("1\n2\n")
    assert "bytes left out" in told
    assert "[exit status 3]" in told
    note = told.splitlines()[-1]
    assert note.startswith("[the whole output, 23898 bytes, is in /tmp/fireclaw/output-")
    path = note.rpartition(" ")[2].rstrip("]")
    assert await bench.use("search_files", pattern="^(4000|oops)$", path=path) == f"{path}:4000:4000\n{path}:5001:oops"
    for _ in range(10):
        await bench.use("run_command", command="seq 1 5000")
    assert await bench.sh("ls /tmp/fireclaw | wc -l") == "8\n"


async def test_a_command_runs_in_the_background(bench: Bench) -> None:
    """It returns at once with a handle; a look shows how it stands and what it printed; cancel ends all of it."""
    told = await bench.use("run_command", command="echo begun; sleep 300 & wait", background=True)
    assert told.startswith("started in the background as job-1; check_command")
    assert await bench.use("check_command", handle="job-1") == "job-1 is still running\nbegun"
    assert await bench.use("check_command", handle="job-1", cancel=True) == "job-1 was cancelled\nbegun"
    assert await bench.use("check_command", handle="job-1") == "job-1 was cancelled earlier\nbegun"
    assert await bench.sh("ps ax | grep -c '[s]leep 300' || true") == "0\n"
    await bench.use("run_command", command="sleep 1; seq 1 5000; exit 7", background=True)
    told = await bench.use("check_command", handle="job-2", wait_s=30)
    assert told.startswith("job-2 has ended with exit status 7\n[the first ")
    assert told.endswith("\n5000")
    assert await bench.use("check_command", handle="job-9") == "error: there is no 'job-9'; there are: job-1, job-2"
    assert "is no handle" in await bench.use("check_command", handle="../x")
    assert "no timeout_s" in await bench.use("run_command", command="true", background=True, timeout_s=5)


async def test_a_command_ends_at_the_time_that_it_was_given(bench: Bench) -> None:
    """A shorter limit than the template's counts, a longer one does not."""
    end = await bench.end("run_command", command="echo begun; sleep 60", timeout_s=1)
    assert end.result["output"] == "begun\n[stopped: the time limit of 1 s was reached]"
    assert end.result["timed_out"] is True
    assert await bench.use("run_command", command="cat; pwd") == "/home/agent"
    async with asyncio.timeout(30):
        assert await bench.use("run_command", command="true") == "[no output]"
    assert replace(OUTFIT, context_tokens=131072).output_bytes == 16000


async def test_commands_run_in_the_workspace_where_there_is_one(rooms: Rooms) -> None:
    """With a workspace that the agent may write to, commands and files are there, otherwise in the user's home."""
    machine = await rooms.machines.create(Purpose.AGENT, name="worker")
    await machine.settled()
    execution = await machine.start(Exec(["sh", "-c", "mkdir -p /workspace && chown 1000:1000 /workspace"]))
    assert [piece async for piece in execution.output()] == []
    hands = MachineHands(machine, rooms.ledger, "worker")
    assert (await hands.run("pwd", timeout_s=30)).stdout == b"/workspace\n"


async def test_what_is_fed_to_a_script_arrives(bench: Bench) -> None:
    """Megabytes go in and out; a script that does not read what it is fed ends all the same; the middle is cut."""
    data = bytes(range(256)) * 12_000
    result = await bench.hands.run("cat", timeout_s=60, stdin=data, keep=4 << 20)
    assert result.stdout == data
    result = await bench.hands.run("exit 3", timeout_s=60, stdin=data)
    assert (result.status, result.timed_out) == (3, False)
    result = await bench.hands.run("cat >&2; echo $1", "one two", timeout_s=60, stdin=data)
    assert result.stdout == b"one two\n"
    assert result.stderr.startswith(data[: 32 * 1024])
    assert b"[... 3006464 bytes ...]" in result.stderr
    assert len(result.transcript) == len(data) + 8
