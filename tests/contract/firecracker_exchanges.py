"""What a Firecracker v1.16.1 was seen to answer, word for word: requests that it refuses, and starts that fail."""

from __future__ import annotations

from typing import Final

BAD_JSON: Final = "An error occurred when deserializing the json body of a request: "
LATE: Final = "The requested operation is not supported after starting the microVM."
EARLY: Final = "The requested operation is not supported before starting the microVM."
GATE: Final = "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources."
RESTORE: Final = "Load snapshot error: Failed to restore from snapshot: "
STATE: Final = f"{RESTORE}Failed to get snapshot state from file: "
DEVICES: Final = (
    f"{RESTORE}Failed to build microVM from snapshot: Failed to restore devices: Error restoring MMIO devices: "
)
LOADER: Final = (
    "Start microvm error: System configuration error: Cannot load kernel due to invalid memory configuration or "
    "invalid kernel image: Kernel Loader: failed to load ELF kernel image: Kernel Loader: "
)


# Before a start: method, path, body, fault message.
REFUSED: Final[list[tuple[str, str, object, str]]] = [
    ("GET", "/nope", None, "Invalid request method and/or path: GET nope."),
    ("GET", "/vm", None, "Invalid request method and/or path: GET vm."),
    ("GET", "/?a=1", None, "Invalid request method and/or path: GET ?a=1."),
    ("PUT", "/nope", "{}", "Invalid request method and/or path: PUT nope."),
    ("PUT", "/snapshot/nope", "{}", "Invalid request method and/or path: PUT /snapshot/nope."),
    ("PUT", "/snapshot", "{}", "Missing snapshot operation type."),
    ("GET", "/balloon/nope", None, "Unrecognized GET request path `nope`."),
    ("PUT", "/mmds/nope", "{}", "Unrecognized PUT request path `nope`."),
    ("PUT", "/actions", None, "Empty PUT request."),
    ("PATCH", "/vm", None, "Empty PATCH request."),
    ("PATCH", "/machine-config", "{}", "Empty PATCH request."),
    ("GET", "/version", "{}", "GET request cannot have a body."),
    ("DELETE", "/drives/x", "{}", "Empty Delete request."),
    ("PUT", "/actions", '{"action_type": ', f"{BAD_JSON}EOF while parsing a value at line 1 column 16."),
    ("PUT", "/actions", "{}", f"{BAD_JSON}missing field `action_type` at line 1 column 2."),
    ("PUT", "/actions", "5", f"{BAD_JSON}invalid type: integer `5`, expected struct ActionBody at line 1 column 1."),
    ("PUT", "/actions", "nonsense", f"{BAD_JSON}expected ident at line 1 column 2."),
    ("PUT", "/actions", '{"action_type":1}', f"{BAD_JSON}expected value at line 1 column 16."),
    ("PUT", "/actions", '{"action_type":"FlushMetrics"} x', f"{BAD_JSON}trailing characters at line 1 column 32."),
    (
        "PUT",
        "/actions",
        '{"action_type":"InstanceStart","action_type":"InstanceStart"}',
        f"{BAD_JSON}duplicate field `action_type` at line 1 column 44.",
    ),
    (
        "PUT",
        "/actions",
        '{"action_type":"Foo"}',
        (
            f"{BAD_JSON}unknown variant `Foo`, expected one of `FlushMetrics`, `InstanceStart`, `SendCtrlAltDel` "
            "at line 1 column 20."
        ),
    ),
    (
        "PUT",
        "/actions",
        '{"action_type":"InstanceStart","foo":1}',
        f"{BAD_JSON}unknown field `foo`, expected `action_type` at line 1 column 36.",
    ),
    ("PATCH", "/vm", '{"state":}', f"{BAD_JSON}expected value at line 1 column 10."),
    ("PATCH", "/vm", '{"state":"Paused",}', f"{BAD_JSON}trailing comma at line 1 column 19."),
    ("PATCH", "/vm", '{"state" "Paused"}', f"{BAD_JSON}expected `:` at line 1 column 10."),
    ("PATCH", "/vm", '{state:"Paused"}', f"{BAD_JSON}key must be a string at line 1 column 2."),
    (
        "PATCH",
        "/vm",
        '{\n "state":"Bad"}',
        f"{BAD_JSON}unknown variant `Bad`, expected `Paused` or `Resumed` at line 2 column 14.",
    ),
    ("PATCH", "/vm", '{"state":"Pau', f"{BAD_JSON}EOF while parsing a string at line 1 column 13."),
    ("PATCH", "/vm", '{"state":"Paused"', f"{BAD_JSON}EOF while parsing an object at line 1 column 17."),
    ("PUT", "/machine-config", {"vcpu_count": 1}, f"{BAD_JSON}missing field `mem_size_mib` at line 1 column 17."),
    (
        "PUT",
        "/machine-config",
        {"vcpu_count": "1", "mem_size_mib": 1},
        f'{BAD_JSON}invalid type: string "1", expected u8 at line 1 column 18.',
    ),
    (
        "PUT",
        "/machine-config",
        {"vcpu_count": 300, "mem_size_mib": 1},
        f"{BAD_JSON}invalid value: integer `300`, expected u8 at line 1 column 18.",
    ),
    (
        "PUT",
        "/machine-config",
        {"vcpu_count": -1, "mem_size_mib": 1},
        f"{BAD_JSON}invalid value: integer `-1`, expected u8 at line 1 column 17.",
    ),
    (
        "PUT",
        "/machine-config",
        {"vcpu_count": 1.5, "mem_size_mib": 1},
        f"{BAD_JSON}invalid type: floating point `1.5`, expected u8 at line 1 column 18.",
    ),
    (
        "PUT",
        "/machine-config",
        {"vcpu_count": 1, "mem_size_mib": 128, "smt": None},
        f"{BAD_JSON}invalid type: null, expected a boolean at line 1 column 50.",
    ),
    (
        "PUT",
        "/machine-config",
        {"vcpu_count": 1, "mem_size_mib": 128, "huge_pages": "x"},
        f"{BAD_JSON}unknown variant `x`, expected `None` or `2M` at line 1 column 56.",
    ),
    (
        "PUT",
        "/machine-config",
        {"vcpu_count": 1, "mem_size_mib": 128, "nested": 1},
        (
            f"{BAD_JSON}unknown field `nested`, expected one of `vcpu_count`, `mem_size_mib`, `smt`, `cpu_template`, "
            "`track_dirty_pages`, `huge_pages` at line 1 column 47."
        ),
    ),
    (
        "PUT",
        "/machine-config",
        {"vcpu_count": 33, "mem_size_mib": 128},
        (
            "Machine config error: The number of vCPUs must be greater than 0, less than 32 and must be 1 or an even "
            "number if SMT is enabled."
        ),
    ),
    (
        "PUT",
        "/machine-config",
        {"vcpu_count": 1, "mem_size_mib": 0},
        "Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size.",
    ),
    ("PUT", "/logger", {"level": "loud"}, f"{BAD_JSON}Invalid LevelFilter at line 1 column 17."),
    (
        "PUT",
        "/logger",
        {"log_path": "no/log"},
        "Logger error: Failed to open target file: No such file or directory (os error 2)",
    ),
    (
        "PUT",
        "/metrics",
        {"metrics_path": "no/metrics"},
        (
            "Metrics error: Cannot initialize the metrics system due to bad user input: "
            "No such file or directory (os error 2)"
        ),
    ),
    ("PUT", "/drives/a-b", "{}", "API Resource IDs can only contain alphanumeric characters and underscores."),
    ("PUT", "/drives/", "{}", "The ID cannot be empty."),
    ("PUT", "/drives", "{}", "The ID cannot be empty."),
    ("PUT", "/drives/x", "{}", f"{BAD_JSON}missing field `drive_id` at line 1 column 2."),
    (
        "PUT",
        "/drives/x",
        {"drive_id": "y", "is_root_device": False},
        "The id from the path does not match the id from the body!",
    ),
    (
        "PUT",
        "/drives/x",
        {"drive_id": "x", "is_root_device": False},
        "Drive config error: Unable to create the virtio block device: Invalid block config.",
    ),
    (
        "PUT",
        "/drives/x",
        {"drive_id": "x", "is_root_device": False, "path_on_host": "none"},
        (
            "Drive config error: Unable to create the virtio block device: Virtio backend error: "
            "Error manipulating the backing file: No such file or directory (os error 2) none"
        ),
    ),
    (
        "PUT",
        "/drives/x",
        {"drive_id": "x", "is_root_device": False, "rate_limiter": {"bandwidth": {"size": 1}}},
        f"{BAD_JSON}missing field `refill_time` at line 1 column 84.",
    ),
    (
        "PUT",
        "/drives/x",
        {"drive_id": "x", "is_root_device": False, "rate_limiter": {"width": {}}},
        f"{BAD_JSON}unknown field `width`, expected `bandwidth` or `ops` at line 1 column 67.",
    ),
    (
        "PUT",
        "/network-interfaces/eth0",
        {"iface_id": "eth1", "host_dev_name": "tap0"},
        "The id from the path [eth0] does not match the id from the body [eth1]!",
    ),
    (
        "PUT",
        "/boot-source",
        {"kernel_image_path": "none"},
        "Boot source error: The kernel file cannot be opened: No such file or directory (os error 2)",
    ),
    (
        "PUT",
        "/vsock",
        {"guest_cid": 3, "uds_path": "no/ch"},
        (
            "Vsock config error: Cannot create backend for vsock device: Error binding to the host-side Unix socket: "
            "No such file or directory (os error 2)"
        ),
    ),
    (
        "PUT",
        "/snapshot/load",
        {"snapshot_path": "state"},
        f"{BAD_JSON}missing field: either `mem_backend` or `mem_file_path` is required.",
    ),
    (
        "PUT",
        "/snapshot/load",
        {
            "snapshot_path": "state",
            "mem_file_path": "memory",
            "mem_backend": {"backend_type": "File", "backend_path": "memory"},
        },
        f"{BAD_JSON}too many fields: either `mem_backend` or `mem_file_path` exclusively is required.",
    ),
    (
        "PUT",
        "/snapshot/load",
        {"snapshot_path": "state", "mem_backend": {"backend_type": "File"}},
        f"{BAD_JSON}missing field `backend_path` at line 1 column 66.",
    ),
    (
        "PUT",
        "/mmds/config",
        {"network_interfaces": []},
        "MMMDS config error: The list of network interface IDs that allow forwarding MMDS requests is empty.",
    ),
    ("PUT", "/actions", {"action_type": "FlushMetrics"}, EARLY),
    ("PUT", "/actions", {"action_type": "SendCtrlAltDel"}, EARLY),
    ("PATCH", "/vm", {"state": "Paused"}, EARLY),
    ("PUT", "/snapshot/create", {"snapshot_path": "state", "mem_file_path": "memory"}, EARLY),
    ("PATCH", "/drives/x", {"drive_id": "x", "path_on_host": "y"}, EARLY),
    ("DELETE", "/drives/x", None, EARLY),
    ("GET", "/balloon/statistics", None, EARLY),
    ("GET", "/balloon", None, "Balloon config error: No balloon device found."),
]

