"""Tags that a client of another ``Accept`` has pulled: what is held is served to all who would be given the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from proxy.manifests import DOCKER_LIST, DOCKER_MANIFEST, MODERN, OCI_INDEX, OCI_MANIFEST
from tests.blackbox.oracle import REPO, manifest_path
from tests.blackbox.private import ALICE, APP, BOB, EXTERNAL, PrivateRegistry, Stock, started, with_access
from tests.conftest import Pairs, RunningCache, StartCache, upstream
from tests.fakes.answers import oci_error, perform
from tests.fakes.client import WireResponse
from tests.fakes.content import Image
from tests.fakes.messages import Answer, Request
from tests.fakes.registry import ScriptedRegistry

ALL, OCI, DOCKER = ", ".join(MODERN), f"{OCI_INDEX}, {OCI_MANIFEST}", f"{DOCKER_LIST}, {DOCKER_MANIFEST}"
PATH = manifest_path("1")
WITHOUT_ASKING: dict[str, dict[str, Any]] = {
    "IfNotPresent": {"alwaysPullImages": False},
    "Never": {"alwaysPullImages": False, "imagePullPolicy": {"rules": [{"match": "*", "policy": "Never"}]}},
    "offline": {"alwaysPullImages": False, "offline": True},
}
SERVED = {
    "OCI types": (ALL, OCI, "image"),
    "one type": (ALL, OCI_MANIFEST, "image"),
    "one type of an index": (ALL, OCI_INDEX, "index"),
    "no Accept": (OCI, None, "index"),
    "anything": (OCI, "*/*", "index"),
    "any application type": (OCI, f"{OCI_MANIFEST}, application/*", "index"),
    "runtime": (OCI_INDEX, ALL, "index"),
    "no index wanted by either": (OCI_MANIFEST, f"{OCI_MANIFEST}, {DOCKER_MANIFEST}", "image"),
}
"""What the first client takes, and the second; and what the tag points at."""
NOT_SERVED = {
    "Docker types": (ALL, DOCKER, "image"),
    "no index": (ALL, f"{OCI_MANIFEST}, {DOCKER_MANIFEST}", "index"),
    "an index not asked for": (OCI_MANIFEST, ALL, "image"),
    "an index of the other kind": (OCI, ALL, "image"),
}


def taking(accept: str | None) -> Pairs:
    """The header."""
    return [] if accept is None else [("Accept", accept)]


async def ask(cache: RunningCache, method: str, accept: str | None, path: str = PATH) -> WireResponse:
    """One request of a client that takes this."""
    return await (cache.get if method == "GET" else cache.head)(path, taking(accept))


def decision(answer: WireResponse) -> str | None:
    """In one word."""
    return answer.headers.get("Pullcache-Decision")


def digest(answer: WireResponse) -> str | None:
    """Which manifest it is, or would be."""
    return answer.headers.get("Docker-Content-Digest")


async def hold(directory: Path, registry: ScriptedRegistry, accept: str, what: str) -> str:
    """A cache of before has pulled the tag for a client that takes this; the digest of what it points at."""
    image = registry.add_image(REPO, "1", [b"layer"])
    if what == "index":
        registry.add_index(REPO, "1", [image])
    async with started(directory, upstream(registry)) as cache:
        assert (await cache.get(PATH, taking(accept))).status == 200
    registry.requests.clear()
    return registry.repository(REPO).tags["1"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("policy", WITHOUT_ASKING)
@pytest.mark.parametrize("who", SERVED)
async def test_what_is_held_is_served_to_who_takes_it(
    start_cache: StartCache, tmp_path: Path, registry: ScriptedRegistry, who: str, policy: str, method: str
) -> None:
    first, second, what = SERVED[who]
    held = await hold(tmp_path, registry, first, what)
    cache = await start_cache(upstream(registry), directory=tmp_path, **WITHOUT_ASKING[policy])
    answer = await ask(cache, method, second)
    assert (answer.status, digest(answer), decision(answer)) == (200, held, "hit")
    assert registry.requests == []


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("who", SERVED)
async def test_with_the_upstream_away_it_is_served_stale(
    start_cache: StartCache, tmp_path: Path, registry: ScriptedRegistry, who: str, method: str
) -> None:
    """``Always``; and not by who wants nothing stale."""
    first, second, what = SERVED[who]
    held = await hold(tmp_path / "0", registry, first, what)
    await hold(tmp_path / "1", registry, first, what)
    await registry.stop()
    answer = await ask(await start_cache(upstream(registry), directory=tmp_path / "0"), method, second)
    assert (answer.status, digest(answer), decision(answer)) == (200, held, "stale")
    assert answer.headers.get("Warning") is not None
    strict = await start_cache(upstream(registry), directory=tmp_path / "1", staleIfError=False)
    assert (await ask(strict, method, second)).status == 503


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("who", NOT_SERVED)
async def test_who_does_not_take_it_is_not_served_it(
    start_cache: StartCache, tmp_path: Path, registry: ScriptedRegistry, who: str, method: str
) -> None:
    """It is not held for that client, and the upstream is asked what is there for it."""
    first, second, what = NOT_SERVED[who]
    await hold(tmp_path / "0", registry, first, what)
    await hold(tmp_path / "1", registry, first, what)
    never = await start_cache(upstream(registry), directory=tmp_path / "0", **WITHOUT_ASKING["Never"])
    assert (await ask(never, method, second)).status == 404
    cache = await start_cache(upstream(registry), directory=tmp_path / "1", **WITHOUT_ASKING["IfNotPresent"])
    assert registry.requests == []
    assert decision(await ask(cache, method, second)) == "miss"
    (request,) = registry.requests
    assert request.method == method
    assert set((request.headers.get("Accept") or "").split(", ")) == set(second.split(", "))


@pytest.mark.parametrize("is_up", [True, False], ids=["up", "away"])
async def test_the_image_of_one_platform_is_not_a_runtime_s_image(
    start_cache: StartCache, registry: ScriptedRegistry, is_up: bool
) -> None:
    """Who takes no manifest list is given the image of linux/amd64 out of it by docker-registry
    (``registry/handlers/manifests.go``): nobody else may get that in its place, for ever, and on another platform."""
    amd64, arm64 = (registry.add_image(REPO, None, [b"layer"], architecture=name) for name in ("amd64", "arm64"))
    old = registry.add_image(REPO, None, [b"layer"], media_type=DOCKER_MANIFEST)
    index = registry.add_index(REPO, "1", [amd64, arm64], DOCKER_LIST)

    def by_accept(request: Request) -> Answer:
        is_modern = DOCKER_LIST in (request.headers.get("Accept") or "")
        return registry.truth(request if is_modern else replace(request, target=manifest_path(old.digest)))

    registry.script("*", PATH, by_accept, forever=True)
    cache = await start_cache(upstream(registry), **WITHOUT_ASKING["IfNotPresent"])
    assert digest(await ask(cache, "GET", DOCKER_MANIFEST)) == old.digest
    if not is_up:
        await registry.stop()
        assert (await ask(cache, "GET", ALL)).status == 503
        return
    assert digest(await ask(cache, "GET", ALL)) == index.digest
    assert digest(await ask(cache, "GET", DOCKER_MANIFEST)) == old.digest


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("has_moved", [False, True], ids=["same", "moved"])
async def test_always_asks_by_one_head_for_what_the_client_takes(
    start_cache: StartCache, tmp_path: Path, registry: ScriptedRegistry, has_moved: bool, method: str
) -> None:
    """And what the upstream says is remembered for this client's kind, and for it alone."""
    held = await hold(tmp_path, registry, ALL, "image")
    now = registry.add_image(REPO, "1", [b"new"]).digest if has_moved else held
    cache = await start_cache(upstream(registry), directory=tmp_path)
    answer = await ask(cache, method, OCI)
    assert (answer.status, digest(answer)) == (200, now)
    assert decision(answer) == ("refreshed" if has_moved else "revalidated")
    head, *others = registry.requests
    assert (head.method, head.path, head.headers.get("Accept")) == ("HEAD", PATH, OCI)
    assert [(one.method, one.path) for one in others] == [("GET", manifest_path(now))] * (has_moved and method == "GET")
    assert (await ask(cache, "GET", OCI, manifest_path(now))).status == 200
    await registry.stop()
    for accept, served in ((OCI, now), (ALL, held)):
        answer = await ask(cache, "GET", accept)
        assert (decision(answer), digest(answer)) == ("stale", served)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_what_is_not_there_for_one_is_no_hit_for_it(
    start_cache: StartCache, tmp_path: Path, registry: ScriptedRegistry, method: str
) -> None:
    """``Always``: a 404 is asked for each time, and is of that kind of clients alone."""
    await hold(tmp_path, registry, ALL, "image")
    refusal = oci_error(404, "MANIFEST_UNKNOWN")
    registry.script(
        "*",
        PATH,
        lambda request: (
            perform(refusal, request, registry.truth) if request.headers.get("Accept") == OCI else registry.truth(request)
        ),
        forever=True,
    )
    cache = await start_cache(upstream(registry), directory=tmp_path)
    for _ in range(3):
        assert (await ask(cache, method, OCI)).status == 404
        assert decision(await ask(cache, method, ALL)) == "revalidated"
    assert len(registry.requests) == 6


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_tag_that_is_gone_is_served_on_for_its_grace(
    start_cache: StartCache, tmp_path: Path, registry: ScriptedRegistry, method: str
) -> None:
    await hold(tmp_path, registry, ALL, "image")
    registry.remove(REPO, "1")
    cache = await start_cache(upstream(registry), directory=tmp_path, deletedGrace="1h")
    for accept in (OCI, ALL):
        assert decision(await ask(cache, method, accept)) == "stale"


