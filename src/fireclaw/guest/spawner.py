"""Starts commands inside the workload's namespaces, from threads that live in them.

A thread enters the namespaces once, and each command is then one vfork and exec: the quickest of six ways that
were measured (a forkserver costs a third more, entering in the child twice as much and drops the user too early).
Credentials are a thread's own in Linux, so a thread takes the command's user, vforks, and takes root back.

There are two threads because an emptied bounding set and no_new_privs cannot be undone: commands that ask to be
*confined* come from the second one.
"""

from __future__ import annotations

import os
import queue
import threading
from _posixsubprocess import fork_exec
from typing import TYPE_CHECKING, Any, TypeVar

from fireclaw.guest import linux

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fireclaw.guest.loop import Loop

T = TypeVar("T")

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class UserError(ValueError):
    """The image knows no such user."""


class Account:
    """A user of the image: ids and home folder."""

    __slots__ = ("gid", "home", "name", "uid")

    def __init__(self, uid: int, gid: int, home: str, name: str) -> None:
        self.uid = uid
        self.gid = gid
        self.home = home
        self.name = name


def find_account(user: str) -> Account:
    """Look a user up in the image's /etc/passwd; called in a thread that lives there.

    Args:
        user: "" (root), a name, a uid, or "uid:gid". Numbers need no entry.

    Raises:
        UserError: a name that the image does not know, or a number out of range.
    """
    wanted, _, group = user.partition(":")
    number = int(wanted) if wanted.isdecimal() else None
    if (number is not None and number >= 1 << 32) or (group and not (group.isdecimal() and int(group) < 1 << 32)):
        raise UserError(f"{user!r} is not a user")
    for name, uid, gid, home in _passwd():
        if (uid == number) if number is not None else (name == (wanted or "root")):
            return Account(uid, int(group) if group else gid, home, name)
    if number is None and wanted not in {"", "root"}:
        raise UserError(f"the image has no user {wanted!r}")
    uid = number or 0
    return Account(uid, int(group) if group else uid, "/root" if uid == 0 else "/", wanted or "root")


def _passwd() -> list[tuple[str, int, int, str]]:
    entries = []
    try:
        with open("/etc/passwd", "rb") as file:
            lines = file.read(1 << 20).decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    for line in lines:
        fields = line.split(":")
        if len(fields) >= 6 and fields[2].isdecimal() and fields[3].isdecimal():
            entries.append((fields[0], int(fields[2]), int(fields[3]), fields[5] or "/"))
    return entries


class Command:
    """What to start: the fields of the exec call."""

    __slots__ = ("argv", "cwd", "env", "user")

    def __init__(self, call: dict[str, Any]) -> None:
        self.argv = [os.fsencode(word) for word in call["argv"]]
        if not self.argv:
            raise ValueError("argv is empty")
        self.env: dict[str, str] = dict(call.get("env") or {})
        self.cwd: str = call.get("cwd") or ""
        self.user: str = call.get("user") or ""


def start(command: Command, fds: Sequence[int], *, switch_user: bool) -> int:
    """Start ``command`` with ``fds`` as its stdin, stdout and stderr; return its pid.

    Raises:
        OSError: it cannot be executed (ENOENT: no such command, EACCES: not executable ...).
        UserError: no such user.
    """
    account = find_account(command.user)
    env = {"PATH": PATH, "HOME": account.home, "USER": account.name, **command.env}
    program = command.argv[0]
    if b"/" in program:
        candidates = [program]
    else:
        candidates = [os.path.join(os.fsencode(part), program) for part in env["PATH"].split(":") if part]
    cwd = command.cwd or (account.home if account.uid else "/")
    if not command.cwd and not os.path.isdir(cwd):
        cwd = "/"
    switch = switch_user and (account.uid, account.gid) != (0, 0)
    if switch:
        linux.become(account.uid, account.gid)
    try:
        return _fork_exec(command.argv, candidates, cwd, env, fds)
    finally:
        if switch:
            linux.become_root()


def _fork_exec(
    argv: Sequence[bytes], candidates: Sequence[bytes], cwd: str, env: dict[str, str], fds: Sequence[int]
) -> int:
    error_read, error_write = os.pipe()
    try:
        try:
            pid: int = fork_exec(
                list(argv),
                list(candidates),
                True,  # close_fds
                (error_write,),
                cwd,
                [os.fsencode(f"{name}={value}") for name, value in env.items()],
                fds[0], -1, -1, fds[1], -1, fds[2],
                error_read, error_write,
                True,  # restore signals
                True,  # start a new session: its group is what signals go to
                -1, None, None, None, -1, None,  # type: ignore[arg-type]  # typeshed: preexec_fn may be None
                True,  # vfork
            )  # fmt: skip
        finally:
            os.close(error_write)
        report = os.read(error_read, 4096)
    finally:
        os.close(error_read)
    if not report:
        return pid
    os.waitpid(pid, 0)
    # subprocess's own format: b"OSError:<errno in hex>:<"noexec" when chdir failed>"
    _, number, what = report.split(b":", 2)
    code = int(number, 16)
    if what.startswith(b"noexec"):
        raise OSError(code, f"cannot enter the folder {cwd!r}: {os.strerror(code)}")
    raise OSError(code, f"{os.fsdecode(argv[0])}: {os.strerror(code)}")


class Spawner:
    """A thread that runs jobs in the workload.

    Args:
        loop: results are delivered there.
        enter: called first in the thread, to enter the namespaces; the thread must create no other after it.
        switch_user: False only where guestd itself is not root (the double for tests).
    """

    def __init__(self, loop: Loop, enter: Callable[[], None], *, switch_user: bool = True) -> None:
        self._loop = loop
        self._enter = enter
        self._switch_user = switch_user
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="spawner", daemon=True)
        self._thread.start()
        failure = self._ready.get()
        if failure is not None:
            raise failure

    def _run(self) -> None:
        try:
            self._enter()
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits, which raises it
            self._ready.put(error)
            return
        self._ready.put(None)
        while (job := self._jobs.get()) is not None:
            job()

    def do(self, work: Callable[[], T], done: Callable[[T | Exception], None]) -> None:
        """Run ``work`` in the thread; call ``done`` in the loop with its result or its exception."""

        def job() -> None:
            result: T | Exception
            try:
                result = work()
            except Exception as error:  # noqa: BLE001 - delivered to ``done``, which must look
                result = error
            self._loop.call_from_thread(lambda: done(result))

        self._jobs.put(job)

    def start(self, command: Command, fds: Sequence[int], done: Callable[[int | Exception], None]) -> None:
        """Start a command; ``done`` gets its pid, or the reason why there is none."""
        self.do(lambda: start(command, fds, switch_user=self._switch_user), done)

    def close(self) -> None:
        """End the thread once its jobs are done."""
        self._jobs.put(None)
        self._thread.join()
