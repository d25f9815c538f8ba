"""``httpProxy``: all of an upstream's traffic goes through it, what is private stays so, and its password is its own."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from proxy.config.file import ConfigError, load, validate
from tests.blackbox.oracle import LARGE, blob_of, blob_path, error_of, manifest_path, pulls_well
from tests.conftest import UPSTREAM, RunningCache, StartCache, running, settings
from tests.fakes import answers
from tests.fakes.forward_proxy import ForwardProxy
from tests.fakes.registry import ScriptedRegistry
from tests.fakes.tls import Authority

REPO = "team/app"
HERE = "127.0.0.1"
NAME = "registry.corp.test"
AUTH = "auth.corp.test"
STORAGE = "storage.corp.test"
"""Names that nobody but the proxy can resolve."""

USER, PASSWORD = "pullcache", "s3cr3t@:/%2"
WRITTEN = "s3cr3t%40%3A%2F%252"
"""The password as it stands in a URL."""

SECRETS = ("s3cr3t", base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode())
QUICK = {"connect": "1s", "headers": "1s", "head": "1s", "token": "1s"}


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    """The authority that signs what is behind the proxy."""
    folder = tmp_path / "ca"
    folder.mkdir()
    return Authority(folder)


@pytest.fixture
async def forward() -> AsyncIterator[ForwardProxy]:
    """The proxy."""
    async with ForwardProxy({NAME: HERE, AUTH: HERE, STORAGE: HERE}) as proxy:
        yield proxy


def server(scheme: str, ca: Authority, name: str = NAME) -> ScriptedRegistry:
    """A registry of that name behind the proxy."""
    return ScriptedRegistry(name=name, ssl=ca.good(name) if scheme == "https" else None)


def section(registry: ScriptedRegistry, http_proxy: str, ca: Authority, **keys: Any) -> dict[str, Any]:
    """The upstream, through that proxy. No private address is allowed: names are for the proxy to resolve."""
    return {
        "name": UPSTREAM,
        "endpoints": [registry.url],
        "httpProxy": http_proxy,
        "caFile": str(ca.ca_path),
        "timeouts": QUICK,
        **keys,
    }


def is_told(secrets: tuple[str, ...], *texts: object) -> bool:
    """Whether one of these occurs in one of those."""
    return any(secret in str(text) for secret in secrets for text in texts)


def logged(caplog: pytest.LogCaptureFixture) -> str:
    """Everything that was logged, and what hung on to it."""
    return "\n".join(f"{record.getMessage()} {record.__dict__} {record.exc_text}" for record in caplog.records)


# --- through the proxy ---


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_everything_goes_through_the_proxy(
    start_cache: StartCache, forward: ForwardProxy, ca: Authority, scheme: str
) -> None:
    """Manifests, blobs, tokens, and what is redirected to; every connection to a server is one of the proxy's."""
    async with server(scheme, ca) as registry, server(scheme, ca, AUTH) as auth, server(scheme, ca, STORAGE) as storage:
        data = blob_of("through", LARGE)
        image = registry.add_image(REPO, "1", [data, b"small"])
        registry.require_token(realm=f"{auth.url}/token", tokens=auth.tokens)
        moved = blob_path(image.layer_digests[0])
        registry.script("GET", moved, answers.redirect(f"{storage.url}/signed?x=1"), forever=True)
        storage.script("*", "/signed", answers.status(200, data), forever=True)
        cache = await start_cache(section(registry, forward.url, ca, tokenHosts=[auth.host]))
        assert (await cache.head(manifest_path("1"))).status == 200
        await pulls_well(cache, manifest_path("1"), image.data)
        await pulls_well(cache, moved, data)
        await pulls_well(cache, blob_path(image.layer_digests[1]), b"small")
        await pulls_well(cache, blob_path(image.config_digest), image.config)
        assert (await cache.get(manifest_path("1"))).status == 200
        for one in (registry, auth, storage):
            assert one.requests
            assert one.connections == forward.opened.count(one.host)
            assert forward.targets.count(one.host) == (one.connections if scheme == "https" else len(one.requests))
        assert len(auth.requests) == 1
        assert not storage.heard("Authorization")
        methods = {request.method for request in forward.requests}
        assert methods == ({"CONNECT"} if scheme == "https" else {"GET", "HEAD"})


