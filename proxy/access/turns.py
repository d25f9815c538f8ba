"""Waiting in turn: so many at once of each name, so that one cannot take all the places."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class _Queue:
    free: asyncio.Semaphore
    users: int = 0


class Turns:
    """Queues by name; none is kept that nobody stands in."""

    def __init__(self) -> None:
        self._queues: dict[str, _Queue] = {}

    @asynccontextmanager
    async def of(self, name: str, at_once: int) -> AsyncIterator[None]:
        """Waits until fewer than ``at_once`` of that name are within; an empty name waits for nobody."""
        if not name:
            yield
            return
        queue = self._queues.setdefault(name, _Queue(asyncio.Semaphore(at_once)))
        queue.users += 1
        try:
            async with queue.free:
                yield
        finally:
            queue.users -= 1
            if not queue.users:
                del self._queues[name]