async def test_after_max_age_it_is_asked_for(start_cache: StartCache, tmp_path: Path, registry: ScriptedRegistry) -> None:
    """The age is that of the answer that the other client was given."""
    await hold(tmp_path, registry, ALL, "image")
    rule = {"match": "*", "policy": "IfNotPresent", "maxAge": "0s"}
    cache = await start_cache(
        upstream(registry), directory=tmp_path, alwaysPullImages=False, imagePullPolicy={"rules": [rule]}
    )
    assert decision(await ask(cache, "GET", OCI)) == "revalidated"
    assert [request.method for request in registry.requests] == ["HEAD"]


@pytest.mark.parametrize("policy", WITHOUT_ASKING)
async def test_a_right_is_proved_first(tmp_path: Path, private: PrivateRegistry, stock: Stock, policy: str) -> None:
    """What one client's own credential opened is given to nobody else, whatever he takes."""
    path = manifest_path("1", APP)
    async with started(tmp_path, with_access(private, "verify"), externalURL=EXTERNAL) as cache:
        assert (await cache.get(path, [*ALICE.headers, *taking(ALL)])).body == stock.app.data
    async with started(tmp_path, with_access(private, "verify"), externalURL=EXTERNAL, **WITHOUT_ASKING[policy]) as cache:
        for headers in (BOB.headers, []):
            answer = await cache.get(path, [*headers, *taking(OCI)])
            assert answer.status == (401 if policy == "IfNotPresent" else 404)
        if policy == "IfNotPresent":
            assert decision(await cache.get(path, [*ALICE.headers, *taking(OCI)])) == "hit"


async def test_what_one_pulls_all_are_served(cache: RunningCache, registry: ScriptedRegistry, image: Image) -> None:
    """In one life of a cache, too."""
    assert (await ask(cache, "GET", ALL)).status == 200
    await registry.stop()
    for accept in (OCI, OCI_MANIFEST, None, "*/*"):
        assert (await ask(cache, "GET", accept)).body == image.data