# Bytes that are no request, and what is wrong with them.
GARBLED: Final[list[tuple[bytes, str]]] = [
    (b"POST / HTTP/1.1\r\n\r\n", "Invalid HTTP Method: Unsupported HTTP method."),
    (b"GET / HTTP/2.0\r\n\r\n", "Invalid HTTP Version: Unsupported HTTP version."),
    (b"GET /\r\n\r\n", "Invalid request."),
    (b"GET  HTTP/1.1\r\n\r\n", "Invalid URI: Empty URI not allowed."),
    (b"\r\n\r\n", "Invalid request."),
    (b"GET /" + b"a" * 1100 + b" HTTP/1.1\r\n\r\n", "Invalid request."),
    (b"GET / HTTP/1.1\r\nbad\r\n\r\n", "Invalid header. Reason: Header is incorrectly formatted. Key: bad"),
    (
        b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
        "Invalid header. Reason: Invalid value. Key:Content-Length; Value: x",
    ),
    (
        b"GET / HTTP/1.1\r\nAccept-Encoding: identity;q=0\r\n\r\n",
        "Invalid header. Reason: Invalid value. Key:Accept-Encoding; Value:identity;q=0",
    ),
    (
        b"PUT /actions HTTP/1.1\r\nContent-Length: 51201\r\n\r\n",
        "Request payload with size 51201 is larger than the limit of 51200 allowed by server.",
    ),
    (b"PUT /actions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", "Invalid request."),
    (b"GET /version HTTP/1.1\r\n\r\nPOST / HTTP/1.1\r\n\r\n", "Invalid HTTP Method: Unsupported HTTP method."),
]

