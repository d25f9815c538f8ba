"""Who gets what from the cache, and what its registries hear of that: private images, and credentials of clients.

Each registry here records all that it receives, and gives a repository to whoever has the right to it, either by tokens
or by Basic.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import aiohttp
import pytest
import yaml

from tests.blackbox.helpers import message
from tests.blackbox.private import (
    ALICE,
    ANNE,
    APP,
    BOB,
    CONTENT,
    EXTERNAL,
    HERS,
    KINDS,
    LIB,
    OPEN,
    PARTS,
    PROXYS,
    SECRET_TEXTS,
    WRONG,
    Account,
    Clock,
    PrivateRegistry,
    Stock,
    assert_bare,
    bearer,
    body_of,
    challenges,
    fetch_from,
    fill,
    forms,
    found_on_disk,
    parts,
    pull,
    secret_for,
    started,
    statuses,
    token,
    until,
    values,
    with_access,
)
from tests.conftest import UPSTREAM, Pairs, RunningCache, StartCache, upstream
from tests.fakes.answers import Step, before_headers, compose, cut, gate, oci_error, redirect, status, too_many_requests
from tests.fakes.client import WireResponse, fetch
from tests.fakes.messages import Answer, Request
from tests.fakes.registry import ScriptedRegistry

ROOT = Path(__file__).parents[2]
QUICK = {"connect": "300ms", "headers": "300ms", "token": "300ms", "head": "300ms", "endpoint": "300ms"}
BASIC_CHALLENGE = 'Basic realm="pullcache"'


def bearer_challenge(scope: str = "", error: str = "") -> str:
    """What a client is told to do for a token."""
    more = (f',scope="{scope}"' if scope else "") + (f',error="{error}"' if error else "")
    return f'Bearer realm="{EXTERNAL}/token",service="pullcache"{more}'


@pytest.fixture(params=KINDS)
async def private(request: pytest.FixtureRequest) -> AsyncIterator[PrivateRegistry]:
    """A registry with private repositories, of either kind."""
    async with PrivateRegistry(request.param) as registry:
        yield registry


@pytest.fixture
async def by_token() -> AsyncIterator[PrivateRegistry]:
    """One with a token server, for tests in which the kind makes no difference."""
    async with PrivateRegistry("token") as registry:
        yield registry


@dataclass
class Verified:
    """A cache of ``access: verify`` before one private registry, which can be stopped and started again."""

    start: StartCache
    registry: PrivateRegistry

    async def __call__(self, directory: Path | None = None, **access: Any) -> RunningCache:
        sections = access.pop("sections", {})
        section = with_access(self.registry, access.pop("mode", "verify"), **access)
        return await self.start(section, directory=directory, externalURL=EXTERNAL, **sections)


@pytest.fixture
def verified(start_cache: StartCache, private: PrivateRegistry, stock: Stock) -> Verified:
    """Starts caches before ``private``."""
    return Verified(start_cache, private)


def all_of(code: int, only: tuple[str, ...] = PARTS) -> dict[str, int]:
    """The same status for every part."""
    return dict.fromkeys(only, code)


# --- T10: what a client shows goes nowhere it is not meant for ---

CANARIES: list[Pairs] = [
    ALICE.headers,
    bearer("c4n4ry-t0ken-aaaaaaaaaaaaaaaaaaaaaaaa"),
    [("Authorization", "Basic c4n4ry-t0ken-not-base64")],
    [("Authorization", "Digest username=c4n4ry-t0ken")],
    [("Authorization", "Bearer " + "c4n4ry-t0ken" * 900)],
]
OTHERS: Pairs = [
    ("Proxy-Authorization", "Basic c4n4ry-t0ken"),
    ("Cookie", "a=c4n4ry-t0ken"),
    ("X-Registry-Auth", "c4n4ry-t0ken"),
]
TEXTS = [*SECRET_TEXTS, "c4n4ry-t0ken"]


def assert_nowhere(text: str, answers: list[WireResponse], logged: str, figures: bytes, cache: RunningCache) -> None:
    """A secret is in no answer, line, figure or file."""
    for form in forms(text):
        for answer in answers:
            assert form not in answer.body
            assert all(form not in value.encode() for _, value in answer.headers)
        assert form.decode() not in logged
        assert form not in figures
    assert found_on_disk(cache.directory, text) == []


async def ask_in_every_way(cache: RunningCache, stock: Stock, *shown: Pairs) -> list[WireResponse]:
    """Misses, hits, what is absent, denied or malformed, HEAD and a part: what a client can ask for."""
    headers = itertools.cycle(shown)
    answers = []
    for repository, image in ((OPEN, stock.open), (APP, stock.app), (OPEN, stock.open)):
        for path in parts(repository, image).values():
            answers += [await cache.get(path, next(headers)), await cache.head(path, next(headers))]
            answers.append(await cache.get(path, [*next(headers), ("Range", "bytes=1-2")]))
    for path in (
        "/v2/",
        "/token?service=pullcache&scope=repository:open/app:pull",
        f"/v2/{OPEN}/manifests/absent",
        f"/v2/{OPEN}/blobs/sha256:{'0' * 64}",
        f"/v2/{OPEN}/blobs/sha256:short",
        "/v2/UPPER/manifests/1",
        "/v2/_catalog",
        "/elsewhere?access_token=c4n4ry-t0ken&password=c4n4ry-t0ken",
        f"/v2/{OPEN}/tags/list?n=c4n4ry-t0ken",
    ):
        answers.append(await cache.get(path, next(headers)))
    answers.append(await fetch(cache.host, cache.port, "DELETE", parts(OPEN, stock.open)["tag"], next(headers)))
    answers.append(await fetch(cache.host, cache.port, "GET", "/v2/", [*next(headers), ("Content-Length", "x")]))
    return answers


@pytest.mark.parametrize("mode", ["nothing", "public", "public-with-secret", "shared"])
async def test_t10_what_a_client_shows_unasked_is_neither_forwarded_nor_kept(
    verified: Verified, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str, stock: Stock
) -> None:
    caplog.set_level(logging.DEBUG)
    registry = verified.registry
    registry.passwords["alice"] = "another"  # even if it were right, it is not asked for
    secrets = [secret_for(tmp_path)] if mode in ("public-with-secret", "shared") else []
    section = upstream(registry) if mode == "nothing" else with_access(registry, mode.partition("-")[0])
    cache = await verified.start(section, imagePullSecrets=secrets)
    answers = await ask_in_every_way(cache, stock, *[canary + OTHERS for canary in CANARIES])
    registry.fault = status(503)
    answers += await ask_in_every_way(cache, stock, *[canary + OTHERS for canary in CANARIES])
    await cache.settled()
    assert {answer.status for answer in answers} >= {200, 206, 400, 404, 405}
    assert not any(answer.status == 401 for answer in answers), "T11: nobody asks for anything here"
    for text in ("c4n4ry-t0ken", ALICE.password, "al1ce-c4n4ry"):
        assert not registry.knows(text)
    assert registry.shown() <= {(PROXYS.user, PROXYS.password)}
    assert not any(request.headers.has("Cookie") for request in registry.requests)
    figures = (await cache_figures(cache)).body
    for text in TEXTS:
        assert_nowhere(text, answers, caplog.text, figures, cache)


async def cache_figures(cache: RunningCache) -> WireResponse:
    """What the admin listener shows."""
    return await fetch(cache.host, cache.admin_port, "GET", "/metrics")


async def test_t10_where_it_is_asked_for_a_credential_goes_to_its_registry_and_stays_nowhere(
    verified: Verified, stock: Stock, caplog: pytest.LogCaptureFixture
) -> None:
    """Hit, miss, refusal, failure and malformed requests, by Basic and by our token; the registry repeats what it hears."""
    caplog.set_level(logging.DEBUG)
    registry = verified.registry
    cache = await verified(section={"timeouts": QUICK})
    answers = []
    handle = await token(cache, ALICE, f"repository:{APP}:pull")
    for headers in ([ALICE.headers, bearer(handle)], [WRONG.headers, BOB.headers]):
        answers += await ask_in_every_way(cache, stock, *[each + OTHERS for each in headers])
    echo = [f"it was {ALICE.password}", f"and {ALICE.header}", *registry.given]
    for fault in (
        oci_error(403, "DENIED", " ".join(echo)),
        oci_error(404, "NAME_UNKNOWN", echo[0]),
        status(503, echo[0].encode()),
    ):
        registry.fault = fault
        answers += await ask_in_every_way(cache, stock, ALICE.headers + OTHERS)
    registry.fault = None
    assert any(answer.status == 200 and answer.body == stock.app.data for answer in answers)
    assert (ALICE.user, ALICE.password) in registry.shown(), "asked for, so shown"
    assert registry.shown() <= {(a.user, a.password) for a in (ALICE, BOB, WRONG)}
    assert not registry.knows("c4n4ry-t0ken")
    assert not registry.heard(handle), "our token is ours alone"
    figures = (await cache_figures(cache)).body
    for text in [*TEXTS, handle, *registry.given]:
        kept = [answer for answer in answers if not answer.body.startswith(b'{"token"')]
        assert_nowhere(text, kept, caplog.text, figures, cache)


@pytest.mark.parametrize("mode", ["verify", "shared"])
@pytest.mark.parametrize("code", [401, 403, 404, 429, 500])
async def test_t10_what_a_registry_repeats_of_a_credential_is_not_told_further(
    start_cache: StartCache,
    private: PrivateRegistry,
    stock: Stock,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    code: int,
) -> None:
    """In the text of its refusal: the password, the header as it came, or a token."""
    secrets = [secret_for(tmp_path)] if mode == "shared" else []
    cache = await start_cache(with_access(private, mode), imagePullSecrets=secrets, externalURL=EXTERNAL)
    account, path = ALICE if mode == "verify" else PROXYS, parts(APP, stock.app)["tags"]
    await pull(cache, APP, stock.app, account.headers)

    def echo(request: Request) -> Answer:
        shown = (request.headers.get("Authorization") or "").partition(" ")[2]
        return oci_error(code, "DENIED", f"not with '{shown}' and not with {account.password}")

    private.script("GET", path, echo, forever=True)
    answer = await cache.get(f"{path}?n=7", account.headers)
    assert answer.status >= 400
    assert "not with" in answer.body.decode(), "its text is told, for people"
    for text in (account.password, *private.given):
        assert_nowhere(text, [answer], caplog.text, b"", cache)


async def test_t10_a_credential_goes_to_no_other_upstream_and_to_no_mirror(start_cache: StartCache) -> None:
    """Two registries, one of them public here, and a mirror that would take anybody's password."""
    async with PrivateRegistry() as one, PrivateRegistry("basic") as other, PrivateRegistry("basic", "127.0.0.3") as mirror:
        stock, _, _ = fill(one), fill(other), fill(mirror)
        endpoints = [mirror.url, one.url]
        cache = await start_cache(
            with_access(one, "verify", section={"endpoints": endpoints, "allowAddresses": ["127.0.0.0/8"]}),
            with_access(other, "public", "public.test"),
            externalURL=EXTERNAL,
        )
        for headers in (ALICE.headers, bearer(await token(cache, ALICE))):
            await pull(cache, APP, stock.app, headers)
            await pull(cache, OPEN, stock.open, headers)
            assert await statuses(cache, f"public.test/{APP}", stock.app, headers) == all_of(403)
            await pull(cache, f"public.test/{OPEN}", stock.open, headers)
        assert one.shown() == {(ALICE.user, ALICE.password)}
        for registry in (other, mirror):
            assert registry.requests
            assert not registry.heard("Authorization")


