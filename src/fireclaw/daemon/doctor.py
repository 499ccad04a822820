"""What ``fireclaw doctor`` looks at. It needs no daemon, so that it works when the daemon is what is broken.

Each check answers with a state, a reason, and where something is to be done, the command or the step that does it.
"""

from __future__ import annotations

import fcntl
import os
import platform
import shutil
import socket
import stat
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fireclaw.config import load_config
from fireclaw.errors import FireclawError
from fireclaw.images.host import install_command, missing_packages
from fireclaw.images.store import ImageStore
from fireclaw.irc.ngircd import LOOPBACK
from fireclaw.llm import catalogue
from fireclaw.llm.fetch import model_path
from fireclaw.llm.memory import total_memory
from fireclaw.vmm.accel import find_obstacle, find_verdict
from fireclaw.vmm.base import Accel
from fireclaw.vmm.host import HostMemo

if TYPE_CHECKING:
    from collections.abc import Callable

    from fireclaw.paths import Home

_GIB: Final = 1 << 30
_DISK_FAIL: Final = 1 * _GIB  # less than one image with its build
_DISK_WARN: Final = 4 * _GIB  # less than setup makes and fetches in all
_ANSWER_S: Final = 3.0
_IMAGE: Final = "debian"


class State(StrEnum):
    """What a check found."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        state: ``warn``: Fireclaw works, with less; ``fail``: something does not work.
        reason: what was found.
        remedy: the next step; empty when there is nothing to do.
    """

    name: str
    state: State
    reason: str
    remedy: str = ""


def run_checks(home: Home) -> list[Check]:
    """Run every check.

    Args:
        home: whose folders, settings and daemon are looked at.
    """
    return [_run(name, check, home) for name, check in _CHECKS.items()]


def _run(name: str, check: Callable[[Home], tuple[State, str, str]], home: Home) -> Check:
    try:
        return Check(name, *check(home))
    except FireclawError as error:
        return Check(name, State.FAIL, error.message, error.hint)
    except OSError as error:
        return Check(name, State.FAIL, f"{error.filename}: {error.strerror}", "mend its permissions")


def _check_platform(home: Home) -> tuple[State, str, str]:  # noqa: ARG001 - the form of a check
    found = f"{platform.system()} on {platform.machine()}, Python {platform.python_version()}"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return State.FAIL, found, "Fireclaw needs Linux on x86-64"
    return State.OK, found, ""


def _check_packages(home: Home) -> tuple[State, str, str]:  # noqa: ARG001
    missing = missing_packages()
    if not missing:
        return State.OK, "all system packages are here", ""
    return State.FAIL, f"missing: {', '.join(package.name for package in missing)}", install_command(missing)


def _check_kvm(home: Home) -> tuple[State, str, str]:
    wanted = load_config(home).machine.accel
    if wanted == "tcg":
        return State.OK, "not used: the settings ask for the software CPU", ""
    if obstacle := find_obstacle():
        return State.FAIL if wanted == "kvm" else State.WARN, obstacle.reason, obstacle.remedy
    verdict = find_verdict(HostMemo(home.memo))
    if verdict is None:
        return State.OK, "it is tried with the first machine", ""
    if verdict.accel is Accel.KVM:
        return State.OK, "a machine has booted on it", ""
    return State.WARN, verdict.reason, "use a host, or a virtual machine, whose KVM works"


def _check_settings(home: Home) -> tuple[State, str, str]:
    load_config(home)
    if home.config_file.exists():
        return State.OK, f"{home.config_file} is valid", ""
    return State.OK, f"there is no {home.config_file}: defaults", ""


def _check_folders(home: Home) -> tuple[State, str, str]:
    for folder in (home.data, home.run, home.secrets):
        if not folder.exists():
            parent = _nearest_existing(folder)
            if not os.access(parent, os.W_OK):
                return State.FAIL, f"cannot make {folder} in {parent}", "set FIRECLAW_HOME to a folder of yours"
            continue
        found = folder.stat()
        if found.st_uid != os.geteuid():
            owner = f"sudo chown -R $(id -u) {folder}"
            return State.FAIL, f"{folder} belongs to user {found.st_uid}", owner
        if loose := stat.S_IMODE(found.st_mode) & 0o077:
            state = State.FAIL if loose & 0o022 else State.WARN
            return state, f"others may use {folder} (mode bits {loose:03o})", f"chmod 700 {folder}"
    return State.OK, f"{home.data} and {home.run} are private", ""


