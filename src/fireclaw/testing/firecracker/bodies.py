"""Every request that has a body, as a table: its fields, what they hold, and which version brought them.

A test holds this table to Firecracker's own API description, so that the two cannot drift apart.
"""

from __future__ import annotations

from typing import Final

from fireclaw.testing.firecracker.json_reader import Choice, Field, Kind, Scalar, Sequence, Struct, Version

_BOOL: Final = Scalar("bool")
_STRING: Final = Scalar("string")
_PATH: Final = Scalar("path")
_ANY: Final = Scalar("any")


def _must(name: str, kind: Kind) -> Field:
    return Field(name, kind, required=True)


def _may(name: str, kind: Kind, *, since: Version = ()) -> Field:
    """A field that may be absent, and may be null."""
    return Field(name, kind, nullable=True, since=since)


def _flag(name: str, *, since: Version = ()) -> Field:
    """A boolean that is false where it is absent, and may not be null."""
    return Field(name, _BOOL, default=False, since=since)


_TOKENS: Final = Struct(
    "TokenBucketConfig",
    (_must("size", Scalar("u64")), _may("one_time_burst", Scalar("u64")), _must("refill_time", Scalar("u64"))),
    closed=False,
)
_LIMITER: Final = Struct("RateLimiterConfig", (_may("bandwidth", _TOKENS), _may("ops", _TOKENS)))
_TEMPLATE: Final = Choice(("C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None"))
_HUGE: Final = Choice(("None", "2M"))
_LEVEL: Final = Choice(
    ("off", "trace", "debug", "info", "warn", "warning", "error"), complaint="Invalid LevelFilter", folded=True
)

