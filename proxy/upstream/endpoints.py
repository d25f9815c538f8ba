"""Which endpoint of an upstream is asked, for how long, and whose word counts.

In the order listed: mirrors first, the registry itself last, as in containerd's ``hosts.toml`` and podman's
``registries.conf``. What one does not have, refuses or fails to give, the next one is asked for. The last one listed is the
authority: what it answers is the upstream's answer, and only it can say that something is not there.

An endpoint that failed rests: it is passed over, while others are left, until a probe of our own finds it answering. So a
dead one costs one client one short wait, not each client one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from proxy.errors import RegistryError, UpstreamFailing, UpstreamUnavailable
from proxy.upstream.reply import Where

T = TypeVar("T")

_FIRST_REST = 5.0
_LONGEST_REST = 60.0


@dataclass(slots=True)
class _Rest:
    """Of an endpoint that failed: ``seconds`` long, ``until`` then; not ``active`` once a probe was answered."""

    seconds: float
    until: float
    active: bool = True
    probe: asyncio.Task[None] | None = field(default=None)


class Endpoints:
    """The endpoints of one upstream, and which of them rest.

    ``budget``: seconds for an endpoint that has others after it. ``probe``: finds out whether an endpoint answers; raises
    ``RegistryError`` where it does not.
    """

    def __init__(self, listed: Sequence[Where], budget: float, probe: Callable[[Where], Awaitable[None]]) -> None:
        self._listed = list(listed)
        self._authority = self._listed[-1]
        self._budget = budget
        self._probe = probe
        self._rests: dict[Where, _Rest] = {}

    def __len__(self) -> int:
        return len(self._listed)

    async def ask(self, question: Callable[[Where], Awaitable[T]], limit: float, attempt: int = 0) -> T:
        """The first good answer, beginning with the endpoint whose turn the ``attempt`` is; raises ``RegistryError``.

        ``limit``: seconds for the last one that is asked.
        """
        order = self._order(attempt)
        errors: dict[Where, RegistryError] = {}
        for where in order:
            within = limit if where is order[-1] else min(limit, self._budget)
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
            if isinstance(errors[where], UpstreamFailing):
                self.failing(where)
            elif where is self._authority:
                break
        verdict = errors.pop(self._authority)
        if not errors:
            raise verdict
        others = "; ".join(error.message for error in errors.values())
        raise type(verdict)(f"{verdict.message} (and before it: {others})", headers=verdict.headers) from verdict

    def failing(self, where: Where) -> None:
        """It failed: it rests, the longer the oftener."""
        rest = self._rests.get(where)
        if len(self._listed) == 1 or (rest is not None and rest.active):  # many find out at the same time
            return
        seconds = min(rest.seconds * 2, _LONGEST_REST) if rest else _FIRST_REST
        self._rests[where] = _Rest(seconds, asyncio.get_running_loop().time() + seconds)

    def answering(self, where: Where) -> None:
        """It gave what it was asked for: all is forgotten."""
        if (rest := self._rests.pop(where, None)) is not None and rest.probe is not None:
            rest.probe.cancel()

    async def close(self) -> None:
        """Stops the probes."""
        probes = [rest.probe for rest in self._rests.values() if rest.probe is not None]
        for probe in probes:
            probe.cancel()
        await asyncio.gather(*probes, return_exceptions=True)

    def _order(self, attempt: int) -> list[Where]:
        turn = attempt % len(self._listed)
        rotated = self._listed[turn:] + self._listed[:turn]
        resting = {where: rest.seconds for where, rest in self._rests.items() if rest.active}
        for where in resting:
            self._wake(where)
        if len(resting) == len(rotated):  # whoever failed for the first time is the likeliest to be back
            return sorted(rotated, key=resting.__getitem__)
        order = [where for where in rotated if where not in resting]
        return order if self._authority in order else [*order, self._authority]

    def _wake(self, where: Where) -> None:
        """Probes an endpoint that has rested long enough; a client's request is the occasion, but does not wait."""
        rest = self._rests[where]
        if rest.probe is None and asyncio.get_running_loop().time() >= rest.until:
            rest.probe = asyncio.create_task(self._try(where, rest), name=f"probe {where}")

    async def _try(self, where: Where, rest: _Rest) -> None:
        try:
            async with asyncio.timeout(self._budget):
                await self._probe(where)
            rest.active = False
        except (RegistryError, TimeoutError):
            rest.seconds = min(rest.seconds * 2, _LONGEST_REST)
            rest.until = asyncio.get_running_loop().time() + rest.seconds
        finally:
            rest.probe = None