def _check_disk(home: Home) -> tuple[State, str, str]:
    free = shutil.disk_usage(_nearest_existing(home.data)).free
    reason = f"{free / _GIB:.1f} GiB free for {home.data}"
    if free < _DISK_FAIL:
        return State.FAIL, reason, f"make room: {_DISK_WARN // _GIB} GiB are enough"
    if free < _DISK_WARN:
        return State.WARN, reason, f"{_DISK_WARN // _GIB} GiB are enough for images and a model"
    return State.OK, reason, ""


def _check_runtime(home: Home) -> tuple[State, str, str]:
    store = ImageStore(home)
    runtime = store.find_runtime()
    if runtime is None:
        return State.WARN, "what machines boot from is not built yet", "fireclaw setup"
    store.verify(runtime)
    return State.OK, f"built, kernel {runtime.kernel_release}", ""


def _check_image(home: Home) -> tuple[State, str, str]:
    store = ImageStore(home)
    images = {image.name: image for image in store.images()}
    if _IMAGE not in images:
        return State.WARN, f"the image {_IMAGE!r} is not built yet", "fireclaw setup"
    for image in images.values():
        store.verify(image)
    return State.OK, f"built: {', '.join(images)}", ""


def _check_model(home: Home) -> tuple[State, str, str]:
    settings = load_config(home).model
    if settings.base_url is not None:
        return State.OK, f"served by {settings.base_url}", ""
    entry = (
        catalogue.find(settings.name)
        if settings.name
        else catalogue.pick_default(len(os.sched_getaffinity(0)), total_memory())
    )
    file = model_path(entry, home.models)
    if not file.exists():
        return State.WARN, f"{entry.name} is not fetched yet ({entry.size / _GIB:.1f} GiB)", "fireclaw setup"
    if file.stat().st_size != entry.size:
        return State.FAIL, f"{file} is truncated", f"rm {file}; fireclaw setup"
    return State.OK, f"{entry.name} is here", ""


def _check_port(home: Home) -> tuple[State, str, str]:
    settings = load_config(home).irc
    if settings.port == 0:
        return State.OK, "a free port is picked", ""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, settings.port))
        except OSError as error:
            reason = f"{LOOPBACK}:{settings.port}: {error.strerror}"
        else:
            return State.OK, f"{LOOPBACK}:{settings.port} is free", ""
    if pid := _find_our_ngircd(home):
        return State.OK, f"our IRC server (pid {pid}) has it", ""
    remedy = "set another port in [irc], or 0; the system's own ngircd is stopped by: systemctl disable --now ngircd"
    return State.FAIL, reason, remedy


def _check_daemon(home: Home) -> tuple[State, str, str]:
    pid = _lock_holder(home)
    if pid is None:
        return State.OK, "not running; it starts when it is needed", ""
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(_ANSWER_S)
            probe.connect(str(home.socket))
            probe.sendall(b"GET /v1/version HTTP/1.1\r\nHost: fireclaw\r\nConnection: close\r\n\r\n")
            answered = probe.recv(16).startswith(b"HTTP/1.1 200")
    except OSError:
        answered = False
    if answered:
        return State.OK, f"running (pid {pid})", ""
    return State.FAIL, f"it runs (pid {pid}) and does not answer", f"see {home.log}; 'kill {pid}' loses no machine"


def _lock_holder(home: Home) -> str | None:
    """Return the pid in daemon.lock while somebody holds it."""
    try:
        with home.lock.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return None
    except BlockingIOError:
        return home.lock.read_text().strip()
    return None


def _find_our_ngircd(home: Home) -> str | None:
    """Return the pid of the ngircd that holds our configuration open; no path of it stands in its arguments."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = (process / "comm").read_text() == "ngircd\n"
            if ours and any(link.readlink() == home.irc_settings for link in (process / "fd").iterdir()):
                return process.name
        except OSError:  # it ended while we looked, or is another's
            continue
    return None


def _nearest_existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


_CHECKS: Final = {
    "platform": _check_platform,
    "packages": _check_packages,
    "kvm": _check_kvm,
    "settings": _check_settings,
    "folders": _check_folders,
    "disk": _check_disk,
    "runtime": _check_runtime,
    "image": _check_image,
    "model": _check_model,
    "irc port": _check_port,
    "daemon": _check_daemon,
}
