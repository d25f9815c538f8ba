"""Fetched values: kept as long as they may be, renewed ahead of their end, fetched once for all, and failures remembered."""

from __future__ import annotations

import asyncio
import traceback

import pytest

from proxy.credentials.ahead import Ahead
from tests.unit.clock import Clock


class Source:
    """Gives 1, 2, 3 and so on, each for ``seconds``; fails with ``failure`` if there is one; waits for ``go_on``."""

    def __init__(self, seconds: float = 100) -> None:
        self.seconds = seconds
        self.asked = 0
        self.cancelled = 0
        self.failure: Exception | None = None
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def __call__(self) -> tuple[int, float]:
        self.asked += 1
        number = self.asked
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failure is not None:
            raise self.failure
        return number, self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ahead(clock: Clock) -> Ahead[str, int]:
    return Ahead(4, clock)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_value_is_kept_for_its_life(ahead: Ahead[str, int], clock: Clock) -> None:
    source = Source()
    assert [await ahead.get("key", source) for _ in range(3)] == [1, 1, 1]
    clock.now += 100
    assert await ahead.get("key", source) == 2


async def test_keys_are_apart(ahead: Ahead[str, int]) -> None:
    source = Source()
    assert [await ahead.get(key, source) for key in ("a", "b", "a")] == [1, 2, 1]


@pytest.mark.parametrize("seconds", [0, -1])
async def test_what_has_no_life_is_given_once(ahead: Ahead[str, int], seconds: float) -> None:
    source = Source(seconds)
    assert [await ahead.get("key", source) for _ in range(3)] == [1, 2, 3]


async def test_the_memory_is_bounded(ahead: Ahead[str, int]) -> None:
    source = Source()
    for key in "abcde":
        await ahead.get(key, source)
    assert await ahead.get("e", source) == 5
    assert await ahead.get("a", source) == 6


async def test_fifty_callers_share_one_fetch(ahead: Ahead[str, int]) -> None:
    for seconds in (100, 0):
        source = Source(seconds)
        source.go_on.clear()
        callers = [asyncio.ensure_future(ahead.get(str(seconds), source)) for _ in range(50)]
        await turns()
        source.go_on.set()
        assert await asyncio.gather(*callers) == [1] * 50


async def test_a_fetch_goes_on_when_its_caller_leaves(ahead: Ahead[str, int]) -> None:
    source = Source()
    source.go_on.clear()
    caller = asyncio.ensure_future(ahead.get("key", source))
    await turns()
    caller.cancel()
    source.go_on.set()
    await turns()
    assert await ahead.get("key", source) == 1
    assert source.asked == 1


async def test_a_value_is_renewed_behind_its_use(ahead: Ahead[str, int], clock: Clock) -> None:
    source = Source()
    await ahead.get("key", source)
    clock.now += 79.9
    assert await ahead.get("key", source) == 1
    await turns()
    assert source.asked == 1, "not before 80 % of its life are over"
    clock.now += 0.1
    source.go_on.clear()
    tasks = len(asyncio.all_tasks())
    assert [await ahead.get("key", source) for _ in range(50)] == [1] * 50
    await turns()
    assert source.asked == 2, "the old value is given meanwhile, and one renewal runs"
    assert len(asyncio.all_tasks()) <= tasks + 2, "not one for each who used it"
    source.go_on.set()
    await turns()
    assert await ahead.get("key", source) == 2
    clock.now += 79.9
    assert await ahead.get("key", source) == 2, "its life began when it was fetched"


async def test_who_comes_after_the_end_waits_for_the_renewal_that_runs(ahead: Ahead[str, int], clock: Clock) -> None:
    source = Source()
    await ahead.get("key", source)
    clock.now += 90
    source.go_on.clear()
    await ahead.get("key", source)
    await turns()
    clock.now += 10
    caller = asyncio.ensure_future(ahead.get("key", source))
    await turns()
    assert not caller.done()
    source.go_on.set()
    assert await caller == 2
    assert source.asked == 2


async def test_a_renewal_that_says_not_to_keep_ends_the_old_value(ahead: Ahead[str, int], clock: Clock) -> None:
    source = Source()
    await ahead.get("key", source)
    clock.now += 90
    source.seconds = 0
    assert await ahead.get("key", source) == 1
    await turns()
    assert await ahead.get("key", source) == 3


async def test_a_failing_renewal_keeps_the_old_value_and_is_tried_each_10_s(ahead: Ahead[str, int], clock: Clock) -> None:
    source = Source()
    await ahead.get("key", source)
    source.failure = ValueError("down")
    clock.now += 80
    for _ in range(5):
        assert await ahead.get("key", source) == 1
        await turns()
    assert source.asked == 2
    clock.now += 9.9
    assert await ahead.get("key", source) == 1
    await turns()
    assert source.asked == 2
    clock.now += 0.1
    assert await ahead.get("key", source) == 1
    await turns()
    assert source.asked == 3
    clock.now += 9.99  # its end is 0.01 s off
    assert await ahead.get("key", source) == 1
    clock.now += 0.01
    source.failure = None
    assert await ahead.get("key", source) == 4


