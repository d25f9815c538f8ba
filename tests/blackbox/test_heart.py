"""The main job: fetched once, checked, kept, served to everybody, also while the upstream is down."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.conftest import RunningCache
from tests.fakes.answers import gate
from tests.fakes.registry import ScriptedRegistry

LAYER = bytes(range(256)) * 16384  # 4 MiB


async def test_an_image_is_served_cold_warm_and_with_the_upstream_down(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    image = registry.add_image("team/app", "1", [LAYER, b"small"])
    for state in ("cold", "warm", "down"):
        if state == "down":
            await registry.stop()
        for reference in ("1", image.digest):
            answer = await cache.get(f"/v2/team/app/manifests/{reference}?ns=registry.test")
            assert (answer.status, answer.body, answer.clean_end) == (200, image.data, True)
            assert answer.headers.get("Docker-Content-Digest") == image.digest
            assert answer.headers.get("Content-Type") == image.media_type
        for digest, data in zip(image.layer_digests, image.layers, strict=True):
            answer = await cache.get(f"/v2/registry.test/team/app/blobs/{digest}")
            assert (answer.status, answer.body, answer.clean_end) == (200, data, True)
            assert answer.headers.get("Content-Length") == str(len(data))
    for digest in image.layer_digests:
        assert registry.count("GET", f"/v2/team/app/blobs/{digest}") == 1
        assert registry.count("HEAD", f"/v2/team/app/blobs/{digest}") == 0


async def test_a_stale_tag_says_so(cache: RunningCache, registry: ScriptedRegistry) -> None:
    registry.add_image("team/app", "1", [b"layer"])
    assert (await cache.get("/v2/team/app/manifests/1")).headers.get("Warning") is None
    await registry.stop()
    warning = (await cache.head("/v2/team/app/manifests/1")).headers.get("Warning")
    assert warning is not None
    assert warning.startswith('299 - "served from the cache')
    assert "registry.test" in warning


async def test_clients_follow_a_download_that_outlives_the_first_of_them(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    digest = registry.add_blob("team/app", LAYER)
    path = f"/v2/team/app/blobs/{digest}"
    go_on = asyncio.Event()
    registry.script("GET", path, gate(go_on, after=len(LAYER) // 2))
    clients = [await cache.open(path) for _ in range(50)]
    for client in clients:
        assert await client.read(64 * 1024) == LAYER[: 64 * 1024], "the first bytes come long before the last"
    for client in clients[::2]:
        await client.abort()
    go_on.set()
    for client in clients[1::2]:
        assert await client.read_all() == LAYER[64 * 1024 :]
        assert client.clean_end
        await client.close()
    assert registry.count("GET", path) == 1
    assert registry.count("HEAD", path) == 0
    assert cache.metric("followers_total") == 49
    await cache.settled()
    assert cache.held(digest) == LAYER


@pytest.mark.parametrize("reference", ["1", "latest"])
async def test_errors_name_the_upstream(cache: RunningCache, registry: ScriptedRegistry, reference: str) -> None:
    await registry.stop()
    answer = await cache.get(f"/v2/team/app/manifests/{reference}")
    assert answer.status == 503
    error = json.loads(answer.body)["errors"][0]
    assert error["code"] == "UNAVAILABLE"
    assert error["message"] == f"registry.test ({registry.host}) cannot be reached: connection refused"


async def test_the_log_says_how_many_bytes_a_client_was_given(
    cache: RunningCache, registry: ScriptedRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    digest = registry.add_blob("team/app", LAYER)
    with caplog.at_level("INFO", "proxy.access"):
        await cache.get(f"/v2/team/app/blobs/{digest}")
        await cache.get(f"/v2/team/app/blobs/{digest}", [("Range", "bytes=10-19")])
        async with asyncio.timeout(10):
            while len(caplog.records) < 2:  # the line is written after the client has its last byte
                await asyncio.sleep(0.005)
    assert [record.fields["bytes"] for record in caplog.records if hasattr(record, "fields")] == [len(LAYER), 10]


async def test_what_a_tag_was_confirmed_to_be_is_served_by_digest_with_the_upstream_down(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    """containerd asks HEAD by tag, then GET by digest; the content may have come from another repository."""
    image = registry.add_image("team/app", "1", [b"layer"])
    registry.add_image("team/other", "1", [b"layer"])
    await cache.get("/v2/team/app/manifests/1")
    assert (await cache.head("/v2/team/other/manifests/1")).status == 200
    await registry.stop()
    for reference in ("1", image.digest):
        assert (await cache.get(f"/v2/team/other/manifests/{reference}")).body == image.data
