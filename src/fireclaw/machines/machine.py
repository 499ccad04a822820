"""One machine: its VMM and its channel, once it is somebody.

::

    machine = await machines.create(Purpose.RUN, image="debian")
    execution = await machine.start(Exec(["true"]))   # may be started before the machine has answered at all
    await machine.settled()                           # raises what went wrong on the way
    async for kind, data in execution.output(): ...
    await machines.destroy(machine)
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from fireclaw.errors import FireclawError
from fireclaw.machines import calls
from fireclaw.machines.channel import HELLO_SECONDS, Channel

if TYPE_CHECKING:
    from collections.abc import Callable

    from fireclaw.machines.calls import Call, Exec, Execution
    from fireclaw.store.machines import MachineRow
    from fireclaw.vmm.base import Ending, Vm

_SHUTDOWN_SECONDS = 5.0
_ENDING_SECONDS = 2.0


class Machine:
    """A machine that the daemon owns.

    Attributes:
        row: its record.
        vm: its VMM.
        channel: the session with its guestd.
    """

    def __init__(self, row: MachineRow, vm: Vm, channel: Channel) -> None:
        self.row = row
        self.vm = vm
        self.channel = channel
        self._settled: asyncio.Task[None] | None = None

    @classmethod
    async def connect(
        cls,
        row: MachineRow,
        vm: Vm,
        *,
        hostname: str = "",
        template: bytes = b"",
        workspace: bool = False,
        on_settled: Callable[[Machine], None] | None = None,
    ) -> Machine:
        """Begin a session with the guest; where ``hostname`` is given, make a fresh clone somebody by it.

        Hello, identity and the first command travel together: nothing is waited for here but the socket.
        ``template`` is the magic that a fresh clone was born with; it is given the row's. ``workspace`` has it mount
        its third drive. ``on_settled`` is called once the guest has answered, before anybody else learns that.
        """
        sock = await vm.open_channel(timeout_s=HELLO_SECONDS)
        channel = await Channel.begin(sock, template or bytes.fromhex(row.magic))
        machine = cls(row, vm, channel)
        identity = None
        if hostname:
            try:  # sent here, not in the task: the first command may be sent before that runs
                magic = bytes.fromhex(row.magic)
                identity = await calls.send_identity(channel, hostname, magic, workspace=workspace)
            except BaseException:
                await channel.aclose()
                raise
        settling = machine._settle(identity, on_settled)
        machine._settled = asyncio.create_task(settling, name=f"settle {row.machine_id}")
        return machine

    async def _settle(self, identity: Call | None, on_settled: Callable[[Machine], None] | None) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.channel.wait_ready(HELLO_SECONDS), name="hello")
            if identity is not None:
                tasks.create_task(identity.answer(), name="identity")
        if on_settled is not None:
            on_settled(self)

    async def settled(self) -> None:
        """Wait until the guest has answered and taken its identity.

        Raises:
            GuestTimeoutError, ChannelLostError, GuestError: it has not; the machine is of no use.
        """
        assert self._settled is not None
        try:
            await asyncio.shield(self._settled)
        except ExceptionGroup as group:  # of the tasks that settle it: the first one's reason is what people need
            raise group.exceptions[0] from None

    async def start(self, command: Exec) -> Execution:
        """Start a command; it runs after the identity, even if that is still on its way."""
        return await calls.start(self.channel, command)

    async def ask_to_end(self) -> None:
        """Let the guest write what it has cached and end; give up after a few seconds."""
        with contextlib.suppress(FireclawError):
            await calls.shutdown(self.channel, _SHUTDOWN_SECONDS)

    async def ended(self) -> Ending:
        """Wait until the machine has ended by itself; one whose channel was lost is ended, as it is of no use."""
        await self.channel.lost.wait()
        try:
            async with asyncio.timeout(_ENDING_SECONDS):
                return await self.vm.wait()  # a VMM that ended took the channel with it
        except TimeoutError:
            return await self.vm.shutdown()

    async def disconnect(self) -> None:
        """Close the session; the VMM lives on."""
        if self._settled is not None:
            self._settled.cancel()
            await asyncio.wait([self._settled])
            if not self._settled.cancelled():
                self._settled.exception()  # whoever needed the machine was told by ``settled``
        await self.channel.aclose()
