"""Who may call the model next."""

from __future__ import annotations

import asyncio

import pytest

from fireclaw.llm.queue import FairQueue


class Crowd:
    """Callers of a queue, each inside until it is told to leave."""

    def __init__(self, limit: int) -> None:
        self.queue = FairQueue(limit)
        self.entered: list[str] = []
        self._leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str) -> None:
        """Join the queue as the agent that the name's first letter tells."""
        self._leave[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._stay(name), name=name)
        await asyncio.sleep(0)

    async def leave(self, name: str) -> None:
        """Go out, and let the next one in."""
        self._leave[name].set()
        await self.tasks[name]
        await asyncio.sleep(0)

    async def _stay(self, name: str) -> None:
        async with self.queue.place(name[0]):
            self.entered.append(name)
            await self._leave[name].wait()


async def test_agents_take_turns() -> None:
    """An agent with many calls does not keep out one with a single call."""
    crowd = Crowd(1)
    for name in ("a1", "a2", "a3", "b1", "c1"):
        await crowd.come(name)
    assert (crowd.queue.running, crowd.queue.waiting) == (1, 4)
    for name in ("a1", "a2", "b1", "c1", "a3"):
        assert crowd.entered[-1] == name
        await crowd.leave(name)
    assert (crowd.queue.running, crowd.queue.waiting) == (0, 0)


async def test_no_more_than_the_limit_are_inside() -> None:
    """The limit holds, and a place that becomes free is given on."""
    crowd = Crowd(2)
    for name in ("a1", "b1", "c1"):
        await crowd.come(name)
    assert crowd.entered == ["a1", "b1"]
    await crowd.leave("a1")
    assert crowd.entered == ["a1", "b1", "c1"]
    await crowd.leave("b1")
    await crowd.leave("c1")


async def test_one_who_gives_up_waiting_takes_no_place() -> None:
    """A cancelled caller leaves the line, and the next one is let in."""
    crowd = Crowd(1)
    for name in ("a1", "b1", "c1"):
        await crowd.come(name)
    crowd.tasks["b1"].cancel()
    with pytest.raises(asyncio.CancelledError):
        await crowd.tasks["b1"]
    await crowd.leave("a1")
    assert crowd.entered == ["a1", "c1"]
    await crowd.leave("c1")
    assert crowd.queue.waiting == 0


async def test_one_who_is_cancelled_just_as_it_is_let_in_gives_its_place_back() -> None:
    """A place granted to a caller that is already cancelled is not lost."""
    queue = FairQueue(1)
    entered: list[str] = []

    async def stay(name: str) -> None:
        async with queue.place(name):
            entered.append(name)

    async with queue.place("a"):
        second = asyncio.create_task(stay("b"), name="b")
        third = asyncio.create_task(stay("c"), name="c")
        await asyncio.sleep(0)
    second.cancel()  # it has been granted the place just now, and has not run yet
    await asyncio.wait([second, third])
    assert second.cancelled()
    assert entered == ["c"]
    assert queue.running == 0


async def test_a_body_that_fails_gives_its_place_back() -> None:
    """An exception inside passes through and frees the place."""
    queue = FairQueue(1)
    with pytest.raises(ValueError, match="no"):
        async with queue.place("a"):
            raise ValueError("no")
    assert queue.running == 0


async def test_the_place_in_the_line_is_known() -> None:
    """It counts the agents that come first, as each of them gets one call before; who gave up does not wait."""
    crowd = Crowd(1)
    for name in ("a1", "b1", "b2", "c1"):
        await crowd.come(name)
    assert [crowd.queue.position(who) for who in "abcd"] == [0, 1, 2, 0]
    await crowd.leave("a1")
    assert [crowd.queue.position(who) for who in "bc"] == [2, 1]
    crowd.tasks["c1"].cancel()
    with pytest.raises(asyncio.CancelledError):
        await crowd.tasks["c1"]
    assert crowd.queue.position("c") == 0
    for name in ("b1", "b2"):
        await crowd.leave(name)
