"""Ranges: one is honoured, everything else means the whole; checked against a model that counts bytes."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import RangeInvalid
from proxy.ranges import Range, Span, parse_range


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-", Range(0, None)),
        ("bytes=0-0", Range(0, 0)),
        ("bytes=5-9", Range(5, 9)),
        ("bytes=-5", Range(None, None, 5)),
        ("bytes=-0", Range(None, None, 0)),
        ("BYTES=1-2", Range(1, 2)),
        ("bytes= 1-2 ", Range(1, 2)),
        ("bytes=007-8", Range(7, 8)),
        (f"bytes={'9' * 19}-", Range(int("9" * 19), None)),
    ],
)
def test_one_range_is_understood(header: str, expected: Range) -> None:
    assert parse_range(header) == expected


@pytest.mark.parametrize(
    "header",
    [
        *(
            None,
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=a-b",
            "bytes=1",
            "bytes=2-1",
            "bytes=--1",
            "bytes=1--2",
            "bytes=+1-2",
            "items=0-1",
        ),
        *(
            "bytes=0-1,2-3",
            "bytes=0-,0-",
            "bytes=" + "0-," * 1000,
            "bytes=0-1,",
            "bytes 0-1",
            "bytes:0-1",
            "bytes=0-1/2",
            "bytes=0x1-2",
        ),
        *(
            "bytes=1 - 2",
            "bytes=\u0661-\u0662",
            "bytes=\uff11-",
            "bytes=0-1\n",
            "bytes=0-1\0",
            f"bytes={'9' * 20}-",
            f"bytes=0-{'9' * 20}",
            "bytes=1.5-2",
        ),
    ],
)
def test_what_is_not_one_range_means_the_whole(header: str | None) -> None:
    assert parse_range(header) is None


@pytest.mark.parametrize(
    ("header", "size", "span"),
    [
        ("bytes=0-", 10, Span(0, 10)),
        ("bytes=0-0", 10, Span(0, 1)),
        ("bytes=9-9", 10, Span(9, 10)),
        ("bytes=5-100", 10, Span(5, 10)),
        ("bytes=-3", 10, Span(7, 10)),
        ("bytes=-10", 10, Span(0, 10)),
        ("bytes=-11", 10, Span(0, 10)),
        ("bytes=0-", 0, None),
        ("bytes=5-", 0, None),
        ("bytes=-5", 0, None),
    ],
)
def test_a_range_within_content_of_known_size(header: str, size: int, span: Span | None) -> None:
    asked = parse_range(header)
    assert asked is not None
    assert asked.within(size) == span


@pytest.mark.parametrize(
    ("header", "size"), [("bytes=10-", 10), ("bytes=11-12", 10), ("bytes=-0", 10), (f"bytes={'9' * 19}-", 10)]
)
def test_a_range_behind_the_end_is_refused_and_tells_the_size(header: str, size: int) -> None:
    asked = parse_range(header)
    assert asked is not None
    with pytest.raises(RangeInvalid) as refused:
        asked.within(size)
    assert refused.value.headers == {"Content-Range": f"bytes */{size}"}


def model(first: int | None, last: int | None, size: int) -> list[int]:
    """The positions that RFC 9110 14.1.2 selects, by looking at each."""
    if first is None:
        return [at for at in range(size) if at >= size - (last or 0)]
    return [at for at in range(size) if at >= first and (last is None or at <= last)]


@given(st.none() | st.integers(0, 40), st.none() | st.integers(0, 40), st.integers(1, 40))
def test_a_range_selects_what_the_rfc_says(first: int | None, last: int | None, size: int) -> None:
    asked = parse_range(f"bytes={'' if first is None else first}-{'' if last is None else last}")
    if (first is None and last is None) or (first is not None and last is not None and last < first):
        assert asked is None
        return
    assert asked is not None
    expected = model(first, last, size)
    if not expected:
        with pytest.raises(RangeInvalid):
            asked.within(size)
        return
    span = asked.within(size)
    assert span is not None
    assert list(range(span.start, span.stop)) == expected


@given(
    st.text(st.sampled_from([*"bytes=0123456789-, \t/", "\u0661"]), max_size=40) | st.text(max_size=40),
    st.integers(0, 2**63),
)
def test_a_span_never_leaves_the_content(header: str, size: int) -> None:
    asked = parse_range(header)
    if asked is None:
        return
    try:
        span = asked.within(size)
    except RangeInvalid:
        return
    assert span is None or 0 <= span.start < span.stop <= size


@pytest.mark.parametrize("unit", ["0", "-", "0-,", " ", "\t", "bytes=", "9"])
def test_no_header_takes_long(unit: str) -> None:
    began = time.perf_counter()
    parse_range("bytes=" + unit * 100_000)
    assert time.perf_counter() - began < 2
