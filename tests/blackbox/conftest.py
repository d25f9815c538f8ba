"""What the tests of private repositories share: a clock that is moved by hand, and a registry with accounts."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.blackbox.private import Clock, PrivateRegistry, Stock, fill, movable_clock


@pytest.fixture
async def clock() -> AsyncIterator[Clock]:
    """The time of caches that are started after it was asked for."""
    with movable_clock() as movable:
        yield movable


@pytest.fixture
async def private() -> AsyncIterator[PrivateRegistry]:
    """A registry with a token server and private repositories."""
    async with PrivateRegistry("token") as registry:
        yield registry


@pytest.fixture
def stock(private: PrivateRegistry) -> Stock:
    """What it has."""
    return fill(private)
