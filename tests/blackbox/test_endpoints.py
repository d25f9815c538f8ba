"""Several endpoints of one upstream: whoever can give it does, and a dead one costs one client one short wait."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.blackbox.oracle import (
    LARGE,
    SMALL,
    blob_of,
    blob_path,
    error_of,
    manifest_path,
    pulls_well,
    vouched_wrongly,
    wrong_files,
)
from tests.conftest import UPSTREAM, RunningCache, StartCache, upstream
from tests.fakes import answers
from tests.fakes.answers import Step, compose
from tests.fakes.client import WireResponse
from tests.fakes.content import OCI_MANIFEST, Image
from tests.fakes.messages import Ending, Request
from tests.fakes.recorder import Sink, listen
from tests.fakes.registry import Script, ScriptedRegistry

REPO = "team/app"
SOON = 20.0
QUICK = {
    "connect": "2s",
    "headers": "2s",
    "head": "2s",
    "token": "2s",
    "progress": "300ms",
    "endpoint": "200ms",
}
Forward = Callable[[float], None]


@pytest.fixture
async def forward(monkeypatch: pytest.MonkeyPatch) -> Forward:
    """Sets the clock of the event loop forward, so that a rest of seconds takes none."""
    loop = asyncio.get_running_loop()
    real, ahead = loop.time, [0.0]
    monkeypatch.setattr(loop, "time", lambda: real() + ahead[0])

    def go(seconds: float) -> None:
        ahead[0] += seconds

    return go


@pytest.fixture
async def first() -> AsyncIterator[ScriptedRegistry]:
    """A mirror, listed before ``registry``, which is the authority."""
    async with ScriptedRegistry() as scripted:
        yield scripted


def section(*endpoints: ScriptedRegistry | str, **keys: Any) -> dict[str, Any]:
    """An upstream with these endpoints."""
    urls = [endpoint if isinstance(endpoint, str) else endpoint.url for endpoint in endpoints]
    return {
        "name": UPSTREAM,
        "endpoints": urls,
        "allowAddresses": ["127.0.0.0/8"],
        "timeouts": QUICK,
        **keys,
    }


def everywhere(*registries: ScriptedRegistry, layers: list[bytes], tag: str = "1") -> Image:
    """An image that all of them have."""
    images = [registry.add_image(REPO, tag, layers) for registry in registries]
    return images[0]


def everything(request: Request) -> bool:
    """Matches every request."""
    return True


def always(registry: ScriptedRegistry, *steps: Step) -> Script:
    """From now on everything is answered so."""
    return registry.script("*", everything, compose(*steps), forever=True)


@asynccontextmanager
async def unreachable() -> AsyncIterator[str]:
    """A URL of which the kernel drops the first packet: the backlog is full."""
    listener = listen("127.0.0.1", backlog=0)
    callers = [socket.socket() for _ in range(4)]
    try:
        for caller in callers:
            caller.setblocking(False)
            caller.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for sock in (listener, *callers):
            sock.close()


KINDS = ["GET tag", "HEAD tag", "GET manifest", "HEAD manifest", "GET blob", "HEAD blob"]


def path_and_truth(image: Image, kind: str) -> tuple[str, bytes]:
    """What is asked for, and what is there."""
    what = kind.partition(" ")[2]
    if what == "blob":
        return blob_path(image.layer_digests[0]), image.layers[0]
    return manifest_path("1" if what == "tag" else image.digest), image.data


async def ask(cache: RunningCache, kind: str, path: str) -> WireResponse:
    """A request of that kind."""
    return await (cache.head if kind.startswith("HEAD") else cache.get)(path, within=SOON)


def is_right(answer: WireResponse, kind: str, truth: bytes) -> bool:
    """Whether an answer is the whole truth."""
    if (answer.status, answer.clean_end) != (200, True) or answer.headers.get("Content-Length") != str(len(truth)):
        return False
    return answer.body == (b"" if kind.startswith("HEAD") else truth)


# --- whatever is wrong with the first one ---

FAULTS: dict[str, Step] = {
    "500": answers.status(500),
    "503": answers.oci_error(503, "UNAVAILABLE"),
    "429": answers.too_many_requests(60),
    "429 in plain text": answers.too_many_requests(plain=True),
    "502 page": answers.status(502, b"<html>bad gateway</html>", "text/html"),
    "404 page": answers.status(404, b"<html>not found</html>", "text/html"),
    "403 page": answers.status(403, b"<html>log in</html>", "text/html"),
    "301 to nowhere": answers.redirect("http://127.0.0.1:1/", 301),
    "redirects without end": answers.redirect("/v2/round"),
    "404": answers.oci_error(404, "MANIFEST_UNKNOWN"),
    "404 of the repository": answers.oci_error(404, "NAME_UNKNOWN"),
    "401": answers.oci_error(401, "UNAUTHORIZED"),
    "403": answers.oci_error(403, "DENIED"),
    "401 with Basic": answers.unauthorized(['Basic realm="mirror"']),
    "a realm elsewhere": answers.unauthorized(['Bearer realm="https://auth.elsewhere.test/token",service="x"']),
    "hangs up": answers.before_headers("fin"),
    "resets": answers.before_headers("rst"),
    "says nothing": answers.before_headers("stall"),
    "no HTTP": answers.raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "204": answers.status(204),
    "gzip": answers.with_headers({"Content-Encoding": "gzip"}),
}
GONE = ["refused", "black hole", "accepts and is silent"]


@asynccontextmanager
async def faulty(first: ScriptedRegistry, fault: str) -> AsyncIterator[str]:
    """The URL of an endpoint with that fault."""
    if fault in FAULTS:
        always(first, FAULTS[fault])
        yield first.url
    elif fault == "refused":
        await first.stop()
        yield first.url
    elif fault == "black hole":
        async with unreachable() as url:
            yield url
    else:
        async with Sink() as sink:
            yield sink.url


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", [*GONE, *FAULTS])
async def test_whatever_is_wrong_with_the_first_the_second_answers(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, fault: str, kind: str
) -> None:
    """Within one request of a client, and in the next one as well."""
    image = everywhere(first, registry, layers=[blob_of(fault, SMALL)])
    path, truth = path_and_truth(image, kind)
    async with faulty(first, fault) as url:
        cache = await start_cache(section(url, registry))
        for _ in range(2):
            answer = await ask(cache, kind, path)
            assert is_right(answer, kind, truth), (answer.status, answer.headers, answer.body[:300])
            assert not answer.headers.has("Warning")
        await cache.settled()
    assert wrong_files(cache) == []


@pytest.mark.parametrize("kind", KINDS)
async def test_what_a_mirror_lacks_is_there_behind_it_and_the_rest_still_comes_from_the_mirror(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, kind: str
) -> None:
    """A 404 for one thing is no failure: the mirror does not rest."""
    image = registry.add_image(REPO, "1", [b"layer"])
    other = first.add_blob(REPO, b"other")
    cache = await start_cache(section(first, registry))
    path, truth = path_and_truth(image, kind)
    assert is_right(await ask(cache, kind, path), kind, truth)
    await pulls_well(cache, blob_path(other), b"other")
    assert registry.seen(path=blob_path(other)) == []


async def test_the_first_one_is_the_one_that_is_used(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """The counterpart: nothing above is luck."""
    image = everywhere(first, registry, layers=[b"layer"])
    cache = await start_cache(section(first, registry))
    for kind in KINDS:
        path, truth = path_and_truth(image, kind)
        assert is_right(await ask(cache, kind, path), kind, truth)
    assert first.requests
    assert registry.connections == 0


# --- a dead one is asked once ---


def trouble(cache: RunningCache) -> float:
    """How many requests of pullcache had no answer, or a 5xx or a 429."""
    return sum(
        cache.metric("upstream_requests_total", upstream=UPSTREAM, status=status) for status in ("error", "5xx", "4xx")
    )


TRIES = {"hangs up": 3, "resets": 3, "no HTTP": 3}
"""A connection that is dropped is tried anew; two of these could have been an old one."""


@pytest.mark.parametrize("fault", [*GONE, "500", "503", "429", "403 page", *TRIES])
async def test_a_dead_first_endpoint_is_asked_once_in_a_pull(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, fault: str
) -> None:
    """An image of 40 layers, of which clients ask at the same time."""
    image = everywhere(first, registry, layers=[blob_of(f"{fault} {number}", SMALL) for number in range(40)])
    async with faulty(first, fault) as url:
        in_time = {"endpoint": "2s"} if fault in TRIES else {}
        cache = await start_cache(section(url, registry, timeouts=QUICK | in_time))
        await pulls_well(cache, manifest_path("1"), image.data)
        paths = [blob_path(digest) for digest in (image.config_digest, *image.layer_digests)]
        pulled = await asyncio.gather(*(cache.get(path, within=SOON) for path in paths))
        assert [answer.body for answer in pulled] == [image.config, *image.layers]
        assert is_right(await cache.get(manifest_path("1")), "GET", image.data)
        # What has no answer in time is not counted there, so the fakes say it too.
        assert trouble(cache) == (0 if fault in ("black hole", "accepts and is silent") else TRIES.get(fault, 1))
        assert len(first.requests) == (TRIES.get(fault, 1) if fault in FAULTS else 0)
        assert all(registry.count("GET", path) == 1 for path in paths)


async def test_a_black_hole_is_connected_to_once_in_a_pull(registry: ScriptedRegistry, start_cache: StartCache) -> None:
    image = registry.add_image(REPO, "1", [blob_of(number, SMALL) for number in range(20)])
    async with Sink() as sink:
        cache = await start_cache(section(sink.url, registry))
        for path in (manifest_path("1"), *map(blob_path, image.layer_digests)):
            assert (await cache.get(path)).status == 200
        assert len(sink.contacts) == 1


@pytest.mark.parametrize("fault", ["accepts and is silent", "500"])
async def test_those_who_find_out_at_the_same_time_are_the_only_ones_who_do(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, fault: str
) -> None:
    """Cold, without any request before: each of the first asks once; of those who come later none does."""
    image = everywhere(first, registry, layers=[blob_of(f"{fault} {number}", SMALL) for number in range(40)])
    early, late = image.layer_digests[:20], image.layer_digests[20:]
    async with Sink() as sink:
        if fault == "500":
            always(first, answers.status(500))
        cache = await start_cache(section(first if fault == "500" else sink.url, registry))
        for digests, most in ((early, 20), (late, 0)):
            before = len(first.requests) + len(sink.contacts)
            pulled = await asyncio.gather(*(cache.get(blob_path(digest), within=SOON) for digest in digests))
            assert [answer.status for answer in pulled] == [200] * 20
            assert len(first.requests) + len(sink.contacts) - before <= most


async def test_a_herd_at_a_cold_blob_costs_a_dead_endpoint_one_request(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    data = blob_of("herd", LARGE)
    path = blob_path(registry.add_blob(REPO, data))
    always(first, answers.before_headers("stall"))
    cache = await start_cache(section(first, registry))
    pulled = await asyncio.gather(*(cache.get(path, within=SOON) for _ in range(30)))
    assert all(is_right(answer, "GET", data) for answer in pulled)
    assert (len(first.requests), registry.count("GET", path)) == (1, 1)


async def test_a_dead_endpoint_is_probed_and_used_again_when_it_is_back(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, forward: Forward
) -> None:
    """The probe is a bare ``GET /v2/`` that no client waits for; until it is answered no client's request goes there."""
    image = everywhere(first, registry, layers=[blob_of(number, SMALL) for number in range(6)])
    paths = [blob_path(digest) for digest in image.layer_digests]
    broken = always(first, answers.status(500))
    cache = await start_cache(section(first, registry))
    await pulls_well(cache, paths[0], image.layers[0])
    assert [request.path for request in first.requests] == [paths[0]]

    forward(4.9)
    await pulls_well(cache, paths[1], image.layers[1])
    assert len(first.requests) == 1, "it rests"

    forward(0.2)
    await pulls_well(cache, paths[2], image.layers[2])
    await first.wait_for(lambda: len(first.requests) == 2)
    forward(9.0)
    await pulls_well(cache, paths[3], image.layers[3])
    assert [(request.method, request.path) for request in first.requests[1:]] == [("GET", "/v2/")], "and longer after that"

    broken.cancel()
    forward(1.5)
    await pulls_well(cache, paths[4], image.layers[4])
    await first.wait_for(lambda: first.count("GET", "/v2/") == 2)
    await pulls_until(cache, first, paths[5], image)
    assert registry.seen(path=paths[5]) == []
    for probe in first.seen(path="/v2/"):
        assert {name.lower() for name, _ in probe.headers} == {"host", "user-agent", "accept", "accept-encoding", "via"}
        assert probe.body == b""