async def test_t10_a_redirect_carries_no_credential_to_another_host(verified: Verified, stock: Stock) -> None:
    registry = verified.registry
    path = parts(APP, stock.app)["layer"]
    async with ScriptedRegistry() as storage:
        storage.add_blob(APP, stock.app.layers[-1])
        registry.script("*", path, redirect(f"{storage.url}{path}"), forever=True)
        cache = await verified(section={"allowAddresses": ["127.0.0.0/8"]})
        answer = await cache.get(path, ALICE.headers)
        assert (answer.status, answer.body) == (200, stock.app.layers[-1])
        assert storage.count("GET", path) == 1
        assert not storage.heard("Authorization")


# --- T11: an open listener looks at nothing ---


@pytest.mark.parametrize(
    "value",
    ["Basic Og==", "Basic", "Basic %%%", "Bearer", "Bearer a b", "", "Negotiate x", WRONG.header, "Bearer " + "a" * 12_000],
)
async def test_t11_an_unexpected_authorization_changes_nothing(verified: Verified, stock: Stock, value: str) -> None:
    cache = await verified(mode="public")
    headers = [("Authorization", value)]
    for _ in range(2):
        await pull(cache, OPEN, stock.open, headers)
        assert (await cache.get("/v2/", headers)).status == 200
    assert await statuses(cache, APP, stock.app, headers) == all_of(403)
    assert not any(
        request.headers.has("Authorization") for request in verified.registry.requests if request.path == "/token"
    )
    if verified.registry.kind == "basic":
        assert not verified.registry.heard("Authorization")


# --- T19: a name that means another server ---


@pytest.mark.parametrize("mode", ["public", "verify", "shared"])
@pytest.mark.parametrize("new", ["empty", "refuses", "fails", "gone", "has-it"])
async def test_t19_another_server_under_the_same_name_inherits_nothing(tmp_path: Path, mode: str, new: str) -> None:
    """No tag of the old one, and no content of it, without the new one's yes; with it, only what is private comes again."""
    repository = OPEN if mode == "public" else APP
    headers = ALICE.headers if mode == "verify" else []
    sections = {"imagePullSecrets": [] if mode == "verify" else [secret_for(tmp_path)]}
    async with PrivateRegistry() as old, PrivateRegistry() as other:
        stock, _ = fill(old), fill(other)
        wanted = stock.open if mode == "public" else stock.app
        async with started(tmp_path / "cache", with_access(old, mode), **sections) as cache:
            await pull(cache, repository, wanted, headers)
        match new:
            case "empty":
                other.remove(repository)
            case "refuses":
                other.public.clear()
                other.rights.clear()
            case "fails":
                other.fault = status(503)
            case "gone":
                await other.stop()
        questions = len(old.requests)
        async with started(tmp_path / "cache", with_access(other, mode, section={"timeouts": QUICK}), **sections) as cache:
            if new == "has-it":
                await pull(cache, repository, wanted, headers)
                for part in ("config", "layer"):
                    once = 0 if mode == "public" else 1
                    assert other.brought(parts(repository, wanted)[part]) == once, "what is private has to be shown once"
            else:
                found = await statuses(cache, repository, wanted, headers)
                expected = {"empty": {404}, "refuses": {401, 403}, "fails": {429, 502, 503}, "gone": {503}}[new]
                assert set(found.values()) <= expected
        assert len(old.requests) == questions, "nobody asks the old one"


@pytest.mark.parametrize("mode", ["public", "verify"])
async def test_t19_mirrors_in_another_order_keep_what_is_held(tmp_path: Path, mode: str) -> None:
    """The registry is the last of ``endpoints``: only another one there is another server."""
    async with (
        PrivateRegistry() as registry,
        PrivateRegistry(host="127.0.0.3") as one,
        PrivateRegistry(host="127.0.0.4") as two,
    ):
        stock, _, _ = fill(registry), fill(one), fill(two)
        repository, image, headers = (APP, stock.app, ALICE.headers) if mode == "verify" else (OPEN, stock.open, [])
        held = {parts(repository, image)[part] for part in ("digest", "config", "layer")}
        questions = 0
        for mirrors in ([one, two], [two, one], [two], []):
            endpoints = [each.url for each in (*mirrors, registry)]
            section = {"endpoints": endpoints, "allowAddresses": ["127.0.0.0/8"], "timeouts": QUICK}
            async with started(tmp_path / "cache", with_access(registry, mode, section=section)) as cache:
                await pull(cache, repository, image, headers)
                await cache.settled()
            asked = [request for each in (registry, one, two) for request in each.requests if request.path in held]
            assert questions in (0, len(asked)), "nobody is asked for it again"
            questions = len(asked)
        if mode == "public":
            for each in (registry, one, two):
                await each.stop()
            section["endpoints"] = [one.url, registry.url]
            async with started(tmp_path / "cache", with_access(registry, mode, section=section)) as cache:
                stale = await cache.get(parts(repository, image)["tag"])
                assert (stale.status, stale.headers.has("Warning")) == (200, True)


# --- T20: what is private does not leak through another repository ---

ATTACKERS = {"nobody": [], "another-user": BOB.headers, "wrong-password": WRONG.headers, "unknown-token": bearer("x" * 43)}
THROUGH = {
    "its-own": APP,
    "hers": HERS,
    "public": OPEN,
    "made-up": "no/such/repository",
    "other-upstream": f"public.test/{OPEN}",
    "other-upstream-hers": f"public.test/{HERS}",
    "other-upstream-its-name": f"public.test/{APP}",
    "other-upstream-made-up": "public.test/no/such",
}