async def test_what_passes_the_proxy_for_https_is_not_for_its_eyes(
    start_cache: StartCache, forward: ForwardProxy, ca: Authority
) -> None:
    """It learns host and port: no path, no token, none of what pullcache says to the registry."""
    async with server("https", ca) as registry:
        registry.require_token()
        image = registry.add_image(REPO, "1", [b"layer"])
        cache = await start_cache(section(registry, forward.url, ca))
        await pulls_well(cache, manifest_path("1"), image.data)
        for request in forward.requests:
            assert request.target == registry.host
            assert b"/v2/" not in request.raw
            assert b"Bearer" not in request.raw
            assert not {"authorization", "range", "via"} & {name.lower() for name, _ in request.headers}


async def test_one_upstreams_proxy_is_not_anothers(
    registry: ScriptedRegistry, start_cache: StartCache, forward: ForwardProxy, ca: Authority
) -> None:
    image = registry.add_image(REPO, "1", [b"layer"])
    async with server("http", ca) as behind:
        direct = {"name": "direct.test", "endpoints": [registry.url], "allowAddresses": ["127.0.0.1/32"]}
        cache = await start_cache(section(behind, forward.url, ca), direct)
        assert (await cache.get(f"{manifest_path('1')}?ns=direct.test")).body == image.data
        assert forward.connections == 0


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_download_that_breaks_off_is_continued_through_the_proxy(
    start_cache: StartCache, forward: ForwardProxy, ca: Authority, scheme: str
) -> None:
    data = blob_of("broken", LARGE)
    async with server(scheme, ca) as registry:
        path = blob_path(registry.add_blob(REPO, data))
        registry.script("GET", path, answers.cut(LARGE // 2, "fin"))
        cache = await start_cache(section(registry, forward.url, ca))
        await pulls_well(cache, path, data)
        assert [request.headers.get("Range") for request in registry.seen("GET", path)] == [None, f"bytes={LARGE // 2}-"]
        assert registry.connections == forward.opened.count(registry.host)


async def test_the_second_endpoint_is_reached_through_it_as_well(
    start_cache: StartCache, forward: ForwardProxy, ca: Authority
) -> None:
    """The first one cannot be reached by the proxy; the probes go through it, too."""
    async with server("https", ca) as registry:
        image = registry.add_image(REPO, "1", [b"layer"])
        dead = "https://gone.corp.test:1"
        forward.names["gone.corp.test"] = HERE
        cache = await start_cache(section(registry, forward.url, ca, endpoints=[dead, registry.url]))
        await pulls_well(cache, manifest_path("1"), image.data)
        await pulls_well(cache, blob_path(image.layer_digests[0]), b"layer")
        assert forward.targets.count("gone.corp.test:1") == 1


# --- its password ---


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_the_password_reaches_the_proxy_and_nobody_else(
    start_cache: StartCache, forward: ForwardProxy, ca: Authority, scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Not the registry, its token server or its storage; no log, no error."""
    caplog.set_level(logging.DEBUG)
    forward.credentials = (USER, PASSWORD)
    async with server(scheme, ca) as registry, server(scheme, ca, AUTH) as auth, server(scheme, ca, STORAGE) as storage:
        image = registry.add_image(REPO, "1", [b"layer", b"other"])
        path = blob_path(image.layer_digests[0])
        registry.require_token(realm=f"{auth.url}/token", tokens=auth.tokens)
        registry.script("GET", path, answers.redirect(f"{storage.url}/signed"), forever=True)
        storage.script("*", "/signed", answers.status(200, b"layer"))
        keys = {"tokenHosts": [auth.host]}
        cache = await start_cache(section(registry, forward.url_for(USER, WRITTEN), ca, **keys))
        await pulls_well(cache, manifest_path("1"), image.data)
        await pulls_well(cache, path, b"layer")
        storage.script("*", "/signed", answers.status(500), forever=True)
        registry.script("*", lambda request: True, answers.status(503), forever=True)
        said = [await cache.get(blob_path(image.layer_digests[1])), await cache.get(manifest_path("1"))]
        await forward.stop()
        said += [await cache.get(blob_path(image.layer_digests[1])), await cache.get(manifest_path("1"))]
        assert [answer.status for answer in said] == [502, 200, 503, 200]
        for request in forward.requests:
            assert request.headers.getall("Proxy-Authorization") != []
        for one in (registry, auth, storage):
            assert one.requests
            assert not one.heard("Proxy-Authorization")
            assert not any(one.heard(secret) for secret in SECRETS)
        assert not is_told(SECRETS, *said, *(answer.headers for answer in said), logged(caplog))


async def test_the_password_is_never_part_of_the_address_that_is_asked_for(
    start_cache: StartCache, forward: ForwardProxy, ca: Authority
) -> None:
    async with server("http", ca) as registry:
        image = registry.add_image(REPO, "1", [b"layer"])
        cache = await start_cache(section(registry, forward.url_for(USER, WRITTEN), ca))
        await pulls_well(cache, manifest_path("1"), image.data)
        assert not any(is_told(SECRETS, request.target, request.headers.get("Host")) for request in forward.requests)


async def test_a_password_of_any_letters_is_sent_in_utf_8(
    start_cache: StartCache, forward: ForwardProxy, ca: Authority
) -> None:
    """As curl does."""
    forward.credentials = (USER, "zażółć")
    async with server("https", ca) as registry:
        image = registry.add_image(REPO, "1", [b"layer"])
        cache = await start_cache(section(registry, forward.url_for(USER, "za%C5%BC%C3%B3%C5%82%C4%87"), ca))
        await pulls_well(cache, manifest_path("1"), image.data)


async def test_http_proxy_file_holds_the_value(forward: ForwardProxy, ca: Authority, tmp_path: Path) -> None:
    """So that a password need not stand in the configuration."""
    forward.credentials = (USER, PASSWORD)
    (tmp_path / "proxy").write_text(f"{forward.url_for(USER, WRITTEN)}\n")
    async with server("https", ca) as registry:
        image = registry.add_image(REPO, "1", [b"layer"])
        file = tmp_path / "config.yaml"
        file.write_text(
            f"listen: 127.0.0.1:0\nadmin: 127.0.0.1:0\ncache: {{directory: {tmp_path}/cache}}\n"
            f"upstreams: [{{name: {UPSTREAM}, endpoints: ['{registry.url}'], httpProxyFile: {tmp_path}/proxy, "
            f"caFile: {ca.ca_path}}}]\n"
        )
        async with running(await load(file)) as cache:
            await pulls_well(cache, f"{manifest_path('1')}?ns={UPSTREAM}", image.data)


# --- a proxy that fails ---

REFUSALS: dict[str, str] = {
    "down": "httpProxy",
    "407": "407",
    "403": "403",
    "502": "502",
    "503": "503",
    "stall": "answer",
    "close": "dropped",
}


@pytest.mark.parametrize("kind", ["tag", "blob"])
@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_proxy_that_fails_is_a_clear_503(
    start_cache: StartCache,
    forward: ForwardProxy,
    ca: Authority,
    refusal: str,
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """At CONNECT: the text names the upstream and what the proxy said, and never the password."""
    caplog.set_level(logging.DEBUG)
    async with server("https", ca) as registry:
        image = registry.add_image(REPO, "1", [b"layer"])
        path = manifest_path("1") if kind == "tag" else blob_path(image.layer_digests[0])
        cache = await start_cache(section(registry, forward.url_for(USER, WRITTEN), ca))
        await fails(forward, refusal)
        status, code, text = error_of(await cache.get(path, within=15))
        assert (status, code) == (503, "UNAVAILABLE")
        assert UPSTREAM in text
        assert REFUSALS[refusal] in text
        assert refusal in ("stall", "close") or "httpProxy" in text
        assert registry.connections == 0
        assert not is_told(SECRETS, text, logged(caplog))


async def fails(forward: ForwardProxy, refusal: str) -> None:
    """The proxy does so from now on."""
    if refusal == "down":
        await forward.stop()
    elif refusal.isdigit():
        forward.refusal = int(refusal)
    else:
        forward.refusal = "stall" if refusal == "stall" else "close"


@pytest.mark.parametrize("refusal", ["down", "407", "502", "stall", "close"])
async def test_a_proxy_that_fails_for_plain_http_is_an_error_that_does_not_count_for_the_registry(
    start_cache: StartCache, forward: ForwardProxy, ca: Authority, refusal: str
) -> None:
    """The page of the proxy is nobody's 404: a held tag is served stale."""
    async with server("http", ca) as registry:
        image = registry.add_image(REPO, "1", [b"layer"])
        cache = await start_cache(section(registry, forward.url_for(USER, WRITTEN), ca))
        await pulls_well(cache, manifest_path("1"), image.data)
        await fails(forward, refusal)
        stale = await cache.get(manifest_path("1"), within=15)
        assert (stale.status, stale.headers.has("Warning")) == (200, True)
        status, _, text = error_of(await cache.get(blob_path(image.layer_digests[0]), within=15))
        assert status in (502, 503)
        assert UPSTREAM in text
        assert not is_told(SECRETS, text, stale.headers)


async def test_a_proxy_that_wants_a_password_that_is_not_given_says_so(
    start_cache: StartCache, forward: ForwardProxy, ca: Authority
) -> None:
    forward.credentials = (USER, PASSWORD)
    async with server("https", ca) as registry:
        cache = await start_cache(section(registry, forward.url_for(USER, "wrong"), ca))
        status, _, text = error_of(await cache.get(manifest_path("1")))
        assert status == 503
        assert "407" in text
        assert "wrong" not in text


@pytest.mark.parametrize(("flaw", "says"), [("expired", "expired"), ("foreign", "caFile"), ("wrong_name", "not valid for")])
async def test_a_certificate_is_verified_through_a_proxy_as_well(
    start_cache: StartCache, forward: ForwardProxy, ca: Authority, flaw: str, says: str
) -> None:
    forward.names["localhost"] = HERE
    context = getattr(ca, flaw)()
    async with ScriptedRegistry(name=NAME if flaw == "wrong_name" else "127.0.0.1", ssl=context) as registry:
        registry.add_image(REPO, "1", [b"layer"])
        cache = await start_cache(section(registry, forward.url, ca, allowAddresses=["127.0.0.1/32"]))
        status, _, text = error_of(await cache.get(manifest_path("1")))
        assert status == 503
        assert says in text
        assert registry.requests == []


async def test_the_proxy_comes_back(start_cache: StartCache, forward: ForwardProxy, ca: Authority) -> None:
    async with server("https", ca) as registry:
        image = registry.add_image(REPO, "1", [b"layer"])
        cache = await start_cache(section(registry, forward.url, ca))
        await forward.stop()
        assert (await cache.get(manifest_path("1"))).status == 503
        await forward.start()
        await pulls_well(cache, manifest_path("1"), image.data)


# --- what is private ---

PRIVATE = [
    "127.0.0.1",
    "[::1]",
    "169.254.169.254",
    "10.0.0.1",
    "2130706433",
    "127.1",
    "0x7f.1",
    "0177.0.0.1",
    "0",
    "[::ffff:127.0.0.1]",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::7f00:1]",
    "[fe80::1%25eth0]",
    "localhost",
    "localhost.",
    "LOCALHOST",
    "metadata.localhost",
    "127.0.0.1.",
    "2130706433.",
    "%31%32%37.0.0.1",
    "127.0.0.1%00",
]
"""Literal addresses in every spelling that some resolver understands: a proxy would go there."""


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", PRIVATE)
async def test_a_redirect_to_a_private_address_is_not_asked_of_the_proxy(
    start_cache: StartCache, forward: ForwardProxy, ca: Authority, host: str, scheme: str
) -> None:
    async with server(scheme, ca) as registry:
        path = blob_path(registry.add_blob(REPO, b"layer"))
        registry.script("GET", path, answers.redirect(f"{scheme}://{host}:{registry.port}{path}"), forever=True)
        cache = await start_cache(section(registry, forward.url, ca))
        answer = await cache.get(path)
        assert answer.status in (502, 503)
        error_of(answer)
        assert set(forward.targets) == {registry.host}
        assert set(forward.opened) == {registry.host}
        assert cache.metric("refused_total") == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "169.254.169.254", "2130706433", "127.1", "localhost"])
