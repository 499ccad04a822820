"""The guest of a fake Firecracker: the real guestd, for each connection that reaches its port.

Commands run on this host as this user: for trusted tests only. They must not outlive the machine, whatever ends it, so
a warden, a small process of its own, is told of each, and ends them when the pipe to it does.
"""

from __future__ import annotations

import socket
import subprocess
from typing import TYPE_CHECKING, Final

from fireclaw.guest.spawner import Spawner, start
from fireclaw.testing.guest import LocalGuest
from fireclaw.wire.hello import VSOCK_PORT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fireclaw.guest.loop import Loop
    from fireclaw.guest.spawner import Command

PORT: Final = VSOCK_PORT
# A number may be another process's by the end: only who began when it was told of is ended. Commands lead a session.
_WARDEN: Final = r"""
begun() { begun=; { read -r line < "/proc/$1/stat"; } 2>/dev/null && set -- ${line##*\)} && begun=${20}; }
while read -r pid; do
    begun "$pid"
    told="$told $pid:$begun"
done
for each in $told; do
    begun "${each%:*}"
    [ -n "$begun" ] && [ "$begun" = "${each#*:}" ] && kill -9 "-${each%:*}"
done
"""


class GuestEnd(LocalGuest):
    """The guest's end of connections; a newer one replaces the older, as guestd has it.

    Args:
        on_shutdown: called, in the guest's thread, when guestd was told to end the machine.
    """

    def __init__(self, on_shutdown: Callable[[], None]) -> None:
        super().__init__()
        self._on_shutdown = on_shutdown
        self._spawner.close()
        self._warden = _Warden()
        self._spawner = _WatchedSpawner(self.loop, self._warden)
        self.__enter__()

    def dial(self) -> socket.socket:
        """Return the VMM's end of a new connection, non-blocking."""
        ours, guests = socket.socketpair()
        ours.setblocking(False)
        self.serve(guests)
        return ours

    def close(self) -> None:
        """End it, and the commands that it runs."""
        self.__exit__(None, None, None)
        self._warden.close()

    def shutdown(self) -> None:
        """Tell the machine."""
        self._on_shutdown()


class _WatchedSpawner(Spawner):
    def __init__(self, loop: Loop, warden: _Warden) -> None:
        super().__init__(loop, lambda: None, switch_user=False)
        self._warden = warden

    def start(self, command: Command, fds: Sequence[int], done: Callable[[int | Exception], None]) -> None:
        def work() -> int:
            pid = start(command, fds, switch_user=False)
            self._warden.tell(pid)
            return pid

        self.do(work, done)


class _Warden:
    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", _WARDEN],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,
        )

    def tell(self, pid: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"%d\n" % pid)
        self._process.stdin.flush()

    def close(self) -> None:
        self._process.communicate()
