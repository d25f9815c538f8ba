"""Which endpoint of an upstream is asked, for how long, and whose word counts.

In the order listed: mirrors first, the registry itself last, as in containerd's ``hosts.toml`` and podman's
``registries.conf``. What one does not have, refuses or fails to give, the next one is asked for. The last one listed is the
authority: what it answers is the upstream's answer, and only it can say that something is not there.

An endpoint that failed rests: others are asked before it, until a probe of our own finds it answering. So a dead one costs
one client one short wait, not each client one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from prometheus_client import Gauge

from proxy.errors import RegistryError, UpstreamFailing, UpstreamRefused, UpstreamUnavailable
from proxy.metrics import Metrics
from proxy.upstream.reply import Where

log = logging.getLogger(__name__)

T = TypeVar("T")

_FIRST_REST = 5.0
_LONGEST_REST = 60.0


@dataclass(slots=True)
class _Rest:
    """Of an endpoint that failed: ``seconds`` long, ``until`` then; not ``active`` once it has answered. The record is kept:
    who fails again soon rests longer."""

    seconds: float
    until: float
    probe: asyncio.Task[None] | None = None

    @property
    def active(self) -> bool:
        """Whether nothing good was heard of it since."""
        return self.probe is not None


class Endpoints:
    """The endpoints of one upstream, and which of them rest.

    ``budget``: seconds for an endpoint that has others after it. ``probe``: finds out whether an endpoint answers; raises
    ``RegistryError`` where it does not.
    """

    def __init__(
        self, listed: Sequence[Where], budget: float, probe: Callable[[Where], Awaitable[None]], metrics: Metrics
    ) -> None:
        self._listed = list(listed)
        self._authority = self._listed[-1]
        self._budget = budget
        self._probe = probe
        self._metrics = metrics
        self._rests: dict[Where, _Rest] = {}

    def __len__(self) -> int:
        return len(self._listed)

    async def ask(
        self,
        question: Callable[[Where], Awaitable[T]],
        limit: float,
        *,
        attempt: int = 0,
        authority_only: bool = False,
    ) -> T:
        """The first good answer, beginning with the endpoint whose turn the ``attempt`` is; raises ``RegistryError``.

        ``limit``: seconds for the authority where nobody is left after it but those who rest, and for all others together,
        so that a client has its answer within twice that. ``authority_only``: for lists, in which a mirror that lags would
        say of much that it is not there.
        """
        errors: dict[Where, RegistryError] = {}
        order = [self._authority] if authority_only else self._order(attempt)
        share = min(self._budget, limit / max(1, len(self._listed) - 1))
        for number, where in enumerate(order, start=1):
            is_last_hope = where is self._authority and all(self.is_resting(other) for other in order[number:])
            within = limit if is_last_hope else share
            try:
                async with asyncio.timeout(within):
                    answer = await question(where)
            except TimeoutError:
                errors[where] = UpstreamUnavailable(
                    f"{where} did not answer within {within:g} s; is it up, and reachable from the cache?"
                )
            except RegistryError as error:
                errors[where] = error
            else:
                self.answering(where)
                return answer
            if isinstance(errors[where], UpstreamRefused):
                continue
            if isinstance(errors[where], UpstreamFailing):
                self.failing(where, errors[where].message)
            elif where is self._authority:
                break
        verdict = errors.pop(self._authority)
        if not errors:
            raise verdict
        others = "; ".join(error.message for error in errors.values())
        raise type(verdict)(f"{verdict.message} (and before it: {others})", headers=verdict.headers) from verdict

    def failing(self, where: Where, why: str) -> None:
        """It failed: it rests, longer each time."""
        rest = self._rests.get(where)
        if len(self._listed) == 1 or (rest is not None and rest.active):  # many find out at the same time
            return
        now = asyncio.get_running_loop().time()
        is_relapse = rest is not None and now < rest.until + _LONGEST_REST  # one that stalls begins its answers well
        seconds = min(rest.seconds * 2, _LONGEST_REST) if rest is not None and is_relapse else _FIRST_REST
        self._rests[where] = rest = _Rest(seconds, now + seconds)
        rest.probe = asyncio.create_task(self._look_after(where, rest), name=f"probe {where}")
        self._resting(where).set(1)
        log.warning("%s rests for %g s: %s", where, seconds, why)

    def answering(self, where: Where) -> None:
        """It gave what it was asked for: it rests no more."""
        if (rest := self._rests.get(where)) is not None and rest.probe is not None:
            rest.probe.cancel()
            self._wakes(where, rest)

    async def close(self) -> None:
        """Stops the probes."""
        probes = [rest.probe for rest in self._rests.values() if rest.probe is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    def _order(self, attempt: int) -> list[Where]:
        turn = attempt % len(self._listed)
        rotated = self._listed[turn:] + self._listed[:turn]
        # Those who rest are asked before a request fails; who failed for the first time is the likeliest to be back.
        return sorted(rotated, key=lambda where: self._rests[where].seconds if self.is_resting(where) else 0.0)

    def _resting(self, where: Where) -> Gauge:
        return self._metrics.resting.labels(where.name, where.endpoint.host_port_subcomponent or "")

    def is_resting(self, where: Where) -> bool:
        """Whether others are asked before it, since it failed."""
        rest = self._rests.get(where)
        return rest is not None and rest.active

    def _wakes(self, where: Where, rest: _Rest) -> None:
        rest.probe = None
        self._resting(where).set(0)
        log.info("%s answers again", where)

    async def _look_after(self, where: Where, rest: _Rest) -> None:
        """Asks an endpoint that rests, after each rest, until it answers."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(rest.until - loop.time())
            try:
                async with asyncio.timeout(self._budget):
                    await self._probe(where)
            except (RegistryError, TimeoutError, OSError):
                rest.seconds = min(rest.seconds * 2, _LONGEST_REST)
                rest.until = loop.time() + rest.seconds
            else:
                self._wakes(where, rest)
                return