async def pulls_until(cache: RunningCache, registry: ScriptedRegistry, path: str, image: Image) -> None:
    """HEADs of the tag until one of them goes to that registry, as the answer to a probe is on its way; then a pull."""
    async with asyncio.timeout(SOON):
        while not registry.seen("HEAD", manifest_path(image.digest)):
            assert (await cache.head(manifest_path(image.digest))).status == 200
    await pulls_well(cache, path, image.layers[image.layer_digests.index(path.rpartition("/")[2])])


@pytest.mark.parametrize("answer", ["401", "404", "301 to nowhere"])
async def test_any_answer_but_a_failure_shows_that_it_is_back(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, forward: Forward, answer: str
) -> None:
    """``/v2/`` is answered 401 by most registries, and by some not at all; no challenge is answered for a probe."""
    image = everywhere(first, registry, layers=[b"one", b"two"])
    first.script("GET", "/v2/", FAULTS[answer], forever=True)
    first.script("GET", blob_path(image.layer_digests[0]), answers.status(500))
    cache = await start_cache(section(first, registry))
    await pulls_well(cache, blob_path(image.layer_digests[0]), b"one")
    forward(5.1)
    assert (await cache.head(manifest_path(image.digest))).status == 200
    await first.wait_for(lambda: first.seen(path="/v2/"))
    await pulls_until(cache, first, blob_path(image.layer_digests[1]), image)
    assert first.count("GET", "/v2/") == 1


