"""An upstream over TLS is verified, always, and whoever fails hears not one request (T13, F37)."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.helpers import REPO, TAG, blob, message
from tests.conftest import UPSTREAM, RunningCache, StartCache, upstream
from tests.fakes.answers import redirect
from tests.fakes.client import fetch
from tests.fakes.messages import Ending
from tests.fakes.registry import ScriptedRegistry
from tests.fakes.tls import Authority, HalfHandshake
from tests.real.services import Pullcache, pullcache_config

QUICK = {"connect": "500ms", "headers": "1s"}
FLAWS = {  # what a person must find in the message
    "expired": "certificate.* expired",
    "self_signed": "certificate.* self-signed",
    "wrong_name": r"certificate.* not valid for '127\.0\.0\.1'",
    "foreign": "certificate.* (issuer|self-signed certificate in certificate chain)",
    "outdated": "TLS",
    "plain": "in time",  # this one waits for the end of what to it is a long header line
}


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    """The authority that the operator trusts."""
    folder = tmp_path / "ca"
    folder.mkdir()
    return Authority(folder)


def flawed(ca: Authority, flaw: str) -> ssl.SSLContext | None:
    """A server's context with this flaw; plain HTTP has none."""
    if flaw == "plain":
        return None
    context: ssl.SSLContext = getattr(ca, flaw)()
    return context


def over_tls(registry: ScriptedRegistry, ca: Authority | None, **keys: Any) -> dict[str, Any]:
    """The section of an upstream that is to speak TLS, whether it does or not."""
    keys |= {"caFile": str(ca.ca_path)} if ca else {}
    return upstream(registry, endpoints=[f"https://{registry.host}"], **{"timeouts": QUICK, **keys})


@pytest.mark.parametrize("flaw", FLAWS)
@pytest.mark.parametrize("kind", ["tag", "blob"])
async def test_t13_a_flawed_server_hears_no_request_and_the_message_names_the_flaw(
    start_cache: StartCache, ca: Authority, flaw: str, kind: str
) -> None:
    async with ScriptedRegistry(ssl=flawed(ca, flaw)) as registry:
        registry.add_image(REPO, "1", [b"layer"])
        cache = await start_cache(over_tls(registry, ca))
        answer = await cache.get(TAG if kind == "tag" else blob(registry))
        assert registry.connections >= 1
        assert registry.requests == []
        assert answer.status == 503
        assert UPSTREAM in message(answer)
        assert re.search(FLAWS[flaw], message(answer)), message(answer)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.parametrize("skip", [False, True], ids=["verifying", "skipping"])
async def test_t13_tls_before_1_2_is_not_spoken(
    start_cache: StartCache, ca: Authority, version: ssl.TLSVersion, skip: bool
) -> None:
    """Not even where verification is off."""
    async with ScriptedRegistry(ssl=ca.outdated(version)) as registry:
        cache = await start_cache(over_tls(registry, None if skip else ca, insecureSkipVerify=skip))
        answer = await cache.get(blob(registry))
        assert answer.status == 503
        assert registry.requests == []
        assert "TLS" in message(answer)


@pytest.mark.parametrize("how", ["fin", "rst", "stall"])
async def test_f37_a_handshake_that_breaks_off_is_a_clear_503(start_cache: StartCache, ca: Authority, how: Ending) -> None:
    async with HalfHandshake(ca.good(), how) as server:
        section = {"name": UPSTREAM, "endpoints": [server.url], "allowAddresses": ["127.0.0.1/32"], "timeouts": QUICK}
        cache = await start_cache(section | {"caFile": str(ca.ca_path)})
        answer = await cache.get(TAG, within=10)
        assert answer.status == 503
        assert UPSTREAM in message(answer)
        assert ("in time" if how == "stall" else "TLS") in message(answer)
        assert 1 <= server.attempts <= 3


@pytest.mark.parametrize(
    ("said", "is_tls"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False),
        (b"SSH-2.0-x\r\n", False),
        (b"\x15\x03\x01\x00\x02\x02\x28", True),
    ],
)
async def test_f37_what_does_not_speak_tls_is_not_spoken_to_in_plain(
    start_cache: StartCache, ca: Authority, said: bytes, is_tls: bool
) -> None:
    """Nor is it asked on http by itself: the text says how to write that."""
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(4096))
        writer.write(said)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        section = {"name": UPSTREAM, "endpoints": [f"https://127.0.0.1:{port}"], "allowAddresses": ["127.0.0.1/32"]}
        cache = await start_cache(section | {"caFile": str(ca.ca_path)})
        refused = await cache.get(TAG)
        assert refused.status == 503
        assert "TLS" in message(refused)
        hint = "it does not speak TLS there; if it is on http, write http:// in its address"
        assert (hint in message(refused)) is not is_tls, message(refused)
        assert heard
        assert all(data.startswith(b"\x16\x03") for data in heard), "each is a hello, none is a request"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_t13_a_good_server_is_trusted_by_its_ca_file_alone(
    start_cache: StartCache, ca: Authority, version: ssl.TLSVersion
) -> None:
    context = ca.good()
    context.minimum_version = context.maximum_version = version
    async with ScriptedRegistry(ssl=context) as registry:
        path = blob(registry)
        without = await start_cache(over_tls(registry, None))
        refused = await without.get(path)
        assert refused.status == 503
        assert "caFile" in message(refused)
        assert registry.requests == []
        trusting = await start_cache(over_tls(registry, ca))
        assert (await trusting.get(path)).body == b"layer"
        for cache in (without, trusting):
            assert cache.metric("insecure_upstream") == 0