async def test_a_realm_at_a_private_address_is_not_asked_of_the_proxy(
    start_cache: StartCache, forward: ForwardProxy, ca: Authority, host: str
) -> None:
    """Not even where it is a listed token host: that says whom to trust, not where it may be."""
    async with server("https", ca) as registry:
        registry.add_image(REPO, "1", [b"layer"])
        there = f"{host}:{registry.port}"
        registry.require_token(realm=f"https://{there}/token")
        cache = await start_cache(section(registry, forward.url, ca, tokenHosts=[there]))
        status, _, text = error_of(await cache.get(manifest_path("1")))
        assert status in (502, 503)
        assert "allowAddresses" in text
        assert set(forward.targets) == {registry.host}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "sub.localhost"])
def test_an_endpoint_that_is_known_to_be_private_is_refused_at_start(tmp_path: Path, host: str) -> None:
    """With a proxy, too."""
    private = {"name": UPSTREAM, "endpoints": [f"http://{host}:5000"], "httpProxy": "http://proxy.test:3128"}
    with pytest.raises(ConfigError, match=rf"{host} is not a public address.*allowAddresses: \[127\.0\.0\.1/32\]"):
        validate(settings(tmp_path, private))


@pytest.mark.parametrize("host", ["2130706433", "127.1"])
async def test_an_endpoint_at_a_private_address_is_not_asked_of_the_proxy(
    start_cache: StartCache, forward: ForwardProxy, ca: Authority, host: str
) -> None:
    cache = await start_cache(
        {"name": UPSTREAM, "endpoints": [f"http://{host}:5000"], "httpProxy": forward.url, "timeouts": QUICK}
    )
    status, _, text = error_of(await cache.get(manifest_path("1")))
    assert status == 503
    assert "allowAddresses" in text
    assert forward.connections == 0


