"""Serial and parallel image pulls: what the registry sees of them, who waits and for how long; T43."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest

from proxy.admission import LINGER
from tests.blackbox.helpers import message
from tests.blackbox.oracle import LARGE, SMALL, blob_of, blob_path, manifest_path
from tests.blackbox.private import ALICE, APP, EXTERNAL, Clock, PrivateRegistry, fetch_from, until, with_access
from tests.conftest import RunningCache, StartCache, upstream
from tests.fakes.answers import gate, perform
from tests.fakes.client import WireResponse
from tests.fakes.content import Image
from tests.fakes.messages import Answer, Request
from tests.fakes.registry import ScriptedRegistry

REPO = "team/app"
PATIENT = {"progress": "1h", "headers": "1h"}
"""Of an upstream that may be silent while the clock is moved."""


class Held:
    """Blobs that the registry has been asked for, and does not give before it is told to."""

    def __init__(self, registry: ScriptedRegistry) -> None:
        self._registry = registry
        self._gates: dict[str, list[asyncio.Event]] = {}
        self.most = 0
        self.is_open = False
        registry.script("GET", lambda request: "/blobs/" in request.path, self._hold, forever=True)

    def _hold(self, request: Request) -> Answer:
        event = asyncio.Event()
        if self.is_open:
            event.set()
        else:
            self._gates.setdefault(request.path, []).append(event)
        self.most = max(self.most, len(self.paths))
        return perform(gate(event), request, self._registry.truth)

    @property
    def paths(self) -> list[str]:
        """In the order in which they were asked for."""
        return list(self._gates)

    async def wait_for(self, *paths: str) -> None:
        """Until these have been asked for."""
        await self._registry.wait_for(lambda: set(paths) <= set(self._gates))

    def release(self, path: str) -> None:
        """Gives one of them."""
        for event in self._gates.pop(path):
            event.set()

    def release_all(self) -> None:
        """Gives all of them, and what is asked for from now on at once."""
        self.is_open = True
        for path in self.paths:
            self.release(path)


@pytest.fixture
def images(registry: ScriptedRegistry) -> list[Image]:
    """Five of one repository, with six layers each, of which two are the same."""
    shared = [blob_of(f"shared {number}", SMALL) for number in range(2)]
    own = [[blob_of(f"{image} {number}", SMALL) for number in range(4)] for image in range(5)]
    return [registry.add_image(REPO, str(number), [*shared, *layers]) for number, layers in enumerate(own)]


def blobs_of(image: Image) -> list[str]:
    """Paths of its config and layers."""
    return [blob_path(digest) for digest in (image.config_digest, *image.layer_digests)]


def own_layers(image: Image) -> list[str]:
    """Paths of those that no other image has."""
    return [blob_path(digest) for digest in image.layer_digests[2:]]


async def tell(cache: RunningCache, tag: str, source: str = "127.0.0.1") -> None:
    """A client begins a pull."""
    assert (await fetch_from(source, cache, "GET", manifest_path(tag))).status == 200


async def pull(cache: RunningCache, tag: str, image: Image, source: str) -> None:
    """A client that pulls an image, and comes again when it is sent away."""
    await tell(cache, tag, source)

    async def blob(path: str, data: bytes) -> None:
        while (answer := await fetch_from(source, cache, "GET", path)).status == 503:
            assert answer.headers.get("Retry-After")
        assert (answer.status, answer.body, answer.clean_end) == (200, data, True)

    await asyncio.gather(*(blob(*each) for each in zip(blobs_of(image), (image.config, *image.layers), strict=True)))


@pytest.mark.parametrize(
    ("keys", "limit"), [({"maxParallelImagePulls": 2}, 2), ({"serializeImagePulls": True}, 1)], ids=["parallel", "serial"]
)
async def test_never_more_images_at_once_than_allowed_and_in_order(
    start_cache: StartCache, registry: ScriptedRegistry, images: list[Image], keys: dict[str, object], limit: int
) -> None:
    """5 images of 6 layers, two of them shared, 20 clients each. What is held is served meanwhile."""
    cache = await start_cache(upstream(registry), **keys)
    hit = blob_path(registry.add_blob(REPO, b"held"))
    assert (await cache.get(hit)).status == 200
    held, pulling = Held(registry), []
    for number, image in enumerate(images):
        sources = [f"127.0.{number + 1}.{client + 1}" for client in range(20)]
        pulling += [asyncio.create_task(pull(cache, str(number), image, source)) for source in sources]
        if number < limit:
            await held.wait_for(*own_layers(image))
        else:
            expected = 5 * (number - limit + 1)
            await until(lambda expected=expected: cache.metric("fills_waiting") == expected)  # type: ignore[misc]
    wishes = {path: {number for number, each in enumerate(images) if path in blobs_of(each)} for path in held.paths}
    asked: list[str] = []
    while not all(task.done() for task in pulling):
        await until(lambda: bool(held.paths) or all(task.done() for task in pulling))
        wishes |= {path: {number for number, each in enumerate(images) if path in blobs_of(each)} for path in held.paths}
        in_flight = [wishes[path] for path in held.paths]
        chosen = combinations(range(5), limit)
        assert any(all(wanted & set(some) for wanted in in_flight) for some in chosen), "too many images at once"
        assert cache.metric("image_places") <= limit
        answer = await cache.get(hit)
        assert (answer.status, answer.body) == (200, b"held")
        if held.paths:
            asked.append(held.paths[0])
            held.release(held.paths[0])
    await asyncio.gather(*pulling)
    order = [number for path in asked if len(wishes[path]) == 1 for number in wishes[path]]
    first_of_each = list(dict.fromkeys(order))
    assert first_of_each == [0, 1, 2, 3, 4]
    assert all(registry.count("GET", path) == 1 for image in images for path in blobs_of(image))
    await until(lambda: cache.metric("image_places") == 0)


async def hanging(cache: RunningCache, path: str) -> asyncio.StreamWriter:
    """A client that has asked, and can hang up."""
    _, writer = await asyncio.open_connection(cache.host, cache.port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: cache\r\n\r\n".encode())
    return writer


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_who_vanishes_leaves_the_line_at_once(
    start_cache: StartCache, registry: ScriptedRegistry, images: list[Image], how: str
) -> None:
    """And what waited for nobody else is never asked for. What waits has no file."""
    cache = await start_cache(upstream(registry), serializeImagePulls=True)
    held = Held(registry)
    for number in (0, 1, 2):
        await tell(cache, str(number))
    running = asyncio.create_task(cache.get(own_layers(images[0])[0]))
    await held.wait_for(own_layers(images[0])[0])
    waiting = [await hanging(cache, path) for path in own_layers(images[1]) * 3]
    staying = asyncio.create_task(cache.get(own_layers(images[2])[0]))
    await until(lambda: cache.metric("fills_waiting") == 5 and cache.metric("followers_total") == 8)
    assert len(cache.files("ingest")) == 1
    for writer in waiting:
        if how == "rst":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()
    await until(lambda: cache.metric("fills_waiting") == 1)
    held.release_all()
    assert [answer.status for answer in await asyncio.gather(running, staying)] == [200, 200]
    assert not [path for path in own_layers(images[1]) if registry.count("GET", path)]


async def waits(cache: RunningCache, path: str, number: int = 1) -> asyncio.Task[WireResponse]:
    """A client that asks for a blob, and waits as one of so many downloads."""
    task = asyncio.create_task(cache.get(path))
    await until(lambda: cache.metric("fills_waiting") == number)
    return task


async def moved(clock: Clock, seconds: float, condition: Callable[[], object]) -> None:
    """The time passes, and brings this about."""
    clock.advance(seconds)
    await until(lambda: bool(condition()))


async def test_a_turn_is_waited_for_20_s_and_who_was_sent_away_keeps_its_place(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, images: list[Image]
) -> None:
    cache = await start_cache(upstream(registry, timeouts=PATIENT), serializeImagePulls=True)
    held = Held(registry)
    for number in (0, 1, 2):
        await tell(cache, str(number))
    first, second, third = (own_layers(image)[0] for image in images[:3])
    running = asyncio.create_task(cache.get(first))
    await held.wait_for(first)
    sent_away = await waits(cache, second)
    clock.advance(19)
    later = await waits(cache, third, 2)
    await moved(clock, 1, sent_away.done)
    answer = sent_away.result()
    assert (answer.status, answer.headers.get("Retry-After")) == (503, "5")
    for part in ("pulled 1 at a time", "serializeImagePulls, maxParallelImagePulls", "0 others", "kept for 120 s"):
        assert part in message(answer)
    again = await waits(cache, second, 2)
    held.release(first)
    await running
    await moved(clock, LINGER, lambda: held.paths)
    assert held.paths == [second]
    held.release_all()
    assert (await again).status == 200
    clock.advance(LINGER)
    assert (await later).status == 200


async def test_what_waits_longer_than_queue_timeout_fails(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, images: list[Image]
) -> None:
    cache = await start_cache(upstream(registry, timeouts=PATIENT), serializeImagePulls=True, queueTimeout="15s")
    held = Held(registry)
    for number in (0, 1):
        await tell(cache, str(number))
    running = asyncio.create_task(cache.get(own_layers(images[0])[0]))
    await held.wait_for(own_layers(images[0])[0])
    waiting = await waits(cache, own_layers(images[1])[0])
    await moved(clock, 15, waiting.done)
    assert (waiting.result().status, waiting.result().headers.get("Retry-After")) == (503, "5")
    assert cache.metric("fills_waiting") == 0
    held.release_all()
    assert (await running).status == 200


@pytest.fixture
def large(registry: ScriptedRegistry) -> Image:
    """An image with one layer that is not verified before its headers."""
    return registry.add_image("team/large", "1", [blob_of("early", LARGE), b"small"])


async def busy(cache: RunningCache, registry: ScriptedRegistry, held: Held) -> asyncio.Task[WireResponse]:
    """Its one slot is taken."""
    path = blob_path(registry.add_blob("team/large", b"busy"), "team/large")
    running = asyncio.create_task(cache.get(path))
    await held.wait_for(path)
    return running


async def test_headers_go_out_early_where_the_answer_is_certain(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, large: Image
) -> None:
    """After 20 s: the status, the size, and no byte of the body before the download has its slot."""
    cache = await start_cache(upstream(registry, timeouts=PATIENT, maxConcurrentFetches=1))
    assert (await cache.get(manifest_path("1", "team/large"))).status == 200
    held = Held(registry)
    running = await busy(cache, registry, held)
    path = blob_path(large.layer_digests[0], "team/large")
    whole = asyncio.create_task(cache.open(path))
    part = asyncio.create_task(cache.open(path, [("Range", "bytes=7-")]))
    await until(lambda: cache.metric("fills_waiting") == 1 and cache.metric("followers_total") == 1)
    assert not whole.done()
    await moved(clock, 20, lambda: whole.done() and part.done())
    assert registry.count("GET", path) == 0
    async with await whole as first, await part as second:
        assert (first.status, first.headers.get("Content-Length")) == (200, str(LARGE))
        assert (second.status, second.headers.get("Content-Range")) == (206, f"bytes 7-{LARGE - 1}/{LARGE}")
        held.release_all()
        bodies = await asyncio.gather(first.read_all(), second.read_all())
        assert (bodies[0] == large.layers[0], bodies[1] == large.layers[0][7:]) == (True, True)
        assert (first.clean_end, second.clean_end) == (True, True)
    assert (await running).status == 200


async def test_a_body_whose_headers_are_out_is_cut_after_queue_timeout(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, large: Image
) -> None:
    cache = await start_cache(upstream(registry, timeouts=PATIENT, maxConcurrentFetches=1), queueTimeout="25s")
    assert (await cache.get(manifest_path("1", "team/large"))).status == 200
    held = Held(registry)
    running = await busy(cache, registry, held)
    whole = asyncio.create_task(cache.open(blob_path(large.layer_digests[0], "team/large")))
    await until(lambda: cache.metric("fills_waiting") == 1)
    await moved(clock, 20, whole.done)
    async with await whole as stream:
        clock.advance(5)
        assert (stream.status, await stream.read_all(), stream.clean_end) == (200, b"", False)
    held.release_all()
    assert (await running).status == 200


NOT_CERTAIN: dict[str, dict[str, Any]] = {
    "no manifest names it": {"is_told": False},
    "small": {"layer": 1},
    "its image has no place": {"keys": {"serializeImagePulls": True}},
}


@pytest.mark.parametrize("why", NOT_CERTAIN)
async def test_where_it_is_not_they_do_not(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, large: Image, why: str
) -> None:
    case: dict[str, Any] = {"is_told": True, "layer": 0, "keys": {}, **NOT_CERTAIN[why]}
    cache = await start_cache(upstream(registry, timeouts=PATIENT, maxConcurrentFetches=1), **case["keys"])
    if case["is_told"]:
        assert (await cache.get(manifest_path("1", "team/large"))).status == 200
    held = Held(registry)
    running = await busy(cache, registry, held)
    path = blob_path(large.layer_digests[case["layer"]], "team/large")
    waiting = await waits(cache, path)
    await moved(clock, 20, waiting.done)
    assert waiting.result().status == 503
    key = "maxParallelImagePulls" if case["keys"] else "maxConcurrentFetches"
    assert key in message(waiting.result())
    held.release_all()
    assert (await running).status == 200
    assert registry.count("GET", path) == 0


async def test_what_a_private_manifest_names_is_not_certain(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry
) -> None:
    """Who may write a manifest can name what he may not read: only the registry's answer to the blob itself is one."""
    image = private.add_image(APP, "1", [blob_of("private", LARGE)])
    small = private.add_blob(APP, b"busy")
    private.allow(ALICE, APP)
    section = {"timeouts": PATIENT, "maxConcurrentFetches": 1}
    cache = await start_cache(with_access(private, "verify", section=section), externalURL=EXTERNAL)
    assert (await cache.get(manifest_path("1", APP), ALICE.headers)).status == 200
    held = Held(private)
    running = asyncio.create_task(cache.get(blob_path(small, APP), ALICE.headers))
    await held.wait_for(blob_path(small, APP))
    waiting = asyncio.create_task(cache.get(blob_path(image.layer_digests[0], APP), ALICE.headers))
    await until(lambda: cache.metric("fills_waiting") == 1)
    await moved(clock, 20, waiting.done)
    assert waiting.result().status == 503
    held.release_all()
    assert (await running).status == 200


