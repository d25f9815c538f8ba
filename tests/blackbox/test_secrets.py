"""A credential goes to the registry that it is for and to its token server, and nowhere else (T01 to T05, T07 to T09, T12
to T14, T35).

The cache's own, for all (``shared``) or for its quota (``public``), and a client's (``verify``). Every test looks at what
the servers received.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.credentials import (
    ALICE,
    BOB,
    PASSWORD_WAYS,
    SHARED,
    WAYS,
    Scheme,
    Way,
    asked,
    blobs,
    clock,
    entry,
    guard,
    hears,
    in_its_place,
    logged,
    proves,
    secret,
    shown,
    shown_to,
    stake,
    tells,
    to_credentials,
    who,
    write_secret,
)
from tests.blackbox.helpers import REPO, TAG, blob, message
from tests.conftest import UPSTREAM, RunningCache, StartCache, upstream
from tests.fakes.answers import (
    Step,
    as_json,
    before_headers,
    compose,
    oci_error,
    redirect,
    status,
    unauthorized,
    with_headers,
)
from tests.fakes.client import fetch
from tests.fakes.messages import Answer, Request
from tests.fakes.recorder import Sink
from tests.fakes.registry import ScriptedRegistry
from tests.fakes.tls import Authority
from tests.fakes.tokens import Account, Rights, RightsTokenServer, credentials_in

SCOPE = f"repository:{REPO}:pull"
ANYWHERE = ["127.0.0.0/8"]

ways = pytest.mark.parametrize("way", WAYS)
schemes = pytest.mark.parametrize("scheme", ["Basic", "Bearer"])
stakes = pytest.mark.parametrize(
    ("way", "scheme"), [*((way, "Bearer") for way in WAYS), *((way, "Basic") for way in PASSWORD_WAYS)]
)


@pytest.fixture
async def other() -> AsyncIterator[ScriptedRegistry]:
    """A second server on another port: a mirror, another registry, or whoever would like the secret."""
    async with ScriptedRegistry() as scripted:
        yield scripted


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    """The authority that the operator trusts."""
    folder = tmp_path / "ca"
    folder.mkdir()
    return Authority(folder)


# --- T01, T02: realms ---


@ways
@pytest.mark.parametrize("kind", ["GET tag", "HEAD tag", "GET blob", "HEAD blob"])
async def test_t01_a_registry_that_turns_hostile_gets_no_credential_to_a_foreign_realm(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way, kind: str
) -> None:
    """It has had pulls with good tokens before: what they were got with is at hand, and stays there."""
    method, _, what = kind.partition(" ")
    guard(registry, way)
    first = blob(registry, b"first")
    registry.add_image(REPO, "1", [b"layer"])
    path = TAG if what == "tag" else blob(registry)
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    async with Sink() as sink:
        assert (await held.get(first)).status == 200
        assert hears(asked(registry)), "there was a secret to lose"
        before = len(registry.requests)
        registry.tokens.revoke()
        registry.require_token(realm=f"{sink.url}/token", tokens=registry.tokens)
        answer = await (held.get if method == "GET" else held.head)(path)
        assert sink.silent
        if what == "tag" and answer.status == 200:  # a fresh token, of the server that was good before, was good still
            assert all(request.path == "/token" for request in registry.requests[before:] if shown([request]) == ["Basic"])
            return
        assert answer.status == 502
        if method == "GET":
            assert sink.host in message(answer)
            assert "tokenHosts" in message(answer)
            assert UPSTREAM in message(answer)
    assert not hears(registry.requests[before:])
    assert len(registry.requests) - before <= 3, "no storm"
    assert held.cache.metric("refused_total", upstream=UPSTREAM, what="realm") >= 1


REALMS = [
    pytest.param("http://{sink}/token", id="foreign"),
    pytest.param("http://user:pw@{own}/token", id="userinfo"),
    pytest.param("http://{own}@{sink}/token", id="own-host-as-userinfo"),
    pytest.param("http://{sink}\\\\@{own}/token", id="backslash"),
    pytest.param("http://{own}/token#fragment", id="fragment"),
    pytest.param("file:///etc/passwd", id="file"),
    pytest.param("ftp://{own}/token", id="ftp"),
    pytest.param("//{sink}/token", id="no-scheme"),
    pytest.param("/token", id="relative"),
    pytest.param("http://{own}/token?" + "a" * 9000, id="9KB"),
    pytest.param("http://xn--uth-5cd.docker.io/token", id="punycode"),
    pytest.param("http://localhost:{port}/token", id="another-name-of-the-host"),
    pytest.param("https://{own}/token", id="another-scheme"),
    pytest.param("http://127.0.0.1:1/token", id="another-port"),
    pytest.param("http://127.0.0.1/token", id="no-port"),
    pytest.param("http://{own}.evil.test/token", id="longer-name"),
    pytest.param("", id="empty"),
]


@pytest.mark.parametrize("way", ["shared", "public", "verify"])
@pytest.mark.parametrize("realm", REALMS)
async def test_t02_an_odd_realm_draws_nothing_from_the_first_pull_on(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way, realm: str
) -> None:
    path = blob(registry)
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    async with Sink() as sink:
        asks = realm.format(own=registry.host, port=registry.port, sink=sink.host)
        # A secret for the quota goes with GET alone, once HEAD has shown that the repository is public.
        method = "GET" if way == "public" else "*"
        registry.script(method, path, unauthorized([f'Bearer realm="{asks}",service="x"']), forever=True)
        answer = await held.get(path)
        assert answer.status in (401, 403, 502)
        assert not tells(answer.body)
        assert "user:pw" not in message(answer)
        assert sink.silent
    assert not [request for request in registry.requests if proves(request)]
    assert (held.cache.metric("refused_total", what="realm") > 0) == bool(realm)


@ways
@pytest.mark.parametrize("same_port", [True, False])
async def test_t02_a_registry_on_https_has_no_credential_sent_in_plain(
    start_cache: StartCache, tmp_path: Path, ca: Authority, way: Way, same_port: bool
) -> None:
    """Not even where the host is listed in ``tokenHosts``."""
    async with Sink() as sink, ScriptedRegistry(ssl=ca.good()) as registry:
        guard(registry, way)
        host = registry.host if same_port else sink.host
        section = upstream(registry, caFile=str(ca.ca_path), tokenHosts=[host])
        held = await stake(start_cache, tmp_path, way, section)
        assert (await held.get(blob(registry, b"first"))).status == 200
        assert hears(asked(registry))
        before = len(registry.requests)
        registry.tokens.revoke()
        registry.require_token(realm=f"http://{host}/token", tokens=registry.tokens)
        assert (await held.get(blob(registry))).status == 502
        assert sink.silent
        assert not hears(registry.requests[before:])
        assert (registry.malformed, registry.failed_handshakes) == (0, 0), "nothing was said in plain to its port either"


@ways
async def test_t01_a_listed_token_host_has_the_credential_and_the_registry_its_token_alone(
    registry: ScriptedRegistry, other: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way
) -> None:
    """The counterpart: what the operator has listed works, so the silence above is not that of something broken."""
    guard(other, way)
    registry.require_token(realm=f"{other.url}/token", tokens=other.tokens)
    held = await stake(start_cache, tmp_path, way, upstream(registry, tokenHosts=[other.host]))
    assert (await held.get(blob(registry))).status == 200
    assert not hears(registry)
    assert hears(other)
    in_its_place(other)
    assert {request.path for request in other.requests} == {"/token"}


# --- T03: redirects of token requests ---


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
@ways
async def test_t03_a_token_request_with_a_credential_is_not_redirected(
    registry: ScriptedRegistry,
    other: ScriptedRegistry,
    start_cache: StartCache,
    tmp_path: Path,
    way: Way,
    code: int,
) -> None:
    """307 and 308 would repeat the body of a POST; the other server would give a token that is good."""
    guard(registry, way)
    other.tokens = registry.tokens
    registry.script("*", "/token", to_credentials(redirect(f"{other.url}/token", code)), forever=True)
    held = await stake(start_cache, tmp_path, way, upstream(registry, tokenHosts=[other.host]))
    for path in blobs(registry, 3):
        answer = await held.get(path)
        assert answer.status == 502
        assert f"token server of {UPSTREAM}" in message(answer)
    assert other.connections == 0
    assert len([request for request in asked(registry) if proves(request)]) == 1, "no storm"
    in_its_place(registry)
    assert held.cache.metric("refused_total", what="redirect") == 1


# --- T04: redirects of content ---


@stakes
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"], ids=["another-port", "another-host"])
async def test_t04_a_redirect_takes_no_credential_along(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way, scheme: Scheme, host: str
) -> None:
    image = registry.add_image(REPO, "1", [b"layer"])
    guard(registry, way, scheme)
    held = await stake(start_cache, tmp_path, way, upstream(registry, allowAddresses=ANYWHERE))
    async with ScriptedRegistry(host) as evil:
        evil.add_image(REPO, "1", [b"layer"])
        for path, body in ((TAG, image.data), (blob(registry), b"layer")):
            leave = compose(redirect(f"{evil.url}{path}"), with_headers({"Set-Cookie": "jar=sugar; Path=/"}))
            registry.script("*", path, leave, forever=True)
            assert (await held.get(path)).body == body
            assert evil.seen(path=path)
        assert hears(registry), "there was a secret to lose"
        assert set(shown(evil.requests)) == {"-"}
        assert not hears(evil, tokens=registry.tokens.ever)
        assert not evil.heard("Authorization")
        assert not evil.heard("sugar")


@schemes
@pytest.mark.parametrize("demand", ["Basic", "Bearer-there", "Bearer-here"])
@pytest.mark.parametrize("way", PASSWORD_WAYS)
async def test_t04_a_challenge_where_a_redirect_leads_is_not_answered(
    registry: ScriptedRegistry,
    other: ScriptedRegistry,
    start_cache: StartCache,
    tmp_path: Path,
    way: Way,
    demand: str,
    scheme: Scheme,
) -> None:
    """containerd once gave its password so (CVE-2020-15157)."""
    path = blob(registry)
    guard(registry, way, scheme)
    registry.script("*", path, redirect(f"{other.url}{path}"), forever=True)
    realm = f"{(registry if demand == 'Bearer-here' else other).url}/token"
    challenge = 'Basic realm="x"' if demand == "Basic" else f'Bearer realm="{realm}",service="s"'
    other.script("*", path, unauthorized([challenge]), forever=True)
    held = await stake(start_cache, tmp_path, way, upstream(registry, tokenHosts=[other.host]))
    assert (await held.get(path)).status in (401, 403, 502)
    assert not [request for request in other.requests if proves(request)]
    assert not asked(other)
    assert not hears(other, tokens=registry.tokens.ever)
    if scheme == "Basic":
        assert not asked(registry)


@schemes
@pytest.mark.parametrize("way", PASSWORD_WAYS)
async def test_t04_who_was_away_gets_nothing_on_coming_back(
    registry: ScriptedRegistry, other: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way, scheme: Scheme
) -> None:
    """A -> A -> evil -> A: the first two alone, for evil has written the address of the last."""
    path = blob(registry)
    guard(registry, way, scheme)
    registry.script("*", path, redirect("/near"), forever=True)
    registry.script("*", "/near", redirect(f"{other.url}/far"), forever=True)
    other.script("*", "/far", redirect(f"{registry.url}/back"), forever=True)
    registry.script("*", "/back", status(200, b"layer", headers={"Docker-Content-Digest": "x"}), forever=True)
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    assert (await held.get(path)).body == b"layer"
    proof = ALICE.user if scheme == "Basic" else "token"
    assert set(shown(registry.seen(path="/near"))) == {proof}
    assert set(shown(other.requests)) == {"-"}
    assert set(shown(registry.seen(path="/back"))) == {"-"}


@schemes
@pytest.mark.parametrize("where", ["same-port", "other-port"])
@pytest.mark.parametrize("way", PASSWORD_WAYS)
async def test_t04_no_redirect_leads_from_https_to_http(
    start_cache: StartCache, tmp_path: Path, ca: Authority, way: Way, where: str, scheme: Scheme
) -> None:
    async with Sink() as sink, ScriptedRegistry(ssl=ca.good()) as registry:
        path = blob(registry)
        guard(registry, way, scheme)
        host = registry.host if where == "same-port" else sink.host
        registry.script("*", path, redirect(f"http://{host}{path}"), forever=True)
        held = await stake(start_cache, tmp_path, way, upstream(registry, caFile=str(ca.ca_path)))
        assert (await held.get(path)).status == 502
        assert hears(registry), "there was a secret to lose"
        assert sink.silent
        assert (registry.malformed, registry.failed_handshakes) == (0, 0)
        assert held.cache.metric("refused_total", what="redirect") >= 1


# --- T05: addresses ---


@pytest.mark.parametrize("way", PASSWORD_WAYS)
async def test_t05_neither_urls_of_a_layer_nor_the_link_of_a_list_lead_anywhere(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way
) -> None:
    async with Sink() as sink:
        image = registry.add_image(REPO, "1", [b"layer"], urls=[f"{sink.url}/layer"])
        guard(registry, way)
        tags = f"/v2/{REPO}/tags/list"
        link = with_headers({"Link": f'<{sink.url}{tags}?last=1>; rel="next"'})
        registry.script("GET", tags, link, forever=True)
        held = await stake(start_cache, tmp_path, way, upstream(registry))
        for path in (TAG, *(f"/v2/{REPO}/blobs/{digest}" for digest in image.layer_digests), tags):
            answer = await held.get(path)
            assert answer.status in (200, 502)
            assert sink.host not in f"{answer.headers}"
        assert hears(registry)
        assert sink.silent


@pytest.mark.parametrize("way", ["shared", "verify"])
@pytest.mark.parametrize("spelling", ["127.0.0.2", "127.2", "0x7f000002", "2130706434", "[::ffff:127.0.0.2]", "[::1]"])
async def test_t05_a_token_host_at_an_address_that_is_not_allowed_hears_nothing(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way, spelling: str
) -> None:
    """Listed or not."""
    async with Sink("::1" if spelling == "[::1]" else "127.0.0.2") as sink:
        host = f"{spelling}:{sink.port}"
        registry.require_token(realm=f"http://{host}/token")
        section = upstream(registry, tokenHosts=[host], allowAddresses=["127.0.0.1/32"])
        held = await stake(start_cache, tmp_path, way, section)
        assert (await held.get(blob(registry))).status in (502, 503)
        assert sink.silent
    assert not hears(registry)


# --- T09: scopes and services ---

CHALLENGES = [
    'realm="{realm}",service="s",scope="repository:other:pull,push"',
    'realm="{realm}",service="s",scope="repository:team/app:pull,push,delete repository:other:* registry:catalog:*"',
    'realm="{realm}",service="s",scope="*"',
    'realm="{realm}",service="s"',
    'realm="{realm}",service="s&scope=repository:other:push&grant_type=password"',
    'realm="{realm}",service="s#&scope=registry:catalog:*"',
    'realm="{realm}",service="s\\",scope=\\"registry:catalog:*"',
    'realm="{realm}",service="s%0d%0aX-Evil: 1",scope="repository:other:pull%0d%0a"',
    'realm="{realm}?scope=repository:other:pull,push&account=root&offline_token=true&service=z&client_id=z",service="s"',
    'realm="{realm}",service="s",account="root",client_id="docker",offline_token="true"',
]


@pytest.mark.parametrize("challenge", CHALLENGES)
@pytest.mark.parametrize("way", ["shared", "identity", "verify", "refresh"])
async def test_t09_a_credential_asks_for_pulling_from_this_repository_and_for_nothing_else(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way, challenge: str
) -> None:
    path = blob(registry)
    guard(registry, way)
    tokens = registry.tokens
    registry.open_to_all()
    text = f"Bearer {challenge.format(realm=f'{registry.url}/token')}"
    registry.script(
        "*",
        path,
        lambda request: registry.truth(request) if who(request) == "token" else unauthorized([text]),
        forever=True,
    )
    if way in ("verify", "refresh"):  # the anonymous are given no token
        registry.script("GET", "/token", lambda r: tokens.answer(r) if proves(r) else oci_error(401, "DENIED"), forever=True)
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    assert (await held.get(path)).status == 200
    with_proof = [request for request in asked(registry) if proves(request)]
    assert len(with_proof) == 1
    for request in with_proof:
        fields = request.params
        if request.method == "POST":
            assert not fields
            fields = _form(request)
            assert fields.pop("grant_type") == ["refresh_token"]
            assert fields.pop("refresh_token") == [ALICE.identity_token]
            assert fields.pop("client_id") == ["pullcache"]
        assert fields.keys() <= {"scope", "service"}
        assert fields["scope"] == [SCOPE]
        assert len(fields.get("service", ["s"])) == 1
        assert not request.headers.has("X-Evil")
    in_its_place(registry)
    assert registry.malformed == 0


def _form(request: Request) -> dict[str, list[str]]:
    return Request("GET", f"/?{request.body.decode()}", request.headers).params


# --- T35: tokens ---

HOSTILE = [
    pytest.param(as_json({"token": "a\r\nX-Evil: 1"}), id="CRLF"),
    pytest.param(as_json({"token": "a\nX-Evil: 1"}), id="LF"),
    pytest.param(as_json({"token": "a X-Evil"}), id="space"),
    pytest.param(as_json({"token": "\u00fc"}), id="not-ASCII"),
    pytest.param(as_json({"token": "a" * 10_000_000}), id="10MB"),
    pytest.param(as_json({"token": "a" * 20_000}), id="20KB"),
    pytest.param(as_json({"token": 42}), id="number"),
    pytest.param(as_json({"token": ["a"]}), id="list"),
    pytest.param(as_json({"token": "", "access_token": ""}), id="empty"),
    pytest.param(as_json({}), id="none"),
    pytest.param(status(200, b"<html>log in</html>", "text/html"), id="page"),
    pytest.param(status(500), id="500"),
    pytest.param(before_headers("rst"), id="reset"),
]


@pytest.mark.parametrize("way", ["shared", "identity", "public", "verify"])
@pytest.mark.parametrize("hostile", HOSTILE)
async def test_t35_an_unusable_token_is_not_shown_and_the_credential_not_sent_for_another(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way, hostile: Step
) -> None:
    guard(registry, way)
    registry.script("*", "/token", to_credentials(hostile), forever=True)
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    for path in blobs(registry, 3):
        answer = await held.get(path)
        assert answer.status in (502, 503)
        assert "token server" in message(answer) or UPSTREAM in message(answer)
        assert not tells(answer.body)
    sent = [request for request in asked(registry) if proves(request)]
    assert len(sent) <= 3  # of a connection that is reset, one burst
    assert len({request.connection_id for request in sent}) == len(sent) or len(sent) == 1
    assert not registry.heard("X-Evil")
    in_its_place(registry)


@pytest.mark.parametrize("way", ["shared", "identity", "verify"])
async def test_t35_a_token_of_9_kb_is_used(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way
) -> None:
    guard(registry, way)
    long = "x" * 9000
    registry.tokens.issue([SCOPE], long)
    registry.script("*", "/token", to_credentials(as_json({"token": long, "expires_in": 300})), forever=True)
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    assert (await held.get(blob(registry))).body == b"layer"


@pytest.mark.parametrize("code", [400, 413, 431])
async def test_t35_a_registry_that_chokes_on_the_token_it_gave_is_a_clear_error(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    guard(registry, "shared")
    long = "x" * 9000
    registry.tokens.issue([SCOPE], long)
    registry.script("*", "/token", as_json({"token": long}), forever=True)
    path = blob(registry)
    registry.script("*", path, status(code, b"header too long: " + long.encode(), "text/plain"), forever=True)
    held = await stake(start_cache, tmp_path, "shared", upstream(registry))
    answer = await held.get(path)
    assert answer.status == 502
    assert f"answered {code}" in message(answer)
    assert UPSTREAM in message(answer)
    assert "x" * 20 not in f"{answer.body!r} {logged(caplog)}"


@pytest.mark.parametrize("way", ["shared", "verify"])
@pytest.mark.parametrize("life", ["-1", "0", "1", "1e12", "1e400", "NaN", '"x"', "null", "true", "[]", "9" * 400])
async def test_t35_whatever_life_is_stated_one_token_serves_some_pulls(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way, life: str
) -> None:
    guard(registry, way)
    registry.tokens.issue([SCOPE], "good")
    answer = status(200, f'{{"token":"good","expires_in":{life}}}'.encode(), "application/json")
    registry.script("*", "/token", to_credentials(answer), forever=True)
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    for path in blobs(registry, 3):
        assert (await held.get(path)).status == 200
    assert len([request for request in asked(registry) if proves(request)]) == 1


# --- T07: upstreams apart ---


async def test_t07_a_thousand_pulls_of_two_registries_mix_up_no_credential(
    registry: ScriptedRegistry, other: ScriptedRegistry, start_cache: StartCache, tmp_path: Path
) -> None:
    """One asks for Basic, one for tokens, which run out all the time; then the second one's secret is taken away."""
    plain, bearer = Rights([ALICE]), Rights([BOB])
    registry.require_rights(plain, "Basic")
    other.require_rights(bearer)
    config = tmp_path / "config.json"
    secrets = [secret(config, ("a.test", ALICE), ("b.test", BOB))]
    sections = [upstream(registry, "a.test", access=SHARED), upstream(other, "b.test", access=SHARED)]
    cache = await start_cache(*sections, imagePullSecrets=secrets, rereadFilesEvery="50ms")
    paths = [
        path.replace("/v2/", f"/v2/{name}/")
        for name, server in (("a.test", registry), ("b.test", other))
        for repo in range(20)
        for path in blobs(server, 25, f"{repo}", f"team/app{repo}")
    ]
    random.Random(7).shuffle(paths)
    assert len(paths) == 1000
    for start in range(0, 1000, 50):
        answers = await asyncio.gather(*(cache.get(path, within=15) for path in paths[start : start + 50]))
        assert [answer.status for answer in answers] == [200] * 50
        other.tokens.revoke()
    assert len(asked(other)) >= 100, "there were challenges all the time"
    _apart(registry, other)

    secret(config, ("a.test", ALICE))
    await no_longer_of(cache, other, "b.test")
    before = len(other.requests)
    for server, name, code in ((registry, "a.test", 200), (other, "b.test", 403)):
        for path in blobs(server, 20, "later"):
            assert (await cache.get(path.replace("/v2/", f"/v2/{name}/"))).status == code
    assert set(shown(other.requests[before:])) <= {"-", "token"}
    later = other.requests[before:]
    assert not hears(later, BOB)
    _apart(registry, other)


