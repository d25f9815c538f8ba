"""The registry API as clients see it on the wire: statuses, headers, conditions, ranges, and what is asked upstream."""

from __future__ import annotations

import json
import random

import pytest

from tests.conftest import RunningCache
from tests.fakes.answers import chunked, swap_body, with_headers, without_headers
from tests.fakes.client import WireResponse, fetch, raw_exchange
from tests.fakes.content import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, digest_of
from tests.fakes.registry import Image, ScriptedRegistry

REPO = "team/app"
TAG = f"/v2/{REPO}/manifests/1"
LAYER = bytes(random.Random(1).randbytes(3_000_000))
SCHEMA1 = "application/vnd.docker.distribution.manifest.v1+json"
SIGNED1 = "application/vnd.docker.distribution.manifest.v1+prettyjws"
OLD = {SCHEMA1, SIGNED1}
MODERN = {OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST}
IMMUTABLE = "public, max-age=31536000, immutable"
ZEROS = f"sha256:{'0' * 64}"


@pytest.fixture
def image(registry: ScriptedRegistry) -> Image:
    """``team/app:1`` upstream."""
    return registry.add_image(REPO, "1", [LAYER, b"small", b""])


def blob(digest: str) -> str:
    """The path of a blob."""
    return f"/v2/{REPO}/blobs/{digest}"


def manifest(reference: str) -> str:
    """The path of a manifest."""
    return f"/v2/{REPO}/manifests/{reference}"


def asked(registry: ScriptedRegistry) -> list[str]:
    """Methods and paths of what has reached the upstream, in order."""
    return [f"{request.method} {request.path}" for request in registry.requests]