async def test_a_failed_renewal_is_the_answer_when_the_old_value_has_ended(ahead: Ahead[str, int], clock: Clock) -> None:
    source = Source()
    await ahead.get("key", source)
    source.failure = ValueError("down")
    clock.now += 95
    assert await ahead.get("key", source) == 1
    await turns()
    clock.now += 5
    with pytest.raises(ValueError, match="down"):
        await ahead.get("key", source)
    assert source.asked == 2


async def test_a_failure_is_the_answer_for_10_s(ahead: Ahead[str, int], clock: Clock) -> None:
    source = Source()
    source.failure = ValueError("down")
    lengths = set()
    for _ in range(5):
        with pytest.raises(ValueError, match="down") as caught:
            await ahead.get("key", source)
        lengths.add(len(traceback.extract_tb(caught.value.__traceback__)))
        clock.now += 1
    assert source.asked == 1
    assert len(lengths) <= 2, "its traceback does not grow"
    assert await ahead.get("other", Source()) == 1
    clock.now += 5
    source.failure = None
    assert await ahead.get("key", source) == 2


async def test_every_caller_gets_the_failure(ahead: Ahead[str, int]) -> None:
    source = Source()
    source.failure = ValueError("down")
    outcomes = await asyncio.gather(*(ahead.get("key", source) for _ in range(10)), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["down"] * 10
    assert source.asked == 1


async def test_a_renewal_remembers_no_failure(ahead: Ahead[str, int]) -> None:
    broken = Source()
    broken.failure = ValueError("down")
    with pytest.raises(ValueError, match="down"):
        await ahead.get("broken", broken)
    ahead.renew()
    broken.failure = None
    assert await ahead.get("broken", broken) == 2


@pytest.mark.parametrize("failure", [None, ValueError("old")])
@pytest.mark.parametrize("asked_meanwhile", [True, False])
async def test_what_was_asked_before_a_renewal_is_for_its_callers_alone(
    ahead: Ahead[str, int], failure: Exception | None, asked_meanwhile: bool
) -> None:
    old, new = Source(), Source()
    old.go_on.clear()
    old.failure, new.asked = failure, 10
    caller = asyncio.ensure_future(ahead.get("key", old))
    await turns()
    ahead.renew()
    if asked_meanwhile:
        assert await ahead.get("key", new) == 11, "not what runs"
    old.go_on.set()
    await asyncio.wait([caller])
    assert caller.exception() is failure
    assert await ahead.get("key", new) == 11
    assert new.asked == 11


async def test_close_stops_fetches_and_renewals(ahead: Ahead[str, int], clock: Clock) -> None:
    renewed, begun, fetched = Source(), Source(), Source()
    await ahead.get("renewed", renewed)
    await ahead.get("begun", begun)
    for source in (renewed, begun, fetched):
        source.go_on.clear()
    clock.now += 90
    assert await ahead.get("renewed", renewed) == 1
    caller = asyncio.ensure_future(ahead.get("fetched", fetched))
    await turns()
    assert await ahead.get("begun", begun) == 1  # its renewal has not had a turn yet
    async with asyncio.timeout(10):
        await ahead.close()
    assert (renewed.cancelled, fetched.cancelled, begun.asked) == (1, 1, 1)
    with pytest.raises(asyncio.CancelledError):
        await caller


class Wide:
    """Gives 1, 2, 3 and so on, to be kept under ``key``."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.asked = 0
        self.failure: Exception | None = None

    async def __call__(self) -> tuple[str, int, float]:
        self.asked += 1
        if self.failure is not None:
            raise self.failure
        return self.key, self.asked, 100


async def test_a_value_may_serve_more_than_was_asked_for(ahead: Ahead[str, int]) -> None:
    source = Wide("all")
    assert await ahead.find(["a", "all"], source) == 1
    assert await ahead.find(["b", "all"], source) == 1
    narrow = Wide("c")
    assert await ahead.find(["c", "every"], narrow) == 1
    assert await ahead.find(["d", "every"], narrow) == 2


async def test_the_first_key_that_has_a_value_decides(ahead: Ahead[str, int]) -> None:
    first, second = Wide("b"), Wide("all")
    assert await ahead.find(["b"], first) == 1
    second.asked = 10
    assert await ahead.find(["c", "all"], second) == 11
    assert await ahead.find(["b", "all"], second) == 1
    assert await ahead.find(["all", "b"], second) == 11


async def test_a_renewal_may_move_a_value(ahead: Ahead[str, int], clock: Clock) -> None:
    source = Wide("all")
    await ahead.find(["a", "all"], source)
    clock.now += 90
    source.key = "a"
    assert await ahead.find(["a", "all"], source) == 1
    await turns()
    assert await ahead.find(["a", "all"], source) == 2
    assert await ahead.find(["b", "all"], Wide("b")) == 1, "all has none any more"


async def test_a_failed_renewal_counts_for_all_that_its_value_served(ahead: Ahead[str, int], clock: Clock) -> None:
    source = Wide("all")
    await ahead.find(["a", "all"], source)
    clock.now += 95
    source.failure = ValueError("down")
    await ahead.find(["a", "all"], source)
    await turns()
    clock.now += 5
    with pytest.raises(ValueError, match="down"):
        await ahead.find(["b", "all"], source)
    assert source.asked == 2
