"""The register: a machine's row comes before its folder and its process, and goes after both are gone.

So whatever is killed at whatever moment, the next daemon finds it in the store, by its mark in a process's argv, or as
a folder that no row names.
"""

from __future__ import annotations

import asyncio
import shutil
import time
import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from fireclaw.errors import SetupError
from fireclaw.store.machines import Purpose
from fireclaw.vmm.base import Accel, VmSpec
from fireclaw.vmm.host import tsc_khz

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from fireclaw.images.store import Image, Runtime
    from fireclaw.paths import Home
    from fireclaw.store.machines import MachineRow, MachineRows
    from fireclaw.vmm.base import Vmm
    from fireclaw.vmm.family import Family
    from fireclaw.vmm.host import HostMemo
    from fireclaw.vmm.process import Gate

    class Record(Protocol):
        """The ledger's ``append``."""

        def __call__(self, type: str, data: Mapping[str, object], *, machine: str | None = None) -> object:  # noqa: A002
            """Add an event."""


KEPT_BY_NAME = frozenset({Purpose.NAMED, Purpose.AGENT})
"""Whose machines live on when their daemon ends."""


def short(machine_id: str) -> str:
    """The first digits of a machine's id: its folder's name, and what people see."""
    return machine_id.replace("-", "")[:12]


class Register:
    """Rows, folders and specs of this host's machines.

    Args:
        home: where folders are made.
        rows: the store's.
        gate: where processes are made.
        family: the VMMs.
        memo: facts about this host that were found out once.
        record: the ledger.
    """

    def __init__(
        self, *, home: Home, rows: MachineRows, gate: Gate, family: Family, memo: HostMemo, record: Record
    ) -> None:
        self._home = home
        self._rows = rows
        self._gate = gate
        self._family = family
        self._memo = memo
        self._record = record

    def add(
        self,
        purpose: Purpose,
        image: Image,
        runtime: Runtime,
        magic: bytes,
        *,
        vmm: Vmm,
        accel: Accel,
        memory_mib: int,
        vcpus: int,
        name: str | None = None,
        workspace: Path | None = None,
    ) -> MachineRow:
        """Record a machine, then make its folder.

        Raises:
            ConflictError: the name is taken, or another machine has the workspace.
            SetupError: the folder cannot be made.
        """
        row = self._rows.add(
            machine_id=str(uuid.uuid4()),
            name=name,
            purpose=purpose,
            image=image.digest,
            runtime=runtime.digest,
            vmm=vmm.name,
            accel=accel,
            memory_mib=memory_mib,
            vcpus=vcpus,
            magic=magic.hex(),
            created_at=time.time(),
            workspace=None if workspace is None else workspace.name,
        )
        folder = self.folder(row.machine_id)
        try:
            folder.mkdir(mode=0o700)
        except OSError as error:
            self._rows.remove(row.machine_id)
            raise SetupError(
                f"cannot make the folder {str(folder)!r}: {error.strerror}", hint="'fireclaw down' and try again"
            ) from error
        return row

    def note_made(self, row: MachineRow, image: str, how: str) -> None:
        """Write into the ledger that a machine runs."""
        about = {
            "purpose": row.purpose,
            "name": row.name,
            "image": image,
            "how": how,
            "accel": row.accel,
            "vmm": row.vmm,
        }
        self._record("machine.made", about, machine=row.machine_id)

    async def forget(self, row: MachineRow) -> None:
        """Remove what is left of a machine: stray processes, its folder, its row."""
        await self._gate.sweep(row.machine_id)
        await self._family.named(row.vmm).sweep(row.machine_id)
        await asyncio.to_thread(shutil.rmtree, self.folder(row.machine_id), ignore_errors=True)
        self._rows.remove(row.machine_id)

    def folder(self, machine_id: str) -> Path:
        """A machine's own folder."""
        return self._home.machines / short(machine_id)

    def common_spec(self, runtime: Runtime, image: Image, accel: Accel, *, memory_mib: int, vcpus: int) -> VmSpec:
        """What every machine of a kind has in common: it names none."""
        return VmSpec(
            machine_id="",
            kernel=runtime.kernel,
            initrd=runtime.initrd,
            root=runtime.root,
            image=image.root,
            memory_mib=memory_mib,
            vcpus=vcpus,
            accel=accel,
            tsc_khz=tsc_khz(self._memo),
            folder=self._home.machines,
            slot=0,
        )

    def spec(self, row: MachineRow, runtime: Runtime, image: Image, workspace: Path | None = None) -> VmSpec:
        """What to start for a machine."""
        common = self.common_spec(runtime, image, Accel(row.accel), memory_mib=row.memory_mib, vcpus=row.vcpus)
        return replace(
            common,
            workspace=workspace,
            machine_id=row.machine_id,
            folder=self.folder(row.machine_id),
            slot=row.slot,
            tied=row.purpose not in KEPT_BY_NAME,
        )

    def adopted_spec(self, row: MachineRow) -> VmSpec:
        """The spec of a running VMM: its files are open already and may even be gone by now."""
        folder = self.folder(row.machine_id)
        return VmSpec(
            machine_id=row.machine_id,
            kernel=folder,
            initrd=folder,
            root=folder,
            image=folder,
            memory_mib=row.memory_mib,
            vcpus=row.vcpus,
            accel=Accel(row.accel),
            tsc_khz=0,
            folder=folder,
            slot=row.slot,
        )
