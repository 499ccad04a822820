"""The verbs besides ``run`` and ``exec``, as processes against the real API."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from typing import TYPE_CHECKING

import pytest
from api_office import Office, served_office

from fireclaw import __version__
from fireclaw.store.ledger import Ledger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fireclaw.paths import Home


@pytest.fixture
async def office() -> AsyncIterator[Office]:
    """A served API and a command line that reaches it."""
    async with served_office() as office:
        yield office


def write_ledger(home: Home, entries: int) -> None:
    """Write a ledger with an anchor in the store at its end."""
    ledger = Ledger(home.ledger, clock=lambda: 0.0)
    for number in range(entries):
        ledger.append("tool.call", {"number": number, "text": "a\x1b[2J"}, agent="worker")
    head = ledger.head
    ledger.close()
    with sqlite3.connect(home.database) as store:
        store.execute("CREATE TABLE ledger_anchor (host_id TEXT, seq INTEGER, hash TEXT)")
        store.execute("INSERT INTO ledger_anchor VALUES ('h', ?, ?)", (head.seq, head.hash))
    store.close()


async def test_ps(office: Office) -> None:
    """``ps`` prints a table, or the same as JSON."""
    status, table, _ = await office.call("ps")
    _, listed, _ = await office.call("ps", "--json")

    header, row = table.decode().splitlines()
    assert status == 0
    assert header.split() == ["ID", "NAME", "PURPOSE", "IMAGE", "STATE", "MEMORY", "VMM", "AGE"]
    assert row.split()[:8] == ["0123456789ab", "worker", "named", "debian", "running", "256", "MiB", "qemu/tcg"]
    assert [machine["name"] for machine in json.loads(listed)] == ["worker"]


async def test_prune(office: Office) -> None:
    """``prune`` names what went, with other people's escapes made harmless."""
    assert await office.call("prune") == (0, b"machine 12\nbuild tmp-\\x1b[31mred\n", "")


async def test_status(office: Office) -> None:
    """``status`` tells how to join; ``--json`` gives the API's own answer."""
    status, text, _ = await office.call("status")
    _, listed, _ = await office.call("status", "--json")

    assert status == 0
    assert b"irc      127.0.0.1 port 6667, password pw, then /join #agents\n" in text
    assert b"operator /oper boss with the password in /secrets/oper\n" in text
    assert b"model    qwen from embedded: ready\n" in text
    assert text.endswith(b"NAME    TEMPLATE  MODEL  STATE  MACHINE\nworker  worker    qwen   idle   -\n")
    assert json.loads(listed)["daemon"]["version"] == __version__


async def test_setup_shows_its_lines(office: Office) -> None:
    """``setup`` shows each line as it comes, on stderr; Ctrl-C leaves the work to the daemon and says so."""
    first = await office.start("setup")
    assert first.stderr is not None
    assert await first.stderr.readline() == b"fireclaw: building\n"
    first.send_signal(signal.SIGINT)
    _, rest = await first.communicate()
    office.fake.go_on.set()

    assert (first.returncode, rest) == (
        130,
        b"fireclaw: the daemon goes on with it; 'fireclaw setup' shows how far it is\n",
    )
    status, out, err = await office.call("setup")
    assert (status, out) == (0, b"")
    assert err.endswith("fireclaw: packing\nfireclaw: packed\nfireclaw: ready\n")


async def test_doctor(office: Office) -> None:
    """``doctor`` finds the daemon that runs, and its status tells of failures only."""
    free = {"FIRECLAW_IRC_PORT": "0"}  # whatever else runs on this host
    _, listed, _ = await office.call("doctor", "--json", env=free)
    status, text, _ = await office.call("doctor", env=free)
    broken, _, _ = await office.call("doctor", env={"FIRECLAW_IRC_PORT": "x"})

    checks = json.loads(listed)
    assert status == int(any(check["state"] == "fail" for check in checks))
    assert broken == 1
    assert [line.split()[0] for line in text.decode().splitlines() if not line.startswith(" ")] == [
        check["state"] for check in checks
    ]


async def test_output_that_nobody_reads(office: Office) -> None:
    """A verb whose reader left ends with the status of SIGPIPE and without a complaint."""
    reader, writer = os.pipe()
    process = await office.start("ps", stdout=writer)
    os.close(writer)
    os.close(reader)

    _, err = await process.communicate()

    assert (process.returncode, err) == (141, b"")


async def test_version_and_help(office: Office) -> None:
    """``--version`` and ``--help`` go to stdout and succeed."""
    assert await office.call("--version") == (0, f"fireclaw {__version__}\n".encode(), "")
    status, out, err = await office.call("--help")
    assert (status, err) == (0, "")
    assert b'fireclaw run "uname -a"' in out


async def test_ledger_verify(office: Office) -> None:
    """``ledger verify`` accepts the chain, and finds an edited line and a cut end."""
    write_ledger(office.home, 3)
    good = await office.call("ledger", "verify")
    lines = office.home.ledger.read_bytes().splitlines(keepends=True)

    office.home.ledger.write_bytes(b"".join(lines[:2]))
    cut = await office.call("ledger", "verify")
    office.home.ledger.write_bytes(lines[0] + lines[1].replace(b'"number":1', b'"number":7') + lines[2])
    edited, verdict, _ = await office.call("ledger", "verify", "--json")

    assert good == (0, b"3 entries, unbroken; the anchor at entry 3\n", "")
    assert cut[0] == 1
    assert b"the entries 3 to 3, which the anchor knows, are missing at the end" in cut[1]
    assert edited == 1
    assert json.loads(verdict)["problem"]["line"] == 2


async def test_ledger_show(office: Office) -> None:
    """``ledger show`` prints one line an event, harmless to a terminal, and ``--json`` the whole of it."""
    write_ledger(office.home, 2)

    _, shown, _ = await office.call("ledger", "show")
    _, listed, _ = await office.call("ledger", "show", "--json")

    assert len(shown.splitlines()) == 2
    assert b"tool.call" in shown
    assert b"\x1b" not in shown
    events = [json.loads(line) for line in listed.splitlines()]
    assert [event["data"]["number"] for event in events] == [0, 1]
    assert events[0]["data"]["text"] == "a\x1b[2J"


async def test_ledger_that_is_gone(office: Office) -> None:
    """A ledger that the anchor knows and that is not there was removed."""
    write_ledger(office.home, 3)
    office.home.ledger.unlink()

    status, out, _ = await office.call("ledger", "verify")

    assert (status, out) == (
        1,
        b"line 1: the whole ledger is missing; the anchor knows 3 entries\n0 entries before it are good\n",
    )


async def test_ledger_that_is_not_there(office: Office) -> None:
    """Without a ledger both say so."""
    for action in ("verify", "show"):
        status, out, err = await office.call("ledger", action)
        assert (status, out) == (125, b"")
        assert f"fireclaw: there is no ledger at {office.home.ledger}" in err
