"""Fixtures and helpers of the VMM contract's rules: templates, homes, clones, sessions."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from vm_subjects import NOTHING, Lab, Need, Watch, labs

from fireclaw.machines import calls
from fireclaw.machines.calls import Exec
from fireclaw.machines.channel import Channel
from fireclaw.vmm.base import Cause
from fireclaw.wire.frames import Kind
from fireclaw.wire.hello import new_magic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from vm_subjects import Subject

    from fireclaw.images import Image, Runtime
    from fireclaw.machines.snapshots import Snapshot
    from fireclaw.vmm.base import Vm

pytestmark = pytest.mark.timeout(300)

BOOT_S = 120.0  # 3 s on an idle software CPU
CHANNEL_S = 60.0  # some milliseconds; a clone of many on two busy cores some seconds
END_S = 30.0
WARM = b"warm"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each rule on each of the module's subjects; those of exec, which concern the guest, on the first alone."""
    if "subject" in metafunc.fixturenames:
        subjects: list[Subject] = metafunc.module.SUBJECTS
        if metafunc.function.__module__ == "exec_rules":
            subjects = subjects[:1]
        metafunc.parametrize("subject", subjects, ids=[subject.name for subject in subjects], scope="module")


@pytest.fixture(scope="module")
def make_lab(
    subject: Subject, runtime: Runtime, image: Image, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], Lab]]:
    """Make a home for machines of the subject."""
    yield from labs(subject, runtime, image, tmp_path_factory)


@pytest.fixture(scope="module")
def template(make_lab: Callable[[], Lab]) -> Iterator[Snapshot]:
    """A snapshot of a guest that has said hello and learned a word, made once."""

    async def make() -> Snapshot:
        lab, magic = make_lab(), new_magic()
        vm = await lab.vmm.boot(lab.spec(), snapshottable=True)
        async with talk(vm, magic, BOOT_S) as channel:
            await calls.give_identity(channel, "template", magic)
            if Need.MEMORY not in lab.subject.lacks:
                await shell(channel, f"printf {WARM.decode()} >/run/word")
        snapshot = lab.freeze(await vm.snapshot(), magic)
        assert (await vm.wait()).cause is Cause.ASKED
        assert lab.leftovers() == NOTHING
        return snapshot

    with asyncio.Runner() as runner:
        snapshot = runner.run(make())
    yield snapshot
    snapshot.close()


@pytest.fixture
async def lab(make_lab: Callable[[], Lab], template: Snapshot) -> AsyncIterator[Lab]:
    """A home that must be empty after the test, as must be what this process has open."""
    del template  # made before we look
    lab, watch = make_lab(), Watch()
    yield lab
    left, new = lab.leftovers(), watch.new()
    await lab.clear()
    assert left == NOTHING
    assert new == set()


@pytest.fixture
async def channel(lab: Lab, template: Snapshot) -> AsyncIterator[Channel]:
    """The channel of a clone."""
    async with running(lab, template) as vm, talk(vm, template.magic) as channel:
        await calls.give_identity(channel, "clone", template.magic)
        yield channel


@asynccontextmanager
async def running(lab: Lab, template: Snapshot, workspace: Path | None = None) -> AsyncIterator[Vm]:
    """A clone, which is ended afterwards."""
    vm = await lab.vmm.clone(lab.spec(workspace), template.memory)
    try:
        yield vm
    finally:
        await vm.shutdown()


@asynccontextmanager
async def talk(vm: Vm, magic: bytes, seconds: float = CHANNEL_S) -> AsyncIterator[Channel]:
    """A session with a guest."""
    channel = await Channel.open(await vm.open_channel(timeout_s=seconds), magic, seconds)
    try:
        yield channel
    finally:
        await channel.aclose()


async def greet(vm: Vm, magic: bytes, seconds: float = CHANNEL_S) -> None:
    """Exchange hellos with a guest, and have it run a command."""
    async with talk(vm, magic, seconds) as channel:
        assert await shell(channel, "echo $((6 * 7))") == b"42\n"


async def shell(channel: Channel, script: str, *, user: str = "") -> bytes:
    """Run a shell script in a guest; return what it printed."""
    execution = await calls.start(channel, Exec(["/bin/sh", "-c", script], user=user))
    return b"".join([data async for kind, data in execution.output() if kind is Kind.STDOUT])