# After a start.
REFUSED_LATER: Final[list[tuple[str, str, object, str]]] = [
    ("PUT", "/actions", {"action_type": "InstanceStart"}, LATE),
    ("PUT", "/machine-config", {"vcpu_count": 1, "mem_size_mib": 128}, LATE),
    ("PATCH", "/machine-config", {"vcpu_count": 1}, LATE),
    ("PUT", "/boot-source", {"kernel_image_path": "kernel"}, LATE),
    ("PUT", "/vsock", {"guest_cid": 3, "uds_path": "other"}, LATE),
    ("PUT", "/logger", {"level": "Info"}, LATE),
    ("PUT", "/metrics", {"metrics_path": "metrics"}, LATE),
    ("PUT", "/serial", {"serial_out_path": "other"}, LATE),
    ("PUT", "/entropy", {}, LATE),
    ("PUT", "/snapshot/load", {"snapshot_path": "state", "mem_file_path": "memory"}, LATE),
    ("PUT", "/drives/z", {"drive_id": "z", "is_root_device": False, "path_on_host": "root"}, "PCI is not enabled"),
    ("DELETE", "/drives/root", None, "PCI is not enabled"),
    ("GET", "/mmds", None, "MMDS error: The MMDS data store is not initialized."),
    ("PUT", "/mmds", {"a": 1}, "MMDS error: The MMDS data store is not initialized."),
    ("GET", "/balloon", None, "Internal VMM error: Failed perform action on device: Device not found"),
    ("GET", "/hotplug/memory", None, "Internal VMM error: Failed perform action on device: Device not found"),
    (
        "PUT",
        "/snapshot/create",
        {"snapshot_path": "state", "mem_file_path": "memory"},
        (
            "Create snapshot error: Cannot save the microVM state: Operation not allowed: "
            "save/restore unavailable while running"
        ),
    ),
    (
        "PATCH",
        "/drives/image",
        {"drive_id": "image", "path_on_host": "none"},
        (
            "Drive config error: Unable to patch the block device: Block: Virtio backend error: Error manipulating the "
            "backing file: No such file or directory (os error 2) none Please verify the request arguments."
        ),
    ),
    (
        "PATCH",
        "/drives/none",
        {"drive_id": "none", "path_on_host": "image"},
        (
            "Drive config error: Unable to patch the block device: Failed perform action on device: Device not found "
            "Please verify the request arguments."
        ),
    ),
]

