"""The managed server, as a real process: up, ours, private, and hard to kill by accident."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from typing import TYPE_CHECKING

import pytest
from ngircd_process import free_port, running_ngircd, spawn_ngircd, uid_of

from fireclaw.errors import ConflictError, SetupError
from fireclaw.irc.ngircd import LOOPBACK, NgircdServer, check_port, find_server_name
from fireclaw.testing.irc_peer import IrcServerPeer, connect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from ngircd_process import RunningNgircd

_NOBODY = 65534


@pytest.fixture
async def ngircd(tmp_path: Path) -> AsyncIterator[RunningNgircd]:
    """A running server."""
    async with running_ngircd(tmp_path) as running:
        yield running


async def test_it_is_up_and_ours(ngircd: RunningNgircd) -> None:
    """Readiness is an answer under our server's name, not only an open port."""
    assert await find_server_name(ngircd.server.port) == "box.fireclaw.local"
    other = NgircdServer("other.fireclaw.local", ngircd.server.port, "a", "b")
    with pytest.raises(SetupError, match=r"another IRC server, box\.fireclaw\.local"):
        await other.wait_ready(5)


async def test_term_ends_it_and_it_does_not_fork_away(ngircd: RunningNgircd) -> None:
    """The started process is the server itself; SIGTERM ends it cleanly."""
    assert os.getpgid(ngircd.pid) == ngircd.pid
    assert ngircd.stop() == 0
    assert await find_server_name(ngircd.server.port) == ""


async def test_a_hangup_reads_the_configuration_again(ngircd: RunningNgircd) -> None:
    """SIGHUP works by the inherited descriptor, and clients stay connected."""
    async with await connect(ngircd.server.address) as link:
        await link.register("ann", "server-pass")
        os.kill(ngircd.pid, signal.SIGHUP)
        await link.send("PING :still")
        await link.expect("PONG .*still")
    await ngircd.server.wait_ready(5)


async def test_channels_and_limits_are_as_configured(ngircd: RunningNgircd) -> None:
    """Both channels exist before anybody joins, with +nt, and nicks of 24 characters fit."""
    async with await connect(ngircd.server.address) as link:
        await link.register("n" * 24, "server-pass")
        for channel in ("#control", "#agents"):
            await link.send(f"MODE {channel}")
            await link.expect(rf" 324 \S+ {channel} \+\S*n\S*t|\+\S*t\S*n")
        await link.send("JOIN &local")
        await link.expect(" 403 ")


async def test_a_wrong_server_password_is_refused(ngircd: RunningNgircd) -> None:
    """PAM is off, so the server password counts."""
    async with await connect(ngircd.server.address) as link:
        await link.send("PASS wrong", "NICK ann", "USER ann 0 * :Ann")
        await link.expect("ERROR :Access denied: Bad password")


async def test_a_taken_port_is_named(ngircd: RunningNgircd) -> None:
    """A port in use is an error with the port and the next step; a free one is none."""
    with pytest.raises(ConflictError, match=rf"port {ngircd.server.port} .* taken.*\[irc\] port"):
        check_port(ngircd.server.port)
    ngircd.stop()
    check_port(ngircd.server.port)


async def test_a_server_that_is_not_irc_has_no_name() -> None:
    """Something that accepts and says nothing, or closes, is not taken for an IRC server."""
    with socket.socket() as silent:
        silent.bind((LOOPBACK, 0))
        assert await find_server_name(silent.getsockname()[1]) == ""
    async with IrcServerPeer() as peer:
        server = NgircdServer("box.fireclaw.local", peer.address.port, "a", "b")
        with pytest.raises(SetupError, match=r"did not answer .* within 0\.2 s"):
            await server.wait_ready(0.2)


async def test_it_runs_as_somebody_who_may_read_nothing_else(tmp_path: Path) -> None:
    """Started by root, it runs as another user, with its configuration in a folder closed to that user."""
    if os.geteuid() != 0 or shutil.which("ngircd") is None:
        pytest.skip("needs root, to become somebody else, and ngircd")
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o700)
    server = NgircdServer("box.fireclaw.local", free_port(), "server-pass", "oper-pass")
    config = folder / "ngircd.conf"
    server.write_config(config, _NOBODY)
    assert config.stat().st_uid == _NOBODY
    drop = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", "--no-new-privs"]
    process = spawn_ngircd(server, config, [*drop, "--bounding-set=-all"])
    try:
        await server.wait_ready(10)
        assert uid_of(process.pid) == _NOBODY
    finally:
        process.terminate()
        assert process.wait(10) == 0
