"""An upstream that sends too much, in any wrapping, costs a bounded amount of memory, disk and time: T32, T33, T34."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.oracle import LARGE, blob_of, blob_path, error_of, forget_peak, manifest_path, peak_memory, pulls_well
from tests.conftest import RunningCache, StartCache, upstream
from tests.fakes import answers
from tests.fakes.content import OCI_INDEX, OCI_MANIFEST, digest_of
from tests.fakes.messages import Framing
from tests.fakes.registry import ScriptedRegistry

REPO = "team/app"
MI = 1024 * 1024
FLAT = 64 * MI
"""What a bomb may add to the memory of cache, registry and client together."""
IN_FLIGHT = 32 * MI
"""What may be on its way in buffers on both sides when a connection is closed."""

framings = pytest.mark.parametrize("framing", ["chunked", "length", "close"])


# --- T32: without end ---


@framings
@pytest.mark.parametrize("by_tag", [True, False], ids=["tag", "digest"])
async def test_an_endless_manifest_is_given_up_at_the_limit(
    cache: RunningCache, registry: ScriptedRegistry, framing: Framing, by_tag: bool
) -> None:
    """T32: 8 MiB of a manifest, and no more."""
    image = registry.add_image(REPO, "1", [b"layer"])
    path = manifest_path("1" if by_tag else image.digest)
    registry.script("GET", path, answers.endless(OCI_MANIFEST, framing=framing))
    before = forget_peak()
    assert error_of(await cache.get(path))[:2] == (502, "UNKNOWN")
    assert peak_memory() - before < FLAT
    assert registry.bytes_sent(path) < 8 * MI + IN_FLIGHT
    await registry.wait_for(lambda: registry.open_connections == 0)
    assert cache.files("blobs") == cache.files("ingest") == []
    await pulls_well(cache, path, image.data)


@framings
async def test_an_endless_token_is_given_up_at_the_limit(
    cache: RunningCache, registry: ScriptedRegistry, framing: Framing
) -> None:
    """T32: 64 KiB of a token's answer, and no more; the failure is one of the upstream."""
    registry.add_image(REPO, "1", [b"layer"])
    registry.require_token()
    registry.script("GET", "/token", answers.endless("application/json", framing=framing))
    before = forget_peak()
    status, _, message = error_of(await cache.get(manifest_path("1")))
    assert status == 502
    assert "registry.test" in message
    assert peak_memory() - before < FLAT
    assert registry.bytes_sent("/token") < IN_FLIGHT
    await registry.wait_for(lambda: registry.open_connections <= 1)


@framings
@pytest.mark.parametrize("code", [401, 403, 404, 429, 500, 302])
@pytest.mark.parametrize("content_type", ["application/json", "text/html"])
async def test_an_endless_error_is_still_the_error_that_it_is(
    cache: RunningCache, registry: ScriptedRegistry, framing: Framing, code: int, content_type: str
) -> None:
    """T32: error bodies, of manifests and blobs. A 404 that is a page for people is a middlebox's, not the registry's."""
    expected = 404 if code == 404 and content_type == "application/json" else 429 if code == 429 else 502
    endless = answers.endless(content_type, framing=framing)
    error = answers.compose(endless, answers.modifier(lambda answer: _with_status(answer, code)))
    digest = digest_of(b"content")
    registry.script("GET", lambda request: True, error, forever=True)
    before = forget_peak()
    for path in (manifest_path("1"), blob_path(digest)):
        assert error_of(await cache.get(path))[0] == expected
        assert registry.bytes_sent(path) < IN_FLIGHT
    assert peak_memory() - before < FLAT
    await registry.wait_for(lambda: registry.open_connections == 0)


def _with_status(answer: Any, code: int) -> Any:
    return type(answer)(**{**vars(answer), "status": code})


@framings
@pytest.mark.parametrize("resumed", [False, True], ids=["from the start", "as a resumed rest"])
async def test_an_endless_blob_is_given_up_at_max_blob_size(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, framing: Framing, resumed: bool
) -> None:
    """T32: bounded by ``cache.maxBlobSize``; disk and memory are given back, the client sees no clean end."""
    directory = tmp_path / "small"
    section = {"directory": str(directory), "maxBlobSize": "4Mi"}
    cache = await start_cache(upstream(registry), directory=directory, cache=section)
    data = blob_of("endless", LARGE)
    path = blob_path(registry.add_blob(REPO, data))
    if resumed:
        registry.script("GET", path, answers.compose(answers.chunked(), answers.cut(MI)))
    registry.script("GET", path, answers.endless(framing=framing), forever=True)
    before = forget_peak()
    answer = await cache.get(path)
    assert answer.status == 502 or not answer.clean_end
    assert len(answer.body) <= 4 * MI
    assert peak_memory() - before < FLAT
    assert registry.bytes_sent(path) < 4 * MI + IN_FLIGHT
    await cache.settled()
    await registry.wait_for(lambda: registry.open_connections == 0)
    assert cache.files("blobs") == cache.files("ingest") == []


# --- T33: compressed ---

CODINGS = ["gzip", "br", "zstd", "deflate", "x-gzip", "GZIP", "gzip, gzip", "identity, gzip"]