async def no_longer_of(cache: RunningCache, registry: ScriptedRegistry, name: str) -> None:
    """Waits until the registry's secret is no longer used."""
    async with asyncio.timeout(20):
        number = 0
        while (await cache.get(blob(registry, f"probe {number}".encode()).replace("/v2/", f"/v2/{name}/"))).status == 200:
            number += 1
            await asyncio.sleep(0.01)


def _apart(plain: ScriptedRegistry, bearer: ScriptedRegistry) -> None:
    """Neither has received what is the other's."""
    assert not hears(plain, BOB, bearer.tokens.ever)
    assert not hears(bearer, ALICE)
    assert not plain.heard(BOB.user)
    assert not bearer.heard(ALICE.user)
    assert set(shown(plain.requests)) <= {"-", ALICE.user}
    assert {who(request) for request in bearer.requests if request.path != "/token"} <= {"-", "token"}
    in_its_place(bearer, BOB)


@pytest.mark.parametrize("second", [BOB, ALICE], ids=["of-two-users", "of-one-user"])
async def test_t07_two_upstreams_with_one_token_server_share_no_token(
    registry: ScriptedRegistry, other: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, second: Account
) -> None:
    """The same realm, service and repository: still each has a token of its own."""
    rights = Rights([ALICE, BOB])
    registry.require_rights(rights)
    other.require_token(realm=f"{registry.url}/token", tokens=registry.tokens)
    secrets = [secret(tmp_path / "config.json", ("a.test", ALICE), ("b.test", second))]
    sections = [
        upstream(registry, "a.test", access=SHARED),
        upstream(other, "b.test", access=SHARED, tokenHosts=[registry.host]),
    ]
    cache = await start_cache(*sections, imagePullSecrets=secrets)
    for server, name in ((registry, "a.test"), (other, "b.test")) * 2:
        path = blob(server, os.urandom(8)).replace("/v2/", f"/v2/{name}/")
        assert (await cache.get(path)).status == 200
    assert shown(asked(registry)) == [ALICE.user, second.user]
    for_the_first, for_the_second = registry.tokens.ever
    assert not other.heard(for_the_first)
    assert not registry.heard(for_the_second)


