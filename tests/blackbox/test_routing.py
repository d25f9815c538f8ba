"""Which upstream a request means: a look-up in a closed list, by path and ``ns``; what is not there costs no contact."""

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from proxy.config.file import ConfigError, validate
from tests.conftest import RunningCache, StartCache, running, settings, upstream
from tests.fakes.client import fetch, raw_exchange
from tests.fakes.recorder import Sink
from tests.fakes.registry import ScriptedRegistry

A, B, PORTED, HUB = "registry.test", "other.test", "registry.test:5000", "docker.io"
NAMES = (A, B, PORTED, HUB)
MANIFEST = "/v2/team/app/manifests/1"

Registries = dict[str, ScriptedRegistry]


@pytest.fixture
async def registries() -> AsyncIterator[Registries]:
    """One upstream a name; each has ``team/app:1``, with content of its own."""
    async with AsyncExitStack() as stack:
        found = {name: await stack.enter_async_context(ScriptedRegistry()) for name in NAMES}
        for name, registry in found.items():
            registry.add_image("team/app", "1", [f"of {name}".encode()])
        yield found


@pytest.fixture
async def sink() -> AsyncIterator[Sink]:
    """Where nobody may call."""
    async with Sink() as recorder:
        yield recorder


@pytest.fixture
async def routed(registries: Registries, start_cache: StartCache) -> RunningCache:
    """A cache of all ``NAMES``; ``registry.test`` is the default."""
    return await start_cache(*(upstream(registry, name) for name, registry in registries.items()))


def silent(registries: Registries, *but: str) -> bool:
    """Whether no upstream, with these exceptions, was contacted."""
    return all(registry.connections == 0 for name, registry in registries.items() if name not in but)


def content(registry: ScriptedRegistry, repo: str = "team/app", tag: str = "1") -> bytes:
    """What a registry has for a tag."""
    held = registry.repository(repo)
    return held.manifests[held.tags[tag]].data


def hostile_queries(sink: str) -> list[str]:
    """Queries that name no configured upstream, though many try to look as if they did."""
    hosts = (HUB, A, PORTED.replace(":", "%3A"))
    foreign = [
        *("169.254.169.254", "169.254.169.254:80", "[fd00::1]", "[::1]:5000", "127.0.0.1", "127.1", "0", "0x7f000001"),
        *("2130706433", "017700000001", "localhost", "localhost:5000", "[::ffff:127.0.0.1]", "metadata.google.internal"),
        *("evil.test", "quay.io", "ghcr.io", "docker.com", "docker.io.evil.test", "evil-docker.io", "xn--dcker-lua.io"),
        *(
            "unix:/run/docker.sock",
            "file:///etc/passwd",
            "*",
            "*.io",
            "%2A",
            "~",
            "..",
            ".",
            "/",
            "%2F",
            "-",
            "null",
            "None",
        ),
        *(sink, f"http://{sink}", f"//{sink}", f"{sink}%2F", f"{HUB}@{sink}", f"{HUB}%40{sink}", f"{sink}%23{HUB}"),
        *("a" * 64, "a" * 256 + ".test", "a." * 2000 + "io", "%61" * 1000, "registry.test_5000", "5000", "[", "]", "%5B"),
    ]
    around = [
        *("{}@evil", "evil@{}", "u:p@{}", "{}%40evil", "{}:443", "{}:80", "{}:", "{}:0", "{}:99999", "{}:http", "{}%3A443"),
        *("{}.", ".{}", "..{}", "{}%00", "%00{}", "{}%0d%0aHost:evil", "{}%0a", "%20{}", "{}%20", "+{}", "{}+", "%09{}"),
        *("{}/", "/{}", "{}/library", "{}%2F..", "{}%2f", "http://{}", "https://{}/", "//{}", "{}%3F", "{}%23", "{}%5C"),
        *("{},evil", "{},{}", "{};", "{}%26ns=evil", "{}%2500", "%EF%BB%BF{}", "{}%E2%80%8B", "{}%FF", "{}%C0%80", "{}%"),
        *("{}&ns=evil", "evil&ns={}", "{}&ns={}", "{}&ns=", "&ns=&ns={}", "{}&%6es={}", "%22{}%22", "'{}'", "[{}]", "%25{}"),
    ]
    # Look-alikes: case, full width, dotless i, other scripts, double encoding. Names of registries are compared exactly.
    alike = [
        *("Docker.io", "DOCKER.IO", "docker.IO", "REGISTRY.TEST", "Registry.test%3A5000", "docker%252Eio", "%2564ocker.io"),
        *("%EF%BD%84ocker.io", "docker%E3%80%82io", "docker.%C4%B1o", "d%D0%BEcker.io", "docker%EF%BC%8Eio", "docker..io"),
        *("docker.io%3A", "index.docker.io.", "registry-2.docker.io", "auth.docker.io", "hub.docker.com", "docker", "io"),
        *("registry.test%3A5001", "registry.test%3A05000", "registry.test%253A5000", "registry.test%EF%BC%9A5000"),
    ]
    framed = [pattern.replace("{}", host) for pattern, host in itertools.product(around, hosts)]
    return ["ns=", "ns", "ns=&x=1", f"%6es={sink}", *(f"ns={value}" for value in (*foreign, *framed, *alike))]


