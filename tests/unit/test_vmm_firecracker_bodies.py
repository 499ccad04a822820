"""Every request that we can send a Firecracker fits its own API description, and names relative paths only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from jsonschema import Draft4Validator

from fireclaw.vmm.base import Accel, VmSpec
from fireclaw.vmm.firecracker import bodies
from fireclaw.vmm.firecracker.bodies import Put
from fireclaw.vmm.firecracker.release import OLDEST, VERSION

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DESCRIPTION: dict[str, Any] = yaml.safe_load(
    (Path(__file__).resolve().parents[1] / "data/firecracker-api.yaml").read_text()
)
SPEC = VmSpec(
    machine_id="0123456789ab",
    kernel=Path("/k"),
    initrd=Path("/i"),
    root=Path("/r"),
    image=Path("/m"),
    memory_mib=256,
    vcpus=2,
    accel=Accel.KVM,
    tsc_khz=2_596_122,
    folder=Path("/f"),
    slot=3,
)
WITH_WORKSPACE = replace(SPEC, workspace=Path("/w"), cmdline=("more", "words"))


def everything(version: tuple[int, int, int]) -> Iterator[tuple[str, Put]]:
    """All that can be sent, with its method."""
    for spec in (SPEC, WITH_WORKSPACE):
        for put in bodies.boot(spec, version):
            yield "put", put
    for put in (bodies.serial(version), bodies.load(paused=True), bodies.create(), bodies.failing_create()):
        yield "put", put
    for word in ("Paused", "Resumed"):
        yield "patch", Put("/vm", bodies.state(word))


def schema_of(method: str, path: str) -> dict[str, Any]:
    """What the description says about the body of a request; a field that it does not name is forbidden."""
    template = "/drives/{drive_id}" if path.startswith("/drives/") else path
    (body,) = (
        parameter["schema"]
        for parameter in DESCRIPTION["paths"][template][method]["parameters"]
        if parameter["in"] == "body"
    )
    return {**body, "definitions": _closed(DESCRIPTION["definitions"])}


def _closed(definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Definitions as Firecracker reads them: with ``deny_unknown_fields``."""
    return {
        name: {**schema, "additionalProperties": False} if "properties" in schema else schema
        for name, schema in definitions.items()
    }


@pytest.mark.parametrize("version", [OLDEST, (1, 15, 1), VERSION], ids=str)
def test_bodies_fit_the_description(version: tuple[int, int, int]) -> None:
    """Fields, kinds and words are those of the API, for each version that is used."""
    seen = set()
    for method, (path, body) in everything(version):
        Draft4Validator(schema_of(method, path)).validate(body)
        seen.add(path)
    assert len(seen) == 11


def test_a_field_that_is_not_described_would_be_noticed() -> None:
    """The check has teeth."""
    body = dict(bodies.serial(VERSION).body) | {"colour": "green"}
    assert not Draft4Validator(schema_of("put", "/serial")).is_valid(body)
    assert not Draft4Validator(schema_of("patch", "/vm")).is_valid(bodies.state("Sleeping"))


def test_newer_fields_go_to_newer_versions_only() -> None:
    """The limit of the console came with 1.16; an older one would refuse the whole body."""
    assert "rate_limiter" not in bodies.serial((1, 14, 0)).body
    assert "rate_limiter" not in bodies.serial((1, 15, 99)).body
    assert "rate_limiter" in bodies.serial((1, 16, 0)).body
    assert "rate_limiter" in bodies.serial((1, 16, 1)).body


def test_every_path_is_relative() -> None:
    """What a snapshot records fits each clone: no folder of one machine is in it."""
    for _, (_, body) in everything(VERSION):
        for name, value in flat(body):
            if name.endswith("path") or name in {"uds_path", "path_on_host"}:
                assert not Path(value).is_absolute()


def flat(body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All fields of a body and what is in it."""
    for name, value in body.items():
        if isinstance(value, dict):
            yield from flat(value)
        else:
            yield name, value


def test_the_order_is_the_one_of_the_phases() -> None:
    """The console before all; drives in the guest's order, the workspace last; the start at the end."""
    paths = [put.path for put in bodies.boot(WITH_WORKSPACE, VERSION)]
    assert paths == [
        "/serial",
        "/machine-config",
        "/boot-source",
        "/drives/root",
        "/drives/image",
        "/drives/workspace",
        "/vsock",
        "/actions",
    ]
    assert "/drives/workspace" not in [put.path for put in bodies.boot(SPEC, VERSION)]


def test_only_a_workspace_can_be_written() -> None:
    """Runtime and image are read-only and no root device; what a guest syncs to its workspace is really written."""
    drives = {put.body["drive_id"]: put.body for put in bodies.boot(WITH_WORKSPACE, VERSION) if "drives" in put.path}
    assert {name: drive["is_read_only"] for name, drive in drives.items()} == {
        "root": True,
        "image": True,
        "workspace": False,
    }
    assert not any(drive["is_root_device"] for drive in drives.values())
    assert drives["workspace"]["cache_type"] == "Writeback"


def test_a_clone_runs_at_once_or_waits() -> None:
    """It is resumed by the load itself, unless it is to stand still."""
    assert bodies.load(paused=True).body["resume_vm"] is False
    assert bodies.load(paused=False).body["resume_vm"] is True


def test_the_guests_kernel_is_told_what_it_must_know() -> None:
    """A guest that ends resets at once, loads its modules, and speaks over vsock; a machine's own words come last."""
    words = bodies.kernel_words(WITH_WORKSPACE).split()
    assert {"reboot=k", "panic=-1", "console=ttyS0", "fireclaw.channel=vsock"} <= set(words)
    assert not {"nomodule", "acpi=off", "pci=off"} & set(words)
    assert words[-2:] == ["more", "words"]
    assert len(" ".join(words)) < 2048 - 512  # Firecracker adds a word for each device


def test_a_connection_is_asked_for_in_one_short_line() -> None:
    """Firecracker reads at most 32 bytes of it."""
    assert bodies.connect() == b"CONNECT 1024\n"
