"""Nothing that a registry says draws a secret out of the cache, or its requests elsewhere (T01, T02, T03, T04, T12)."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.blackbox.helpers import REPO, TAG, blob, message, token_requests
from tests.conftest import UPSTREAM, Pairs, RunningCache, StartCache, upstream
from tests.fakes.answers import compose, redirect, status, unauthorized, with_headers
from tests.fakes.recorder import Sink
from tests.fakes.registry import ScriptedRegistry
from tests.fakes.tls import Authority

CANARY = "c4n4ry"
SECRETS: Pairs = [
    ("Authorization", f"Bearer {CANARY}"),
    ("Proxy-Authorization", f"Basic {CANARY}"),
    ("Cookie", f"session={CANARY}"),
    ("X-Registry-Auth", CANARY),
    ("X-Forwarded-For", CANARY),
    ("User-Agent", CANARY),
    ("Referer", f"http://{CANARY}/"),
    ("Accept", f"application/{CANARY}, */*"),
]
OURS = {"host", "user-agent", "accept", "accept-encoding", "via"}


# --- T01, T02: realms ---


@pytest.mark.parametrize(("method", "kind"), [("get", "tag"), ("head", "tag"), ("get", "blob"), ("head", "blob")])
async def test_t01_a_realm_on_a_foreign_host_hears_nothing(
    cache: RunningCache, registry: ScriptedRegistry, method: str, kind: str
) -> None:
    registry.add_image(REPO, "1", [b"layer"])
    path = TAG if kind == "tag" else blob(registry)
    async with Sink() as sink:
        registry.require_token(realm=f"{sink.url}/token")
        answer = await (cache.get if method == "get" else cache.head)(path)
        assert answer.status == 502
        if method == "get":
            assert "tokenHosts" in message(answer)
            assert sink.host in message(answer)
            assert UPSTREAM in message(answer)
        assert sink.silent
    assert cache.metric("refused_total", upstream=UPSTREAM, what="realm") == 1
    assert not registry.heard("Authorization")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
async def test_t01_a_listed_token_host_is_asked(registry: ScriptedRegistry, start_cache: StartCache, host: str) -> None:
    """The counterpart: what the operator listed works, so the silence above is not that of something broken."""
    async with ScriptedRegistry(host) as other:
        registry.require_token(realm=f"{other.url}/token", tokens=other.tokens)
        allowed = ["127.0.0.0/8", "::1/128"]
        cache = await start_cache(upstream(registry, tokenHosts=[other.host], allowAddresses=allowed))
        assert (await cache.get(blob(registry))).status == 200
        assert token_requests(other) == 1


@pytest.mark.parametrize("realm_at", ["registry", "elsewhere"])
async def test_t01_a_challenge_from_where_a_redirect_leads_is_not_answered(
    cache: RunningCache, registry: ScriptedRegistry, realm_at: str
) -> None:
    path = blob(registry)
    async with ScriptedRegistry() as evil:
        registry.script("*", path, redirect(f"{evil.url}{path}"), forever=True)
        evil.require_token(realm=f"{(registry if realm_at == 'registry' else evil).url}/token")
        assert (await cache.get(path)).status == 502
        assert token_requests(registry) == token_requests(evil) == 0


async def test_t01_a_demand_for_a_password_gets_none(cache: RunningCache, registry: ScriptedRegistry) -> None:
    path = blob(registry)
    registry.require_basic("user", "password")
    assert (await cache.get(path, SECRETS)).status == 403
    assert not registry.heard("Authorization")


@pytest.mark.parametrize(
    "realm",
    [
        pytest.param("http://user:pw@{own}/token", id="userinfo"),
        pytest.param("http://{own}@{sink}/token", id="own-host-as-userinfo"),
        pytest.param("http://{sink}\\\\@{own}/token", id="backslash"),
        pytest.param("http://{own}/token#fragment", id="fragment"),
        pytest.param("file:///etc/passwd", id="file"),
        pytest.param("ftp://{own}/token", id="ftp"),
        pytest.param("//{own}/token", id="no-scheme"),
        pytest.param("/token", id="relative"),
        pytest.param("http://", id="no-host"),
        pytest.param("http://{own}:99999/token", id="no-port"),
        pytest.param("", id="empty"),
        pytest.param("http://{own}/token?" + "a" * 9000, id="9KB"),
        pytest.param("http://xn--uth-5cd.docker.io/token", id="punycode"),
        pytest.param("http://localhost:{port}/token", id="another-name-of-the-host"),
        pytest.param("https://{own}/token", id="another-scheme"),
        pytest.param("http://127.0.0.1:1/token", id="another-port"),
    ],
)
async def test_t02_an_odd_realm_is_refused(cache: RunningCache, registry: ScriptedRegistry, realm: str) -> None:
    path = blob(registry)
    async with Sink() as sink:
        asked = realm.format(own=registry.host, port=registry.port, sink=sink.host)
        registry.script("GET", path, unauthorized([f'Bearer realm="{asked}",service="x"']), forever=True)
        answer = await cache.get(path, SECRETS)
        assert answer.status in (403, 502)
        assert message(answer)
        assert "user:pw" not in message(answer)
        assert sink.silent
    assert [request.path for request in registry.requests] == [path]
    assert cache.metric("refused_total", what="realm") == (1 if realm else 0)


async def test_t02_a_look_alike_is_shown_as_it_is_written(cache: RunningCache, registry: ScriptedRegistry) -> None:
    """The operator is told to list the host if it is trusted: it must not look like auth.docker.io."""
    registry.require_token(realm="http://xn--uth-5cd.docker.io/token")
    text = message(await cache.get(blob(registry)))
    assert text.isascii()
    assert "xn--uth-5cd.docker.io" in text


@pytest.mark.parametrize("same_port", [True, False])
async def test_t02_an_https_registry_cannot_have_a_plain_realm(
    start_cache: StartCache, tmp_path: Path, same_port: bool
) -> None:
    ca = Authority(tmp_path)
    async with Sink() as sink, ScriptedRegistry(ssl=ca.good()) as registry:
        host = registry.host if same_port else sink.host
        registry.require_token(realm=f"http://{host}/token")
        cache = await start_cache(upstream(registry, caFile=str(ca.ca_path), tokenHosts=[host]))
        assert (await cache.get(blob(registry))).status == 502
        assert sink.silent
        assert (token_requests(registry), registry.connections, registry.failed_handshakes) == (0, 1, 0)
    assert cache.metric("refused_total", what="realm") == 1


# --- T03: redirects of token requests ---


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_t03_a_token_request_is_not_redirected(cache: RunningCache, registry: ScriptedRegistry, code: int) -> None:
    path = blob(registry)
    registry.require_token()
    async with Sink() as sink:
        registry.script("GET", "/token", redirect(f"{sink.url}/token", code), forever=True)
        for _ in range(3):
            answer = await cache.get(path)
            assert answer.status == 502
            assert f"token server of {UPSTREAM}" in message(answer)
        assert sink.silent
    assert token_requests(registry) == 1, "no storm"
    assert cache.metric("refused_total", what="redirect") == 1


# --- T04: redirects of content ---


@pytest.mark.parametrize("kind", ["tag", "blob"])
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2"], ids=["another-port", "another-host"])
async def test_t04_a_redirect_takes_no_secret_along(
    registry: ScriptedRegistry, start_cache: StartCache, kind: str, host: str
) -> None:
    image = registry.add_image(REPO, "1", [b"layer"])
    path, body = (TAG, image.data) if kind == "tag" else (blob(registry), b"layer")
    registry.require_token()
    cache = await start_cache(upstream(registry, allowAddresses=["127.0.0.0/8"]))
    async with ScriptedRegistry(host) as evil:
        evil.add_image(REPO, "1", [b"layer"])
        leave = compose(redirect(f"{evil.url}{path}"), with_headers({"Set-Cookie": "jar=sugar; Path=/"}))
        registry.script("*", path, leave, forever=True)
        for method in (cache.head, cache.get):
            assert (await method(path, SECRETS)).status == 200
        assert (await cache.get(path, SECRETS)).body == body
        assert registry.heard("Authorization: Bearer"), "there was a token to lose"
        for request in evil.requests:
            assert {name.lower() for name, _ in request.headers} <= OURS | {"range"}
        for fake in (evil, registry):
            assert fake.requests
            assert not fake.heard(CANARY)
            assert not fake.heard("sugar")
        assert not any(evil.heard(token) for token in registry.tokens.issued)


async def test_t04_the_token_is_not_sent_again_after_the_origin_was_left(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    """A -> A -> evil -> A: the token goes with the first two alone."""
    path = blob(registry)
    registry.require_token()
    async with ScriptedRegistry() as evil:
        registry.script("GET", path, redirect("/near"), forever=True)
        registry.script("GET", "/near", redirect(f"{evil.url}/far"), forever=True)
        evil.script("GET", "/far", redirect(f"{registry.url}/back"), forever=True)
        registry.script("GET", "/back", status(200, b"layer"), forever=True)
        assert (await cache.get(path, SECRETS)).body == b"layer"
        (far,) = evil.requests
        (near,), (back,) = registry.seen(path="/near"), registry.seen(path="/back")
        assert [request.headers.has("Authorization") for request in (near, far, back)] == [True, False, False]


@pytest.mark.parametrize(("hops", "code"), [(5, 200), (6, 502)])
async def test_t04_redirects_are_followed_five_times(
    cache: RunningCache, registry: ScriptedRegistry, hops: int, code: int
) -> None:
    path = blob(registry)
    registry.script("GET", path, *[redirect(path) for _ in range(hops)])
    answer = await cache.get(path)
    assert answer.status == code
    assert registry.count("GET", path) == 6
    assert cache.metric("refused_total", what="redirect") == (code == 502)


@pytest.mark.parametrize(
    "location", ["http://{sink}/x", "https://user:pw@{own}/x", "ftp://{own}/x", "", "http://", "https://{own}/a b HTTP/1.0"]
)
async def test_t04_a_redirect_to_what_is_not_a_safe_address_is_refused(
    start_cache: StartCache, tmp_path: Path, location: str
) -> None:
    ca = Authority(tmp_path)
    async with Sink() as sink, ScriptedRegistry(ssl=ca.good()) as registry:
        path = blob(registry)
        registry.script("GET", path, redirect(location.format(sink=sink.host, own=registry.host)), forever=True)
        cache = await start_cache(upstream(registry, caFile=str(ca.ca_path)))
        answer = await cache.get(path, SECRETS)
        assert answer.status == 502
        assert "user:pw" not in message(answer)
        assert sink.silent
        assert (len(registry.requests), registry.malformed) == (1, 0)
    assert cache.metric("refused_total", what="redirect") == 1


@pytest.mark.parametrize("state", ["good", "refusing", "failing", "gone"])
async def test_t04_a_clients_secrets_go_neither_upstream_nor_into_a_log_nor_into_an_error(
    cache: RunningCache, registry: ScriptedRegistry, caplog: pytest.LogCaptureFixture, state: str
) -> None:
    """T04, T03: also not to the token server."""
    caplog.set_level(logging.DEBUG)
    image = registry.add_image(REPO, "1", [b"layer"])
    registry.require_token(credentials=("someone", "else") if state == "refusing" else None)
    if state == "failing":
        registry.script("*", lambda request: True, status(500), forever=True)
    if state == "gone":
        await registry.stop()
    secrets = [pair for pair in SECRETS if pair[0] != "User-Agent"]  # the one that the access log is meant to hold
    for path in (TAG, f"/v2/{REPO}/blobs/{image.layer_digests[0]}", "/v2/", "/v2/_catalog", f"/v2/nowhere.test/{REPO}/x"):
        for method in (cache.get, cache.head):
            answer = await method(path, secrets)
            assert CANARY not in f"{answer.headers}{answer.body!r}"
    assert bool(registry.requests) == (state != "gone")
    assert not registry.heard(CANARY)
    assert caplog.records
    assert not [record for record in caplog.records if CANARY in f"{record.getMessage()} {record.__dict__}"]


# --- T12: the environment ---


async def test_t12_the_environment_sends_nothing_elsewhere_and_adds_nothing(
    registry: ScriptedRegistry, start_cache: StartCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login {CANARY} password {CANARY}\ndefault login {CANARY} password {CANARY}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with Sink() as sink:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy", "WS_PROXY"):
            monkeypatch.setenv(name, sink.url.replace("://", f"://{CANARY}@"))
        async with ScriptedRegistry(ssl=(ca := Authority(tmp_path)).good()) as secure:
            plain, tls = upstream(registry), upstream(secure, name="tls.test", caFile=str(ca.ca_path))
            cache = await start_cache(plain, tls)
            for known, prefix in ((registry, ""), (secure, "tls.test/")):
                known.require_token()
                path = blob(known)
                assert (await cache.get(path.replace("/v2/", f"/v2/{prefix}"))).status == 200
                assert not known.heard(CANARY)
                assert not known.heard("Basic ")
        assert sink.silent
