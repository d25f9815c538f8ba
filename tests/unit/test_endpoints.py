"""Which endpoint is asked, for how long, and whose word counts: ``Endpoints`` alone, in a time of its own."""

from __future__ import annotations

import asyncio
import selectors
from collections import Counter
from collections.abc import Callable, Coroutine
from itertools import pairwise
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from proxy.errors import (
    BlobUnknown,
    Denied,
    ManifestUnknown,
    RangeInvalid,
    RegistryError,
    TooManyRequests,
    UpstreamBroken,
    UpstreamFailing,
    UpstreamUnavailable,
)
from proxy.metrics import Metrics
from proxy.upstream.endpoints import Endpoints
from proxy.upstream.reply import Where

BUDGET = 3.0
LIMIT = 15.0
T = TypeVar("T")

ERRORS: dict[str, Callable[[], RegistryError]] = {
    "refused": lambda: UpstreamUnavailable("no connection"),
    "500": lambda: UpstreamBroken("answered 500"),
    "429": lambda: TooManyRequests("too many", headers={"Retry-After": "7"}),
    "manifest 404": lambda: ManifestUnknown("no such manifest"),
    "blob 404": lambda: BlobUnknown("no such blob"),
    "403": lambda: Denied("not for you"),
    "416": lambda: RangeInvalid("no such byte"),
}
FAILURES = ["hangs", "refused", "500", "429"]
VERDICTS = ["manifest 404", "blob 404", "403", "416"]
"""What an endpoint says that works: it does not have it, or does not give it."""


class _NoWaiting(selectors.SelectSelector):
    """Lets the time pass at once for which a loop would sleep. No file is watched but the loop's own."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everybody waits for something that nobody will do"
        self.now += max(timeout, 0)
        return super().select(0)


class Clock(asyncio.SelectorEventLoop):
    """An event loop in which nothing takes time but waiting, and waiting is over at once."""

    def __init__(self) -> None:
        self._waiting = _NoWaiting()
        super().__init__(self._waiting)

    def time(self) -> float:
        return self._waiting.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a test in such a time, which begins at 0 and is up after a day."""
    with asyncio.Runner(loop_factory=Clock) as runner:
        return runner.run(asyncio.wait_for(main, 86_400))


def now() -> float:
    """The time, rounded to milliseconds."""
    return round(asyncio.get_running_loop().time(), 3)


async def soon() -> None:
    """Lets what is ready to run do so; no time passes."""
    for _ in range(10):
        await asyncio.sleep(0)


class World:
    """Endpoints ``a``, ``b``, ... of which each is ``good``, or as ``does`` says; the last one is the authority."""

    def __init__(self, *does: str, budget: float = BUDGET) -> None:
        self.does = dict(zip("abcdef", does, strict=False))
        self.where = {name: Where("registry.test", URL(f"https://{name}.test")) for name in self.does}
        self.asked: list[str] = []
        self.probed: list[tuple[str, float]] = []
        self.endpoints = Endpoints(list(self.where.values()), budget, self._probe, Metrics())

    async def ask(self, attempt: int = 0, limit: float = LIMIT) -> str:
        """Who gives it; raises ``RegistryError``."""
        return await self.endpoints.ask(self._question, limit, attempt=attempt)

    async def outcome(self, attempt: int = 0) -> str:
        """Who gives it, or the kind of error."""
        try:
            return await self.ask(attempt)
        except RegistryError as error:
            return type(error).__name__

    async def refusal(self, attempt: int = 0) -> RegistryError:
        """The error."""
        with pytest.raises(RegistryError) as refused:
            await self.ask(attempt)
        return refused.value

    def since(self) -> str:
        """Who was asked since this was called before."""
        asked = "".join(self.asked)
        self.asked.clear()
        return asked

    async def _question(self, where: Where) -> str:
        name = self._name(where)
        self.asked.append(name)
        return await self._do(name)

    async def _probe(self, where: Where) -> None:
        name = self._name(where)
        self.probed.append((name, now()))
        if self.does[name] not in VERDICTS:  # who says 404 answers
            await self._do(name)

    async def _do(self, name: str) -> str:
        doing = self.does[name]
        if doing == "hangs":
            await asyncio.sleep(10_000)
        if doing.startswith("slow "):
            await asyncio.sleep(float(doing.removeprefix("slow ")))
            return name
        if doing in ERRORS:
            raise ERRORS[doing]()
        assert doing == "good"
        return name

    def _name(self, where: Where) -> str:
        return next(name for name, known in self.where.items() if known == where)


