"""Serves the API on a unix socket with uvicorn's HTTP protocol, on the daemon's own loop.

uvicorn's ``Server`` is left out: it would poll ten times a second and take over the signals. Its protocol is used as
it is, with one addition: the *hang-up watch*. A client whose input waits to be read (its command reads no stdin) has
its connection paused, and a paused connection does not notice that the client died. The watch does.
"""

from __future__ import annotations

import asyncio
import logging
import select
from typing import TYPE_CHECKING, Any

from uvicorn.config import Config as UvicornConfig
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

if TYPE_CHECKING:
    import socket

    from starlette.types import ASGIApp

_GRACE_S = 10.0  # for open requests to end after they were told to

log = logging.getLogger(__name__)


class ApiServer:
    """Serves an ASGI application on a bound, listening unix socket.

    ::

        server = ApiServer(app, listener)
        await server.start()
        ...
        await server.aclose()
    """

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        self._listener = listener
        self._state = ServerState()
        self._config = UvicornConfig(app, http=_Protocol, ws="none", lifespan="off", access_log=False, log_config=None)
        self._server: asyncio.Server | None = None
        self._hang_ups: _HangUps | None = None

    async def start(self) -> None:
        """Begin to serve; connections that wait already are served too."""
        loop = asyncio.get_running_loop()
        hang_ups = self._hang_ups = _HangUps(loop)
        self._config.load()
        self._server = await loop.create_unix_server(
            lambda: _Protocol(self._config, self._state, {}, loop, hang_ups=hang_ups), sock=self._listener
        )

    async def aclose(self) -> None:
        """Stop listening, let open requests end within a bounded time, and close every connection."""
        assert self._server is not None
        assert self._hang_ups is not None
        self._server.close()
        for connection in list(self._state.connections):
            connection.shutdown()
        if self._state.tasks:
            _, late = await asyncio.wait(self._state.tasks, timeout=_GRACE_S)
            for task in late:
                log.warning("a request did not end in %.0f s and is cancelled", _GRACE_S)
                task.cancel()
            if late:
                await asyncio.wait(late)
        for connection in list(self._state.connections):
            connection.transport.close()
        self._hang_ups.close()


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol, whose requests can wait for their client to be gone: ``scope["state"]["gone"]``."""

    def __init__(
        self,
        config: UvicornConfig,
        server_state: ServerState,
        app_state: dict[str, Any],
        loop: asyncio.AbstractEventLoop,
        *,
        hang_ups: _HangUps,
    ) -> None:
        super().__init__(config, server_state, app_state, loop)
        self._hang_ups = hang_ups
        self._gone = asyncio.Event()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        self._hang_ups.watch(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._hang_ups.forget(self.transport)
        self._gone.set()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["state"]["gone"] = self._gone


class _HangUps:
    """Aborts connections whose other end is closed, paused or not.

    An epoll of its own, which the loop watches. It asks for no event: a hang-up is always reported, readable bytes
    never, so input that waits does not wake it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._transports: dict[int, asyncio.Transport] = {}
        loop.add_reader(self._epoll.fileno(), self._abort)

    def watch(self, transport: asyncio.Transport) -> None:
        descriptor = transport.get_extra_info("socket").fileno()
        self._transports[descriptor] = transport
        self._epoll.register(descriptor, select.EPOLLONESHOT)

    def forget(self, transport: asyncio.Transport) -> None:
        descriptor = transport.get_extra_info("socket").fileno()
        if self._transports.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def close(self) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()

    def _abort(self) -> None:
        for descriptor, _ in self._epoll.poll(0):
            self._transports[descriptor].abort()
