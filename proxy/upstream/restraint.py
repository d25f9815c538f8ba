"""When an upstream is not asked: while it gives no answer, limits the rate, or has just answered that very question.

    breaker (the upstream) -> window (what was asked, in whose name) -> limit (an endpoint, in whose name) -> the question

What is not asked has the answer of before. Blobs have no window: a download is shared while it runs, and a client that lost
one in the middle comes back at once. One that goes on is not held up at all: it finds out for itself.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

from proxy.config.model import BackoffConfig
from proxy.credentials.credential import Proof
from proxy.errors import RegistryError, SecretRefused, TooManyRequests, UpstreamFailing, UpstreamRefused
from proxy.metrics import Metrics
from proxy.upstream.breaker import Breaker
from proxy.upstream.failures import Failed, Failures
from proxy.upstream.quota import parse_retry_after
from proxy.upstream.reply import Request, Where

T = TypeVar("T")

_LONGEST = 3600.0  # seconds: what a ``Retry-After`` says is obeyed, within reason

Question = Callable[[Where], Awaitable[T]]


@dataclass(frozen=True, slots=True)
class Who:
    """In whose name a registry is asked. ``number`` is the same for the same identity as long as it shows the same, and
    tells nothing of it: what is remembered keeps no credential, and holds for no other one."""

    proof: Proof
    number: int


@dataclass(frozen=True, slots=True)
class _Asked:
    """What was asked, and all that the answer may depend on: what a client takes, what it says that it came through, in
    whose name it is, and whether mirrors were asked. By HEAD or GET is the same."""

    path: str
    accept: str
    via: str
    who: Who
    authority_only: bool


@dataclass(frozen=True, slots=True)
class _Quota:
    """What a registry limits the rate of: one kind of questions, or with an empty ``kind`` whatever it is asked."""

    where: Where
    who: Who
    kind: str


def _kind_of(request: Request) -> str:
    """Docker Hub counts GETs of manifests alone, and others their lists: while those are too many, all else may be asked."""
    if request.kind == "list":
        return "lists"
    return "pulls" if request.method == "GET" and request.kind == "manifest" else ""


class Restraint:
    """That of one upstream. ``probe``: whether it answers; ``recovered``: called when an outage is over."""

    def __init__(
        self,
        name: str,
        probe: Callable[[], Awaitable[None]],
        recovered: Callable[[], None],
        config: BackoffConfig,
        metrics: Metrics,
    ) -> None:
        self._timer = asyncio.get_running_loop().time
        self._failures: Failures[_Asked] = Failures(config, self._timer)
        self._limits: Failures[_Quota] = Failures(config, self._timer)
        self._recovered = recovered
        self._breaker = Breaker(name, probe, self._end, metrics, is_on=config.initial > 0)

    def _end(self, since: float) -> None:
        self._failures.end(since)
        self._recovered()

    async def ask(
        self,
        request: Request,
        who: Who,
        question: Question[T],
        ask: Callable[[Question[T]], Awaitable[T]],
        *,
        via: str = "",
        authority_only: bool = False,
        goes_on: bool = False,
    ) -> T:
        """What ``ask`` gets from the endpoints that may be asked; raises ``RegistryError``, perhaps that of before."""

        async def restrained(where: Where) -> T:
            return await self._ask_one(where, request, who, question, is_limited=not goes_on)

        if goes_on:
            return await ask(restrained)
        await self._breaker.check()
        asked = _Asked(request.path, request.headers.get("Accept", ""), via, who, authority_only)
        with self._failures.attempt(asked) if request.kind != "blob" else nullcontext():
            self._breaker.enter()
            began = self._timer()
            try:
                return await ask(restrained)
            except UpstreamFailing as failure:
                self._breaker.failed(failure, began)
                raise

    async def _ask_one(self, where: Where, request: Request, who: Who, question: Question[T], *, is_limited: bool) -> T:
        """Asks one endpoint. What ``is_limited`` waits for the end of a limit."""
        quota, began = _Quota(where, who, _kind_of(request)), self._timer()
        if is_limited:
            self._limits.check(_Quota(where, who, ""))
            self._limits.check(quota)
        try:
            answer = await question(where)
        except TooManyRequests as error:
            told = parse_retry_after(error.headers.get("Retry-After", ""), time.time())
            self._limits.remember(quota, error, min(told, _LONGEST), began)
            self._breaker.heard()
            raise
        except RegistryError as error:
            if not isinstance(error, UpstreamFailing) or isinstance(error, UpstreamRefused | SecretRefused):
                self._breaker.heard()
            raise
        self._limits.forget_before(quota, began)
        self._breaker.heard()
        return answer

    def state(self, request: Request) -> list[tuple[Proof, Failed, float]]:
        """Why that is not asked for now, in whose name, and for how many seconds, for people."""
        found = [(key.who.proof, *state) for key, state in self._failures.all().items() if key.path == request.path]
        kinds = ("", _kind_of(request))
        return found + [(key.who.proof, *state) for key, state in self._limits.all().items() if key.kind in kinds]

    @property
    def outage(self) -> UpstreamFailing | None:
        """What the upstream failed with, while it is not asked at all."""
        return self._breaker.failure

    @property
    def is_out(self) -> bool:
        """Whether who gets no answer would get none to any other question, as far as is known."""
        return self._breaker.is_certain

    def clear(self) -> None:
        """Everything may be asked for again."""
        self._failures.clear()
        self._limits.clear()

    def drop_expired(self) -> None:
        """Forgets what is over."""
        self._failures.drop_expired()
        self._limits.drop_expired()

    async def close(self) -> None:
        """Stops probing."""
        await self._breaker.close()