# Endpoint: its body. Names in braces stand for an id in the path.
BODIES: Final[dict[str, Struct]] = {
    "PUT /actions": Struct(
        "ActionBody", (_must("action_type", Choice(("FlushMetrics", "InstanceStart", "SendCtrlAltDel"))),)
    ),
    "PUT /balloon": Struct(
        "BalloonDeviceConfig",
        (
            _must("amount_mib", Scalar("u32")),
            _must("deflate_on_oom", _BOOL),
            Field("stats_polling_interval_s", Scalar("u16"), default=0),
            _flag("free_page_hinting", since=(1, 14)),
            _flag("free_page_reporting", since=(1, 14)),
        ),
    ),
    "PATCH /balloon": Struct("BalloonUpdateConfig", (_must("amount_mib", Scalar("u32")),)),
    "PATCH /balloon/statistics": Struct(
        "BalloonUpdateStatsConfig", (_must("stats_polling_interval_s", Scalar("u16")),)
    ),
    "PUT /boot-source": Struct(
        "BootSourceConfig",
        (_must("kernel_image_path", _STRING), _may("initrd_path", _STRING), _may("boot_args", _STRING)),
    ),
    "PUT /cpu-config": Struct(
        "CustomCpuTemplate",
        tuple(
            Field(name, Sequence(_ANY), default=[])
            for name in ("kvm_capabilities", "cpuid_modifiers", "msr_modifiers", "reg_modifiers", "vcpu_features")
        ),
    ),
    "PUT /drives/{drive_id}": Struct(
        "BlockDeviceConfig",
        (
            _must("drive_id", _STRING),
            _may("partuuid", _STRING),
            _must("is_root_device", _BOOL),
            Field("cache_type", Choice(("Unsafe", "Writeback")), default="Unsafe"),
            _may("is_read_only", _BOOL),
            _may("path_on_host", _STRING),
            _may("rate_limiter", _LIMITER),
            _may("io_engine", Choice(("Async", "Sync"))),
            _may("socket", _STRING),
        ),
    ),
    "PATCH /drives/{drive_id}": Struct(
        "BlockDeviceUpdateConfig",
        (_must("drive_id", _STRING), _may("path_on_host", _STRING), _may("rate_limiter", _LIMITER)),
    ),
    "PUT /entropy": Struct("EntropyDeviceConfig", (_may("rate_limiter", _LIMITER),)),
    "PUT /hotplug/memory": Struct(
        "MemoryHotplugConfig",
        (
            _must("total_size_mib", Scalar("usize")),
            Field("block_size_mib", Scalar("usize"), default=2),
            Field("slot_size_mib", Scalar("usize"), default=128),
        ),
    ),
    "PATCH /hotplug/memory": Struct("MemoryHotplugSizeUpdate", (_must("requested_size_mib", Scalar("usize")),)),
    "PUT /logger": Struct(
        "LoggerConfig",
        (
            _may("log_path", _PATH),
            _may("level", _LEVEL),
            _may("show_level", _BOOL),
            _may("show_log_origin", _BOOL),
            _may("module", _STRING),
        ),
    ),
    "PUT /machine-config": Struct(
        "MachineConfig",
        (
            _must("vcpu_count", Scalar("u8")),
            _must("mem_size_mib", Scalar("usize")),
            _flag("smt"),
            _may("cpu_template", _TEMPLATE),
            _flag("track_dirty_pages"),
            Field("huge_pages", _HUGE, default="None"),
        ),
    ),
    "PATCH /machine-config": Struct(
        "MachineConfigUpdate",
        (
            _may("vcpu_count", Scalar("u8")),
            _may("mem_size_mib", Scalar("usize")),
            _may("smt", _BOOL),
            _may("cpu_template", _TEMPLATE),
            _may("track_dirty_pages", _BOOL),
            _may("huge_pages", _HUGE),
        ),
    ),
    "PUT /metrics": Struct("MetricsConfig", (_must("metrics_path", _PATH),), closed=False),
    "PUT /mmds/config": Struct(
        "MmdsConfig",
        (
            Field("version", Choice(("V1", "V2")), default="V1"),
            _must("network_interfaces", Sequence(_STRING)),
            _may("ipv4_address", _STRING),
            _flag("imds_compat", since=(1, 13)),
        ),
    ),
    "PUT /network-interfaces/{iface_id}": Struct(
        "NetworkInterfaceConfig",
        (
            _must("iface_id", _STRING),
            _must("host_dev_name", _STRING),
            _may("guest_mac", _STRING),
            _may("mtu", Scalar("u16"), since=(1, 16)),
            _may("rx_rate_limiter", _LIMITER),
            _may("tx_rate_limiter", _LIMITER),
        ),
    ),
    "PATCH /network-interfaces/{iface_id}": Struct(
        "NetworkInterfaceUpdateConfig",
        (_must("iface_id", _STRING), _may("rx_rate_limiter", _LIMITER), _may("tx_rate_limiter", _LIMITER)),
    ),
    "PUT /pmem/{id}": Struct(
        "PmemConfig",
        (
            _must("id", _STRING),
            _must("path_on_host", _STRING),
            _flag("root_device"),
            _flag("read_only"),
            _may("rate_limiter", _LIMITER, since=(1, 16)),
        ),
    ),
    "PATCH /pmem/{id}": Struct("PmemDeviceUpdateConfig", (_must("id", _STRING), _may("rate_limiter", _LIMITER))),
    "PUT /serial": Struct(
        "SerialConfig", (_may("serial_out_path", _PATH), _may("rate_limiter", _TOKENS, since=(1, 16)))
    ),
    "PUT /snapshot/create": Struct(
        "CreateSnapshotParams",
        (
            Field("snapshot_type", Choice(("Diff", "Full")), default="Full"),
            _must("snapshot_path", _PATH),
            _must("mem_file_path", _PATH),
        ),
    ),
    "PUT /snapshot/load": Struct(
        "LoadSnapshotConfig",
        (
            _must("snapshot_path", _PATH),
            _may("mem_file_path", _PATH),
            _may(
                "mem_backend",
                Struct(
                    "MemBackendConfig",
                    (_must("backend_path", _PATH), _must("backend_type", Choice(("File", "Uffd")))),
                ),
            ),
            _flag("enable_diff_snapshots"),
            _flag("track_dirty_pages", since=(1, 13)),
            _flag("resume_vm"),
            Field(
                "network_overrides",
                Sequence(
                    Struct(
                        "NetworkOverride", (_must("iface_id", _STRING), _must("host_dev_name", _STRING)), closed=False
                    )
                ),
                default=[],
                since=(1, 12),
            ),
            _may("vsock_override", Struct("VsockOverride", (_must("uds_path", _STRING),), closed=False), since=(1, 16)),
            _flag("clock_realtime", since=(1, 15, 1)),
        ),
    ),
    "PATCH /vm": Struct("Vm", (_must("state", Choice(("Paused", "Resumed"))),)),
    "PUT /vsock": Struct(
        "VsockDeviceConfig",
        (_may("vsock_id", _STRING), _must("guest_cid", Scalar("u32")), _must("uds_path", _STRING)),
    ),
}

# Endpoints that came late: to older versions their paths are unknown ones.
SINCE: Final[dict[str, Version]] = {
    "serial": (1, 14),
    "pmem": (1, 14),
    "hotplug": (1, 14),
}
