"""Accidents: a VMM that dies, or is not wanted any more, at each step of what is done. Rules as in ``vm_rules``."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import pytest
from vm_subjects import NOTHING, Lab

from fireclaw.errors import VmmError
from fireclaw.vmm.base import Cause, MemorySnapshot, Vm, VmSpec

if TYPE_CHECKING:
    from vm_subjects import Subject

    from fireclaw.machines.snapshots import Snapshot

Operation = Callable[[Lab, VmSpec, MemorySnapshot], Awaitable[Any]]
"""Something that is done to a machine, on which an accident happens."""


async def _boot(lab: Lab, spec: VmSpec, snapshot: MemorySnapshot) -> Vm:
    del snapshot
    return await lab.vmm.boot(spec, snapshottable=True)


async def _clone(lab: Lab, spec: VmSpec, snapshot: MemorySnapshot) -> Vm:
    return await lab.vmm.clone(spec, snapshot)


class Accident:
    """Something that happens at the n-th request to the VMM's process.

    Args:
        step: at which one, from 0.
        strike: what happens.
        late: it happens when the request is on its way; otherwise before it is sent.
    """

    def __init__(self, step: int, strike: Callable[[], object], *, late: bool) -> None:
        self._left = step
        self._strike = strike
        self._late = late
        self.happened = False

    def install(self, subject: Subject, patch: pytest.MonkeyPatch) -> None:
        """Wait for it."""
        client, method = subject.control
        send = getattr(client, method)

        async def overheard(*arguments: Any, **more: Any) -> Any:
            self._count()
            return await send(*arguments, **more)

        patch.setattr(client, method, overheard)

    def _count(self) -> None:
        if self._left == 0:
            self.happened = True
            if self._late:
                asyncio.get_running_loop().call_soon(self._strike)
            else:
                self._strike()
        self._left -= 1


class TestAccidents:
    """What happens on the way, at every step of it."""

    @pytest.mark.parametrize("accident", ["killed before", "killed during", "cancelled"])
    @pytest.mark.parametrize("operation", [_boot, _clone], ids=["boot", "clone"])
    async def test_one_on_the_way_leaves_nothing(
        self, lab: Lab, template: Snapshot, operation: Operation, accident: str
    ) -> None:
        """Whether the process dies at a request or nobody wants it any more: an error, and nothing is left."""
        for step in itertools.count():
            spec = lab.spec()
            doing = asyncio.create_task(_as_coroutine(operation(lab, spec, template.memory)))
            if await self._struck(lab, spec, doing, step, accident):
                assert lab.leftovers() == NOTHING
                continue
            await (await doing).shutdown()
            break
        assert step >= 1

    @pytest.mark.parametrize("accident", ["killed before", "killed during", "cancelled"])
    async def test_one_while_a_snapshot_is_made_leaves_nothing(self, lab: Lab, accident: str) -> None:
        """A machine that dies, or is not wanted any more, while it is frozen is gone, and there is no snapshot."""
        for step in itertools.count():
            vm = await lab.vmm.boot(lab.spec(), snapshottable=True)
            doing = asyncio.create_task(vm.snapshot())
            if await self._struck(lab, vm.spec, doing, step, accident):
                await vm.wait()
                assert lab.leftovers() == NOTHING
                continue
            (await doing).close()
            break
        assert step >= 2

    async def _struck(self, lab: Lab, spec: VmSpec, doing: asyncio.Task[Any], step: int, accident: str) -> bool:
        """Have the accident happen at a step; false if there are not so many, and all went well."""

        def strike() -> None:
            if accident == "cancelled":
                doing.cancel()
            else:
                lab.kill(spec)

        watch = Accident(step, strike, late=accident != "killed before")
        with pytest.MonkeyPatch.context() as patch:
            watch.install(lab.subject, patch)
            await asyncio.wait({doing})
        if watch.happened and accident == "killed during" and doing.exception() is None:
            await _put_away(doing.result())  # its last answer was quicker than the signal
        elif watch.happened:
            with pytest.raises(asyncio.CancelledError if accident == "cancelled" else VmmError):
                await doing
        return watch.happened

    async def test_a_process_that_dies_at_once_is_told(
        self, lab: Lab, template: Snapshot, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A process that was killed before it became the VMM is an error with its signal, and nothing is left."""
        start = type(lab.gate).start

        def start_and_kill(*arguments: Any, **more: Any) -> Any:
            child = start(*arguments, **more)
            child.kill()
            return child

        monkeypatch.setattr(type(lab.gate), "start", start_and_kill)
        for operation in (_boot, _clone):
            with pytest.raises(VmmError) as caught:
                await operation(lab, lab.spec(), template.memory)
            assert caught.value.status == -signal.SIGKILL
            assert lab.leftovers() == NOTHING

    async def test_a_clone_that_is_not_wanted_before_it_started(self, lab: Lab, template: Snapshot) -> None:
        """To give up at the first moment leaves nothing either."""
        for rounds in range(1, 6):
            making = asyncio.create_task(lab.vmm.clone(lab.spec(), template.memory))
            for _ in range(rounds):
                await asyncio.sleep(0)
            making.cancel()
            with pytest.raises(asyncio.CancelledError):
                await making
            assert lab.leftovers() == NOTHING


async def _put_away(made: Vm | MemorySnapshot) -> None:
    """Have done with what was made all the same, and whose process was killed then."""
    if isinstance(made, Vm):
        assert (await made.wait()).cause is Cause.VMM
    else:
        made.close()


async def _as_coroutine(doing: Awaitable[Any]) -> Any:
    return await doing