async def test_t07_a_clients_credential_is_for_the_upstream_of_its_request_alone(
    registry: ScriptedRegistry, other: ScriptedRegistry, start_cache: StartCache, tmp_path: Path
) -> None:
    """Beside one of ``verify`` there are a public one, and one with a secret of the cache: they never hear of it."""
    registry.require_rights(Rights([ALICE]))
    other.require_rights(Rights([BOB], public=("open/*",)), "Basic")
    cache = await start_cache(
        upstream(registry, "verify.test", access="verify"),
        upstream(other, "public.test"),
        upstream(other, "shared.test", access=SHARED),
        externalURL="http://127.0.0.1:5000",
        imagePullSecrets=[secret(tmp_path / "config.json", ("shared.test", BOB))],
    )
    mine, theirs = blob(registry), blob(other)
    public = f"/v2/public.test/open/app/blobs/{other.add_blob('open/app', b'public')}"
    for way in ("verify", "handle", "refresh"):
        shows = await shown_to(cache, way)
        assert (await cache.get(mine.replace("/v2/", "/v2/verify.test/"), shows)).status == 200
        assert (await cache.get(theirs.replace("/v2/", "/v2/shared.test/"), shows)).status == 200
        assert (await cache.get(public, shows)).status == 200
        assert (await cache.get(theirs.replace("/v2/", "/v2/public.test/"), shows)).status == 403
    assert hears(registry)
    assert not hears(registry, BOB)
    assert not hears(other, ALICE, registry.tokens.ever)
    assert set(shown(other.requests)) == {"-", BOB.user}


# --- T08: for whom a secret is ---


async def test_t08_look_alikes_get_nothing(start_cache: StartCache, tmp_path: Path) -> None:
    names = [
        "example.test",
        "evil-example.test",
        "example.test.evil",
        "example.test:444",
        "example.test:443",
        "a.example.test",
        "example.tes",
        "example.testt",
        "127.0.0.1:5999",
    ]
    async with AsyncExitStack() as stack:
        servers = {name: await stack.enter_async_context(ScriptedRegistry()) for name in names}
        for server in servers.values():
            server.require_rights(Rights([ALICE]), "Basic")
        sections = [upstream(server, name, access=SHARED) for name, server in servers.items()]
        cache = await start_cache(*sections, imagePullSecrets=[secret(tmp_path / "c.json", ("example.test", ALICE))])
        for name, server in servers.items():
            path = blob(server).replace("/v2/", f"/v2/{name.replace(':', '_')}/")
            answers = [await cache.get(path)]
            if answers[0].status == 404:  # a port is written in another way in a path
                answers = [await cache.get(f"{blob(server)}?ns={name}")]
            assert answers[0].status == (200 if name == "example.test" else 403), name
            assert hears(server) == (name == "example.test")
            assert server.heard("Authorization") == (name == "example.test")
            assert server.requests


C, D = Account("carol", "c4rol"), Account("dave", "d4ve")
Sources = list[dict[str, Account]]

