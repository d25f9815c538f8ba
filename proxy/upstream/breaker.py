"""Whether an upstream is asked at all: one that gives no answer is probed, and nobody waits for it meanwhile.

It opens when nothing was heard of the upstream while a question was waited for, or after three failures with nothing good
between them. From then on a probe of our own asks it, at once and every 5 s, whether anybody wants something or not: so
recovery is never later than that, and no client is the one who finds out.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Awaitable, Callable

from proxy.errors import (
    RegistryError,
    SecretRefused,
    TooManyRequests,
    UpstreamBroken,
    UpstreamFailing,
    UpstreamRefused,
    UpstreamUnavailable,
)
from proxy.metrics import Metrics
from proxy.upstream.failures import again

log = logging.getLogger(__name__)

_EVERY = 5.0
_IN_A_ROW = 3


class Breaker:
    """That of one upstream.

    ``probe``: finds out whether it answers; raises ``RegistryError`` where it does not. ``recovered``: called with the time
    at which an outage began when it is over. ``is_on``: else the upstream is asked each time.
    """

    def __init__(
        self,
        name: str,
        probe: Callable[[], Awaitable[None]],
        recovered: Callable[[float], None],
        metrics: Metrics,
        *,
        is_on: bool,
    ) -> None:
        self._name = name
        self._probe = probe
        self._recovered = recovered
        self._is_on = is_on
        self._metric = metrics.unavailable.labels(name)
        self._heard = float("-inf")
        self._in_a_row = 0
        self._since = 0.0
        self._failure: UpstreamFailing | None = None
        self._is_outage = False
        self._may_try = False
        self._next = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def failure(self) -> UpstreamFailing | None:
        """What it failed with, while it is not asked."""
        return self._failure

    def check(self) -> None:
        """Raises what the upstream failed with, while it is not asked. Where it answers the probe, though with an error, one
        question of a client's goes with each probe: that need not be all that it can say."""
        if self._failure is None:
            return
        if self._may_try:
            self._may_try = False
        else:
            now = asyncio.get_running_loop().time()
            raise again(self._failure, self._next - now, now - self._since)

    def heard(self) -> None:
        """It has answered."""
        self._heard = asyncio.get_running_loop().time()
        self._in_a_row = 0
        if self._task is not None:
            self._task.cancel()
            self._close()

    def failed(self, failure: UpstreamFailing, began: float) -> None:
        """A question that began then has failed. What was answered with an error, or is known only from before, says
        nothing; nor does the failure of one where others were answered meanwhile."""
        is_word = isinstance(failure, UpstreamRefused | SecretRefused | TooManyRequests)
        if is_word or failure.is_remembered or self._failure is not None or self._heard >= began or not self._is_on:
            return
        self._since = began if self._in_a_row == 0 else self._since
        self._in_a_row += 1
        if isinstance(failure, UpstreamUnavailable) or self._in_a_row >= _IN_A_ROW:
            log.warning("%s is not asked until it answers a probe: %s", self._name, failure.message)
            self._failure = copy.copy(failure)
            self._metric.set(1)
            self._task = asyncio.create_task(self._look_after(), name=f"probe {self._name}")

    async def close(self) -> None:
        """Stops probing."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _look_after(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._next = loop.time() + _EVERY
            try:
                await self._probe()
            except (RegistryError, TimeoutError, OSError) as error:
                self._is_outage = True
                self._may_try = isinstance(error, UpstreamBroken)
                await asyncio.sleep(self._next - loop.time())
            else:
                self._close()
                return

    def _close(self) -> None:
        if self._is_outage:
            log.info("%s answers again", self._name)
            self._recovered(self._since)
        self._task, self._failure, self._in_a_row = None, None, 0
        self._is_outage = self._may_try = False
        self._metric.set(0)
