"""ImagePullBackOff: the kubelet's windows (client-go ``util/flowcontrol/backoff.go``)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.backoff import Window, next_window


def windows(gaps: list[float], initial: float = 10, most: float = 300) -> list[float]:
    """The lengths of the windows of failures so many seconds apart; None before the first."""
    now, last, seen = 1000.0, None, []
    for gap in gaps:
        now += gap
        last = next_window(last, now, initial, most)
        seen.append(last.seconds)
    return seen


def test_it_doubles_up_to_the_cap() -> None:
    """Each attempt at the end of its window fails."""
    assert windows([0, 10, 20, 40, 80, 160, 300, 300]) == [10, 20, 40, 80, 160, 300, 300, 300]


@pytest.mark.parametrize(("gap", "then"), [(599, 20), (600, 20), (601, 10), (86_400, 10)])
def test_it_begins_anew_when_nothing_has_failed_for_twice_the_cap(gap: float, then: float) -> None:
    assert windows([0, gap]) == [10, then]


@pytest.mark.parametrize(("now", "left"), [(100, 10), (105, 5), (110, 0), (1000, 0)])
def test_what_is_left_of_a_window(now: float, left: float) -> None:
    assert Window(100, 10).left(now) == left


@given(st.lists(st.floats(0, 2000), min_size=1, max_size=30), st.floats(0, 600), st.floats(0, 600))
def test_no_window_is_shorter_than_the_first_or_longer_than_the_most(gaps: list[float], initial: float, most: float) -> None:
    assert all(min(initial, most) <= seconds <= most for seconds in windows(gaps, initial, most))
