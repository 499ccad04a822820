"""QEMU's microvm machine, on KVM or on the software CPU (x86-64 only).

How it is held:

- It has no network card, no PCI bus, no firmware tables but ACPI's; two read-only drives, one serial console, one
  virtio-serial port (the channel).
- Every file reaches it as a file descriptor, so it needs no right to any path, and as root it runs under a user id
  of its own with ``-sandbox on``.
- Channel and control socket are listening sockets that we bind and it inherits: a later daemon can connect again.
- The console is a ring in QEMU's memory, read by QMP: bounded, and no reader is needed. QEMU pauses rather than
  exits when its guest ends, so that the ring can still be read.
- A snapshot is the guest's memory, a memfd that QEMU maps shared, plus what ``migrate`` writes with
  ``x-ignore-shared``: some 64 KiB. QEMU 7.2 opens a memory file for writing even where it maps it privately; sealed,
  it cannot change what later clones start from.
"""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import signal
import socket
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fireclaw.errors import ChannelLostError, ConflictError, SetupError, VmmError
from fireclaw.store.machines import Role
from fireclaw.vmm.base import (
    KVM,
    Accel,
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
from fireclaw.vmm.host import cpu_model
from fireclaw.vmm.qmp import Qmp
from fireclaw.wire.hello import PORT_NAME

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fireclaw.vmm.process import Child, Gate

PROGRAM: Final = "qemu-system-x86_64"
_CHANNEL: Final = "ch"
_CONTROL: Final = "qmp"
# With ERMS the guest's kernel and libc copy by "rep movsb", which TCG does byte by byte: 64 KiB take 2 ms, not 34 us.
SOFTWARE_CPU: Final = "max,-erms"
_CONSOLE_BYTES: Final = 64 * 1024  # a power of two, as QEMU wants it
_START_S: Final = 30.0  # a start takes 40 ms; sixteen at once on two busy cores some seconds
_COMMAND_S: Final = 10.0
_LAST_WORDS_S: Final = 2.0
_MIGRATE_S: Final = 60.0

_MACHINE: Final = (
    "microvm,memory-backend=m0,x-option-roms=off,pit=off,pic=off,rtc=on,isa-serial=on,auto-kernel-cmdline=off"
)
_SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# reboot=t, panic=-1: a guest that ends or panics resets at once, which QEMU tells us as a shutdown.
# i8042.*, cryptomgr, raid: probes of hardware that is not there, some 100 ms each on the software CPU.
_KERNEL_WORDS: Final = (
    "console=ttyS0 quiet loglevel=3 reboot=t panic=-1 random.trust_cpu=on "
    "i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd cryptomgr.notests raid=noautodetect"
)
_MIGRATION: Final = [{"capability": "x-ignore-shared", "state": True}, {"capability": "events", "state": True}]


@dataclass(frozen=True, slots=True)
class _Fds:
    """The descriptors a QEMU inherits.

    Attributes:
        root: the first drive.
        image: the second drive.
        channel: the listening socket of the channel.
        control: the listening socket of QMP.
        boot: kernel and initrd; None for a clone, whose guest is long past them.
        memory: the guest's memory; None where it is private from the start.
        workspace: the third drive, where there is one, to read and to write: QEMU looks at a writable drive with
            read-only eyes first, and takes a descriptor of just that access.
    """

    root: int
    image: int
    channel: int
    control: int
    boot: tuple[int, int] | None
    memory: int | None
    workspace: tuple[int, int] | None = None

    def all(self) -> list[int]:
        more = [] if self.memory is None else [self.memory]
        return [self.root, self.image, self.channel, self.control, *(self.boot or ()), *more, *(self.workspace or ())]


class Qemu(Vmm):
    """QEMU as it is installed here."""

    name = "qemu"
    wants_sealed = True

    def fingerprint(self, spec: VmSpec) -> str:
        """See ``Vmm.fingerprint``. The program is told by its file's identity: none has to be started for this."""
        program = Path(_find_program()).resolve()
        file = program.stat()
        host = [str(program), str(file.st_size), str(file.st_mtime_ns), cpu_model()]
        if spec.accel is Accel.KVM:
            host.append(os.uname().release)
        fds = _Fds(0, 0, 0, 0, boot=(0, 0), memory=0)
        return " ".join([*host, *_command_line(spec, fds, name="")])

    async def boot(self, spec: VmSpec, *, snapshottable: bool = False) -> QemuVm:
        """See ``Vmm.boot``."""
        with told_by_host():
            memory = _make_memory(spec.memory_mib) if snapshottable else None
            try:
                child, qmp = _start(spec, self._gate, memory, clone=False)
            except BaseException:
                if memory is not None:
                    os.close(memory)
                raise
        vm = QemuVm(spec, child, qmp, memory=memory)
        await vm.greet()
        return vm

    @property
    def keeps_first_bytes(self) -> bool:
        """See ``Vmm.keeps_first_bytes``: they lie in the virtio port."""
        return True

    @property
    def keeps_spares(self) -> bool:
        """See ``Vmm.keeps_spares``: an idle one takes 30 MB."""
        return False

    async def prepare(self, spec: VmSpec, snapshot: MemorySnapshot) -> QemuVm:
        """See ``Vmm.prepare``."""
        with told_by_host():
            child, qmp = _start(spec, self._gate, snapshot.memory, clone=True)
        vm = QemuVm(spec, child, qmp)
        await vm.greet()
        return vm

    async def adopt(self, spec: VmSpec, child: Child) -> QemuVm:
        """See ``Vmm.adopt``."""
        try:
            qmp = Qmp(spec.folder / _CONTROL)
        except OSError as error:
            child.kill()
            await child.wait()
            raise VmmError(f"QEMU's control socket does not answer: {error.strerror}") from error
        vm = QemuVm(spec, child, qmp)
        await vm.check()
        return vm

    async def sweep(self, machine_id: str) -> None:
        """See ``Vmm.sweep``: there is nothing."""

    def find_left(self) -> set[str]:
        """See ``Vmm.find_left``: there is nothing."""
        return set()


class QemuVm(Vm):
    """One QEMU process; see ``Vm`` for its life."""

    def __init__(self, spec: VmSpec, child: Child, qmp: Qmp, *, memory: int | None = None) -> None:
        """Hold a QEMU, which may still be starting; owns the memory's descriptor, if given."""
        super().__init__(spec)
        self._child = child
        self._qmp = qmp
        self._memory = memory
        self._console = b""
        self._asked = False
        self._life = asyncio.create_task(self._live(), name=f"qemu {spec.machine_id}")

    # -- how one comes to be

    async def greet(self) -> None:
        """Wait until it takes commands; errors as for ``Vmm.boot``."""
        async with self._or_gone():
            await self._greet()

    async def load(self, snapshot: MemorySnapshot, *, paused: bool = False) -> None:
        """See ``Vm.load``."""
        async with self._or_gone():
            await self._load(snapshot.state)
            if not paused:
                await self.resume()

    async def check(self) -> None:
        """See that an adopted one still has its guest; errors as for ``Vmm.adopt``."""
        async with self._or_gone():
            await self._greet()
            answer = await self._do("query-status")
            status = answer.get("status") if isinstance(answer, dict) else answer
            if status not in ("running", "paused"):  # anything at all, from a QEMU that its guest has taken over
                raise VmmError(f"the guest ended ({status}) while no daemon was there")

    async def _greet(self) -> None:
        await self._qmp.execute("qmp_capabilities", timeout_s=_START_S)

    async def _load(self, state: int) -> None:
        await self._do("migrate-set-capabilities", capabilities=_MIGRATION)
        with told_by_host():
            own = os.open(f"/proc/self/fd/{state}", os.O_RDONLY | os.O_CLOEXEC)  # a dup would share the offset
        try:
            await self._do("getfd", fd=own, fdname="state")
        finally:
            os.close(own)
        await self._migrate("migrate-incoming")

    async def _migrate(self, command: str) -> None:
        """Move the device state through the descriptor that QEMU knows as ``state``."""
        ended = self._qmp.watch("MIGRATION", lambda data: data.get("status") in {"completed", "failed"})
        await self._do(command, uri="fd:state")
        try:
            async with asyncio.timeout(_MIGRATE_S):
                event = await ended
        except TimeoutError as error:
            raise VmmError(f"QEMU did not finish {command!r} within {_MIGRATE_S:g} s") from error
        if event is None:
            raise VmmError(f"QEMU ended during {command!r}")
        if event["status"] != "completed":
            reason = (await self._do("query-migrate")).get("error-desc", "no reason given")
            raise VmmError(f"QEMU failed at {command!r}: {reason}")

    @asynccontextmanager
    async def _or_gone(self) -> AsyncIterator[None]:
        """Leave nothing of the microVM if the block fails; an error of QEMU's tells its last words."""
        try:
            yield
        except VmmError as error:
            # A QEMU that is just ending gets the time to do so: its own exit status says more than our kill.
            ending = await self.shutdown(grace_s=0 if self._qmp.connected else _LAST_WORDS_S)
            raise _explain(error, ending) from error
        except BaseException:
            await self.shutdown()
            raise

    # -- what it does while it lives

    async def open_channel(self, *, timeout_s: float = 0) -> socket.socket:  # noqa: ARG002 - QEMU's own end answers
        """See ``Vm.open_channel``."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(str(self.spec.folder / _CHANNEL))
        except OSError as error:
            sock.close()
            raise ChannelLostError(f"the machine's channel is gone: {error.strerror}") from error
        return sock

    async def pause(self) -> None:
        """See ``Vm.pause``."""
        await self._do("stop")

    async def resume(self) -> None:
        """See ``Vm.resume``."""
        await self._do("cont")

    async def snapshot(self) -> MemorySnapshot:
        """See ``Vm.snapshot``."""
        if self._memory is None:
            raise ConflictError("this machine's memory is private: it was not started to become a snapshot")
        with ExitStack() as undo:
            with told_by_host():
                state = os.memfd_create("fireclaw-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            undo.callback(os.close, state)
            async with self._or_gone():
                await self._do("migrate-set-capabilities", capabilities=_MIGRATION)
                await self._do("stop")
                await self._do("getfd", fd=state, fdname="state")
                await self._migrate("migrate")
                memory, self._memory = self._memory, None
                undo.callback(os.close, memory)
                await self.shutdown()
            snapshot = MemorySnapshot(memory, state)
            snapshot.seal()
            undo.pop_all()
        return snapshot

    def usage(self) -> Usage:
        """See ``Vm.usage``."""
        if not self._child.running:
            raise VmmError("the machine has ended; it uses nothing any more")
        return usage_of(self._child.pid)

    async def console(self, limit: int = 100) -> str:
        """See ``Vm.console``."""
        with suppress(VmmError):  # a QEMU that hangs or is gone: what was read before is what there is
            await self._read_console()
        return self._console_tail(limit)

    async def _read_console(self) -> None:
        new = await self._do("ringbuf-read", device="console", size=_CONSOLE_BYTES, format="base64")
        try:
            self._console = (self._console + base64.b64decode(new))[-_CONSOLE_BYTES:]
        except (TypeError, ValueError) as error:  # a QEMU that its guest has taken over may say anything
            raise VmmError("QEMU's console is not readable") from error

    def _console_tail(self, limit: int) -> str:
        return "\n".join(escape(self._console).rstrip("\n").split("\n")[-limit:])

    async def _do(self, command: str, **arguments: Any) -> Any:
        return await self._qmp.execute(command, timeout_s=_COMMAND_S, **arguments)

    # -- how it ends

    async def shutdown(self, *, grace_s: float = 0) -> Ending:
        """See ``Vm.shutdown``."""
        self._asked = True
        if grace_s:
            with suppress(VmmError):  # it may be gone, or hang: then it is killed
                await self._qmp.execute("quit", timeout_s=grace_s)
            await asyncio.wait({self._life}, timeout=grace_s)
        self._child.kill()
        return await self.wait()

    async def wait(self) -> Ending:
        """See ``Vm.wait``."""
        return await asyncio.shield(self._life)

    def detach(self) -> None:
        """See ``Vm.detach``."""
        self._life.cancel()
        self._qmp.close()
        self._child.release()

    async def _live(self) -> Ending:
        """See it through to its end, keep the evidence, leave nothing."""
        cause = None
        event = await self._qmp.watch("SHUTDOWN")  # None when QEMU ends the connection
        if event is not None and event.get("guest"):
            with suppress(VmmError):
                await self._read_console()
            reset = event.get("reason") == "guest-reset"
            cause = cause_of_reset(self._console_tail(100)) if reset else Cause.GUEST_SHUTDOWN
            self._child.kill()
        status = await self._child.wait()
        self._qmp.close()
        for name in (_CHANNEL, _CONTROL):
            (self.spec.folder / name).unlink(missing_ok=True)
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None
        if cause is None:
            cause = Cause.ASKED if self._asked else Cause.VMM
        return Ending(cause, status, self._child.log(), self._console_tail(100))


def _start(spec: VmSpec, gate: Gate, memory: int | None, *, clone: bool) -> tuple[Child, Qmp]:
    """Start QEMU with its files and sockets, and connect to its control socket, which already listens.

    Raises:
        SetupError: QEMU is not installed, or a file is missing.
    """
    program = _find_program()
    with ExitStack() as undo, ExitStack() as ours:  # QEMU inherits copies of what is in ``ours``
        fds = _Fds(
            root=_open_file(spec.root, ours),
            image=_open_file(spec.image, ours),
            channel=_listen(spec.folder / _CHANNEL, ours, undo),
            control=_listen(spec.folder / _CONTROL, ours, undo),
            boot=None if clone else (_open_file(spec.kernel, ours), _open_file(spec.initrd, ours)),
            memory=memory,
            workspace=_open_workspace(spec, ours),
        )
        qmp = Qmp(spec.folder / _CONTROL)
        undo.callback(qmp.close)
        child = gate.start(
            [program, *_command_line(spec, fds, name=gate.mark(spec.machine_id))],
            role=Role.VMM,
            owner_id=spec.machine_id,
            fds=fds.all(),
            user=spec.user,
            groups=_groups(spec),
            die_with_us=spec.tied,
        )
        undo.pop_all()
    return child, qmp


def _command_line(spec: VmSpec, fds: _Fds, *, name: str) -> list[str]:
    """QEMU's arguments for a cold boot or a clone: the same machine to the guest."""
    return [
        *("-name", name),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *("-sandbox", _SANDBOX),
        *("-machine", f"{_MACHINE},accel={spec.accel}"),
        *("-cpu", "host" if spec.accel is Accel.KVM else SOFTWARE_CPU),
        *("-smp", str(spec.vcpus)),
        *("-m", f"{spec.memory_mib}M"),
        *("-object", _memory(spec, fds)),
        *_origin(spec, fds),
        *_drive("root", 1, fds.root),
        *_drive("image", 2, fds.image),
        *(_drive("workspace", 3, *fds.workspace) if fds.workspace else ()),
        *("-chardev", f"ringbuf,id=console,size={_CONSOLE_BYTES}", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=channel,fd={fds.channel},server=on,wait=off"),
        *("-device", "virtio-serial-device", "-device", f"virtserialport,chardev=channel,name={PORT_NAME}"),
        *("-chardev", f"socket,id=control,fd={fds.control},server=on,wait=off", "-mon", "chardev=control,mode=control"),
        *("-action", "reboot=shutdown,shutdown=pause"),
    ]


def _memory(spec: VmSpec, fds: _Fds) -> str:
    size = f"id=m0,size={spec.memory_mib}M"
    if fds.memory is None:
        return f"memory-backend-ram,{size}"
    return f"memory-backend-file,{size},mem-path=/proc/self/fd/{fds.memory},share={'on' if fds.boot else 'off'}"


def _origin(spec: VmSpec, fds: _Fds) -> list[str]:
    """Where the guest comes from: its kernel, or a state that QMP will bring. Reading a kernel takes 4 ms."""
    if fds.boot is None:
        return ["-incoming", "defer"]
    kernel, initrd = fds.boot
    # Under TCG the counter the guest reads is the host's, and on a busy host it cannot calibrate it: it would hang.
    words = [_KERNEL_WORDS, f"tsc_early_khz={spec.tsc_khz} tsc=reliable", *spec.cmdline]
    return [
        *("-kernel", f"/proc/self/fd/{kernel}"),
        *("-initrd", f"/proc/self/fd/{initrd}"),
        *("-append", " ".join(words)),
    ]


def _drive(name: str, fdset: int, *fds: int) -> list[str]:
    """A drive of one descriptor to read, and of another to write where it is writable."""
    access = "readonly=off" if len(fds) > 1 else "readonly=on"
    return [
        *(word for fd in fds for word in ("-add-fd", f"fd={fd},set={fdset}")),
        *("-drive", f"if=none,id={name},file=/dev/fdset/{fdset},format=raw,{access}"),
        *("-device", f"virtio-blk-device,drive={name}"),
    ]


def _groups(spec: VmSpec) -> list[int]:
    """The group that may open /dev/kvm, where QEMU runs under a user id of its own. Never root's."""
    if spec.accel is not Accel.KVM or spec.user is None or not KVM.exists():
        return []  # without the device QEMU itself says what is missing
    group = KVM.stat().st_gid
    return [group] if group else []


def _find_program() -> str:
    if program := shutil.which(PROGRAM):
        return program
    raise SetupError(f"{PROGRAM} is not installed", hint="install it: sudo apt-get install qemu-system-x86")


def _make_memory(mib: int) -> int:
    fd = os.memfd_create("fireclaw-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, mib << 20)
    return fd


def _open_file(path: Path, ours: ExitStack, access: int = os.O_RDONLY) -> int:
    try:
        fd = os.open(path, access | os.O_CLOEXEC)
    except OSError as error:
        raise SetupError(
            f"cannot open {str(path)!r}: {error.strerror}", hint="run 'fireclaw setup' to build it anew"
        ) from error
    ours.callback(os.close, fd)
    return fd


def _open_workspace(spec: VmSpec, ours: ExitStack) -> tuple[int, int] | None:
    if spec.workspace is None:
        return None
    return _open_file(spec.workspace, ours), _open_file(spec.workspace, ours, os.O_RDWR)


def _listen(path: Path, ours: ExitStack, undo: ExitStack) -> int:
    sock = ours.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    sock.bind(str(path))
    undo.callback(path.unlink)
    path.chmod(0o600)
    sock.listen()
    return sock.fileno()


def _explain(error: VmmError, ending: Ending) -> VmmError:
    """Tell how the process ended, where it ended by itself, rather than that it stopped answering."""
    lines = ending.log.splitlines()
    message = error.message
    if ending.status not in {None, -signal.SIGKILL}:
        how = f"with status {ending.status}" if ending.status >= 0 else f"by signal {-ending.status}"
        message = f"QEMU ended {how}" + (f": {escape(lines[-1])}" if lines else "")
    return VmmError(message, status=ending.status, log="\n".join(filter(None, [ending.log, ending.console])))