def error_of(answer: WireResponse) -> str:
    """The code of an error, whose form is checked (OCI distribution spec, "Error Codes")."""
    assert answer.headers.getall("Content-Type") == ["application/json"]
    assert answer.headers.get("Cache-Control") == "private, no-store"
    assert answer.headers.get("Vary") == "Authorization, Accept"
    assert answer.headers.get("Content-Length") == str(len(answer.body))
    [error] = json.loads(answer.body)["errors"]
    assert set(error) == {"code", "message", "detail"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return str(error["code"])


@pytest.mark.parametrize("path", ["/v2/", "/v2"])
async def test_the_base_says_that_this_is_a_registry(cache: RunningCache, registry: ScriptedRegistry, path: str) -> None:
    answer, head = await cache.get(path), await cache.head(path)
    assert (answer.status, json.loads(answer.body)) == (200, {})
    assert (head.status, head.body, head.headers.get("Content-Length")) == (200, b"", "2")
    for got in (answer, head):
        assert got.headers.get("Docker-Distribution-Api-Version") == "registry/2.0"
        assert (got.headers.get("Content-Type") or "").startswith("application/json")
    assert registry.connections == 0


@pytest.mark.parametrize("media_type", sorted(MODERN))
@pytest.mark.parametrize("by_tag", [True, False], ids=["tag", "digest"])
async def test_a_manifest_has_the_headers_that_clients_need_cold_and_warm(
    cache: RunningCache, registry: ScriptedRegistry, media_type: str, by_tag: bool
) -> None:
    stored = (
        registry.add_index(REPO, "1", [], media_type)
        if media_type in (OCI_INDEX, DOCKER_LIST)
        else registry.add_image(REPO, "1", [b"layer"], media_type=media_type)
    )
    path = TAG if by_tag else manifest(stored.digest)
    for ask in (cache.head, cache.get, cache.head, cache.get):
        answer = await ask(path)
        assert (answer.status, answer.clean_end, answer.extra) == (200, True, b"")
        assert answer.body == (stored.data if ask == cache.get else b"")
        assert answer.headers.getall("Content-Length") == [str(len(stored.data))]
        assert answer.headers.getall("Content-Type") == [media_type]
        assert answer.headers.getall("Docker-Content-Digest") == [stored.digest]
        assert answer.headers.getall("ETag") == [f'"{stored.digest}"']
        assert answer.headers.get("Accept-Ranges") == "bytes"
        assert answer.headers.get("Cache-Control") == ("no-cache" if by_tag else IMMUTABLE)
        assert answer.headers.get("Vary") == ("Accept" if by_tag else None)
        assert not answer.headers.has("Transfer-Encoding")
        assert not answer.headers.has("Content-Encoding")


@pytest.mark.parametrize("data", [LAYER, b"small", b""], ids=["large", "small", "empty"])
async def test_a_blob_has_the_headers_that_clients_need_cold_and_warm(
    cache: RunningCache, registry: ScriptedRegistry, data: bytes
) -> None:
    digest = registry.add_blob(REPO, data)
    for ask in (cache.head, cache.get, cache.head, cache.get):
        answer = await ask(blob(digest), [("Accept-Encoding", "zstd;q=1.0, gzip;q=0.8, deflate;q=0.5")])
        assert (answer.status, answer.clean_end, answer.extra) == (200, True, b"")
        assert answer.body == (data if ask == cache.get else b"")
        assert answer.headers.getall("Content-Length") == [str(len(data))]
        assert answer.headers.getall("Content-Type") == ["application/octet-stream"]
        assert answer.headers.getall("Docker-Content-Digest") == [digest]
        assert answer.headers.get("ETag") == f'"{digest}"'
        assert answer.headers.get("Cache-Control") == IMMUTABLE
        assert not answer.headers.has("Content-Encoding")
        await cache.settled()


@pytest.mark.parametrize("held", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("kind", ["manifest", "blob"])
async def test_the_answer_to_head_is_nothing_but_headers_on_the_wire(
    cache: RunningCache, image: Image, kind: str, held: bool
) -> None:
    path, size = (TAG, len(image.data)) if kind == "manifest" else (blob(image.layer_digests[0]), len(LAYER))
    if held:
        await cache.get(path)
        await cache.settled()
    requests = f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\nGET /v2/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    head, _, rest = (await raw_exchange(cache.host, cache.port, requests.encode())).partition(b"\r\n\r\n")
    assert f"content-length: {size}".encode() in head.lower()
    assert rest.startswith(b"HTTP/1.1 200 "), "the next answer follows at once"


async def test_head_of_a_blob_that_is_not_held_starts_no_download(
    cache: RunningCache, registry: ScriptedRegistry, image: Image
) -> None:
    for digest, data in zip(image.layer_digests, image.layers, strict=True):
        answer = await cache.head(blob(digest))
        assert (answer.status, answer.headers.get("Content-Length")) == (200, str(len(data)))
    assert not cache.metric("fills_in_flight")
    assert {request.method for request in registry.requests} == {"HEAD"}


async def test_the_media_type_is_stored_without_parameters(
    cache: RunningCache, registry: ScriptedRegistry, image: Image
) -> None:
    registry.script("*", TAG, with_headers({"Content-Type": f"{OCI_MANIFEST}; charset=utf-8"}), forever=True)
    for ask in (cache.get, cache.head):
        assert (await ask(TAG)).headers.get("Content-Type") == OCI_MANIFEST


@pytest.mark.parametrize("path", [manifest(".INVALID_MANIFEST_NAME"), manifest("-x"), manifest("a" * 129), manifest("a+b")])
async def test_an_illegal_tag_is_404_as_conformance_wants(
    cache: RunningCache, registry: ScriptedRegistry, path: str
) -> None:
    answer = await cache.get(path)
    assert (answer.status, error_of(answer)) == (404, "MANIFEST_UNKNOWN")
    assert registry.connections == 0


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        (manifest("sha256:totallywrong"), 400, "DIGEST_INVALID"),
        (blob("sha256:baddigeststring"), 400, "DIGEST_INVALID"),
        (manifest("missing"), 404, "MANIFEST_UNKNOWN"),
        (manifest(ZEROS), 404, "MANIFEST_UNKNOWN"),
        (blob(ZEROS), 404, "BLOB_UNKNOWN"),
        ("/v2/no/such/manifests/1", 404, "MANIFEST_UNKNOWN"),
        ("/v2/Upper/manifests/1?ns=registry.test", 400, "NAME_INVALID"),
        (f"/v2/{'a' * 256}/manifests/1", 400, "NAME_INVALID"),
        ("/nothing", 404, "NAME_UNKNOWN"),
    ],
)
async def test_errors_have_the_form_and_the_code_of_the_specification(
    cache: RunningCache, image: Image, path: str, status: int, code: str
) -> None:
    answer, head = await cache.get(path), await cache.head(path)
    assert (answer.status, error_of(answer)) == (status, code)
    assert (head.status, head.body, head.headers.get("Content-Type")) == (status, b"", "application/json")


