"""A bounded memory of values that are fetched, each renewed ahead of its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from cachetools import TLRUCache, TTLCache

from proxy.once import Once

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_LIFE_USED = 0.8
_FAILURE_REMEMBERED = 10.0


@dataclass(slots=True)
class _Kept(Generic[V]):
    value: V
    seconds: float
    renew_at: float


class Ahead(Generic[K, V]):
    """Values by key, for as long as whoever fetched them said; at most ``size`` of them.

    One fetch runs for all who want the same; it goes on when they leave, and relies on a bound of its own. A value of
    which 80 % of its life are over is still given, and fetched anew in the background. A failure is the answer for 10 s,
    except where an older value still lives.
    """

    def __init__(self, size: int, timer: Callable[[], float]) -> None:
        self._timer = timer
        self._kept: TLRUCache[K, _Kept[V]] = TLRUCache(size, ttu=lambda _, kept, now: now + kept.seconds, timer=timer)
        self._failures: TTLCache[K, Exception] = TTLCache(size, _FAILURE_REMEMBERED, timer=timer)
        self._once: Once[tuple[int, K], V] = Once(outlives_callers=True)
        self._epoch = 0
        self._renewals: dict[tuple[int, K], asyncio.Task[None]] = {}

    async def get(self, key: K, fetch: Callable[[], Awaitable[tuple[V, float]]]) -> V:
        """The value of ``key``: kept, or what ``fetch`` gives with the seconds that it may be used (0: this once).

        Raises what ``fetch`` raises.
        """

        async def fetch_for_key() -> tuple[K, V, float]:
            return key, *await fetch()

        return await self.find((key,), fetch_for_key)

    async def find(self, keys: Sequence[K], fetch: Callable[[], Awaitable[tuple[K, V, float]]]) -> V:
        """As ``get`` where a value may serve more than was asked for: the one kept under the first of ``keys`` that has one.

        Fetches are shared by the first key. ``fetch`` says under which of ``keys`` its value belongs.
        """
        for key in keys:
            if (kept := self._kept.get(key)) is not None:
                if self._timer() >= kept.renew_at and key not in self._failures:
                    self._renew(key, fetch)
                return kept.value
        for key in keys:
            if (failure := self._failures.get(key)) is not None:
                raise failure.with_traceback(None)  # which would grow
        return await self._fetch(keys[0], fetch)

    def renew(self) -> None:
        """What is kept is fetched anew when it is used next, and given until then; no failure is remembered. What is
        being fetched now is for those who wait for it alone."""
        self._epoch += 1
        for kept in self._kept.values():
            kept.renew_at = self._timer()
        self._failures.clear()

    async def close(self) -> None:
        """Stops what is being fetched."""
        renewals = list(self._renewals.values())
        for task in renewals:
            task.cancel()
        await asyncio.gather(*renewals, return_exceptions=True)
        await self._once.close()

    def _renew(self, key: K, fetch: Callable[[], Awaitable[tuple[K, V, float]]]) -> None:
        renewal = (self._epoch, key)
        if renewal in self._renewals:
            return

        async def renew() -> None:
            with suppress(Exception):  # it is in _failures, and who finds no older value is told
                await self._fetch(key, fetch)

        task = asyncio.create_task(renew(), name="renew")
        self._renewals[renewal] = task
        task.add_done_callback(lambda _: self._renewals.pop(renewal))

    async def _fetch(self, key: K, fetch: Callable[[], Awaitable[tuple[K, V, float]]]) -> V:
        epoch = self._epoch

        async def keep() -> V:
            try:
                belongs, value, seconds = await fetch()
            except Exception as failure:
                if epoch == self._epoch:
                    self._failures[key] = failure
                raise
            if epoch == self._epoch:
                self._kept.pop(key, None)
                if seconds > 0:
                    self._kept[belongs] = _Kept(value, seconds, self._timer() + _LIFE_USED * seconds)
            return value

        return await self._once.run((epoch, key), keep)