MATCHING = [
    pytest.param([{"registry.example.test": ALICE}], "registry.example.test", REPO, "alice", id="host"),
    pytest.param([{"https://registry.example.test/v1/": ALICE}], "registry.example.test", REPO, "alice", id="v1"),
    pytest.param([{"http://registry.example.test/v2/": ALICE}], "registry.example.test", REPO, "alice", id="v2"),
    pytest.param([{"*.example.test": ALICE}], "registry.example.test", REPO, "alice", id="glob"),
    pytest.param([{"reg*.exa[l-n]ple.test": ALICE}], "registry.example.test", REPO, "alice", id="glob-within-labels"),
    pytest.param([{"*.test": ALICE}], "registry.example.test", REPO, "-", id="glob-is-one-label"),
    pytest.param([{"*": ALICE}], "registry.example.test", REPO, "-", id="star"),
    pytest.param([{"example.test": ALICE}], "registry.example.test", REPO, "-", id="parent-domain"),
    pytest.param([{"Registry.example.test": ALICE}], "registry.example.test", REPO, "-", id="case"),
    pytest.param([{"registry.example.test:443": ALICE}], "registry.example.test", REPO, "-", id="port-443-is-another"),
    pytest.param([{"registry.example.test": ALICE}], "registry.example.test:5000", REPO, "-", id="no-port-is-another"),
    pytest.param([{"registry.example.test:5000": ALICE}], "registry.example.test:5000", REPO, "alice", id="port"),
    pytest.param([{"*.example.test:5000": ALICE}], "registry.example.test:5000", REPO, "alice", id="glob-and-port"),
    pytest.param([{"r.test/team/": ALICE}], "r.test", "team/app", "alice", id="path"),
    pytest.param([{"r.test/team/": ALICE}], "r.test", "teams/app", "-", id="another-path"),
    pytest.param([{"r.test/team": ALICE}], "r.test", "team-b/app", "alice", id="path-is-a-prefix-of-text"),
    pytest.param([{"r.test/team/*": ALICE}], "r.test", "team/app", "-", id="no-glob-in-a-path"),
    pytest.param([{"r.test": ALICE, "r.test/team": BOB, "*.test": C}], "r.test", REPO, "bob alice carol", id="longer-first"),
    pytest.param([{"r.test": ALICE}, {"r.test": BOB}, {"r.test": C}], "r.test", REPO, "alice bob carol", id="sources"),
    pytest.param(
        [{"https://r.test/v2/": C, "r.test": ALICE}, {"http://r.test": BOB}, {"r.test/x": D}],
        "r.test",
        REPO,
        "carol alice bob",
        id="one-key-in-three-forms",
    ),
    pytest.param([{"r.test": ALICE}, {"r.test/": ALICE}], "r.test", REPO, "alice", id="twice-the-same"),
    pytest.param([{}], "r.test", REPO, "-", id="none"),
    pytest.param([{"https://index.docker.io/v1/": ALICE}], "docker.io", REPO, "alice", id="hub"),
    pytest.param([{"index.docker.io": ALICE}], "docker.io", REPO, "alice", id="hub-index"),
    pytest.param([{"docker.io": ALICE}], "docker.io", REPO, "alice", id="hub-name"),
    pytest.param([{"docker.io": ALICE, "https://index.docker.io/v1/": BOB}], "docker.io", REPO, "alice", id="hub-hides"),
    pytest.param([{"docker.io/lib": C, "https://index.docker.io/v1/": BOB}], "docker.io", REPO, "bob", id="hub-other-path"),
    pytest.param([{"https://index.docker.io/v1": ALICE}], "docker.io", REPO, "-", id="hub-without-its-slash"),
    pytest.param([{"registry-1.docker.io": ALICE}], "docker.io", REPO, "-", id="hub-api-host"),
    pytest.param([{"auth.docker.io": ALICE, "hub.docker.com": ALICE}], "docker.io", REPO, "-", id="hub-other-hosts"),
    pytest.param([{"https://index.docker.io/v1/": ALICE}], "r.test", REPO, "-", id="hub-is-no-default"),
]


@schemes
@pytest.mark.parametrize(("sources", "name", "repo", "expected"), MATCHING)
async def test_t08_secrets_are_tried_as_the_kubelet_tries_them(
    registry: ScriptedRegistry,
    start_cache: StartCache,
    tmp_path: Path,
    sources: Sources,
    name: str,
    repo: str,
    expected: str,
    scheme: Scheme,
) -> None:
    """In its order (``pkg/credentialprovider/keyring.go``); none is right, and nothing is asked anonymously after one; where
    none matches, there is one anonymous attempt."""
    registry.require_rights(Rights([Account("nobody", "knows")]), scheme)
    secrets = [secret(tmp_path / f"{number}.json", *keys.items()) for number, keys in enumerate(sources)]
    cache = await start_cache(upstream(registry, name, access=SHARED), imagePullSecrets=secrets)
    digest = registry.add_blob(repo, b"layer")
    assert (await cache.get(f"/v2/{repo}/blobs/{digest}")).status == 403
    if scheme == "Bearer":
        assert " ".join(shown(asked(registry))) == expected
        return
    first, *tried = shown(registry.requests)
    assert first == "-", "the challenge has to be heard"
    assert " ".join(tried or ["-"]) == expected


@schemes
async def test_t08_of_several_secrets_the_one_that_works_is_found_and_the_others_are_not_tried_again(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, scheme: Scheme
) -> None:
    """Neither one that is wrong nor one that is right elsewhere."""
    registry.require_rights(Rights([BOB, Account(D.user, D.password, may_read=("other/*",))]), scheme)
    secrets = [secret(tmp_path / f"{account.user}.json", (UPSTREAM, account)) for account in (ALICE, D, BOB, C)]
    cache = await start_cache(upstream(registry, access=SHARED), imagePullSecrets=secrets)
    for path in blobs(registry, 5):
        assert (await cache.get(path)).status == 200
    tried = [user for user in shown(registry.requests) if user not in ("-", "token")]
    assert [*dict.fromkeys(tried)] == [ALICE.user, D.user, BOB.user]
    assert set(tried[tried.index(BOB.user) :]) == {BOB.user}
    assert not registry.heard(C.user)


@schemes
async def test_t08_an_entry_kept_for_some_repositories_is_used_for_them_alone(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, scheme: Scheme
) -> None:
    registry.require_rights(Rights([Account(ALICE.user, ALICE.password)]), scheme)
    source = secret(tmp_path / "config.json", (UPSTREAM, ALICE)) | {"repositories": [f"{UPSTREAM}/team/*"]}
    cache = await start_cache(upstream(registry, access=SHARED), imagePullSecrets=[source])
    for repo, code in (("other/app", 403), ("teams/app", 403)):
        assert (await cache.get(f"/v2/{repo}/blobs/{registry.add_blob(repo, b'1')}")).status == code
    assert not hears(registry)
    assert (await cache.get(blob(registry))).status == 200
    assert hears(registry)


@schemes
async def test_t08_a_404_to_the_first_secret_does_not_keep_the_second_from_being_tried(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, scheme: Scheme
) -> None:
    """The kubelet tries the next one after any failure (``kuberuntime_image.go``). Some registries can be set to hide what
    one may not read behind a 404."""
    registry.require_rights(Rights([ALICE, BOB]), scheme)
    by_alice: set[str] = set()

    def hide(request: Request) -> Answer:
        if request.path == "/token":
            answer = registry.truth(request)
            if who(request) == ALICE.user:
                by_alice.add(registry.tokens.ever[-1])
            return answer
        is_alice = who(request) == ALICE.user or (request.headers.get("Authorization") or "")[7:] in by_alice
        return oci_error(404, "NAME_UNKNOWN") if is_alice else registry.truth(request)

    registry.script("*", lambda _: True, hide, forever=True)
    secrets = [secret(tmp_path / f"{account.user}.json", (UPSTREAM, account)) for account in (ALICE, BOB)]
    cache = await start_cache(upstream(registry, access=SHARED), imagePullSecrets=secrets)
    assert (await cache.get(blob(registry))).status == 200


# --- several endpoints ---


def mirrored(mirror: ScriptedRegistry, registry: ScriptedRegistry, **keys: Any) -> dict[str, Any]:
    """A mirror first, and the registry itself last."""
    return upstream(registry, endpoints=[mirror.url, registry.url], **keys)


@stakes
@pytest.mark.parametrize("demand", ["Basic", "own-realm", "realm-of-the-registry", "shared-token-host"])
async def test_a_mirror_before_the_registry_never_gets_the_credential_for_the_registry(
    registry: ScriptedRegistry,
    other: ScriptedRegistry,
    start_cache: StartCache,
    tmp_path: Path,
    way: Way,
    demand: str,
    scheme: Scheme,
) -> None:
    """Nor a token that was got with it; whatever the mirror asks for."""
    rights = guard(registry, way, scheme)
    tokens = registry.tokens = RightsTokenServer(rights) if scheme == "Basic" else registry.tokens
    keys: dict[str, Any] = {"tokenHosts": [registry.host]} if demand == "shared-token-host" else {}
    if demand == "Basic":
        other.require_basic(ALICE.user, ALICE.password)
    else:
        other.require_token(realm=f"{(other if demand == 'own-realm' else registry).url}/token", tokens=tokens)
    other.add_image(REPO, "1", [b"layer"])
    registry.add_image(REPO, "1", [b"layer"])
    held = await stake(start_cache, tmp_path, way, mirrored(other, registry, **keys))
    for path in (TAG, blob(registry), blob(registry, b"second"), f"/v2/{REPO}/tags/list"):
        assert (await held.get(path)).status == 200
    assert hears(registry), "it was the registry that gave it"
    assert bool(other.requests) == (way in ("shared", "identity", "public")), "a client's own is for the registry alone"
    assert not hears(other)
    if way != "public":  # else a token that was given to anybody is good, too
        assert not any(other.heard(token) for token in tokens.ever if tokens.allows(token, SCOPE))
    assert set(shown(other.requests)) <= {"-", "token"}  # a token that is good for nothing, given to anybody


@pytest.mark.parametrize("way", ["verify", "handle", "refresh"])
async def test_a_clients_credential_goes_past_a_mirror_that_would_give_everything(
    registry: ScriptedRegistry, other: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way
) -> None:
    """It refuses the anonymous, and would take any Basic."""
    guard(registry, way)
    other.script(
        "*",
        lambda request: True,
        lambda request: other.truth(request) if proves(request) else unauthorized(['Basic realm="give me"']),
        forever=True,
    )
    registry.add_image(REPO, "1", [b"layer"])
    other.add_image(REPO, "1", [b"layer"])
    held = await stake(start_cache, tmp_path, way, mirrored(other, registry))
    assert (await held.get(TAG)).status == (await held.get(blob(registry))).status == 200
    assert set(shown(other.requests)) <= {"-"}
    assert not hears(other)


