"""The microVM of a fake Firecracker: what may be asked when, its phases, snapshots, and the life of its guest.

::

    Not started ── InstanceStart ──→ Running ⇄ Paused
         └──────── snapshot/load ──→ Paused (or Running)
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from fireclaw.testing.firecracker import snapshot
from fireclaw.testing.firecracker.guest import GuestEnd
from fireclaw.testing.firecracker.http import Reply
from fireclaw.testing.firecracker.metadata import NO_METADATA, Metadata
from fireclaw.testing.firecracker.resources import Resources
from fireclaw.testing.firecracker.routes import Refusal
from fireclaw.testing.firecracker.rust import say
from fireclaw.testing.firecracker.script import Guest
from fireclaw.testing.firecracker.sinks import open_sink, write

if TYPE_CHECKING:
    from collections.abc import Callable

    from fireclaw.guest.loop import Loop
    from fireclaw.testing.firecracker.routes import Call
    from fireclaw.testing.firecracker.script import Script
    from fireclaw.testing.firecracker.sinks import Journal, Metrics

    Handler = Callable[[Call], Reply | None]

_STDOUT: Final = 1
_SMALLEST_MIB: Final = 80  # between 64, which dies in silence, and 96, which boots
_TOO_LATE: Final = "The requested operation is not supported after starting the microVM."
_TOO_EARLY: Final = "The requested operation is not supported before starting the microVM."
_NO_DEVICE: Final = "Internal VMM error: Failed perform action on device: Device not found"
_LAST_WORDS: Final = {
    Guest.PANIC: "Kernel panic - not syncing: scripted\r\n---[ end Kernel panic - not syncing: scripted ]---\r\n",
    Guest.POWEROFF: "reboot: Power down\r\n",
    Guest.REBOOT: "reboot: Restarting system\r\nreboot: machine restart\r\n",
}


class Machine:
    """One microVM.

    Args:
        loop: calls back.
        script: what its guest does.
        name: the instance's id.
        journal: of the program.
        metrics: of the program.
        metadata_limit: bytes of metadata.
        on_exit: called when the guest's end is the process's end, too.
    """

    def __init__(
        self,
        loop: Loop,
        script: Script,
        *,
        name: str,
        journal: Journal,
        metrics: Metrics,
        metadata_limit: int,
        on_exit: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._script = script
        self._name = name
        self._journal = journal
        self._metrics = metrics
        self._on_exit = on_exit
        self._state = "Not started"
        self._resources = Resources(loop, script, journal, metrics)
        self._metadata_limit = metadata_limit
        self._metadata = Metadata(metadata_limit)
        self._serial = _STDOUT
        self._due: list[Callable[[], None]] = []  # what the guest does once it goes on
        metadata: dict[str, Handler] = {
            "GET /mmds": lambda _: Reply.of(self._metadata.shown),
            "PUT /mmds": lambda call: self._metadata.put(call.body),
            "PATCH /mmds": lambda call: self._metadata.patch(call.body),
        }
        self._before: dict[str, Handler] = {
            "PUT /actions": self._start,
            "PUT /snapshot/load": self._load,
            "PUT /logger": self._set_logger,
            "PUT /metrics": self._set_metrics,
            "PUT /serial": self._set_serial,
            "PUT /cpu-config": lambda _: self._resources.update_machine({"cpu_template": "None"}),
            "PUT /boot-source": lambda call: self._resources.set_boot_source(call.body),
            "PUT /machine-config": lambda call: self._resources.update_machine(call.body),
            "PATCH /machine-config": lambda call: self._resources.update_machine(call.body),
            "PUT /drives/{drive_id}": lambda call: self._resources.add_drive(call.body),
            "PUT /network-interfaces/{iface_id}": lambda call: self._resources.add_interface(call.body),
            "PUT /vsock": lambda call: self._resources.set_vsock(call.body),
            "PUT /mmds/config": lambda call: self._resources.set_mmds_config(call.body),
            "PUT /entropy": lambda call: self._keep("entropy", call.body),
            "PUT /balloon": lambda call: self._keep("balloon", call.body),
            "PUT /hotplug/memory": lambda call: self._keep("memory-hotplug", call.body),
            "PUT /pmem/{id}": self._add_pmem,
            "GET /balloon": self._get_balloon,
            **metadata,
        }
        self._after: dict[str, Handler] = {
            "PUT /actions": self._act,
            "PATCH /vm": self._set_state,
            "PUT /snapshot/create": self._create,
            "PATCH /drives/{drive_id}": lambda call: self._resources.replace_drive(call.body),
            "GET /balloon": self._get_balloon,
            **{endpoint: self._reached(handler) for endpoint, handler in metadata.items()},
            **dict.fromkeys(_HOTPLUG, _refuse("PCI is not enabled")),
            **dict.fromkeys(_DEVICES, _refuse(_NO_DEVICE)),
        }
        self._always: dict[str, Handler] = {
            "GET /": lambda _: Reply.of(self.info),
            "GET /version": lambda _: Reply.of({"firecracker_version": script.version}),
            "GET /machine-config": lambda _: Reply.of(self._resources.shown_machine),
            "GET /vm/config": lambda _: Reply.of(self._resources.config),
        }

    @property
    def info(self) -> dict[str, str]:
        """What ``GET /`` says."""
        return {
            "id": self._name,
            "state": self._state,
            "vmm_version": self._script.version,
            "app_name": "Firecracker",
        }

    def handle(self, call: Call) -> Reply:
        """Do what is asked.

        Raises:
            Refusal: it is not possible, or not now.
        """
        started = self._state != "Not started"
        handler = self._always.get(call.endpoint) or (self._after if started else self._before).get(call.endpoint)
        if handler is None:
            raise Refusal(_TOO_LATE if started else _TOO_EARLY)
        if not started and call.endpoint in _BOOT_SPECIFIC:
            self._resources.booting = True
        return handler(call) or Reply(204)

    def close(self) -> None:
        """End the guest's end; nothing may be left of it when the process ends."""
        if self._resources.vsock is not None:
            self._resources.vsock.close()

    # What is configured before a start

    def _keep(self, name: str, body: dict[str, Any]) -> None:
        self._resources.config[name] = body

    def _add_pmem(self, call: Call) -> None:
        others = [each for each in self._resources.config["pmem"] if each["id"] != call.id]
        self._resources.config["pmem"] = [*others, call.body]

    def _get_balloon(self, call: Call) -> Reply:
        del call
        if self._resources.config["balloon"] is None:
            missing = "Balloon config error: No balloon device found."
            raise Refusal(missing if self._state == "Not started" else _NO_DEVICE)
        return Reply.of(self._resources.config["balloon"])

    def _set_logger(self, call: Call) -> None:
        body = call.body
        try:
            self._journal.update(path=body["log_path"], level=body["level"], show_level=body["show_level"])
        except OSError as error:
            raise Refusal(f"Logger error: Failed to open target file: {say(error)}") from None

    def _set_metrics(self, call: Call) -> None:
        problem = "Metrics error: Cannot initialize the metrics system due to bad user input: "
        try:
            fd = open_sink(call.body["metrics_path"])
        except OSError as error:
            raise Refusal(problem + say(error)) from None
        if self._metrics.fd >= 0:
            os.close(fd)
            raise Refusal(problem + "Reinitialization of metrics not allowed.")
        self._metrics.fd = fd

    def _set_serial(self, call: Call) -> None:
        self._resources.serial_path = call.body["serial_out_path"]

    def _reached(self, handler: Handler) -> Handler:
        """After the start there are metadata only where an interface reaches them."""

        def checked(call: Call) -> Reply | None:
            if self._resources.config["mmds-config"] is None:
                raise Refusal(NO_METADATA)
            return handler(call)

        return checked

    # The start, and what may be asked after it

    def _start(self, call: Call) -> None:
        if call.body["action_type"] != "InstanceStart":
            raise Refusal(_TOO_EARLY)
        self._resources.check_kernel()
        self._open_serial("Start microvm error: Failed to create device manager: Error with EventFd: {}")
        self._state = "Running"
        if self._resources.machine["mem_size_mib"] < _SMALLEST_MIB:
            self._loop.call_from_thread(self._on_exit)
            return
        self._print("[    0.000000] Linux version 6.1.0 (fake)\r\n" + self._script.console)
        self._flood()
        self._metrics.flush()
        self._later(self._script.boot_s, self._booted)
        self._plan_end()

    def _booted(self) -> None:
        """The guest's driver is up, and who listens there says so."""
        if self._script.guest is Guest.SILENT:
            return
        guest = self._guest_end()
        if self._resources.vsock is not None:
            self._resources.vsock.activate(guest)
        if guest is not None:
            self._print("guestd: ready\r\n")

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something in the guest's name after some time; a guest that stands still then does it when it goes on."""

        def due() -> None:
            if self._state == "Paused":
                self._due.append(action)
            else:
                action()

        if not seconds:
            due()
            return
        timer = threading.Timer(seconds, lambda: self._loop.call_from_thread(due))
        timer.daemon = True
        timer.start()

    def _guest_end(self) -> GuestEnd | None:
        if self._script.guest is Guest.DEAF:
            return None
        return GuestEnd(lambda: self._loop.call_from_thread(self._on_exit))

    def _open_serial(self, complaint: str) -> None:
        """Without a path it is stdout, which then is made non-blocking for all who share it."""
        path = self._resources.serial_path
        if path is None:
            fcntl.fcntl(_STDOUT, fcntl.F_SETFL, fcntl.fcntl(_STDOUT, fcntl.F_GETFL) | os.O_NONBLOCK)
            return
        try:
            self._serial = open_sink(path)
        except OSError as error:
            raise Refusal(complaint.format(say(error))) from None

    def _print(self, text: str) -> None:
        if not write(self._serial, text.encode()):
            self._metrics.count("uart", "missed_write_count")

    def _flood(self) -> None:
        line = b"[    1.000000] flood".ljust(126, b".") + b"\r\n"
        for _ in range(self._script.console_flood // len(line)):
            if not write(self._serial, line):
                self._metrics.count("uart", "missed_write_count")

    def _plan_end(self) -> None:
        """A guest that is going to end does so after its time."""
        if self._script.guest in _LAST_WORDS:
            self._later(self._script.guest_after_s, lambda: self._loop.call_from_thread(self._end))

    def _end(self) -> None:
        self._print(_LAST_WORDS[self._script.guest])
        if self._script.guest is not Guest.POWEROFF:
            self._on_exit()
        elif self._resources.vsock is not None:
            self._resources.vsock.halt()

    def _act(self, call: Call) -> None:
        match call.body["action_type"]:
            case "FlushMetrics":
                self._metrics.flush()
            case "SendCtrlAltDel":
                if self._state == "Running":
                    self._print(_LAST_WORDS[Guest.REBOOT])
                    self._loop.call_from_thread(self._on_exit)
            case _:
                raise Refusal(_TOO_LATE)

    def _set_state(self, call: Call) -> None:
        begun = time.monotonic()
        vsock = self._resources.vsock
        if call.body["state"] == "Paused":
            self._state = "Paused"
            if vsock is not None:
                vsock.freeze()
            self._took("pause_vm", begun)
        else:
            self._resume()
            self._took("resume_vm", begun)

    def _resume(self) -> None:
        self._state = "Running"
        if self._resources.vsock is not None:
            self._resources.vsock.resume()
        due, self._due = self._due, []
        for action in due:
            action()

    def _took(self, name: str, begun: float) -> None:
        self._metrics.store("latencies_us", name, int((time.monotonic() - begun) * 1e6))

    # Snapshots

    def _create(self, call: Call) -> None:
        begun = time.monotonic()
        running = self._state == "Running"
        vsock = self._resources.vsock
        if vsock is not None:
            vsock.save(running=running)  # devices are saved first, whatever becomes of the rest
        if running:
            raise Refusal(
                "Create snapshot error: Cannot save the microVM state: Operation not allowed: "
                "save/restore unavailable while running"
            )
        body = call.body
        saved = {
            "config": self._resources.config,
            "vsock": vsock and {"active": vsock.active, "last_port": vsock.last_port},
        }
        try:
            snapshot.write_state(body["snapshot_path"], saved, self._script.snapshot_version)
        except OSError as error:
            raise Refusal(
                f"Create snapshot error: Cannot perform open on the snapshot backing file: {say(error)}"
            ) from None
        try:
            snapshot.write_memory(body["mem_file_path"], self._resources.machine["mem_size_mib"])
        except OSError as error:
            raise Refusal(
                f"Create snapshot error: Cannot perform open on the memory backing file: {say(error)}"
            ) from None
        self._took(f"{body['snapshot_type'].lower()}_create_snapshot", begun)

    def _load(self, call: Call) -> None:
        begun = time.monotonic()
        if self._resources.booting:
            raise Refusal(
                "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources."
            )
        try:
            saved = self._read_snapshot(call.body)
            self._restore(saved, call.body)
        except Refusal as refusal:
            raise Refusal(f"Load snapshot error: Failed to restore from snapshot: {refusal}", fatal=True) from None
        self._took("load_snapshot", begun)
        if call.body["resume_vm"]:
            self._resume()

    def _read_snapshot(self, body: dict[str, Any]) -> dict[str, Any]:
        """Read the state, override what may be, and see that the memory is there."""
        problem = "Failed to get snapshot state from file: "
        try:
            saved = snapshot.read_state(body["snapshot_path"], self._script.snapshot_version)
        except OSError as error:
            raise Refusal(f"{problem}Failed to open snapshot file: {say(error)}") from None
        except snapshot.StateError as error:
            raise Refusal(f"{problem}Failed to load snapshot state from file: {error}") from None
        interfaces = {each["iface_id"]: each for each in saved["config"]["network-interfaces"]}
        for override in body.get("network_overrides", []):
            if override["iface_id"] not in interfaces:
                raise Refusal(f"{problem}Unknown Network Device.")
            interfaces[override["iface_id"]]["host_dev_name"] = override["host_dev_name"]
        override = body.get("vsock_override")
        if override is not None:
            if saved["config"]["vsock"] is None:
                raise Refusal(f"{problem}Unknown Vsock Device.")
            saved["config"]["vsock"]["uds_path"] = override["uds_path"]
        self._check_memory(body, saved["config"]["machine-config"]["mem_size_mib"])
        return saved

    def _check_memory(self, body: dict[str, Any], mib: int) -> None:
        backend = body["mem_backend"] or {"backend_type": "File", "backend_path": body["mem_file_path"]}
        problem = "Failed to load guest memory: Error creating guest memory from "
        if backend["backend_type"] == "Uffd":
            raise Refusal(
                f"{problem}uffd: Failed to connect to UDS Unix stream: No such file or directory (os error 2)"
            )
        try:
            snapshot.check_memory(backend["backend_path"], mib)
        except OSError as error:
            raise Refusal(f"{problem}file: Failed to load guest memory: {say(error)}") from None
        except snapshot.MemoryFileError as error:
            raise Refusal(f"{problem}file: Failed to restore guest memory: {error}") from None

    def _restore(self, saved: dict[str, Any], body: dict[str, Any]) -> None:
        problem = "Failed to build microVM from snapshot: Failed to restore devices: "
        self._open_serial(problem + "Error creating DeviceManager: Error with EventFd: {}")
        tracking = bool(body.get("track_dirty_pages")) or body["enable_diff_snapshots"]
        try:
            self._resources.restore(saved["config"], track_dirty_pages=tracking)
        except Refusal as refusal:
            raise Refusal(f"{problem}Error restoring MMIO devices: {refusal}") from None
        vsock = self._resources.vsock
        if vsock is not None:
            active = saved["vsock"]["active"]
            guest = self._guest_end() if active else None
            vsock.restore(guest, active=active, last_port=saved["vsock"]["last_port"])
        self._metadata = Metadata(self._metadata_limit)
        self._state = "Paused"
        self._metrics.flush()
        self._plan_end()


def _refuse(text: str) -> Handler:
    def refuse(call: Call) -> None:
        del call
        raise Refusal(text)

    return refuse


# Configuring one of these is taking the way of a boot, even where it fails.
_BOOT_SPECIFIC: Final = frozenset(
    {
        "PUT /boot-source",
        "PUT /machine-config",
        "PATCH /machine-config",
        "PUT /drives/{drive_id}",
        "PUT /network-interfaces/{iface_id}",
        "PUT /vsock",
        "PUT /mmds/config",
        "PUT /entropy",
        "PUT /balloon",
        "PUT /hotplug/memory",
        "PUT /pmem/{id}",
    }
)
# Adding and removing devices of a running machine needs an option that we do not have.
_HOTPLUG: Final = (
    "PUT /drives/{drive_id}",
    "PUT /network-interfaces/{iface_id}",
    "PUT /pmem/{id}",
    "DELETE /drives/{drive_id}",
    "DELETE /network-interfaces/{iface_id}",
    "DELETE /pmem/{id}",
)
# Devices that answer, once a machine runs, as though it had none: nobody has needed more of them yet.
_DEVICES: Final = (
    "PATCH /balloon",
    "GET /balloon/statistics",
    "PATCH /balloon/statistics",
    "GET /hotplug/memory",
    "PATCH /hotplug/memory",
    "PATCH /network-interfaces/{iface_id}",
    "PATCH /pmem/{id}",
)