async def test_head_of_a_manifest_as_a_blob_is_cheap(cache: RunningCache, registry: ScriptedRegistry, image: Image) -> None:
    for _ in ("cold", "warm"):
        answer = await cache.head(blob(image.digest))
        assert answer.status in (200, 404)
        assert answer.status == 404 or answer.headers.get("Content-Length") == str(len(image.data))
        assert not registry.seen("GET", blob(image.digest))
        await cache.get(manifest(image.digest))


# --- what reaches upstream ---


@pytest.mark.parametrize(
    ("lines", "sent"),
    [
        ([], MODERN),
        (["*/*"], MODERN),
        (["text/html"], MODERN),
        ([DOCKER_LIST, OCI_MANIFEST, f"{OCI_INDEX};q=0.5", DOCKER_MANIFEST], MODERN),
        ([f"{DOCKER_MANIFEST}, {DOCKER_LIST}", f"{OCI_MANIFEST},{OCI_INDEX}, */*"], MODERN),
        ([OCI_MANIFEST], {OCI_MANIFEST}),
        ([DOCKER_MANIFEST, DOCKER_LIST], {DOCKER_MANIFEST, DOCKER_LIST}),
        ([OCI_MANIFEST, DOCKER_MANIFEST, SIGNED1, SCHEMA1, DOCKER_LIST, OCI_INDEX], MODERN),
    ],
)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_all_accept_lines_count_and_schema1_is_never_added(
    cache: RunningCache, registry: ScriptedRegistry, image: Image, method: str, lines: list[str], sent: set[str]
) -> None:
    answer = await fetch(cache.host, cache.port, method, TAG, [("Accept", line) for line in lines])
    assert answer.status == 200
    [request] = registry.requests
    [field] = request.headers.getall("Accept")
    kinds = {kind.partition(";")[0].strip() for kind in field.split(",")}
    assert kinds - {"*/*"} - {kind for kind in OLD if kind in ", ".join(lines)} == sent
    assert ("*/*" in kinds) <= any("*/*" in line for line in lines)
    assert request.headers.get("Accept-Encoding", "identity") == "identity"


async def test_a_tag_is_asked_for_by_one_get_first_and_one_head_each_time_after(
    cache: RunningCache, registry: ScriptedRegistry, image: Image
) -> None:
    for _ in range(4):
        assert (await cache.get(TAG)).body == image.data
    assert asked(registry) == [f"GET {TAG}"] + [f"HEAD {TAG}"] * 3


async def test_a_moved_tag_brings_the_new_content_by_one_get(
    cache: RunningCache, registry: ScriptedRegistry, image: Image
) -> None:
    await cache.get(TAG)
    moved = registry.add_image(REPO, "1", [b"moved"])
    before = len(registry.requests)
    for _ in range(2):
        answer = await cache.get(TAG)
        assert (answer.body, answer.headers.get("Docker-Content-Digest")) == (moved.data, moved.digest)
    assert asked(registry)[before:] == [f"HEAD {TAG}", f"GET {manifest(moved.digest)}", f"HEAD {TAG}"]
    registry.move_tag(REPO, "1", image.digest)
    assert (await cache.get(TAG)).body == image.data, "and back"
    assert len(registry.seen("GET")) == 2