async def passes(world: World, seconds: float, every: float = 0.25) -> None:
    """So many seconds, in which clients ask all the time."""
    end = now() + seconds
    while now() < end:
        await world.outcome()
        await asyncio.sleep(every)


# --- the order ---


def test_the_first_one_that_is_listed_is_asked_and_nobody_else() -> None:
    async def main() -> None:
        world = World("good", "good", "good")
        assert [await world.ask() for _ in range(3)] == ["a", "a", "a"]
        assert world.since() == "aaa"
        assert len(world.endpoints) == 3

    run(main())


@pytest.mark.parametrize("what", FAILURES + VERDICTS)
def test_what_one_does_not_give_the_next_one_is_asked_for(what: str) -> None:
    """A mirror's 404 or 403 is no answer of the upstream, and neither is its failure."""

    async def main() -> None:
        world = World(what, what, "good")
        assert await world.ask() == "c"
        assert world.since() == "abc"

    run(main())


@pytest.mark.parametrize(("attempt", "order"), list(enumerate(["abc", "bca", "cab", "abc", "bca"])))
def test_each_attempt_begins_at_the_next_endpoint(attempt: int, order: str) -> None:
    async def main() -> None:
        world = World("500", "500", "500")
        await world.outcome(attempt)
        assert world.since() == order

    run(main())


def test_an_endpoint_that_failed_is_passed_over() -> None:
    async def main() -> None:
        world = World("500", "good", "good")
        assert [await world.ask() for _ in range(5)] == ["b"] * 5
        assert world.since() == "abbbbb"
        assert [await world.ask(attempt) for attempt in range(6)] == ["b", "b", "c", "b", "b", "c"]

    run(main())


@pytest.mark.parametrize("what", VERDICTS)
def test_an_endpoint_that_only_says_no_is_asked_again(what: str) -> None:
    """A mirror that lacks one thing has others."""

    async def main() -> None:
        world = World(what, "good")
        assert [await world.ask() for _ in range(3)] == ["b", "b", "b"]
        assert world.since() == "ababab"

    run(main())


def test_what_is_no_error_of_a_registry_is_passed_on_and_nobody_is_blamed() -> None:
    """A fault of pullcache, or a client that leaves, says nothing about the endpoint."""

    async def main() -> None:
        world = World("good", "good")

        async def broken(_: Where) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await world.endpoints.ask(broken, LIMIT)
        world.does["a"] = "hangs"
        leaving = asyncio.create_task(world.ask())
        await soon()
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        world.does["a"] = "good"
        assert await world.ask() == "a"

    run(main())


# --- how long ---


@pytest.mark.parametrize(("budget", "limit", "waits"), [(3.0, 15.0, [3.0, 3.0, 15.0]), (5.0, 1.0, [0.5, 0.5, 1.0])])
def test_each_has_its_budget_and_the_last_one_the_rest_of_the_patience(
    budget: float, limit: float, waits: list[float]
) -> None:
    async def main() -> None:
        world = World("hangs", "hangs", "hangs", budget=budget)
        with pytest.raises(UpstreamUnavailable, match=f"{waits[-1]:g} s") as refused:
            await world.ask(limit=limit)
        assert now() == sum(waits)
        assert f"within {waits[0]:g} s" in refused.value.message

    run(main())


def test_one_endpoint_alone_has_all_the_time_and_never_rests() -> None:
    async def main() -> None:
        world = World("hangs")
        for _ in range(3):
            before = now()
            assert await world.outcome() == "UpstreamUnavailable"
            assert now() - before == LIMIT
        world.does["a"] = "slow 14"
        assert await world.ask() == "a"
        assert world.since() == "aaaa"
        assert world.probed == []

    run(main())


