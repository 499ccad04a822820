"""Firecracker on KVM (x86-64): the ``Vmm``, and the ``Vm`` of one process.

How it is held:

- It runs in a ``places.Place`` and knows relative names only, so that a snapshot fits every clone.
- Its API is spoken by ``api``, with the requests of ``bodies``.
- The channel is a vsock connection: the host connects to a socket of Firecracker's and asks for guestd's port. Only the
  host connects, so no socket of ours waits for the guest.
- Console and log come by FIFOs into rings of bounded size. They hold on to what is written while no daemon reads, and
  the process never blocks on them.
- A guest that reboots or panics ends the process with status 0. One that powers off or halts does not end it: its
  console's last line tells, and the process is killed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from contextlib import ExitStack, asynccontextmanager, contextmanager
from enum import Enum, auto
from typing import TYPE_CHECKING, Final

from fireclaw.errors import ChannelLostError, ConflictError, GuestTimeoutError, VmmError
from fireclaw.store.machines import Role
from fireclaw.vmm.base import (
    Cause,
    Ending,
    MemorySnapshot,
    Usage,
    Vm,
    Vmm,
    VmSpec,
    cause_of_reset,
    escape,
    told_by_host,
    usage_of,
)
from fireclaw.vmm.firecracker import bodies, release
from fireclaw.vmm.firecracker.api import TIMEOUT_S, Api, ApiError
from fireclaw.vmm.firecracker.jail import Block, Jail
from fireclaw.vmm.firecracker.places import Folder, Place
from fireclaw.vmm.firecracker.ring import Ring
from fireclaw.vmm.host import cpu_model

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Callable, Iterator

    from fireclaw.paths import Home
    from fireclaw.vmm.firecracker.release import Programs
    from fireclaw.vmm.process import Child, Gate

logger = logging.getLogger(__name__)

_START_S: Final = 30.0  # a start takes 12 ms; in a jail 30; many at once on two busy cores some seconds
_SNAPSHOT_S: Final = 120.0  # it writes all of the guest's memory and has it on the disk
_ATTEMPT_S: Final = 0.5  # a CONNECT before the guest's driver is up is never answered
_AGAIN_S: Final = 0.02
_LAST_WORDS_S: Final = 2.0
_ANSWER_BYTES: Final = 32
_REFUSED: Final = 400
_CONSOLE_BYTES: Final = 64 * 1024
_LOG_BYTES: Final = 16 * 1024
_OPTIONS: Final = ["--api-sock", bodies.CONTROL, "--log-path", bodies.LOG, "--level", "Warning", "--show-level"]
_SWITCHED_OFF: Final = (b"reboot: Power down", b"reboot: System halted")
# src/vmm/src/lib.rs, FcExitCode
_STATUSES: Final = {
    1: "a general error",
    148: "a system call that its filter forbids",
    149: "SIGBUS: the host has no memory left for it",
    150: "SIGSEGV",
    151: "a file grew beyond its limit",
    152: "a bad configuration",
    153: "bad arguments",
    154: "too much processor time",
    155: "SIGPIPE",
    156: "SIGHUP",
    157: "SIGILL",
}


class Firecracker(Vmm):
    """Firecracker as it is installed here.

    Args:
        gate: where its processes are made.
        home: where it is installed, and where its jails are made.
    """

    name = "firecracker"

    def __init__(self, gate: Gate, home: Home) -> None:
        super().__init__(gate)
        self._home = home
        self._block = Block(home.jails, gate)
        self._programs: Programs | None = None

    @property
    def jailed(self) -> bool:
        """Whether each gets a jail: as root always, otherwise never."""
        return os.geteuid() == 0

    @property
    def wants_sealed(self) -> bool:
        """See ``Vmm.wants_sealed``: in a jail it can only read the snapshot's files, which are root's."""
        return not self.jailed

    def check(self) -> Programs:
        """Find the programs.

        Raises:
            SetupError: they are missing, or of a wrong version.
        """
        if self._programs is None:
            self._programs = release.find(self._home.vmms)
        return self._programs

    def fingerprint(self, spec: VmSpec) -> str:
        """See ``Vmm.fingerprint``. A snapshot's format, the CPU and the host's kernel must be the same."""
        programs = self.check()
        file = programs.firecracker.stat()
        return " ".join(
            [
                f"firecracker {release.dotted(programs.version)} {file.st_size} {file.st_mtime_ns}",
                f"on {cpu_model()}, {os.uname().release}:",
                f"{spec.vcpus} vcpus, {spec.memory_mib} MiB, {bodies.kernel_words(spec)}",
            ]
        )

    async def boot(self, spec: VmSpec, *, snapshottable: bool = False) -> FirecrackerVm:
        """See ``Vmm.boot``. Its memory is private either way; a snapshot is a copy of it."""
        place = self._place(spec)
        async with _cleared(place):
            place.make()
            place.add(bodies.KERNEL, spec.kernel)
            place.add(bodies.INITRD, spec.initrd)
            self._add_drives(place, spec)
            vm = self._start(spec, place, snapshottable=snapshottable)
        await vm.boot()
        return vm

    @property
    def keeps_first_bytes(self) -> bool:
        """See ``Vmm.keeps_first_bytes``: a connection to a guest that stands still is reset when it wakes."""
        return False

    @property
    def keeps_spares(self) -> bool:
        """See ``Vmm.keeps_spares``: an idle one takes 5 MB, and a jail's making most of a clone's time."""
        return True

    async def prepare(self, spec: VmSpec, snapshot: MemorySnapshot) -> FirecrackerVm:
        """See ``Vmm.prepare``."""
        place = self._place(spec)
        async with _cleared(place):
            place.make()
            place.add_open(bodies.MEMORY, snapshot.memory)
            place.add_open(bodies.STATE, snapshot.state)
            self._add_drives(place, spec)
            vm = self._start(spec, place)
        await vm.greet()
        return vm

    async def adopt(self, spec: VmSpec, child: Child) -> FirecrackerVm:
        """See ``Vmm.adopt``."""
        place = Jail(self._block, spec, release.PROGRAM) if self.jailed else Folder(spec)
        try:
            rings = _open_rings(place.open_fifo)
        except OSError as error:
            child.kill()
            await child.wait()
            await place.remove()
            raise VmmError(f"Firecracker's console is gone: {error.strerror}") from error
        vm = self._hold(spec, place, child, rings)
        await vm.check()
        return vm

    async def sweep(self, machine_id: str) -> None:
        """See ``Vmm.sweep``."""
        await asyncio.to_thread(self._block.raze, machine_id)

    def find_left(self) -> set[str]:
        """See ``Vmm.find_left``."""
        return self._block.find()

    def _place(self, spec: VmSpec) -> Place:
        return Jail(self._block, spec, self.check().firecracker.name) if self.jailed else Folder(spec)

    def _add_drives(self, place: Place, spec: VmSpec) -> None:
        place.add(bodies.ROOT, spec.root)
        place.add(bodies.IMAGE, spec.image)
        if spec.workspace is not None:
            place.add(bodies.WORKSPACE, spec.workspace, writable=True)

    def _start(self, spec: VmSpec, place: Place, *, snapshottable: bool = False) -> FirecrackerVm:
        mark = self._gate.mark(spec.machine_id)
        rings = _open_rings(place.add_fifo)
        try:
            with told_by_host():
                child = self._gate.start(
                    place.argv(self.check(), mark, _OPTIONS),
                    role=Role.VMM,
                    owner_id=spec.machine_id,
                    cwd=place.cwd,
                    die_with_us=spec.tied,
                )
        except BaseException:
            for ring in rings:
                ring.close()
            raise
        return self._hold(spec, place, child, rings, snapshottable=snapshottable)

    def _hold(
        self, spec: VmSpec, place: Place, child: Child, rings: list[Ring], *, snapshottable: bool = False
    ) -> FirecrackerVm:
        return FirecrackerVm(spec, place, child, *rings, snapshottable=snapshottable, sealed=self.wants_sealed)


def _open_rings(opening: Callable[[str], int]) -> list[Ring]:
    """Console and log, from what opens our ends of their FIFOs."""
    rings: list[Ring] = []
    try:
        for name, size in _FIFOS:
            rings.append(Ring(opening(name), size))
    except BaseException:
        for ring in rings:
            ring.close()
        raise
    return rings


_FIFOS: Final = ((bodies.CONSOLE, _CONSOLE_BYTES), (bodies.LOG, _LOG_BYTES))


class _State(Enum):
    FRESH = auto()
    LOADED = auto()
    RUNNING = auto()
    PAUSED = auto()


class FirecrackerVm(Vm):
    """One Firecracker process; see ``Vm`` for its life."""

    def __init__(
        self, spec: VmSpec, place: Place, child: Child, console: Ring, log: Ring, *, snapshottable: bool, sealed: bool
    ) -> None:
        """Hold a Firecracker, which may still be starting; owns the rings."""
        super().__init__(spec)
        self._snapshottable = snapshottable
        self._sealed = sealed
        self._place = place
        self._child = child
        self._console = console
        self._log = log
        self._api: Api | None = None
        self._state = _State.FRESH
        self._asked = False
        self._switched_off = False
        console.watch(_SWITCHED_OFF, self._switch_off)
        self._life = asyncio.create_task(self._live(), name=f"firecracker {spec.machine_id}")

    # -- how one comes to be

    async def boot(self) -> None:
        """Bring a fresh one up; errors as for ``Vmm.boot``."""
        async with self._or_gone():
            for put in bodies.boot(self.spec, await self._version()):
                await self._put(put)
            self._state = _State.RUNNING

    async def greet(self) -> None:
        """Have a fresh one ready for a snapshot; errors as for ``Vmm.prepare``."""
        async with self._or_gone():
            await self._put(bodies.serial(await self._version()))

    async def load(self, snapshot: MemorySnapshot, *, paused: bool = False) -> None:  # noqa: ARG002 - it is in its place
        """See ``Vm.load``."""
        async with self._or_gone():
            await self._put(bodies.load(paused=paused), timeout_s=_START_S)
            self._state = _State.LOADED if paused else _State.RUNNING

    async def check(self) -> None:
        """See that an adopted one still has its guest; errors as for ``Vmm.adopt``."""
        async with self._or_gone():
            about = await (await self._reach()).get("/")
            word = about.get("state") if isinstance(about, dict) else about
            if word not in ("Running", "Paused"):  # anything at all, from one that its guest has taken over
                raise VmmError(f"Firecracker has no guest: {word}")
            self._state = _State.PAUSED if word == "Paused" else _State.RUNNING

    async def _reach(self) -> Api:
        """Connect to its API; the socket is there a moment before it listens."""
        try:
            async with asyncio.timeout(_START_S):
                while self._api is None:
                    try:
                        self._api = await Api.connect(self._place.connect(bodies.CONTROL))
                    except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                        if not self._child.running:
                            raise VmmError("Firecracker ended before it took commands") from None
                        await asyncio.sleep(0.001)
        except TimeoutError:
            raise VmmError(f"Firecracker did not start within {_START_S:g} s") from None
        except OSError as error:
            raise VmmError(f"Firecracker's API cannot be reached: {error.strerror}") from error
        return self._api

    @asynccontextmanager
    async def _or_gone(self) -> AsyncIterator[None]:
        """Leave nothing of the microVM if the block fails; an error tells Firecracker's last words."""
        try:
            yield
        except VmmError as error:
            # One that is just ending gets the time to do so: its own exit status says more than our kill.
            if self._api is not None and not self._api.connected:
                await asyncio.wait({self._life}, timeout=_LAST_WORDS_S)
            raise _explain(error, await self.shutdown()) from error
        except BaseException:
            await self.shutdown()
            raise

    # -- what it does while it lives

    async def open_channel(self, *, timeout_s: float) -> socket.socket:
        """See ``Vm.open_channel``."""
        if self._state is _State.LOADED:  # a connection to a clone that stands still would be reset when it wakes
            await self.resume()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            sock = await self._connect(min(_ATTEMPT_S, max(deadline - loop.time(), _AGAIN_S)))
            if sock is not None:
                return sock
            if loop.time() > deadline:
                raise GuestTimeoutError(f"the guest did not answer within {timeout_s:g} s")
            await asyncio.sleep(_AGAIN_S)

    async def _connect(self, timeout_s: float) -> socket.socket | None:
        """Try once to reach guestd; None when it is not up yet.

        A connection that goes through may still end at once: the session's hello tells. That is so for a clone that
        stands still, and we do not connect to those.
        """
        try:
            sock = self._place.connect(bodies.CHANNEL)
        except OSError as error:
            raise await self._lost(error) from error
        try:
            async with asyncio.timeout(timeout_s):
                if await _ask(sock):
                    return sock
        except (TimeoutError, ConnectionError):
            pass
        except BaseException:
            sock.close()
            raise
        sock.close()
        return None

    async def _lost(self, error: OSError) -> ChannelLostError:
        """Why nobody listens: most often the guest has just ended, and its last words say more."""
        done, _ = await asyncio.wait({self._life}, timeout=_LAST_WORDS_S)
        if not done:
            return ChannelLostError(f"the machine's channel is gone: {error.strerror}")
        ending = self._life.result()
        words = (ending.console or ending.log).strip().splitlines()[-1:]
        return ChannelLostError(": ".join(["the machine has ended", f"{ending.cause}", *words]))

    async def pause(self) -> None:
        """See ``Vm.pause``."""
        await self._patch("Paused")
        self._state = _State.PAUSED

    async def resume(self) -> None:
        """See ``Vm.resume``."""
        if self._state is _State.PAUSED:
            try:
                await self._put(bodies.failing_create())
            except ApiError as error:
                if error.http_status != _REFUSED:  # it did not even answer
                    raise
        if self._state in {_State.PAUSED, _State.LOADED}:
            await self._patch("Resumed")
            self._state = _State.RUNNING

    async def _version(self) -> release.Version:
        """The version of just this process: what it does not know it refuses."""
        about = await (await self._reach()).get("/version")
        try:
            return release.parse(f"v{about['firecracker_version']}")
        except (KeyError, TypeError, ValueError):
            raise VmmError(f"Firecracker tells no version but {escape(str(about)[:100])}") from None

    async def _put(self, put: bodies.Put, *, timeout_s: float = TIMEOUT_S) -> None:
        with self._told() as api:
            await api.put(put.path, put.body, timeout_s=timeout_s)

    async def _patch(self, word: str) -> None:
        with self._told() as api:
            await api.patch("/vm", bodies.state(word))

    @contextmanager
    def _told(self) -> Iterator[Api]:
        """The API; its errors get the last lines of the log."""
        if self._api is None:
            raise VmmError("Firecracker has ended")
        try:
            yield self._api
        except ApiError as error:
            error.log = escape(self._log.content()).rstrip()
            raise

    async def snapshot(self) -> MemorySnapshot:
        """See ``Vm.snapshot``."""
        if not self._snapshottable:
            raise ConflictError("this machine was not started to become a snapshot")
        with ExitStack() as undo:
            async with self._or_gone():
                for name in (bodies.MEMORY, bodies.STATE):
                    self._place.offer(name)
                await self.pause()
                await self._put(bodies.create(), timeout_s=_SNAPSHOT_S)
                memory, state = (self._take(name, undo) for name in (bodies.MEMORY, bodies.STATE))
                await self.shutdown()
            snapshot = MemorySnapshot(memory, state)
            if self._sealed:
                snapshot.seal()
            undo.pop_all()
        return snapshot

    def _take(self, name: str, undo: ExitStack) -> int:
        fd = self._place.take(name)
        undo.callback(os.close, fd)
        return fd

    def usage(self) -> Usage:
        """See ``Vm.usage``."""
        if not self._child.running:
            raise VmmError("the machine has ended; it uses nothing any more")
        return usage_of(self._child.pid)

    async def console(self, limit: int = 100) -> str:
        """See ``Vm.console``."""
        return self._tail(limit)

    def _tail(self, limit: int) -> str:
        return "\n".join(escape(self._console.content()).rstrip("\n").split("\n")[-limit:])

    # -- how it ends

    async def shutdown(self, *, grace_s: float = 0) -> Ending:
        """See ``Vm.shutdown``."""
        self._asked = True
        if grace_s:
            await self._child.stop(grace_s=grace_s)
        self._child.kill()
        return await self.wait()

    async def wait(self) -> Ending:
        """See ``Vm.wait``."""
        return await asyncio.shield(self._life)

    def detach(self) -> None:
        """See ``Vm.detach``."""
        self._life.cancel()
        self._console.watch((), lambda: None)  # a guest that is just switching off is the next daemon's
        self._let_go()
        self._child.release()

    def _let_go(self) -> None:
        if self._api is not None:
            self._api.close()
        self._console.close()
        self._log.close()

    def _switch_off(self) -> None:
        """The guest has powered off or halted, which Firecracker does not notice."""
        self._switched_off = True
        self._child.kill()

    async def _live(self) -> Ending:
        """See it through to its end, keep the evidence, leave nothing."""
        status = await self._child.wait()
        self._let_go()
        try:
            await self._place.remove()
        except (OSError, RecursionError) as error:  # what a VMM that was taken over has left there; prune tries again
            logger.warning("machine %s leaves something: %s", self.spec.machine_id, error)
        log = "\n".join(filter(None, [self._child.log().rstrip(), escape(self._log.content()).rstrip()]))
        return Ending(self._cause(status), status, log, self._tail(100))

    def _cause(self, status: int | None) -> Cause:
        if self._switched_off:
            return Cause.GUEST_SHUTDOWN
        if self._asked:
            return Cause.ASKED
        if status == 0:
            return cause_of_reset(self._tail(100))
        return Cause.VMM


