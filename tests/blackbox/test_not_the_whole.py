"""What is not the whole content is never kept or served as such: T23."""

from __future__ import annotations

import pytest

from tests.blackbox.oracle import (
    LARGE,
    SMALL,
    blob_of,
    blob_path,
    content_of,
    manifest_path,
    pulls_well,
    vouched_wrongly,
)
from tests.conftest import RunningCache
from tests.fakes import answers
from tests.fakes.messages import Answer, Request
from tests.fakes.registry import ScriptedRegistry

REPO = "team/app"
PORTAL = answers.status(200, b"<html><body>Sign in to continue</body></html>", "text/html")


async def test_head_then_get_gives_the_whole(cache: RunningCache, registry: ScriptedRegistry) -> None:
    """T23: a HEAD leaves nothing that a GET could be answered with."""
    image = registry.add_image(REPO, "1", [blob_of("T23", LARGE)])
    targets = {manifest_path("1"): image.data, manifest_path(image.digest): image.data}
    targets |= {blob_path(d): data for d, data in zip(image.layer_digests, image.layers, strict=True)}
    for path, data in targets.items():
        head = await cache.head(path)
        assert (head.status, head.body, head.headers.get("Content-Length")) == (200, b"", str(len(data)))
        await pulls_well(cache, path, data)


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(("first", "last"), [(0, 99), (1000, 1999), (3999, 3999)])
async def test_a_range_of_a_cold_blob_leaves_the_whole_blob(
    cache: RunningCache, registry: ScriptedRegistry, size: int, first: int, last: int
) -> None:
    """T23: Range first, then full."""
    data = blob_of("T23 range", size)
    path = blob_path(registry.add_blob(REPO, data))
    part = await cache.get(path, [("Range", f"bytes={first}-{last}")])
    assert (part.status, part.clean_end, part.body) == (206, True, data[first : last + 1])
    await pulls_well(cache, path, data)
    assert registry.count("GET", path) == 1


def _partial(request: Request) -> Answer:
    """The first hundred bytes as 206, though nobody asked for a part."""
    headers = {"Content-Range": f"bytes 0-99/{LARGE}"}
    return answers.status(206, blob_of("unasked", LARGE)[:100], "application/octet-stream", headers)


async def test_a_206_that_nobody_asked_for_is_not_the_whole(cache: RunningCache, registry: ScriptedRegistry) -> None:
    """T23: 206 is never kept as 200; what is missing is asked for."""
    data = blob_of("unasked", LARGE)
    path = blob_path(registry.add_blob(REPO, data))
    registry.script("GET", path, _partial)
    assert not vouched_wrongly(await cache.get(path), data)
    await pulls_well(cache, path, data)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("kind", ["tag", "manifest", "blob"])
async def test_the_page_of_a_captive_portal_is_never_content(
    cache: RunningCache, registry: ScriptedRegistry, method: str, kind: str
) -> None:
    """T23: HTML with status 200, for everything that is asked, by GET and by HEAD."""
    image = registry.add_image(REPO, "1", [b"layer"])
    path = {"tag": manifest_path("1"), "manifest": manifest_path(image.digest), "blob": blob_path(image.layer_digests[0])}[
        kind
    ]
    portal = registry.script("*", lambda request: True, PORTAL, forever=True)
    answer = await (cache.get(path) if method == "GET" else cache.head(path))
    if (method, kind) != ("HEAD", "blob"):  # the type of a blob says nothing, and its size cannot be checked
        assert answer.status == 502
    assert b"html" not in answer.body
    assert cache.files("blobs") == []
    portal.cancel()
    await pulls_well(cache, path, content_of(image, kind))


async def test_a_held_tag_is_served_stale_from_behind_a_captive_portal(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    """T23: HTML with status 200 is an upstream that fails."""
    image = registry.add_image(REPO, "1", [b"layer"])
    await pulls_well(cache, manifest_path("1"), image.data)
    portal = registry.script("*", lambda request: True, PORTAL, forever=True)
    answer = await cache.get(manifest_path("1"))
    assert (answer.status, answer.body) == (200, image.data)
    assert "registry.test" in (answer.headers.get("Warning") or "")
    portal.cancel()
    assert (await cache.get(manifest_path("1"))).headers.get("Warning") is None
