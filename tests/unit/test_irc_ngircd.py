"""The managed server's configuration, names and password files."""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

import pytest

from fireclaw.errors import InvalidError, SetupError
from fireclaw.irc.ngircd import NgircdServer, load_password, server_name

if TYPE_CHECKING:
    from pathlib import Path

SERVER = NgircdServer("box.fireclaw.local", 6667, "server-pass", "oper-pass")


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("box", "box.fireclaw.local"),
        ("My_Box.lan.example", "my-box.fireclaw.local"),
        ("-weird--", "weird.fireclaw.local"),
        ("", "host.fireclaw.local"),
        ("日本", "host.fireclaw.local"),
        ("x" * 100, "x" * 48 + ".fireclaw.local"),
    ],
)
def test_server_names_are_clean(host: str, name: str) -> None:
    """Any host name gives a valid server name of at most 63 characters."""
    assert server_name(host) == name
    assert len(name) <= 63


@pytest.mark.parametrize(
    "line",
    [
        "PAM = no",
        "DNS = no",
        "Ident = no",
        "IncludeDir = /proc/self/fd",
        "Listen = 127.0.0.1",
        "MaxNickLength = 24",
        "MaxConnectionsIP = 0",
        "RequireAuthPing = yes",
        "OperCanUseMode = yes",
        "Password = server-pass",
        "Password = oper-pass",
    ],
)
def test_the_defaults_that_bite_are_set(line: str) -> None:
    """Every trap of ngircd's defaults is disarmed by a line of its own."""
    assert line in SERVER.config().splitlines()


def test_no_pid_file_is_written() -> None:
    """The process is known by its row, not by a file."""
    assert "PidFile" not in SERVER.config()


@pytest.mark.parametrize("bad", ["a\nPAM = yes", "", "#x", ";x", "a b", "é", "x" * 65])
def test_values_cannot_add_directives(bad: str) -> None:
    """A password or name that would be another line, a comment or cut off is refused."""
    with pytest.raises(InvalidError):
        NgircdServer("box.fireclaw.local", 6667, bad, "oper").config()
    with pytest.raises(InvalidError):
        NgircdServer(bad, 6667, "pass", "oper").config()


def test_passwords_do_not_show() -> None:
    """A server that is printed into a log does not tell its passwords."""
    assert "server-pass" not in repr(SERVER)
    assert "oper-pass" not in repr(SERVER)
    assert "server-pass" not in repr(SERVER.address)


def test_the_configuration_is_private(tmp_path: Path) -> None:
    """The file is 0600 from the start, even in place of a readable one."""
    path = tmp_path / "ngircd.conf"
    path.write_text("old")
    path.chmod(0o644)
    SERVER.write_config(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == SERVER.config()


def test_a_password_is_made_once(tmp_path: Path) -> None:
    """The first call makes a private file, later ones read it; two files differ."""
    path = tmp_path / "irc-password"
    password = load_password(path)
    assert load_password(path) == password
    assert len(password) == 24
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_password(tmp_path / "other") != password


def test_a_password_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """A password file with wide rights, or nothing in it, is said and not used."""
    path = tmp_path / "irc-password"
    load_password(path)
    path.chmod(0o644)
    with pytest.raises(SetupError, match="readable for others"):
        load_password(path)
    path.chmod(0o600)
    path.write_text("\n")
    with pytest.raises(SetupError, match="empty"):
        load_password(path)