def digests_of(stock: Stock) -> dict[str, str]:
    """The private image's parts, as paths below a repository."""
    return {
        part: path.partition(f"/v2/{APP}/")[2] for part, path in parts(APP, stock.app).items() if part not in ("tag", "tags")
    }


async def attack(cache: RunningCache, stock: Stock, attackers: tuple[str, ...] = tuple(ATTACKERS)) -> None:
    """Everybody who has no right asks for each part through each repository; none gets anything."""
    for attacker in attackers:
        for way, repository in THROUGH.items():
            for part, below in digests_of(stock).items():
                for method in ("GET", "HEAD"):
                    path = f"/v2/{repository}/{below}"
                    answer = await fetch(cache.host, cache.port, method, path, ATTACKERS[attacker])
                    if part == "referrers" and answer.status == 200:
                        assert way != "its-own"
                        assert method == "HEAD" or json.loads(answer.body)["manifests"] == []
                        continue
                    assert answer.status in (401, 403, 404), (attacker, way, part, method, answer.status)
                    assert_bare(answer, stock.app)
        for part in ("tag", "tags"):
            answer = await cache.get(parts(APP, stock.app)[part], ATTACKERS[attacker])
            assert answer.status in (401, 403), (attacker, part)
            assert_bare(answer, stock.app)


@pytest.fixture
async def elsewhere() -> AsyncIterator[ScriptedRegistry]:
    """Another upstream, public, on which the attacker has a repository that names the private image's parts, too."""
    async with ScriptedRegistry() as registry:
        yield registry


def settle_elsewhere(elsewhere: ScriptedRegistry, stock: Stock) -> None:
    """What the attacker has put there."""
    elsewhere.add_image(OPEN, "1", [b"public elsewhere"])
    elsewhere.add_manifest(HERS, stock.hers.data, stock.hers.media_type, "1")


async def prepare(cache: RunningCache, stock: Stock) -> None:
    """What an attacker does before: her own manifests, which name what she may not read, are in the cache."""
    for repository in (HERS, f"public.test/{HERS}"):
        assert (await cache.get(f"/v2/{repository}/manifests/1")).status == 200
    assert (await cache.get(f"/v2/{HERS}/manifests/index")).status == 200


@pytest.mark.parametrize("before", [True, False], ids=["her-manifest-first", "her-manifest-after"])
@pytest.mark.parametrize("mode", ["verify", "public"])
async def test_t20_a_private_image_leaks_through_no_repository(
    tmp_path: Path, private: PrivateRegistry, stock: Stock, elsewhere: ScriptedRegistry, before: bool, mode: str
) -> None:
    """Cached by one who may; then by nobody, by others, after a restart, with a lost catalog, and with another ``access``.

    ``public`` here: the private image came while the upstream was ``shared``.
    """
    settle_elsewhere(elsewhere, stock)
    other = with_access(elsewhere, "public", "public.test")
    secrets = {"imagePullSecrets": [secret_for(tmp_path)]} if mode == "public" else {}
    owner = ALICE.headers if mode == "verify" else []
    first = "verify" if mode == "verify" else "shared"
    directory = tmp_path / "cache"
    async with started(directory, with_access(private, first), other, **secrets) as cache:
        if before:
            await prepare(cache, stock)
        await pull(cache, APP, stock.app, owner)
        if not before:
            await prepare(cache, stock)
        if mode == "verify":
            await attack(cache, stock)
    private.refusals.clear()
    upstreams = (with_access(private, mode), other)
    attackers = tuple(ATTACKERS) if mode == "verify" else ("nobody",)
    for _ in range(2):
        async with started(directory, *upstreams) as cache:
            await attack(cache, stock, attackers)
            if mode == "verify":
                await pull(cache, APP, stock.app, ALICE.headers)
    for name in ("cache.db", "cache.db-wal", "cache.db-shm"):
        (directory / name).unlink(missing_ok=True)
    async with started(directory, *upstreams) as cache:
        await attack(cache, stock, attackers)
        await prepare(cache, stock)
        await attack(cache, stock, attackers)
    assert not elsewhere.heard("Authorization")


@pytest.mark.parametrize("mode", ["verify", "shared"])
async def test_t20_what_was_private_and_then_public_here_is_asked_for_anew(
    tmp_path: Path, private: PrivateRegistry, stock: Stock, mode: str
) -> None:
    """The upstream's ``access`` changed; with the registry down there is no yes, so there is nothing."""
    directory, owner = tmp_path / "cache", ALICE.headers if mode == "verify" else []
    secrets = [] if mode == "verify" else [secret_for(tmp_path)]
    async with started(directory, with_access(private, mode), imagePullSecrets=secrets) as cache:
        await pull(cache, APP, stock.app, owner)
    private.fault = status(503)
    async with started(directory, with_access(private, "public", section={"timeouts": QUICK})) as cache:
        for headers in ATTACKERS.values():
            found = await statuses(cache, APP, stock.app, headers)
            assert set(found.values()) <= {502, 503}


@pytest.mark.parametrize("part", ["digest", "layer", "config"])
@pytest.mark.parametrize("way", ["its-own", "hers", "other-upstream-hers", "made-up"])
async def test_t20_nor_while_it_is_in_flight(
    start_cache: StartCache, private: PrivateRegistry, stock: Stock, elsewhere: ScriptedRegistry, part: str, way: str
) -> None:
    settle_elsewhere(elsewhere, stock)
    cache = await start_cache(
        with_access(private, "verify"), with_access(elsewhere, "public", "public.test"), externalURL=EXTERNAL
    )
    await prepare(cache, stock)
    assert (await cache.get(parts(APP, stock.app)["tags"], ALICE.headers)).status == 200
    path, held = parts(APP, stock.app)[part], asyncio.Event()
    private.script("GET", path, gate(held, after=10))
    async with asyncio.TaskGroup() as group:
        owner = group.create_task(cache.get(path, ALICE.headers))
        await private.wait_for(lambda: private.count("GET", path))
        if part != "digest":
            await until(lambda: cache.metric("fills_in_flight") == 1)
        below = digests_of(stock)[part]
        for headers in ATTACKERS.values():
            answer = await cache.get(f"/v2/{THROUGH[way]}/{below}", headers)
            assert answer.status in (401, 403, 404)
            assert_bare(answer, stock.app)
        held.set()
    assert (owner.result().status, owner.result().body) == (200, body_of(stock.app, part))


async def test_t20_a_user_with_another_right_learns_nothing_of_what_he_lacks(verified: Verified, stock: Stock) -> None:
    """Bob may read ``team/lib``: neither that right nor a digest that he knows opens ``team/app``."""
    cache = await verified()
    await pull(cache, APP, stock.app, ALICE.headers)
    await pull(cache, LIB, stock.lib, BOB.headers)
    assert await statuses(cache, APP, stock.app, BOB.headers) == all_of(401)
    for part, below in digests_of(stock).items():
        answer = await cache.get(f"/v2/{LIB}/{below}", BOB.headers)
        if part != "referrers":
            assert answer.status == 404
            assert_bare(answer, stock.app)
        else:
            assert json.loads(answer.body)["manifests"] == []


# --- T21: a right that is withdrawn ---


@pytest.mark.parametrize("found_by", ["tag", "digest", "layer", "tags"])
@pytest.mark.parametrize("refusal", ["withdrawn", "401", "403", "account-gone"])
async def test_t21_a_refusal_of_the_registry_ends_it_for_every_part(
    clock: Clock, verified: Verified, stock: Stock, found_by: str, refusal: str
) -> None:
    """Whichever part it is found out by, within ``maxAge``; and what was given again soon counts again."""
    registry = verified.registry
    cache = await verified(maxAge="5m")
    await pull(cache, APP, stock.app, ALICE.headers)
    match refusal:
        case "withdrawn":
            registry.withdraw(ALICE)
        case "account-gone":
            del registry.passwords["alice"]
            registry.given.clear()
        case code:
            registry.fault = oci_error(int(code), "DENIED" if code == "403" else "UNAUTHORIZED")
    clock.advance(301)
    first = await cache.get(parts(APP, stock.app)[found_by], ALICE.headers)
    assert first.status == 401
    assert_bare(first, stock.app)
    questions = len(registry.requests)
    assert await statuses(cache, APP, stock.app, ALICE.headers) == all_of(401)
    assert len(registry.requests) - questions <= 2, "it is remembered"
    registry.allow(ALICE, APP)
    registry.fault = None
    clock.advance(61)
    await pull(cache, APP, stock.app, ALICE.headers)


