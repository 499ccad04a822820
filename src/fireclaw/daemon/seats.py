"""An agent's seat on IRC (``fireclaw.agents.ports.Voice``). Its hands are in ``hands.py``."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from fireclaw.errors import IrcError
from fireclaw.irc.client import IrcClient
from fireclaw.irc.events import Message, Ready
from fireclaw.irc.ngircd import AGENTS
from fireclaw.irc.session import Identity

if TYPE_CHECKING:
    from collections.abc import Callable

    from fireclaw.agents.ports import Delivery
    from fireclaw.irc.client import ServerAddress
    from fireclaw.irc.events import Event
    from fireclaw.irc.message import Kind
    from fireclaw.irc.overseer import Overseer

log = logging.getLogger(__name__)


class Seat:
    """An agent's nick on IRC (``fireclaw.agents.ports.Voice``).

    Args:
        server: where to.
        nick: the agent's name.
        on_message: called with what people say.
        overseer: frees the nick where a dead connection still holds it.
    """

    def __init__(
        self, server: ServerAddress, nick: str, on_message: Callable[[Message], None], overseer: Overseer | None
    ) -> None:
        self._nick = nick
        self._on_message = on_message
        self._overseer = overseer
        self._freeing: set[asyncio.Task[None]] = set()
        self._client = IrcClient(
            server, Identity(nick, "agent", f"{nick}, an agent of Fireclaw"), handler=self._on_event, channels=[AGENTS]
        )
        self._client.start()

    async def say(
        self, target: str, text: str, kind: Kind, *, before_send: Callable[[], None] | None = None
    ) -> Delivery:
        """Queue a line."""
        return await self._client.say(target, text, kind, before_send=before_send)

    async def wait_ready(self) -> None:
        """Wait until it is connected.

        Raises:
            IrcError: the server refused it for good.
            ConnectionError: it was closed.
        """
        await self._client.wait_ready()

    async def quit(self, reason: str) -> None:
        """Say goodbye and close."""
        for task in self._freeing:
            task.cancel()
        await asyncio.gather(*self._freeing, return_exceptions=True)
        await self._client.quit(reason)

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Message):
            self._on_message(event)
        elif isinstance(event, Ready):
            self._client.mode(event.nick, "+B")
            if event.nick != self._nick and self._overseer is not None:
                task = asyncio.create_task(self._free_nick(self._overseer), name=f"free {self._nick}")
                self._freeing.add(task)
                task.add_done_callback(self._freeing.discard)

    async def _free_nick(self, overseer: Overseer) -> None:
        try:
            await overseer.free_nick(self._nick)
        except (IrcError, ConnectionError, TimeoutError) as error:
            log.info("the nick %s is not free yet: %s", self._nick, error)  # the client asks again every minute
        else:
            self._client.regain_nick()