# Command lines of firecracker: words, exit status, reason, and the reason in a programmer's words.
FAILED_STARTS: Final[list[tuple[list[str], int, str, str]]] = [
    (
        ["--bogus"],
        153,
        (
            r"Arguments parsing error: Found argument 'bogus' which wasn't expected, or isn't valid in this context. "
            r"\n\nFor more information try --help."
        ),
        'ParseArguments(UnexpectedArgument("bogus"))',
    ),
    (
        ["--api-sock"],
        153,
        (
            r"Arguments parsing error: The argument 'api-sock' requires a value, but none was supplied. "
            r"\n\nFor more information try --help."
        ),
        'ParseArguments(MissingValue("api-sock"))',
    ),
    (
        ["--no-seccomp", "--seccomp-filter", "x"],
        153,
        (
            r"Arguments parsing error: Argument 'seccomp-filter' cannot be used together with argument 'no-seccomp'. "
            r"\n\nFor more information try --help."
        ),
        'ParseArguments(ForbiddenArgument("no-seccomp", "seccomp-filter"))',
    ),
    (
        ["--level", "loud"],
        152,
        (
            "Invalid value for logger level: Failed to parse string to level filter: loud."
            "Possible values: [Error, Warning, Info, Debug]"
        ),
        'InvalidLogLevel(LevelFilterFromStrError("loud"))',
    ),
    (
        ["--log-path", "no/log"],
        1,
        "Could not initialize logger: Failed to open target file: No such file or directory (os error 2)",
        (
            'LoggerInitialization(LoggerUpdateError(Os { code: 2, kind: NotFound, message: "No such file or '
            'directory" }))'
        ),
    ),
    (
        ["--api-sock", "no/api"],
        1,
        (
            "RunWithApiError error: Failed to bind and run the HTTP server: IO error: "
            "No such file or directory (os error 2)"
        ),
        (
            'RunWithApi(FailedToBindAndRunHttpServer(IOError(Os { code: 2, kind: NotFound, message: "No such file or '
            'directory" })))'
        ),
    ),
    (
        ["--api-sock", "stale"],
        1,
        "RunWithApiError error: Failed to open the API socket at: stale. Check that it is not already used.",
        'RunWithApi(FailedToBindSocket("stale"))',
    ),
    (
        ["--describe-snapshot", "none"],
        1,
        (
            "When printing Snapshot Data format: Unable to open snapshot state file: "
            "No such file or directory (os error 2)"
        ),
        ('PrintSnapshotDataFormat(OpenSnapshot(Os { code: 2, kind: NotFound, message: "No such file or directory" }))'),
    ),
    (
        ["--describe-snapshot", "stale"],
        1,
        (
            "When printing Snapshot Data format: Invalid data format version of snapshot file: "
            "IO Error: File too short to contain CRC"
        ),
        (
            'PrintSnapshotDataFormat(SnapshotVersion(Io(Custom { kind: UnexpectedEof, error: "File too short to '
            'contain CRC" })))'
        ),
    ),
]