@schemes
@pytest.mark.parametrize("both", [True, False])
async def test_a_mirror_with_an_entry_of_its_own_gets_that_one(
    registry: ScriptedRegistry, other: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, scheme: Scheme, both: bool
) -> None:
    """Beside that of the registry, or where the registry gives to everybody."""
    registry.require_rights(Rights([ALICE], public=() if both else ("team/*",)), scheme)
    other.require_rights(Rights([BOB]), scheme)
    at_both, only_here = blob(other), blob(registry, b"at the registry")
    blob(registry)
    entries = [(other.host, BOB), *([(UPSTREAM, ALICE)] if both else [])]
    secrets = [secret(tmp_path / "config.json", *entries)]
    cache = await start_cache(mirrored(other, registry, access=SHARED), imagePullSecrets=secrets)
    assert (await cache.get(at_both)).status == 200
    assert (await cache.get(only_here)).status == 200
    assert not registry.seen("GET", at_both), "it came from the mirror"
    assert hears(other, BOB)
    assert not hears(other, ALICE, registry.tokens.ever)
    assert not hears(registry, BOB, other.tokens.ever)
    assert hears(registry, ALICE) == both


@schemes
async def test_a_registry_that_fails_does_not_send_its_credential_to_the_mirror(
    registry: ScriptedRegistry, other: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, scheme: Scheme
) -> None:
    """Whichever of them rests, and in whatever order they are asked then."""
    registry.require_rights(Rights([ALICE]), scheme)
    other.require_rights(Rights([ALICE]), scheme)
    quick = {"connect": "300ms", "headers": "300ms", "head": "300ms", "token": "300ms", "endpoint": "200ms"}
    secrets = [secret(tmp_path / "config.json", (UPSTREAM, ALICE))]
    cache = await start_cache(mirrored(other, registry, access=SHARED, timeouts=quick), imagePullSecrets=secrets)
    paths = iter(blobs(registry, 12))
    for number in range(3):
        assert (await cache.get(next(paths))).status == 200
        failing = registry.script("*", lambda request: True, status(503), forever=True)
        assert (await cache.get(next(paths))).status >= 400
        failing.cancel()
        also = other.script("*", lambda request: True, status(503), forever=True)
        await cache.get(next(paths))
        also.cancel()
        assert other.requests, number
    assert not hears(other)
    assert not other.heard("Authorization: Basic")


# --- T12: the environment ---


@schemes
@pytest.mark.parametrize("way", ["shared", "verify"])
async def test_t12_the_environment_neither_leads_a_credential_elsewhere_nor_replaces_it(
    registry: ScriptedRegistry,
    start_cache: StartCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: Way,
    scheme: Scheme,
) -> None:
    """Nor do ``~/.netrc`` and ``~/.docker/config.json``, which nobody has named."""
    netrc = tmp_path / ".netrc"
    netrc.write_text(f"machine 127.0.0.1 login {BOB.user} password {BOB.password}\n")
    netrc.chmod(0o600)
    (tmp_path / ".docker").mkdir()
    secret(tmp_path / ".docker" / "config.json", (UPSTREAM, BOB), (registry.host, BOB))
    for name, value in (("NETRC", netrc), ("HOME", tmp_path), ("DOCKER_CONFIG", tmp_path / ".docker")):
        monkeypatch.setenv(name, str(value))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    guard(registry, way, scheme)
    async with Sink() as sink:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, sink.url)
        held = await stake(start_cache, tmp_path, way, upstream(registry))
        assert (await held.get(blob(registry))).status == 200
        assert sink.silent
    assert hears(registry)
    assert not hears(registry, BOB)
    assert not registry.heard(BOB.user)


# --- T13: TLS ---

FLAWS = ["expired", "self_signed", "wrong_name", "foreign", "outdated"]


@schemes
@pytest.mark.parametrize("flaw", [*FLAWS, "plain"])
@pytest.mark.parametrize("way", ["shared", "verify"])
async def test_t13_a_server_that_cannot_prove_its_name_is_shown_nothing(
    start_cache: StartCache, tmp_path: Path, ca: Authority, way: Way, flaw: str, scheme: Scheme
) -> None:
    """It has taken the place of one whose challenge is known, to which the credential would be shown unasked."""
    quick = {"connect": "500ms", "headers": "1s"}
    async with ScriptedRegistry(ssl=ca.good()) as registry:
        guard(registry, way, scheme)
        first, path = blobs(registry, 2)
        held = await stake(start_cache, tmp_path, way, upstream(registry, caFile=str(ca.ca_path), timeouts=quick))
        assert (await held.get(first)).status == 200
        assert hears(registry)
    context = None if flaw == "plain" else getattr(ca, flaw)()
    async with ScriptedRegistry(ssl=context, port=registry.port) as impostor:
        guard(impostor, way, scheme)
        blobs(impostor, 2)
        answer = await held.get(path)
        assert answer.status == 503
        assert UPSTREAM in message(answer)
        assert impostor.connections >= 1
        assert impostor.requests == []


@pytest.mark.parametrize("flaw", [*FLAWS, "plain"])
@pytest.mark.parametrize("way", ["shared", "identity", "verify"])
async def test_t13_a_token_server_that_cannot_prove_its_name_is_shown_nothing(
    start_cache: StartCache, tmp_path: Path, ca: Authority, way: Way, flaw: str
) -> None:
    context = None if flaw == "plain" else getattr(ca, flaw)()
    quick = {"connect": "500ms", "headers": "1s", "token": "1s"}
    async with ScriptedRegistry(ssl=ca.good()) as registry, ScriptedRegistry(ssl=context) as auth:
        registry.require_token(realm=f"https://{auth.host}/token", tokens=auth.tokens)
        section = upstream(registry, caFile=str(ca.ca_path), timeouts=quick, tokenHosts=[auth.host])
        held = await stake(start_cache, tmp_path, way, section)
        assert (await held.get(blob(registry))).status == 503
        assert auth.connections >= 1
        assert auth.requests == []
        assert not hears(registry)


# --- the token flow: distribution spec/auth/token.md and oauth.md ---

LINES = [
    pytest.param(['Basic realm="x"', 'Bearer realm="{realm}",service="s"'], id="two-lines"),
    pytest.param(['Bearer realm="{realm}",service="s"', 'Basic realm="x"'], id="two-lines-bearer-first"),
    pytest.param(['Basic realm="x", Bearer realm="{realm}", service="s"'], id="one-line"),
    pytest.param(['Bearer realm="{realm}", service="s", Basic realm="x"'], id="one-line-bearer-first"),
    pytest.param(['Negotiate, Basic realm="a, Bearer realm=b", Bearer service="s" , realm="{realm}"'], id="quoted-comma"),
    pytest.param(["NTLM", "Negotiate dG9rZW4=", 'bEARER REALM="{realm}",Service="s"'], id="case"),
    pytest.param(['Bearer realm="{realm}",service=s,error="invalid_token"'], id="bare"),
    pytest.param(['Digest realm="x", nonce="y"', 'Bearer realm="{realm}",service="s",scope="a:b:c d"'], id="digest"),
]


@pytest.mark.parametrize("lines", LINES)
@pytest.mark.parametrize("way", ["shared", "identity", "verify"])
async def test_bearer_is_preferred_however_the_challenges_are_written(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way, lines: list[str]
) -> None:
    """So the password goes to the token server and never to the registry, which would have taken it."""
    guard(registry, way)
    path = blob(registry)
    refusal = unauthorized([line.format(realm=f"{registry.url}/token") for line in lines])
    tokens = registry.tokens
    registry.open_to_all()

    def answer(request: Request) -> Any:
        token = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
        return registry.truth(request) if tokens.allows(token, SCOPE) else refusal

    registry.script("*", path, answer, forever=True)
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    assert (await held.get(path)).status == 200
    in_its_place(registry)
    assert hears(asked(registry))


@pytest.mark.parametrize("key", ["token", "access_token", "both"])
@pytest.mark.parametrize("way", ["shared", "identity"])
async def test_a_token_is_found_under_either_name(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way, key: str
) -> None:
    guard(registry, way)
    registry.tokens.issue([SCOPE], "good")
    document = {"token": "good", "access_token": "good"} if key == "both" else {key: "good"}
    registry.script("*", "/token", as_json(document), forever=True)
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    assert (await held.get(blob(registry))).status == 200
    assert {request.headers.get("Authorization") for request in registry.seen("GET", blob(registry))} == {"Bearer good"}


@pytest.mark.parametrize(("stated", "life"), [(None, 60), (10, 60), (100, 100), (3600, 3600), (1_000_000, 3600)])
@pytest.mark.parametrize("way", ["shared", "identity"])
async def test_a_token_is_renewed_before_its_end(
    registry: ScriptedRegistry,
    start_cache: StartCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: Way,
    stated: int | None,
    life: int,
) -> None:
    """When 80 % of its life are over; a minute is the least, and what is meant where none is stated; an hour the most."""
    forward = clock(monkeypatch)
    guard(registry, way)
    tokens = registry.tokens

    def give(request: Request) -> Any:
        document = {"token": tokens.issue([SCOPE])}
        return as_json(document | ({} if stated is None else {"expires_in": stated}))

    registry.script("*", "/token", give, forever=True)
    held = await stake(start_cache, tmp_path, way, upstream(registry, access={**SHARED, "maxAge": "24h"}))
    paths = iter(blobs(registry, 4))
    assert (await held.get(next(paths))).status == 200
    forward(life * 0.8 - 5)
    assert (await held.get(next(paths))).status == 200
    assert len(asked(registry)) == 1
    forward(6)
    assert (await held.get(next(paths))).status == 200
    assert len(asked(registry)) == 2


