"""The calls into a machine: exec, files, identity, info, shutdown (``fireclaw.wire.calls`` describes them).

Everything that comes back is a claim of the guest: its kinds and sizes are checked before anybody sees it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fireclaw.errors import ChannelLostError, GuestError, GuestTimeoutError, InvalidError
from fireclaw.wire.calls import CallError, LineReader, pack_line
from fireclaw.wire.frames import FrameError, FrameReader, Kind, pack

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from fireclaw.machines.channel import Channel, Stream

CALL_SECONDS = 30.0
STDIN_PIECE = 65536
NOT_EXECUTABLE, NOT_FOUND = 126, 127  # docker's and the shells' statuses of a command that could not be started
_MAX_REASON = 500  # characters of the guest's that a person gets to see


@dataclass(frozen=True)
class Exec:
    """A command to start.

    Attributes:
        argv: program and arguments, at least one, without NUL.
        env: added to PATH, HOME and USER.
        cwd: a folder of the workload; the user's home (root: ``/``) when empty.
        user: "" (root), a name, a uid, or "uid:gid".
        confined: no_new_privs and an empty capability bounding set.
        stdin: whether bytes will be sent; otherwise the command reads /dev/null.
    """

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = ""
    user: str = ""
    confined: bool = False
    stdin: bool = False

    def __post_init__(self) -> None:
        """Refuse what no guest could do.

        Raises:
            InvalidError: argv is empty, or a NUL stands somewhere.
        """
        if not self.argv:
            raise InvalidError("there is no command to run")
        words = [*self.argv, self.cwd, self.user, *self.env, *self.env.values()]
        for word in words:
            if "\0" in word:
                raise InvalidError(f"a NUL byte cannot be passed to a command: {word!r}")
        for name in self.env:
            if not name or "=" in name:
                raise InvalidError(f"{name!r} is not the name of an environment variable")

    def line(self) -> bytes:
        """The call's line."""
        return pack_line(
            {
                "call": "exec",
                "argv": list(self.argv),
                "env": dict(self.env),
                "cwd": self.cwd,
                "user": self.user,
                "confined": self.confined,
                "stdin": self.stdin,
            }
        )


@dataclass(frozen=True)
class Exit:
    """How a command ended.

    Attributes:
        status: its exit status; 128+N for signal N; 126 or 127 when it could not be started.
        error: why it could not be started, else "".
    """

    status: int
    error: str = ""


class Execution:
    """A command that runs in a machine.

    Read ``output`` to its end, then ``exit`` is set. ``abort`` kills the command.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.exit: Exit | None = None

    async def output(self) -> AsyncIterator[tuple[Kind, bytes]]:
        """Yield (STDOUT or STDERR, bytes) until the command's exit.

        Raises:
            ChannelLostError: the machine went away; the command may or may not have finished.
            GuestError: the guest sent something that is not output.
        """
        reader = FrameReader()
        while data := await self._stream.receive():
            try:
                for kind, payload in reader.feed(data):
                    if kind is Kind.STDOUT or kind is Kind.STDERR:
                        yield kind, payload
                    else:
                        self.exit = _parse_exit(kind, payload)
                        self._stream.abort()  # nothing more is said on it, and a session has only so many
                        return
            except FrameError as error:
                self._stream.abort()
                raise GuestError(f"the guest sent nonsense instead of output: {error}") from None
        raise ChannelLostError("the guest ended the stream without an exit status")

    async def write(self, data: bytes | memoryview) -> None:
        """Send ``data`` to stdin, as fast as the command reads."""
        view = memoryview(data)
        for start in range(0, len(view), STDIN_PIECE):
            await self._stream.send(pack(Kind.STDIN, view[start : start + STDIN_PIECE]))

    async def forward(self, frames: bytes | memoryview) -> None:
        """Send frames that a client made; the guest checks them, and ends this command over a bad one."""
        await self._stream.send(frames)

    async def close_stdin(self) -> None:
        """End stdin."""
        await self._stream.send(pack(Kind.STDIN_CLOSED))

    async def signal(self, number: int) -> None:
        """Send a signal to the command's process group."""
        await self._stream.send(pack(Kind.SIGNAL, json.dumps({"signal": number}).encode()))

    def abort(self) -> None:
        """Kill the command and forget it."""
        self._stream.abort()