# Command lines of jailer: words, and what it says.
FAILED_JAILS: Final[list[tuple[list[str], str]]] = [
    (
        ["--id", "a_b"],
        "Invalid instance ID: Invalid char (_) at position 1\nError: InvalidInstanceId(InvalidChar('_', 1))",
    ),
    (
        ["--id", "j", "--bogus"],
        (
            "Failed to parse arguments: Found argument 'bogus' which wasn't expected, or isn't valid in this context.\n"
            'Error: ArgumentParsing(UnexpectedArgument("bogus"))'
        ),
    ),
    (
        [],
        (
            "Failed to parse arguments: Argument 'id' required, but not found.\n"
            'Error: ArgumentParsing(MissingArgument("id"))'
        ),
    ),
    (["--id", "j", "--cgroup", "foo"], 'Invalid format for cgroups: foo\nError: CgroupFormat("foo")'),
    (
        ["--id", "j", "--cgroup", "nope.max=1"],
        'Controller nope is unavailable\nError: CgroupControllerUnavailable("nope")',
    ),
    (
        ["--id", "j", "--parent-cgroup", "/abs"],
        (
            "Parent cgroup path is invalid. Path should not be absolute or contain '..' or '.'\n"
            "Error: CgroupInvalidParentPath"
        ),
    ),
    (
        ["--id", "j", "--resource-limit", "foo=1"],
        'Invalid resource argument: foo\nError: ResLimitArgument("foo")',
    ),
    (
        ["--id", "j", "--resource-limit", "no-file=x"],
        (
            "Invalid limit value for resource: x: invalid digit found in string\n"
            'Error: ResLimitValue("x", "invalid digit found in string")'
        ),
    ),
    (
        ["--id", "j", "--netns", "/nope"],
        (
            "Failed to open file /nope: No such file or directory (os error 2)\n"
            'Error: FileOpen("/nope", Os { code: 2, kind: NotFound, message: "No such file or directory" })'
        ),
    ),
]
