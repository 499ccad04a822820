"""A double of a machine: the real guestd over a socket pair, without a VMM and without namespaces.

Commands run on *this* host as this user, so it is for trusted tests only. It passes the same suite of exec rules as a
booted machine (tests/contract/exec_rules.py).
"""

from __future__ import annotations

import os
import socket
import threading
from typing import TYPE_CHECKING, Any

from fireclaw.guest.listener import Listener
from fireclaw.guest.loop import Loop
from fireclaw.guest.port import Port
from fireclaw.guest.spawner import Spawner

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class LocalGuest:
    """Serves the host from a thread: on one socket, as over a virtio port, or on each that it is handed.

    ::

        with LocalGuest() as guest:
            channel = await Channel.open(guest.connect(), new_magic())

            guest.serve(accepted)              # as over vsock: a newer one replaces the older

    Attributes:
        identities: the identity calls that came.
    """

    def __init__(self) -> None:
        self.loop = Loop()
        self.identities: list[dict[str, Any]] = []
        self.console: list[str] = []
        self._spawner = Spawner(self.loop, lambda: None, switch_user=False)
        self._host, guest = socket.socketpair()
        self._host.setblocking(False)
        guest.setblocking(False)
        self._guest = guest
        self._port = Port(self.loop, guest.fileno(), self, on_end=self.loop.stop)
        self._listener = Listener(self.loop, self)
        self._thread = threading.Thread(target=self.loop.run, name="local-guest", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._host.close()
        self.loop.call_from_thread(self.loop.stop)
        self._thread.join()
        self._spawner.close()
        self._listener.close()
        self._port.close()
        self._guest.close()
        self.loop.close()

    def connect(self) -> socket.socket:
        """Return the host's end, again each time: a duplicate, so that a session may close its own."""
        return self._host.dup()

    def serve(self, sock: socket.socket) -> None:
        """Serve a connection as one that vsock just accepted; it belongs to the guest from now on."""
        self.loop.call_from_thread(lambda: self._listener.serve(sock))

    def spawner(self, *, confined: bool) -> Spawner:
        """One thread for all: this double does not confine."""
        del confined
        return self._spawner

    def identity(self, call: dict[str, Any]) -> dict[str, Any]:
        """Remember the call; the host keeps its own identity."""
        self.identities.append(call)
        return {}

    def info(self) -> dict[str, Any]:
        """Describe this guest."""
        return {"uptime": 0.0, "memory": {}, "boot": {}, "kernel": os.uname().release}

    def seal(self) -> None:
        """Nothing is cached here."""

    def shutdown(self) -> None:
        """End, as a machine does."""
        self.loop.stop()

    def log(self, text: str) -> None:
        """Keep the line."""
        self.console.append(text)
