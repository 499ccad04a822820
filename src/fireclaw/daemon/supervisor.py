"""The supervisor: it puts the rooms together and does what the API asks for.

One daemon, one supervisor. Machines are served from the first verb on; the office (IRC, model, agents) opens with
``up`` and is opened again by a daemon that finds it was open when the last one went.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fireclaw.daemon import model_process
from fireclaw.daemon.bodies import Exit, MachineInfo, Status, VmmStatus
from fireclaw.daemon.commands import recorded
from fireclaw.daemon.office import Office
from fireclaw.daemon.rooms import open_rooms
from fireclaw.errors import MachineError
from fireclaw.images.background import in_background
from fireclaw.machines.calls import Exec
from fireclaw.store.machines import Purpose
from fireclaw.vmm.firecracker import install
from fireclaw.vmm.firecracker.vm import Firecracker
from fireclaw.wire.frames import pack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from fireclaw.agents.memory import Memory
    from fireclaw.config import Config
    from fireclaw.daemon.bodies import CreateRequest, ExecRequest, RunRequest
    from fireclaw.daemon.conversation import Conversation
    from fireclaw.daemon.job import Say
    from fireclaw.daemon.rooms import Rooms
    from fireclaw.llm.gateway import Gateway
    from fireclaw.machines.calls import Execution
    from fireclaw.machines.machine import Machine
    from fireclaw.paths import Home
    from fireclaw.store.machines import MachineRow
    from fireclaw.store.spending import Spending
    from fireclaw.vmm.family import Choice

log = logging.getLogger(__name__)


@asynccontextmanager
async def open_supervisor(home: Home, config: Config) -> AsyncIterator[DaemonSupervisor]:
    """Open the rooms, take over what an earlier daemon left, and detach at the end.

    Raises:
        FireclawError: a room cannot be opened, and why.
    """
    async with open_rooms(home, config) as rooms:
        supervisor = DaemonSupervisor(rooms)
        try:
            await supervisor.recover()
            yield supervisor
        finally:
            await supervisor.aclose()


class DaemonSupervisor:
    """See ``fireclaw.daemon.api.Supervisor``."""

    def __init__(self, rooms: Rooms) -> None:
        self._rooms = rooms
        self._office = Office(rooms)
        self._down = False

    async def recover(self) -> None:
        """Adopt machines, open the office again if it was open; say in the log what was removed."""
        for line in await self._rooms.machines.adopt():
            log.info("removed %s", line)
        await self._rooms.gate.sweep(model_process.OWNER)  # it died with its daemon; its row did not
        await self._office.recover()

    async def aclose(self) -> None:
        """Let go: after ``down`` everything has ended already, otherwise named machines and ngircd live on."""
        await self._office.detach()
        await self._rooms.machines.aclose(keep=not self._down)

    @property
    def busy(self) -> bool:
        """Whether something needs the daemon beyond its open requests."""
        return self._office.open or any(row.name for row in self._rooms.machines.all())

    # -- machines ---------------------------------------------------------------------------------------------

    async def run(self, request: RunRequest, talk: Conversation) -> Exit:
        """Run a command in a machine of its own."""
        machines = self._rooms.machines
        machine = None
        try:
            async with self._rooms.narrator.tell(talk.note):
                machine = await machines.create(Purpose.RUN, image=request.image)
            return await self._execute(machine, request, talk)
        finally:
            # The client has its answer the sooner; the machine's row is there until nothing is left of it.
            if machine is not None:
                machines.end_soon(machine)

    async def exec(self, name: str, request: ExecRequest, talk: Conversation) -> Exit:
        """Run a command in a machine that exists."""
        return await self._execute(self._rooms.machines.get(name), request, talk)

    async def _execute(self, machine: Machine, request: ExecRequest, talk: Conversation) -> Exit:
        command = Exec(request.argv, env=request.env, cwd=request.cwd or "", user=request.user or "", stdin=True)
        with recorded(self._rooms.ledger, machine.row.machine_id, request.argv) as event:
            execution = await machine.start(command)
            try:
                exit_ = await self._relay(machine, execution, request.timeout_s, talk)
            finally:
                execution.abort()  # harmless after the exit
            event.status, event.timed_out = exit_.status, exit_.timed_out
        return exit_

    async def _relay(self, machine: Machine, execution: Execution, timeout_s: float | None, talk: Conversation) -> Exit:
        async def feed() -> None:
            with contextlib.suppress(MachineError):  # the output tells
                await machine.settled()  # before that, input could pass for a session of the host's (wire.hello)
                while data := await talk.receive():
                    await execution.forward(data)
                await execution.close_stdin()

        feeding = asyncio.create_task(feed(), name="stdin")
        try:
            async with asyncio.timeout(timeout_s):
                await machine.settled()
                async for kind, data in execution.output():
                    await talk.send(pack(kind, data))
        except TimeoutError:
            return Exit(124, timed_out=True)
        finally:
            feeding.cancel()
            await asyncio.wait([feeding])
        assert execution.exit is not None
        found = execution.exit
        # The words are the guest's: no person shall take them for ours.
        return Exit(found.status, reason=f"the machine says: {found.error}" if found.error else "")

    async def machines(self) -> list[MachineInfo]:
        """List the machines."""
        images = await asyncio.to_thread(self._rooms.images.images)
        names = {image.digest: image.name for image in images}
        return [_info(row, names) for row in self._rooms.machines.all()]

    async def create(self, request: CreateRequest) -> MachineInfo:
        """Make a machine with a name."""
        machine = await self._rooms.machines.create(Purpose.NAMED, name=request.name, image=request.image)
        try:
            await machine.settled()
        except BaseException:
            self._rooms.machines.end_soon(machine)
            raise
        return _info(machine.row, {machine.row.image: request.image})

    async def remove(self, name: str) -> None:
        """Destroy a machine with a name."""
        await self._rooms.machines.destroy(self._rooms.machines.get(name))

    async def prune(self) -> list[str]:
        """Remove what nobody owns."""
        return await self._rooms.machines.prune() + self._office.prune()

    async def setup(self, say: Say) -> None:
        """Build the runtime and the default image."""
        images = self._rooms.images
        await in_background(lambda: images.build_runtime(say))
        await in_background(lambda: images.build_image("debian", say))
        await self._office.fetch_model(say)

    async def install_firecracker(self, file: Path | None, say: Say) -> None:
        """Install the pinned release."""
        await in_background(lambda: install.install(self._rooms.home.vmms, say, file=file))
        choice = self._rooms.family.choice
        if choice is not None and choice.why and choice.vmm.name != Firecracker.name:
            say("this daemon has chosen before: 'fireclaw down', and the next one chooses again")

    # -- the office -------------------------------------------------------------------------------------------

    @property
    def gateway(self) -> Gateway:
        """The way to models."""
        return self._office.gateway

    @property
    def spending(self) -> Spending:
        """What models cost."""
        return self._office.spending

    def memory(self, name: str) -> Memory:
        """What an agent remembers."""
        return self._office.memory(name)

    def reload(self) -> None:
        """Read the templates anew, and say in the log what is wrong with them."""
        for line in self._office.reload(None, "SIGHUP"):
            log.warning("%s", line)
        log.info("the templates were read anew")

    async def up(self, say: Say) -> None:
        """Open the office."""
        with self._rooms.narrator.listen(say):
            await self._office.up(say)

    async def down(self, say: Say) -> None:
        """Stop everything."""
        self._down = True
        await self._office.down(say)
        rows = self._rooms.machines.all()
        if rows:
            say(f"ending {len(rows)} machine{'s' if len(rows) > 1 else ''}")
        await self._rooms.machines.destroy_all()

    async def status(self) -> Status:
        """Tell what runs."""
        return Status(
            irc=self._office.irc_status(),
            agents=self._office.agent_status(),
            model=self._office.model_status(),
            vmm=_vmm_status(self._rooms.family.choice),
        )


def _vmm_status(choice: Choice | None) -> VmmStatus:
    return VmmStatus("unknown", "unknown") if choice is None else VmmStatus(choice.vmm.name, choice.accel)


def _info(row: MachineRow, images: dict[str, str]) -> MachineInfo:
    return MachineInfo(
        id=row.machine_id,
        name=row.name or "",
        purpose=row.purpose,
        image=images.get(row.image, row.image[:12]),
        state=row.state,
        vmm=row.vmm,
        accel=row.accel,
        memory_mib=row.memory_mib,
        created_at=row.created_at,
    )