async def _ask(sock: socket.socket) -> bool:
    """Have a connection go through to guestd; say whether it did."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, bodies.connect())
    answer = b""
    while not answer.endswith(b"\n"):
        # Nothing follows the line, for guestd is silent until it has read a hello; so no byte of its can be lost here.
        piece = await loop.sock_recv(sock, _ANSWER_BYTES - len(answer))
        if not piece:
            return False
        answer += piece
    return answer.startswith(b"OK ")


@asynccontextmanager
async def _cleared(place: Place) -> AsyncIterator[None]:
    """Leave nothing in a place if the block fails."""
    try:
        yield
    except BaseException:
        await asyncio.shield(place.remove())
        raise


def _explain(error: VmmError, ending: Ending) -> VmmError:
    """Tell how the process ended, where it ended by itself, beside what it refused."""
    message = error.message
    if ending.status is not None and ending.status >= 0:
        how = _STATUSES.get(ending.status, "")
        message += f"; it exited with status {ending.status}" + (f" ({how})" if how else "")
    elif ending.status not in {None, -signal.SIGKILL}:
        message += f"; it ended by signal {-ending.status}"
    lines = ending.log.splitlines()
    if lines and not isinstance(error, ApiError):
        message += f": {escape(lines[-1])}"
    return VmmError(message, status=ending.status, log="\n".join(filter(None, [ending.log, ending.console])))