@pytest.mark.parametrize("found_by", ["tag", "tags"])
async def test_t21_what_is_asked_each_time_finds_it_at_once(verified: Verified, stock: Stock, found_by: str) -> None:
    """Within ``maxAge``: tags and their list are asked for each time, and their refusal holds for all."""
    cache = await verified(maxAge="1h")
    await pull(cache, APP, stock.app, ALICE.headers)
    await pull(cache, APP, stock.app, ANNE.headers)
    verified.registry.withdraw(ALICE)
    await asyncio.sleep(0)
    assert (await cache.get(parts(APP, stock.app)["layer"], ALICE.headers)).status == 200, "nobody was asked yet"
    await _past_joining(cache)
    assert (await cache.get(parts(APP, stock.app)[found_by], ALICE.headers)).status == 401
    assert await statuses(cache, APP, stock.app, ALICE.headers) == all_of(401)
    await pull(cache, APP, stock.app, ANNE.headers)


async def _past_joining(cache: RunningCache) -> None:
    """Questions that began are over: the next is a new one."""
    await cache.settled()


@pytest.mark.parametrize("mode", ["public", "public-with-secret", "shared"])
@pytest.mark.parametrize("found_by", ["tag", "digest", "layer", "tags"])
async def test_t21_so_for_what_everybody_may_and_for_what_our_secret_opens(
    clock: Clock, verified: Verified, stock: Stock, tmp_path: Path, mode: str, found_by: str
) -> None:
    registry = verified.registry
    repository, image = (APP, stock.app) if mode == "shared" else (OPEN, stock.open)
    secrets = [] if mode == "public" else [secret_for(tmp_path)]
    registry.allow(PROXYS, OPEN)
    cache = await verified(mode=mode.partition("-")[0], publicFor="5m", sections={"imagePullSecrets": secrets})
    await pull(cache, repository, image)
    registry.public.discard(OPEN)
    registry.withdraw(PROXYS)
    clock.advance(3700)  # longer than any token lives here
    finds_out = found_by in ("tag", "tags") if mode == "public" else True
    answer = await cache.get(parts(repository, image)[found_by])
    if not finds_out:  # what is held and was given to everybody is asked for again with its tag
        assert answer.status == 200
        answer = await cache.get(parts(repository, image)["tag"])
    assert answer.status == 403
    assert await statuses(cache, repository, image) == all_of(403)


FAILURES: dict[str, Step] = {
    "503": status(503),
    "500": status(500, b"oops"),
    "stall": before_headers("stall"),
    "reset": before_headers("rst"),
    "403-page": status(403, b"<html>blocked</html>", "text/html"),
    "401-page": status(401, b"<html>log in</html>", "text/html"),
    "200-page": status(200, b"<html>log in</html>", "text/html"),
    "429": too_many_requests(5),
}


CASES = [
    (mode, failure)
    for mode in ("verify", "shared", "public-with-secret")
    for failure in (*FAILURES, "token-server-500", "token-server-page", "token-server-stalls", "stopped")
    if (mode, failure) != ("verify", "token-server-page")  # see test_access_mended
]


@pytest.mark.parametrize(("mode", "failure"), CASES)
async def test_t21_what_is_no_refusal_of_the_registry_ends_nothing(
    clock: Clock, by_token: PrivateRegistry, start_cache: StartCache, tmp_path: Path, mode: str, failure: str
) -> None:
    """After ``maxAge``: what is held is served, the tag with a ``Warning``; and no right is gone when it is back."""
    stock = fill(by_token)
    repository, image = (OPEN, stock.open) if mode == "public-with-secret" else (APP, stock.app)
    headers = ALICE.headers if mode == "verify" else []
    secrets = [] if mode == "verify" else [secret_for(tmp_path)]
    section = with_access(by_token, mode.partition("-")[0], publicFor="5m", section={"timeouts": QUICK})
    cache = await start_cache(section, imagePullSecrets=secrets, externalURL=EXTERNAL)
    await pull(cache, repository, image, headers)
    if failure in FAILURES:
        by_token.fault = FAILURES[failure]
    elif failure == "stopped":
        await by_token.stop()
    else:
        by_token.given.clear()
        page = status(403, b"<html>", "text/html")
        faults: dict[str, Step] = {"500": status(500), "page": page, "stalls": before_headers("stall")}
        by_token.token_fault = faults[failure.rpartition("-")[2]]
    clock.advance(400)
    for part in ("digest", "layer", "config", "tag"):
        answer = await cache.get(parts(repository, image)[part], headers)
        assert (part, answer.status, answer.body) == (part, 200, body_of(image, part))
        assert answer.headers.has("Warning") == (part == "tag")
    by_token.fault = by_token.token_fault = None
    if failure == "stopped":
        await by_token.start()
    clock.advance(400)
    await pull(cache, repository, image, headers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fresh", [False, True], ids=["after-a-yes", "after-a-restart"])
async def test_t21_that_our_own_secret_is_refused_takes_nothing_from_clients(
    clock: Clock, tmp_path: Path, kind: Any, fresh: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A password that has run out is the operator's trouble: what is held is served, and the log says which it was."""
    secrets = {"imagePullSecrets": [secret_for(tmp_path)]}
    async with PrivateRegistry(kind) as registry:
        stock = fill(registry)
        async with started(tmp_path / "cache", with_access(registry, "shared"), **secrets) as cache:
            await pull(cache, APP, stock.app)
            registry.passwords[PROXYS.user] = "changed"
            registry.given.clear()
            if not fresh:
                clock.advance(400)
                await _held_is_served(cache, stock)
        if fresh:
            async with started(tmp_path / "cache", with_access(registry, "shared"), **secrets) as cache:
                await _held_is_served(cache, stock)
    assert "password-cache" in caplog.text
    assert PROXYS.password not in caplog.text


async def _held_is_served(cache: RunningCache, stock: Stock) -> None:
    for part in CONTENT:
        answer = await cache.get(parts(APP, stock.app)[part])
        assert (part, answer.status, answer.body) == (part, 200, body_of(stock.app, part))
        assert answer.headers.has("Warning") == (part == "tag")


async def test_t21_the_storage_behind_a_redirect_withdraws_nothing(clock: Clock, verified: Verified, stock: Stock) -> None:
    """A signed URL that has run out is refused by another host, in the words of a registry or not."""
    registry, cache = verified.registry, await verified()
    await pull(cache, APP, stock.app, ALICE.headers)
    async with ScriptedRegistry() as storage:
        storage.script("*", lambda _: True, oci_error(403, "DENIED"), forever=True)
        other = registry.add_blob(APP, b"another private layer")
        path = f"/v2/{APP}/blobs/{other}"
        registry.script("*", path, redirect(f"{storage.url}{path}"), forever=True)
        assert (await cache.get(path, ALICE.headers)).status == 502
        assert storage.requests
    for part in ("layer", "digest"):
        questions = len(registry.requests)
        assert (await cache.get(parts(APP, stock.app)[part], ALICE.headers)).status == 200
        assert len(registry.requests) == questions


# --- T22: starts that are refused ---

REGISTRY = {"name": "registry.corp", "endpoints": ["https://registry.corp"]}
OUTSIDE = "0.0.0.0:0"
FRONT = {"tlsTerminatedInFront": True}


def upstream_with(access: Any = None, **more: Any) -> list[dict[str, Any]]:
    """One upstream of that access."""
    return [REGISTRY | ({"access": access} if access is not None else {}) | more]


REFUSED_STARTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "secret-without-access": (
        {"upstreams": upstream_with(), "imagePullSecrets": ["SECRET"]},
        ["upstreams[0].access", "registry.corp", "public", "verify", "shared"],
    ),
    "shared-on-an-open-listener": (
        {"upstreams": upstream_with("shared"), "imagePullSecrets": ["SECRET"]},
        ["upstreams[0].access", "iUnderstandThisIsShared", "htpasswdFile", "repositories"],
    ),
    "shared-without-a-secret-too": ({"upstreams": upstream_with("shared")}, ["upstreams[0].access"]),
    "shared-behind-a-front": ({"upstreams": upstream_with("shared"), "listener": FRONT}, ["upstreams[0].access"]),
    "verify-without-externalURL": ({"upstreams": upstream_with("verify")}, ["externalURL"]),
    "verify-without-TLS": (
        {"upstreams": upstream_with("verify"), "listen": OUTSIDE, "externalURL": EXTERNAL},
        ["listen", "tlsCertFile", "tlsTerminatedInFront", "verify"],
    ),
    "htpasswd-without-TLS": (
        {"upstreams": upstream_with(), "listen": OUTSIDE, "listener": {"htpasswdFile": "HTPASSWD"}},
        ["listen", "tlsCertFile", "htpasswdFile"],
    ),
    "htpasswd-and-verify": (
        {"upstreams": upstream_with("verify"), "externalURL": EXTERNAL, "listener": {"htpasswdFile": "HTPASSWD"}},
        ["listener.htpasswdFile", "verify", "clientCAFile"],
    ),
    "admin-outside": ({"upstreams": upstream_with(), "admin": OUTSIDE}, ["admin", "tokenFile", "clientCAFile"]),
    "users-without-anybody": (
        {"upstreams": upstream_with(), "listener": {"users": {"a": ["*"]}}},
        ["users", "htpasswdFile"],
    ),
    "public-with-shared-keys": (
        {"upstreams": upstream_with({"mode": "public", "iUnderstandThisIsShared": True})},
        ["upstreams[0].access", "mode: shared"],
    ),
    "an-unknown-mode": ({"upstreams": upstream_with("private")}, ["upstreams[0].access", "verify"]),
    "several-at-once": (
        {"upstreams": upstream_with("verify"), "listen": OUTSIDE, "admin": "0.0.0.0:1"},
        ["externalURL", "listen", "admin"],
    ),
    "a-key-without-a-certificate": ({"upstreams": upstream_with(), "listener": {"tlsKeyFile": "HTPASSWD"}}, ["tlsCertFile"]),
    "a-certificate-that-is-none": (
        {"upstreams": upstream_with(), "listener": {"tlsCertFile": "HTPASSWD"}},
        ["listener.tlsCertFile", "htpasswd"],
    ),
    "users-that-are-none": (
        {"upstreams": upstream_with(), "listener": {"htpasswdFile": "SECRET-FILE"}},
        ["listener.htpasswdFile", "line 1", "htpasswd -B"],
    ),
    "an-admin-token-too-short": (
        {"upstreams": upstream_with(), "adminListener": {"tokenFile": "SHORT"}},
        ["adminListener.tokenFile", "16"],
    ),
}
STARTS: dict[str, dict[str, Any]] = {
    "public-with-a-secret": {"upstreams": upstream_with("public"), "imagePullSecrets": ["SECRET"]},
    "a-secret-for-another-registry": {"upstreams": upstream_with(name="elsewhere.corp"), "imagePullSecrets": ["SECRET"]},
    "shared-and-meant": {"upstreams": upstream_with({"mode": "shared", "iUnderstandThisIsShared": True}), "listen": OUTSIDE},
    "shared-for-some": {"upstreams": upstream_with({"mode": "shared", "repositories": ["registry.corp/base/*"]})},
    "shared-with-users": {"upstreams": upstream_with("shared"), "listener": {"htpasswdFile": "HTPASSWD"}},
    "verify-on-loopback": {"upstreams": upstream_with("verify"), "externalURL": EXTERNAL},
    "verify-behind-a-front": {
        "upstreams": upstream_with("verify"),
        "externalURL": EXTERNAL,
        "listen": OUTSIDE,
        "listener": FRONT,
    },
    "admin-outside-with-a-token": {
        "upstreams": upstream_with(),
        "admin": OUTSIDE,
        "adminListener": {"tokenFile": "SECRET-FILE"},
    },
}


async def serve(config: dict[str, Any], folder: Path) -> tuple[int | None, str]:
    """What the real command does with a configuration: its exit code, None if it serves, and what it said."""
    (folder / "secret").write_text(PROXYS.password)
    (folder / "short").write_text("pr0xy")
    (folder / "htpasswd").write_text(f"user:$2b$04${'.' * 21}O{'a' * 31}\n")
    secret = {"registry": "registry.corp", "username": "cache", "passwordFile": str(folder / "secret")}
    names = {"HTPASSWD": "htpasswd", "SECRET-FILE": "secret", "SHORT": "short"}

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        return secret if value == "SECRET" else str(folder / names[value]) if value in names else value

    text = yaml.safe_dump(
        {"listen": "127.0.0.1:0", "admin": "127.0.0.1:0", "cache": {"directory": str(folder / "cache")}} | filled(config)
    )
    (folder / "config.yaml").write_text(text)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "serve", "--config", str(folder / "config.yaml")),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    said = b""
    try:
        async with asyncio.timeout(60):
            while line := await process.stdout.readline():
                said += line
                if b"serving on" in line:
                    return None, said.decode()
            return await process.wait(), said.decode()
    finally:
        if process.returncode is None:
            process.terminate()
        await process.communicate()


