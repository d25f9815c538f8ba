"""The rate at which an upstream is asked: order, bound, and who leaves."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.errors import UpstreamUnavailable
from proxy.upstream.rate import Rate
from tests.blackbox.private import Clock, movable_clock


async def settle() -> None:
    """What can go on goes on."""
    for _ in range(10):
        await asyncio.sleep(0)


class Asking:
    """Callers in their order, and when each had its turn."""

    def __init__(self, rate: Rate) -> None:
        self._rate = rate
        self.done: list[int] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def more(self, count: int) -> None:
        for _ in range(count):
            self.tasks.append(asyncio.create_task(self._ask(len(self.tasks))))
        await settle()

    async def _ask(self, number: int) -> None:
        with suppress(UpstreamUnavailable):
            await self._rate.turn()
            self.done.append(number)

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def advance(clock: Clock, seconds: float) -> None:
    clock.advance(seconds)
    await settle()


async def test_a_burst_and_then_one_after_the_other() -> None:
    with movable_clock() as clock:
        asking = Asking(Rate("registry.test", 2.0, 3))
        await asking.more(6)
        assert asking.done == [0, 1, 2]
        await advance(clock, 0.5)
        assert asking.done == [0, 1, 2, 3]
        await advance(clock, 1.0)
        assert asking.done == [0, 1, 2, 3, 4, 5]
        await advance(clock, 60)
        await asking.more(5)
        assert asking.done == [*range(9)], "no more than the burst, however long the pause"
        await asking.stop()


async def test_without_a_burst_it_is_twice_the_rate_and_one_at_least() -> None:
    with movable_clock():
        for per_second, burst in ((5.0, 10), (0.1, 1)):
            asking = Asking(Rate("registry.test", per_second, None))
            await asking.more(20 if burst == 10 else 2)
            assert len(asking.done) == burst
            await asking.stop()


async def test_without_a_rate_nobody_waits() -> None:
    asking = Asking(Rate("registry.test", None, None))
    await asking.more(1000)
    assert len(asking.done) == 1000


async def test_who_would_wait_too_long_is_told_at_once() -> None:
    with movable_clock() as clock:
        rate = Rate("registry.test", 1.0, 1)
        asking = Asking(rate)
        await asking.more(21)
        with pytest.raises(UpstreamUnavailable, match=r"registry\.test .*requestsPerSecond") as caught:
            await rate.turn()
        assert (caught.value.status, caught.value.headers) == (503, {"Retry-After": "1"})
        await advance(clock, 1)
        await asking.more(1)
        assert not asking.tasks[-1].done()
        await asking.stop()


async def test_who_leaves_while_it_waits_costs_the_others_nothing() -> None:
    with movable_clock() as clock:
        asking = Asking(Rate("registry.test", 1.0, 1))
        await asking.more(4)
        asking.tasks[1].cancel()
        await settle()
        await advance(clock, 1)
        assert asking.done == [0, 2]
        await asking.stop()


async def test_who_leaves_in_the_moment_of_its_turn_gives_it_to_the_next() -> None:
    with movable_clock() as clock:
        rate = Rate("registry.test", 1.0, 1)
        asking = Asking(rate)
        await asking.more(3)
        clock.advance(1)
        rate._let_go()
        asking.tasks[1].cancel()
        await settle()
        assert asking.done == [0, 2]
        await asking.stop()


async def test_nobody_overtakes_those_who_wait() -> None:
    """A newcomer in the moment in which there is a turn, and before it was given."""
    with movable_clock() as clock:
        asking = Asking(Rate("registry.test", 1.0, 1))
        await asking.more(2)
        clock.advance(1)
        asking.tasks.append(asyncio.ensure_future(asking._ask(2)))
        await settle()
        assert asking.done == [0, 1]
        await asking.stop()


@settings(max_examples=100, deadline=None)
@given(
    rate=st.floats(0.5, 50),
    burst=st.integers(1, 5),
    steps=st.lists(st.tuples(st.integers(0, 5), st.floats(0, 3), st.integers(0, 30)), max_size=15),
)
def test_never_more_than_the_rate_and_all_in_order(rate: float, burst: int, steps: list[tuple[int, float, int]]) -> None:
    async def run() -> None:
        with movable_clock() as clock:
            start = asyncio.get_running_loop().time()
            asking = Asking(Rate("registry.test", rate, burst))
            for count, seconds, leaves in steps:
                await asking.more(count)
                if leaves < len(asking.tasks):
                    asking.tasks[leaves].cancel()
                await advance(clock, seconds)
                passed = asyncio.get_running_loop().time() - start
                assert asking.done == sorted(asking.done)
                assert len(asking.done) <= burst + passed * rate + 1e-6
            for _ in asking.tasks:
                await advance(clock, 60)
            assert all(task.done() for task in asking.tasks)
            await asking.stop()

    asyncio.run(run())
