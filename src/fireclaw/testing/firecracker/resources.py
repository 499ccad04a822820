"""What a microVM is to be made of: the configuration that a client puts together before it starts one.

Values are checked as the original checks them, files are opened, the vsock socket is bound; the rest is kept for
``GET /vm/config``, the start, and snapshots.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

from fireclaw.testing.firecracker.routes import Refusal
from fireclaw.testing.firecracker.rust import say
from fireclaw.testing.firecracker.vsock import Vsock

if TYPE_CHECKING:
    from fireclaw.guest.loop import Loop
    from fireclaw.testing.firecracker.script import Script
    from fireclaw.testing.firecracker.sinks import Journal, Metrics

_CMDLINE_MAX: Final = 2048
_SECTOR: Final = 512
_ELF: Final = b"\x7fELF"
_CPUS: Final = 32
_KERNEL_ROOM_MIB: Final = 64  # less than this, and a distribution's kernel does not fit where it must go
_TAP_LENGTH: Final = 15


class Resources:
    """The configuration.

    Attributes:
        config: as ``GET /vm/config`` shows it.
        machine: its ``machine-config``, with a template that the answer leaves out where there is none.
        serial_path: where the guest's serial line goes; None for stdout.
        vsock: the device, bound.
        booting: something was configured that a loaded snapshot would bring itself.
    """

    def __init__(self, loop: Loop, script: Script, journal: Journal, metrics: Metrics) -> None:
        self._loop = loop
        self._script = script
        self._journal = journal
        self._metrics = metrics
        self._kernel = -1
        self._files: dict[str, int] = {}
        self.machine: dict[str, Any] = {
            "vcpu_count": 1,
            "mem_size_mib": 128,
            "smt": False,
            "cpu_template": None,
            "track_dirty_pages": False,
            "huge_pages": "None",
        }
        self.config: dict[str, Any] = {
            "balloon": None,
            "drives": [],
            "boot-source": {"kernel_image_path": "", "initrd_path": None, "boot_args": None},
            "cpu-config": None,
            "logger": None,
            "machine-config": self.shown_machine,
            "metrics": None,
            "mmds-config": None,
            "network-interfaces": [],
            "vsock": None,
            "entropy": None,
            "pmem": [],
            "memory-hotplug": None,
        }
        self.serial_path: str | None = None
        self.vsock: Vsock | None = None
        self.booting = False

    @property
    def shown_machine(self) -> dict[str, Any]:
        """The ``machine-config`` as it is shown."""
        return {name: value for name, value in self.machine.items() if value is not None}

    def update_machine(self, update: dict[str, Any]) -> None:
        """Change what is given.

        Raises:
            Refusal: the numbers do not go together.
        """
        new = {**self.machine, **{name: value for name, value in update.items() if value is not None}}
        if new["cpu_template"] == "None":
            new["cpu_template"] = None
        cpus = new["vcpu_count"]
        if not 0 < cpus <= _CPUS or (new["smt"] and cpus > 1 and cpus % 2):
            raise Refusal(
                "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an "
                "even number if SMT is enabled."
            )
        if not new["mem_size_mib"] or (new["huge_pages"] == "2M" and new["mem_size_mib"] % 2):
            raise Refusal(
                "Machine config error: The memory size (MiB) is either 0, "
                "or not a multiple of the configured page size."
            )
        self.machine = new
        self.config["machine-config"] = self.shown_machine

    def set_boot_source(self, body: dict[str, Any]) -> None:
        """Open the kernel and the initrd.

        Raises:
            Refusal: one is not there, or the command line is too long.
        """
        try:
            kernel = os.open(body["kernel_image_path"], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise Refusal(f"Boot source error: The kernel file cannot be opened: {say(error)}") from None
        try:
            if body["initrd_path"] is not None:
                os.close(os.open(body["initrd_path"], os.O_RDONLY))
        except OSError as error:
            os.close(kernel)
            raise Refusal(
                "Boot source error: The initrd file cannot be opened due to invalid path or invalid permissions. "
                + say(error)
            ) from None
        if len(body["boot_args"] or "") >= _CMDLINE_MAX:
            os.close(kernel)
            raise Refusal("Boot source error: The kernel command line is invalid: Invalid cmdline capacity provided.")
        if self._kernel >= 0:
            os.close(self._kernel)
        self._kernel = kernel
        self.config["boot-source"] = body

    def add_drive(self, body: dict[str, Any]) -> None:
        """Open a drive; its place among the others is its name in the guest.

        Raises:
            Refusal: there is no such file, or another root.
        """
        drives = self.config["drives"]
        place = next((i for i, each in enumerate(drives) if each["drive_id"] == body["drive_id"]), None)
        if body["is_root_device"] and drives and drives[0]["is_root_device"] and place != 0:
            raise Refusal("Drive config error: A root block device already exists!")
        problem = "Drive config error: Unable to create the virtio block device: "
        if body["path_on_host"] is None:
            raise Refusal(f"{problem}Invalid block config.")
        self._open(body, problem + "{}")
        drive = {
            **body,
            "is_read_only": bool(body["is_read_only"]),
            "io_engine": body["io_engine"] or "Sync",
            "partuuid": body["partuuid"],
        }
        if place is not None:
            drives[place] = drive
        else:
            drives.append(drive)
        drives.sort(key=lambda each: not each["is_root_device"])

    def replace_drive(self, body: dict[str, Any]) -> None:
        """Give a drive another file.

        Raises:
            Refusal: there is no such drive or no such file.
        """
        drive = next((each for each in self.config["drives"] if each["drive_id"] == body["drive_id"]), None)
        problem = "Drive config error: Unable to patch the block device: {} Please verify the request arguments."
        if drive is None:
            raise Refusal(problem.format("Failed perform action on device: Device not found"))
        if body["path_on_host"] is not None:
            changed = {**drive, "path_on_host": body["path_on_host"]}
            self._open(changed, problem.format("Block: {}"))
            drive.update(changed)

    def _open(self, drive: dict[str, Any], problem: str) -> None:
        """Open a drive's file; the problem's text has a place for what the device says."""
        path = drive["path_on_host"]
        try:
            fd = os.open(path, (os.O_RDONLY if drive["is_read_only"] else os.O_RDWR) | os.O_CLOEXEC)
        except OSError as error:
            text = f"Virtio backend error: Error manipulating the backing file: {say(error)} {path}"
            raise Refusal(problem.format(text)) from None
        size = os.fstat(fd).st_size
        if size % _SECTOR:
            self._journal.warn(
                f"Disk size {size} is not a multiple of sector size {_SECTOR}; "
                "the remainder will not be visible to the guest."
            )
        old = self._files.pop(drive["drive_id"], None)
        if old is not None:
            os.close(old)
        self._files[drive["drive_id"]] = fd

    def add_interface(self, body: dict[str, Any]) -> None:
        """Keep a network interface; no tap is touched.

        Raises:
            Refusal: its name is too long for one.
        """
        if len(body["host_dev_name"]) > _TAP_LENGTH:
            raise Refusal(
                "Network config error: Could not create the network device: Open tap device failed: "
                "Invalid interface name"
            )
        interfaces = self.config["network-interfaces"]
        others = [each for each in interfaces if each["iface_id"] != body["iface_id"]]
        self.config["network-interfaces"] = [*others, body]

    def set_vsock(self, body: dict[str, Any]) -> None:
        """Bind the vsock socket; a device that was there goes, with its file.

        Raises:
            Refusal: the path is taken.
        """
        if self.vsock is not None:
            self.vsock.close()
            self.vsock = None
            os.unlink(self.config["vsock"]["uds_path"])  # noqa: PTH108 - its path is a string everywhere
            self.config["vsock"] = None
        try:
            self.vsock = Vsock(self._loop, body["uds_path"], self._metrics, self._script)
        except OSError as error:
            raise Refusal(
                "Vsock config error: Cannot create backend for vsock device: "
                f"Error binding to the host-side Unix socket: {say(error)}"
            ) from None
        self.config["vsock"] = {"guest_cid": body["guest_cid"], "uds_path": body["uds_path"]}

    def set_mmds_config(self, body: dict[str, Any]) -> None:
        """Keep which interfaces reach the metadata.

        Raises:
            Refusal: none does, or one that there is not.
        """
        known = {each["iface_id"] for each in self.config["network-interfaces"]}
        if not body["network_interfaces"]:
            raise Refusal(
                "MMMDS config error: The list of network interface IDs that allow forwarding MMDS requests is empty."
            )
        if not set(body["network_interfaces"]) <= known:
            raise Refusal(
                "MMMDS config error: The list of network interface IDs provided contains at least one ID that does "
                "not correspond to any existing network interface."
            )
        self.config["mmds-config"] = {**body, "ipv4_address": body["ipv4_address"] or "169.254.169.254"}

    def check_kernel(self) -> None:
        """See that there is a kernel that can be started, and room for it.

        Raises:
            Refusal: there is not.
        """
        if self._kernel < 0:
            raise Refusal("Start microvm error: Cannot start microvm without kernel configuration.")
        if os.pread(self._kernel, len(_ELF), 0) != _ELF:
            raise Refusal(_loader("Invalid Elf magic number"))
        if self.machine["mem_size_mib"] < _KERNEL_ROOM_MIB // 2:
            raise Refusal(_loader("Unable to read kernel image"))

    def restore(self, config: dict[str, Any], *, track_dirty_pages: bool) -> None:
        """Become what a snapshot's source was: open the drives where it had them, bind its vsock socket.

        Raises:
            Refusal: one of them cannot be had; the text is what the device says of it.
        """
        self.machine = {"cpu_template": None, **config["machine-config"], "track_dirty_pages": track_dirty_pages}
        self.config = {**config, "machine-config": self.shown_machine}
        for drive in self.config["drives"]:
            self._open(drive, "Block: {}")
        if self.config["vsock"] is not None:
            try:
                self.vsock = Vsock(self._loop, self.config["vsock"]["uds_path"], self._metrics, self._script)
            except OSError as error:
                raise Refusal(f"VsockUnixBackend: Error binding to the host-side Unix socket: {say(error)}") from None


def _loader(reason: str) -> str:
    return (
        "Start microvm error: System configuration error: Cannot load kernel due to invalid memory configuration or "
        f"invalid kernel image: Kernel Loader: failed to load ELF kernel image: Kernel Loader: {reason}"
    )