async def test_who_follows_a_download_that_runs_waits_for_no_turn(
    start_cache: StartCache, registry: ScriptedRegistry, images: list[Image]
) -> None:
    """For another image, which has no place."""
    cache = await start_cache(upstream(registry), serializeImagePulls=True)
    held = Held(registry)
    await tell(cache, "0", "127.0.0.2")
    await tell(cache, "1", "127.0.0.3")
    shared = blob_path(images[0].layer_digests[0])
    first = asyncio.create_task(fetch_from("127.0.0.2", cache, "GET", shared))
    await held.wait_for(shared)
    second = asyncio.create_task(fetch_from("127.0.0.3", cache, "GET", shared))
    await until(lambda: cache.metric("followers_total") == 1)
    assert (cache.metric("image_places"), cache.metric("fills_waiting")) == (1, 0)
    held.release_all()
    assert [answer.status for answer in await asyncio.gather(first, second)] == [200, 200]


async def test_t43_an_upstream_sees_no_more_transfers_than_it_may(
    start_cache: StartCache, registry: ScriptedRegistry
) -> None:
    """400 cold digests at once: 16 are fetched, the others wait without a file, and what is held is served."""
    cache = await start_cache(upstream(registry))
    hit = blob_path(registry.add_blob(REPO, b"held"))
    assert (await cache.get(hit)).status == 200
    held = Held(registry)
    contents = [blob_of(f"T43 {number}", 1000) for number in range(400)]
    paths = [blob_path(registry.add_blob(REPO, data)) for data in contents]
    pulling = [
        asyncio.create_task(fetch_from(f"127.0.0.{2 + number % 5}", cache, "GET", path)) for number, path in enumerate(paths)
    ]
    await until(lambda: cache.metric("fills_waiting") == 400 - 16 and len(held.paths) == 16)
    assert len(cache.files("ingest")) == 16
    while not all(task.done() for task in pulling):
        await until(lambda: bool(held.paths) or all(task.done() for task in pulling))
        assert len(held.paths) <= 16
        answer = await cache.get(hit)
        assert (answer.status, answer.body) == (200, b"held")
        for path in held.paths[:8]:
            held.release(path)
    answers = await asyncio.gather(*pulling)
    assert [answer.body for answer in answers] == contents
    assert held.most == 16


