"""``requestsPerSecond`` and ``requestBurst``: no more questions than an upstream is to be asked.

The kubelet's ``registryPullQPS`` fails what comes too fast, and backs off; here it waits, in order, since who has come
to a cache is to be served.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque

from proxy.errors import UpstreamUnavailable

_PATIENCE = 20.0  # seconds; containerd 2.3 waits 30 s for headers


class Rate:
    """A bucket of ``burst`` tokens, into which ``per_second`` come; None: there is no limit."""

    def __init__(self, upstream: str, per_second: float | None, burst: int | None) -> None:
        self._upstream = upstream
        self._per_second = per_second
        self._burst = burst or max(1, math.ceil(2 * (per_second or 0)))
        self._tokens = float(self._burst)
        self._counted: float | None = None
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def turn(self) -> None:
        """Returns when a question may be asked; raises ``UpstreamUnavailable`` where that would take too long."""
        if self._per_second is None:
            return
        self._count()
        if not self._waiting and self._tokens >= 1:
            self._tokens -= 1
            return
        wait = (len(self._waiting) + 1 - self._tokens) / self._per_second
        if wait > _PATIENCE:
            error = UpstreamUnavailable(
                f"{self._upstream} is asked {self._per_second:g} times a second at most (requestsPerSecond of that "
                f"upstream), and {len(self._waiting)} questions wait for that already",
                headers={"Retry-After": str(math.ceil(wait - _PATIENCE))},
            )
            error.is_remembered = True  # nobody was asked: it says nothing of the upstream
            raise error
        mine = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        self._set_timer()
        try:
            await mine
        except asyncio.CancelledError:
            if not mine.cancelled():  # its turn had come just now
                self._tokens += 1
            elif mine in self._waiting:
                self._waiting.remove(mine)
            self._let_go()
            raise

    def _count(self) -> None:
        """What has come into the bucket since."""
        assert self._per_second is not None
        now = asyncio.get_running_loop().time()
        if self._counted is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._counted) * self._per_second)
        self._counted = now

    def _let_go(self) -> None:
        """Those whose turn has come, in order."""
        self._count()
        while self._waiting and self._tokens >= 1 - 1e-9:
            if not (first := self._waiting.popleft()).done():
                self._tokens -= 1
                first.set_result(None)
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._waiting:
            assert self._per_second is not None
            self._timer = asyncio.get_running_loop().call_later((1 - self._tokens) / self._per_second, self._let_go)
