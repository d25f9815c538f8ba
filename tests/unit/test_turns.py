"""Waiting in turn: so many of one name at once, whatever others do, and nothing kept of who has left."""

from __future__ import annotations

import asyncio

import pytest

from proxy.access.turns import Turns


class Crowd:
    """Those who want a turn, and how many are within."""

    def __init__(self) -> None:
        self.turns = Turns()
        self.inside: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.leave = asyncio.Event()

    async def enter(self, name: str, at_once: int = 2) -> None:
        async with self.turns.of(name, at_once):
            self.inside[name] = self.inside.get(name, 0) + 1
            self.most[name] = max(self.most.get(name, 0), self.inside[name])
            try:
                await self.leave.wait()
                await asyncio.sleep(0)
            finally:
                self.inside[name] -= 1


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_so_many_of_a_name_at_once_and_all_in_the_end() -> None:
    crowd = Crowd()
    tasks = [asyncio.ensure_future(crowd.enter(name)) for name in ("a", "b", "") for _ in range(10)]
    await settle()
    assert crowd.inside == {"a": 2, "b": 2, "": 10}
    crowd.leave.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*tasks)
    assert crowd.most == {"a": 2, "b": 2, "": 10}


@pytest.mark.parametrize("who", ["within", "waiting"])
async def test_who_is_cancelled_leaves_his_place_to_the_next(who: str) -> None:
    crowd = Crowd()
    tasks = [asyncio.ensure_future(crowd.enter("a", 1)) for _ in range(3)]
    await settle()
    tasks[0 if who == "within" else 1].cancel()
    await settle()
    assert crowd.inside == {"a": 1}
    crowd.leave.set()
    async with asyncio.timeout(10):
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes].count(asyncio.CancelledError) == 1
    assert crowd.most == {"a": 1}


async def test_nothing_is_kept_of_who_has_left() -> None:
    crowd = Crowd()
    crowd.leave.set()
    for number in range(10):
        await crowd.enter(str(number))
    assert crowd.turns._queues == {}