def test_a_dead_endpoint_costs_one_client_one_budget() -> None:
    async def main() -> None:
        world = World("hangs", "good")
        assert await world.ask() == "b"
        assert now() == BUDGET
        for _ in range(100):
            assert await world.ask() == "b"
        assert now() == BUDGET
        assert Counter(world.since()) == {"a": 1, "b": 101}

    run(main())


# --- rests and probes ---


@pytest.mark.parametrize("what", ["refused", "500", "429"])
def test_the_rests_of_a_dead_endpoint_grow_to_a_minute_and_no_client_asks_it(what: str) -> None:
    async def main() -> None:
        world = World(what, "good")
        await passes(world, 320)
        assert Counter(world.asked)["a"] == 1
        times = [0.0, *(time for name, time in world.probed if name == "a")]
        rests = [round(after - before) for before, after in pairwise(times)]
        assert rests == [5, 10, 20, 40, 60, 60, 60, 60]

    run(main())


def test_who_rests_is_probed_whether_anybody_asks_or_not_and_nobody_waits_for_it() -> None:
    """An operator's figure of who rests must come right in a quiet night, too."""

    async def main() -> None:
        world = World("hangs", "good")
        await world.ask()
        assert world.endpoints.is_resting(world.where["a"])
        await asyncio.sleep(9)  # 3 s of budget were over before; the probe of the 5th second hangs for as long
        assert [name for name, _ in world.probed] == ["a"]
        before = now()
        assert await world.ask() == "b"
        assert now() == before
        world.does["a"] = "good"
        await asyncio.sleep(60)
        assert not world.endpoints.is_resting(world.where["a"])
        assert Counter(world.asked)["a"] == 1
        await world.endpoints.close()

    run(main())


def test_many_failures_at_once_count_once() -> None:
    async def main() -> None:
        world = World("hangs", "good")
        assert await asyncio.gather(*(world.ask() for _ in range(50))) == ["b"] * 50
        assert now() == BUDGET
        world.does["a"] = "good"
        await asyncio.sleep(4.75)
        await passes(world, 1)
        assert world.probed == [("a", BUDGET + 5.0)]

    run(main())


def test_an_endpoint_that_answers_a_probe_is_used_again() -> None:
    async def main() -> None:
        world = World("500", "good")
        await world.ask()
        world.does["a"] = "good"
        await asyncio.sleep(5)
        assert await world.ask() == "b"
        await soon()
        assert [await world.ask() for _ in range(3)] == ["a", "a", "a"]

    run(main())


def test_a_failure_after_a_good_probe_doubles_the_rest() -> None:
    """``/v2/`` may answer while all else fails."""

    async def occasion(where: Where) -> str:
        return "b"

    async def main() -> None:
        world = World("500", "good")
        probes: list[float] = []
        for _ in range(6):
            world.does["a"] = "500"
            while world.since() != "ab":
                await asyncio.sleep(0.25)
                await world.ask()
            world.does["a"] = "good"
            world.probed.clear()
            failed = now()
            while not world.probed:
                await asyncio.sleep(0.25)
                await world.endpoints.ask(occasion, LIMIT)
                await soon()
            probes.append(world.probed[0][1] - failed)
        assert [round(rest) for rest in probes] == [5, 10, 20, 40, 60, 60]
        await world.endpoints.close()

    run(main())


def test_who_fails_again_after_a_good_answer_rests_longer() -> None:
    """One that stalls in the middle of its content has begun each of its answers well."""

    async def main() -> None:
        world = World("500", "good")
        await passes(world, 6)  # the first probe, which fails
        world.does["a"] = "good"
        while await world.ask() != "a":
            await asyncio.sleep(0.25)
        world.does["a"] = "500"
        world.probed.clear()
        failed = now()
        await passes(world, 22)
        assert [round(time - failed) for _, time in world.probed] == [20]

    run(main())


