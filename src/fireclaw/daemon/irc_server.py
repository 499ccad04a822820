"""The managed ngircd as a child: adopted or started, watched, started again when it dies.

It survives the daemon. Where it listens is kept in the run folder, since a free port may have been picked for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from typing import TYPE_CHECKING, Final

from fireclaw.errors import FireclawError, SetupError
from fireclaw.irc.ngircd import LOOPBACK, NgircdServer, check_port, load_password, server_name
from fireclaw.store.machines import Role
from fireclaw.vmm.base import FIRST_USER

if TYPE_CHECKING:
    from fireclaw.paths import Home
    from fireclaw.vmm.process import Child, Gate

log = logging.getLogger(__name__)

OWNER: Final = "irc"
_USER: Final = FIRST_USER + (1 << 20)  # where we are root; machines have the numbers below
_READY_S: Final = 20.0
_STOP_S: Final = 5.0
_PAUSE_S: Final = 1.0  # before a server that died again so soon is started; doubled each time up to a minute
_LONGEST_PAUSE_S: Final = 60.0
_HEALTHY_S: Final = 60.0


class IrcServer:
    """The server of this home.

    Attributes:
        settings: name, port and passwords, once it is up.
        operator_password_file: for people.
    """

    def __init__(self, home: Home, gate: Gate, port: int) -> None:
        self._home = home
        self._gate = gate
        self._port = port
        self._child: Child | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.settings: NgircdServer | None = None
        self.operator_password_file = home.secrets / "irc-operator"

    @property
    def recorded(self) -> bool:
        """Whether an earlier daemon had it running, and did not end it."""
        return bool(self._gate.rows.of(OWNER))

    async def start(self) -> NgircdServer:
        """Adopt the running server, or start it; return once it answers.

        Raises:
            ConflictError, SetupError: it cannot be started, and why.
        """
        if self.settings is None:
            self.settings = await self._adopt() or await self._launch()
            self._watcher = asyncio.create_task(self._watch(), name="watch ngircd")
        return self.settings

    async def _adopt(self) -> NgircdServer | None:
        self._child = self._find_child()
        if self._child is None:
            return None
        try:
            settings = self._describe(int(json.loads(self._home.irc_place.read_text())["port"]))
            await settings.wait_ready(_READY_S)
        except (OSError, ValueError, KeyError, TypeError, FireclawError) as error:
            log.warning("the running ngircd is of no use and is replaced: %s", error)
            await self._child.stop(grace_s=_STOP_S)
            return None
        return settings

    def _find_child(self) -> Child | None:
        """Hold the process that an earlier daemon started, if it lives."""
        for row in self._gate.rows.of(OWNER):
            if (child := self._gate.adopt(row)) is not None:
                return child
            self._gate.rows.remove(row.process_id)
        return None

    async def _launch(self) -> NgircdServer:
        port = self._port or _free_port()
        check_port(port)
        settings = self._describe(port)
        user = _USER if os.geteuid() == 0 else None
        config = self._home.irc_settings
        settings.write_config(config, user)
        self._home.irc_place.write_text(json.dumps({"port": port}))
        fd = os.open(config, os.O_RDONLY | os.O_CLOEXEC)
        null = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        try:
            argv = settings.argv(fd)
            child = self._gate.start(argv, role=Role.NGIRCD, owner_id=OWNER, fds=[fd], user=user, stdout=null)
        finally:
            os.close(fd)
            os.close(null)
        try:
            await _ready_or_dead(settings, child)
        except BaseException:
            child.kill()
            await child.wait()
            raise
        self._child = child
        return settings

    def _describe(self, port: int) -> NgircdServer:
        return NgircdServer(
            name=server_name(socket.gethostname()),
            port=port,
            password=load_password(self._home.secrets / "irc-server"),
            operator_password=load_password(self.operator_password_file),
        )

    async def _watch(self) -> None:
        """Start it again whenever it dies, on the same port: clients come back by themselves."""
        loop = asyncio.get_running_loop()
        pause = 0.0
        while True:
            assert self._child is not None
            assert self.settings is not None
            began = loop.time()
            status = await self._child.wait()
            log.warning("ngircd ended with status %s; it is started again", status)
            pause = 0.0 if loop.time() - began > _HEALTHY_S else pause
            self._port = self.settings.port
            while True:
                await asyncio.sleep(pause)
                pause = min(max(_PAUSE_S, 2 * pause), _LONGEST_PAUSE_S)
                try:
                    await self._launch()
                except (FireclawError, OSError) as error:
                    log.error("cannot start ngircd: %s", error)  # noqa: TRY400 - an expected error, told as such
                else:
                    break

    async def stop(self) -> None:
        """End it for good, also where nobody has waited until it was adopted."""
        await self._unwatch()
        child = self._child or self._find_child()
        if child is not None:
            await child.stop(grace_s=_STOP_S)
        for path in (self._home.irc_settings, self._home.irc_place):
            path.unlink(missing_ok=True)
        self._child = self.settings = None

    async def detach(self) -> None:
        """Let it run on, for the next daemon to adopt."""
        await self._unwatch()
        if self._child is not None:
            self._child.release()
        self._child = self.settings = None

    async def _unwatch(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
            self._watcher = None


async def _ready_or_dead(settings: NgircdServer, child: Child) -> None:
    """Wait for the server's answer; a server that ended tells its own reason at once."""
    ready = asyncio.create_task(settings.wait_ready(_READY_S), name="ngircd ready")
    dead = asyncio.create_task(child.wait(), name="ngircd dead")
    try:
        await asyncio.wait([ready, dead], return_when=asyncio.FIRST_COMPLETED)
        if dead.done() and not ready.done():
            raise SetupError(
                f"ngircd ended with status {dead.result()}: {child.log().strip()[-300:] or 'it said nothing'}",
                hint="run 'fireclaw doctor'",
            )
        await ready
    finally:
        for task in (ready, dead):
            task.cancel()
        await asyncio.wait([ready, dead])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