@once
def bomb() -> bytes:
    """Some 300 MB of zeros, compressed."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([packer.compress(bytes(10 * MI)) for _ in range(30)]) + packer.flush()


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("kind", ["tag", "manifest", "blob", "token"])
async def test_compressed_content_is_refused_and_not_expanded(
    cache: RunningCache, registry: ScriptedRegistry, coding: str, kind: str
) -> None:
    """T33: ``Content-Encoding`` on whatever an upstream sends; and nobody asked for any."""
    packed = gzip.compress(bomb()) if coding == "gzip, gzip" else bomb()
    image = registry.add_image(REPO, "1", [blob_of("T33", 1000)])
    path = {"manifest": manifest_path(image.digest), "blob": blob_path(image.layer_digests[0])}.get(kind, manifest_path("1"))
    where = "/token" if kind == "token" else path
    if kind == "token":
        registry.require_token()
    swapped = answers.compose(answers.swap_body(packed), answers.with_headers({"Content-Encoding": coding}))
    registry.script("GET", where, swapped)
    before = forget_peak()
    assert error_of(await cache.get(path))[:2] == (502, "UNKNOWN")
    assert peak_memory() - before < FLAT
    await cache.settled()
    assert cache.files("blobs") == []
    assert {request.headers.get("Accept-Encoding") for request in registry.requests} == {"identity"}
    if kind != "token":  # a token's failure is remembered for a minute
        await pulls_well(cache, path, image.layers[0] if kind == "blob" else image.data)


@pytest.mark.parametrize("kind", ["manifest", "blob"])
async def test_content_that_is_right_when_unpacked_is_still_refused(
    cache: RunningCache, registry: ScriptedRegistry, kind: str
) -> None:
    """T33: digests are of the bytes as they are sent; unpacking would be the door for bombs."""
    image = registry.add_image(REPO, "1", [blob_of("T33", 1000)])
    data = image.data if kind == "manifest" else image.layers[0]
    path = manifest_path(image.digest) if kind == "manifest" else blob_path(image.layer_digests[0])
    packed = answers.compose(answers.swap_body(gzip.compress(data)), answers.with_headers({"Content-Encoding": "gzip"}))
    registry.script("GET", path, packed)
    assert error_of(await cache.get(path))[:2] == (502, "UNKNOWN")
    await pulls_well(cache, path, data)


# --- T34: JSON ---


@once
def json_bomb(kind: str) -> bytes:
    """A document that costs much more than its length."""
    blank = digest_of(b"{}")
    entry = f'{{"mediaType":"{OCI_MANIFEST}","digest":"{blank}","size":2}}'
    head = f'{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":'
    match kind:
        case "nested lists":
            return (head + "[" * 4_000_000).encode()
        case "nested and closed":
            return (head + "[" * 2_000_000 + "]" * 2_000_000 + "}").encode()
        case "nested just below the limit":
            return (head + "[" * 100_000 + "]" * 100_000 + "}").encode()
        case "nested objects":
            return (head + '{"a":' * 1_000_000 + "1" + "}" * 1_000_000 + "}").encode()
        case "a huge integer":
            return (head + '[],"annotations":' + "9" * 4_000_000 + "}").encode()
        case "a huge size":
            return (head + "[" + entry.replace('"size":2', '"size":' + "9" * 4000) + "]}").encode()
        case "a size that is a float":
            return (head + "[" + entry.replace('"size":2', '"size":1e999') + "]}").encode()
        case "a million entries":
            return (head + "[" + ",".join(["{}"] * 1_000_000) + "]}").encode()
        case "a million keys":
            return (head + "[]," + ",".join(f'"{i}":0' for i in range(500_000)) + "}").encode()
        case _:
            return (head + '[],"annotations":{"a":"' + "\\u0000" * 1_300_000 + '"}').encode()


JSON_BOMBS = [
    "nested lists",
    "nested and closed",
    "nested just below the limit",
    "nested objects",
    "a huge integer",
    "a huge size",
    "a size that is a float",
    "a million entries",
    "a million keys",
    "escapes without an end",
]


@pytest.mark.parametrize("kind", JSON_BOMBS)
@pytest.mark.parametrize("by_tag", [True, False], ids=["tag", "digest"])
async def test_a_json_bomb_is_refused_while_others_are_answered(
    cache: RunningCache, registry: ScriptedRegistry, kind: str, by_tag: bool
) -> None:
    """T34: depth, numbers, elements."""
    held = registry.add_blob(REPO, b"held")
    await pulls_well(cache, blob_path(held), b"held")
    digest = registry.add_manifest(REPO, json_bomb(kind), OCI_INDEX, "1")
    before = forget_peak()
    refused, slowest = await _beside(cache, manifest_path("1" if by_tag else digest), blob_path(held))
    assert error_of(refused)[:2] == (502, "UNKNOWN")
    assert slowest < 2, "others waited for it"
    assert peak_memory() - before < 2 * FLAT
    assert digest not in [f"sha256:{path.name}" for path in cache.files("blobs")]


async def test_the_largest_manifest_that_is_taken_does_not_keep_others_waiting(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    """T34: an index as large as the limits allow is valid, and costs others no more than a moment."""
    blank = digest_of(b"{}")
    entries = [{"mediaType": OCI_MANIFEST, "digest": blank, "size": 2} for _ in range(55_000)]
    data = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}, separators=(",", ":")).encode()
    assert len(data) < 8 * MI
    registry.add_manifest(REPO, data, OCI_INDEX, "1")
    held = registry.add_blob(REPO, b"held")
    await pulls_well(cache, blob_path(held), b"held")
    served, slowest = await _beside(cache, manifest_path("1"), blob_path(held))
    assert (served.status, served.body) == (200, data)
    assert slowest < 2, "others waited for it"


async def _beside(cache: RunningCache, path: str, other: str) -> tuple[Any, float]:
    """The answer for ``path``, and the longest that any of the requests for ``other`` took meanwhile."""
    loop = asyncio.get_running_loop()
    main = asyncio.create_task(cache.get(path))
    slowest = 0.0
    while not main.done():
        began = loop.time()
        assert (await cache.get(other)).body == b"held"
        slowest = max(slowest, loop.time() - began)
    return await main, slowest