async def test_t13_one_upstreams_ca_is_not_anothers(start_cache: StartCache, ca: Authority) -> None:
    async with ScriptedRegistry(ssl=ca.good()) as one, ScriptedRegistry(ssl=ca.good()) as two:
        path = blob(two)
        cache = await start_cache(over_tls(one, ca), over_tls(two, None, name="two.test"))
        assert (await cache.get(path.replace("/v2/", "/v2/two.test/"))).status == 503
        assert two.requests == []


@pytest.mark.parametrize("flaw", ["expired", "wrong_name", "foreign", "plain"])
@pytest.mark.parametrize("way", ["redirect", "realm"])
async def test_t13_where_a_registry_points_is_verified_as_well(
    start_cache: StartCache, ca: Authority, flaw: str, way: str
) -> None:
    async with ScriptedRegistry(ssl=ca.good()) as registry, ScriptedRegistry(ssl=flawed(ca, flaw)) as other:
        path = blob(registry)
        there = f"https://{other.host}"
        if way == "realm":
            registry.require_token(realm=f"{there}/token", tokens=other.tokens)
        else:
            registry.script("GET", path, redirect(f"{there}{path}"), forever=True)
        cache = await start_cache(over_tls(registry, ca, tokenHosts=[other.host]))
        answer = await cache.get(path)
        assert answer.status == 503
        assert re.search(FLAWS[flaw], message(answer)), message(answer)
        assert other.requests == []


@asynccontextmanager
async def replaced(
    start_cache: StartCache, ca: Authority, flaw: str
) -> AsyncIterator[tuple[RunningCache, ScriptedRegistry]]:
    """A cache that holds an image of a good registry, whose place has been taken by a flawed one."""
    async with ScriptedRegistry(ssl=ca.good()) as good:
        image = good.add_image(REPO, "1", [b"layer"])
        cache = await start_cache(over_tls(good, ca))
        assert (await cache.get(TAG)).status == 200
        assert (await cache.get(f"/v2/{REPO}/blobs/{image.layer_digests[0]}")).status == 200
        await good.stop()
        async with ScriptedRegistry(ssl=flawed(ca, flaw), port=good.port) as bad:
            bad.add_image(REPO, "1", [b"layer"])
            yield cache, bad


@pytest.mark.parametrize("flaw", [flaw for flaw in FLAWS if flaw != "plain"])
async def test_f37_what_is_held_is_served_stale_when_the_certificate_turns_bad(
    start_cache: StartCache, ca: Authority, flaw: str
) -> None:
    async with replaced(start_cache, ca, flaw) as (cache, bad):
        for ask in (cache.get, cache.head):
            answer = await ask(TAG)
            assert answer.status == 200
            assert re.search(FLAWS[flaw], answer.headers.get("Warning") or ""), answer.headers
        assert (await cache.get(blob(bad))).body == b"layer"
        assert (await cache.get(blob(bad, b"not held"))).status == 503
        assert bad.connections >= 1
        assert bad.requests == []


async def test_f37_a_certificate_that_is_mended_is_taken_at_once(start_cache: StartCache, ca: Authority) -> None:
    async with replaced(start_cache, ca, "expired") as (cache, bad):
        assert (await cache.get(TAG)).headers.has("Warning")
        await bad.stop()
        async with ScriptedRegistry(ssl=ca.good(), port=bad.port) as mended:
            mended.add_image(REPO, "1", [b"layer"])
            answer = await cache.get(TAG)
            assert (answer.status, answer.headers.has("Warning")) == (200, False)


@pytest.mark.parametrize("flaw", ["expired", "self_signed", "wrong_name", "foreign"])
async def test_t13_skipping_verification_works_and_shows_in_the_metrics(
    start_cache: StartCache, ca: Authority, flaw: str
) -> None:
    async with ScriptedRegistry(ssl=flawed(ca, flaw)) as registry, ScriptedRegistry(ssl=flawed(ca, flaw)) as other:
        cache = await start_cache(over_tls(registry, None, insecureSkipVerify=True), over_tls(other, ca, name="two.test"))
        assert (await cache.get(path := blob(registry))).status == 200
        assert cache.metric("insecure_upstream", upstream=UPSTREAM) == 1
        assert cache.metric("insecure_upstream", upstream="two.test") == 0
        blob(other, b"other")
        assert (await cache.head(path.replace("/v2/", "/v2/two.test/"))).status == 503, "it is one upstream's alone"
        assert other.requests == []


async def test_t13_skipping_verification_is_loud(ca: Authority, tmp_path: Path) -> None:
    """In the log of the real program, and on its admin page."""
    async with ScriptedRegistry(ssl=ca.self_signed()) as registry:
        config = pullcache_config(tmp_path / "cache", UPSTREAM, f"https://{registry.host}")
        config["upstreams"][0]["insecureSkipVerify"] = True
        path = blob(registry)
        with Pullcache(config, root=tmp_path / "service") as service:
            warnings = [line for line in service.log.splitlines() if "insecureSkipVerify" in line]
            assert len(warnings) == 1
            assert " warning " in warnings[0]
            assert UPSTREAM in warnings[0]
            host, _, port = service.host.rpartition(":")
            assert (await fetch(host, int(port), "GET", path)).status == 200
            host, _, port = service.admin_host.rpartition(":")
            page = (await fetch(host, int(port), "GET", "/metrics")).body.decode()
            assert f'pullcache_insecure_upstream{{upstream="{UPSTREAM}"}} 1.0' in page
