"""The exec rules on the double: the real guestd over a socket pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from exec_rules import *  # noqa: F403 - the suite

from fireclaw.machines.channel import Channel
from fireclaw.testing.guest import LocalGuest
from fireclaw.wire.hello import new_magic

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@pytest.fixture
async def channel() -> AsyncIterator[Channel]:
    """A session with the double."""
    with LocalGuest() as guest:
        channel = await Channel.open(guest.connect(), new_magic())
        yield channel
        await channel.aclose()
