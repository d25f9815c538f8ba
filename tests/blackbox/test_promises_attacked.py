"""The four promises, attacked where special cases meet."""

from __future__ import annotations

import asyncio
import gc
import os
import stat
import threading
import time
from pathlib import Path

import pytest

from proxy import fetch as fetching
from proxy import send as sending
from proxy.config.file import validate
from proxy.listener import Connection
from tests.blackbox.oracle import LARGE, blob_of, blob_path, manifest_path, pulls_well, vouched_wrongly
from tests.conftest import RunningCache, StartCache, running, settings, upstream
from tests.fakes import answers
from tests.fakes.answers import Step, compose
from tests.fakes.client import finish, open_stream, open_wire
from tests.fakes.registry import ScriptedRegistry

PRIVATE, OTHER = "team/private", "team/other"


async def test_a_head_that_is_not_offered_is_no_proof(cache: RunningCache, registry: ScriptedRegistry) -> None:
    image = registry.add_image(PRIVATE, "1", [b"layer"])
    assert (await cache.get(manifest_path(image.digest, PRIVATE))).status == 200
    registry.script("HEAD", manifest_path(image.digest, OTHER), answers.status(405), forever=True)
    assert (await cache.get(manifest_path(image.digest, OTHER))).status == 404


@pytest.mark.parametrize("kind", ["manifest", "blob"])
async def test_the_200_of_a_login_page_is_no_proof(cache: RunningCache, registry: ScriptedRegistry, kind: str) -> None:
    image = registry.add_image(PRIVATE, "1", [b"layer"])
    await cache.get(manifest_path(image.digest, PRIVATE))
    await cache.get(blob_path(image.layer_digests[0], PRIVATE))
    await cache.settled()
    path = manifest_path(image.digest, OTHER) if kind == "manifest" else blob_path(image.layer_digests[0], OTHER)
    async with ScriptedRegistry() as login:
        login.script("*", lambda _: True, answers.status(200, b"<html>log in", "text/html"), forever=True)
        registry.script("*", path, answers.redirect(f"{login.url}/login", 302), forever=True)
        assert (await cache.get(path)).status >= 400


async def test_a_stop_does_not_end_a_body_of_unknown_length_cleanly(registry: ScriptedRegistry, tmp_path: Path) -> None:
    """HTTP/1.0: there a plain close is the end."""
    data = blob_of(2, LARGE)
    path = blob_path(registry.add_blob("team/app", data))
    registry.script("GET", path, compose(answers.chunked(), answers.cut(2_000_000, "stall")), forever=True)
    async with running(validate(settings(tmp_path / "cache", upstream(registry)))) as cache:
        stream = await open_stream(cache.host, cache.port, "GET", path, version="1.0")
        reading = asyncio.create_task(finish(stream))
        await registry.wait_for(lambda: registry.bytes_sent(path) >= 2_000_000)
    answer = await reading
    await stream.close()
    assert not vouched_wrongly(answer, data)


async def test_a_slow_reader_of_a_body_of_unknown_length_is_not_cut_cleanly(
    cache: RunningCache, registry: ScriptedRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "_SLOW_SECONDS", 0.3)
    data = blob_of(2, 12_000_000)
    path = blob_path(registry.add_blob("team/app", data))
    registry.script("GET", path, answers.chunked(), forever=True)
    stream = await open_stream(cache.host, cache.port, "GET", path, version="1.0", receive_buffer=4096)
    async with asyncio.timeout(20):
        while not cache.metric("slow_readers_total"):
            await asyncio.sleep(0.01)
    answer = await finish(stream)
    await stream.close()
    assert not vouched_wrongly(answer, data)


async def test_another_repositorys_failure_does_not_spoil_a_pull(cache: RunningCache, registry: ScriptedRegistry) -> None:
    image = registry.add_image("team/app", "1", [blob_of(1, 4000)])
    await pulls_well(cache, manifest_path("1"), image.data)
    digest, go_on = image.layer_digests[0], asyncio.Event()
    elsewhere = blob_path(digest, "evil/none")
    registry.script("GET", elsewhere, answers.gate(go_on))
    bad = asyncio.create_task(cache.get(elsewhere))
    await registry.wait_for(lambda: registry.count("GET", elsewhere) == 1)
    good = asyncio.create_task(cache.get(blob_path(digest)))
    async with asyncio.timeout(10):
        while not cache.metric("followers_total"):
            await asyncio.sleep(0.005)
    go_on.set()
    assert (await bad).status == 404
    assert (await good).status == 200


async def test_answers_to_a_client_that_does_not_read_are_not_heaped_up(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    image = registry.add_image("team/app", "1", [b"x%d" % number for number in range(300)])
    path = manifest_path(image.digest)
    await pulls_well(cache, path, image.data)

    def heap() -> int:
        open_now = [one.transport for one in gc.get_objects() if isinstance(one, Connection) and one.transport]
        return sum(transport.get_write_buffer_size() for transport in open_now)

    wire = await open_wire(cache.host, cache.port, receive_buffer=4096)
    try:
        for _ in range(60):
            await wire.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 50)
        for _ in range(100):
            assert heap() < 1_000_000
            await asyncio.sleep(0.01)
    finally:
        await wire.abort()