@pytest.mark.parametrize("case", REFUSED_STARTS)
async def test_t22_a_start_that_would_give_away_too_much_is_refused(tmp_path: Path, case: str) -> None:
    config, words = REFUSED_STARTS[case]
    code, said = await serve(config, tmp_path)
    assert code == 2, said
    assert [word for word in words if word not in said] == []
    assert "Traceback" not in said
    assert PROXYS.password not in said
    assert "$2b$" not in said


@pytest.mark.parametrize("case", STARTS)
async def test_t22_and_one_that_says_what_it_means_is_not(tmp_path: Path, case: str) -> None:
    code, said = await serve(STARTS[case], tmp_path)
    assert code is None, said


# --- verify: what each pull costs, and how long a yes holds ---


async def test_anonymous_is_tried_first_and_its_refusal_remembered(clock: Clock, verified: Verified, stock: Stock) -> None:
    """A pull costs one refusal, those of the next minute none."""
    registry, cache = verified.registry, await verified()
    await pull(cache, APP, stock.app, ALICE.headers)
    asked = registry.requests[0]
    assert not asked.headers.has("Authorization"), "anonymous first"
    assert len(registry.refusals) <= 2, "without a token, and with the one that anybody is given"
    tokens = [request for request in registry.requests if request.path == "/token"]
    assert len(tokens) == (2 if registry.kind == "token" else 0), "one for anybody, one for Alice"
    before = len(registry.refusals)
    clock.advance(30)
    for account in (ALICE, ANNE):
        await pull(cache, APP, stock.app, account.headers)
    assert len(registry.refusals) == before


async def test_a_public_repository_of_the_same_registry_is_served_to_all(verified: Verified, stock: Stock) -> None:
    """Also to those who show a wrong credential, which the registry does not hear then."""
    registry, cache = verified.registry, await verified()
    for headers in ATTACKERS.values():
        if headers and "Bearer" in headers[0][1]:
            continue
        await pull(cache, OPEN, stock.open, headers)
    await pull(cache, OPEN, stock.open, bearer(await token(cache, None)))
    await pull(cache, OPEN, stock.open, bearer(await token(cache, WRONG)))
    assert registry.shown() == set()
    assert all(registry.brought(parts(OPEN, stock.open)[part]) == 1 for part in ("config", "layer"))
    await pull(cache, APP, stock.app, ALICE.headers)
    assert await statuses(cache, APP, stock.app) == all_of(401)


async def test_a_yes_is_for_one_credential_and_one_repository(verified: Verified, stock: Stock) -> None:
    registry, cache = verified.registry, await verified()
    await pull(cache, APP, stock.app, ALICE.headers)
    for account in (Account("alice", ALICE.password + "x"), Account("alicf", ALICE.password), Account("", ALICE.password)):
        assert await statuses(cache, APP, stock.app, account.headers, CONTENT) == all_of(401, CONTENT)
        assert (account.user, account.password) in registry.shown(), "it was the registry that said no"
    before = len(registry.requests)
    assert (await cache.get(parts(LIB, stock.lib)["config"], ALICE.headers)).status == 200
    assert len(registry.requests) > before, "another repository is another question"


async def test_a_yes_is_for_one_upstream(start_cache: StartCache) -> None:
    """The same user and password at two registries are two questions."""
    async with PrivateRegistry() as one, PrivateRegistry("basic") as two:
        stock, _ = fill(one), fill(two)
        two.passwords["alice"] = "another"
        cache = await start_cache(with_access(one, "verify"), with_access(two, "verify", "two.test"), externalURL=EXTERNAL)
        await pull(cache, APP, stock.app, ALICE.headers)
        assert await statuses(cache, f"two.test/{APP}", stock.app, ALICE.headers) == all_of(401)
        assert two.shown() == {(ALICE.user, ALICE.password)}
        await pull(cache, APP, stock.app, ALICE.headers)


async def test_a_yes_holds_for_max_age_and_is_then_asked_for_again(clock: Clock, verified: Verified, stock: Stock) -> None:
    registry, cache = verified.registry, await verified(maxAge="10m")
    await pull(cache, APP, stock.app, ALICE.headers)
    path = parts(APP, stock.app)["layer"]
    await cache.settled()  # a blob that is not held yet proves nothing
    for seconds, asks in ((570, False), (31, True), (570, False), (31, True)):  # the true time goes on, too
        clock.advance(seconds)
        before = registry.attempts()
        assert (await cache.get(path, ALICE.headers)).status == 200
        assert (registry.attempts() > before) == asks
        assert registry.brought(path) == 1, "only the right is asked for"


