"""What ``fireclaw doctor`` looks at. It needs no daemon, so that it works when the daemon is what is broken.

Each check answers with a state, a reason, and where something is to be done, the command or the step that does it.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import socket
import stat
import subprocess
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fireclaw.config import load_config
from fireclaw.errors import FireclawError, SetupError
from fireclaw.images.host import install_command, install_hint, missing_packages
from fireclaw.images.store import ImageStore
from fireclaw.irc.ngircd import LOOPBACK
from fireclaw.llm import catalogue
from fireclaw.llm.fetch import model_path
from fireclaw.llm.memory import total_memory
from fireclaw.vmm.accel import find_obstacle, find_verdict
from fireclaw.vmm.advice import find_leaks, find_slow
from fireclaw.vmm.firecracker import release
from fireclaw.vmm.firecracker.jail import can_limit
from fireclaw.vmm.host import HostMemo
from fireclaw.vmm.qemu import PROGRAM as QEMU_PROGRAM

if TYPE_CHECKING:
    from collections.abc import Callable

    from fireclaw.paths import Home
    from fireclaw.vmm.accel import Verdict
    from fireclaw.vmm.advice import Advice

_GIB: Final = 1 << 30
_DISK_FAIL: Final = 1 * _GIB  # less than one image with its build
_DISK_WARN: Final = 4 * _GIB  # less than setup makes and fetches in all
_ANSWER_S: Final = 3.0
_RUN_S: Final = 10.0
_IMAGE: Final = "debian"
_FIRECRACKER: Final = "Firecracker"
_QEMU: Final = "QEMU"
_OTHER_HOST: Final = "use a host, or a virtual machine, whose KVM works"


class State(StrEnum):
    """What a check found."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


Finding = tuple[State, str, str]
"""State, reason and remedy of a check."""


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
    """Run every check; one that does not concern this host finds nothing.

    Args:
        home: whose folders, settings and daemon are looked at.
    """
    return [found for name, check in _CHECKS.items() for found in _run(name, check, home)]


def _run(name: str, check: Callable[[Home], Finding | list[Finding]], home: Home) -> list[Check]:
    try:
        found = check(home)
    except FireclawError as error:
        found = State.FAIL, error.message, error.hint
    except OSError as error:
        found = State.FAIL, f"{error.filename}: {error.strerror}", "mend its permissions"
    return [Check(name, *finding) for finding in (found if isinstance(found, list) else [found])]


def _check_platform(home: Home) -> Finding:  # noqa: ARG001 - the form of a check
    found = f"{platform.system()} on {platform.machine()}, Python {platform.python_version()}"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return State.FAIL, found, "Fireclaw needs Linux on x86-64"
    return State.OK, found, ""


def _check_packages(home: Home) -> Finding:  # noqa: ARG001
    missing = missing_packages()
    if not missing:
        return State.OK, "all system packages are here", ""
    return State.FAIL, f"missing: {', '.join(package.name for package in missing)}", install_command(missing)


def _check_vmm(home: Home) -> Finding:
    settings = load_config(home).machine
    wanted = settings.vmm
    if wanted == "qemu":
        return State.OK, _qemu(), ""
    if wanted == "firecracker" and settings.accel == "tcg":
        return State.FAIL, "Firecracker needs KVM, and the settings ask for the software CPU", "set vmm to qemu"
    try:
        programs = release.find(home.vmms)
    except SetupError as error:
        if wanted == "firecracker":
            raise
        if _chosen(home) is None:  # without KVM it would be of no use
            return State.OK, _qemu(), ""
        return State.WARN, f"{_qemu()}; {error.message}", error.hint
    found = f"Firecracker {release.dotted(programs.version)}"
    if wanted == "auto" and _chosen(home) != _FIRECRACKER:
        return State.OK, f"{_qemu()}; {found} is here, and KVM keeps it from use", ""
    return State.OK, f"{found}, {programs.firecracker}", ""


def _qemu() -> str:
    """QEMU's version, and where it is."""
    program = shutil.which(QEMU_PROGRAM)
    if program is None:
        raise SetupError("QEMU is not installed", hint=install_hint(QEMU_PROGRAM))
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=_RUN_S, check=True)
    except subprocess.SubprocessError as error:
        raise SetupError(f"{program} cannot be run: {error}", hint="install it anew") from error
    match = re.search(r"version (\S+)", done.stdout)
    return f"QEMU {match[1] if match else 'of an unknown version'}, {program}"


def _check_kvm(home: Home) -> Finding:
    settings = load_config(home).machine
    if settings.accel == "tcg":
        return State.OK, "not used: the settings ask for the software CPU", ""
    verdicts = _verdicts(home)
    sentences: dict[str, list[str]] = {}
    for name, verdict in verdicts.items():
        sentences.setdefault(_sentence(verdict), []).append(name)
    told = [f"{' and '.join(names)}: {sentence}" for sentence, names in sentences.items()]
    reason = "; ".join(told if len(told) > 1 else sentences)
    failed = [verdict for verdict in verdicts.values() if not _usable(verdict)]
    if not failed:
        return State.OK, reason, ""
    insisted = settings.accel == "kvm" or settings.vmm == "firecracker"
    remedy = next((verdict.remedy for verdict in failed if verdict and verdict.remedy), _OTHER_HOST)
    return State.FAIL if insisted and _chosen(home) is None else State.WARN, reason, remedy


