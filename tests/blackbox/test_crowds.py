"""Many clients, and clients that leave: one download, whoever comes and goes: F45, F46, T44; and a full disk."""

from __future__ import annotations

import asyncio
import random
import resource
from collections.abc import Iterator

import pytest

from tests.blackbox.oracle import LARGE, blob_of, blob_path, open_from, pulls_well, wrong_files
from tests.conftest import RunningCache
from tests.fakes import answers
from tests.fakes.client import NoResponse, finish
from tests.fakes.registry import ScriptedRegistry

REPO = "team/app"
SEED = 20260729
MI = 1024 * 1024


async def test_clients_that_vanish_anywhere_leave_nothing_behind(cache: RunningCache, registry: ScriptedRegistry) -> None:
    """F45: 200 clients, cold and warm, hang up by FIN or reset at random bytes; each download goes on to its end.

    That no task, descriptor or spool is left is what the fixture checks.
    """
    rng = random.Random(SEED)
    blobs = [blob_of(f"F45 {number}", rng.choice((1000, 70_000, LARGE))) for number in range(10)]
    paths = [blob_path(registry.add_blob(REPO, data)) for data in blobs]

    async def vanish(number: int) -> None:
        which = rng.randrange(len(blobs))
        stay = rng.randint(0, len(blobs[which]))
        reset = rng.random() < 0.5
        try:
            client = await cache.open(paths[which])
        except NoResponse:
            return
        body = await client.read_all(stay)
        assert body == blobs[which][: len(body)]
        await (client.abort() if reset else client.close())

    for _ in range(4):
        await asyncio.gather(*map(vanish, range(50)))
    await cache.settled()
    touched = {request.path for request in registry.requests}
    for path, data in zip(paths, blobs, strict=True):
        assert registry.count("GET", path) <= 1
        assert (cache.held(path.rpartition("/")[2]) == data) == (path in touched)
    async with asyncio.timeout(20):
        while cache.metric("connections"):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("followers", [0, 1, 20])
async def test_the_death_of_the_first_client_is_nothing_to_the_others(
    cache: RunningCache, registry: ScriptedRegistry, followers: int, how: str
) -> None:
    """F46: the fill goes on without its leader, and without anybody."""
    data = blob_of("F46", LARGE)
    digest = registry.add_blob(REPO, data)
    path = blob_path(digest)
    go_on = asyncio.Event()
    registry.script("GET", path, answers.gate(go_on, after=MI))
    leader = await cache.open(path)
    others = [await cache.open(path) for _ in range(followers)]
    await (leader.abort() if how == "rst" else leader.close())
    go_on.set()
    for other in others:
        body = await other.read_all()
        assert (body == data, other.clean_end) == (True, True)
        await other.close()
    await cache.settled()
    same = cache.held(digest) == data
    assert same
    assert registry.count("GET", path) == 1


