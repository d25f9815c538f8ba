"""Docker Hub's rate limit headers, in both spellings, and ``Retry-After``: whatever comes is read or passed over."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from proxy.upstream.quota import RateLimit, parse_rate_limit, parse_retry_after

NOW = 1_789_996_400.0


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        (
            {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "76;w=21600", "docker-ratelimit-source": "192.0.2.1"},
            RateLimit(100, 76, 21600, "192.0.2.1", NOW),
        ),
        (
            {"X-RateLimit-Limit": "180;w=3600", "X-RateLimit-Remaining": "179;w=3600"},
            RateLimit(180, 179, 3600, "", NOW),
        ),
        ({"RateLimit-Remaining": "5"}, RateLimit(None, 5, None, "", NOW)),
        ({"RateLimit-Limit": "100"}, RateLimit(100, None, None, "", NOW)),
        ({}, None),
        ({"ratelimit-limit": "many", "ratelimit-remaining": "-1"}, None),
        ({"docker-ratelimit-source": "192.0.2.1"}, None),
        ({"ratelimit-remaining": "1" * 40}, None),
    ],
)
def test_what_is_told(headers: dict[str, str], told: RateLimit | None) -> None:
    assert parse_rate_limit(CIMultiDict(headers), NOW) == told


@pytest.mark.parametrize(
    ("remaining", "window", "reserve", "after", "low"),
    [
        (9, 3600, 10, 0, True),
        (10, 3600, 10, 0, False),
        (0, 3600, 0, 0, False),
        (0, 3600, 1, 3599, True),
        (0, 3600, 1, 3600, False),  # a window later it is not known any more
        (0, None, 1, 3599, True),
        (None, 3600, 10, 0, False),
    ],
)
def test_whether_it_is_low(remaining: int | None, window: int | None, reserve: int, after: float, low: bool) -> None:
    assert RateLimit(100, remaining, window, "", NOW).is_low(reserve, NOW + after) is low


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7),
        ("0", 0),
        ("Mon, 21 Sep 2026 13:13:50 GMT", 30),
        ("Mon, 21 Sep 2020 13:13:50 GMT", 0),
        ("", 0),
        ("soon", 0),
        ("-5", 0),
        ("1e9", 0),
        ("9" * 30, 0),
    ],
)
def test_how_long_to_wait(value: str, seconds: float) -> None:
    assert parse_retry_after(value, NOW) == seconds


@given(st.text(max_size=40), st.text(max_size=40), st.text(max_size=40))
def test_nothing_that_comes_is_a_fault(limit: str, remaining: str, after: str) -> None:
    parse_rate_limit({"ratelimit-limit": limit, "x-ratelimit-remaining": remaining}, NOW)
    assert parse_retry_after(after, NOW) >= 0
