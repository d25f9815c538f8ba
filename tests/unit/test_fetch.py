"""What the table of downloads remembers of wrong content, and whom it keeps from going on with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from proxy.admission import Admission
from proxy.errors import CacheFailing, UpstreamBroken
from proxy.fetch import VERIFIED_FIRST, Fetcher, Mismatch, Source
from proxy.metrics import Metrics
from proxy.names import Repository, digest_of
from proxy.spool import SpoolReader
from proxy.storage.base import Origin
from proxy.storage.store import Store
from proxy.threads import Threads

GOOD, OTHER, BAD = (Origin(name, Repository("team/app"), "anonymous") for name in ("good.test", "other.test", "bad.test"))
LARGE, SMALL = b"t" * (VERIFIED_FIRST + 1), b"t" * 1000
PATIENCE = 20.0


class Wrong:
    """Content of the right size, and other bytes, once ``held`` is set."""

    def __init__(self, right: bytes, held: asyncio.Event) -> None:
        self.offset = 0
        self.size: int | None = len(right)
        self._data = b"x" * len(right)
        self._held = held

    async def read(self) -> bytes:
        await self._held.wait()
        data, self._data = self._data, b""
        return data

    def blame(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture
async def fetcher(tmp_path: Path) -> AsyncIterator[Fetcher]:
    metrics, threads = Metrics(), Threads(1)
    store = Store.open(tmp_path / "cache", metrics)
    loop = asyncio.get_running_loop()
    admission = Admission(None, {"": 16}, 120.0, loop.time, loop.call_later, metrics)
    fetcher = Fetcher(store, threads, metrics, admission, limit=1 << 30)
    yield fetcher
    await fetcher.close()
    threads.close()
    store.close()


def sends_wrong(right: bytes, held: asyncio.Event) -> Source:
    async def source(offset: int, turn: int) -> Wrong:
        return Wrong(right, held)

    return source


def join(fetcher: Fetcher, right: bytes, origin: Origin, held: asyncio.Event, start: int = 0) -> SpoolReader:
    source = sends_wrong(right, held)
    return fetcher.join(digest_of(right), origin, source, size=len(right), start=start, floor=30.0)


async def until_cut(reader: SpoolReader) -> None:
    """Reads what is to be had of what turns out to be wrong."""
    with pytest.raises(Mismatch):
        async for _ in reader.read(0, None):
            pass
    reader.close()


async def test_who_was_given_wrong_content_of_another_upstream_does_not_get_its_rest(fetcher: Fetcher) -> None:
    """It asks in its own registry's name. Who did not follow may go on, and who begins anew may begin."""
    held = asyncio.Event()
    async with asyncio.timeout(PATIENCE):
        readers = [join(fetcher, LARGE, origin, held) for origin in (BAD, GOOD)]
        for reader in readers:
            await reader.ready(VERIFIED_FIRST, PATIENCE)
        held.set()
        await asyncio.gather(*map(until_cut, readers))
    for origin in (BAD, GOOD):
        with pytest.raises(UpstreamBroken, match="a moment ago"):
            join(fetcher, LARGE, origin, held, start=1)
    join(fetcher, LARGE, OTHER, held, start=1).close()
    join(fetcher, LARGE, GOOD, held).close()  # from the beginning


async def test_who_was_told_nothing_of_wrong_content_may_go_on_with_what_it_has(fetcher: Fetcher) -> None:
    """It came with a part of right content, and followed what was found wrong before it was given a status."""
    held = asyncio.Event()
    held.set()
    async with asyncio.timeout(PATIENCE):
        readers = [join(fetcher, SMALL, BAD, held), join(fetcher, SMALL, GOOD, held, start=1)]
        for reader in readers:
            with pytest.raises(Mismatch):
                await reader.ready(VERIFIED_FIRST, PATIENCE)
            reader.close()
    join(fetcher, SMALL, GOOD, held, start=1).close()


# --- waiting for a turn ---


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncIterator[tuple[Fetcher, Metrics]]:
    """One download at a time."""
    metrics, threads, loop = Metrics(), Threads(1), asyncio.get_running_loop()
    store = Store.open(tmp_path / "cache", metrics)
    admission = Admission(None, {"": 1}, 120.0, loop.time, loop.call_later, metrics)
    fetcher = Fetcher(store, threads, metrics, admission, limit=1 << 30)
    yield fetcher, metrics
    await fetcher.close()
    threads.close()
    store.close()


async def test_a_newcomer_in_the_moment_in_which_the_last_leaves_finds_a_download_that_will_be(
    narrow: tuple[Fetcher, Metrics],
) -> None:
    """What waited for nobody any more is out of the table and the line before anything else happens."""
    fetcher, metrics = narrow
    held = asyncio.Event()
    running = join(fetcher, LARGE, GOOD, held)
    first = join(fetcher, SMALL, GOOD, held)
    first.close()
    assert fetcher.origin(digest_of(SMALL)) is None
    second = join(fetcher, SMALL, GOOD, held)
    assert metrics.registry.get_sample_value("pullcache_fills_waiting") == 1
    held.set()
    async with asyncio.timeout(PATIENCE):
        with pytest.raises(Mismatch):  # it was fetched
            await second.ready(VERIFIED_FIRST, PATIENCE)
    second.close()
    running.close()


async def test_who_waits_when_the_cache_stops_is_told(narrow: tuple[Fetcher, Metrics]) -> None:
    fetcher, _ = narrow
    readers = [join(fetcher, right, GOOD, asyncio.Event()) for right in (LARGE, SMALL)]
    await fetcher.close()
    with pytest.raises(CacheFailing, match="shutting down"):
        await readers[1].ready(VERIFIED_FIRST, PATIENCE)
    for reader in readers:
        reader.close()