async def test_a_leader_that_leaves_before_the_headers_leaves_a_download(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    """F46: the client is gone before upstream has said anything."""
    data = blob_of("F46", LARGE)
    digest = registry.add_blob(REPO, data)
    go_on = asyncio.Event()
    registry.script("GET", blob_path(digest), answers.gate(go_on))
    asking = asyncio.create_task(cache.get(blob_path(digest)))
    await registry.wait_for(lambda: registry.seen())
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    go_on.set()
    await pulls_well(cache, blob_path(digest), data)
    assert registry.count("GET", blob_path(digest)) == 1


async def test_a_herd_costs_one_upstream_request(cache: RunningCache, registry: ScriptedRegistry) -> None:
    """T44: 500 clients, from several addresses, want one cold blob."""
    data = blob_of("T44", MI + 100_000)
    path = blob_path(registry.add_blob(REPO, data))
    go_on = asyncio.Event()
    registry.script("GET", path, answers.gate(go_on, after=MI // 2))

    async def pull(number: int) -> bool:
        stream = await open_from(f"127.0.0.{2 + number % 5}", cache, path)
        async with stream:
            answer = await finish(stream)
        return answer.status == 200 and answer.clean_end and answer.body == data

    pulling = [asyncio.create_task(pull(number)) for number in range(500)]
    async with asyncio.timeout(30):
        while cache.metric("followers_total") < 499:
            await asyncio.sleep(0.005)
    go_on.set()
    assert await asyncio.gather(*pulling) == [True] * 500
    assert [request.method for request in registry.seen(path=path)] == ["GET"]
    assert registry.bytes_sent(path) == len(data)


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_storm_of_open_ended_ranges_costs_one_upstream_request(
    cache: RunningCache, registry: ScriptedRegistry, framing: str
) -> None:
    """Each asks ``bytes=N-`` of a cold blob, reads a chunk and hangs up, as containerd 2.1 and later do."""
    chunk = 256 * 1024
    data = blob_of("chunks", 8 * MI + 5)
    digest = registry.add_blob(REPO, data)
    path = blob_path(digest)
    if framing == "chunked":
        registry.script("GET", path, answers.chunked())

    async def part(start: int) -> bool:
        stream = await cache.open(path, [("Range", f"bytes={start}-")])
        async with stream:
            if stream.status == 200:  # parallelism is switched off without an error
                return framing == "chunked" and await stream.read_all(start + chunk) == data[: start + chunk]
            told = stream.headers.get("Content-Range")
            same = await stream.read_all(chunk) == data[start : start + chunk]
            return (stream.status, told, same) == (206, f"bytes {start}-{len(data) - 1}/{len(data)}", True)

    starts = list(range(0, len(data), chunk)) * 2
    random.Random(SEED).shuffle(starts)
    assert all(await asyncio.gather(*map(part, starts)))
    await cache.settled()
    assert registry.count("GET", path) == 1
    same = cache.held(digest) == data
    assert same
    assert cache.metric("fills_total", result="held") == 1


# --- the disk takes no more ---


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow beyond 1 MiB: writing more fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MI, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


NEWCOMERS = {
    "whole": [],
    "open range": [("Range", "bytes={at}-")],
    "range that does not hold": [("Range", "bytes={at}-"), ("If-Range", '"another"')],
    "suffix": [("Range", "bytes=-1000000")],
    "from 1 MiB": [("Range", f"bytes={MI}-")],
}


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("newcomer", NEWCOMERS)
@pytest.mark.parametrize("at", [4 * MI, 12 * MI])
async def test_whoever_joins_a_download_that_cannot_be_saved_gets_right_bytes(
    cache: RunningCache, registry: ScriptedRegistry, small_disk: None, newcomer: str, framing: str, at: int
) -> None:
    """F45: a window in memory stands in for the file; who comes after its beginning is not misled."""
    data = blob_of("window", 24 * MI)
    path = blob_path(registry.add_blob(REPO, data))
    go_on = asyncio.Event()
    frame = answers.chunked(65536) if framing == "chunked" else answers.with_headers({})
    registry.script("GET", path, answers.compose(frame, answers.gate(go_on, after=at + MI)))
    headers = [(name, value.format(at=at)) for name, value in NEWCOMERS[newcomer]]
    async with await cache.open(path) as leader:
        read = await leader.read_all(at)
        second = asyncio.create_task(cache.get(path, headers, within=15))
        async with asyncio.timeout(15):
            while cache.metric("followers_total") + cache.metric("fills_in_flight") + second.done() < 2:
                await asyncio.sleep(0.005)
        go_on.set()
        answer, rest = await asyncio.gather(second, leader.read_all())
    same = read + rest == data
    assert (same, leader.clean_end) == (True, True)
    start = {"suffix": len(data) - 1_000_000, "open range": at, "from 1 MiB": MI}.get(newcomer, 0)
    expected = data[start:] if answer.status == 206 else data
    same = answer.body == expected
    assert (answer.status in (200, 206), answer.clean_end, same) == (True, True, True)
    await cache.settled()
    assert wrong_files(cache) == cache.files("ingest") == []
