"""What a registry failed to give is asked for once a window; what it refused, or does not have, a little later."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from proxy.config.model import BackoffConfig
from proxy.errors import (
    BlobUnknown,
    CacheFailing,
    CredentialRefused,
    Denied,
    ManifestUnknown,
    NameUnknown,
    RangeInvalid,
    RegistryError,
    SecretRefused,
    TooManyRequests,
    UpstreamBroken,
    UpstreamRefused,
    UpstreamUnavailable,
)
from proxy.upstream.failures import Failures
from tests.unit.clock import Clock


def failures(clock: Clock, **keys: str) -> Failures[str]:
    """Those of one upstream."""
    return Failures(BackoffConfig.model_validate(keys), clock)


def attempt(known: Failures[str], error: RegistryError | None, key: str = "a") -> RegistryError | None:
    """What is told: None where it is given. ``error``: what the registry says, if it is asked."""
    try:
        with known.attempt(key):
            if error is not None:
                raise error
    except RegistryError as told:
        return told
    return None


def is_asked(known: Failures[str], key: str = "a") -> bool:
    """Whether the registry would be asked; nothing changes by it."""
    try:
        known.check(key)
    except RegistryError:
        return False
    return True


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (UpstreamUnavailable("down"), 10),
        (UpstreamBroken("500"), 10),
        (UpstreamRefused("418"), 10),
        (ManifestUnknown("404"), 7),
        (BlobUnknown("404"), 7),
        (NameUnknown("404"), 7),
        (Denied("403"), 5),
        (CredentialRefused("401"), 5),
        (SecretRefused("401"), 5),
        (TooManyRequests("429"), 0),
        (RangeInvalid("416"), 0),
        (CacheFailing("disk"), 0),
    ],
)
def test_how_long_it_is_not_asked_for_again(error: RegistryError, seconds: float) -> None:
    """A 429 is about who asks; a range, or a fault of the cache, says nothing of what is asked for."""
    clock = Clock()
    known = failures(clock, notFound="7s", refused="5s")
    assert attempt(known, error) is error
    assert is_asked(known) == (seconds == 0)
    assert is_asked(known, "b"), "it is about this one alone"
    clock.now += seconds - 0.1
    assert is_asked(known) == (seconds == 0)
    clock.now += 0.1
    assert is_asked(known)


def test_the_windows_grow_with_each_attempt_and_with_nothing_else() -> None:
    clock = Clock()
    known = failures(clock)
    for seconds in (10, 20, 40, 80, 160, 300, 300):
        assert attempt(known, UpstreamBroken("500")) is not None
        for _ in range(5):
            clock.now += seconds / 10
            told = attempt(known, UpstreamBroken("nobody hears this"))
            assert told is not None
            assert told.message.startswith("500; it was not asked again")
        clock.now += seconds / 2


def test_success_forgets() -> None:
    clock = Clock()
    known = failures(clock)
    for _ in range(3):
        attempt(known, UpstreamBroken("500"))
        clock.now += 100
    assert attempt(known, None) is None
    attempt(known, UpstreamBroken("500"))
    clock.now += 10
    assert is_asked(known)


def test_the_answer_of_before_names_the_next_attempt() -> None:
    """In seconds, as a time of day, and in ``Retry-After``; its kind and what it tells stay."""
    clock = Clock()
    known = failures(clock)
    attempt(known, UpstreamBroken("registry.test answered 500", headers={"X": "y"}))
    clock.now += 3.5
    told = attempt(known, None)
    assert isinstance(told, UpstreamBroken)
    assert told.headers == {"X": "y", "Retry-After": "7"}
    assert "registry.test answered 500; it was not asked again: the next attempt is in 7 s, at " in told.message
    attempt(known, CredentialRefused("401", is_certain=False), "b")
    refused = attempt(known, None, "b")
    assert isinstance(refused, CredentialRefused)
    assert (refused.is_certain, refused.is_remembered) == (False, True)
    assert "Retry-After" not in refused.headers


def test_when_a_window_is_over_one_finds_out_for_all() -> None:
    """While that attempt is under way the others have the answer of before; if it is given up, the next one tries."""
    clock = Clock()
    known = failures(clock)
    attempt(known, UpstreamBroken("500"))
    clock.now += 10
    trial = known.attempt("a")
    trial.__enter__()
    assert not is_asked(known)
    cancelled = asyncio.CancelledError()
    assert not trial.__exit__(type(cancelled), cancelled, None)
    assert is_asked(known)
    with known.attempt("a"):
        assert not is_asked(known)
    assert is_asked(known)


def test_a_first_attempt_shuts_nobody_out() -> None:
    known = failures(Clock())
    with known.attempt("a"):
        assert is_asked(known)


@pytest.mark.parametrize(("retry_after", "seconds"), [(7.0, 7), (0.0, 10), (500.0, 500)])
def test_a_limit_holds_for_as_long_as_the_registry_says(retry_after: float, seconds: float) -> None:
    """Where it does not say, as grown."""
    clock = Clock()
    known = failures(clock)
    known.remember("a", TooManyRequests("429"), retry_after)
    clock.now += seconds - 0.5
    assert not is_asked(known)
    clock.now += 0.5
    assert is_asked(known)


def test_what_is_remembered_is_not_remembered_again() -> None:
    clock = Clock()
    known, other = failures(clock), failures(clock)
    attempt(known, UpstreamBroken("500"))
    told = attempt(known, None)
    attempt(other, told)
    assert is_asked(other)


def test_the_end_of_an_outage_ends_its_windows_and_no_refusal() -> None:
    clock = Clock()
    known = failures(clock)
    attempt(known, UpstreamBroken("its own"), "before")
    clock.now += 5
    since = clock.now
    attempt(known, UpstreamUnavailable("down"), "during")
    attempt(known, Denied("403"), "refused")
    clock.now += 1
    known.end(since)
    assert [is_asked(known, key) for key in ("before", "during", "refused")] == [False, True, False]
    known.clear()
    assert [is_asked(known, key) for key in ("before", "refused")] == [True, True]


@pytest.mark.parametrize("make", [lambda: ManifestUnknown("404"), lambda: UpstreamBroken("500"), lambda: Denied("403")])
def test_the_tables_are_bounded(make: Callable[[], RegistryError]) -> None:
    """And names that do not exist push out no failure."""
    known = failures(Clock())
    attempt(known, UpstreamBroken("500"), "kept")
    for number in range(11_000):
        attempt(known, make(), f"x{number}")
    assert len(known.all()) <= 10_001
    assert is_asked(known, "kept") == isinstance(make(), UpstreamBroken)


def test_what_is_over_is_dropped() -> None:
    """A failure is kept for as long as the next one would grow by it."""
    clock = Clock()
    known = failures(clock)
    attempt(known, ManifestUnknown("404"), "no")
    attempt(known, UpstreamBroken("500"), "failure")
    clock.now += 11
    known.drop_expired()
    assert known.known() == {"failure"}
    clock.now += 600
    known.drop_expired()
    assert known.known() == set()


def test_nothing_is_remembered_where_that_is_switched_off() -> None:
    known = failures(Clock(), initial="0s", notFound="0s", refused="0s")
    for error in (UpstreamBroken("500"), ManifestUnknown("404"), Denied("403")):
        attempt(known, error)
        assert is_asked(known)
