"""Attempts with credentials: wrong ones are bounded in a sliding window, right ones cost nothing, memory is bounded."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.access.attempts import Attempt, Attempts
from proxy.errors import TooManyAttempts
from tests.unit.clock import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def attempts(clock: Clock) -> Attempts:
    return Attempts(clock)


def refused(attempts: Attempts, client: str, upstream: str) -> int | None:
    """``Retry-After`` of an attempt that is refused; None if it may begin."""
    try:
        attempts.begin(client, upstream)
    except TooManyAttempts as error:
        return int(error.headers["Retry-After"])
    return None


def test_a_client_has_ten_in_a_minute_over_all_upstreams(attempts: Attempts, clock: Clock) -> None:
    for number in range(10):
        assert refused(attempts, "client", f"{number}.test") is None
        clock.now += 1
    assert refused(attempts, "client", "other.test") == 50
    clock.now += 49.5
    assert refused(attempts, "client", "other.test") == 1, "never less than a second"
    clock.now += 0.5
    assert refused(attempts, "client", "other.test") is None, "the first is a minute old"
    assert refused(attempts, "client", "other.test") == 1, "the second is not"


def test_after_what_retry_after_says_an_attempt_may_begin(attempts: Attempts, clock: Clock) -> None:
    clock.now = 0.1
    for _ in range(10):
        attempts.begin("client", "a.test")
        clock.now += 0.35
    seconds = refused(attempts, "client", "a.test")
    assert seconds is not None
    clock.now += seconds
    assert refused(attempts, "client", "a.test") is None


def test_one_client_does_not_use_up_what_another_has(attempts: Attempts) -> None:
    for _ in range(100):
        refused(attempts, "client", "a.test")
    assert refused(attempts, "other", "a.test") is None


def test_an_upstream_has_sixty_in_a_minute_over_all_clients(attempts: Attempts, clock: Clock) -> None:
    for number in range(60):
        assert refused(attempts, f"client-{number}", "a.test") is None
    clock.now += 15
    assert refused(attempts, "fresh", "a.test") == 45
    assert refused(attempts, "fresh", "b.test") is None, "another upstream has its own"
    clock.now += 45
    assert refused(attempts, "fresh", "a.test") is None


def test_what_is_refused_is_counted_nowhere(attempts: Attempts, clock: Clock) -> None:
    for _ in range(10):
        attempts.begin("client", "a.test")
    for _ in range(1000):
        assert refused(attempts, "client", "a.test") is not None
    for number in range(50):
        assert refused(attempts, f"client-{number}", "a.test") is None, "the refused did not count towards the upstream"
    assert refused(attempts, "late", "a.test") is not None
    for number in range(10):
        assert refused(attempts, "late", f"{number}.test") is None, "nor towards the client whom the upstream's limit hit"


def test_the_right_credential_costs_nothing(attempts: Attempts) -> None:
    for _ in range(1000):
        attempts.begin("client", "a.test").succeeded()
    for _ in range(9):
        attempts.begin("client", "a.test")
    right = attempts.begin("client", "a.test")
    assert refused(attempts, "client", "a.test") is not None
    right.succeeded()
    right.succeeded()
    assert refused(attempts, "client", "a.test") is None
    assert refused(attempts, "client", "a.test") is not None, "twice the same success gives back one"


def test_a_success_after_the_window_changes_nothing(attempts: Attempts, clock: Clock) -> None:
    slow = attempts.begin("client", "a.test")
    clock.now += 60
    for _ in range(10):
        attempts.begin("client", "a.test")
    slow.succeeded()
    assert refused(attempts, "client", "a.test") is not None


def test_the_answer_says_who_and_how_long_and_no_address(attempts: Attempts) -> None:
    for _ in range(10):
        attempts.begin("192.0.2.7", "a.test")
    with pytest.raises(TooManyAttempts) as caught:
        attempts.begin("192.0.2.7", "a.test")
    assert caught.value.status == 429
    assert "60 s" in caught.value.message
    assert "192.0.2.7" not in caught.value.message


def test_ten_thousand_clients_hold_no_more_than_the_upstreams_limit(attempts: Attempts, clock: Clock) -> None:
    for number in range(10_000):
        refused(attempts, f"client-{number}", "a.test")
        clock.now += 0.01
    assert len(attempts) == 60
    clock.now += 60
    kept = attempts.begin("other", "b.test")
    gc.collect()
    ours = [found for found in gc.get_objects() if isinstance(found, Attempt)]
    assert ours == [kept], "what is over is really gone, of every client and upstream"
    assert "client-" not in repr(vars(attempts)), "and the clients with it"


@dataclass
class Model:
    """The same promise over a plain list."""

    per_client: int
    per_upstream: int
    window: float
    begun: list[tuple[float, str, str, int]] = field(default_factory=list)

    def begin(self, now: float, client: str, upstream: str, number: int) -> bool:
        live = [each for each in self.begun if each[0] + self.window > now]
        if sum(each[1] == client for each in live) >= self.per_client:
            return False
        if sum(each[2] == upstream for each in live) >= self.per_upstream:
            return False
        self.begun.append((now, client, upstream, number))
        return True

    def succeeded(self, number: int) -> None:
        self.begun = [each for each in self.begun if each[3] != number]


STEPS = st.lists(
    st.tuples(st.just("wait"), st.integers(0, 7), st.just(0))
    | st.tuples(st.just("begin"), st.integers(0, 3), st.integers(0, 1))
    | st.tuples(st.just("success"), st.integers(0, 20), st.just(0)),
    max_size=80,
)


@given(STEPS, st.integers(1, 3), st.integers(1, 5))
def test_it_counts_as_a_plain_list_does(steps: list[tuple[str, int, int]], per_client: int, per_upstream: int) -> None:
    clock = Clock()
    attempts, model = Attempts(clock, per_client, per_upstream, 10.0), Model(per_client, per_upstream, 10.0)
    begun: list[Attempt | None] = []
    for action, one, other in steps:
        if action == "wait":
            clock.now += one
        elif action == "begin":
            client, upstream = f"client-{one}", f"{other}.test"
            expected = model.begin(clock.now, client, upstream, len(begun))
            try:
                begun.append(attempts.begin(client, upstream))
            except TooManyAttempts:
                begun.append(None)
            assert (begun[-1] is not None) is expected
        elif one < len(begun) and (attempt := begun[one]) is not None:
            attempt.succeeded()
            model.succeeded(one)
        assert len(attempts) <= 2 * per_upstream