async def test_t15_a_hostile_ns_is_404_without_any_contact(routed: RunningCache, registries: Registries, sink: Sink) -> None:
    queries = hostile_queries(sink.host)
    assert len(set(queries)) >= 200
    for query, path in itertools.product(queries, (MANIFEST, f"/v2/team/app/blobs/sha256:{'0' * 64}")):
        answer = await routed.get(f"{path}?{query}")
        assert answer.status == 404, query
        assert json.loads(answer.body)["errors"][0]["code"] == "NAME_UNKNOWN", query
    assert silent(registries)
    assert sink.silent


@pytest.mark.parametrize(
    "value", [b"docker.io\0", b"docker.io\xff", b"docker.io\r", b"docker io", b"docker.io\tx", b"a" * 9000]
)
async def test_t15_an_ns_that_is_not_even_http_is_refused_without_any_contact(
    routed: RunningCache, registries: Registries, value: bytes
) -> None:
    request = b"GET " + MANIFEST.encode() + b"?ns=" + value + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    answer = await raw_exchange(routed.host, routed.port, request)
    assert answer.partition(b" ")[2][:3] in (b"400", b"404", b"414")
    assert silent(registries)


FORMS = (
    ("/v2/team/app/manifests/1?ns=registry.test%3A5000", PORTED),
    ("/v2/team/app/manifests/1?ns=registry.test:5000", PORTED),
    ("/v2/registry.test_5000/team/app/manifests/1", PORTED),
    ("/v2/registry.test:5000/team/app/manifests/1", PORTED),
    ("/v2/team/app/manifests/1?ns=registry.test", A),
    ("/v2/registry.test/team/app/manifests/1", A),
    ("/v2/team/app/manifests/1", A),
    ("/v2/team/app/manifests/1?x=1&ns=other.test", B),
    ("/v2/team/app/manifests/1?ns=docker%2Eio", HUB),
    ("/v2/team/app/manifests/1?ns=index.docker.io", HUB),
    ("/v2/team/app/manifests/1?ns=registry-1.docker.io", HUB),
    ("/v2/docker.io/team/app/manifests/1", HUB),
)


async def test_t15_each_form_of_a_configured_name_reaches_that_upstream_only(
    routed: RunningCache, registries: Registries
) -> None:
    for path, name in FORMS:
        before = {key: len(registry.requests) for key, registry in registries.items()}
        answer = await routed.get(path)
        assert (answer.status, answer.body) == (200, content(registries[name])), path
        assert {key for key, registry in registries.items() if len(registry.requests) > before[key]} == {name}, path
    for registry in registries.values():
        assert all(request.target == MANIFEST for request in registry.requests)


@pytest.mark.parametrize("alias", ["index.docker.io", "registry-1.docker.io"])
async def test_an_alias_of_docker_hub_in_a_path_is_docker_hub_or_unknown_but_never_the_default(
    routed: RunningCache, registries: Registries, alias: str
) -> None:
    answer = await routed.get(f"/v2/{alias}/team/app/manifests/1")
    assert silent(registries, HUB)
    assert answer.status == 404 or answer.body == content(registries[HUB])


FOREIGN = (
    "/v2/team/app/manifests/1?ns=quay.test",
    "/v2/registry.test/team/app/manifests/1?ns=quay.test",
    "/v2/quay.test/team/app/manifests/1",
    "/v2/localhost/team/app/manifests/1",
    "/v2/localhost:5000/team/app/manifests/1",
    "/v2/registry.test:443/team/app/manifests/1",
    "/v2/registry.test_443/team/app/manifests/1",
    "/v2/Registry.test/team/app/manifests/1",
    "/v2/Team/app/manifests/1",
    "/v2/10.0.0.1/team/app/manifests/1",
    "/v2/registry.test/manifests/1",
    "/v2/registry.test_5000/manifests/1",
    "/v2/docker.io/manifests/1",
)


async def test_t16_what_is_not_configured_is_never_served_by_the_default_upstream(
    routed: RunningCache, registries: Registries
) -> None:
    for path in FOREIGN:
        repo = path.removeprefix("/v2/").partition("/manifests/")[0]
        registries[A].add_image(repo, "1", [b"a trap"])
        for ask in (routed.get, routed.head):
            assert (await ask(path)).status in (400, 404), path
    assert silent(registries)


