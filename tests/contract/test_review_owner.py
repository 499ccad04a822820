"""Folders and sockets of other users: found in review, each seen to fail before."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from api_office import short_home

from fireclaw.cli.client import Connection
from fireclaw.cli.start import request
from fireclaw.errors import SetupError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fireclaw.paths import Home

NOBODY = 65534
_LISTEN = """
import os, socket, sys
os.setuid(int(sys.argv[2]))
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("listening", flush=True)
sys.stdin.read()
"""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@pytest.fixture
def home() -> Iterator[Home]:
    """A home with a short path."""
    with short_home() as home:
        yield home


def test_a_home_of_another_user_is_refused(home: Home) -> None:
    """Whoever owns the folder could put his own socket and images there: it is not used."""
    os.chown(home.data, NOBODY, NOBODY)

    with pytest.raises(SetupError, match=f"belongs to user {NOBODY}"):
        home.make()


def test_a_socket_of_another_user_is_refused(home: Home) -> None:
    """Commands and their input do not go to a stranger who listens in the daemon's place."""
    home.make()
    home.data.chmod(0o777)
    home.run.chmod(0o777)
    argv = [sys.executable, "-c", _LISTEN, str(home.socket), str(NOBODY)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout is not None
        stranger.stdout.readline()
        with pytest.raises(SetupError, match=f"user {NOBODY} listens there"):
            request(home, "GET", "/v1/version", start=False)
        stranger.communicate()


def test_a_socket_of_ours_is_taken(home: Home) -> None:
    """Our own daemon's socket passes the same look."""
    home.make()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home.socket))
        listener.listen()

        Connection(home.socket).socket.close()