def test_a_good_minute_lets_all_be_forgotten() -> None:
    async def main() -> None:
        world = World("500", "good")
        await passes(world, 70)  # its rests have grown
        world.does["a"] = "good"
        while await world.ask() != "a":
            await asyncio.sleep(0.25)
        await asyncio.sleep(61)
        world.does["a"] = "500"
        world.probed.clear()
        failed = now()
        await passes(world, 6)
        assert [round(time - failed) for _, time in world.probed] == [5]

    run(main())


def test_probes_end_with_the_upstream() -> None:
    async def main() -> None:
        before = asyncio.all_tasks()
        world = World("hangs", "hangs", "good")
        await world.ask()
        await asyncio.sleep(5)
        await world.ask()
        await soon()
        assert sorted(name for name, _ in world.probed) == ["a", "b"]
        await world.endpoints.close()
        assert asyncio.all_tasks() == before

    run(main())


# --- nobody left ---


def test_if_all_rest_all_are_asked_and_first_who_failed_least() -> None:
    async def main() -> None:
        world = World("500", "500", "good")
        await passes(world, 40)  # the rests of a and b have grown
        world.does |= {"c": "500"}
        await world.outcome()
        world.since()
        assert await world.outcome() == "UpstreamBroken"
        assert world.since() == "cab"
        world.does["b"] = "good"
        assert await world.ask() == "b", "it is asked before a probe finds it"

    run(main())


def test_who_rests_is_asked_before_a_request_fails() -> None:
    """The mirror failed a moment ago and is back; now the registry fails, for the first time."""

    async def main() -> None:
        world = World("500", "good")
        await world.ask()
        world.does |= {"a": "good", "b": "500"}
        assert await world.ask() == "a"

    run(main())


def test_who_rests_does_not_shorten_the_time_of_who_is_left() -> None:
    async def main() -> None:
        world = World("hangs", "good")
        await world.ask()
        world.does["b"] = f"slow {LIMIT - 1:g}"
        for _ in range(3):
            before = now()
            assert await world.ask() == "b"
            assert now() - before == LIMIT - 1

    run(main())


def test_a_registry_that_is_slow_comes_back_though_its_mirror_is_dead() -> None:
    """It needs longer than the budget of a mirror, as it always did; one failure of it must not be for ever."""

    async def main() -> None:
        world = World("hangs", "slow 5")
        await passes(world, 40)  # the rests of a have grown
        world.does["b"] = "500"
        await world.outcome()
        world.does["b"] = "slow 5"
        await passes(world, 120)
        assert await world.outcome() == "b"
        await world.endpoints.close()

    run(main())


# --- whose word counts ---


@pytest.mark.parametrize("what", VERDICTS)
@pytest.mark.parametrize("mirror", FAILURES + VERDICTS)
def test_the_last_one_listed_has_the_last_word(mirror: str, what: str) -> None:
    """Whatever the mirrors said: what it does not have is not there, and what it refuses is refused."""

    async def main() -> None:
        world = World(mirror, what)
        verdict = await world.refusal()
        assert type(verdict) is type(ERRORS[what]())
        assert verdict.message.startswith(ERRORS[what]().message)
        assert world.since() == "ab"
        assert type(await world.refusal()) is type(ERRORS[what]())

    run(main())


@pytest.mark.parametrize("what", FAILURES)
@pytest.mark.parametrize("mirror", VERDICTS)
def test_while_the_last_one_fails_nobody_elses_no_counts(mirror: str, what: str) -> None:
    async def main() -> None:
        world = World(mirror, what)
        for _ in range(3):
            assert isinstance(await world.refusal(), UpstreamFailing)
        assert {"a", "b"} == set(world.since())
        assert isinstance(await world.refusal(attempt=1), UpstreamFailing)

    run(main())


@pytest.mark.parametrize("what", VERDICTS)
def test_once_the_last_one_has_said_no_nobody_is_asked_after_it(what: str) -> None:
    async def main() -> None:
        world = World("500", "good", what)
        assert isinstance(await world.refusal(attempt=2), type(ERRORS[what]()))
        assert world.since() == "c"

    run(main())


