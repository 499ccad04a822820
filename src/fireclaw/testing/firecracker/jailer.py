"""The program ``jailer``: a jail without walls.

It makes what the original makes (folders, pid file, a copy of the program), takes the same limits, user and cgroup,
and execs the program there, but with the jail as its working folder instead of its root: paths inside must be relative.
Devices are plain empty files and a network namespace is only looked for, as more takes rights that tests do not have;
options that leave the caller without the program's exit status (``--daemonize``, ``--new-pid-ns``) are not known.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import time
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Final

from fireclaw.testing.firecracker.arguments import ArgumentError, Arguments, IdError, Option, check_id, read
from fireclaw.testing.firecracker.rust import debug, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fireclaw.testing.firecracker.script import Script

_OPTIONS: Final = (
    Option("id", required=True),
    Option("exec-file", required=True),
    Option("uid", required=True),
    Option("gid", required=True),
    Option("chroot-base-dir"),
    Option("netns"),
    Option("cgroup", many=True),
    Option("resource-limit", many=True),
    Option("cgroup-version"),
    Option("parent-cgroup"),
)
_FILES: Final = 2048
_FOLDERS: Final = (".", "dev", "dev/net", "run")
_DEVICES: Final = ("dev/net/tun", "dev/kvm", "dev/urandom")
_CONTROLLERS: Final = frozenset({"cpu", "cpuset", "io", "memory", "pids"})
_LIMITS: Final = {"no-file": resource.RLIMIT_NOFILE, "fsize": resource.RLIMIT_FSIZE}


class JailError(Exception):
    """The jail cannot be made; ``debug`` is for the last line on stderr."""

    def __init__(self, text: str, debug: str) -> None:
        super().__init__(text)
        self.debug = debug


def main(script: Script, words: Sequence[str] | None = None) -> int:
    """Be a jailer: make the jail, and become the program in it.

    Args:
        script: whether to change the user, and where cgroups are.
        words: the command line; sys.argv's when None.

    Returns:
        The exit status, where there was no jail to be made.
    """
    try:
        arguments = read(sys.argv[1:] if words is None else words, _OPTIONS)
        if "help" in arguments or "version" in arguments:
            print(f"Jailer v{script.version}\n")  # noqa: T201 - the answer to an option is for stdout
            return 0
        jail = _Jail(arguments, script)
        jail.make()
        jail.enter()
    except (ArgumentError, IdError, JailError) as error:
        print(_explain(error), file=sys.stderr)  # noqa: T201 - a program's last words
        return 1
    return 0


def _explain(error: ArgumentError | IdError | JailError) -> str:
    match error:
        case ArgumentError():
            return f"Failed to parse arguments: {error}\nError: ArgumentParsing({error.debug})"
        case IdError():
            return f"Invalid instance ID: {error}\nError: InvalidInstanceId({error.debug})"
        case _:
            return f"{error}\nError: {error.debug}"


class _Jail:
    """One jail; making it checks everything that needs no folder first."""

    def __init__(self, arguments: Arguments, script: Script) -> None:
        self._script = script
        self._rest = arguments.rest
        self._id = arguments.get("id")
        check_id(self._id)
        self._program = _resolve(arguments.get("exec-file"))
        if not self._program.is_file():
            raise JailError(f"{self._program} is not a file", f'NotAFile("{self._program}")')
        base = _resolve(arguments.get("chroot-base-dir", "/srv/jailer"))
        if not base.is_dir():
            raise JailError(f"{base} is not a directory", f'NotADirectory("{base}")')
        self.root = base / self._program.name / self._id / "root"
        self._uid = _number(arguments.get("uid"), "uid")
        self._gid = _number(arguments.get("gid"), "gid")
        self._netns = arguments.get("netns")
        self._parent = arguments.get("parent-cgroup", self._program.name)
        if {"..", "/"} & set(PurePath(self._parent).parts):
            raise JailError(
                "Parent cgroup path is invalid. Path should not be absolute or contain '..' or '.'",
                "CgroupInvalidParentPath",
            )
        self._cgroup = [_split(word) for word in arguments.values.get("cgroup", ())]
        self._limits = {"no-file": _FILES} | dict(_limit(word) for word in arguments.values.get("resource-limit", ()))

    def make(self) -> None:
        """Make folders, copy and limits.

        Raises:
            JailError: something is in the way; what was made stays.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            text = f"Failed to create directory {self.root}: {say(error)}"
            raise JailError(text, f'CreateDir("{self.root}", {debug(error)})') from None
        copy = self.root / self._program.name
        shutil.copy(self._program, copy)
        self._own(copy)
        self._check_netns()
        for name, value in self._limits.items():
            resource.setrlimit(_LIMITS[name], (value, value))
        self._join_cgroup()
        os.chdir(self.root)
        for folder in map(Path, _FOLDERS):
            folder.mkdir(exist_ok=True)
            folder.chmod(0o700)
            self._own(folder)
        for device in map(Path, _DEVICES):
            self._make_device(device)
        self._write_pid(Path(f"{self._program.name}.pid"))

    def enter(self) -> None:
        """Become the program.

        Raises:
            JailError: it cannot be executed.
        """
        if not self._script.keep_user:
            os.setgroups([])
            os.setgid(self._gid)
            os.setuid(self._uid)
        now = time.monotonic_ns() // 1000
        words = ["--id", self._id, "--start-time-us", str(now), "--start-time-cpu-us", "0", "--parent-cpu-time-us", "0"]
        os.closerange(3, self._limits["no-file"])
        try:
            # By its descriptor: a script is opened by its path otherwise, and only a real jail has no folders above it
            # that the new user may not enter.
            program = os.open(self._program.name, os.O_RDONLY)
            os.set_inheritable(program, True)
            os.execve(program, [f"/{self._program.name}", *words, *self._rest], {})  # noqa: S606 - a jailer's trade
        except OSError as error:
            raise JailError(f"Failed to exec into Firecracker: {say(error)}", f"Exec({debug(error)})") from None

    def _own(self, path: Path) -> None:
        if not self._script.keep_user:
            os.chown(path, self._uid, self._gid)

    def _check_netns(self) -> None:
        """See that the namespace is there; entering it takes rights that tests do not have."""
        if not self._netns:
            return
        try:
            Path(self._netns).stat()
        except OSError as error:
            raise _cannot_open(self._netns, error) from None

    def _join_cgroup(self) -> None:
        """Make ``<root>/<parent>/<id>`` where something is to be written into it; else join the parent if it exists."""
        if not self._script.cgroup_root:
            return
        group = Path(self._script.cgroup_root, self._parent)
        if self._cgroup:
            group /= self._id
            group.mkdir(parents=True, exist_ok=True)
        elif not group.exists():
            return
        for name, value in self._cgroup:
            (group / name).write_text(f"{value}\n")
        (group / "cgroup.procs").write_text(f"{os.getpid()}\n")

    def _make_device(self, path: Path) -> None:
        try:
            path.touch(mode=0o600, exist_ok=False)
        except OSError as error:
            text = f"Failed to create /{path} via mknod inside the jail: {say(error)}"
            raise JailError(text, f'MknodDev({debug(error)}, "/{path}")') from None
        self._own(path)

    def _write_pid(self, path: Path) -> None:
        try:
            with path.open("x") as file:
                file.write(str(os.getpid()))
        except OSError as error:
            raise _cannot_open(f"/{path}", error) from None