def _parse_exit(kind: Kind, payload: bytes) -> Exit:
    if kind is not Kind.EXIT:
        raise FrameError(f"a frame of kind {kind.name}")
    try:
        value = json.loads(payload)
        status, error = value["status"], value.get("error", "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise FrameError(f"an exit without a status: {problem!r}") from None
    if type(status) is not int or not 0 <= status <= 255 or not isinstance(error, str):
        raise FrameError(f"an exit status of {status!r}")
    if error and status not in {NOT_EXECUTABLE, NOT_FOUND}:  # words for a person, where none are called for
        raise FrameError(f"a reason for the exit status {status}")
    return Exit(status, error[:_MAX_REASON])


async def start(channel: Channel, request: Exec) -> Execution:
    """Start a command."""
    stream = channel.stream()
    await stream.send(request.line())
    return Execution(stream)


@dataclass(frozen=True)
class Call:
    """A call that was sent, and is answered by one line.

    Attributes:
        name: of the call.
    """

    name: str
    _stream: Stream

    async def answer(self, timeout_s: float = CALL_SECONDS) -> dict[str, Any]:
        """Wait for the answer.

        Raises:
            GuestError: the guest answered with an error.
            GuestTimeoutError: it did not answer in time.
            ChannelLostError: the channel ended.
        """
        try:
            async with asyncio.timeout(timeout_s):
                answer, _ = await _answer(self._stream)
                return answer
        except TimeoutError:
            raise GuestTimeoutError(f"the guest did not answer {self.name!r} within {timeout_s:g} s") from None
        finally:
            self._stream.abort()


async def call(channel: Channel, name: str, timeout_s: float = CALL_SECONDS, **arguments: Any) -> dict[str, Any]:
    """Make a call that is answered by one line; errors as for ``Call.answer``."""
    return await (await _send(channel, name, **arguments)).answer(timeout_s)


async def _send(channel: Channel, name: str, **arguments: Any) -> Call:
    stream = channel.stream()
    try:
        await stream.send(pack_line({"call": name, **arguments}))
    except BaseException:
        stream.abort()
        raise
    stream.finish()
    return Call(name, stream)


async def _answer(stream: Stream) -> tuple[dict[str, Any], bytes]:
    """Read the answer's line; return it and the bytes that came behind it."""
    reader = LineReader()
    while data := await stream.receive():
        try:
            answer = reader.feed(data)
        except CallError as error:
            raise GuestError(f"the guest's answer is {error}") from None
        if answer is None:
            continue
        if "error" in answer:
            number = answer.get("errno")
            raise GuestError(
                f"the guest says: {str(answer['error'])[:_MAX_REASON]}", errno=number if isinstance(number, int) else 0
            )
        return answer, reader.rest
    raise ChannelLostError("the guest ended the stream without an answer")


async def read_file(channel: Channel, path: str, limit: int, timeout_s: float = CALL_SECONDS) -> bytes:
    """Read at most ``limit`` bytes of a file; errors as for ``call``."""
    stream = channel.stream()
    try:
        async with asyncio.timeout(timeout_s):
            await stream.send(pack_line({"call": "read", "path": path, "limit": limit}))
            stream.finish()
            _, rest = await _answer(stream)
            content = bytearray(rest)
            while len(content) <= limit and (data := await stream.receive()):
                content += data
            if len(content) > limit:
                raise GuestError(f"the guest sent more than the {limit} bytes that were asked for")
            return bytes(content)
    except TimeoutError:
        raise GuestTimeoutError(f"reading {path!r} took over {timeout_s:g} s") from None
    finally:
        stream.abort()


async def write_file(
    channel: Channel, path: str, content: bytes, *, mode: int = 0o644, user: str = "", timeout_s: float = CALL_SECONDS
) -> None:
    """Replace a file by ``content``, atomically; errors as for ``call``."""
    stream = channel.stream()
    try:
        async with asyncio.timeout(timeout_s):
            await stream.send(pack_line({"call": "write", "path": path, "mode": mode, "user": user}))
            await stream.send(content)
            stream.finish()
            await _answer(stream)
    except TimeoutError:
        raise GuestTimeoutError(f"writing {path!r} took over {timeout_s:g} s") from None
    finally:
        stream.abort()


async def give_identity(channel: Channel, hostname: str, magic: bytes, *, workspace: bool = False) -> None:
    """Make a clone somebody: fresh entropy, clock, hostname, machine-id, magic, workspace; errors as for ``call``."""
    await (await send_identity(channel, hostname, magic, workspace=workspace)).answer()


async def send_identity(channel: Channel, hostname: str, magic: bytes, *, workspace: bool = False) -> Call:
    """The first half of ``give_identity``: what is sent once this has returned is done by somebody."""
    return await _send(
        channel,
        "identity",
        hostname=hostname,
        machine_id=os.urandom(16).hex(),
        entropy=base64.b64encode(os.urandom(32)).decode(),
        time=time.time(),
        magic=magic.hex(),
        workspace=workspace,
    )


async def shutdown(channel: Channel, timeout_s: float = 5.0) -> None:
    """Ask the guest to write what it cached and to end; errors as for ``call``."""
    await call(channel, "shutdown", timeout_s)