async def test_a_yes_is_stretched_by_stale_for_while_the_registry_is_stopped(
    clock: Clock, verified: Verified, stock: Stock
) -> None:
    """Then it ends; who had none gets nothing in the meantime."""
    registry, cache = verified.registry, await verified(maxAge="10m", staleFor="1h", section={"timeouts": QUICK})
    await pull(cache, APP, stock.app, ALICE.headers)
    await registry.stop()
    for seconds in (700, 3000):
        clock.advance(seconds)
        for part in ("layer", "digest", "tag"):
            answer = await cache.get(parts(APP, stock.app)[part], ALICE.headers)
            assert (answer.status, answer.body) == (200, body_of(stock.app, part))
        for headers in (ANNE.headers, WRONG.headers, []):
            found = await statuses(cache, APP, stock.app, headers, CONTENT)
            assert set(found.values()) <= {401, 503}
            assert headers == [] or set(found.values()) == {503}
    clock.advance(600)
    found = await statuses(cache, APP, stock.app, ALICE.headers, CONTENT)
    assert set(found.values()) == {503}
    await registry.start()
    clock.advance(61)
    await pull(cache, APP, stock.app, ALICE.headers)


async def test_a_refusal_is_remembered_for_seconds_so_that_a_new_right_counts_soon(
    clock: Clock, verified: Verified, stock: Stock
) -> None:
    registry, cache = verified.registry, await verified()
    assert await statuses(cache, APP, stock.app, BOB.headers) == all_of(401)
    before = registry.attempts()
    assert before <= 4, "a token and what it is refused, and once more with a fresh one"
    assert await statuses(cache, APP, stock.app, BOB.headers) == all_of(401)
    assert registry.attempts() == before
    registry.allow(BOB, APP)
    clock.advance(11)
    await pull(cache, APP, stock.app, BOB.headers)


async def test_an_absent_tag_is_404_for_who_may_read_and_401_for_who_may_not(verified: Verified, stock: Stock) -> None:
    cache = await verified()
    absent, gone = f"/v2/{APP}/manifests/absent", f"/v2/{APP}/blobs/sha256:{'0' * 64}"
    for path in (absent, gone):
        for headers, code in ((ALICE.headers, 404), ([], 401), (WRONG.headers, 401), (BOB.headers, 401)):
            answer = await cache.get(path, headers)
            assert answer.status == code, (path, headers)
            assert json.loads(answer.body)["errors"][0]["code"] in ("MANIFEST_UNKNOWN", "BLOB_UNKNOWN", "UNAUTHORIZED")
    for headers in ([], ALICE.headers):
        assert (await cache.get(f"/v2/{OPEN}/manifests/absent", headers)).status == 404
    await pull(cache, APP, stock.app, ALICE.headers)


async def test_an_absent_tag_asked_for_at_the_same_time_hides_no_other(verified: Verified, stock: Stock) -> None:
    """Two questions about one repository in one name are two, though either may prove the right."""
    registry, cache = verified.registry, await verified()
    for repository, image, headers in ((OPEN, stock.open, []), (APP, stock.app, ALICE.headers)):
        absent, wanted, held = f"/v2/{repository}/manifests/absent", parts(repository, image)["tag"], asyncio.Event()
        registry.script("*", absent, gate(held))
        async with asyncio.TaskGroup() as group:
            first = group.create_task(cache.get(absent, headers))
            await registry.wait_for(lambda absent=absent: any(r.path == absent for r in registry.requests))  # type: ignore[misc]
            second = group.create_task(cache.get(wanted, headers))
            await registry.wait_for(lambda path=wanted: any(r.path == path for r in registry.requests))  # type: ignore[misc]
            held.set()
        assert (first.result().status, second.result().status) == (404, 200)


@pytest.mark.parametrize("part", CONTENT)
async def test_head_and_ranges_need_the_same_right(verified: Verified, stock: Stock, part: str) -> None:
    """Cold and held; a HEAD downloads no blob."""
    registry, cache = verified.registry, await verified()
    path, body = parts(APP, stock.app)[part], body_of(stock.app, part)
    for headers, code in ((ALICE.headers, 200), ([], 401), (WRONG.headers, 401), (BOB.headers, 401)):
        answer = await cache.head(path, headers)
        assert (answer.status, answer.body) == (code, b"")
        assert (answer.headers.get("Content-Length") == str(len(body))) == (code == 200)
    if part in ("config", "layer"):
        assert registry.brought(path) == 0
    assert (await cache.get(path, ALICE.headers)).body == body
    for headers, code in ((ALICE.headers, 206), ([], 401), (WRONG.headers, 401), (BOB.headers, 401)):
        answer = await cache.get(path, [*headers, ("Range", "bytes=3-7")])
        assert answer.status == code
        if code == 206:
            assert answer.body == body[3:8]
            assert answer.headers.get("Content-Range") == f"bytes 3-7/{len(body)}"
        else:
            assert_bare(answer, stock.app)
        held = await cache.get(path, [*headers, ("If-None-Match", "*")])
        assert held.status == (304 if code == 206 else 401)


@pytest.mark.parametrize("mode", ["verify", "shared", "public"])
async def test_what_is_private_is_marked_so_and_what_is_public_is_not(
    start_cache: StartCache, private: PrivateRegistry, stock: Stock, tmp_path: Path, mode: str
) -> None:
    """For every cache in front: hits, misses, HEAD, parts, 304 and refusals."""
    secrets = [secret_for(tmp_path)] if mode == "shared" else []
    cache = await start_cache(with_access(private, mode), imagePullSecrets=secrets, externalURL=EXTERNAL)
    for repository, image, headers in (
        (APP, stock.app, ALICE.headers),
        (OPEN, stock.open, ALICE.headers),
        (OPEN, stock.open, []),
    ):
        for _ in range(2):
            for part, path in parts(repository, image).items():
                for more in ([], [("Range", "bytes=0-1")], [("If-None-Match", "*")]):
                    for ask in (cache.get, cache.head):
                        answer = await ask(path, [*headers, *more])
                        control, vary = values(answer.headers, "Cache-Control"), values(answer.headers, "Vary")
                        if mode == "shared" or repository == APP:
                            assert control == {"private", "no-store"}
                            assert "authorization" in vary
                        else:
                            assert "private" not in control
                            assert "no-store" not in control
                            assert ("immutable" in control) == (part in ("digest", "config", "layer"))
                            assert "no-cache" in control or "immutable" in control


async def test_a_manifest_that_needs_a_right_says_how_to_show_it(verified: Verified, stock: Stock) -> None:
    """Both challenges, a line each, with the scope of the very name that was asked for; whatever the request's Host says."""
    cache = await verified()
    for name in (APP, f"{UPSTREAM}/{APP}"):
        for path in parts(name, stock.app).values():
            for headers in ([], WRONG.headers, [("Host", "evil.test")]):
                answer = await cache.get(path, headers)
                assert answer.status == 401
                assert challenges(answer) == [bearer_challenge(f"repository:{name}:pull"), BASIC_CHALLENGE]
    answer = await cache.get(f"{parts(APP, stock.app)['tag']}?ns={UPSTREAM}")
    assert challenges(answer)[0] == bearer_challenge(f"repository:{APP}:pull")


# --- many at once ---

LARGE = os.urandom(3 * 1024 * 1024)


async def test_fifty_clients_with_a_right_share_one_download_and_one_without_gets_nothing_of_it(
    verified: Verified, stock: Stock
) -> None:
    """Of two who may, half each; one question a credential, one GET in all."""
    registry, cache = verified.registry, await verified()
    path, held = f"/v2/{APP}/blobs/{registry.add_blob(APP, LARGE)}", asyncio.Event()
    registry.script("GET", path, gate(held, after=1000))
    async with asyncio.TaskGroup() as group:
        first = group.create_task(cache.get(path, ALICE.headers))
        await until(lambda: cache.metric("fills_in_flight") == 1 and registry.count("GET", path) == 1)
        others = [group.create_task(cache.get(path, (ALICE, ANNE)[number % 2].headers)) for number in range(49)]
        for headers in (WRONG.headers, BOB.headers, []):
            answer = await cache.get(path, headers)
            assert answer.status == 401
            assert LARGE[:16] not in answer.body
            assert not answer.headers.has("Docker-Content-Digest")
        await until(lambda: cache.metric("followers_total") == 49)
        held.set()
    assert all(task.result().body == LARGE for task in (first, *others))
    assert registry.brought(path) == 1
    assert len([r for r in registry.seen("HEAD", path) if r.headers.has("Authorization")]) <= 8