async def test_with_ns_the_path_is_taken_as_it_is(routed: RunningCache, registries: Registries) -> None:
    image = registries[B].add_image("registry.test/team/app", "1", [b"a mirror's"])
    assert (await routed.get("/v2/registry.test/team/app/manifests/1?ns=other.test")).body == image.data
    assert silent(registries, B)


@pytest.mark.parametrize(
    "fields",
    [
        ["Host: {sink}"],
        ["Host: other.test"],
        ["Host: docker.io", "X-Forwarded-Host: {sink}", "X-Forwarded-Proto: https", "X-Forwarded-For: 10.0.0.1"],
        [
            "Host: x",
            "Forwarded: host={sink};proto=https",
            "X-Original-URL: /v2/evil/x/manifests/1",
            "X-Rewrite-URL: /metrics",
        ],
        ["Host: x", "OCI-Namespace: other.test", "ns: other.test", "Referer: http://{sink}/?ns=other.test"],
    ],
)
async def test_t17_headers_do_not_choose_the_upstream(
    routed: RunningCache, registries: Registries, sink: Sink, fields: list[str]
) -> None:
    lines = [f"GET {MANIFEST} HTTP/1.1", *(field.format(sink=sink.host) for field in fields), "Connection: close"]
    answer = await raw_exchange(routed.host, routed.port, "\r\n".join([*lines, "", ""]).encode())
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(content(registries[A]))
    assert silent(registries, A)
    assert sink.silent
    assert not any(registry.heard(sink.host) for registry in registries.values())


@pytest.mark.parametrize(
    ("line", "statuses"),
    [
        ("GET http://{sink}/v2/team/app/manifests/1", {200, 400}),
        ("GET http://{sink}/v2/team/app/manifests/1?ns=quay.test", {400, 404}),
        ("GET https://other.test/v2/team/app/manifests/1", {200, 400}),
        ("GET http://u:p@{sink}/v2/team/app/manifests/1", {200, 400}),
        ("GET http://{sink}", {400, 404}),
        ("GET //{sink}/v2/team/app/manifests/1", {400, 404}),
        ("GET {sink}", {400, 404}),
        ("GET file:///v2/team/app/manifests/1", {200, 400, 404}),
        ("CONNECT {sink}", {400, 405}),
        ("CONNECT other.test:443", {400, 405}),
        ("OPTIONS *", {400, 405}),
        ("OPTIONS http://{sink}/", {400, 405}),
        ("GET *", {400, 404}),
        ("GET ?ns=other.test", {400, 404}),
    ],
)
async def test_t17_the_authority_of_a_target_does_not_choose_the_upstream(
    routed: RunningCache, registries: Registries, sink: Sink, line: str, statuses: set[int]
) -> None:
    request = f"{line.format(sink=sink.host)} HTTP/1.1\r\nHost: {sink.host}\r\nConnection: close\r\n\r\n"
    answer = await raw_exchange(routed.host, routed.port, request.encode())
    status = int(answer.split(b" ")[1])
    assert status in statuses
    assert status != 200 or answer.endswith(content(registries[A]))
    assert silent(registries, *([A] if status == 200 else []))
    assert sink.silent


CRAFTED = ("a/b/c", "a/bc", "a", "manifests/manifests", "a/manifests/1", "v2/a")
TAGS = ("1", "manifests")


def library(name: str, repo: str) -> str:
    """Where a repository stands: official images of Docker Hub have a folder of their own."""
    return f"library/{repo}" if name == HUB and "/" not in repo else repo


async def test_t18_no_two_names_share_an_answer_whatever_the_style_the_order_and_the_restart(
    registries: Registries, tmp_path: Path
) -> None:
    for name, registry in registries.items():
        for repo, tag in itertools.product((*CRAFTED, "other.test/a"), TAGS):
            there = library(name, repo)
            registry.add_image(there, tag, [f"{name}|{there}|{tag}".encode()])
    sections = [upstream(registry, name) for name, registry in registries.items()]

    async def everything_is_its_own(cache: RunningCache, default: str) -> None:
        for name, repo, tag in itertools.product(NAMES, CRAFTED, TAGS):
            expected = content(registries[name], library(name, repo), tag)
            forms = [f"/v2/{repo}/manifests/{tag}?ns={name}", f"/v2/{name.replace(':', '_')}/{repo}/manifests/{tag}"]
            if name == default:
                forms.append(f"/v2/{repo}/manifests/{tag}")
            for form in forms:
                answer = await cache.get(form)
                assert (answer.status, answer.body) == (200, expected), form
        mirrored = await cache.get("/v2/other.test/a/manifests/1?ns=registry.test")
        assert mirrored.body == content(registries[A], "other.test/a")

    for default, order in ((A, sections), (B, sections[::-1]), (HUB, sections[2:] + sections[:2])):
        config = validate(settings(tmp_path / "cache", *order, defaultUpstream=default))
        async with running(config) as cache:
            await everything_is_its_own(cache, default)


