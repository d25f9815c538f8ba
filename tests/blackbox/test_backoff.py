"""What a failing registry is asked: one attempt a window, one probe every 5 s; and what clients are told."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.oracle import REPO, blob_path, error_of, manifest_path
from tests.blackbox.private import (
    ALICE,
    APP,
    BOB,
    EXTERNAL,
    OPEN,
    Clock,
    PrivateRegistry,
    fetch_from,
    fill,
    pull,
    with_access,
)
from tests.conftest import BACKOFF, RunningCache, StartCache, upstream
from tests.fakes.answers import Step, before_headers, gate, oci_error, status, too_many_requests
from tests.fakes.content import Image
from tests.fakes.recorder import listen
from tests.fakes.registry import ScriptedRegistry

WINDOWS = (10, 20, 40, 80, 160, 300, 300)


def asked(registry: ScriptedRegistry, path: str = manifest_path("1")) -> int:
    """How often it was asked for that."""
    return sum(request.path == path for request in registry.requests)


def probes(registry: ScriptedRegistry) -> int:
    """How often it was asked whether it answers at all."""
    return sum("manifest" not in (request.headers.get("Accept") or "") for request in registry.requests)  # as nobody's


async def crowd(cache: RunningCache, path: str, count: int) -> set[int]:
    """What so many clients are told."""
    turns = asyncio.Semaphore(200)

    async def one() -> int:
        async with turns:
            return (await cache.get(path)).status

    return set(await asyncio.gather(*(one() for _ in range(count))))


# --- one reference ---


async def test_a_failing_reference_is_asked_for_once_a_window(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """Whoever and however many ask: 10, 20, 40, 80, 160, 300, 300 s; and other references are not its concern."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    other = registry.add_image(REPO, "2", [b"other"])
    failing = registry.script("*", manifest_path("1"), status(500), forever=True)
    for number, seconds in enumerate(WINDOWS, start=1):
        clock.hold()  # a crowd takes its time, and a slow machine more
        assert await crowd(cache, manifest_path("1"), 1000 if number == 1 else 30) == {502}
        clock.go_on()
        clock.advance(seconds - 2)
        clock.hold()
        assert await crowd(cache, manifest_path("1"), 30) == {502}
        assert failing.used == number
        clock.go_on()
        clock.advance(2)
        assert (await cache.get(manifest_path("2"))).body == other.data
    failing.cancel()
    assert (await cache.get(manifest_path("1"))).body == image.data