@pytest.mark.parametrize("way", ["shared", "identity", "public", "verify"])
async def test_a_token_that_is_refused_is_replaced_once(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way
) -> None:
    guard(registry, way)
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    first, second, third = blobs(registry, 3)
    registry.add_image(REPO, "1", [b"layer"])
    assert [(await held.get(path)).status for path in (TAG, first)] == [200, 200]
    registry.tokens.revoke()
    before = len(registry.requests)
    assert (await held.get(second)).status == 200
    later = registry.requests[before:]
    assert shown(request for request in later if request.path == second) == ["token", "token"]
    assert len([request for request in later if request.path == "/token"]) == 1
    assert (await held.get(third)).status == 200
    assert shown(registry.seen(path=third)) == ["token"]


@pytest.mark.parametrize("way", ["shared", "identity", "verify"])
async def test_a_registry_that_takes_no_token_gets_one_fresh_one_and_then_no_more(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way
) -> None:
    guard(registry, way)
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    assert (await held.get(blob(registry, b"first"))).status == 200
    registry.require_token(realm=f"{registry.url}/token", tokens=RightsTokenServer(Rights([ALICE])))  # not those it gives
    before = len(asked(registry))
    for path in blobs(registry, 5):
        assert (await held.get(path)).status in (401, 403, 502)
    assert len([request for request in asked(registry)[before:] if proves(request)]) <= 1
    in_its_place(registry)