async def test_t18_a_restart_with_the_upstreams_reordered_and_down_serves_each_its_own(
    registries: Registries, tmp_path: Path
) -> None:
    sections = [upstream(registry, name) for name, registry in registries.items()]
    for order in (sections, sections[::-1]):
        async with running(validate(settings(tmp_path / "cache", *order))) as cache:
            for name, registry in registries.items():
                answer = await cache.get(f"{MANIFEST}?ns={name}")
                assert (answer.status, answer.body) == (200, content(registry)), name
        for registry in registries.values():
            await registry.stop()


@pytest.mark.parametrize("path", ["/v2/app/manifests/1?ns={}", "/v2/{}/app/manifests/1"])
@pytest.mark.parametrize(("name", "asked"), [(HUB, "library/app"), (A, "app"), (PORTED, "app")])
async def test_t18_only_docker_hub_has_a_library(
    routed: RunningCache, registries: Registries, path: str, name: str, asked: str
) -> None:
    image = registries[name].add_image(asked, "1", [b"content"])
    answer = await routed.get(path.format(name.replace(":", "_") if "{}/" in path else name))
    assert (answer.status, answer.body) == (200, image.data)
    assert [request.path for request in registries[name].requests] == [f"/v2/{asked}/manifests/1"]


@pytest.mark.parametrize(
    "path", ["/v2/library/app/manifests/1", "/v2/app/manifests/1", "/v2/docker.io/library/app/manifests/1"]
)
async def test_docker_hub_as_default_serves_a_dockerd_mirror(
    registries: Registries, start_cache: StartCache, path: str
) -> None:
    image = registries[HUB].add_image("library/app", "1", [b"content"])
    cache = await start_cache(upstream(registries[HUB], HUB))
    assert (await cache.get(path)).body == image.data


@pytest.mark.parametrize("name", ["index.docker.io", "registry-1.docker.io"])
async def test_an_upstream_configured_by_an_alias_of_docker_hub_is_docker_hub(
    registries: Registries, start_cache: StartCache, name: str
) -> None:
    image = registries[HUB].add_image("library/app", "1", [b"content"])
    cache = await start_cache(upstream(registries[HUB], name))
    for path in ("/v2/app/manifests/1", "/v2/app/manifests/1?ns=docker.io", "/v2/docker.io/app/manifests/1"):
        assert (await cache.get(path)).body == image.data


@pytest.mark.parametrize("prefix", ["hub", "my.hub", "a_b-c"])
async def test_a_path_prefix_of_ones_own_means_its_upstream(
    registries: Registries, start_cache: StartCache, prefix: str
) -> None:
    cache = await start_cache(upstream(registries[A], A), upstream(registries[B], B, pathPrefix=prefix))
    for path in (f"/v2/{prefix}/team/app/manifests/1", "/v2/other.test/team/app/manifests/1"):
        assert (await cache.get(path)).body == content(registries[B])
    assert (await cache.get(f"{MANIFEST}?ns={prefix}")).status == 404, "a prefix is no name of a registry"
    assert silent(registries, B)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ([{"name": A}, {"name": A}], "stands twice"),
        ([{"name": A}, {"name": B, "pathPrefix": A}], "means both"),
        ([{"name": PORTED}, {"name": B, "pathPrefix": "registry.test_5000"}], "means both"),
        ([{"name": HUB}, {"name": "index.docker.io"}], "stands twice"),
        ([{"name": A, "pathPrefix": "x"}, {"name": B, "pathPrefix": "x"}], "means both"),
    ],
)
def test_t18_two_upstreams_of_one_name_or_prefix_are_refused_at_start(
    tmp_path: Path, sections: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        validate(settings(tmp_path, *sections))


async def test_without_a_default_upstream_a_name_must_say_its_registry(
    registries: Registries, start_cache: StartCache
) -> None:
    cache = await start_cache(upstream(registries[A], A), upstream(registries[B], B), defaultUpstream=None)
    answer = await fetch(cache.host, cache.port, "GET", MANIFEST)
    assert answer.status == 404
    assert json.loads(answer.body)["errors"][0]["code"] == "NAME_UNKNOWN"
    assert silent(registries)
    assert (await cache.get("/v2/other.test/team/app/manifests/1")).status == 200
