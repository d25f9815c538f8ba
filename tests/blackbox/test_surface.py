"""What is offered, and nothing beside it: methods, paths, names of content, two ports, and errors that tell no secrets."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from tests.conftest import RunningCache, StartCache, upstream
from tests.fakes.answers import oci_error, status, too_many_requests
from tests.fakes.client import Wire, WireResponse, fetch, finish, open_wire, raw_exchange, read_head
from tests.fakes.registry import ScriptedRegistry

ZEROS = "0" * 64
TAG = "/v2/team/app/manifests/1"
BLOB = f"/v2/team/app/blobs/sha256:{ZEROS}"


def code_of(answer: WireResponse) -> str:
    """The code in the JSON of an error."""
    return str(json.loads(answer.body)["errors"][0]["code"])


async def exchange(cache: RunningCache, method: str, target: str, *fields: str, body: bytes = b"") -> WireResponse:
    """One request on a connection of its own."""
    pairs = [(name, value) for name, _, value in (field.partition(": ") for field in fields)]
    return await fetch(cache.host, cache.port, method, target, pairs, body=body)


# --- T24: lists ---


@pytest.mark.parametrize("path", ["/v2/_catalog", "/v2/registry.test/_catalog"])
async def test_t24_nobody_may_list_what_is_cached(cache: RunningCache, registry: ScriptedRegistry, path: str) -> None:
    registry.add_image("team/app", "secret-tag", [b"layer"])
    assert (await cache.get("/v2/team/app/manifests/secret-tag")).status == 200
    before = len(registry.requests)
    for query in ("", "n=1000000000000", "n=-1", "n=abc", "n=", "n=1&n=2", "last=%00", "last=" + "a" * 7000):
        answer = await cache.get(f"{path}?{query}")
        assert answer.status in (400, 404), query
        assert len(answer.body) < 4096
        assert b"secret" not in answer.body
    assert len(registry.requests) == before


@pytest.mark.parametrize("path", ["/v2/team/app/tags/list", "/v2/registry.test/team/app/tags/list"])
async def test_t24_a_list_of_tags_is_the_upstreams_never_of_what_is_cached(
    cache: RunningCache, registry: ScriptedRegistry, path: str
) -> None:
    registry.add_image("team/app", "secret-tag", [b"layer"])
    assert (await cache.get("/v2/team/app/manifests/secret-tag")).status == 200
    registry.remove("team/app", "secret-tag")
    assert json.loads((await cache.get(path)).body)["tags"] == []
    before = len(registry.requests)
    for query in ("n=1000000000000", "n=-1", "n=abc", "n=", "n=1&n=2", "last=" + "a" * 7000, "&".join("abcdefghi")):
        answer = await cache.get(f"{path}?{query}")
        assert answer.status == 400, query
        assert b"secret" not in answer.body
    assert len(registry.requests) == before
    await registry.stop()
    assert (await cache.get(path)).status == 503, "what is held is no list"


async def test_t24_a_megabyte_of_last_is_refused_before_it_is_read(cache: RunningCache) -> None:
    line = b"GET /v2/team/app/tags/list?last=" + b"a" * (1 << 20) + b" HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = await raw_exchange(cache.host, cache.port, line)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 ", b"HTTP/1.1 414 "))
    assert (await cache.get("/v2/")).status == 200


# --- T26: methods and ports ---

WRITES = (
    "POST",
    "PUT",
    "PATCH",
    "DELETE",
    "OPTIONS",
    "TRACE",
    "CONNECT",
    "PROPFIND",
    "MKCOL",
    "COPY",
    "PURGE",
    "LINK",
    "QUERY",
)
NO_METHODS = ("get", "head", "post", "Get", "HEAD2", "FOO", "GETGET", "G\u00cbT", "")
PATHS = (
    *("/", "/v2/", "/v2/_catalog", TAG, f"/v2/team/app/manifests/sha256:{ZEROS}", BLOB, "/v2/team/app/blobs/uploads/"),
    *("/v2/team/app/blobs/uploads/?digest=x&mount=y", "/v2/team/app/tags/list", f"/v2/team/app/referrers/sha256:{ZEROS}"),
    *("/metrics", "/healthz", "/v2/team/app/manifests/1?ns=registry.test", "/v2/quay.test/x/manifests/1", "/v2/%2e%2e/"),
)


@pytest.mark.parametrize("method", WRITES)
async def test_t26_every_method_but_get_and_head_is_405_without_any_contact(
    cache: RunningCache, registry: ScriptedRegistry, method: str
) -> None:
    for path, body in itertools.product(PATHS, (b"", b"{}")):
        answer = await exchange(cache, method, path, body=body)
        if method == "CONNECT" and answer.status == 400:
            continue
        assert (answer.status, answer.headers.get("Allow"), code_of(answer)) == (405, "GET, HEAD", "UNSUPPORTED"), path
    assert registry.connections == 0
    assert not cache.files("blobs")


@pytest.mark.parametrize("method", NO_METHODS)
async def test_t26_what_is_no_method_is_refused_without_any_contact(
    cache: RunningCache, registry: ScriptedRegistry, method: str
) -> None:
    for path in PATHS:
        answer = await exchange(cache, method, path)
        assert (answer.status, code_of(answer)) in ((400, "UNSUPPORTED"), (405, "UNSUPPORTED")), path
    assert registry.connections == 0


@pytest.mark.parametrize("field", ["X-HTTP-Method-Override", "X-HTTP-Method", "X-Method-Override", "_method"])
async def test_t26_no_header_changes_the_method(cache: RunningCache, registry: ScriptedRegistry, field: str) -> None:
    image = registry.add_image("team/app", "1", [b"layer"])
    assert (await exchange(cache, "GET", TAG, f"{field}: DELETE")).body == image.data
    assert (await exchange(cache, "POST", TAG, f"{field}: GET")).status == 405
    assert (await exchange(cache, "POST", f"{TAG}?{field}=GET")).status == 405
    assert {request.method for request in registry.requests} == {"GET"}


@pytest.mark.parametrize(
    "path", ["/metrics", "/healthz", "/readyz", "/debug/pprof/", "/purge", "/admin", "/v1/", "/", "/v2", "//"]
)
async def test_t26_the_two_ports_have_nothing_in_common(cache: RunningCache, path: str) -> None:
    data, admin = await cache.get(path), await fetch(cache.host, cache.admin_port, "GET", path)
    assert (data.status, admin.status) != (200, 200)
    assert data.status == (200 if path == "/v2" else 404)
    assert b"pullcache_" not in data.body


@pytest.mark.parametrize("path", [TAG, BLOB, "/v2/", "/v2/_catalog"])
async def test_t26_the_registry_is_not_on_the_admin_port(cache: RunningCache, registry: ScriptedRegistry, path: str) -> None:
    assert (await fetch(cache.host, cache.admin_port, "GET", path)).status == 404
    assert registry.connections == 0


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE"])
async def test_the_admin_port_answers_with_the_upstream_down_and_asks_nobody(
    cache: RunningCache, registry: ScriptedRegistry, method: str, path: str
) -> None:
    registry_was_at = registry.connections
    await registry.stop()
    answer = await fetch(cache.host, cache.admin_port, method, path)
    assert answer.status == (200 if method in ("GET", "HEAD") else 405)
    assert registry.connections == registry_was_at == 0
    assert cache.metric("upstream_requests_total") == 0
    if (method, path) == ("GET", "/metrics"):
        assert answer.headers.get("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
        assert b"\npullcache_connections " in answer.body


async def test_the_figures_of_each_upstream_are_there_from_the_start(
    registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """At 0, before anything is asked for: a counter that is first seen at 1 has no rate, and raises no alarm."""
    cache = await start_cache(upstream(registry, "a.test"), upstream(registry, "b.test:5000"))
    lines = (await fetch(cache.host, cache.admin_port, "GET", "/metrics")).body.decode().splitlines()
    for figure in ("stale", "mismatches", "upstream_bytes"):
        for name in ("a.test", "b.test:5000"):
            assert f'pullcache_{figure}_total{{upstream="{name}"}} 0.0' in lines
    assert registry.connections == 0


# --- T29: digests ---

NOT_DIGESTS = [
    *("sha256:", "sha256:0", f"sha256:{ZEROS[1:]}", f"sha256:{ZEROS}0", f"sha256:{ZEROS[1:]}g", f"sha256:{'A' * 64}"),
    *(f"SHA256:{ZEROS}", f"Sha256:{ZEROS}", f"sha256:{'aB' * 32}", f"sha256::{ZEROS}", f":{ZEROS}", f"sha256:{ZEROS}:"),
    *(
        f"md5:{ZEROS[:32]}",
        f"sha1:{ZEROS[:40]}",
        f"sha384:{ZEROS}{ZEROS[:32]}",
        f"sha512:{ZEROS}",
        f"sha512:{ZEROS}{ZEROS}0",
    ),
    *(f"sha256+b64u:{ZEROS}", f"sha256.x:{ZEROS}", f"blake3:{ZEROS}", f"sha256:-{ZEROS[1:]}", f"sha256:+{ZEROS[1:]}"),
    *(f"sha256:0x{ZEROS[2:]}", f"sha256:{ZEROS[:32]}_{ZEROS[33:]}", f"sha256:..{ZEROS[2:]}", f"{ZEROS}:sha256"),
    *(
        f"sha256:{ZEROS};",
        f"sha256:{ZEROS}@sha256:{ZEROS}",
        f"sha256:{'0' * 7000}",
        f"x:sha256:{ZEROS}",
        f"sha256:*{ZEROS[1:]}",
    ),
]
ENCODED_DIGESTS = [
    *("sha256:../../x", f"sha256:../{ZEROS[3:]}", f"sha256:%00{ZEROS[1:]}", f"sha256:{ZEROS}%00", f"sha256:{ZEROS}%0a"),
    *(
        f"sha256%3A{ZEROS}",
        f"sha256:{'%D9%A0' * 64}",
        f"sha256:{'%EF%BC%90' * 64}",
        f"sha256:{ZEROS}%20",
        f"sha256:%2e%2e{ZEROS}",
    ),
    *(
        f"sha256:{ZEROS}/",
        f"sha256:{ZEROS}/..",
        f"sha256:{'%30' * 64}",
        f"sha256:..\\..\\{ZEROS[6:]}",
        f"sha256:{ZEROS[2:]}\u0660",
    ),
]


@pytest.mark.parametrize("kind", ["blobs", "manifests"])
async def test_t29_what_is_no_digest_is_400_without_contact_and_without_a_file(
    cache: RunningCache, registry: ScriptedRegistry, kind: str
) -> None:
    before = cache.files()
    for digest, method in itertools.product(NOT_DIGESTS, ("GET", "HEAD")):
        answer = await exchange(cache, method, f"/v2/team/app/{kind}/{digest}")
        assert answer.status == 400, digest
        assert method == "HEAD" or code_of(answer) == "DIGEST_INVALID"
    for digest in ENCODED_DIGESTS:
        raw = f"GET /v2/team/app/{kind}/{digest} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        assert (await raw_exchange(cache.host, cache.port, raw)).split(b" ")[1] in (b"400", b"404"), digest
    assert registry.connections == 0
    assert cache.files() == before


@pytest.mark.parametrize("digest", ["sha256", "0" * 64, "sha256-" + "0" * 64])
async def test_t29_what_has_no_colon_is_no_digest_of_a_blob(
    cache: RunningCache, registry: ScriptedRegistry, digest: str
) -> None:
    answer = await cache.get(f"/v2/team/app/blobs/{digest}")
    assert (answer.status, code_of(answer)) == (400, "DIGEST_INVALID")
    assert registry.connections == 0


# --- T36: paths ---

DOTS = (
    "..",
    ".",
    "...",
    "%2e%2e",
    ".%2e",
    "%2e.",
    "%252e%252e",
    "%c0%ae%c0%ae",
    "%e0%80%ae%e0%80%ae",
    "%uff0e%uff0e",
    "..%00",
)
SLASHES = ("/", "%2f", "%2F", "%252f", "%c0%af", "%e0%80%af", "%5c", "\\", "//", "/./", "%u2215", ";/", "%00/", "%0d%0a/")
ENDS = ("etc/passwd", "canary", "cache.db", "proc/self/environ")
PLACES = (
    *("/{}", "/v2/{}", "/v2/{}/manifests/1", "/v2/{}/blobs/sha256:" + ZEROS, "/v2/team/{}/manifests/1"),
    *(
        "/v2/team/app/manifests/{}",
        "/v2/team/app/blobs/{}",
        "/v2/team/app/blobs/sha256:{}",
        "/v2/registry.test/{}/manifests/1",
    ),
    *("/v2/team/app/manifests/{}?ns=registry.test", "/v2/team/{}/app/blobs/sha256:" + ZEROS),
)


def traversals() -> list[str]:
    """Ways out of a directory, at every place of a path where a name may stand."""
    ways = [(dot + slash) * depth + end for dot, slash, depth, end in itertools.product(DOTS, SLASHES, (1, 3, 8), ENDS[:1])]
    ways += [slash + dot + slash + end for dot, slash, end in itertools.product(DOTS[:4], SLASHES, ENDS)]
    return [place.replace("{}", way) for place, way in itertools.product(PLACES, ways)]


def listing(root: Path, but: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file below ``root`` that is not below ``but``."""
    files = (path for path in root.rglob("*") if but not in (path, *path.parents))
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


