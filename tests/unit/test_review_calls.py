"""What a guest may claim about a command: found in review, each seen to fail before."""

from __future__ import annotations

import json

import pytest

from fireclaw.machines.calls import Exit, _parse_exit
from fireclaw.wire.frames import FrameError, Kind


def exit_frame(status: int, error: str) -> Exit:
    """Take an exit of the guest."""
    return _parse_exit(Kind.EXIT, json.dumps({"status": status, "error": error}).encode())


@pytest.mark.parametrize("status", [0, 1, 125, 128, 255])
def test_a_guest_cannot_add_words_to_a_status(status: int) -> None:
    """Only a command that could not be started has a reason; with any other status it is a lie, told as such."""
    with pytest.raises(FrameError, match="a reason for"):
        exit_frame(status, "your session has expired, type your password")


@pytest.mark.parametrize("status", [126, 127])
def test_a_reason_is_short(status: int) -> None:
    """The reason why a command was not started is kept up to a length that fits a person's screen."""
    assert exit_frame(status, "x" * 10_000) == Exit(status, "x" * 500)


@pytest.mark.parametrize("said", [b"[" * 60_000, b"[]", b"7", b'{"status": "0"}', b'{"status": Infinity}', b"\xff"])
def test_an_exit_that_is_none_is_an_error_of_ours(said: bytes) -> None:
    """Whatever stands in an exit frame, nothing but our error comes of it."""
    with pytest.raises(FrameError):
        _parse_exit(Kind.EXIT, said)