def _sentence(verdict: Verdict | None) -> str:
    if verdict is None:
        return "it is tried with the first machine"
    return "a machine has booted on it" if verdict.works else verdict.reason


def _usable(verdict: Verdict | None) -> bool:
    return verdict is None or verdict.works


def _verdicts(home: Home) -> dict[str, Verdict | None]:
    """What is known of KVM with each VMM that is tried, in the order of the trials; None: not tried yet."""
    settings, memo = load_config(home).machine, HostMemo(home.memo)
    found: dict[str, Verdict | None] = {}
    for name in (_FIRECRACKER, _QEMU):
        if settings.vmm not in {"auto", name.lower()}:
            continue
        if name == _FIRECRACKER and settings.vmm == "auto" and not _has_firecracker(home):
            continue
        jailed = name == _FIRECRACKER and os.geteuid() == 0
        verdict = found[name] = find_obstacle(jailed=jailed) or find_verdict(memo, name.lower())
        if _usable(verdict) or (verdict is not None and verdict.hangs):  # where it hangs, no other VMM is tried
            break
    return found


def _has_firecracker(home: Home) -> bool:
    try:
        release.find(home.vmms)
    except SetupError:
        return False
    return True


def _chosen(home: Home) -> str | None:
    """The VMM that runs machines on KVM; None where KVM is not used."""
    if load_config(home).machine.accel == "tcg":
        return None
    return next((name for name, verdict in _verdicts(home).items() if _usable(verdict)), None)


def _check_jail(home: Home) -> list[Finding]:
    if _chosen(home) != _FIRECRACKER:
        return []
    if os.geteuid() != 0:
        weaker = "no chroot, no user of its own, no limits of memory and processor, your files in reach"
        return [(State.WARN, f"none: machines run as you: {weaker}", "where guests are hostile, run Fireclaw as root")]
    found = State.OK, "each machine has a chroot and a user of its own, and no capability", ""
    if can_limit():
        return [found, (State.OK, "cgroup v2 limits its memory, processor and processes", "")]
    no_limits = "no limits of memory, processor and processes: cgroup v2 with these controllers is not to be had"
    return [
        found,
        (State.WARN, no_limits, "boot with systemd.unified_cgroup_hierarchy=1, and run outside of containers"),
    ]


def _check_speed(home: Home) -> list[Finding]:
    return _advised(home, find_slow(), "no setting of this host is known to slow machines down")


def _check_isolation(home: Home) -> list[Finding]:
    return _advised(home, find_leaks(), "no SMT, no KSM, no swap in the clear")


def _advised(home: Home, advice: list[Advice], fine: str) -> list[Finding]:
    """What the host's settings do to machines; of no interest where they crawl anyway."""
    if _chosen(home) is None:
        return []
    return [(State.WARN, each.reason, each.remedy) for each in advice] or [(State.OK, fine, "")]


def _check_settings(home: Home) -> Finding:
    load_config(home)
    if home.config_file.exists():
        return State.OK, f"{home.config_file} is valid", ""
    return State.OK, f"there is no {home.config_file}: defaults", ""


def _check_folders(home: Home) -> Finding:
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


def _check_disk(home: Home) -> Finding:
    free = shutil.disk_usage(_nearest_existing(home.data)).free
    reason = f"{free / _GIB:.1f} GiB free for {home.data}"
    if free < _DISK_FAIL:
        return State.FAIL, reason, f"make room: {_DISK_WARN // _GIB} GiB are enough"
    if free < _DISK_WARN:
        return State.WARN, reason, f"{_DISK_WARN // _GIB} GiB are enough for images and a model"
    return State.OK, reason, ""


def _check_runtime(home: Home) -> Finding:
    store = ImageStore(home)
    runtime = store.find_runtime()
    if runtime is None:
        return State.WARN, "what machines boot from is not built yet", "fireclaw setup"
    store.verify(runtime)
    return State.OK, f"built, kernel {runtime.kernel_release}", ""


def _check_image(home: Home) -> Finding:
    store = ImageStore(home)
    images = {image.name: image for image in store.images()}
    if _IMAGE not in images:
        return State.WARN, f"the image {_IMAGE!r} is not built yet", "fireclaw setup"
    for image in images.values():
        store.verify(image)
    return State.OK, f"built: {', '.join(images)}", ""


def _check_model(home: Home) -> Finding:
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


def _check_port(home: Home) -> Finding:
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


def _check_daemon(home: Home) -> Finding:
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


_CHECKS: Final[dict[str, Callable[[Home], Finding | list[Finding]]]] = {
    "platform": _check_platform,
    "packages": _check_packages,
    "vmm": _check_vmm,
    "kvm": _check_kvm,
    "jail": _check_jail,
    "speed": _check_speed,
    "isolation": _check_isolation,
    "settings": _check_settings,
    "folders": _check_folders,
    "disk": _check_disk,
    "runtime": _check_runtime,
    "image": _check_image,
    "model": _check_model,
    "irc port": _check_port,
    "daemon": _check_daemon,
}
