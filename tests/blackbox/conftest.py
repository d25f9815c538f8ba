"""What the tests share: a clock that is moved by hand, an image, and a registry with accounts."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.blackbox.oracle import REPO
from tests.blackbox.private import Clock, PrivateRegistry, Stock, fill, movable_clock
from tests.fakes.content import Image
from tests.fakes.registry import ScriptedRegistry


@pytest.fixture
async def clock() -> AsyncIterator[Clock]:
    """The time of caches that are started after it was asked for."""
    with movable_clock() as movable:
        yield movable


@pytest.fixture
def image(registry: ScriptedRegistry) -> Image:
    """What the registry has: ``team/app:1``, of one layer."""
    return registry.add_image(REPO, "1", [b"layer one"])


@pytest.fixture
async def private() -> AsyncIterator[PrivateRegistry]:
    """A registry with a token server and private repositories."""
    async with PrivateRegistry("token") as registry:
        yield registry


@pytest.fixture
def stock(private: PrivateRegistry) -> Stock:
    """What it has."""
    return fill(private)
