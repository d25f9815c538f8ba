"""Found by attacking back-off, breaker and limits: nobody's request shuts out another's, and nothing outlives its time."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxy.credentials.credential import Credential
from tests.blackbox.oracle import LARGE, REPO, blob_of, blob_path, manifest_path
from tests.blackbox.private import (
    ALICE,
    APP,
    EXTERNAL,
    OPEN,
    PROXYS,
    Account,
    Clock,
    PrivateRegistry,
    Stock,
    fill,
    pull,
    until,
    with_access,
)
from tests.conftest import BACKOFF, UPSTREAM, StartCache, upstream
from tests.fakes.answers import (
    Step,
    before_headers,
    compose,
    cut,
    gate,
    oci_error,
    perform,
    status,
    too_many_requests,
    with_headers,
)
from tests.fakes.content import Image
from tests.fakes.messages import Answer, Request
from tests.fakes.registry import ScriptedRegistry

DOCKER = "application/vnd.docker.distribution.manifest.v2+json"


def gets(registry: ScriptedRegistry, tag: str = "1") -> int:
    """How often a tag was asked for."""
    return sum(request.path == manifest_path(tag) for request in registry.requests)


def where(registry: ScriptedRegistry, method: str, path: str, wanted: Callable[[Request], bool], step: Step) -> None:
    """Answers so to requests that are wanted; others have the truth."""

    def answer(request: Request) -> Answer:
        return perform(step, request, registry.truth) if wanted(request) else registry.truth(request)

    registry.script(method, path, answer, forever=True)


# --- one client's request is not another's ---


@pytest.mark.parametrize("is_held", [True, False], ids=["held", "absent"])
@pytest.mark.parametrize("code", [400, 404, 406, 500])
async def test_what_one_class_of_accept_is_refused_another_is_given(
    start_cache: StartCache, registry: ScriptedRegistry, image: Image, code: int, is_held: bool
) -> None:
    """docker-registry says 404 to who does not take what the tag points at ("accept header does not support OCI manifests",
    ``registry/handlers/manifests.go``)."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    if is_held:
        await cache.get(manifest_path("1"))
    refusal = oci_error(404, "MANIFEST_UNKNOWN") if code == 404 else status(code)
    where(registry, "*", manifest_path("1"), lambda request: request.headers.get("Accept") == DOCKER, refusal)
    for ask in (cache.get, cache.head):
        assert (await ask(manifest_path("1"), [("Accept", DOCKER)])).status >= 400
        answer = await ask(manifest_path("1"))
        assert (answer.status, answer.headers.get("Warning")) == (200, None)


