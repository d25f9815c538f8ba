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
from contextlib import suppress

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
_DOUBT = 1.0  # seconds: one reference that fails at once is no outage, and the first probe tells it soon


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
        self._doubted_until = 0.0
        self._verdict = asyncio.Event()
        self._verdict.set()
        self._task: asyncio.Task[None] | None = None

    @property
    def failure(self) -> UpstreamFailing | None:
        """What it failed with, while it is not asked."""
        return self._failure

    @property
    def is_certain(self) -> bool:
        """Whether who gets no answer would get none to any question: a probe had none either, or nobody probes."""
        return self._is_outage or not self._is_on

    async def check(self) -> None:
        """Raises what the upstream failed with, while it is not asked. Where it failed within a second, the first probe's
        word is waited for, for a second at most; where it was silent for longer, nobody waits again."""
        if self._failure is not None and not self._verdict.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._doubted_until):
                    await self._verdict.wait()
        if self._failure is not None and not self._may_try:
            raise self._again(self._failure)

    def enter(self) -> None:
        """A question is about to be asked. Where the upstream answers the probe, though with an error, one question of a
        client's goes with each probe: that need not be all that it can say. Raises as ``check`` does."""
        if self._failure is not None:
            if not self._may_try:
                raise self._again(self._failure)
            self._may_try = False

    def _again(self, failure: UpstreamFailing) -> UpstreamFailing:
        now = asyncio.get_running_loop().time()
        return again(failure, self._next - now, now - self._since)

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
            now = asyncio.get_running_loop().time()
            self._doubted_until = now + _DOUBT
            if now - began < _DOUBT:
                self._verdict.clear()
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
                self._verdict.set()
                await asyncio.sleep(self._next - loop.time())
            else:
                self._heard = loop.time()
                self._close()
                return

    def _close(self) -> None:
        if self._is_outage:
            log.info("%s answers again", self._name)
            self._recovered(self._since)
        self._task, self._failure, self._in_a_row = None, None, 0
        self._is_outage = self._may_try = False
        self._verdict.set()
        self._metric.set(0)