def test_the_last_one_is_asked_even_while_it_rests() -> None:
    async def main() -> None:
        world = World("manifest 404", "500")
        await world.refusal()
        world.does["b"] = "good"
        world.since()
        assert await world.ask() == "b"
        assert world.since() == "ab"
        world.does["b"] = "500"
        await world.refusal()
        world.does["b"] = "manifest 404"
        assert isinstance(await world.refusal(), ManifestUnknown)

    run(main())


def test_the_error_names_everybody_who_was_asked() -> None:
    async def main() -> None:
        world = World("hangs", "429", "manifest 404", "500")
        error = await world.refusal()
        assert type(error) is UpstreamBroken
        assert error.message == (
            "answered 500 (and before it: registry.test (a.test) did not answer within 3 s; is it up, and reachable from "
            "the cache?; too many; no such manifest)"
        )
        assert isinstance(error.__cause__, UpstreamBroken)

    run(main())


def test_the_headers_of_the_verdict_are_kept() -> None:
    async def main() -> None:
        assert (await World("500", "429").refusal()).headers == {"Retry-After": "7"}
        assert (await World("429", "500").refusal()).headers == {}

    run(main())


# --- whatever happens ---

DOINGS = st.sampled_from([*FAILURES, "good", "good", "blob 404", "403"])
STEPS = st.lists(
    st.tuples(
        st.lists(DOINGS, min_size=3, max_size=3),  # what the endpoints do from now on
        st.integers(0, 4),  # the attempt
        st.sampled_from([0.0, 0.0, 1.0, 5.0, 30.0]),  # seconds until the next request
    ),
    min_size=1,
    max_size=12,
)


@given(count=st.integers(1, 3), steps=STEPS)
def test_no_request_fails_while_somebody_could_answer_it(count: int, steps: list[tuple[list[str], int, float]]) -> None:
    """Whatever happened before: who would give it is asked for it, unless the registry itself says no."""

    async def main() -> None:
        world = World(*["good"] * count)
        for doing, attempt, pause in steps:
            world.does = dict(zip("abc"[:count], doing, strict=False))
            outcome = await world.outcome(attempt)
            authority = world.does["abc"[count - 1]]
            able = {name for name, does in world.does.items() if does == "good"}
            if authority in VERDICTS:
                assert outcome in able | {type(ERRORS[authority]()).__name__}
            elif able:
                assert outcome in able
            else:
                assert outcome in {"UpstreamUnavailable", "UpstreamBroken", "TooManyRequests"}
            await asyncio.sleep(pause)
        await world.endpoints.close()

    run(main())


@given(
    dead=st.sampled_from(FAILURES),
    is_first=st.booleans(),
    gaps=st.lists(st.sampled_from([0.0, 0.1, 1.0, 7.0, 61.0]), min_size=1, max_size=60),
)
def test_clients_ask_a_dead_mirror_once_whatever_their_rhythm(dead: str, is_first: bool, gaps: list[float]) -> None:
    """The rest is for probes, and they come at growing intervals."""

    async def main() -> None:
        world = World(*(dead, "good", "good") if is_first else ("blob 404", dead, "good"))
        name = "a" if is_first else "b"
        for gap in gaps:
            assert await world.ask() in "bc"
            await asyncio.sleep(gap)
        assert Counter(world.asked)[name] == 1
        assert len(world.probed) <= 4 + sum(gaps) / 60
        await world.endpoints.close()

    run(main())


@given(
    rounds=st.lists(st.sampled_from([0.1, 1.0, 6.0, 70.0]), min_size=1, max_size=40),
)
def test_clients_ask_an_endpoint_that_only_answers_probes_at_growing_intervals(rounds: list[float]) -> None:
    """``/v2/`` is answered and nothing else: it costs a client its budget once a minute at most, in the long run."""

    async def main() -> None:
        world = World("good", "good")

        async def question(where: Where) -> str:
            world.asked.append(world._name(where))
            if where == world.where["a"]:
                raise UpstreamBroken("answered 500")
            return "b"

        for gap in rounds:
            assert await world.endpoints.ask(question, LIMIT) == "b"
            await asyncio.sleep(gap)
        assert Counter(world.asked)["a"] <= 5 + sum(rounds) / 60
        await world.endpoints.close()

    run(main())
