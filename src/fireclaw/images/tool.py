"""The one place of the image builders that starts programs.

A program gets an environment made from nothing, a session of its own, and dies with the thread that
started it, so that a killed builder leaves nobody who still writes.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from fireclaw.errors import SetupError
from fireclaw.images import host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_LAST_LINES = 3

_ROOM = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: Path | None = None,
    prefix: Sequence[str] = (),
) -> str:
    """Run a program to its end and return what it wrote to stdout.

    Args:
        argv: the program, found on a fixed PATH, and its arguments.
        cwd: where it runs.
        env: what it sees besides a fixed PATH, the C locale and the caller's proxies.
        stdin: a file to read from; nothing otherwise.
        prefix: a command that runs ``argv``, e.g. ``root_room()``.

    Raises:
        SetupError: it is not installed, or it failed; its last words are in the message.
    """
    with reading(argv, cwd=cwd, env=env, stdin=stdin, prefix=prefix) as stream:
        return stream.read().decode(errors="replace")


@contextmanager
def reading(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: Path | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[IO[bytes]]:
    """Run a program and yield its stdout; the block must read it to its end.

    Takes and raises what ``run`` does.
    """
    with tempfile.TemporaryFile() as errors:
        with _started(argv, cwd=cwd, env=env, stdin=stdin, prefix=prefix, stderr=errors) as process:
            assert process.stdout is not None
            yield process.stdout
        errors.seek(0)
        _check(argv, process.returncode, errors.read().decode(errors="replace").splitlines())


def watch(
    argv: Sequence[str | Path],
    on_line: Callable[[str], None],
    *,
    env: Mapping[str, str] | None = None,
    prefix: Sequence[str] = (),
) -> None:
    """Run a program to its end and hand over each line it says, on stdout or stderr, as it comes.

    Args:
        argv: as for ``run``.
        on_line: called with each line.
        env: as for ``run``.
        prefix: as for ``run``.

    Raises:
        SetupError: as for ``run``.
    """
    lines = []
    with _started(argv, env=env, prefix=prefix, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for raw in process.stdout:
            lines.append(raw.decode(errors="replace").rstrip())
            on_line(lines[-1])
    _check(argv, process.returncode, lines)


def root_room() -> tuple[str, ...]:
    """Return a command prefix that gives a program root's powers over its own mounts and processes.

    When it ends or is killed, every process and every mount in there is gone. A person becomes root in a user
    namespace of their sub-uids.

    Raises:
        SetupError: a person has no sub-uids, or no program to use them.
    """
    if os.geteuid() == 0:
        return _ROOM
    if not host.has_program("newuidmap"):
        raise SetupError("without 'newuidmap' only root can do this", hint=host.install_hint("newuidmap"))
    user = pwd.getpwuid(os.geteuid()).pw_name
    for table in (Path("/etc/subuid"), Path("/etc/subgid")):
        owners = {line.split(":")[0] for line in table.read_text().splitlines()} if table.exists() else set()
        if owners.isdisjoint({user, str(os.geteuid())}):
            hint = f"run: sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}"
            raise SetupError(f"the user {user!r} has no range in {str(table)!r}", hint=hint)
    return (*_ROOM, "--map-root-user", "--map-auto")


def remove_tree(folder: Path) -> None:
    """Remove a folder, even if a killed ``root_room`` program left files of a person's sub-uids in it."""
    try:
        shutil.rmtree(folder)
    except PermissionError:
        if os.geteuid() == 0:
            raise
        run(["rm", "-rf", folder], prefix=root_room())


@contextmanager
def _started(
    argv: Sequence[str | Path],
    *,
    stderr: int | IO[bytes],
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: Path | None = None,
    prefix: Sequence[str] = (),
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a program; at the end it is reaped, and killed before if the block raised."""
    name = str(argv[0])
    if not host.has_program(name, path=_PATH):
        raise SetupError(f"the program {name!r} is not installed", hint=host.install_hint(name))
    with (
        (stdin or Path(os.devnull)).open("rb") as source,
        subprocess.Popen(
            # setpriv execs the program, so pid and session are the program's own.
            ["setpriv", "--pdeathsig", "KILL", "--", *prefix, *argv],
            cwd=cwd,
            env=_environment(env or {}),
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=stderr,
            umask=0o022,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield process
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    proxies = {name: os.environ[name] for name in _PROXIES if name in os.environ}
    return {"PATH": _PATH, "LC_ALL": "C.UTF-8", "HOME": "/nonexistent", **proxies, **extra}


def _check(argv: Sequence[str | Path], status: int, lines: Sequence[str]) -> None:
    if status == 0:
        return
    last = " | ".join([line.strip() for line in lines if line.strip()][-_LAST_LINES:]) or "it said nothing"
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
    raise SetupError(f"{str(argv[0])!r} {how}: {last}")