async def test_what_a_client_says_that_it_came_through_is_its_own_concern(
    start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """An upstream that is a cache, too, refuses what seems to go in a circle; a client can write any ``Via``."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    long = [("Via", ", ".join(f"1.1 a{number}" for number in range(8)))]
    where(registry, "*", manifest_path("1"), lambda request: (request.headers.get("Via") or "").count(",") >= 8, status(508))
    assert (await cache.get(manifest_path("1"), long)).status == 502
    assert (await cache.get(manifest_path("1"))).status == 200


@pytest.mark.parametrize("how", ["list", "drop"])
async def test_nobody_is_refused_for_a_failure_that_the_first_probe_does_not_confirm(
    start_cache: StartCache, registry: ScriptedRegistry, image: Image, how: str
) -> None:
    """A reference at which the registry, or a firewall, hangs up: each time that a client asks for another one the upstream
    is probed, and meanwhile the others wait for what the probe says."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    registry.script("*", lambda request: "bad" in request.target, before_headers("rst"), forever=True)
    opened = asyncio.Event()
    probe = registry.script("GET", "/v2/", gate(opened))
    path = manifest_path("bad") if how == "drop" else f"/v2/{REPO}/tags/list?last=bad"
    assert (await cache.get(path)).status == 503
    await registry.wait_for(lambda: probe.used == 1)
    good = asyncio.create_task(cache.get(manifest_path("1")))
    await until(lambda: cache.metric("connections") == 1 or good.done())
    opened.set()
    assert (await good).status == 200


@pytest.mark.parametrize("how", ["silence", "drop", "error"])
@pytest.mark.parametrize("was_used", [True, False], ids=["used before", "just started"])
async def test_a_registry_that_is_silent_at_its_root_is_not_shut_out_by_one_reference(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image, how: str, was_used: bool
) -> None:
    """A firewall lets the paths of images through and nothing else: the probe asks for what was given before, and for what
    is wanted now."""
    faults: dict[str, Step] = {"silence": gate(asyncio.Event()), "drop": before_headers("rst"), "error": status(500)}
    cache = await start_cache(upstream(registry, timeouts={"connect": "1s", "headers": "2s", "head": "2s"}), **BACKOFF)
    registry.script("*", "/v2/", gate(asyncio.Event()), forever=True)
    registry.script("*", lambda request: "bad" in request.target, faults[how], forever=True)
    if was_used:
        assert (await cache.get(manifest_path("1"))).status == 200
    for number in range(4):
        asking = asyncio.create_task(cache.get(manifest_path(f"bad{number}")))
        while not asking.done():
            clock.advance(0.1)
            await asyncio.sleep(0.01)
        assert asking.result().status in (502, 503)
    other = registry.add_image(REPO, "other", [b"other"])

    async def given() -> bool:
        return (await cache.get(manifest_path("other"))).body == other.data

    async with asyncio.timeout(20):
        while not await given():
            clock.advance(0.5)
            await asyncio.sleep(0.01)


async def test_a_token_server_that_is_silent_where_nothing_is_wanted_shuts_nobody_out(
    clock: Clock, start_cache: StartCache
) -> None:
    """It answers who wants a token for a repository, and not the question without one."""
    async with PrivateRegistry("token") as private:
        fill(private)
        cache = await start_cache(upstream(private), **BACKOFF)
        private.script(
            "GET",
            lambda request: request.path == "/token" and "scope" not in request.params,
            before_headers("rst"),
            forever=True,
        )
        assert (await cache.get(manifest_path("1", OPEN))).status == 200
        where(private, "*", manifest_path("bad", OPEN), lambda _: True, before_headers("rst"))
        assert (await cache.get(manifest_path("bad", OPEN))).status == 503
        image = private.add_image(OPEN, "2", [b"other"])
        async with asyncio.timeout(10):
            while (await cache.get(manifest_path("2", OPEN))).body != image.data:
                clock.advance(0.5)
                await asyncio.sleep(0.01)


async def test_a_rate_limit_of_lists_is_none_of_pulls(
    start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """A client that lists tags until it is told to stop for an hour stops no pull."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    limited = registry.script("GET", f"/v2/{REPO}/tags/list", too_many_requests(3600), forever=True)
    for number in range(3):
        assert (await cache.get(f"/v2/{REPO}/tags/list?n={number + 1}")).status == 429
    assert limited.used == 1
    assert (await cache.get(manifest_path("1"))).status == 200
    assert (await cache.head(manifest_path("1"))).status == 200


async def test_who_wants_a_tag_confirmed_takes_it_from_nobody(
    start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """``IfNotPresent``: it is gone upstream, and is served as long as nobody has to ask; one client's ``no-cache`` changes
    nothing for the others."""
    cache = await start_cache(upstream(registry), alwaysPullImages=False, **BACKOFF)
    await cache.get(manifest_path("1"))
    registry.remove(REPO, "1")
    assert (await cache.get(manifest_path("1"), [("Cache-Control", "no-cache")])).status == 404
    assert (await cache.get(manifest_path("1"))).status == 200


# --- windows ---


@pytest.mark.parametrize("after", [None, 7])
async def test_a_burst_that_is_limited_is_one_failure(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, after: int | None
) -> None:
    """Many questions that were under way when the limit was reached: the window grows by one step."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    for number in range(6):
        registry.add_image(REPO, str(number), [b"layer"])
    opened = asyncio.Event()
    limited = registry.script(
        "*",
        lambda _: True,
        lambda request: perform(gate(opened), request, lambda _: too_many_requests(after)),
        forever=True,
    )
    burst = [asyncio.create_task(cache.get(manifest_path(str(number)))) for number in range(6)]
    await registry.wait_for(lambda: limited.used == 6)
    opened.set()
    assert {(await each).status for each in burst} == {429}
    limited.cancel()
    clock.advance(10)
    assert (await cache.get(manifest_path("0"))).status == 200


async def test_an_answer_that_was_under_way_ends_no_limit(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry
) -> None:
    """``Retry-After`` holds, though a question from before it is answered well."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    for number in range(3):
        registry.add_image(REPO, str(number), [b"layer"])
    opened = asyncio.Event()
    slow = registry.script("*", manifest_path("0"), gate(opened))
    first = asyncio.create_task(cache.get(manifest_path("0")))
    await registry.wait_for(lambda: slow.used == 1)
    registry.script("*", manifest_path("1"), too_many_requests(600))
    assert (await cache.get(manifest_path("1"))).status == 429
    opened.set()
    assert (await first).status == 200
    assert (await cache.get(manifest_path("2"))).status == 429


async def test_attempts_that_were_under_way_together_are_one_failure(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """Several clients ask for one tag in different seconds, before the first has its answer: the window is that of one."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    opened = asyncio.Event()
    failing = registry.script(
        "*", manifest_path("1"), lambda request: perform(gate(opened), request, lambda _: status(500)), forever=True
    )
    asking = []
    for number in range(5):
        asking.append(asyncio.create_task(cache.get(manifest_path("1"))))
        await registry.wait_for(lambda number=number: failing.used == number + 1)  # type: ignore[misc]
        clock.advance(1.5)
    opened.set()
    assert {(await each).status for each in asking} == {502}
    failing.cancel()
    await until(lambda: cache.metric("upstream_unavailable", upstream="registry.test") == 0)
    clock.advance(10)
    assert (await cache.get(manifest_path("1"))).status == 200


async def test_a_404_after_a_failure_is_remembered(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    cache = await start_cache(upstream(registry), **BACKOFF)
    registry.script("*", manifest_path("1"), status(500))
    assert (await cache.get(manifest_path("1"))).status == 502
    clock.advance(10)
    no = registry.script("*", manifest_path("1"), oci_error(404, "MANIFEST_UNKNOWN"), forever=True)
    for _ in range(5):
        assert (await cache.get(manifest_path("1"))).status == 404
    assert no.used == 1


async def test_who_asked_before_the_outage_was_over_leaves_no_window(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """Its answer never comes; meanwhile the registry is back: the next pull succeeds, whatever that one finds out."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    opened = asyncio.Event()
    silent = registry.script("*", lambda _: True, gate(opened), forever=True)
    late = asyncio.create_task(cache.get(manifest_path("1")))
    await registry.wait_for(lambda: silent.used == 1)
    first = asyncio.create_task(cache.head(manifest_path("2")))
    await registry.wait_for(lambda: silent.used == 2)
    clock.advance(3)
    assert (await first).status == 503
    await registry.wait_for(lambda: silent.used > 2)
    silent.cancel()
    clock.advance(5)
    await until(lambda: cache.metric("upstream_unavailable", upstream=UPSTREAM) == 0)
    clock.advance(8)
    assert (await late).status == 503
    assert (await cache.get(manifest_path("1"))).status == 200


async def test_the_question_that_goes_with_a_probe_is_not_spent_on_who_waits_for_a_window(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """A ``/v2/`` that never works, a reference that never does, and a registry that is well otherwise."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    registry.script("GET", "/v2/", status(500), forever=True)
    failing = registry.script("*", lambda request: "manifests" in request.path, status(500), forever=True)
    for number in range(6):
        await cache.get(manifest_path(f"x{number}"))
    failing.cancel()
    registry.script("*", manifest_path("x0"), status(500), forever=True)
    for _ in range(40):  # 8 s: a probe is in it, and no end of the window of x0
        await cache.get(manifest_path("x0"))
        if (answer := await cache.get(manifest_path("1"))).status == 200:
            break
        clock.advance(0.2)
    assert answer.status == 200


async def test_a_download_that_goes_on_is_held_up_by_no_limit(start_cache: StartCache, registry: ScriptedRegistry) -> None:
    """It has begun, and may be the last thing that is still given."""
    cache = await start_cache(upstream(registry), **BACKOFF)
    data = blob_of("goes on", LARGE)
    path = blob_path(registry.add_blob(REPO, data))
    opened = asyncio.Event()
    registry.script("GET", path, compose(gate(opened, after=LARGE // 2), cut(LARGE // 2, "rst")))
    stream = await cache.open(path)
    async with stream:
        begun = await stream.read_all(1000)
        registry.script("HEAD", manifest_path("x"), too_many_requests(600))
        assert (await cache.head(manifest_path("x"))).status == 429
        opened.set()
        assert begun + await stream.read_all() == data
        assert stream.clean_end


# --- mirrors ---


def mirrored(mirror: ScriptedRegistry, registry: ScriptedRegistry, **keys: Any) -> dict[str, Any]:
    """An upstream with a mirror before it."""
    return {
        "name": UPSTREAM,
        "endpoints": [mirror.url, registry.url],
        "allowAddresses": ["127.0.0.0/8"],
        **keys,
    }


def in_both(mirror: ScriptedRegistry, registry: ScriptedRegistry, tag: str) -> Image:
    """An image that both have."""
    registry.add_image(REPO, tag, [tag.encode()])
    return mirror.add_image(REPO, tag, [tag.encode()])


async def test_a_mirror_is_used_while_the_registry_cannot_say_who_may_read(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry
) -> None:
    """What was given before is still; that the question for the right failed says nothing of what a mirror has."""
    shared = {"mode": "shared", "iUnderstandThisIsShared": True}
    async with ScriptedRegistry() as mirror:
        _, new = (in_both(mirror, registry, tag) for tag in "12")
        cache = await start_cache(mirrored(mirror, registry, access=shared), **BACKOFF)
        assert (await cache.get(manifest_path("1"))).status == 200
        await registry.stop()
        clock.advance(301)
        answer = await cache.get(manifest_path("2"))
        assert (answer.status, answer.body) == (200, new.data)


async def test_a_mirror_is_used_while_lists_find_the_registry_dead(
    start_cache: StartCache, registry: ScriptedRegistry
) -> None:
    async with ScriptedRegistry() as mirror:
        new = in_both(mirror, registry, "1")
        cache = await start_cache(mirrored(mirror, registry), **BACKOFF)
        await registry.stop()
        for number in range(1, 5):
            assert (await cache.get(f"/v2/{REPO}/tags/list?n={number}")).status == 503
            assert (await cache.get(manifest_path("1"))).body == new.data


async def test_a_mirror_is_used_while_the_registry_limits(start_cache: StartCache, registry: ScriptedRegistry) -> None:
    async with ScriptedRegistry() as mirror:
        image = in_both(mirror, registry, "1")
        cache = await start_cache(mirrored(mirror, registry), **BACKOFF)
        limited = registry.script("*", lambda _: True, too_many_requests(600), forever=True)
        for number in range(5):
            assert (await cache.get(manifest_path(f"x{number}"))).status == 429
        assert limited.used == 1
        assert (await cache.get(manifest_path("1"))).body == image.data
        assert (await cache.get(blob_path(image.layer_digests[0]))).status == 200


# --- secrets ---


HELPER = """#!/bin/sh
read -r key
cat "{folder}/answer"
"""


@pytest.mark.parametrize("refusal", ["limit", "revoked", "500"])
async def test_a_secret_that_a_helper_gives_anew_is_used_at_once(
    clock: Clock,
    start_cache: StartCache,
    private: PrivateRegistry,
    stock: Stock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: str,
) -> None:
    """What the one before was refused, and however long its account is limited, is nothing to it."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def answers(account: Account) -> None:
        (folder / "answer").write_text(f'{{"Username": "{account.user}", "Secret": "{account.password}"}}')

    helper = folder / "docker-credential-x"
    helper.write_text(HELPER.format(folder=folder))
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    (tmp_path / "config.json").write_text(f'{{"credHelpers": {{"{UPSTREAM}": "x"}}}}')
    answers(PROXYS)
    cache = await start_cache(
        with_access(private, "shared"), imagePullSecrets=[{"file": str(tmp_path / "config.json")}], **BACKOFF
    )
    assert (await cache.get(manifest_path("1", OPEN))).status == 200
    if refusal == "revoked":
        private.passwords[PROXYS.user] = "another"
        private.given.clear()
    else:
        old = too_many_requests(3600) if refusal == "limit" else status(500)
        private.script("*", lambda request: private._user_of(request) == PROXYS.user, old, forever=True)
    clock.advance(239)
    await cache.get(manifest_path("1", LIB))
    await cache.get(manifest_path("1", LIB))
    answers(ALICE)
    clock.advance(2)
    await cache.head(manifest_path("1", LIB))  # finds that the credential is to be renewed
    async with asyncio.timeout(10):
        while not private.knows(ALICE.password):
            await asyncio.sleep(0.02)
            await cache.head(manifest_path("1", OPEN))
            await cache.get(manifest_path("1", LIB))
    assert (await cache.get(manifest_path("1", LIB))).status == 200


LIB = "team/lib"


@pytest.mark.parametrize("step", [too_many_requests(3600), status(500)], ids=["limit", "failure"])
async def test_a_clients_credential_is_not_kept_with_what_it_met(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock, step: Step
) -> None:
    """In memory for minutes, however long a window or a limit is remembered."""
    cache = await start_cache(with_access(private, "verify"), externalURL=EXTERNAL, **BACKOFF)
    await pull(cache, APP, stock.app, ALICE.headers)
    private.fault = step
    assert (await cache.head(manifest_path("absent", APP), ALICE.headers)).status >= 400
    private.fault = None
    for _ in range(6):
        clock.advance(60)
        await cache.get("/v2/")

    def is_forgotten() -> bool:
        gc.collect()
        return not [each for each in gc.get_objects() if isinstance(each, Credential) and each.password == ALICE.password]

    await until(is_forgotten, within=5)


async def test_t21_who_lost_his_right_cannot_keep_it_by_a_reference_at_which_the_line_breaks(
    clock: Clock, start_cache: StartCache, private: PrivateRegistry, stock: Stock
) -> None:
    """A firewall hangs up at what it does not like: that is no outage, in which an old yes would be stretched."""
    cache = await start_cache(with_access(private, "verify"), externalURL=EXTERNAL, **BACKOFF)
    await pull(cache, APP, stock.app, ALICE.headers)

    def fault(request: Request) -> Answer:
        if "bad" in request.path:
            return perform(before_headers("rst"), request, private.truth)
        return private._refusal(request) or private.truth(request)

    private.fault = fault
    private.withdraw(ALICE)
    clock.advance(400)
    for number in range(3):
        await cache.get(manifest_path(f"bad{number}", APP), ALICE.headers)
        assert (await cache.get(blob_path(stock.app.layer_digests[-1], APP), ALICE.headers)).status == 401


# --- stale ---


async def test_a_tag_that_came_back_has_its_grace_again(
    start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """It was fetched anew, not confirmed by HEAD."""
    cache = await start_cache(upstream(registry), deletedGrace="1s")
    await cache.get(manifest_path("1"))
    registry.remove(REPO, "1")
    async with asyncio.timeout(10):
        while (await cache.get(manifest_path("1"))).status == 200:
            await asyncio.sleep(0.05)
    registry.move_tag(REPO, "1", image.digest)
    assert (await cache.get(manifest_path("1"))).status == 200
    registry.remove(REPO, "1")
    assert (await cache.get(manifest_path("1"))).status == 200


async def test_a_registry_that_says_its_limit_is_for_ever_is_asked_again(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry, image: Image
) -> None:
    """No window is longer than a day."""
    rules = [{"match": "*", "policy": "IfNotPresent", "maxAge": "0s"}]
    cache = await start_cache(
        upstream(registry, rateLimitReserve=20), alwaysPullImages=False, imagePullPolicy={"rules": rules}, **BACKOFF
    )
    registry.script("*", manifest_path("1"), with_headers({"ratelimit-remaining": "0;w=999999999"}))
    await cache.get(manifest_path("1"))
    before = gets(registry)
    assert (await cache.get(manifest_path("1"))).status == 200
    assert gets(registry) == before
    clock.advance(86_401)
    assert (await cache.get(manifest_path("1"))).status == 200
    assert gets(registry) == before + 1
