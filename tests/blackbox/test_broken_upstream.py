"""Upstreams that break off, lie about ranges, fall silent or are not there: F30-F34, and endpoints that take turns."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from tests.blackbox.oracle import (
    LARGE,
    SMALL,
    blob_of,
    blob_path,
    content_of,
    error_of,
    manifest_path,
    path_of,
    pulls_well,
    vouched_wrongly,
    wrong_files,
)
from tests.conftest import RunningCache, StartCache, upstream
from tests.fakes import answers
from tests.fakes.answers import Step, compose
from tests.fakes.messages import Ending
from tests.fakes.recorder import Sink, listen
from tests.fakes.registry import ScriptedRegistry

REPO = "team/app"
SOON = 20.0
"""Seconds in which everything ends here; the product's own bounds, shortened, are far below."""

FRAMES: dict[str, Step] = {
    "length": answers.with_headers({}),
    "chunked": answers.chunked(),
    "close": answers.close_delimited(),
}
HASTY = {"connect": "300ms", "headers": "300ms", "head": "300ms", "token": "300ms", "progress": "300ms"}


# --- F30: cut ---


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("where", ["first byte", "second byte", "half", "last byte", "end"])
async def test_a_cut_is_healed_without_the_client_seeing_it(
    cache: RunningCache, registry: ScriptedRegistry, how: Ending, frame: str, size: int, where: str
) -> None:
    """F30: known length, chunked, and to the close; by FIN and RST; what is there is not fetched twice."""
    data = blob_of("F30", size)
    path = blob_path(registry.add_blob(REPO, data))
    at = {"first byte": 0, "second byte": 1, "half": size // 2, "last byte": size - 1, "end": size}[where]
    registry.script("GET", path, compose(FRAMES[frame], answers.cut(at, how)))
    answer = await cache.get(path, within=SOON)
    assert not vouched_wrongly(answer, data)
    assert (answer.status, answer.clean_end, len(answer.body)) == (200, True, size), (answer.body[-300:], answer.why)
    await cache.settled()
    assert wrong_files(cache) == []
    resumed = registry.seen("GET", path)[1:]
    assert [request.headers.get("Range") for request in resumed] in ([], [f"bytes={at}-" if at else None])
    if resumed:
        assert cache.metric("fills_total", result="held") == 1


@pytest.mark.parametrize(("frame", "how"), [("length", "fin"), ("chunked", "rst"), ("close", "fin")])
async def test_a_blob_that_is_cut_again_and_again_without_progress_is_given_up(
    cache: RunningCache, registry: ScriptedRegistry, how: Ending, frame: str
) -> None:
    """F30: unclean end, nothing stored; the next pull is good."""
    data = blob_of("F30", LARGE)
    path = blob_path(registry.add_blob(REPO, data))
    broken = compose(FRAMES[frame], answers.cut(LARGE // 2, how))
    registry.script("GET", path, broken)
    script = registry.script("GET", path, compose(FRAMES[frame], answers.cut(0, how)), forever=True)
    answer = await cache.get(path, within=SOON)
    assert not answer.clean_end
    assert len(answer.body) <= LARGE // 2
    await cache.settled()
    assert registry.count("GET", path) <= 10
    assert cache.files("blobs") == []
    script.cancel()
    await pulls_well(cache, path, data)


# --- F31: wrong answers to a Range ---

RANGE_LIES: dict[str, Step] = {
    "200 to a Range": answers.ignore_range(),
    "206 from an earlier byte": answers.wrong_range(-1000),
    "206 from a later byte": answers.wrong_range(1000),
    "206 of earlier bytes, labelled as asked": answers.wrong_range(-1000, admitted=False),
    "206 of later bytes, labelled as asked": answers.wrong_range(1000, admitted=False),
    "206 with a larger total": answers.changed_total(1),
    "206 with a smaller total": answers.changed_total(-1),
    "206 without Content-Range": answers.without_headers("Content-Range"),
    "206 with an unknown total": compose(answers.with_headers({"Content-Range": f"bytes {LARGE // 2}-{LARGE - 1}/*"})),
    "206 with nonsense": answers.with_headers({"Content-Range": "bytes banana"}),
    "206 with digits that are none": answers.with_headers([("Content-Range", f"bytes {'9' * 30}-{'9' * 30}/{'9' * 30}")]),
    "416": answers.oci_error(416, "RANGE_INVALID"),
    "a wrong rest": answers.flip_bit(-1),
    "another blob": answers.swap_body(blob_of("another", LARGE // 2)),
    "a longer rest": answers.extra_bytes(b"x" * 1000),
    "a shorter rest": answers.drop_last(1000),
}
HEALED = {"200 to a Range", "206 from an earlier byte", "206 with an unknown total"}


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("lie", RANGE_LIES)
async def test_a_wrong_answer_to_a_range_is_healed_or_seen(
    cache: RunningCache, registry: ScriptedRegistry, lie: str, frame: str
) -> None:
    """F31: after a cut at half, the rest is answered wrongly, once."""
    data = blob_of("F31", LARGE)
    path = blob_path(registry.add_blob(REPO, data))
    first = compose(FRAMES[frame], answers.cut(LARGE // 2))
    registry.script("GET", path, first, RANGE_LIES[lie])
    answer = await cache.get(path, within=SOON)
    assert not vouched_wrongly(answer, data)
    if lie in HEALED:
        assert (answer.status, answer.clean_end) == (200, True), answer.why
    await cache.settled()
    assert wrong_files(cache) == []
    await pulls_well(cache, path, data)


# --- F32: the connection ends before an answer begins ---


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("kind", ["tag", "manifest", "blob"])
async def test_a_connection_dropped_before_the_headers_is_tried_again(
    cache: RunningCache, registry: ScriptedRegistry, kind: str, how: Ending, times: int
) -> None:
    """F32: the client sees nothing of it."""
    image = registry.add_image(REPO, "1", [blob_of("F32", SMALL)])
    path = {"tag": manifest_path("1"), "manifest": manifest_path(image.digest), "blob": blob_path(image.layer_digests[0])}[
        kind
    ]
    registry.script("*", path, *[answers.before_headers(how)] * times)
    await pulls_well(cache, path, content_of(image, kind))


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("kind", ["tag", "blob"])
async def test_an_upstream_that_always_drops_the_connection_is_unavailable(
    cache: RunningCache, registry: ScriptedRegistry, kind: str, how: Ending
) -> None:
    """F32: tried again at most three times, then an error that says so."""
    image = registry.add_image(REPO, "1", [b"layer"])
    path = path_of(image, kind)
    script = registry.script("*", path, answers.before_headers(how), forever=True)
    status, code, message = error_of(await cache.get(path, within=SOON))
    assert (status, code) == (503, "UNAVAILABLE")
    assert "registry.test" in message
    assert 1 < registry.count("GET", path) <= 4
    script.cancel()
    await pulls_well(cache, path, content_of(image, kind))


# --- F33: slow ---


@pytest.mark.parametrize("kind", ["tag", "blob"])
async def test_an_upstream_that_never_answers_is_given_up(
    registry: ScriptedRegistry, start_cache: StartCache, kind: str
) -> None:
    """F33: silence instead of headers."""
    cache = await start_cache(upstream(registry, timeouts=HASTY))
    image = registry.add_image(REPO, "1", [b"layer"])
    path = path_of(image, kind)
    script = registry.script("*", path, answers.before_headers("stall"), forever=True)
    status, code, message = error_of(await cache.get(path, within=SOON))
    assert (status, code) == (503, "UNAVAILABLE")
    assert "registry.test" in message
    script.cancel()
    await pulls_well(cache, path, content_of(image, kind))


@pytest.mark.parametrize("at", [0, 1, SMALL - 1, LARGE // 2, LARGE - 1])
async def test_a_download_that_stalls_is_continued(registry: ScriptedRegistry, start_cache: StartCache, at: int) -> None:
    """F33: a stall after the headers, and in the middle of the body."""
    cache = await start_cache(upstream(registry, timeouts=HASTY))
    data = blob_of("F33", SMALL if at < SMALL else LARGE)
    path = blob_path(registry.add_blob(REPO, data))
    registry.script("GET", path, answers.cut(at, "stall"))
    answer = await cache.get(path, within=SOON)
    assert not vouched_wrongly(answer, data)
    assert (answer.status, answer.clean_end) == (200, True)
    assert [request.headers.get("Range") for request in registry.seen("GET", path)] == [None, f"bytes={at}-" if at else None]


@pytest.mark.parametrize("step", [answers.slow(1), answers.cut(1000, "stall")], ids=["1 B/s", "stall"])
async def test_one_slow_upstream_does_not_slow_another(
    registry: ScriptedRegistry, start_cache: StartCache, step: Step
) -> None:
    """F33: 30 clients wait for one upstream, and the other is as quick as ever; the slow one is given up."""
    data = blob_of("F33", LARGE)
    async with ScriptedRegistry() as other:
        image = other.add_image(REPO, "1", [data])
        slow_paths = []
        for number in range(30):
            slow = blob_path(registry.add_blob(REPO, blob_of(number, 20_000)))
            registry.script("GET", slow, step, forever=True)
            slow_paths.append(slow)
        slow_one = upstream(registry, timeouts=HASTY, maxConcurrentFetches=30)
        cache = await start_cache(slow_one, upstream(other, "other.test"))
        waiting = [asyncio.create_task(cache.get(path, within=SOON)) for path in slow_paths]
        await registry.wait_for(lambda: len(registry.requests) >= 30)
        for path, truth in ((manifest_path("1"), image.data), (blob_path(image.layer_digests[0]), data)):
            answer = await cache.get(f"{path}?ns=other.test", within=SOON)
            same = answer.body == truth
            assert (answer.status, same, answer.clean_end) == (200, True, True)
        for answer in await asyncio.gather(*waiting):
            assert answer.status in (502, 503) or not answer.clean_end
    await cache.settled()
    assert len(cache.files("blobs")) == 2


# --- F34: black hole ---


@pytest.fixture
def full_backlog() -> Iterator[str]:
    """The URL of a listener that the kernel lets nobody connect to any more: SYNs are dropped."""
    listener = listen("127.0.0.1", backlog=0)
    callers = []
    try:
        for _ in range(4):
            caller = socket.socket()
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
            callers.append(caller)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for sock in (listener, *callers):
            sock.close()


@pytest.mark.parametrize("kind", ["tag", "manifest", "blob"])
@pytest.mark.parametrize("hole", ["full backlog", "silent server"])
async def test_a_black_hole_costs_a_bounded_wait(
    registry: ScriptedRegistry, start_cache: StartCache, full_backlog: str, kind: str, hole: str
) -> None:
    """F34: SYNs that are dropped, and a server that accepts and says nothing."""
    image = registry.add_image(REPO, "1", [b"layer"])
    path = {"tag": manifest_path("1"), "manifest": manifest_path(image.digest), "blob": blob_path(image.layer_digests[0])}[
        kind
    ]
    async with Sink() as sink:
        url = full_backlog if hole == "full backlog" else sink.url
        cache = await start_cache(upstream(registry, endpoints=[url], timeouts=HASTY))
        for method in (cache.get, cache.head):
            answer = await method(path, within=SOON)
            assert answer.status == 503
        status, code, message = error_of(await cache.get(path, within=SOON))
        assert (status, code) == (503, "UNAVAILABLE")
        assert "registry.test" in message


async def test_a_held_tag_is_served_stale_from_before_a_black_hole(
    registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """F34: the time to the first stale answer is bounded by the budget of asking for a tag."""
    cache = await start_cache(upstream(registry, timeouts=HASTY))
    image = registry.add_image(REPO, "1", [b"layer"])
    await pulls_well(cache, manifest_path("1"), image.data)
    await registry.stop()
    async with Sink(port=registry.port):
        answer = await cache.get(manifest_path("1"), within=SOON)
        assert (answer.status, answer.body) == (200, image.data)
        assert "registry.test" in (answer.headers.get("Warning") or "")


# --- several endpoints ---


@pytest.mark.parametrize("first", ["refused", "full backlog", "silent", "500", "html", "drops"])
@pytest.mark.parametrize("kind", ["tag", "manifest", "blob"])
async def test_a_second_endpoint_answers_for_a_first_that_is_failing(
    registry: ScriptedRegistry, start_cache: StartCache, full_backlog: str, kind: str, first: str
) -> None:
    """F32, F34: endpoints in turn, within one request of a client."""
    image = registry.add_image(REPO, "1", [b"layer"])
    path = {"tag": manifest_path("1"), "manifest": manifest_path(image.digest), "blob": blob_path(image.layer_digests[0])}[
        kind
    ]
    steps: dict[str, Step] = {
        "500": answers.status(500),
        "html": answers.status(403, b"<html>", "text/html"),
        "drops": answers.before_headers(),
    }
    async with Sink() as sink, ScriptedRegistry() as bad:
        bad.script("*", lambda request: True, steps.get(first, answers.status(500)), forever=True)
        if first == "refused":
            await bad.stop()
        url = {"full backlog": full_backlog, "silent": sink.url}.get(first, bad.url)
        cache = await start_cache(upstream(registry, endpoints=[url, registry.url], timeouts=HASTY))
        await pulls_well(cache, path, content_of(image, kind))


async def test_a_broken_download_is_continued_at_the_next_endpoint(
    registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """F30, F33: the first endpoint dies in the middle of a blob."""
    data = blob_of("endpoints", LARGE)
    async with ScriptedRegistry() as first:
        path = blob_path(first.add_blob(REPO, data))
        registry.add_blob(REPO, data)
        first.script("GET", path, answers.cut(LARGE // 2, "rst"))
        cache = await start_cache(upstream(registry, endpoints=[first.url, registry.url]))
        await pulls_well(cache, path, data)
        assert first.count("GET", path) == 1
        assert [request.headers.get("Range") for request in registry.seen("GET", path)] == [f"bytes={LARGE // 2}-"]