@pytest.mark.parametrize("breaks", [False, True], ids=["goes-on", "breaks-off"])
async def test_when_the_first_ones_right_is_withdrawn_in_mid_download_the_others_finish(
    verified: Verified, stock: Stock, breaks: bool
) -> None:
    """Where the download breaks off and its owner is refused the rest, those with a right get it by their own: a client asks
    for what it lacks, as containerd does."""
    registry, cache = verified.registry, await verified()
    path, held = f"/v2/{APP}/blobs/{registry.add_blob(APP, LARGE)}", asyncio.Event()
    steps = [gate(held, after=2_000_000), *([cut(2_000_000)] if breaks else [])]
    registry.script("GET", path, compose(*steps))
    registry.allow(BOB, APP)

    async def whole(account: Account) -> bytes:
        body = b""
        for _ in range(4):
            answer = await cache.get(path, [*account.headers, ("Range", f"bytes={len(body)}-")])
            if answer.status not in (200, 206):
                break
            body += answer.body
            if len(body) == len(LARGE):
                break
        return body

    async with asyncio.TaskGroup() as group:
        owner = group.create_task(whole(ALICE))
        await until(lambda: cache.metric("fills_in_flight") == 1 and registry.count("GET", path) == 1)
        others = [group.create_task(whole(account)) for account in (BOB, ANNE)]
        await until(lambda: cache.metric("followers_total") == 2)
        registry.withdraw(ALICE)
        held.set()
    assert [task.result() == LARGE for task in others] == [True, True]
    if breaks:
        assert owner.result() != LARGE
        assert (await cache.get(path, ALICE.headers)).status == 401
        assert (await cache.get(path, ANNE.headers)).body == LARGE


# --- the ping and the token endpoint ---


async def test_the_ping_asks_for_a_token_wherever_one_upstream_verifies(verified: Verified, stock: Stock) -> None:
    """podman, skopeo and dockerd take a challenge from there only."""
    cache = await verified()
    for path in ("/v2/", "/v2"):
        for ask in (cache.get, cache.head):
            answer = await ask(path)
            assert (answer.status, challenges(answer)) == (401, [bearer_challenge()])
            assert answer.headers.get("Docker-Distribution-Api-Version") == "registry/2.0"
    given = await token(cache, None)
    for headers in (
        bearer(given),
        ALICE.headers,
        WRONG.headers,
        [("Authorization", "Basic Og==")],
        bearer(await token(cache, ALICE)),
    ):
        assert (await cache.get("/v2/", headers)).status == 200
    for junk in ("Bearer " + "x" * 43, "Bearer a.b.c"):
        answer = await cache.get("/v2/", [("Authorization", junk)])
        assert (answer.status, challenges(answer)[0]) == (401, bearer_challenge(error="invalid_token"))
    for junk in ("Bearer", "Bearer a b", "Basic !!!", "Negotiate x", "", "Basic " + "A" * 15_000):
        answer = await cache.get("/v2/", [("Authorization", junk)])
        assert answer.status in (200 if junk == "" else 401, 401)
        assert len(challenges(answer)) == 2
    assert verified.registry.requests == [], "nobody is asked for any of it"


async def post(cache: RunningCache, form: Any, headers: Pairs | None = None) -> WireResponse:
    """A token request by POST."""
    body = form if isinstance(form, bytes) else urlencode(form).encode()
    kind = [("Content-Type", "application/x-www-form-urlencoded")]
    return await fetch(cache.host, cache.port, "POST", "/token", [*kind, *(headers or [])], body=body)


SCOPES = (
    f"repository:{APP}:pull",
    f"repository:{APP}:pull,push repository:{LIB}:pull",
    "registry:catalog:*",
    "aws",
    "junk",
    "repository:",
    "",
    "repository:" + "a" * 2000 + ":pull",
)


@pytest.mark.parametrize("scope", range(len(SCOPES)))
async def test_a_token_is_given_by_get_and_post_whatever_scopes_are_asked_for(
    verified: Verified, stock: Stock, scope: int
) -> None:
    """What it opens is decided when it is used; nobody is asked before."""
    registry, cache = verified.registry, await verified()
    wanted = [SCOPES[scope], SCOPES[0]]
    query = urlencode([("service", "pullcache"), *(("scope", each) for each in wanted), ("account", "alice")])
    form = [
        ("grant_type", "password"),
        ("username", "alice"),
        ("password", ALICE.password),
        ("service", "x"),
        ("client_id", "c"),
    ]
    answers = [
        await cache.get(f"/token?{query}", ALICE.headers),
        await post(cache, [*form, *(("scope", each) for each in wanted)]),
        await post(cache, [*form, ("scope", " ".join(wanted)), ("access_type", "offline")]),
    ]
    assert registry.requests == []
    for answer in answers:
        assert answer.status == 200
        assert answer.headers.get("Cache-Control") == "no-store"
        given = json.loads(answer.body)
        assert given["token"] == given["access_token"]
        assert 60 <= given["expires_in"] <= 300
        assert ALICE.password not in given["token"]
        assert "refresh_token" not in given
        await pull(cache, APP, stock.app, bearer(given["token"]))
        await pull(cache, OPEN, stock.open, bearer(given["token"]))
    assert registry.shown() == {(ALICE.user, ALICE.password)}


async def test_a_refresh_token_goes_to_the_token_server_and_nowhere_else(
    start_cache: StartCache, by_token: PrivateRegistry
) -> None:
    stock, secret = fill(by_token), "r3fresh-c4n4ry"
    by_token.refresh[secret] = "alice"
    cache = await start_cache(with_access(by_token, "verify"), externalURL=EXTERNAL)
    answer = await post(cache, {"grant_type": "refresh_token", "refresh_token": secret, "service": "pullcache"})
    given = json.loads(answer.body)["token"]
    assert secret not in given
    await pull(cache, APP, stock.app, bearer(given))
    heard = [request for request in by_token.requests if secret.encode() in request.raw]
    assert {(request.method, request.path) for request in heard} == {("POST", "/token")}
    assert by_token.shown() == set()
    wrong = json.loads((await post(cache, {"grant_type": "refresh_token", "refresh_token": "r3fresh-wrong"})).body)["token"]
    assert await statuses(cache, APP, stock.app, bearer(wrong)) == all_of(401)


NO_CREDENTIAL: list[tuple[Any, Pairs]] = [
    (None, []),
    (None, [("Authorization", "Basic Og==")]),
    ({"grant_type": "password", "username": "", "password": ""}, []),
    ({"grant_type": "password", "username": "", "password": ""}, ALICE.headers),
]


@pytest.mark.parametrize("case", range(len(NO_CREDENTIAL)))
async def test_the_token_of_the_anonymous_opens_what_is_public_and_no_more(
    verified: Verified, stock: Stock, case: int
) -> None:
    """Also when the form is empty and the header of the client program is not: a form speaks for itself."""
    form, headers = NO_CREDENTIAL[case]
    registry, cache = verified.registry, await verified()
    await pull(cache, APP, stock.app, ALICE.headers)
    answer = await (
        post(cache, form, headers) if form is not None else cache.get(f"/token?scope={quote(SCOPES[0])}", headers)
    )
    given = json.loads(answer.body)["token"]
    heard = registry.attempts()
    await pull(cache, OPEN, stock.open, bearer(given))
    assert await statuses(cache, APP, stock.app, bearer(given)) == all_of(401)
    assert registry.attempts() == heard


async def test_a_token_ends_and_is_then_unknown(clock: Clock, verified: Verified, stock: Stock) -> None:
    """For what it was given for, and for what is public; a client asks for another then."""
    registry, cache = verified.registry, await verified(maxAge="1h")
    given = await token(cache, ALICE)
    await pull(cache, APP, stock.app, bearer(given))
    clock.advance(140)
    await pull(cache, APP, stock.app, bearer(given))
    clock.advance(161)
    before = len(registry.requests)
    for repository, image in ((APP, stock.app), (OPEN, stock.open)):
        for path in ("/v2/", *parts(repository, image).values()):
            answer = await cache.get(path, bearer(given))
            assert answer.status == 401
            assert 'error="invalid_token"' in challenges(answer)[0]
    assert len(registry.requests) == before
    again = await token(cache, ALICE)
    assert again != given
    await pull(cache, APP, stock.app, bearer(again))


