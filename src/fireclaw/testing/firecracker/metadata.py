"""The metadata of a microVM (MMDS): one JSON value of limited size, replaced or merged."""

from __future__ import annotations

from typing import Any, Final

from fireclaw.testing.firecracker.http import compact
from fireclaw.testing.firecracker.routes import Refusal

NO_METADATA: Final = "MMDS error: The MMDS data store is not initialized."


class Metadata:
    """The metadata.

    Args:
        limit: bytes of it as compact JSON.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._value: Any = None

    @property
    def shown(self) -> Any:
        """What is answered when it is asked for."""
        return {} if self._value is None else self._value

    def put(self, value: Any) -> None:
        """Replace it.

        Raises:
            Refusal: it is too long.
        """
        if len(compact(value)) > self._limit:
            raise Refusal("MMDS limit exceeded error: The MMDS patch request doesn't fit.", status=413)
        self._value = value

    def patch(self, value: Any) -> None:
        """Merge a patch into it.

        Raises:
            Refusal: there is nothing yet, or it becomes too long.
        """
        if self._value is None:
            raise Refusal(NO_METADATA)
        self.put(_merge(self._value, value))


def _merge(old: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7396)."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merge(merged.get(name), value)
    return merged
