"""One call for many callers: those who want the same thing at the same time share one attempt and its outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from functools import partial
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Once(Generic[K, V]):
    """Shares running calls by key.

    A caller who leaves does not stop the call for the others. When the last one has left it is cancelled, unless calls
    outlive their callers, who then rely on a bound of its own. A call that began more than ``join_within`` seconds ago
    is not joined: newcomers share the next one.
    """

    def __init__(self, join_within: float = float("inf"), *, outlives_callers: bool = False) -> None:
        self._outlives_callers = outlives_callers
        self._join_within = join_within
        self._running: dict[K, _Call[V]] = {}

    async def run(self, key: K, call: Callable[[], Awaitable[V]]) -> V:
        """The outcome of ``call``, or of an equal one that is running already; exceptions go to every caller."""
        loop = asyncio.get_running_loop()
        shared = self._running.get(key)
        if shared is None or loop.time() - shared.began > self._join_within:
            shared = _Call(asyncio.ensure_future(call()), loop.time())
            self._running[key] = shared
            shared.task.add_done_callback(partial(self._settle, key, shared))
        shared.callers += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.callers -= 1
            if shared.callers == 0 and not shared.task.done() and not self._outlives_callers:
                self._forget(key, shared)
                shared.task.cancel()

    async def close(self) -> None:
        """Cancels what is running."""
        tasks = [call.task for call in self._running.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _settle(self, key: K, call: _Call[V], task: asyncio.Future[V]) -> None:
        self._forget(key, call)
        if not task.cancelled():
            task.exception()  # every caller may have left; the outcome is then nobody's

    def _forget(self, key: K, call: _Call[V]) -> None:
        if self._running.get(key) is call:
            del self._running[key]


class _Call(Generic[V]):
    def __init__(self, task: asyncio.Future[V], began: float) -> None:
        self.task = task
        self.began = began
        self.callers = 0