async def test_head_of_a_cold_tag_is_head_upstream(cache: RunningCache, registry: ScriptedRegistry, image: Image) -> None:
    for _ in range(2):
        assert (await cache.head(TAG)).headers.get("Docker-Content-Digest") == image.digest
    assert asked(registry) == [f"HEAD {TAG}"] * 2


@pytest.mark.parametrize("lack", [without_headers("Docker-Content-Digest"), chunked()], ids=["digest", "length"])
async def test_head_that_says_too_little_upstream_is_followed_by_one_get(
    cache: RunningCache, registry: ScriptedRegistry, image: Image, lack: object
) -> None:
    registry.script("HEAD", TAG, lack, forever=True)  # type: ignore[arg-type]
    answer = await cache.head(TAG)
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers.get("Docker-Content-Digest") == image.digest
    assert answer.headers.get("Content-Length") == str(len(image.data))
    assert asked(registry) == [f"HEAD {TAG}", f"GET {TAG}"]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_tag_that_upstream_deleted_is_404_and_forgotten(
    cache: RunningCache, registry: ScriptedRegistry, image: Image, method: str
) -> None:
    assert (await cache.get(TAG)).status == 200
    registry.remove(REPO, "1")
    assert (await fetch(cache.host, cache.port, method, TAG)).status == 404
    await registry.stop()
    answer = await cache.get(TAG)
    assert (answer.status, error_of(answer)) == (503, "UNAVAILABLE")
    assert (await cache.get(manifest(image.digest))).body == image.data, "by digest it is still held"


async def test_a_moved_tag_whose_manifest_cannot_be_had_goes_on_being_served_stale(
    cache: RunningCache, registry: ScriptedRegistry, image: Image
) -> None:
    await cache.get(TAG)
    moved = registry.add_image(REPO, "1", [b"moved"])
    registry.script("GET", manifest(moved.digest), swap_body(b"{}"), forever=True)
    for _ in range(3):
        answer = await cache.get(TAG)
        assert (answer.status, answer.body, answer.headers.has("Warning")) == (200, image.data, True)


# --- unusual content ---


@pytest.mark.parametrize("kind", [SCHEMA1, SIGNED1, "text/plain"])
async def test_schema1_is_refused_in_words_that_say_what_to_do(
    cache: RunningCache, registry: ScriptedRegistry, kind: str
) -> None:
    data = json.dumps({"schemaVersion": 1, "name": REPO, "tag": "1", "fsLayers": [], "history": []}).encode()
    registry.add_manifest(REPO, data, kind, "1")
    answer = await cache.get(TAG, [("Accept", f"{OCI_MANIFEST}, {kind}")])
    assert (answer.status, error_of(answer)) == (502, "UNKNOWN")
    message = json.loads(answer.body)["errors"][0]["message"]
    assert "schema 1" in message
    assert "registry.test" in message
    assert not cache.files("blobs")


async def test_sha512_content_is_served_and_verified_as_sha512(cache: RunningCache, registry: ScriptedRegistry) -> None:
    layer = registry.add_blob(REPO, LAYER, "sha512")
    data = registry.add_image(REPO, None, [b"x"]).data
    digest = registry.add_manifest(REPO, data, OCI_MANIFEST, "1", "sha512")
    for _ in ("cold", "warm"):
        for path, body, name in ((blob(layer), LAYER, layer), (manifest(digest), data, digest)):
            answer = await cache.get(path)
            assert (answer.status, answer.body == body) == (200, True)
            assert answer.headers.get("Docker-Content-Digest") == name
    tagged = await cache.get(TAG)
    assert tagged.body == data
    assert tagged.headers.get("Docker-Content-Digest") in (digest, digest_of(data))
    lying = registry.add_blob(REPO, b"true", "sha512")
    registry.script("GET", blob(lying), swap_body(b"lie!"), forever=True)
    answer = await cache.get(blob(lying))
    assert answer.status == 502
    assert cache.held(lying) is None
