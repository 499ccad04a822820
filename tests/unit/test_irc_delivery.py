"""The fate of messages: what is confirmed by which PONG, and what a lost connection leaves."""

from __future__ import annotations

import asyncio

import pytest

from fireclaw.irc.delivery import Confirmations, Delivery


def stations(delivery: Delivery) -> tuple[bool, ...]:
    """Whether it is sent, and whether it is confirmed."""
    return tuple(each.done() and each.exception() is None for each in (delivery._sent, delivery._confirmed))


async def test_a_pong_confirms_what_went_before_its_ping() -> None:
    """One PING is out at a time, and its PONG asks for the rest."""
    confirmations = Confirmations()
    one, two, three = Delivery(), Delivery(), Delivery()
    assert confirmations.add(one) == b"PING :said1\r\n"
    assert confirmations.add(two) == b""
    assert confirmations.add(three) == b""
    assert confirmations.take("said1") == b"PING :said3\r\n"
    assert [stations(each)[1] for each in (one, two, three)] == [True, False, False]
    assert confirmations.take("said3") == b""
    assert [stations(each)[1] for each in (one, two, three)] == [True, True, True]
    assert confirmations.last is None


@pytest.mark.parametrize("token", ["alive", "said", "saidx", "said²", "kill1", ""])
async def test_other_pongs_confirm_nothing(token: str) -> None:
    """Only our own tokens count."""
    confirmations = Confirmations()
    delivery = Delivery()
    confirmations.add(delivery)
    assert confirmations.take(token) == b""
    assert stations(delivery) == (False, False)


async def test_a_lost_connection_leaves_messages_sent() -> None:
    """What was being written may have been seen: it is sent, its confirmation fails, and a new PING can follow."""
    confirmations = Confirmations()
    delivery = Delivery()
    confirmations.add(delivery)
    confirmations.fail(ConnectionError("gone"))
    await delivery.sent
    with pytest.raises(ConnectionError, match="gone"):
        await delivery.confirmed
    assert confirmations.add(Delivery()) == b"PING :said2\r\n"


async def test_a_fate_does_not_change() -> None:
    """What has failed stays failed, what is confirmed stays confirmed."""
    failed, confirmed = Delivery(), Delivery()
    failed.fail(ConnectionError("gone"))
    failed.mark_sent()
    failed.mark_confirmed()
    confirmed.mark_sent()
    confirmed.mark_confirmed()
    confirmed.fail(ConnectionError("gone"))
    assert (stations(failed), stations(confirmed)) == ((False, False), (True, True))


async def test_settling_waits_for_any_fate() -> None:
    """Who only wants to know that it is over hears no error."""
    delivery = Delivery()
    settling = asyncio.create_task(delivery.settle(10), name="settle")
    delivery.fail(ConnectionError("gone"))
    await settling
    await Delivery().settle(0)
