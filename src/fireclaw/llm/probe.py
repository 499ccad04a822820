"""Whether a server answers, asked without any client library: those take up to three seconds to import."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit


async def answers(url: str, path: str, *, seconds: float) -> bool:
    """Whether ``GET path`` is answered with 200 within the time.

    Args:
        url: scheme, host and port.
        path: the path.
        seconds: for all of it.
    """
    parts = urlsplit(url)
    is_https = parts.scheme == "https"
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(
                parts.hostname, parts.port or (443 if is_https else 80), ssl=is_https or None
            )
            try:
                writer.write(f"GET {path} HTTP/1.1\r\nHost: {parts.hostname}\r\nConnection: close\r\n\r\n".encode())
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError):  # ValueError: a line without an end
        return False