async def test_a_stop_while_something_is_being_saved_ends(
    registry: ScriptedRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, saving = os.fsync, threading.Event()

    def slow(descriptor: int) -> None:
        real(descriptor)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):  # the file has its name; what is left is the catalog
            saving.set()
        time.sleep(1)

    image = registry.add_image("team/app", "1", [b"layer"])
    path = manifest_path(image.digest)
    watchdog = threading.Timer(12, lambda: os._exit(3))  # a loop that is blocked can raise nothing
    watchdog.start()
    try:
        async with running(validate(settings(tmp_path / "cache", upstream(registry)))) as cache:
            monkeypatch.setattr(os, "fsync", slow)
            wire = await open_wire(cache.host, cache.port)
            await wire.send(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await asyncio.to_thread(saving.wait, 10)
            await wire.abort()
            async with asyncio.timeout(10):
                while cache.metric("connections"):  # the cache has to know that nobody waits for it any more
                    await asyncio.sleep(0.005)
    finally:
        watchdog.cancel()


async def test_many_slow_downloads_do_not_make_their_upstream_look_dead(
    registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    timeouts = {"connect": "500ms", "headers": "1s", "head": "1s"}
    cache = await start_cache(upstream(registry, timeouts=timeouts, maxConcurrentFetches=100))  # nobody waits for a turn
    go_on, streams = asyncio.Event(), []
    image = registry.add_image("team/app", "1", [b"layer"])
    await pulls_well(cache, manifest_path("1"), image.data)
    try:
        for number in range(70):
            path = blob_path(registry.add_blob("team/app", blob_of(number, 1_200_000)))
            registry.script("GET", path, answers.gate(go_on, 1_100_000))
            streams.append(await cache.open(path))
        blob = await cache.get(blob_path(registry.add_blob("team/app", b"n" * 100)))
        tag = await cache.get(manifest_path("1"))
        assert (blob.status, tag.headers.get("Warning")) == (200, None)
    finally:
        go_on.set()
        for stream in streams:
            await stream.close()
    await cache.settled()


async def test_what_is_repeated_too_slowly_is_given_up(
    registry: ScriptedRegistry, start_cache: StartCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume that is answered with the whole content, at a trickle."""
    monkeypatch.setattr(fetching, "_STUCK", 0.5)
    cache = await start_cache(upstream(registry))
    path = blob_path(registry.add_blob("team/app", blob_of(3, LARGE)))
    registry.script(
        "GET", path, answers.cut(LARGE // 2), compose(answers.ignore_range(), answers.slow(60_000)), forever=True
    )
    async with asyncio.timeout(20), await cache.open(path) as stream:
        assert not (await finish(stream)).clean_end


async def test_an_upstream_that_contradicts_itself_costs_no_held_tag(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    image = registry.add_image("team/app", "1", [b"layer"])
    await pulls_well(cache, manifest_path("1"), image.data)
    new = registry.add_image("team/app", "1", [b"layer2"])
    registry.script("*", manifest_path(new.digest), answers.oci_error(404, "MANIFEST_UNKNOWN"), forever=True)
    assert (await cache.get(manifest_path("1"))).body == image.data


@pytest.mark.parametrize(
    "step",
    [
        answers.oci_error(416, "RANGE_INVALID"),
        answers.status(404, b"404 page not found\n"),
        answers.status(404, b"<html>", "text/html"),
    ],
    ids=["416", "404 in plain text", "404 page"],
)
async def test_an_answer_that_is_no_registrys_costs_no_held_tag(
    cache: RunningCache, registry: ScriptedRegistry, step: Step
) -> None:
    image = registry.add_image("team/app", "1", [b"layer"])
    await pulls_well(cache, manifest_path("1"), image.data)
    registry.script("*", manifest_path("1"), step, forever=True)
    for state in ("odd", "down"):
        if state == "down":
            await registry.stop()
        assert (await cache.get(manifest_path("1"))).status == 200


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_t20_what_one_repository_brought_is_not_another_ones(
    cache: RunningCache, registry: ScriptedRegistry, method: str
) -> None:
    """Manifest and blobs are held; a repository that does not have them is asked about, and its no is the answer."""
    image = registry.add_image("team/secret", "1", [b"layer" * 100])
    registry.add_image("team/open", "1", [b"something else"])
    held = [("manifests", image.digest), ("blobs", image.config_digest), ("blobs", image.layer_digests[0])]
    for kind, digest in held:
        assert (await cache.get(f"/v2/team/secret/{kind}/{digest}")).status == 200
    ask = cache.get if method == "GET" else cache.head
    for kind, digest in held:
        answer = await ask(f"/v2/team/open/{kind}/{digest}")
        assert answer.status == 404
        assert b"layer" not in answer.body
    await registry.stop()
    for kind, digest in held:
        assert (await ask(f"/v2/team/open/{kind}/{digest}")).status == 503, "nobody can say yes"
        assert (await ask(f"/v2/team/secret/{kind}/{digest}")).status == 200