async def test_the_error_of_before_says_when_the_next_attempt_is(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """In its text, which ``kubectl describe pod`` shows, and in ``Retry-After``; ``Age`` says how old it is."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    registry.script("*", manifest_path("1"), status(500), forever=True)
    await cache.get(manifest_path("1"))
    clock.advance(4)
    answer = await cache.get(manifest_path("1"))
    assert 1 <= int(answer.headers.get("Retry-After") or 0) <= 6
    assert 4 <= int(answer.headers.get("Age") or 0) <= 9
    message = error_of(answer)[2]
    assert "registry.test" in message
    assert "answered 500" in message
    assert "the next attempt is in " in message


async def test_in_the_window_what_is_held_is_served(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    cache = await start_cache(upstream(registry), **BACKOFF)
    await cache.get(manifest_path("1"))
    registry.script("*", manifest_path("1"), status(500), forever=True)
    before = asked(registry)
    for _ in range(20):
        answer = await cache.get(manifest_path("1"))
        assert (answer.status, answer.body) == (200, image.data)
        assert "answered 500" in (answer.headers.get("Warning") or "")
    assert asked(registry) == before + 1


@pytest.mark.parametrize(
    ("step", "code", "key"),
    [
        (oci_error(404, "MANIFEST_UNKNOWN"), 404, "notFound"),
        (oci_error(403, "DENIED"), 403, "refused"),
        (oci_error(401, "UNAUTHORIZED"), 403, "refused"),
    ],
)
async def test_a_no_is_remembered_for_a_short_while_only(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image, step: Step, code: int, key: str
) -> None:
    """A tag that was just pushed appears; 0s: at once."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    no = registry.script("*", manifest_path("1"), step, forever=True)
    for number in (1, 2, 3):  # it does not grow
        assert await crowd(cache, manifest_path("1"), 20) == {code}
        assert no.used == number
        clock.advance(10)
    no.cancel()
    assert (await cache.get(manifest_path("1"))).status == 200
    cache = await start_cache(upstream(registry), backoff={key: "0s"})
    no = registry.script("*", manifest_path("1"), step, forever=True)
    for number in (1, 2):
        assert (await cache.get(manifest_path("1"))).status == code
        assert no.used == number


async def test_many_names_that_do_not_exist(clock: Clock, start_cache: StartCache, registry: ScriptedRegistry) -> None:
    """T25, T45: they push nothing out, and a tag that is pushed after its 404 appears."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    failing = registry.script("*", manifest_path("failing"), status(500), forever=True)
    clock.hold()
    await cache.get(manifest_path("failing"))
    for start in range(0, 1000, 100):
        await asyncio.gather(*(cache.get(manifest_path(f"x{number}")) for number in range(start, start + 100)))
    assert (await cache.get(manifest_path("failing"))).status == 502
    assert failing.used == 1
    image = registry.add_image(REPO, "x7", [b"pushed"])
    assert (await cache.get(manifest_path("x7"))).status == 404
    clock.go_on()
    clock.advance(10)
    assert (await cache.get(manifest_path("x7"))).body == image.data


async def test_a_bad_credential_does_not_block_a_good_one(start_cache: StartCache) -> None:
    """What one was refused, the other is given, in whatever order they come."""
    async with PrivateRegistry("token") as private:
        stock = fill(private)
        cache = await start_cache(with_access(private, "verify"), externalURL=EXTERNAL, **BACKOFF)
        for _ in range(3):
            assert (await cache.get(manifest_path("1", APP), BOB.headers)).status == 401
            await pull(cache, APP, stock.app, ALICE.headers)


async def test_a_head_and_the_get_behind_it_cost_what_they_did(
    start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """A pull that works never meets a window."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    for _ in range(2):
        assert (await cache.head(manifest_path("1"))).status == 200
        assert (await cache.get(manifest_path(image.digest))).status == 200
        for digest in image.layer_digests:
            assert (await cache.get(blob_path(digest))).status == 200
    assert [request.method for request in registry.requests] == ["HEAD", "GET", "GET", "HEAD"]


async def test_a_thousand_ask_one_tag_while_its_head_is_under_way(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """A question is joined for a second, in which they all come."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    await cache.get(manifest_path("1"))
    clock.hold()
    opened = asyncio.Event()
    head = registry.script("HEAD", manifest_path("1"), gate(opened), forever=True)
    first = asyncio.create_task(cache.get(manifest_path("1")))
    await registry.wait_for(lambda: head.used == 1)
    rest = [
        asyncio.create_task(fetch_from(f"127.0.0.{2 + number % 8}", cache, "GET", manifest_path("1")))
        for number in range(999)
    ]
    while cache.metric("connections") < 1000:
        await asyncio.sleep(0)
    clock.go_on()
    opened.set()
    assert {(await each).status for each in (first, *rest)} == {200}
    assert head.used == 1


# --- the whole upstream ---


async def test_an_upstream_that_gives_no_answer_is_asked_once_and_then_probed(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """Whatever is wanted of it, nobody waits: that it is down is known. What is held is served meanwhile."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    await cache.get(manifest_path("1"))
    dead = registry.script("*", lambda _: True, before_headers("rst"), forever=True)
    assert (await cache.get(manifest_path("1"))).status == 200
    await registry.wait_for(lambda: probes(registry) > 0)
    before = len(registry.requests) - probes(registry)
    for number in range(20):
        assert (await cache.get(manifest_path("1"))).headers.get("Warning", "")
        answer = await cache.get(manifest_path(f"x{number}"))
        assert answer.status == 503
        assert 1 <= int(answer.headers.get("Retry-After") or 0) <= 5
        assert "dropped the connection" in error_of(answer)[2]
    assert len(registry.requests) - probes(registry) == before
    assert cache.metric("upstream_unavailable", upstream="registry.test") == 1
    dead.cancel()


async def test_an_upstream_that_is_back_after_an_hour_is_used_within_one_probe(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """Whatever windows its outage has caused."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    new = registry.add_image(REPO, "2", [b"two"])
    dead = registry.script("*", lambda _: True, before_headers("rst"), forever=True)
    for _ in range(12):
        for tag in ("1", "2"):
            assert (await cache.get(manifest_path(tag))).status == 503
        seen = probes(registry)
        clock.advance(300)
        await registry.wait_for(lambda seen=seen: probes(registry) > seen)  # type: ignore[misc]
    dead.cancel()
    seen = probes(registry)
    clock.advance(5)
    await registry.wait_for(lambda: probes(registry) > seen)
    async with asyncio.timeout(10):
        while cache.metric("upstream_unavailable", upstream="registry.test"):
            await asyncio.sleep(0.001)
    assert (await cache.get(manifest_path("1"))).body == image.data
    assert (await cache.get(manifest_path("2"))).body == new.data


@contextmanager
def dropping(port: int) -> Iterator[None]:
    """Whoever connects to that port has his packets dropped by the kernel: its listener's backlog is full."""
    with ExitStack() as stack:
        listener = stack.enter_context(listen("127.0.0.1", port, backlog=0))
        for _ in range(4):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        yield


@pytest.mark.parametrize("kind", ["silent", "packets dropped"])
async def test_a_black_hole_is_waited_for_once(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, kind: str
) -> None:
    """What is held by an ``Always`` tag waits for the budget of one HEAD; by an ``IfNotPresent`` tag nobody is asked."""
    rules = {"rules": [{"match": "*:always", "policy": "Always"}]}
    cache = await start_cache(upstream(registry), alwaysPullImages=False, imagePullPolicy=rules, **BACKOFF)
    for tag in ("1", "always"):
        registry.add_image(REPO, tag, [tag.encode()])
        await cache.get(manifest_path(tag))
    asked = cache.metric("upstream_requests_total")
    with ExitStack() as stack:
        if kind == "silent":
            registry.script("*", lambda _: True, gate(asyncio.Event()), forever=True)
        else:
            await registry.stop()
            stack.enter_context(dropping(registry.port))
        assert (await cache.get(manifest_path("1"))).status == 200
        assert cache.metric("upstream_requests_total") == asked
        began = asyncio.get_running_loop().time()
        first = asyncio.create_task(cache.get(manifest_path("always")))
        while not first.done():
            clock.advance(0.1)
            await asyncio.sleep(0.01)
        assert 2.9 < asyncio.get_running_loop().time() - began < 10, "one budget, of 3 s"
        assert first.result().headers.get("Warning")
        clock.hold()  # no time is left to anybody who would wait
        for _ in range(20):
            answer = await cache.get(manifest_path("always"))
            assert "did not answer within 3 s" in (answer.headers.get("Warning") or "")
            assert (await cache.get(manifest_path("absent"))).status == 503
        clock.go_on()


async def test_a_reference_that_drops_connections_is_no_outage(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """The probe finds the registry answering: others are served, and that one keeps its window."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    other = registry.add_image(REPO, "2", [b"two"])
    registry.script("*", manifest_path("1"), before_headers("rst"), forever=True)
    assert (await cache.get(manifest_path("1"))).status == 503
    async with asyncio.timeout(10):
        while cache.metric("upstream_unavailable", upstream="registry.test"):
            await asyncio.sleep(0.001)
    assert (await cache.get(manifest_path("2"))).body == other.data
    before = asked(registry)
    assert (await cache.get(manifest_path("1"))).status == 503
    assert asked(registry) == before
    clock.advance(10)
    assert (await cache.get(manifest_path("1"))).status == 503
    assert asked(registry) > before


@pytest.mark.parametrize("code", [500, 502, 503, 504])
async def test_three_failures_in_a_row_are_an_outage_if_the_probe_fails_too(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, code: int
) -> None:
    """F35: an error of the server says little alone; it is asked no more when it gives nothing else."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    failing = registry.script("*", lambda _: True, status(code), forever=True)
    for number in range(20):
        assert (await cache.get(manifest_path(f"x{number}"))).status == 502
    await registry.wait_for(lambda: probes(registry) > 0)
    assert 3 <= failing.used - probes(registry) <= 4, "and one with the probe, which was answered"
    failing.cancel()


async def test_what_is_held_needs_no_upstream(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    cache = await start_cache(upstream(registry), alwaysPullImages=False, **BACKOFF)
    await cache.get(manifest_path("1"))
    for digest in image.layer_digests:
        await cache.get(blob_path(digest))
    await registry.stop()
    assert (await cache.get(manifest_path("other"))).status == 503
    for path in (manifest_path("1"), manifest_path(image.digest), *(blob_path(digest) for digest in image.layer_digests)):
        answer = await cache.get(path)
        assert (answer.status, bool(answer.headers.get("Warning"))) == (200, False)


# --- rate limits ---


@pytest.mark.parametrize(("after", "seconds"), [(600, 600), (7, 7), (None, 10), ("soon", 10), (99_999, 3600)])
async def test_a_limit_is_obeyed(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, after: int | str | None, seconds: int
) -> None:
    """F35: one request, whatever is asked for; then nothing until ``Retry-After`` is over, an hour at most; without it as a
    failure's window grows."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    registry.add_image(REPO, "held", [b"held"])
    await cache.get(manifest_path("held"))
    before = len(registry.requests)
    limited = registry.script("*", lambda _: True, too_many_requests(after), forever=True)
    clock.hold()
    for number in range(20):
        assert (await cache.get(manifest_path("held"))).status == 200
        answer = await cache.head(manifest_path(f"x{number}"))
        assert answer.status == 429
    assert limited.used == 1
    clock.go_on()
    clock.advance(seconds - 2)
    assert (await cache.get(manifest_path("x"))).status == 429
    assert limited.used == 1
    limited.cancel()
    clock.advance(2)
    assert (await cache.get(manifest_path("held"))).headers.get("Warning") is None
    assert probes(registry) == 0
    assert len(registry.requests) == before + 2


async def test_a_limit_of_pulls_is_none_of_questions(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """Docker Hub counts GETs of manifests: while those are too many, a HEAD still tells that what is held is right, and a
    layer still comes."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    await cache.get(manifest_path("1"))
    limited = registry.script("GET", lambda request: "/manifests/" in request.path, too_many_requests(600), forever=True)
    for number in range(5):
        answer = await cache.get(manifest_path(f"x{number}"))
        assert answer.status == 429
        assert int(answer.headers.get("Retry-After") or 0) > 590
    assert limited.used == 1
    assert (await cache.get(manifest_path("1"))).headers.get("Warning") is None
    assert (await cache.get(blob_path(image.layer_digests[0]))).status == 200


async def test_the_last_pulls_are_kept_for_what_is_not_held(
    start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """``rateLimitReserve``: a held ``IfNotPresent`` tag past its ``maxAge`` is not asked for while few pulls are left; an
    ``Always`` tag is."""
    rules = [{"match": "*:always", "policy": "Always"}, {"match": "*", "policy": "IfNotPresent", "maxAge": "0s"}]
    registry.add_image(REPO, "always", [b"always"])
    left = {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "50;w=21600"}

    def tell(path: str) -> None:
        from tests.fakes.answers import with_headers

        registry.script("*", path, with_headers(left), forever=True)

    cache = await start_cache(
        upstream(registry, rateLimitReserve=20), alwaysPullImages=False, imagePullPolicy={"rules": rules}, **BACKOFF
    )
    tell(manifest_path("1"))
    for _ in range(2):
        await cache.get(manifest_path("1"))
    assert asked(registry) == 2, "fifty are left"
    left["ratelimit-remaining"] = "19;w=21600"
    await cache.get(manifest_path("always"))
    tell(manifest_path("always"))
    await cache.get(manifest_path("always"))
    before = asked(registry)
    assert (await cache.get(manifest_path("1"))).status == 200
    assert asked(registry) == before, "nineteen are left"
    await cache.get(manifest_path("always"))
    assert asked(registry, manifest_path("always")) == 3


# --- stale ---


@pytest.mark.parametrize(
    ("keys", "is_served"),
    [
        ({}, True),
        ({"staleIfError": False}, False),
        ({"maxStale": "0s"}, False),
        ({"maxStale": "1h"}, True),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_whether_a_held_tag_is_served_while_its_upstream_fails(
    start_cache: StartCache, registry: ScriptedRegistry, image: Image, keys: dict[str, Any], is_served: bool, method: str
) -> None:
    cache = await start_cache(upstream(registry), **keys)
    await cache.get(manifest_path("1"))
    registry.script("*", manifest_path("1"), status(500), forever=True)
    answer = await (cache.get if method == "GET" else cache.head)(manifest_path("1"))
    assert answer.status == (200 if is_served else 502)
    assert (bool(answer.headers.get("Warning"))) == is_served
    assert (await cache.get(manifest_path(image.digest))).status == 200, "a digest is right for ever"


async def test_a_deleted_tag_is_served_for_its_grace(
    start_cache: StartCache, registry: ScriptedRegistry, image: Image, tmp_path: Path
) -> None:
    """From the first 404 on; by default it is forgotten at once. A tag that comes back has its grace again."""
    cache = await start_cache(upstream(registry), deletedGrace="1h")
    await cache.get(manifest_path("1"))
    gone = registry.script("*", manifest_path("1"), oci_error(404, "MANIFEST_UNKNOWN"), forever=True)
    for _ in range(3):
        answer = await cache.get(manifest_path("1"))
        assert (answer.status, answer.body) == (200, image.data)
        assert "has no manifest 1" in (answer.headers.get("Warning") or "")
        assert (await cache.head(manifest_path("1"))).status == 200
    gone.cancel()
    assert (await cache.get(manifest_path("1"))).headers.get("Warning") is None
    strict = await start_cache(upstream(registry), deletedGrace="0s")
    await strict.get(manifest_path("1"))
    gone = registry.script("*", manifest_path("1"), oci_error(404, "MANIFEST_UNKNOWN"), forever=True)
    assert (await strict.get(manifest_path("1"))).status == 404
    gone.cancel()
    registry.script("*", manifest_path("1"), status(500), forever=True)
    assert (await strict.get(manifest_path("1"))).status == 502, "it is forgotten: there is nothing to be stale"


# --- the token server ---


@pytest.mark.parametrize("rounds", [0, 12], ids=["seconds", "an hour"])
async def test_a_token_server_that_was_down_is_used_within_one_probe(
    clock: Clock, start_cache: StartCache, rounds: int
) -> None:
    """Without a token nothing can be had, so it is the upstream that is down; the probe asks both."""
    async with PrivateRegistry("token") as private:
        stock = fill(private)
        cache = await start_cache(upstream(private), **BACKOFF)
        private.token_fault = before_headers("rst")
        assert (await cache.get(manifest_path("1", OPEN))).status == 503
        for _ in range(rounds):
            assert (await cache.get(manifest_path("1", OPEN))).status == 503
            seen = len(private.seen(path="/token"))
            clock.advance(300)
            await private.wait_for(lambda seen=seen: len(private.seen(path="/token")) > seen)  # type: ignore[misc]
        seen = len(private.seen(path="/token"))
        await private.wait_for(lambda: seen < len(private.seen(path="/token")) or rounds > 0)
        private.token_fault = None
        clock.advance(5)
        async with asyncio.timeout(10):
            while cache.metric("upstream_unavailable", upstream="registry.test"):
                await asyncio.sleep(0.001)
        assert (await cache.get(manifest_path("1", OPEN))).body == stock.open.data


async def test_who_answers_the_probe_with_an_error_only_is_still_tried(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """A ``/v2/`` that never works must not shut out a registry that does: one question goes with each probe."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    registry.script("GET", "/v2/", status(500), forever=True)
    failing = registry.script("*", lambda request: "manifests" in request.path, status(500), forever=True)
    for number in range(10):
        assert (await cache.get(manifest_path(f"x{number}"))).status == 502
    assert 3 <= len(registry.requests) - probes(registry) <= 4
    failing.cancel()
    seen = probes(registry)
    clock.advance(5)
    await registry.wait_for(lambda: probes(registry) > seen)
    async with asyncio.timeout(10):
        while (await cache.get(manifest_path("1"))).status != 200:
            await asyncio.sleep(0.001)
    assert cache.metric("upstream_unavailable", upstream="registry.test") == 0


async def test_t45_a_flood_of_cold_tags_is_held_to_the_rate(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """One client asks for what does not exist, as much as it may; the registry is asked no more often than configured, and
    another client's hits do not wait."""
    keys: dict[str, Any] = {"requestsPerSecond": 10, "requestBurst": 20}
    cache = await start_cache(upstream(registry, **keys), alwaysPullImages=False, **BACKOFF)
    assert (await cache.get(manifest_path("1"))).status == 200
    clock.hold()
    before = len(registry.requests)
    flood = [
        asyncio.create_task(fetch_from("127.0.0.2", cache, "GET", manifest_path(f"x{number}"))) for number in range(250)
    ]
    while sum(task.done() for task in flood) < 250 - 200:
        assert (await cache.get(manifest_path("1"))).status == 200
        await asyncio.sleep(0)
    assert len(registry.requests) - before == 19, "the burst, of which the first pull has taken one"
    assert {task.result().status for task in flood if task.done()} == {404, 503}
    clock.go_on()
    for task in flood:
        task.cancel()
    await asyncio.gather(*flood, return_exceptions=True)
    clock.advance(2)
    assert (await cache.get(manifest_path("x"))).status == 404, "who has gone keeps nobody waiting"
    assert len(registry.requests) - before <= 19 + 30


async def test_a_blob_has_no_window(start_cache: StartCache, registry: ScriptedRegistry, image: Image) -> None:
    """A runtime that is refused a layer goes on elsewhere; one that comes back at once is to get it."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    await cache.get(manifest_path("1"))
    path = blob_path(image.layer_digests[0])
    registry.script("GET", path, status(500))
    assert (await cache.get(path)).status == 502
    assert (await cache.get(path)).body == image.layers[0]