async def test_a_registry_that_calls_fresh_tokens_invalid_takes_nothing_from_the_clients(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clock or key and that of its token server have drifted apart: no word on who may read (RFC 6750 section 3.1 has
    ``insufficient_scope`` for that)."""
    forward = clock(monkeypatch)
    guard(registry, "shared")
    held = await stake(start_cache, tmp_path, "shared", upstream(registry))
    path = blob(registry)
    assert (await held.get(path)).status == 200
    await held.cache.settled()
    forward(3600)
    challenge = f'Bearer realm="{registry.url}/token",service="registry.test",scope="x",error="invalid_token"'
    broken = registry.script("*", lambda request: request.path != "/token", unauthorized([challenge]), forever=True)
    assert (await held.get(path)).status == 200, "what is held is served"
    broken.cancel()
    forward(11)
    assert (await held.get(blob(registry, b"new"))).status == 200


@pytest.mark.parametrize("way", ["shared", "identity", "verify"])
async def test_an_insufficient_scope_is_a_refusal_and_no_reason_to_ask_again(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way
) -> None:
    """A token server may grant less than was asked for, and not say so."""
    guard(registry, way)
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    path = f"/v2/secret/app/blobs/{registry.add_blob('secret/app', b'layer')}"
    for _ in range(5):
        answer = await held.get(path)
        assert answer.status in (401, 403)
        assert "secret/app" in message(answer) or UPSTREAM in message(answer)
    # one of which the challenge was known already is replaced by a fresh one, once
    assert len([request for request in asked(registry) if proves(request)]) <= 2
    assert len(registry.seen(path=path)) <= 4
    in_its_place(registry)


@pytest.mark.parametrize("code", [400, 401, 403, 404, 405, 500])
@pytest.mark.parametrize("way", ["identity", "refresh"])
async def test_an_identity_token_is_tried_by_post_alone(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way, code: int
) -> None:
    """Where that is not offered, it is neither put in a header nor in an address."""
    guard(registry, way)
    registry.script("POST", "/token", oci_error(code, "UNSUPPORTED"), forever=True)
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    for path in blobs(registry, 3):
        assert (await held.get(path)).status in (401, 403, 502)
    (sent,) = registry.seen("POST")
    assert sent.path == "/token"
    assert _form(sent)["refresh_token"] == [ALICE.identity_token]
    assert sent.headers.get("Content-Type") == "application/x-www-form-urlencoded"
    in_its_place(registry)


@pytest.mark.parametrize("way", ["identity", "refresh"])
async def test_an_identity_token_is_no_answer_to_basic(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way
) -> None:
    registry.require_rights(Rights([ALICE]), "Basic")
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    assert (await held.get(blob(registry))).status in (401, 403)
    assert set(shown(registry.requests)) == {"-"}
    assert not hears(registry)


@pytest.mark.parametrize("way", ["shared", "identity", "verify"])
async def test_the_query_of_a_realm_is_kept(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, way: Way
) -> None:
    guard(registry, way)
    registry.require_token(realm=f"{registry.url}/token?tenant=a%20b&service=x", tokens=registry.tokens)
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    assert (await held.get(blob(registry))).status == 200
    for request in asked(registry):
        assert request.params["tenant"] == ["a b"]
        fields = _form(request) if request.method == "POST" else request.params
        assert fields["service"] == ["registry.test"]
        assert fields["scope"] == [SCOPE]
    in_its_place(registry)


# --- public, with a secret for its quota ---


def proofs(registry: ScriptedRegistry, repo: str = REPO) -> list[Request]:
    """The requests by which it was found out whether a repository is public."""
    return [request for request in registry.requests if request.method == "HEAD" and f"/v2/{repo}/" in request.path]


async def quota(registry: ScriptedRegistry, start_cache: StartCache, folder: Path, *held: Account, **access: Any) -> Any:
    """A cache before a public upstream with that secret."""
    secrets = [secret(folder / "config.json", (UPSTREAM, account)) for account in held or (ALICE,)]
    return await start_cache(upstream(registry, access={"mode": "public", **access}), imagePullSecrets=secrets)


async def test_public_is_proved_once_without_the_secret_and_pulled_with_it(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again once ``publicFor`` is over. HEAD is not counted on Docker Hub, and the quota is that of who asks by GET."""
    forward = clock(monkeypatch)
    registry.require_rights(Rights([ALICE], public=("team/*",)))
    cache = await quota(registry, start_cache, tmp_path, publicFor="10m")
    paths = blobs(registry, 20)
    registry.add_image(REPO, "1", [b"layer"])
    assert (await cache.get(TAG)).status == 200
    crowd = await asyncio.gather(*(cache.get(paths[0]) for _ in range(10)))
    more = await asyncio.gather(*map(cache.get, paths[1:15]))
    assert {answer.status for answer in (*crowd, *more)} == {200}
    first = proofs(registry)
    assert len({request.path for request in first}) == 1, "one thing was asked for"
    good = [request for request in first if registry.tokens.allows(_token(request), SCOPE)]
    assert len(good) == 1
    anonymous, secret_one = _tokens_by_asker(registry)
    assert _token(good[0]) in anonymous
    for path in paths[:15]:
        (*_, last) = registry.seen("GET", path)
        assert _token(last) in secret_one
    forward(601)
    for path in (TAG, *paths[15:]):
        assert (await cache.get(path)).status == 200
    again = proofs(registry)[len(first) :]
    assert len({request.path for request in again}) == 1
    assert not {_token(request) for request in again} & secret_one


def _token(request: Request) -> str:
    return (request.headers.get("Authorization") or "").removeprefix("Bearer ")


def _tokens_by_asker(registry: ScriptedRegistry) -> tuple[set[str], set[str]]:
    """The tokens that were given to anybody, and to those who showed who they are."""
    given: tuple[set[str], set[str]] = (set(), set())
    for request, token in zip(asked(registry), registry.tokens.ever, strict=True):
        given[proves(request)].add(token)
    return given


async def test_public_at_a_registry_with_basic_the_secret_is_shown_where_it_is_asked_for(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path
) -> None:
    """One that lets everybody look by HEAD, and has GETs on somebody's account."""
    paths = blobs(registry, 3)
    registry.script(
        "GET",
        lambda request: request.path in paths,
        lambda request: registry.truth(request) if who(request) == ALICE.user else unauthorized(['Basic realm="x"']),
        forever=True,
    )
    cache = await quota(registry, start_cache, tmp_path)
    for path in paths:
        assert (await cache.get(path)).status == 200
    assert shown(proofs(registry)) == ["-", "-", "-"], "a blob that is not held proves nothing of the next one"
    assert shown(registry.seen("GET")) == ["-", "alice", "alice", "alice"]


@schemes
@pytest.mark.parametrize(
    "kind", ["GET tag", "HEAD tag", "GET manifest", "GET blob", "HEAD blob", "GET tags", "GET referrers"]
)
async def test_public_a_repository_that_the_secret_alone_opens_is_refused(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, scheme: Scheme, kind: str
) -> None:
    registry.require_rights(Rights([ALICE], public=("open/*",)), scheme)
    image = registry.add_image(REPO, "1", [b"layer"])
    registry.add_image("open/app", "1", [b"layer"])
    cache = await quota(registry, start_cache, tmp_path)
    assert (await cache.get("/v2/open/app/manifests/1")).status == 200
    before = len(registry.requests)
    method, _, what = kind.partition(" ")
    path = {
        "tag": TAG,
        "manifest": f"/v2/{REPO}/manifests/{image.digest}",
        "blob": f"/v2/{REPO}/blobs/{image.layer_digests[0]}",
        "tags": f"/v2/{REPO}/tags/list",
        "referrers": f"/v2/{REPO}/referrers/{image.digest}",
    }[what]
    for _ in range(3):
        answer = await (cache.get if method == "GET" else cache.head)(path)
        assert answer.status == 403
        assert b"layer" not in answer.body
    assert set(shown(registry.requests[before:])) <= {"-", "token"}
    assert not hears(registry.requests[before:])


@pytest.mark.parametrize("identity", [True, False])
async def test_public_a_wrong_secret_spoils_no_pull(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, identity: bool
) -> None:
    """Nor is it sent with each: the token server's no holds for a while."""
    registry.require_rights(Rights([BOB], public=("team/*",)))
    secrets = [secret(tmp_path / "config.json", (UPSTREAM, ALICE), identity=identity)]
    cache = await start_cache(upstream(registry, access="public"), imagePullSecrets=secrets)
    registry.add_image(REPO, "1", [b"layer"])
    for path in (TAG, *blobs(registry, 10), TAG, f"/v2/{REPO}/tags/list"):
        assert (await cache.get(path)).status == 200
    assert len([request for request in asked(registry) if proves(request)]) == 1
    in_its_place(registry)


async def test_public_a_wrong_secret_spoils_no_pull_from_a_registry_with_basic(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path
) -> None:
    """One that refuses wrong passwords, and gives to everybody who shows none."""
    registry.require_rights(Rights([BOB], public=("team/*",)), "Basic")
    cache = await quota(registry, start_cache, tmp_path)
    for path in blobs(registry, 5):
        assert (await cache.get(path)).status == 200
    # and once a GET was challenged: the secret is refused, and without it the pull goes on
    first, *rest = blobs(registry, 4, "challenged")
    registry.script("GET", first, unauthorized(['Basic realm="x"']))
    for path in (first, *rest):
        assert (await cache.get(path)).status == 200
    assert hears(registry)


async def test_public_a_secret_without_the_right_spoils_no_pull(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path
) -> None:
    """Docker Hub gives every account a token, some for less."""
    registry.require_rights(Rights([ALICE]))
    tokens = registry.tokens

    def give(request: Request) -> Any:
        return as_json({"token": tokens.issue([] if proves(request) else [SCOPE]), "expires_in": 300})

    registry.script("GET", "/token", give, forever=True)
    cache = await quota(registry, start_cache, tmp_path)
    for path in blobs(registry, 5):
        assert (await cache.get(path)).status == 200
    assert len([request for request in asked(registry) if proves(request)]) <= 2, "no storm"


# --- helpers and plugins ---


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def program(folder: Path, name: str, script: str) -> Path:
    """A shell script that first notes down its arguments and input; the notes."""
    notes = folder / f"{name}.notes"
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$$ $1 $(cat)" >> {notes}\n{script}\n')
    path.chmod(0o755)
    return notes


def says(document: object) -> str:
    """A line of a script that answers with this."""
    return f"cat <<'E'\n{json.dumps(document)}\nE"


def helper_answer(account: Account, *, identity: bool = False) -> str:
    """What a credential helper that has this says."""
    if identity:
        return says({"ServerURL": UPSTREAM, "Username": "<token>", "Secret": account.identity_token})
    return says({"ServerURL": UPSTREAM, "Username": account.user, "Secret": account.password})


@pytest.mark.parametrize("identity", [True, False])
@pytest.mark.parametrize("way", ["credHelpers", "credsStore"])
async def test_a_credential_helper_is_asked_and_what_it_has_is_used(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, programs: Path, way: str, identity: bool
) -> None:
    registry.require_rights(Rights([ALICE]))
    answer = helper_answer(ALICE, identity=identity)
    listing = says({UPSTREAM: ALICE.user})
    notes = program(programs, "docker-credential-vault", f'if [ "$1" = list ]; then\n{listing}\nelse\n{answer}\nfi')
    config = {"credHelpers": {UPSTREAM: "vault"}} if way == "credHelpers" else {"credsStore": "vault"}
    cache = await start_cache(
        upstream(registry, access=SHARED), imagePullSecrets=[write_secret(tmp_path / "config.json", config)]
    )
    answers = await asyncio.gather(*map(cache.get, blobs(registry, 10)))
    assert {each.status for each in answers} == {200}
    in_its_place(registry)
    assert shown(asked(registry))[0] == ("refresh" if identity else ALICE.user)
    calls = [line.split(" ", 1)[1] for line in notes.read_text().splitlines()]
    assert calls.count(f"get {UPSTREAM}") == 1, "one run for all"


def provider_config(folder: Path, name: str, *images: str) -> dict[str, str]:
    """The section for one plugin."""
    path = folder / "providers.yaml"
    provider = {
        "name": name,
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "matchImages": list(images),
        "defaultCacheDuration": "1h",
    }
    path.write_text(
        json.dumps({"kind": "CredentialProviderConfig", "apiVersion": "kubelet.config.k8s.io/v1", "providers": [provider]})
    )
    return {"configFile": str(path), "binDirectory": str(folder)}


def provider_answer(auth: dict[str, Account], version: str = "v1") -> str:
    """What a plugin that has this says."""
    return says(
        {
            "kind": "CredentialProviderResponse",
            "apiVersion": f"credentialprovider.kubelet.k8s.io/{version}",
            "cacheKeyType": "Registry",
            "auth": {key: {"username": account.user, "password": account.password} for key, account in auth.items()},
        }
    )


@schemes
async def test_a_provider_plugin_is_asked_and_what_it_has_is_used(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, programs: Path, scheme: Scheme
) -> None:
    registry.require_rights(Rights([ALICE]), scheme)
    notes = program(programs, "ecr", provider_answer({"*.test": ALICE, "other.test": BOB}))
    provider = provider_config(programs, "ecr", "*.test")
    cache = await start_cache(upstream(registry, access=SHARED), imageCredentialProvider=provider)
    answers = await asyncio.gather(*map(cache.get, blobs(registry, 10)))
    assert {each.status for each in answers} == {200}
    assert hears(registry)
    assert not hears(registry, BOB)
    (call,) = notes.read_text().splitlines()
    request = json.loads(call[call.index("{") :])
    assert request["image"] == f"{UPSTREAM}/{REPO}"
    assert (request["kind"], request["apiVersion"]) == (
        "CredentialProviderRequest",
        "credentialprovider.kubelet.k8s.io/v1",
    )


FAILURES = [
    pytest.param("exit 1", id="exit-1"),
    pytest.param(f"echo {ALICE.password}; exit 1", id="tells-and-fails"),
    pytest.param("echo '{\"Username\": 1}'", id="not-what-is-wanted"),
    pytest.param(f'echo "<html>{ALICE.password}"', id="junk"),
    pytest.param("yes c4n4ry | head -c 10000000", id="endless"),
    pytest.param("kill -9 $$", id="killed"),
    pytest.param(None, id="missing"),
    pytest.param(says({"kind": "CredentialProviderResponse", "Username": [ALICE.password]}), id="wrong-kind"),
]


@pytest.mark.parametrize("kind", ["helper", "plugin"])
@pytest.mark.parametrize("access", ["shared", "public"])
@pytest.mark.parametrize("script", FAILURES)
async def test_a_failing_program_stops_no_pull_that_does_not_need_it(
    registry: ScriptedRegistry,
    other: ScriptedRegistry,
    start_cache: StartCache,
    tmp_path: Path,
    programs: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    access: str,
    script: str | None,
) -> None:
    """Of another upstream, or of its own where it is for the quota only; the log names the program, and nothing that it
    wrote."""
    registry.require_rights(Rights([ALICE], public=("open/*",)))
    other.require_rights(Rights([BOB]))
    name = "docker-credential-vault" if kind == "helper" else "ecr"
    notes = programs / f"{name}.notes"
    if script is not None:
        program(programs, name, script)
    config: dict[str, Any] = {"auths": {"other.test": entry(BOB)}}
    sections: dict[str, Any] = {}
    if kind == "helper":
        config["credHelpers"] = {UPSTREAM: "vault"}
    else:
        sections["imageCredentialProvider"] = provider_config(programs, name, UPSTREAM)
    cache = await start_cache(
        upstream(registry, access=SHARED if access == "shared" else access),
        upstream(other, "other.test", access=SHARED),
        imagePullSecrets=[write_secret(tmp_path / "config.json", config)],
        **sections,
    )
    public = f"/v2/open/app/blobs/{registry.add_blob('open/app', b'public')}"
    refused = [await cache.get(path) for path in blobs(registry, 3)]
    assert {answer.status for answer in refused} <= {403, 503}
    for answer in refused:
        assert UPSTREAM in message(answer)
        assert not tells(answer.body)
    if access == "public":
        assert (await cache.get(public)).status == 200
    assert (await cache.get(blob(other).replace("/v2/", "/v2/other.test/"))).status == 200
    assert not hears(registry)
    assert name in logged(caplog)
    assert not tells(logged(caplog))
    assert "c4n4ry" not in logged(caplog)
    if script is not None:
        assert len(notes.read_text().splitlines()) <= 2, "its failure is the answer for a while"


@pytest.mark.parametrize("kind", ["helper", "plugin"])
async def test_a_program_that_hangs_holds_up_nobody_else(
    registry: ScriptedRegistry,
    other: ScriptedRegistry,
    start_cache: StartCache,
    tmp_path: Path,
    programs: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Who needs it is told in time."""
    registry.require_rights(Rights([ALICE]))
    other.require_rights(Rights([BOB]))
    name = "docker-credential-vault" if kind == "helper" else "ecr"
    notes = program(programs, name, "sleep 1000 & sleep 1000")
    config: dict[str, Any] = {"auths": {"other.test": entry(BOB)}}
    sections: dict[str, Any] = {}
    if kind == "helper":
        config["credHelpers"] = {UPSTREAM: "vault"}
    else:
        sections["imageCredentialProvider"] = provider_config(programs, name, UPSTREAM)
    cache = await start_cache(
        upstream(registry, access=SHARED),
        upstream(other, "other.test", access=SHARED),
        imagePullSecrets=[write_secret(tmp_path / "config.json", config)],
        **sections,
    )
    forward = clock(monkeypatch)
    stuck = [asyncio.create_task(cache.get(path)) for path in blobs(registry, 5)]
    async with asyncio.timeout(20):
        while not notes.exists():
            await asyncio.sleep(0.01)
    first, *rest = [path.replace("/v2/", "/v2/other.test/") for path in blobs(other, 5)]
    for path in rest:
        assert (await cache.get(path)).status == 200
    assert not any(task.done() for task in stuck)
    forward(25)
    assert (await cache.get(first)).status == 200
    answers = await asyncio.gather(*stuck)
    assert {answer.status for answer in answers} == {503}
    assert len(notes.read_text().splitlines()) == 1, "one run for all"
    assert not hears(registry)


# --- what is told to others ---


CODES = [400, 401, 403, 404, 429, 500]


def repeats(form: str, code: int, request: Request) -> Answer:
    """The answer of a server that repeats what it was shown."""
    text = request.headers.get("Authorization") or ""
    given = credentials_in(request)
    said = " ".join([text, text.partition(" ")[2], *(given or ())])
    match form:
        case "html":
            return status(code, f"<p>{said}".encode(), "text/html")
        case "message":
            return oci_error(code, "DENIED", f"not good: {said}")
        case "code":
            return oci_error(code, said)
    return as_json({"errors": [{"code": "DENIED", "message": "", "detail": said}], "message": said}, code)


@pytest.mark.parametrize("form", ["message", "code", "detail", "html"])
@pytest.mark.parametrize(("way", "scheme"), [("shared", "Basic"), ("shared", "Bearer"), ("verify", "Basic")])
async def test_t14_a_registry_that_repeats_the_secret_is_not_repeated(
    registry: ScriptedRegistry,
    start_cache: StartCache,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    way: Way,
    scheme: Scheme,
    form: str,
) -> None:
    """In no answer, log line, metric or file; nor to those who come after."""
    caplog.set_level(logging.DEBUG)
    guard(registry, way, scheme)
    held = await stake(start_cache, tmp_path, way, upstream(registry))
    told: list[object] = []
    for code in CODES:
        repo = f"team/app{code}"
        first, second, third = blobs(registry, 3, repo=repo)
        registry.add_image(repo, "1", [b"layer"])
        assert (await held.get(first)).status == 200
        repeating = registry.script("*", lambda _: True, partial(repeats, form, code), forever=True)
        lists = [f"/v2/{repo}/tags/list", f"/v2/{repo}/referrers/sha256:{code:064}"]
        for path in (f"/v2/{repo}/manifests/1", second, *lists, f"/v2/team/new{code}/manifests/1"):
            for answer in (await held.get(path), await held.head(path), await held.cache.get(path)):
                told += [answer.reason, answer.headers, answer.body]
        registry.tokens.revoke()
        answer = await held.get(third)
        assert answer.status >= 400
        told += [answer.reason, answer.headers, answer.body]
        repeating.cancel()
    metrics = await fetch(held.cache.host, held.cache.admin_port, "GET", "/metrics")
    assert b"pullcache_upstream_requests" in metrics.body
    assert hears(registry)
    tokens = registry.tokens.ever
    for where in (" ".join(map(str, told)), logged(caplog), metrics.body):
        assert not tells(where, tokens=tokens)
    assert not [path for path in held.cache.files() if tells(path.read_bytes(), tokens=tokens)]


BASE64 = ALICE.basic.removeprefix("Basic ")
OF_A_HOST = ALICE.password.translate({ord(each): None for each in ":/+&=%"})

REPEATED: list[Any] = [
    pytest.param(oci_error(403, "DENIED", f"no: {BASE64}"), [], id="the-base64-that-its-token-server-was-shown"),
    pytest.param(with_headers({"Content-Encoding": ALICE.password}), [], id="content-coding"),
    pytest.param(with_headers({"Content-Type": f"application/{ALICE.password}"}), [], id="content-type"),
    pytest.param(with_headers({"Content-Type": "application/json; x=" + ALICE.password}), [], id="content-type-parameter"),
    pytest.param(with_headers({"Docker-Content-Digest": f"sha256:{ALICE.password}"}), [], id="digest"),
    pytest.param(status(429, b"", headers={"Retry-After": ALICE.password}), [], id="retry-after"),
    pytest.param(status(307, b"", headers={"Location": f"http://{ALICE.password}/"}), [], id="location"),
    pytest.param(
        status(
            200,
            b'{"schemaVersion":2,"mediaType":"application/' + ALICE.password.encode() + b'","config":{}}',
            "application/vnd.oci.image.manifest.v1+json",
        ),
        [],
        id="media-type",
    ),
]


@pytest.mark.parametrize(("step", "also"), REPEATED)
@pytest.mark.parametrize("method", ["GET", "*"])
async def test_t14_what_a_registry_repeats_in_other_places_is_not_repeated(
    registry: ScriptedRegistry,
    start_cache: StartCache,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    method: str,
    step: Step,
    also: list[str],
) -> None:
    """The registry's token server has been shown the password, and the registry says it where it is not looked for."""
    caplog.set_level(logging.DEBUG)
    registry.add_image(REPO, "1", [b"layer"])
    guard(registry, "shared")
    held = await stake(start_cache, tmp_path, "shared", upstream(registry))
    assert (await held.get(blob(registry, b"first"))).status == 200
    registry.script(method, lambda request: request.path != "/token", step, forever=True)
    if also:
        registry.open_to_all()
    told: list[object] = []
    for path in (TAG, blob(registry), f"/v2/{REPO}/tags/list", f"/v2/{REPO}/referrers/sha256:{'0' * 64}"):
        for answer in (await held.get(path), await held.head(path)):
            told += [answer.reason, answer.headers, answer.body]
    assert not tells(" ".join(map(str, told)), tokens=also)
    assert not tells(logged(caplog), tokens=also)


# --- secrets that cannot be used ---

BROKEN = [
    pytest.param('{"auths": {', id="broken-json"),
    pytest.param({"auths": {UPSTREAM: {"auth": f"!{ALICE.password}"}}}, id="broken-base64"),
    pytest.param({"auths": {UPSTREAM: {"auth": "YzRuNHJ5"}}}, id="no-colon"),
    pytest.param({"auths": {UPSTREAM: {"auth": 42}}}, id="number"),
    pytest.param({"auths": [ALICE.password]}, id="list"),
    pytest.param("", id="empty"),
    pytest.param(f'"{ALICE.password}"', id="a-text"),
    pytest.param({"kind": "Secret", "type": "Opaque", "data": {"password": ALICE.password}}, id="wrong-type"),
    pytest.param({"auths": {}, "credHelpers": {UPSTREAM: f"../{ALICE.password}"}}, id="helper-that-is-a-path"),
    pytest.param(None, id="missing"),
]


@pytest.mark.parametrize("content", BROKEN)
async def test_a_secret_that_cannot_be_used_is_named_and_stops_nothing_else(
    registry: ScriptedRegistry,
    other: ScriptedRegistry,
    start_cache: StartCache,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    content: object,
) -> None:
    """Nor does it spoil a good one beside it; once it is mended, it is used."""
    registry.require_rights(Rights([ALICE], public=("open/*",)))
    other.require_rights(Rights([BOB]))
    broken = tmp_path / "broken.json"
    if content is not None:
        write_secret(broken, content)
    cache = await start_cache(
        upstream(registry, access=SHARED),
        upstream(other, "other.test", access=SHARED),
        imagePullSecrets=[{"file": str(broken)}, secret(tmp_path / "good.json", ("other.test", BOB))],
        rereadFilesEvery="50ms",
    )
    public = f"/v2/open/app/blobs/{registry.add_blob('open/app', b'public')}"
    assert (await cache.get(public)).status == 200
    assert (await cache.get(blob(other).replace("/v2/", "/v2/other.test/"))).status == 200
    assert (await cache.get(blob(registry))).status == 403
    assert cache.metric("unusable_files", what="pull secrets") == 1
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert [line for line in lines if str(broken) in line]
    assert not tells(logged(caplog))
    assert "c4n4ry" not in logged(caplog)
    secret(broken, (UPSTREAM, ALICE))
    async with asyncio.timeout(20):
        while cache.metric("unusable_files", what="pull secrets"):
            await asyncio.sleep(0.01)
    # a no to the anonymous is remembered for a while; another repository has not been asked for yet
    assert (await cache.get(f"/v2/team/new/blobs/{registry.add_blob('team/new', b'new')}")).status == 200


async def test_a_secret_that_breaks_later_stays_as_it_was_good_last(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry.require_rights(Rights([ALICE]))
    held = await stake(start_cache, tmp_path, "shared", upstream(registry), rereadFilesEvery="50ms")
    config = tmp_path / "config.json"
    assert (await held.get(blob(registry, b"first"))).status == 200
    for content in ('{"auths": {', "", json.dumps({"auths": {UPSTREAM: {"auth": ALICE.password}}})):
        write_secret(config, content)
        async with asyncio.timeout(20):
            while not held.cache.metric("unusable_files", what="pull secrets"):
                await asyncio.sleep(0.01)
        registry.tokens.revoke()
        assert (await held.get(blob(registry, os.urandom(8)))).status == 200
    assert not tells(logged(caplog))
    assert re.search(re.escape(str(config)), logged(caplog))
