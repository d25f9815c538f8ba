"""Waiting for something to become true, without polling."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

PATIENCE = 30.0
"""Seconds after which a fake gives up waiting."""


class Signal:
    """Wakes those who wait for a condition each time something has happened."""

    def __init__(self) -> None:
        self._sleepers: set[asyncio.Event] = set()

    def notify(self) -> None:
        """Something happened: conditions are to be looked at again."""
        for sleeper in self._sleepers:
            sleeper.set()

    async def wait_for(self, condition: Callable[[], object], within: float = PATIENCE) -> None:
        """Return once the condition holds; raise TimeoutError if it never does."""
        sleeper = asyncio.Event()
        self._sleepers.add(sleeper)
        try:
            async with asyncio.timeout(within):
                while not condition():
                    await sleeper.wait()
                    sleeper.clear()
        finally:
            self._sleepers.discard(sleeper)
