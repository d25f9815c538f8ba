"""One call for many callers."""

from __future__ import annotations

import asyncio

import pytest

from proxy.once import Once


class Work:
    """A call that is held until it is let go; knows how often it ran and was cancelled."""

    def __init__(self) -> None:
        self.started = 0
        self.cancelled = 0
        self.go_on = asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self) -> int:
        self.started += 1
        number = self.started
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.failure is not None:
            raise self.failure
        return number


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def start(once: Once[str, int], work: Work, count: int = 1, key: str = "key") -> list[asyncio.Future[int]]:
    callers: list[asyncio.Future[int]] = [asyncio.ensure_future(once.run(key, work)) for _ in range(count)]
    await turns()
    return callers


async def test_callers_share_one_result() -> None:
    once, work = Once[str, int](), Work()
    callers = await start(once, work, 10)
    work.go_on.set()
    assert await asyncio.gather(*callers) == [1] * 10
    assert work.started == 1


async def test_every_caller_gets_the_error() -> None:
    once, work = Once[str, int](), Work()
    work.failure = ValueError("shared")
    callers = await start(once, work, 10)
    work.go_on.set()
    outcomes = await asyncio.gather(*callers, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["shared"] * 10
    assert work.started == 1


async def test_other_keys_have_calls_of_their_own() -> None:
    once, work = Once[str, int](), Work()
    callers = await start(once, work, key="a") + await start(once, work, key="b")
    work.go_on.set()
    assert await asyncio.gather(*callers) == [1, 2]


@pytest.mark.parametrize("fails", [False, True])
async def test_an_outcome_is_not_kept(fails: bool) -> None:
    once, work = Once[str, int](), Work()
    work.go_on.set()
    work.failure = ValueError() if fails else None
    await asyncio.gather(*await start(once, work), return_exceptions=True)
    work.failure = None
    assert await once.run("key", work) == 2


@pytest.mark.parametrize("leaves", [0, 1, 2])
async def test_a_caller_who_leaves_does_not_stop_the_others(leaves: int) -> None:
    once, work = Once[str, int](), Work()
    callers = await start(once, work, 3)
    callers[leaves].cancel()
    await turns()
    assert callers[leaves].cancelled()
    assert not work.cancelled
    callers += await start(once, work)
    work.go_on.set()
    stayed = [caller for caller in callers if not caller.cancelled()]
    assert await asyncio.gather(*stayed) == [1, 1, 1]


async def test_the_last_one_leaving_cancels_the_call() -> None:
    once, work = Once[str, int](), Work()
    callers = await start(once, work, 3)
    for caller in callers:
        assert not work.cancelled
        caller.cancel()
        await turns()
    assert work.cancelled == 1


async def test_a_cancelled_call_is_not_joined() -> None:
    once, work = Once[str, int](), Work()
    (first,) = await start(once, work)
    first.cancel()
    await asyncio.sleep(0)
    (second,) = await start(once, work)
    work.go_on.set()
    assert await second == 2
    assert (work.started, work.cancelled) == (2, 1)


async def test_a_call_that_ends_while_its_last_caller_leaves_warns_nobody() -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    once, work = Once[str, int](), Work()
    work.failure = ValueError("nobody's")
    (caller,) = await start(once, work)
    work.go_on.set()
    caller.cancel()
    with pytest.raises((asyncio.CancelledError, ValueError)):
        await caller
    del caller
    await turns()
    assert not complaints


class Time:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now)


async def test_an_old_call_is_not_joined_and_newcomers_share_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    once, work = Once[str, int](1.0), Work()
    time = Time(monkeypatch)
    old = await start(once, work)
    time.now += 1.0
    old += await start(once, work)
    time.now += 0.1
    new = await start(once, work, 2)
    time.now += 0.5
    new += await start(once, work)
    assert work.started == 2
    work.go_on.set()
    monkeypatch.undo()
    assert await asyncio.gather(*old) == [1, 1]
    assert await asyncio.gather(*new) == [2, 2, 2]


async def test_the_end_of_an_old_call_does_not_forget_its_successor(monkeypatch: pytest.MonkeyPatch) -> None:
    once, first, second = Once[str, int](1.0), Work(), Work()
    time = Time(monkeypatch)
    old = await start(once, first)
    time.now += 2
    new = await start(once, second)
    first.go_on.set()
    await turns()
    assert old[0].done()
    new += await start(once, second)
    assert second.started == 1
    second.go_on.set()
    monkeypatch.undo()
    assert await asyncio.gather(*new) == [1, 1]
