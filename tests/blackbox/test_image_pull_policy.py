"""Pull policies: what is served, and what the upstream is asked, counted by the registry itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.oracle import blob_path, error_of, manifest_path
from tests.blackbox.private import (
    ALICE,
    APP,
    BOB,
    EXTERNAL,
    PROXYS,
    PrivateRegistry,
    fill,
    parts,
    pull,
    secret_for,
    started,
    with_access,
)
from tests.conftest import UPSTREAM, RunningCache, StartCache, upstream
from tests.fakes.answers import Step, before_headers, oci_error, status, too_many_requests
from tests.fakes.client import WireResponse
from tests.fakes.content import Image
from tests.fakes.registry import ScriptedRegistry

REPO = "team/app"
STATES: dict[str, Step | None] = {
    "up": None,
    "404": oci_error(404, "MANIFEST_UNKNOWN"),
    "401": oci_error(401, "UNAUTHORIZED"),
    "403": oci_error(403, "DENIED"),
    "429": too_many_requests(7),
    "500": status(500),
    "HTML 403": status(403, b"<html>blocked</html>", "text/html"),
    "reset": before_headers("rst"),
}


def policy(name: str, **more: object) -> dict[str, Any]:
    """Of everything."""
    rule = {"match": "*", "policy": name, **more}
    return {"alwaysPullImages": False, "imagePullPolicy": {"rules": [rule]}}


@pytest.fixture
def image(registry: ScriptedRegistry) -> Image:
    """What the registry has."""
    return registry.add_image(REPO, "1", [b"layer one", b"layer two"])


async def hold(cache: RunningCache, image: Image) -> None:
    """Pulls it, all of it."""
    assert (await cache.get(manifest_path("1"))).status == 200
    for digest in image.layer_digests:
        assert (await cache.get(blob_path(digest))).status == 200


@pytest.fixture
async def directory(tmp_path: Path, registry: ScriptedRegistry, image: Image) -> Path:
    """Where it is held: a cache of before has pulled it."""
    async with started(tmp_path / "held", upstream(registry)) as cache:
        await hold(cache, image)
        await cache.settled()
    return tmp_path / "held"


async def ask(cache: RunningCache, method: str, path: str) -> WireResponse:
    """One request."""
    return await (cache.get if method == "GET" else cache.head)(path)


def fail(registry: ScriptedRegistry, state: str) -> None:
    """From now on the registry answers so, whatever it is asked."""
    if (step := STATES[state]) is not None:
        for method in ("HEAD", "GET"):
            registry.script(method, lambda _: True, step, forever=True)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("name", ["IfNotPresent", "Never"])
async def test_what_is_held_is_served_without_a_question(
    start_cache: StartCache,
    registry: ScriptedRegistry,
    image: Image,
    directory: Path,
    name: str,
    method: str,
    state: str,
) -> None:
    """Tag, manifest and layers: no contact at all, whatever the registry would say."""
    cache = await start_cache(upstream(registry), directory=directory, **policy(name))
    fail(registry, state)
    asked = len(registry.requests)
    paths = [manifest_path("1"), manifest_path(image.digest), *(blob_path(digest) for digest in image.layer_digests)]
    for path in paths:
        assert (await ask(cache, method, path)).status == 200
    assert len(registry.requests) == asked


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("keys", [policy("Never"), {"alwaysPullImages": False, "offline": True}], ids=["Never", "offline"])
async def test_what_is_not_held_is_never_asked_for(
    start_cache: StartCache, registry: ScriptedRegistry, image: Image, keys: dict[str, Any], method: str
) -> None:
    """The text says why, as the kubelet does: ``ErrImageNeverPull``."""
    cache = await start_cache(upstream(registry), **keys)
    for path, code, what in [
        (manifest_path("1"), "MANIFEST_UNKNOWN", ":1"),
        (manifest_path(image.digest), "MANIFEST_UNKNOWN", f"@{image.digest}"),
        (blob_path(image.layer_digests[0]), "BLOB_UNKNOWN", f"@{image.layer_digests[0]}"),
    ]:
        answer = await ask(cache, method, path)
        assert answer.status == 404
        if method == "GET":
            _, told, message = error_of(answer)
            assert told == code
            assert message.startswith(f"ErrImageNeverPull: {UPSTREAM}/{REPO}{what} is not held for this client")
            assert ("offline is true" if "offline" in keys else "imagePullPolicy.rules[0] ('*')") in message
    assert registry.requests == []


async def test_offline_asks_for_no_list_either(start_cache: StartCache, registry: ScriptedRegistry, image: Image) -> None:
    cache = await start_cache(upstream(registry), alwaysPullImages=False, offline=True)
    for path in (f"/v2/{REPO}/tags/list", f"/v2/{REPO}/referrers/{image.digest}"):
        assert "ErrImageNeverPull" in error_of(await cache.get(path))[2]
    assert registry.requests == []


async def test_the_default_is_derived_from_the_tag(start_cache: StartCache, registry: ScriptedRegistry) -> None:
    """``latest`` is asked for each time, every other tag once."""
    cache = await start_cache(upstream(registry), alwaysPullImages=False)
    for tag, methods in (("latest", ["GET", "HEAD", "HEAD"]), ("1", ["GET"])):
        registry.add_image(REPO, tag, [tag.encode()])
        for _ in range(3):
            assert (await cache.get(manifest_path(tag))).status == 200
        assert [request.method for request in registry.requests if request.path == manifest_path(tag)] == methods


async def test_a_tag_that_has_moved(start_cache: StartCache, registry: ScriptedRegistry) -> None:
    """``Always`` brings the new image, by its digest; ``IfNotPresent`` goes on serving the old one."""
    rules = [{"match": "*:always", "policy": "Always"}, {"match": "*:present", "policy": "IfNotPresent"}]
    cache = await start_cache(upstream(registry), alwaysPullImages=False, imagePullPolicy={"rules": rules})
    for tag in ("always", "present"):
        old = registry.add_image(REPO, tag, [b"old"])
        assert (await cache.get(manifest_path(tag))).body == old.data
        new = registry.add_image(REPO, tag, [b"new " + tag.encode()])
        answer = await cache.get(manifest_path(tag))
        assert answer.body == (new.data if tag == "always" else old.data)
        assert registry.count("GET", manifest_path(new.digest)) == (tag == "always")


async def test_after_max_age_a_held_tag_is_asked_for_again(
    start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """And where nobody answers, it is served stale."""
    cache = await start_cache(upstream(registry), **policy("IfNotPresent", maxAge="0s"))
    for _ in range(2):
        assert (await cache.get(manifest_path("1"))).status == 200
    assert [request.method for request in registry.requests] == ["GET", "HEAD"]
    await registry.stop()
    assert (await cache.get(manifest_path("1"))).headers.get("Warning") is not None


async def test_a_right_is_still_asked_for(start_cache: StartCache) -> None:
    """``IfNotPresent`` is about content: who may read a private repository is asked as before, and nothing else is."""
    async with PrivateRegistry("token") as registry:
        stock = fill(registry)
        cache = await start_cache(with_access(registry, "verify"), externalURL=EXTERNAL, **policy("IfNotPresent"))
        await pull(cache, APP, stock.app, ALICE.headers)
        asked = len(registry.requests)
        assert (await cache.get(manifest_path("1", APP), ALICE.headers)).status == 200
        assert len(registry.requests) == asked, "her yes is fresh, and the tag is held"
        assert (await cache.get(manifest_path("1", APP), BOB.headers)).status == 401
        assert len(registry.requests) > asked
        assert all(request.path == "/token" or request.method == "HEAD" for request in registry.requests[asked:])


@pytest.mark.parametrize("mode", ["verify", "shared"])
async def test_without_a_question_only_a_yes_of_before_counts(tmp_path: Path, mode: str) -> None:
    """The yes to a client is gone with a restart; that to the cache's own secret is in its catalog. Whoever has none is told
    the same of what is held as of what is not."""
    async with PrivateRegistry("token") as registry:
        stock = fill(registry)
        registry.allow(PROXYS, APP)
        sections = {"imagePullSecrets": [secret_for(tmp_path)]} if mode == "shared" else {}
        async with started(tmp_path / "cache", with_access(registry, mode), **sections) as cache:
            await pull(cache, APP, stock.app, ALICE.headers)
            await cache.settled()
        asked = len(registry.requests)
        offline = {"alwaysPullImages": False, "offline": True}
        async with started(tmp_path / "cache", with_access(registry, mode), **sections, **offline) as cache:
            answer = await cache.get(manifest_path("1", APP), ALICE.headers)
            absent = await cache.get(manifest_path("9", APP), ALICE.headers)
            if mode == "shared":
                assert answer.status == 200
                assert (await cache.get(parts(APP, stock.app)["layer"])).status == 200
            else:
                assert error_of(answer)[:2] == (404, "MANIFEST_UNKNOWN")
                assert "ErrImageNeverPull" in error_of(answer)[2]
                assert error_of(absent)[2] == error_of(answer)[2]
        assert len(registry.requests) == asked


async def test_f38_a_tag_that_moves_during_pulls(start_cache: StartCache, registry: ScriptedRegistry) -> None:
    """500 pulls as containerd makes them, tag by HEAD and all else by digest, while the tag moves 50 times: each is of one
    image, and a pull that begins after a move is of the new one."""
    cache = await start_cache(upstream(registry))
    images = [registry.add_image(REPO, None, [f"layer of {number}".encode()]) for number in range(51)]
    at = {image.digest: number for number, image in enumerate(images)}
    now = 0

    def move(number: int) -> None:
        nonlocal now
        registry.add_manifest(REPO, images[number].data, images[number].media_type, "1")
        now = number

    async def one_pull() -> None:
        began = now
        digest = (await cache.head(manifest_path("1"))).headers.get("Docker-Content-Digest") or ""
        image = images[at[digest]]
        assert at[digest] >= began, "what the tag pointed at before the pull began"
        assert (await cache.get(manifest_path(digest))).body == image.data
        assert (await cache.get(blob_path(image.layer_digests[0]))).body == image.layers[0]

    move(0)
    for number in range(1, 51):
        pulls = [asyncio.create_task(one_pull()) for _ in range(10)]
        await asyncio.sleep(0)
        move(number)
        await asyncio.gather(*pulls)
    await one_pull()
