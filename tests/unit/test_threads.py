"""Blocking calls off the event loop: what a call uses is not given back before the call has ended."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from proxy.threads import Threads

PATIENCE = 30.0


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads(4)
    yield made
    made.close()


async def test_arguments_go_in_and_the_result_comes_back(threads: Threads) -> None:
    def call(a: int, *, b: int) -> tuple[int, int, bool]:
        return a, b, threading.current_thread() is threading.main_thread()

    assert await threads.run(call, 1, b=2) == (1, 2, False)


async def test_an_error_comes_back(threads: Threads) -> None:
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 // 0)


async def test_the_event_loop_turns_meanwhile(threads: Threads) -> None:
    event = threading.Event()
    waiting = asyncio.ensure_future(threads.run(event.wait, PATIENCE))
    await asyncio.sleep(0)
    event.set()
    assert await waiting


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_caller_waits_for_the_call(threads: Threads, times: int, fails: bool) -> None:
    started, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        started.set()
        assert go_on.wait(PATIENCE)
        ended.set()
        if fails:
            raise ValueError

    caller = asyncio.ensure_future(threads.run(call))
    while not started.is_set():
        await asyncio.sleep(0)
    for _ in range(times):
        caller.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not caller.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended.is_set()
    assert caller.cancelled()


async def test_a_call_that_is_queued_runs_although_its_caller_was_cancelled() -> None:
    threads = Threads(1)
    go_on = threading.Event()
    ran: list[int] = []
    first = asyncio.ensure_future(threads.run(go_on.wait, PATIENCE))
    second = asyncio.ensure_future(threads.run(ran.append, 1))
    for _ in range(10):
        await asyncio.sleep(0)
    second.cancel()
    await asyncio.sleep(0)
    go_on.set()
    await first
    with pytest.raises(asyncio.CancelledError):
        await second
    assert ran == [1]
    threads.close()


def test_close_ends_the_threads() -> None:
    before = threading.active_count()
    threads = Threads(2)
    asyncio.run(threads.run(int))
    assert threading.active_count() > before
    threads.close()
    assert threading.active_count() == before
