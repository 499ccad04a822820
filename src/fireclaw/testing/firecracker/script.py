"""What a fake Firecracker does beside being faithful: its version, its guest's behaviour, and faults.

A script is one frozen value. ``install`` writes it into the programs themselves, because a client starts them with an
empty environment and copies one of them into a jail: nothing else of theirs may be needed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Final

VERSION: Final = "1.16.1"


class Guest(StrEnum):
    """What runs in the machine."""

    GUESTD = "guestd"  # the real guestd, listening on its port
    DEAF = "deaf"  # a guest with a vsock driver where nobody listens: connections end at once
    SILENT = "silent"  # a guest without a vsock driver, which never is ready: connections hang
    PANIC = "panic"  # its kernel panics, and the process ends with status 0
    POWEROFF = "poweroff"  # it switches itself off; the process lives on and calls itself running
    REBOOT = "reboot"  # it reboots: the process ends with status 0


class Connect(StrEnum):
    """How one CONNECT ends."""

    HANG = "hang"  # no answer, ever
    EOF = "eof"  # end-of-file instead of an answer
    RESET = "reset"  # OK, and end-of-file


@dataclass(frozen=True, kw_only=True)
class Script:
    """What to do, and what to do wrong. A request is named as ``"PUT /snapshot/create"``.

    Attributes:
        version: what the programs say they are; it decides which fields of bodies they know.
        snapshot_version: the format of snapshots they write and load.
        guest: what runs in the machine.
        boot_s: how long the guest takes to be ready.
        guest_after_s: when a guest that panics, switches itself off or reboots does so, ready or not.
        console: more text that the guest prints at once; scripted text of any kind goes here.
        console_flood: so many bytes of noise follow it.
        connects: how the first CONNECTs end; later ones reach the guest.
        delay_s: seconds that a request takes, in which nothing else is answered and no byte moves.
        fail: the fault message of requests that are refused whatever they say.
        exit_at: the process ends in place of an answer, with this status (negative: by that signal). ``"start"``
            is before the API socket exists.
        drop_at: the connection that brings the n-th request (from 1) is dropped without an answer; 0 for none.
        not_json_at: the n-th request gets the transport's kind of answer, which is no JSON; 0 for none.
        listen_after_s: how long the API socket's file exists before anybody listens on it.
        never_listens: nobody ever does.
        keep_user: the jailer leaves user and group as they are, for callers who are not root.
        cgroup_root: a plain folder where the jailer makes its cgroups; empty for none at all.
        cut_metrics: the last line of the metrics is cut in half, as a crash may leave it.
    """

    version: str = VERSION
    snapshot_version: str = "10.0.0"
    guest: Guest = Guest.GUESTD
    boot_s: float = 0.0
    guest_after_s: float = 0.0
    console: str = ""
    console_flood: int = 0
    connects: tuple[Connect, ...] = ()
    delay_s: dict[str, float] = field(default_factory=dict)
    fail: dict[str, str] = field(default_factory=dict)
    exit_at: dict[str, int] = field(default_factory=dict)
    drop_at: int = 0
    not_json_at: int = 0
    listen_after_s: float = 0.0
    never_listens: bool = False
    keep_user: bool = False
    cgroup_root: str = ""
    cut_metrics: bool = False

    @property
    def version_tuple(self) -> tuple[int, ...]:
        """The version, for comparing."""
        return tuple(int(part) for part in self.version.split("."))

    def to_json(self) -> str:
        """The script as text, for a program to carry."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Script:
        """Read what ``to_json`` wrote."""
        values = json.loads(text)
        values["guest"] = Guest(values["guest"])
        values["connects"] = tuple(Connect(each) for each in values["connects"])
        return cls(**values)