@pytest.mark.parametrize("way", ["endpoint", "redirect", "realm"])
async def test_a_private_address_that_is_allowed_is_asked_of_the_proxy(
    start_cache: StartCache, forward: ForwardProxy, ca: Authority, way: str
) -> None:
    """The counterpart: ``allowAddresses`` is what makes the difference."""
    async with server("http", ca) as registry, ScriptedRegistry() as other:
        image = registry.add_image(REPO, "1", [b"layer"])
        path = blob_path(image.layer_digests[0])
        keys: dict[str, Any] = {"allowAddresses": ["127.0.0.1/32"]}
        if way == "endpoint":
            other.add_image(REPO, "1", [b"layer"])
            keys["endpoints"] = [other.url]
        elif way == "redirect":
            registry.script("GET", path, answers.redirect(f"{other.url}/signed"))
            other.script("GET", "/signed", answers.status(200, b"layer"))
        else:
            registry.require_token(realm=f"{other.url}/token", tokens=other.tokens)
            keys["tokenHosts"] = [other.host]
        cache = await start_cache(section(registry, forward.url, ca, **keys))
        await pulls_well(cache, path, b"layer")
        assert other.host in forward.targets
        assert other.connections == forward.opened.count(other.host)


async def test_a_public_address_is_for_the_proxy(start_cache: StartCache, forward: ForwardProxy, ca: Authority) -> None:
    forward.names["93.184.215.14"] = HERE
    async with server("http", ca) as registry:
        image = registry.add_image(REPO, "1", [b"layer"])
        there = f"http://93.184.215.14:{registry.port}"
        cache = await start_cache(section(registry, forward.url, ca, endpoints=[there]))
        await pulls_well(cache, manifest_path("1"), image.data)


async def test_the_proxy_itself_may_be_private(start_cache: StartCache, ca: Authority) -> None:
    """The operator named it; no ``allowAddresses`` is needed for it. On IPv6, too."""
    async with ForwardProxy({NAME: HERE}, host="::1") as forward, server("https", ca) as registry:
        image = registry.add_image(REPO, "1", [b"layer"])
        cache = await start_cache(section(registry, forward.url, ca))
        await pulls_well(cache, manifest_path("1"), image.data)


async def test_a_crowd_through_the_proxy(start_cache: StartCache, forward: ForwardProxy, ca: Authority) -> None:
    """Forty layers at once, one request each."""
    async with server("https", ca) as registry:
        image = registry.add_image(REPO, "1", [blob_of(number, 10_000) for number in range(40)])
        cache: RunningCache = await start_cache(section(registry, forward.url, ca))
        paths = [blob_path(digest) for digest in image.layer_digests]
        pulled = await asyncio.gather(*(cache.get(path) for path in paths for _ in range(2)))
        assert [answer.body for answer in pulled] == [data for data in image.layers for _ in range(2)]
        assert all(registry.count("GET", path) == 1 for path in paths)
        assert registry.connections == forward.opened.count(registry.host)