def _cannot_open(path: str, error: OSError) -> JailError:
    return JailError(f"Failed to open file {path}: {say(error)}", f'FileOpen("{path}", {debug(error)})')


def _resolve(path: str) -> Path:
    try:
        return Path(path).resolve(strict=True)
    except OSError as error:
        text = f"Failed to canonicalize path {path}: {say(error)}"
        raise JailError(text, f'Canonicalize("{path}", {debug(error)})') from None


def _number(word: str, what: str) -> int:
    if not word.isdecimal() or int(word) >= 1 << 32:
        raise JailError(f"Invalid {what}: {word}", f'{what.capitalize()}("{word}")')
    return int(word)


def _split(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals or not value or "=" in value:
        raise JailError(f"Invalid format for cgroups: {word}", f'CgroupFormat("{word}")')
    if {"..", "/"} & set(PurePath(name).parts) or "." not in name:
        raise JailError(f"Cgroup invalid file: {word}", f'CgroupInvalidFile("{word}")')
    controller = name.partition(".")[0]
    if controller not in _CONTROLLERS:
        raise JailError(f"Controller {controller} is unavailable", f'CgroupControllerUnavailable("{controller}")')
    return name, value


def _limit(word: str) -> tuple[str, int]:
    name, equals, value = word.partition("=")
    if not equals:
        raise JailError(f"Invalid format for resources limits: {word}", f'ResLimitFormat("{word}")')
    if not value.isdecimal():
        reason = "invalid digit found in string"
        text = f"Invalid limit value for resource: {value}: {reason}"
        raise JailError(text, f'ResLimitValue("{value}", "{reason}")')
    if name not in _LIMITS:
        raise JailError(f"Invalid resource argument: {name}", f'ResLimitArgument("{name}")')
    return name, int(value)
