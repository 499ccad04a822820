"""From a request to what it asks for: path, method, id, body; or to the refusal that it earns before anybody acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fireclaw.testing.firecracker.bodies import BODIES, SINCE
from fireclaw.testing.firecracker.json_reader import BodyError, Scalar, read

if TYPE_CHECKING:
    from fireclaw.testing.firecracker.http import Request
    from fireclaw.testing.firecracker.json_reader import Version

_LOAD: Final = "PUT /snapshot/load"
# First word of a path: what its id is called.
_IDS: Final = {"drives": "drive_id", "network-interfaces": "iface_id", "pmem": "id"}
# What the words behind the first one may be; others are refused in the same way as unknown paths, or in their own.
_SECOND: Final = {
    "snapshot": {"create", "load"},
    "hotplug": {"memory"},
    "vm": {"", "config"},
    "balloon": {"", "statistics"},
    "mmds": {"", "config"},
}
_EMPTY: Final = {
    "PUT": "Empty PUT request.",
    "PATCH": "Empty PATCH request.",
    "GET": "GET request cannot have a body.",
    "DELETE": "Empty Delete request.",
}
_WITHOUT_BODY: Final = frozenset(
    {"GET /", "GET /version", "GET /vm/config", "GET /machine-config", "GET /mmds", "GET /balloon"}
    | {"GET /balloon/statistics", "GET /hotplug/memory"}
    | {f"DELETE /{first}/{{{name}}}" for first, name in _IDS.items()}
)


class Refusal(Exception):  # noqa: N818 - an answer like others, and no mishap
    """The request is refused.

    Attributes:
        status: of the answer.
        fatal: the process is beyond recovery and ends after the answer.
    """

    def __init__(self, text: str, *, status: int = 400, fatal: bool = False) -> None:
        super().__init__(text)
        self.status = status
        self.fatal = fatal


@dataclass(frozen=True)
class Call:
    """What a request asks for.

    Attributes:
        endpoint: e.g. ``"PUT /drives/{drive_id}"``.
        id: the id of the path.
        body: the body, read; absent fields have their defaults.
        deprecated: what of it is deprecated, in words for the log; empty for nothing.
    """

    endpoint: str
    id: str = ""
    body: Any = None
    deprecated: str = ""


def parse(request: Request, version: Version) -> Call:
    """Find out what a request asks for.

    Raises:
        Refusal: nothing that this version knows, or not rightly.
    """
    words = request.path.lstrip("/").split("/")
    first, second = words[0], words[1] if len(words) > 1 else ""
    endpoint = _endpoint(request.method, first, second, version)
    has_body = request.body is not None
    if has_body == (request.method in ("GET", "DELETE")):
        raise Refusal(_EMPTY[request.method])
    if endpoint is None:
        raise Refusal(f"Invalid request method and/or path: {request.method} {first}.")
    if first in _IDS:
        _check_id(second)
    if request.body is None:
        return Call(endpoint, second)
    body = _read(request.body, endpoint, version)
    if first in _IDS:
        _check_same(first, second, body[_IDS[first]])
    if endpoint == "PATCH /machine-config" and not any(value is not None for value in body.values()):
        raise Refusal(_EMPTY["PATCH"])
    if endpoint == _LOAD:
        _check_backend(body)
    return Call(endpoint, second, body, _find_deprecated(endpoint, body))


def _endpoint(method: str, first: str, second: str, version: Version) -> str | None:
    """The endpoint's name, or None for an unknown path."""
    if first in SINCE and version < SINCE[first]:
        return None
    allowed = _SECOND.get(first)
    if allowed is not None and second not in allowed:
        raise Refusal(_unknown_second(method, first, second))
    if first in _IDS:
        path = f"/{first}/{{{_IDS[first]}}}"
    else:
        path = f"/{first}/{second}" if allowed and second else f"/{first}"
    endpoint = f"{method} {path}"
    known = endpoint in BODIES or endpoint in _WITHOUT_BODY or endpoint in ("PUT /mmds", "PATCH /mmds")
    return endpoint if known else None


def _unknown_second(method: str, first: str, second: str) -> str:
    if first == "snapshot":
        where = f"/snapshot/{second}"
        return (
            f"Invalid request method and/or path: {method} {where}." if second else "Missing snapshot operation type."
        )
    if first in ("balloon", "mmds"):
        return f"Unrecognized {method} request path `{second}`."
    return f"Invalid request method and/or path: {method} {first}."


def _check_id(word: str) -> None:
    if not word:
        raise Refusal("The ID cannot be empty.")
    if not all(letter == "_" or letter.isalnum() for letter in word):
        raise Refusal("API Resource IDs can only contain alphanumeric characters and underscores.")


def _check_same(first: str, path_id: str, body_id: str) -> None:
    if path_id == body_id:
        return
    if first == "network-interfaces":
        raise Refusal(f"The id from the path [{path_id}] does not match the id from the body [{body_id}]!")
    raise Refusal("The id from the path does not match the id from the body!")


def _read(raw: bytes, endpoint: str, version: Version) -> Any:
    try:
        return read(raw, BODIES.get(endpoint, Scalar("any")), version)
    except BodyError as error:
        raise _unreadable(str(error)) from None


def _unreadable(text: str) -> Refusal:
    return Refusal(f"An error occurred when deserializing the json body of a request: {text}.")


def _check_backend(body: dict[str, Any]) -> None:
    if body["mem_backend"] and body["mem_file_path"]:
        raise _unreadable("too many fields: either `mem_backend` or `mem_file_path` exclusively is required")
    if not body["mem_backend"] and not body["mem_file_path"]:
        raise _unreadable("missing field: either `mem_backend` or `mem_file_path` is required")


def _find_deprecated(endpoint: str, body: Any) -> str:
    match endpoint:
        case "PUT /machine-config" | "PATCH /machine-config" if body["cpu_template"] is not None:
            return f"{endpoint}: cpu_template field is deprecated."
        case "PUT /vsock" if body["vsock_id"] is not None:
            return f"{endpoint}: vsock_id field is deprecated."
        case "PUT /mmds/config" if body["version"] == "V1":
            return f"{endpoint}: V1 is deprecated. Use V2 instead."
        case "PUT /snapshot/load" if body["mem_file_path"] is not None or body["enable_diff_snapshots"]:
            return f"{endpoint}: mem_file_path and enable_diff_snapshots fields are deprecated."
        case _:
            return ""
