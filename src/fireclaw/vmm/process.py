"""The gate: the one place where the daemon's children (VMMs, ngircd, the model server) are made, known and reaped.

Recorded before made. A row says *planned*; then a shell is started that waits on its standard input; then the row
says who that shell is (pid, start time, boot id); only then is the shell told to go on, and becomes the program.
Whoever is killed between two of these steps, no program runs that no row names: a shell whose starter is gone reads
end-of-file and exits. The machine's mark stands in the argv of the shell and of the VMM, so that even a lost store
does not hide a process.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import signal
import subprocess
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fireclaw.vmm.host import boot_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fireclaw.store.machines import ProcessRow, ProcessRows, Role

_PROC: Final = Path("/proc")
# No core dumps: a VMM's would hold all of its guest's memory.
_WAIT: Final = 'ulimit -c 0; umask 077; read -r _ || exit 125; exec "$@"'
_WAIT_THEN_CLOSE: Final = f"{_WAIT} </dev/null"
_ENVIRONMENT: Final = {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "LANG": "C.UTF-8"}
_LOG_NAME: Final = "fireclaw-log"
_LOG_BYTES: Final = 16 * 1024


class Child:
    """One process behind the gate, held by a pidfd; started by this daemon or by an earlier one.

    When it ends it is reaped and its row removed, whether or not anybody waits.

    Attributes:
        process_id: of its row.
        pid: its process id.
        stdin: the writing end of its standard input, where it was asked for; None once it is closed.
    """

    def __init__(
        self, process_id: str, pid: int, pidfd: int, *, rows: ProcessRows, log: int | None, stdin: int | None = None
    ) -> None:
        self.process_id = process_id
        self.pid = pid
        self.stdin = stdin
        self._pidfd = pidfd
        self._rows = rows
        self._log = log
        self._last_words = ""
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int | None] = self._loop.create_future()
        self._loop.add_reader(pidfd, self._on_exit)

    def take_stdin(self) -> int:
        """Give ``stdin`` to the caller, who closes it from now on."""
        assert self.stdin is not None
        fd, self.stdin = self.stdin, None
        return fd

    @property
    def running(self) -> bool:
        """Whether it has not been reaped yet."""
        return not self._ended.done()

    async def wait(self) -> int | None:
        """Wait until it is gone and reaped.

        Returns:
            its exit status (negative: killed by that signal), or None where it was not our own child.
        """
        return await asyncio.shield(self._ended)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if it has ended."""
        if self.running:
            with suppress(ProcessLookupError):  # it is a zombie that the loop has not seen yet
                signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """Kill it. ``wait`` tells when it is gone."""
        self.signal(signal.SIGKILL)

    async def stop(self, *, grace_s: float) -> int | None:
        """Ask it to end (SIGTERM), kill it if it does not within the grace, and wait until it is reaped."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                await self.wait()
        except TimeoutError:
            self.kill()
        return await self.wait()

    def close_stdin(self) -> None:
        """End its standard input."""
        if self.stdin is not None:
            os.close(self.stdin)
            self.stdin = None

    def log(self) -> str:
        """What it wrote to standard output and standard error: the first 16 KiB, the rest is dropped."""
        if self._log is None:
            return self._last_words
        written = os.pread(self._log, _LOG_BYTES, 0)
        return written.rstrip(b"\0").decode(errors="replace")

    def release(self) -> None:
        """Stop watching it and let it run on, for the next daemon to adopt."""
        if self.running:
            self._loop.remove_reader(self._pidfd)
            self._ended.cancel()
            self._close()

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        status = self._reap()
        self._close()
        self._ended.set_result(status)
        self._rows.remove(self.process_id)

    def _reap(self) -> int | None:
        try:
            # Not reaped yet, so its process group cannot be another's: end what it may have started, then reap.
            if os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOWAIT) is not None:
                os.killpg(self.pid, signal.SIGKILL)
            info = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        except ChildProcessError:
            return None
        assert info is not None
        return info.si_status if info.si_code == os.CLD_EXITED else -info.si_status

    def _close(self) -> None:
        self._last_words = self.log()
        self.close_stdin()
        os.close(self._pidfd)
        if self._log is not None:
            os.close(self._log)
            self._log = None


@dataclass(frozen=True, slots=True)
class Gate:
    """Where processes are made, for one home.

    Attributes:
        rows: the record of them.
        home_tag: a short word that tells this home's processes from another's (``home_tag``).
    """

    rows: ProcessRows
    home_tag: str

    def mark(self, machine_id: str) -> str:
        """The word that a VMM carries in its argv."""
        return f"fireclaw-{self.home_tag}-{machine_id}"

    def start(
        self,
        argv: Sequence[str],
        *,
        role: Role,
        owner_id: str,
        fds: Sequence[int] = (),
        user: int | None = None,
        groups: Sequence[int] = (),
        keep_stdin: bool = False,
        stdout: int | None = None,
        cwd: Path = Path("/"),
        die_with_us: bool = False,
    ) -> Child:
        """Start a program in a session of its own, recorded before it runs.

        A program that cannot be executed ends with status 126 or 127 and says why in its log.

        Args:
            argv: the program, found on PATH, and its arguments.
            role: what it does.
            owner_id: whom it belongs to; a machine's id, for a VMM.
            fds: the file descriptors it inherits, under the same numbers. No others are.
            user: the user and group id it runs under, with no capability left and none to be had; None keeps ours.
            groups: its supplementary groups, where ``user`` is given.
            keep_stdin: give it a pipe to read, ``Child.stdin``; otherwise it reads /dev/null.
            stdout: where it writes; None sends it to the log, as its standard error always is.
            cwd: its working folder.
            die_with_us: the kernel kills it when this process dies.

        Raises:
            OSError: the host cannot make another process.
        """
        process_id = str(uuid.uuid4())
        shell = _WAIT if keep_stdin else _WAIT_THEN_CLOSE
        self.rows.plan(process_id, role, owner_id)
        with ExitStack() as undo:
            undo.callback(self.rows.remove, process_id)
            log = _open_log()
            undo.callback(os.close, log)
            waiting, gate = os.pipe2(os.O_CLOEXEC)
            undo.callback(os.close, gate)
            try:
                process = subprocess.Popen(
                    ["/bin/sh", "-c", shell, "gate", *_privileges(user, groups, die_with_us=die_with_us), *argv],
                    stdin=waiting,
                    stdout=log if stdout is None else stdout,
                    stderr=log,
                    env=_ENVIRONMENT,
                    cwd=cwd,
                    pass_fds=fds,
                    start_new_session=True,
                )
            finally:
                os.close(waiting)
            undo.callback(_end, process)
            start_time = _start_time(process.pid)
            assert start_time is not None  # it is not reaped yet, so it is there
            self.rows.start(process_id, pid=process.pid, start_time=start_time, boot_id=boot_id())
            pidfd = os.pidfd_open(process.pid)
            undo.pop_all()
        process.returncode = 0  # from here on the pidfd is the handle; Popen must neither wait nor warn
        with suppress(BrokenPipeError):  # the shell was killed meanwhile; the child's end will tell
            os.write(gate, b"\n")
        if not keep_stdin:
            os.close(gate)
        stdin = gate if keep_stdin else None
        return Child(process_id, process.pid, pidfd, rows=self.rows, log=log, stdin=stdin)

    def adopt(self, row: ProcessRow) -> Child | None:
        """Hold a process of an earlier daemon; None if it is gone, or its pid is another's now."""
        if row.pid is None or row.boot_id != boot_id() or _start_time(row.pid) != row.start_time:
            return None
        try:
            pidfd = os.pidfd_open(row.pid)
        except ProcessLookupError:
            return None
        if _start_time(row.pid) != row.start_time:  # the pid changed hands before the pidfd was ours
            os.close(pidfd)
            return None
        return Child(row.process_id, row.pid, pidfd, rows=self.rows, log=_reopen_log(row.pid))

    async def sweep(self, owner_id: str) -> None:
        """End what an earlier daemon's death has left of an owner's processes, and remove their rows."""
        for row in self.rows.of(owner_id):
            if child := self.adopt(row):
                child.kill()
                await child.wait()
            else:
                self.rows.remove(row.process_id)

    def find_marked(self) -> dict[int, str]:
        """Look through all processes for marks of this home.

        Returns:
            the machine id by process id.
        """
        prefix = self.mark("").encode()
        return {
            pid: word.removeprefix(prefix).decode(errors="replace")
            for pid, words in _command_lines()
            for word in words
            if word.startswith(prefix)
        }

    def kill_stray(self, pid: int) -> bool:
        """Kill a process that ``find_marked`` found, if it still is what it was; false if it is gone."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            if pid not in self.find_marked():  # the pid changed hands before the pidfd was ours
                return False
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return False
        finally:
            os.close(pidfd)
        return True


def home_tag(data: Path) -> str:
    """A short word for a home, from the path of its data folder."""
    return hashlib.sha256(os.fsencode(data.resolve())).hexdigest()[:8]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _privileges(user: int | None, groups: Sequence[int], *, die_with_us: bool) -> list[str]:
    """The setpriv(1) in front of a command; nothing where there is nothing to change."""
    words = ["--pdeathsig=KILL"] if die_with_us else []
    if user is not None:
        words += [
            f"--reuid={user}",
            f"--regid={user}",
            f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups",
            "--no-new-privs",
            "--inh-caps=-all",
            "--bounding-set=-all",
        ]
    return ["setpriv", *words] if words else []


def _open_log() -> int:
    """A file in memory that cannot grow: whatever a child writes beyond it fails and is lost, and costs nothing.

    It needs no reader, so it neither blocks nor kills a child that outlives the daemon.
    """
    fd = os.memfd_create(_LOG_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, _LOG_BYTES)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


def _reopen_log(pid: int) -> int | None:
    """The log of a process that an earlier daemon started; None where it has closed it or is gone."""
    link = _PROC / str(pid) / "fd" / "2"
    with suppress(FileNotFoundError, PermissionError):
        if link.readlink().name.startswith(f"memfd:{_LOG_NAME}"):
            return os.open(link, os.O_RDONLY | os.O_CLOEXEC)
    return None


def _start_time(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None if there is no such process."""
    try:
        stat = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])  # the name before it may hold spaces and brackets


def _command_lines() -> Iterator[tuple[int, list[bytes]]]:
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError as error:
                if error.errno in {errno.ENOENT, errno.ESRCH, errno.EACCES}:
                    continue  # it ended while we looked, or is hidden from us (hidepid)
                raise
            yield int(entry.name), line.split(b"\0")
