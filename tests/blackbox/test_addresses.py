"""No name, redirect, realm or spelling of an address leads to where an upstream may not connect (T05, T06), and F36."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.helpers import REPO, TAG, blob, message
from tests.conftest import UPSTREAM, StartCache, upstream
from tests.fakes.answers import redirect, with_headers
from tests.fakes.client import WireResponse, fetch
from tests.fakes.dns import Failure, ScriptedDNS, with_resolver, write_resolv_conf
from tests.fakes.recorder import Sink
from tests.fakes.registry import ScriptedRegistry
from tests.real.services import Pullcache, pullcache_config, which

QUICK = {"connect": "500ms", "headers": "1s"}

INSIDE = [  # where the sink is, and a way to write that
    ("127.0.0.2", "127.0.0.2"),
    ("127.0.0.2", "0x7f000002"),
    ("127.0.0.2", "0X7F.0.0.0x2"),
    ("127.0.0.2", "[::ffff:127.0.0.2]"),
    ("127.0.0.2", "[::ffff:7f00:2]"),
    ("127.0.0.2", "[0:0:0:0:0:FFFF:7F00:0002]"),
    ("127.0.0.1", "0.0.0.0"),  # Linux takes this for 127.0.0.1
    ("::1", "[::1]"),
    ("::1", "[::]"),
    ("::1", "[0000::0001]"),
]
ELSEWHERE = [  # nobody listens there: that it was refused is all there is to see
    "169.254.169.254",
    "0xa9fea9fe",
    "[::ffff:169.254.169.254]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:a9fe:a9fe::1]",
    "[fe80::1]",
    "[fd00:ec2::254]",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.0.1",
    "100.100.100.200",
    "224.0.0.1",
    "255.255.255.255",
    "[ff02::1]",
]
ODD = [  # whether these are addresses is a matter of opinion; that they lead nowhere is not
    "127.0.0.2.",
    "127.2",
    "2130706434",
    "0177.0.0.2",
    "017700000002",
    "2852039166",
    "0",
    "127%2e0%2e0%2e2",
    "127\u30020\u30020\u30022".encode().decode("latin-1"),
    "\uff11\uff12\uff17.0.0.\uff12".encode().decode("latin-1"),
    "127.0.0.2%00.example.com",
    "127.0.0.2\\@example.invalid",
]


@pytest.mark.parametrize(("at", "written"), INSIDE + [("127.0.0.2", other) for other in ELSEWHERE])
async def test_t05_no_spelling_of_an_inside_address_is_connected_to(
    registry: ScriptedRegistry, start_cache: StartCache, at: str, written: str
) -> None:
    """By redirect, and by a realm that ``tokenHosts`` lists: what may be asked is not where one may connect."""
    async with Sink(at) as sink:
        there = f"{written}:{sink.port}"
        listed = [] if "[" in written and "." in written else [there]
        cache = await start_cache(upstream(registry, tokenHosts=listed, timeouts=QUICK))
        for turn, path in enumerate((TAG, blob(registry), blob(registry, b"by realm")), 1):
            if turn == 3:
                registry.require_token(realm=f"http://{there}/token")
            registry.script("*", path, redirect(f"http://{there}/x"), forever=True)
            answer = await cache.get(path)
            assert sink.silent
            assert answer.status in (502, 503)
            assert UPSTREAM in message(answer)
            assert cache.metric("refused_total", upstream=UPSTREAM) >= turn
            if turn < 3:
                assert "allowAddresses" in message(answer)
                assert cache.metric("refused_total", what="address") >= turn


@pytest.mark.parametrize("written", ODD, ids=ascii)
async def test_t05_an_odd_spelling_leads_nowhere(registry: ScriptedRegistry, start_cache: StartCache, written: str) -> None:
    async with Sink("127.0.0.2") as sink:
        cache = await start_cache(upstream(registry, timeouts=QUICK))
        path = blob(registry)
        registry.script("*", path, redirect(f"http://{written}:{sink.port}/x"), forever=True)
        answer = await cache.get(path)
        assert sink.silent
        assert answer.status in (502, 503)
        assert UPSTREAM in message(answer)


@pytest.mark.parametrize("network", ["127.0.0.2/32", "127.0.0.0/29"])
@pytest.mark.parametrize("written", ["127.0.0.2", "0x7f000002", "[::ffff:127.0.0.2]"])
async def test_t05_what_is_listed_is_connected_to(
    registry: ScriptedRegistry, start_cache: StartCache, written: str, network: str
) -> None:
    """The counterpart: these spellings do lead there, and the list is what decides."""
    path = blob(registry)
    async with ScriptedRegistry("127.0.0.2") as other:
        blob(other)
        cache = await start_cache(upstream(registry, allowAddresses=["127.0.0.1/32", network], timeouts=QUICK))
        registry.script("*", path, redirect(f"http://{written}:{other.port}{path}"), forever=True)
        assert (await cache.get(path)).status == 200
        assert other.count("GET", path) == 1


async def test_t05_one_upstreams_list_is_not_anothers(registry: ScriptedRegistry, start_cache: StartCache) -> None:
    async with ScriptedRegistry("127.0.0.2") as other:
        path = blob(other)
        registry.script("*", path, redirect(f"{other.url}{path}"), forever=True)
        cache = await start_cache(upstream(registry, timeouts=QUICK), upstream(other, name="other.test"))
        assert (await cache.get(path)).status == 503
        assert other.connections == 0
        assert (await cache.get(path.replace("/v2/", "/v2/other.test/"))).status == 200


@pytest.mark.parametrize("has_it", [True, False])
async def test_t05_the_urls_of_a_layer_are_never_asked(
    registry: ScriptedRegistry, start_cache: StartCache, has_it: bool
) -> None:
    async with Sink("127.0.0.1") as near, Sink("127.0.0.2") as far:
        urls = [f"{sink.url}/{scheme}" for sink in (near, far) for scheme in ("layer", "other")]
        image = registry.add_image(REPO, "1", [b"layer"], urls=urls)
        (digest,) = image.layer_digests
        if not has_it:
            registry.remove(REPO, digest)
        cache = await start_cache(upstream(registry, allowAddresses=["127.0.0.0/8"]))
        assert (await cache.get(TAG)).body == image.data, "as it came"
        assert (await cache.head(f"/v2/{REPO}/blobs/{digest}")).status == 200, "the manifest tells the size"
        assert (await cache.get(f"/v2/{REPO}/blobs/{digest}")).status == (200 if has_it else 404)
        assert near.silent
        assert far.silent


# --- with a resolver of our own: a real process ---


def _can_replace_resolver() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0 or which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


needs_resolver = pytest.mark.skipif(not _can_replace_resolver(), reason="needs root and mount namespaces")


class Resolving(Pullcache):
    """A pullcache that asks a scripted DNS."""

    def __init__(self, config: dict[str, Any], folder: Path, dns: ScriptedDNS) -> None:
        super().__init__(config, root=folder)
        self._resolver = write_resolv_conf(folder / "resolv.conf", dns.address)

    def command(self) -> Sequence[str | Path]:
        return with_resolver([str(word) for word in super().command()], self._resolver)

    async def get(self, target: str, method: str = "GET") -> WireResponse:
        """A request to it."""
        host, _, port = self.host.rpartition(":")
        return await fetch(host, int(port), method, target)


@pytest.fixture
async def dns() -> AsyncIterator[ScriptedDNS]:
    """On an address of its own, as others may run this test at the same time."""
    numbers = (random.randint(1, 250) for _ in range(2))
    async with ScriptedDNS(f"127.53.{'.'.join(map(str, numbers))}", 53) as server:
        yield server


@asynccontextmanager
async def resolving(
    folder: Path, dns: ScriptedDNS, names: dict[str, int], *, allowed: Sequence[str] = ("127.0.0.1/32",)
) -> AsyncIterator[Resolving]:
    """The process; each name is an upstream at that port."""
    config = pullcache_config(folder / "cache", next(iter(names)), "http://unused.test")
    config["upstreams"] = [
        {"name": name, "endpoints": [f"http://{name}:{port}"], "allowAddresses": list(allowed), "timeouts": QUICK}
        for name, port in names.items()
    ]
    service = Resolving(config, folder, dns)
    await asyncio.to_thread(service.start)
    try:
        yield service
    finally:
        await asyncio.to_thread(service.stop)


@needs_resolver
@pytest.mark.parametrize("inside", ["127.0.0.2", "::1"])
async def test_t06_a_name_that_changes_its_mind_is_checked_again(tmp_path: Path, dns: ScriptedDNS, inside: str) -> None:
    """Rebinding: allowed when first asked for, inside for the next connection."""
    dns.script("a.test", ["127.0.0.1"], [inside])
    async with ScriptedRegistry() as registry, Sink(inside) as sink:
        path, other = blob(registry), blob(registry, b"other")
        registry.script("GET", other, redirect(f"http://a.test:{sink.port}/x"), forever=True)
        async with resolving(tmp_path, dns, {"a.test": registry.port}) as cache:
            assert (await cache.get(path)).status == 200
            answer = await cache.get(other)
            assert len(dns.seen("a.test", "A")) == 2, "it was asked again"
            assert answer.status == 503
            assert "allowAddresses" in message(answer)
        assert sink.silent


@needs_resolver
@pytest.mark.parametrize("address", ["169.254.169.254", "127.0.0.2", "::1", "::ffff:127.0.0.2"])
async def test_t06_a_name_that_points_inside_is_refused_until_that_is_allowed(
    tmp_path: Path, dns: ScriptedDNS, address: str
) -> None:
    listening = "127.0.0.2" if address.startswith(("169", "::ffff")) else address
    dns.script("a.test", [address])
    async with ScriptedRegistry(listening) as registry:
        path = blob(registry)
        async with resolving(tmp_path, dns, {"a.test": registry.port}) as cache:
            answer = await cache.get(path)
            assert answer.status == 503
            assert "allowAddresses" in message(answer)
        assert registry.connections == 0
        if not address.startswith("169"):
            network = f"{listening}/{128 if ':' in listening else 32}"
            async with resolving(tmp_path, dns, {"a.test": registry.port}, allowed=[network]) as cache:
                assert (await cache.get(path)).status == 200


@needs_resolver
async def test_t06_of_several_addresses_only_allowed_ones_are_tried(tmp_path: Path, dns: ScriptedDNS) -> None:
    dns.script("a.test", ["::1", "127.0.0.2", "127.0.0.1", "127.0.0.3"])
    async with ScriptedRegistry() as registry:
        path = blob(registry)
        async with AsyncExitStack() as stack:
            inside = ["127.0.0.2", "127.0.0.3", "::1"]
            sinks = [await stack.enter_async_context(Sink(address, registry.port)) for address in inside]
            async with resolving(tmp_path, dns, {"a.test": registry.port}) as cache:
                assert (await cache.get(path)).status == 200
            assert all(sink.silent for sink in sinks)


@needs_resolver
@pytest.mark.parametrize("failure", ["NXDOMAIN", "SERVFAIL", "TIMEOUT"])
async def test_f36_a_name_that_cannot_be_resolved_is_a_clear_503_in_time(
    tmp_path: Path, dns: ScriptedDNS, failure: Failure
) -> None:
    """And the other upstream does not feel it."""
    dns.script("a.test", failure)
    dns.script("b.test", ["127.0.0.1"])
    async with ScriptedRegistry() as registry:
        path = blob(registry)
        async with resolving(tmp_path, dns, {"a.test": 443, "b.test": registry.port}) as cache:
            async with asyncio.timeout(10):
                answer = await cache.get(path)
            assert answer.status == 503
            assert "a.test" in message(answer)
            assert "cannot be resolved" in message(answer)
            assert (await cache.get(path.replace("/v2/", "/v2/b.test/"))).status == 200


@needs_resolver
async def test_f36_the_last_good_address_is_kept_while_dns_fails_and_a_new_one_followed(
    tmp_path: Path, dns: ScriptedDNS
) -> None:
    """All in one process, as an answer is not asked for again within 10 s."""
    failures: dict[str, Failure] = {"nx.test": "NXDOMAIN", "serv.test": "SERVFAIL", "late.test": "TIMEOUT"}
    names = [*failures, "moved.test"]
    async with ScriptedRegistry() as old, ScriptedRegistry("127.0.0.2", port=old.port) as new:
        for registry in (old, new):  # so that each request needs a connection, and each connection an address
            registry.script("*", lambda request: True, with_headers({"Connection": "close"}), forever=True)
            registry.add_image(REPO, "1", [b"layer"])
        ports = dict.fromkeys(names, old.port)
        async with resolving(tmp_path, dns, ports, allowed=["127.0.0.1/32", "127.0.0.2/32"]) as cache:
            for name in names:
                dns.script(name, ["127.0.0.1"])
                assert (await cache.get(TAG.replace("/v2/", f"/v2/{name}/"))).status == 200
            for name, failure in failures.items():
                dns.script(name, failure)
            dns.script("moved.test", ["127.0.0.2"])
            before = len(dns.queries)
            async with asyncio.timeout(25):
                while {query.name for query in dns.queries[before:]} != set(names):
                    for name in names:
                        answer = await cache.get(TAG.replace("/v2/", f"/v2/{name}/"), "HEAD")
                        assert (answer.status, answer.headers.get("Warning")) == (200, None), name
                    await asyncio.sleep(0.1)
        assert new.requests, "the changed address is followed"
        assert not new.heard("Host: nx.test")