async def test_questions_wait_for_their_turn(clock: Clock, start_cache: StartCache, registry: ScriptedRegistry) -> None:
    """Two at once, then one a second, in order; who would wait for more than 20 s is told at once."""
    cache = await start_cache(upstream(registry, requestsPerSecond=1, requestBurst=2))
    image = registry.add_image(REPO, "0", [b"layer"])
    for number in range(1, 23):
        registry.move_tag(REPO, str(number), image.digest)
    asking = []
    for number in range(22):
        asking.append(asyncio.create_task(cache.get(manifest_path(str(number)), within=60)))
        if number < 2:
            await asking[number]
        await until(lambda number=number: cache.metric("connections") == max(0, number - 1))  # type: ignore[misc]
    assert len(registry.requests) == 2
    refused = await cache.get(manifest_path("22"))
    assert refused.status == 503
    assert "requestsPerSecond" in message(refused)
    assert int(refused.headers.get("Retry-After") or 0) >= 1
    for second in range(1, 21):
        clock.advance(1)
        await registry.wait_for(lambda second=second: len(registry.requests) >= 2 + second)  # type: ignore[misc]
        assert len(registry.requests) <= 3 + second
    answers = await asyncio.gather(*asking)
    assert [answer.status for answer in answers] == [200] * 22
