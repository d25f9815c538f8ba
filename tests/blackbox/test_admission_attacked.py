"""Found by attacking the line of downloads: nobody waits behind what he does not want, and nothing is told early."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from proxy.pull import blobs as pull_blobs
from tests.blackbox.oracle import LARGE, SMALL, blob_of, blob_path, manifest_path
from tests.blackbox.private import (
    ALICE,
    APP,
    BOB,
    EXTERNAL,
    Clock,
    PrivateRegistry,
    fetch_from,
    started,
    until,
    with_access,
)
from tests.blackbox.test_admission import PATIENT, Held, busy, large, moved, tell, waits
from tests.conftest import StartCache, upstream
from tests.fakes.answers import gate, oci_error
from tests.fakes.client import WireResponse
from tests.fakes.content import Image
from tests.fakes.registry import ScriptedRegistry

__all__ = ["large"]
REPO = "team/app"


@pytest.mark.parametrize("keys", [{}, {"maxParallelImagePulls": 3}], ids=["unlimited", "three images"])
async def test_nobody_waits_in_the_line_of_another_upstream(
    start_cache: StartCache, registry: ScriptedRegistry, keys: dict[str, Any]
) -> None:
    """The same layer in two registries: one has no slot free, and a client waits for it there; who wants it from the other
    one has it at once."""
    async with ScriptedRegistry() as other:
        image = registry.add_image(REPO, "1", [blob_of("shared", SMALL)])
        other.add_image(REPO, "1", [blob_of("shared", SMALL)])
        cache = await start_cache(
            upstream(registry, maxConcurrentFetches=1), upstream(other, "other.test", maxConcurrentFetches=1), **keys
        )
        assert (await cache.get(manifest_path("1"))).status == 200
        assert (await cache.get(f"/v2/other.test/{REPO}/manifests/1")).status == 200
        held = Held(registry)
        running = await busy(cache, registry, held)
        path = blob_path(image.layer_digests[0])
        first = await waits(cache, path)
        second = await fetch_from("127.0.0.2", cache, "GET", f"/v2/other.test/{path.removeprefix('/v2/')}")
        assert (second.status, second.body) == (200, image.layers[0])
        assert not first.done()
        held.release_all()
        assert [(await each).status for each in (running, first)] == [200, 200]


@pytest.mark.parametrize(
    ("method", "headers"), [("HEAD", []), ("GET", [("Range", "bytes=100-199")]), ("GET", [])], ids=["head", "range", "whole"]
)
async def test_what_waits_is_told_to_nobody_without_a_right(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, method: str, headers: list[tuple[str, str]]
) -> None:
    """Neither size nor existence, however long he waits."""
    image = private.add_image(APP, "1", [blob_of("private", LARGE)])
    small = private.add_blob(APP, b"busy")
    private.allow(ALICE, APP)
    private.allow(BOB)
    section = {"timeouts": PATIENT, "maxConcurrentFetches": 1}
    cache = await start_cache(with_access(private, "verify", section=section), externalURL=EXTERNAL)
    assert (await cache.get(manifest_path("1", APP), ALICE.headers)).status == 200
    held = Held(private)
    path = blob_path(image.layer_digests[0], APP)
    running = asyncio.create_task(cache.get(blob_path(small, APP), ALICE.headers))
    await held.wait_for(blob_path(small, APP))
    waiting = asyncio.create_task(cache.get(path, ALICE.headers))
    await until(lambda: cache.metric("fills_waiting") == 1)
    for shown in ([], BOB.headers):
        answer = await fetch_from("127.0.0.2", cache, method, path, [*shown, *headers])
        assert answer.status == 401
        assert str(LARGE).encode() not in answer.body
    held.release_all()
    assert [(await each).status for each in (running, waiting)] == [200, 200]


async def test_a_body_whose_headers_are_out_ends_unclean_when_it_is_refused(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, large: Image
) -> None:
    cache = await start_cache(upstream(registry, timeouts=PATIENT, maxConcurrentFetches=1))
    assert (await cache.get(manifest_path("1", "team/large"))).status == 200
    path = blob_path(large.layer_digests[0], "team/large")
    registry.script("GET", path, oci_error(403, "DENIED"), forever=True)
    held = Held(registry)
    running = await busy(cache, registry, held)
    whole = asyncio.create_task(cache.open(path))
    await until(lambda: cache.metric("fills_waiting") == 1)
    await moved(clock, 20, whole.done)
    async with await whole as stream:
        held.release_all()
        assert (stream.status, await stream.read_all(), stream.clean_end) == (200, b"", False)
    assert (await running).status == 200


@pytest.mark.parametrize("right", ["kept", "withdrawn"])
async def test_who_stays_has_it_though_the_first_client_and_its_right_are_gone(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, right: str
) -> None:
    """The download that waits was to show the credential of who has left."""
    image = private.add_image(APP, "1", [blob_of("private", LARGE)])
    small = private.add_blob(APP, b"busy")
    private.allow(ALICE, APP)
    private.allow(BOB, APP)
    section = {"timeouts": PATIENT, "maxConcurrentFetches": 1}
    cache = await start_cache(with_access(private, "verify", section=section), externalURL=EXTERNAL, backoff={})
    for who in (ALICE, BOB):
        assert (await cache.get(manifest_path("1", APP), who.headers)).status == 200
    opened = asyncio.Event()
    private.script("GET", blob_path(small, APP), gate(opened))
    path = blob_path(image.layer_digests[0], APP)
    running = asyncio.create_task(cache.get(blob_path(small, APP), BOB.headers))
    await private.wait_for(lambda: private.count("GET", blob_path(small, APP)) >= 1)
    first = asyncio.create_task(cache.open(path, ALICE.headers))
    await until(lambda: cache.metric("fills_waiting") == 1)
    second = asyncio.create_task(cache.get(path, BOB.headers))
    await until(lambda: cache.metric("followers_total") == 1)
    first.cancel()
    await until(lambda: cache.metric("connections") <= 2)
    if right == "withdrawn":
        private.withdraw(ALICE)
    opened.set()
    answer = await second
    assert (answer.status, answer.body == image.layers[0], answer.clean_end) == (200, True, True)
    assert (await running).status == 200


@pytest.mark.parametrize("keys", [{}, {"serializeImagePulls": True}], ids=["slots", "serial"])
async def test_it_stops_while_hundreds_wait(tmp_path: Path, registry: ScriptedRegistry, keys: dict[str, Any]) -> None:
    """Every one of them is told, or cut, and none is given what is not whole."""
    opened = asyncio.Event()
    registry.script("GET", lambda request: "/blobs/" in request.path, gate(opened), forever=True)
    paths = [blob_path(registry.add_blob(REPO, blob_of(str(number), 100))) for number in range(200)]
    async with started(tmp_path / "cache", upstream(registry, maxConcurrentFetches=1), **keys) as cache:
        tasks = [asyncio.create_task(cache.get(path)) for path in paths]
        await until(lambda: cache.metric("fills_waiting") == 199)
    for answer in await asyncio.gather(*tasks, return_exceptions=True):
        assert answer.status == 503 if isinstance(answer, WireResponse) else isinstance(answer, ConnectionError), answer


async def test_thousands_that_wait_leave_and_come_again(
    start_cache: StartCache, registry: ScriptedRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,000 clients from many addresses, each with its own blob, hang up; the line is empty, and a next one is served."""
    monkeypatch.setattr(pull_blobs, "_PATIENCE", 600.0)  # else the first are sent away before the last has come
    cache = await start_cache(upstream(registry), maxParallelImagePulls=2, queueTimeout="4m")
    held = Held(registry)
    paths = [blob_path(registry.add_blob(REPO, blob_of(str(number), 10))) for number in range(2000)]

    async def come(number: int) -> asyncio.Task[Any]:
        return asyncio.create_task(fetch_from(f"127.0.{1 + number % 20}.1", cache, "GET", paths[number]))

    tasks = [await come(number) for number in range(2000)]
    await until(lambda: cache.metric("fills_waiting") == 1998, within=120)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await until(lambda: cache.metric("fills_waiting") == 0, within=60)
    held.release_all()
    assert (await cache.get(paths[-1])).status == 200


async def test_what_fails_at_once_holds_no_place(clock: Clock, start_cache: StartCache, registry: ScriptedRegistry) -> None:
    """Names that do not exist, one image each: who comes after them does not wait for two seconds a name."""
    cache = await start_cache(upstream(registry, timeouts=PATIENT), serializeImagePulls=True)
    image = registry.add_image(REPO, "1", [blob_of("one", SMALL)])
    await tell(cache, "1")
    absent = [blob_path(f"sha256:{number:064x}") for number in range(20)]
    asking = [asyncio.create_task(fetch_from("127.0.0.9", cache, "GET", path)) for path in absent]
    await until(lambda: cache.metric("fills_waiting") >= 15)
    good = asyncio.create_task(cache.get(blob_path(image.layer_digests[0])))
    async with asyncio.timeout(15):
        assert (await good).status == 200
    assert {(await each).status for each in asking} == {404}