async def test_a_probe_that_is_under_way_does_not_hold_up_the_end(
    registry: ScriptedRegistry, start_cache: StartCache, forward: Forward
) -> None:
    """Nor is it left over: the fixture looks for tasks and descriptors."""
    registry.add_image(REPO, "1", [b"layer"])
    async with Sink() as sink:
        cache = await start_cache(section(sink.url, registry, timeouts=QUICK | {"endpoint": "5s", "head": "300ms"}))
        assert (await cache.head(manifest_path("1"))).status == 200
        forward(5.1)
        assert (await cache.head(manifest_path("1"))).status == 200
        await sink.wait_for(lambda: any(b"GET /v2/ " in contact.data for contact in sink.contacts))


async def test_who_rests_is_asked_before_a_client_is_refused(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """The mirror failed a moment ago and is back before a probe found out; now the registry fails."""
    image = everywhere(first, registry, layers=[b"one", b"two"])
    first.script("GET", blob_path(image.layer_digests[0]), answers.status(500))
    cache = await start_cache(section(first, registry))
    await pulls_well(cache, blob_path(image.layer_digests[0]), b"one")
    await registry.stop()
    await pulls_well(cache, blob_path(image.layer_digests[1]), b"two")


# --- what is wrong with its content ---

DAMAGE: dict[str, Step] = {
    "a bit": answers.flip_bit(-1),
    "other bytes": answers.swap_body(b"something else"),
    "a login page": compose(answers.swap_body(b"<html>log in</html>"), answers.with_headers({"Content-Type": "text/html"})),
    "nothing": answers.swap_body(b""),
    "a longer end": answers.extra_bytes(b"\n"),
    "a shorter end": answers.drop_last(1),
}
FRAMES: dict[str, Step] = {
    "length": answers.with_headers({}),
    "chunked": answers.chunked(),
    "close": answers.close_delimited(),
}


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_corrupt_manifest_is_fetched_from_the_next_within_the_request(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, damage: str, frame: str
) -> None:
    image = everywhere(first, registry, layers=[b"layer"])
    always(first, DAMAGE[damage], FRAMES[frame])
    cache = await start_cache(section(first, registry))
    for _ in range(2):
        await pulls_well(cache, manifest_path(image.digest), image.data)
    assert first.count("GET", manifest_path(image.digest)) == 1


@pytest.mark.parametrize("damage", ["a login page", "other bytes", "nothing", "a shorter end"])
async def test_what_cannot_be_a_manifest_is_not_taken_for_a_tag(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, damage: str
) -> None:
    image = everywhere(first, registry, layers=[b"layer"])
    always(first, DAMAGE[damage])
    cache = await start_cache(section(first, registry))
    for _ in range(2):
        await pulls_well(cache, manifest_path("1"), image.data)


async def test_a_digest_that_one_endpoint_states_wrongly_is_asked_of_the_next(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """A HEAD by digest, of which all that is told can be compared with what was asked."""
    image = everywhere(first, registry, layers=[b"layer"])
    always(first, answers.with_headers({"Docker-Content-Digest": f"sha256:{'0' * 64}"}))
    cache = await start_cache(section(first, registry))
    answer = await cache.head(manifest_path(image.digest))
    assert is_right(answer, "HEAD", image.data), answer


@pytest.mark.parametrize("known", [True, False], ids=["size known", "size unknown"])
@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_corrupt_small_blob_is_fetched_from_the_next_within_the_request(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, damage: str, frame: str, known: bool
) -> None:
    """Up to 1 MiB the client has seen nothing when it is found out."""
    data = blob_of("small", SMALL)
    image = everywhere(first, registry, layers=[data])
    path = blob_path(image.layer_digests[0])
    first.script("GET", path, compose(DAMAGE[damage], FRAMES[frame]), forever=True)
    cache = await start_cache(section(first, registry))
    if known:
        await pulls_well(cache, manifest_path("1"), image.data)
    await pulls_well(cache, path, data)
    assert cache.metric("fills_total", result="held") == 1
    assert first.count("GET", path) == 1 or "shorter" in damage, "its end is asked for once"


@pytest.mark.parametrize(
    ("field", "first_byte", "last"), [("bytes=0-9", 0, 9), ("bytes=1-", 1, SMALL - 1), ("bytes=2000-2999", 2000, 2999)]
)
async def test_a_part_of_a_small_blob_is_taken_from_who_has_it_right_as_well(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, field: str, first_byte: int, last: int
) -> None:
    """A client with a range gets it within its request, wherever it begins."""
    data = blob_of("part", SMALL)
    path = blob_path(everywhere(first, registry, layers=[data]).layer_digests[0])
    first.script("GET", path, answers.flip_bit(0), forever=True)
    cache = await start_cache(section(first, registry))
    answer = await cache.get(path, [("Range", field)], within=SOON)
    assert (answer.status, answer.clean_end) == (206, True), (answer.status, answer.body[:300])
    assert answer.body == data[first_byte : last + 1]


async def test_all_who_wait_for_a_corrupt_small_blob_get_it_from_the_next(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """One request at either, however many wait."""
    data = blob_of("small herd", 1024 * 1024)
    path = blob_path(everywhere(first, registry, layers=[data]).layer_digests[0])
    held = asyncio.Event()
    first.script("GET", path, compose(answers.flip_bit(7), answers.gate(held, after=1000)), forever=True)
    cache = await start_cache(section(first, registry, timeouts={}))
    waiting = [asyncio.create_task(cache.get(path, within=SOON)) for _ in range(20)]
    async with asyncio.timeout(SOON):
        while cache.metric("followers_total") < 19:
            await asyncio.sleep(0.002)
    held.set()
    for answer in await asyncio.gather(*waiting):
        assert is_right(answer, "GET", data), (answer.status, answer.body[:200])
    assert (first.count("GET", path), registry.count("GET", path)) == (1, 1)


async def test_three_endpoints_of_which_two_are_wrong(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    data = blob_of("three", SMALL)
    async with ScriptedRegistry() as second:
        path = blob_path(everywhere(first, second, registry, layers=[data]).layer_digests[0])
        for wrong in (first, second):
            wrong.script("GET", path, answers.flip_bit(1), forever=True)
        cache = await start_cache(section(first, second, registry))
        await pulls_well(cache, path, data)


@pytest.mark.parametrize("wrong", ["first", "both"])
async def test_a_corrupt_large_blob_is_cut_and_the_next_pull_begins_at_the_next(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, wrong: str
) -> None:
    """Where both are wrong, nothing ends cleanly and nothing is stored."""
    data = blob_of("large", LARGE)
    image = everywhere(first, registry, layers=[data])
    path = blob_path(image.layer_digests[0])
    for one in (first, registry) if wrong == "both" else (first,):
        one.script("GET", path, answers.flip_bit(LARGE // 2), forever=True)
    cache = await start_cache(section(first, registry))
    cut = await cache.get(path, within=SOON)
    assert (cut.status, cut.clean_end) == (200, False)
    await cache.settled()
    assert wrong_files(cache) == []
    if wrong == "both":
        again = await cache.get(path, within=SOON)
        assert not again.clean_end
        await cache.settled()
        assert cache.held(image.layer_digests[0]) is None
    else:
        await pulls_well(cache, path, data)
    assert (first.count("GET", path), registry.count("GET", path)) == (1, 1)
    assert registry.seen("GET", path)[0].headers.get("Range") is None


# --- broken off ---


@pytest.mark.parametrize("how", ["fin", "rst", "stall"])
@pytest.mark.parametrize("at", [0, 1, SMALL - 1, 1024 * 1024, LARGE // 2, LARGE - 1])
@pytest.mark.parametrize("frame", FRAMES)
async def test_what_broke_off_is_continued_at_the_next_from_the_first_byte_not_received(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, frame: str, at: int, how: Ending
) -> None:
    """Not one byte is fetched twice, and the client sees nothing of it."""
    data = blob_of("broken", SMALL if at < SMALL else LARGE)
    path = blob_path(everywhere(first, registry, layers=[data]).layer_digests[0])
    first.script("GET", path, compose(FRAMES[frame], answers.cut(at, how)), forever=True)
    cache = await start_cache(section(first, registry))
    await pulls_well(cache, path, data)
    assert (first.count("GET", path), registry.count("GET", path)) == (1, 1)
    assert registry.seen("GET", path)[0].headers.get("Range") == (f"bytes={at}-" if at else None)
    assert (first.bytes_sent(path), registry.bytes_sent(path)) == (at, len(data) - at)


async def test_what_breaks_off_at_each_of_three_is_put_together(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    data = blob_of("thirds", LARGE)
    third = LARGE // 3
    async with ScriptedRegistry() as second:
        path = blob_path(everywhere(first, second, registry, layers=[data]).layer_digests[0])
        first.script("GET", path, answers.cut(third, "rst"), forever=True)
        second.script("GET", path, answers.cut(third, "fin"), forever=True)
        cache = await start_cache(section(first, second, registry))
        await pulls_well(cache, path, data)
        sent = [one.bytes_sent(path) for one in (first, second, registry)]
        assert sent == [third, third, LARGE - 2 * third]


async def test_one_that_breaks_off_is_passed_over_by_the_next_download(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """A stall costs the first client ``timeouts.progress``, and the next one nothing."""
    image = everywhere(first, registry, layers=[blob_of(number, LARGE) for number in range(3)])
    first.script("GET", everything, answers.cut(LARGE // 2, "stall"), forever=True)
    cache = await start_cache(section(first, registry))
    for data, digest in zip(image.layers, image.layer_digests, strict=True):
        await pulls_well(cache, blob_path(digest), data)
    assert len(first.requests) == 1


# --- sizes that differ ---


@pytest.mark.parametrize("known", [True, False], ids=["size known", "size unknown"])
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("more", [-1000, -1, 1, 1000])
async def test_a_wrong_size_is_found_out(
    first: ScriptedRegistry,
    registry: ScriptedRegistry,
    start_cache: StartCache,
    size: int,
    more: int,
    known: bool,
) -> None:
    """Within the request if nothing was sent yet: the manifest states another size, or all of it had to be verified."""
    data = blob_of("size", size)
    image = everywhere(first, registry, layers=[data])
    path = blob_path(image.layer_digests[0])
    first.script("GET", path, answers.claim_length(size + more), forever=True)
    cache = await start_cache(section(first, registry))
    if known:
        await pulls_well(cache, manifest_path("1"), image.data)
    answer = await cache.get(path, within=SOON)
    assert not vouched_wrongly(answer, data)
    if known or size == SMALL:
        assert is_right(answer, "GET", data), (answer.status, answer.headers, answer.body[:300])
    await cache.settled()
    assert wrong_files(cache) == []
    await pulls_well(cache, path, data)


async def test_a_rest_of_another_size_is_not_taken_from_the_next(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """It ends short, and nothing of it is kept."""
    data = blob_of("rest", LARGE)
    path = blob_path(everywhere(first, registry, layers=[data]).layer_digests[0])
    first.script("GET", path, answers.cut(LARGE // 2))
    lie = registry.script("GET", path, answers.changed_total(5), forever=True)
    cache = await start_cache(section(first, registry))
    answer = await cache.get(path, within=SOON)
    assert not vouched_wrongly(answer, data)
    await cache.settled()
    assert wrong_files(cache) == []
    lie.cancel()
    await pulls_well(cache, path, data)


# --- whose word counts ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", [*GONE, "500", "404", "403", "429"])
async def test_what_the_last_one_says_is_not_there_is_not_there(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, fault: str, kind: str
) -> None:
    """Also while a mirror is down: 404, which a client may believe."""
    image = first.add_image(REPO, "1", [b"layer"])
    registry.add_blob(REPO, b"another")
    path, _ = path_and_truth(image, kind)
    async with faulty(first, fault) as url:
        cache = await start_cache(section(url, registry))
        for _ in range(2):
            assert (await ask(cache, kind, path)).status == 404


@pytest.mark.parametrize("kind", KINDS)
async def test_what_the_last_one_refuses_is_refused(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, kind: str
) -> None:
    image = registry.add_image(REPO, "1", [b"layer"])
    always(registry, answers.oci_error(403, "DENIED"))
    cache = await start_cache(section(first, registry))
    assert (await ask(cache, kind, path_and_truth(image, kind)[0])).status == 403


async def test_a_tag_that_the_last_one_does_not_have_is_forgotten(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    image = everywhere(first, registry, layers=[b"layer"])
    cache = await start_cache(section(first, registry))
    await pulls_well(cache, manifest_path("1"), image.data)
    for one in (first, registry):
        one.remove(REPO, "1")
    for method in (cache.get, cache.head):
        assert (await method(manifest_path("1"))).status == 404
    for one in (first, registry):
        await one.stop()
    answer = await cache.get(manifest_path("1"))
    assert answer.status == 503, "it is not served stale any more"
    await pulls_well(cache, manifest_path(image.digest), image.data)


@pytest.mark.parametrize("fault", ["refused", "accepts and is silent", "500", "429", "hangs up", "404 page"])
@pytest.mark.parametrize("mirror", ["404", "404 of the repository", "403"])
async def test_a_mirrors_no_does_not_count_while_the_last_one_fails(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, mirror: str, fault: str
) -> None:
    """A held tag is served stale, and stays; what is not held is a failure, not a 404."""
    image = everywhere(first, registry, layers=[b"layer"])
    timeouts = dict.fromkeys(QUICK, "200ms")
    port, held = registry.port, await start_cache(section(first, registry, timeouts=timeouts))
    await pulls_well(held, manifest_path("1"), image.data)
    always(first, FAULTS[mirror])
    if fault in FAULTS:
        always(registry, FAULTS[fault])
        await fails_stale(held, image)
    elif fault == "refused":
        await registry.stop()
        await fails_stale(held, image)
    else:
        await registry.stop()
        async with Sink(port=port):
            await fails_stale(held, image)


async def fails_stale(cache: RunningCache, image: Image) -> None:
    """The tag is served stale again and again, and nothing else is said not to be there."""
    for method in (cache.get, cache.head, cache.get):
        answer = await method(manifest_path("1"), within=SOON)
        assert (answer.status, answer.headers.get("Docker-Content-Digest")) == (200, image.digest)
        assert UPSTREAM in (answer.headers.get("Warning") or "")
    assert (await cache.head(manifest_path("2"), within=SOON)).status in (429, 502, 503)
    assert (await cache.head(blob_path(f"sha256:{'0' * 64}"), within=SOON)).status in (429, 502, 503)


@pytest.mark.parametrize("kind", KINDS)
async def test_if_all_are_down_the_error_names_all(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, kind: str
) -> None:
    async with ScriptedRegistry() as second:
        image = everywhere(first, second, registry, layers=[b"layer"])
        cache = await start_cache(section(first, second, registry))
        for one in (first, second, registry):
            await one.stop()
        path, _ = path_and_truth(image, kind)
        for _ in range(2):
            answer = await ask(cache, kind, path)
            assert answer.status == 503
            if kind.startswith("GET"):
                _, code, message = error_of(answer)
                assert code == "UNAVAILABLE"
                for one in (first, second, registry):
                    assert f"{UPSTREAM} ({one.host})" in message


async def test_if_all_are_down_what_is_held_is_served_and_the_warning_names_all(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    image = everywhere(first, registry, layers=[b"layer"])
    cache = await start_cache(section(first, registry))
    await pulls_well(cache, manifest_path("1"), image.data)
    await pulls_well(cache, blob_path(image.layer_digests[0]), b"layer")
    for one in (first, registry):
        await one.stop()
    for _ in range(2):
        answer = await cache.get(manifest_path("1"))
        assert is_right(answer, "GET", image.data)
        warning = answer.headers.get("Warning") or ""
        for one in (first, registry):
            assert one.host in warning
    await pulls_well(cache, blob_path(image.layer_digests[0]), b"layer")


# --- tokens ---


async def test_a_token_of_one_endpoint_reaches_no_other(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """Each wants one of its own; the first fails once it has been given one."""
    image = everywhere(first, registry, layers=[blob_of(number, SMALL) for number in range(4)])
    first.require_token(service="first")
    registry.require_token(service="second")
    path = blob_path(image.layer_digests[1])
    first.script("GET", path, answers.status(500), forever=True)
    cache = await start_cache(section(first, registry))
    for data, digest in zip(image.layers, image.layer_digests, strict=True):
        await pulls_well(cache, blob_path(digest), data)
    for one, other in ((first, registry), (registry, first)):
        assert len(one.tokens.issued) == 1
        assert one.heard(one.tokens.issued[0])
        assert not other.heard(one.tokens.issued[0])
        assert len(one.seen(path="/token")) == 1
    assert {value for request in first.seen(path="/token") for value in request.params["service"]} == {"first"}
    assert {value for request in registry.seen(path="/token") for value in request.params["service"]} == {"second"}


@pytest.mark.parametrize("way", ["to the second", "to the first"])
async def test_a_redirect_from_one_endpoint_to_another_carries_no_token(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, way: str
) -> None:
    """Though there is one that would be good there: it is for that endpoint's own requests."""
    image = everywhere(first, registry, layers=[b"one", b"two"])
    first.require_token()
    registry.require_token()
    one, two = (blob_path(digest) for digest in image.layer_digests)
    first.script("GET", one, answers.status(404))
    cache = await start_cache(section(first, registry))
    await pulls_well(cache, one, b"one")
    assert first.tokens.issued
    assert registry.tokens.issued
    source, target = (first, registry) if way == "to the second" else (registry, first)
    source.script("GET", two, answers.redirect(f"{target.url}/moved"), forever=True)
    target.script("GET", "/moved", answers.status(200, b"two"))
    if source is registry:
        first.script("GET", two, answers.status(404))
    await pulls_well(cache, two, b"two")
    (moved,) = target.seen(path="/moved")
    assert not moved.headers.has("Authorization")
    assert source.seen("GET", two)[-1].headers.has("Authorization")


async def test_the_token_server_of_one_endpoint_is_not_lent_to_another(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """The first one names the second's token server, which gives tokens to the second's requests."""
    image = everywhere(first, registry, layers=[b"layer"])
    registry.require_token(service="second")
    first.require_token(realm=f"{registry.url}/token", service="first", tokens=registry.tokens)
    cache = await start_cache(section(first, registry))
    await pulls_well(cache, manifest_path("1"), image.data)
    assert [request.params["service"] for request in registry.seen(path="/token")] == [["second"]]
    assert cache.metric("refused_total", what="realm") == 1
    assert not first.heard("Authorization")


async def test_the_token_server_of_docker_hub_is_not_lent_to_its_mirrors(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    first.add_image("library/app", "1", [b"layer"])
    image = registry.add_image("library/app", "1", [b"layer"])
    first.require_token(realm="https://auth.docker.io/token", service="registry.docker.io")
    cache = await start_cache(section(first, registry, name="docker.io"))
    answer = await cache.get(manifest_path("1", "library/app"))
    assert (answer.status, answer.body) == (200, image.data)
    assert cache.metric("refused_total", what="realm") == 1
    await registry.stop()
    cache = await start_cache(section(first, registry, name="docker.io"))
    _, _, text = error_of(await cache.get(manifest_path("1", "library/app")))
    assert "auth.docker.io" in text
    assert "tokenHosts" in text


@pytest.mark.parametrize("fault", ["500", "says nothing", "404", "403"])
async def test_an_endpoint_whose_token_server_fails_is_passed_over(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, fault: str
) -> None:
    image = everywhere(first, registry, layers=[blob_of(number, SMALL) for number in range(5)])
    async with ScriptedRegistry() as auth:
        first.require_token(realm=f"{auth.url}/token", tokens=auth.tokens)
        always(auth, FAULTS[fault])
        cache = await start_cache(section(first, registry, tokenHosts=[auth.host]))
        await pulls_well(cache, manifest_path("1"), image.data)
        for data, digest in zip(image.layers, image.layer_digests, strict=True):
            await pulls_well(cache, blob_path(digest), data)
        assert len(auth.requests) == 1


# --- others are not concerned ---


async def test_a_dead_endpoint_of_one_upstream_is_not_another_upstreams(
    first: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """Rests belong to an upstream, even if two name the same host."""
    image = everywhere(first, registry, layers=[b"one", b"two"])
    one, two = (blob_path(digest) for digest in image.layer_digests)
    first.script("GET", one, answers.status(500))
    cache = await start_cache(section(first, registry), section(first, registry, name="other.test"))
    await pulls_well(cache, one, b"one")
    await pulls_well(cache, f"{two}?ns=other.test", b"two")
    assert registry.seen(path=two) == []


async def test_an_upstream_of_the_old_kind_is_what_it_was(registry: ScriptedRegistry, start_cache: StartCache) -> None:
    """With one endpoint nothing rests and nothing is probed, and a slow answer has all the time there is."""
    data = registry.add_image(REPO, "1", [b"layer"], media_type=OCI_MANIFEST).data
    registry.script("GET", manifest_path("1"), answers.status(500), answers.status(500))
    opened = asyncio.Event()
    registry.script("GET", manifest_path("1"), answers.gate(opened))
    cache = await start_cache(upstream(registry, timeouts=QUICK))
    for _ in range(2):
        assert (await cache.get(manifest_path("1"))).status == 502
    waiting = asyncio.create_task(cache.get(manifest_path("1"), within=SOON))
    await registry.wait_for(lambda: len(registry.requests) == 3)
    for _ in range(3):  # three times what a mirror would be given
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await asyncio.shield(waiting)
    opened.set()
    assert is_right(await waiting, "GET", data)
    assert registry.seen(path="/v2/") == []