async def test_a_download_outlives_the_token_that_it_was_begun_with(clock: Clock, verified: Verified, stock: Stock) -> None:
    """It breaks off after the token's end, and the rest still comes by the credential that it stood for."""
    registry, cache = verified.registry, await verified()
    path, held = f"/v2/{APP}/blobs/{registry.add_blob(APP, LARGE)}", asyncio.Event()
    registry.script("GET", path, compose(gate(held, after=2_000_000), cut(2_000_000)))
    given = await token(cache, ALICE)
    async with await cache.open(path, bearer(given)) as stream:
        begun = await stream.read_all(1000)
        clock.advance(25)  # within what a slow registry may take; then in steps, so that no time limit is passed at once
        for _ in range(12):
            held.set()
            body = await stream.read_all(200_000)
            begun += body
            clock.advance(26)
        begun += await stream.read_all()
    assert begun == LARGE
    assert 'error="invalid_token"' in challenges(await cache.get(path, bearer(given)))[0]


BAD_REQUESTS: dict[str, tuple[str, str, Any, Pairs, int]] = {
    "no-grant": ("POST", "/token", b"", [("Content-Length", "0")], 400),
    "junk": ("POST", "/token", b"\xff\x00\xfe%%%&&==;;", [], 400),
    "json": ("POST", "/token", b'{"grant_type":"password"}', [], 400),
    "other-grant": ("POST", "/token", b"grant_type=client_credentials", [], 400),
    "half-a-password": ("POST", "/token", b"grant_type=password&username=alice", [], 400),
    "no-refresh-token": ("POST", "/token", b"grant_type=refresh_token", [], 400),
    "twice": ("POST", "/token", b"grant_type=password&username=a&username=b&password=c", [], 400),
    "line-break": ("POST", "/token", b"grant_type=password&username=a&password=b%0d%0aX-Evil:1", [], 400),
    "colon": ("POST", "/token", b"grant_type=password&username=a:b&password=c", [], 400),
    "many-fields": ("POST", "/token", b"&".join(b"a%d=1" % n for n in range(300)), [], 400),
    "many-parameters": ("GET", "/token?" + "&".join(f"a{n}=1" for n in range(300)), b"", [], 400),
    "over-large": ("POST", "/token", b"grant_type=password&username=a&password=" + b"c" * 70_000, [], 413),
    "over-long-password": ("POST", "/token", b"grant_type=password&username=a&password=" + b"c" * 20_000, [], 400),
    "without-length": ("POST", "/token", b"", [("Transfer-Encoding", "chunked")], 413),
    "said-to-be-large": ("POST", "/token", b"", [("Content-Length", "99999999999")], 413),
    "bearer": ("GET", "/token", b"", bearer("x" * 43), 400),
    "bad-basic": ("GET", "/token", b"", [("Authorization", "Basic c4n4ry-t0ken!")], 400),
    "put": ("PUT", "/token", b"a", [], 405),
    "delete": ("DELETE", "/token", b"", [], 405),
    "options": ("OPTIONS", "/token", b"", [], 405),
    "below": ("GET", "/token/x", b"", [], 404),
    "post-elsewhere": ("POST", "/v2/", b"a=b", [], 405),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
async def test_a_bad_token_request_is_refused_in_words(
    verified: Verified, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    method, target, body, headers, code = BAD_REQUESTS[case]
    cache = await verified()
    answer = await fetch(cache.host, cache.port, method, target, headers, body=body)
    assert answer.status == code
    said = json.loads(answer.body)
    assert said.keys() in ({"error", "error_description"}, {"errors"})
    assert "c4n4ry" not in answer.body.decode() + caplog.text
    assert "failed by a fault" not in caplog.text
    assert verified.registry.requests == []


async def test_without_an_upstream_that_verifies_there_is_no_token_endpoint(verified: Verified) -> None:
    cache = await verified(mode="public")
    assert (await cache.get("/v2/")).status == 200
    assert (await cache.get("/token")).status == 404
    assert (await post(cache, {"grant_type": "password"})).status in (404, 405)


# --- wrong credentials, many of them ---


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def try_many(cache: RunningCache, path: str, count: int, at_once: int = 16, prefix: str = "wrong") -> dict[int, int]:
    """So many different wrong passwords from 127.0.0.1; how often each status came."""
    found: dict[int, int] = {}
    numbers = iter(range(count))

    async def some(session: aiohttp.ClientSession) -> None:
        for number in numbers:
            headers = dict(Account("alice", f"{prefix}-{number}").headers)
            async with session.get(f"http://{cache.host}:{cache.port}{path}", headers=headers) as answer:
                await answer.read()
                found[answer.status] = found.get(answer.status, 0) + 1
                if answer.status == 429:
                    assert 1 <= int(answer.headers["Retry-After"]) <= 60

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(some(session))
    return found


TRIES = 10_000


async def test_many_wrong_credentials_of_one_client_reach_the_registry_ten_times_a_minute(
    verified: Verified, stock: Stock, clock: Clock
) -> None:
    """Then 429. Another client's right one works meanwhile, so does one that is known to be right; memory stays as it is."""
    registry, cache = verified.registry, await verified()
    await pull(cache, APP, stock.app, ANNE.headers)
    path = parts(APP, stock.app)["tag"]
    await try_many(cache, path, 300, prefix="warm")
    assert len(registry.shown()) - 1 <= 10
    before, known = resident(), len(registry.requests)
    async with asyncio.TaskGroup() as group:
        crowd = group.create_task(try_many(cache, path, TRIES))
        await asyncio.sleep(0)
        for _ in range(5):
            for part in CONTENT:
                answer = await fetch_from("127.0.0.2", cache, "GET", parts(APP, stock.app)[part], ALICE.headers)
                assert (answer.status, answer.body) == (200, body_of(stock.app, part))
            assert (await cache.get(path, ANNE.headers)).status == 200
    found = crowd.result()
    assert found.keys() <= {401, 429}
    assert found[429] >= TRIES - 10
    wrong = {shown for shown in registry.shown() if shown[1].startswith(("warm", "wrong"))}
    assert len(wrong) <= 10
    assert resident() - before < 8 * 1024 * 1024
    assert len(registry.requests) - known < 60, "and so few questions altogether"
    clock.advance(61)
    await try_many(cache, path, 100, prefix="later")
    later = {shown for shown in registry.shown() if shown[1].startswith("later")}
    assert 1 <= len(later) <= 10, "ten more the next minute"


async def test_tokens_for_wrong_credentials_are_counted_when_they_are_used(verified: Verified, stock: Stock) -> None:
    """The token endpoint gives a token to anybody; that costs the registry nothing, and no memory without end."""
    registry, cache = verified.registry, await verified()
    path = parts(APP, stock.app)["tag"]
    handles = [await token(cache, Account("alice", f"wrong-{number}")) for number in range(200)]
    assert registry.requests == []
    found = [(await cache.get(path, bearer(handle))).status for handle in handles]
    assert set(found) <= {401, 429}
    assert len(registry.shown()) <= 10
    answer = await fetch_from("127.0.0.2", cache, "GET", path, ALICE.headers)
    assert answer.status == 200


async def test_many_addresses_together_reach_a_registry_sixty_times_a_minute(verified: Verified, stock: Stock) -> None:
    registry, cache = verified.registry, await verified()
    await pull(cache, APP, stock.app, ANNE.headers)
    path, codes = parts(APP, stock.app)["tag"], []
    for number in range(100):
        account = Account("alice", f"wrong-{number}")
        codes.append((await fetch_from(f"127.0.1.{number % 20 + 1}", cache, "GET", path, account.headers)).status)
    wrong = {shown for shown in registry.shown() if shown[1].startswith("wrong")}
    assert len(wrong) == 60
    assert codes.count(429) == 40
    answer = await fetch_from("127.0.1.200", cache, "GET", path, ANNE.headers)
    assert answer.status == 200, "who is known to be right goes on"


async def test_right_credentials_cost_no_attempt(verified: Verified, stock: Stock) -> None:
    """Fifty users of one address, each for the first time, all at once."""
    registry, cache = verified.registry, await verified()
    accounts = [Account(f"user{number}", f"right-{number}") for number in range(50)]
    for account in accounts:
        registry.allow(account, APP)
    path = parts(APP, stock.app)["layer"]
    answers = await asyncio.gather(*(cache.get(path, account.headers) for account in accounts))
    assert [answer.status for answer in answers] == [200] * 50
    assert registry.brought(path) == 1


async def test_the_message_of_a_429_says_whose_fault_it_is(verified: Verified, stock: Stock) -> None:
    cache = await verified()
    path = parts(APP, stock.app)["tag"]
    for number in range(11):
        answer = await cache.get(path, Account("alice", f"wrong-{number}").headers)
    assert answer.status == 429
    assert "wrong credentials" in message(answer)
    assert "wrong-" not in message(answer)
    assert await statuses(cache, OPEN, stock.open, WRONG.headers) == all_of(200), "what is public needs none"