async def test_t36_no_path_leads_out_of_the_cache_directory_or_upstream(
    cache: RunningCache, registry: ScriptedRegistry, tmp_path: Path
) -> None:
    for name in ("canary", "etc/passwd", "blobs/canary"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("CANARY")
    outside, inside = listing(tmp_path, cache.directory), cache.files()
    targets = traversals()
    assert len(set(targets)) >= 5000
    wire: Wire | None = None
    for target in targets:
        wire = wire or await open_wire(cache.host, cache.port)
        await wire.send(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = await finish(await read_head(wire, "GET"))
        assert answer.status in (400, 404), target
        assert b"CANARY" not in answer.body, target
        if (answer.headers.get("Connection") or "").lower() == "close":
            await wire.close()
            wire = None
    if wire is not None:
        await wire.close()
    assert listing(tmp_path, cache.directory) == outside
    assert cache.files() == inside
    assert registry.connections == 0


# --- T49: what errors tell ---

INPUT = "canaryinput"
AUTH = "Authorization: Basic Y2FuYXJ5OnNlY3JldA=="
EVERY_ERROR = {
    "name unknown": ("GET", f"/v2/{INPUT}.test/x/manifests/1", 404),
    "ns unknown": ("GET", f"{TAG}?ns={INPUT}.test", 404),
    "name invalid": ("GET", f"/v2/-{INPUT}/x/manifests/1", 400),
    "digest invalid": ("GET", f"/v2/team/app/blobs/sha256:{INPUT}", 400),
    "tag invalid": ("GET", f"/v2/team/app/manifests/-{INPUT}<script>", 404),
    "no endpoint": ("GET", f"/v2/{INPUT}<script>alert(1)</script>", 404),
    "no registry": ("GET", f"/{INPUT}", 404),
    "method": ("DELETE", f"/v2/{INPUT}/x/manifests/1", 405),
    "no method": (INPUT, TAG, 400),
    "range": ("GET", TAG, 416),
    "manifest unknown": ("GET", "/v2/team/app/manifests/none", 404),
    "blob unknown": ("GET", BLOB, 404),
    "upstream 500": ("GET", "/v2/team/app/manifests/e500", 502),
    "upstream 403": ("GET", "/v2/team/app/manifests/e403", 403),
    "upstream 429": ("GET", "/v2/team/app/manifests/e429", 429),
    "upstream html": ("GET", "/v2/team/app/manifests/html", 502),
    "mismatch": ("GET", f"/v2/team/app/manifests/sha256:{'1' * 64}", 502),
    "too large": ("GET", TAG, 413),
}


@pytest.mark.parametrize("case", EVERY_ERROR)
async def test_t49_no_error_tells_version_input_or_place(cache: RunningCache, registry: ScriptedRegistry, case: str) -> None:
    registry.add_image("team/app", "1", [b"layer"])
    registry.script("*", "/v2/team/app/manifests/e500", status(500, b"stack trace"), forever=True)
    registry.script("*", "/v2/team/app/manifests/e403", oci_error(403, "DENIED"), forever=True)
    registry.script("*", "/v2/team/app/manifests/e429", too_many_requests(7), forever=True)
    registry.script("*", "/v2/team/app/manifests/html", status(200, b"<script>alert(1)</script>", "text/html"), forever=True)
    registry.repository("team/app").manifests[f"sha256:{'1' * 64}"] = registry.add_image("team/app", None, [b"2"])
    method, target, expected = EVERY_ERROR[case]
    fields = [AUTH, f"User-Agent: {INPUT}", f"X-{INPUT}: {INPUT}", f"Accept: {INPUT}/{INPUT}", f"Host: {INPUT}"]
    if case == "range":
        fields.append("Range: bytes=99999999-")
    answer = await exchange(cache, method, target, *fields, body=b"x" * 70_000 if case == "too large" else b"")
    assert answer.status == expected
    assert answer.headers.getall("X-Content-Type-Options") == ["nosniff"]
    assert answer.headers.getall("Server") == ["pullcache"]
    assert answer.headers.getall("Content-Type") == ["application/json"]
    told = "\n".join(f"{name}: {value}" for name, value in answer.headers).lower() + answer.body.decode().lower()
    for secret in (INPUT, "canary", "y2fuyxj5", "<script", "aiohttp", "python", "traceback", "stack trace", "/tmp", ".py"):
        assert secret not in told, secret
    assert str(cache.directory) not in told
    assert str(cache.admin_port) not in told
    assert case == "upstream 429" or "retry-after" not in told


async def test_t49_the_admin_port_does_not_tell_versions_either(cache: RunningCache) -> None:
    for path in ("/healthz", "/nothing"):
        server = (await fetch(cache.host, cache.admin_port, "GET", path)).headers.get("Server") or ""
        assert not any(character.isdigit() for character in server)


@pytest.mark.parametrize("port", ["port", "admin_port"])
@pytest.mark.parametrize("damage", ["X: {}\0", "X: " + "a" * 20_000, "Bad Name: {}", "Host: again", "Content-Length: x"])
async def test_t49_a_broken_header_block_is_not_quoted(cache: RunningCache, port: str, damage: str) -> None:
    for order in (f"{AUTH}\r\n{damage}", f"{damage}\r\n{AUTH}", f"{AUTH}{'A' * 20_000}", f"{AUTH}\0"):
        request = f"GET /v2/ HTTP/1.1\r\nHost: x\r\n{order}\r\n\r\n"
        answer = await raw_exchange(cache.host, getattr(cache, port), request.encode())
        assert answer == b"" or b" 400 " in answer[:16]
        assert b"Y2FuYXJ5" not in answer


@pytest.mark.parametrize("path", [TAG, BLOB])
async def test_a_request_that_comes_back_is_508_and_goes_nowhere(
    cache: RunningCache, registry: ScriptedRegistry, path: str
) -> None:
    registry.add_image("team/app", "1", [b"layer"])
    await cache.get(TAG)
    [via] = registry.requests[0].headers.getall("Via")
    before = len(registry.requests)
    for value in (via, f"1.1 other, {via}", f"{via}, 1.1 other", ", ".join(["1.1 hop"] * 40)):
        answer = await exchange(cache, "GET", path, f"Via: {value}")
        assert (answer.status, code_of(answer)) == (508, "UNAVAILABLE")
    assert len(registry.requests) == before
    assert (await exchange(cache, "GET", TAG, "Via: 1.1 other")).status == 200
