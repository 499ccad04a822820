"""The embedded model server's process: started through the gate, with pipes as ``asyncio.subprocess`` would give.

It ends with the daemon: the kernel kills it when we die, and its stdin is its life line besides.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from fireclaw.store.machines import Role

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fireclaw.vmm.process import Child, Gate

OWNER = "model"
_LINE_MAX = 1 << 20


class ModelProcess:
    """See ``fireclaw.llm.embedded.ServerProcess``."""

    def __init__(self, child: Child, stdin: asyncio.StreamWriter, stdout: asyncio.StreamReader) -> None:
        self._child = child
        self.stdin = stdin
        self.stdout = stdout
        self.returncode: int | None = None
        self._end = asyncio.create_task(self._reap(), name="model server")

    async def _reap(self) -> int:
        status = await self._child.wait()
        self.returncode = 0 if status is None else status
        return self.returncode

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def kill(self) -> None:
        """Kill it."""
        self._child.kill()

    async def wait(self) -> int:
        """Wait until it is reaped; return its exit status."""
        return await asyncio.shield(self._end)


async def start_model_process(gate: Gate, argv: Sequence[str]) -> ModelProcess:
    """Start the model server, recorded first."""
    read, write = os.pipe2(os.O_CLOEXEC)
    try:
        child = gate.start(argv, role=Role.MODEL, owner_id=OWNER, keep_stdin=True, stdout=write, die_with_us=True)
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_LINE_MAX)
    protocol = asyncio.StreamReaderProtocol(reader)
    await loop.connect_read_pipe(lambda: protocol, os.fdopen(read, "rb", 0))
    transport, writer_protocol = await loop.connect_write_pipe(
        asyncio.streams.FlowControlMixin, os.fdopen(child.take_stdin(), "wb", 0)
    )
    return ModelProcess(child, asyncio.StreamWriter(transport, writer_protocol, None, loop), reader)
