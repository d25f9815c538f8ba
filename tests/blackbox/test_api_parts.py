"""Conditions and ranges: a part is exact, never stored as the whole, and never costs a download of its own."""

from __future__ import annotations

import pytest

from tests.blackbox.test_api import IMMUTABLE, LAYER, REPO, TAG, blob, error_of, manifest
from tests.conftest import RunningCache
from tests.fakes.registry import Image, ScriptedRegistry

SIZE = len(LAYER)


@pytest.fixture
def image(registry: ScriptedRegistry) -> Image:
    """``team/app:1`` upstream."""
    return registry.add_image(REPO, "1", [LAYER, b"small", b""])


@pytest.mark.parametrize(
    ("condition", "status"),
    [('"{}"', 304), ('W/"{}"', 304), ('"other", "{}"', 304), ("*", 304), ('"other"', 200), ("{}", 200), ("", 200)],
)
async def test_if_none_match_saves_the_body(cache: RunningCache, image: Image, condition: str, status: int) -> None:
    layer = image.layer_digests[1]
    for path, digest in ((TAG, image.digest), (manifest(image.digest), image.digest), (blob(layer), layer)):
        await cache.get(path)
        for ask in (cache.get, cache.head):
            answer = await ask(path, [("If-None-Match", condition.format(digest))])
            assert (answer.status, answer.clean_end, answer.extra) == (status, True, b"")
            assert answer.headers.get("ETag") == f'"{digest}"'
            assert answer.headers.get("Cache-Control") == ("no-cache" if path == TAG else IMMUTABLE)
            assert status == 200 or not answer.headers.has("Transfer-Encoding")
        both = [("If-None-Match", condition.format(digest)), ("Range", "bytes=0-0")]
        assert (await cache.get(path, both)).status == (304 if status == 304 else 206)


ONE_RANGE = {
    "bytes=0-0": (0, 1),
    "bytes=0-": (0, SIZE),
    "bytes=100-199": (100, 200),
    f"bytes={SIZE // 2}-": (SIZE // 2, SIZE),
    f"bytes={SIZE - 1}-": (SIZE - 1, SIZE),
    f"bytes=0-{SIZE - 1}": (0, SIZE),
    f"bytes=10-{SIZE + 10}": (10, SIZE),
    "bytes=-1": (SIZE - 1, SIZE),
    f"bytes=-{SIZE * 2}": (0, SIZE),
    "BYTES=5-9": (5, 10),
}


@pytest.mark.parametrize("asking", ONE_RANGE)
async def test_t23_a_range_of_a_blob_is_exact_and_never_stored_as_the_whole(
    cache: RunningCache, registry: ScriptedRegistry, image: Image, asking: str
) -> None:
    path, (start, stop) = blob(image.layer_digests[0]), ONE_RANGE[asking]
    for state in ("cold", "warm"):
        answer = await cache.get(path, [("Range", asking)])
        assert (answer.status, answer.body == LAYER[start:stop], answer.clean_end) == (206, True, True), state
        assert answer.headers.getall("Content-Range") == [f"bytes {start}-{stop - 1}/{SIZE}"]
        assert answer.headers.getall("Content-Length") == [str(stop - start)]
        assert answer.headers.get("Docker-Content-Digest") == image.layer_digests[0]
        assert (await cache.get(path)).body == LAYER, state
        await cache.settled()
    assert registry.count("GET", path) == 1


@pytest.mark.parametrize("asking", [f"bytes={SIZE}-", f"bytes={SIZE}-{SIZE + 9}", "bytes=9999999999-", "bytes=-0"])
async def test_t48_a_range_beyond_the_end_is_416_with_the_size(cache: RunningCache, image: Image, asking: str) -> None:
    path = blob(image.layer_digests[0])
    for state in ("cold", "warm"):
        answer = await cache.get(path, [("Range", asking)])
        assert (answer.status, error_of(answer)) == (416, "RANGE_INVALID"), state
        assert answer.headers.getall("Content-Range") == [f"bytes */{SIZE}"]
        await cache.settled()
        assert (await cache.get(path)).body == LAYER
        await cache.settled()


@pytest.mark.parametrize(
    "asking",
    [
        *("bytes=0-0,5-9", "bytes=0-0,-1", "bytes=" + ",".join(["0-"] * 1000), "bytes=" + ",".join(["0-1"] * 3000)),
        *("bytes=5-2", "bytes=-", "bytes=", "bytes", "", "=0-1", "items=0-1", "bytes=a-b", "bytes=1", "bytes 0-1"),
        *("bytes=0x0-0x9", "bytes=--1", "bytes=+0-1", "bytes=1e1-", "bytes=0-1;2-3", "bytes=0-1 2-3", "none"),
        *("bytes=\u0660-\u0661", "bytes=\uff10-\uff19", "bytes=0-1\t,", "bytes=0.0-1.0", "bytes=\xb2-\xb3"),
    ],
)
async def test_t48_many_ranges_and_nonsense_mean_the_whole_content(cache: RunningCache, image: Image, asking: str) -> None:
    path = blob(image.layer_digests[1])
    for state in ("cold", "warm"):
        answer = await cache.get(path, [("Range", asking.encode().decode("latin-1"))])
        assert (answer.status, answer.body, answer.headers.has("Content-Range")) == (200, b"small", False), state
        await cache.settled()


@pytest.mark.parametrize("asking", ["0-" + "9" * 40, "9" * 40 + "-", "-" + "9" * 40, "0-" + "0" * 15_000])
async def test_t48_numbers_without_end_are_bounded(cache: RunningCache, image: Image, asking: str) -> None:
    answer = await cache.get(blob(image.layer_digests[1]), [("Range", f"bytes={asking}")])
    assert answer.status in (200, 206, 416)
    assert answer.status == 416 or answer.body in (b"small", b"s")


@pytest.mark.parametrize(
    ("condition", "status"), [('"{}"', 206), ('"other"', 200), ('W/"{}"', 200), ("Sat, 01 Jan 2022 00:00:00 GMT", 200)]
)
async def test_if_range_holds_for_the_very_content_only(
    cache: RunningCache, image: Image, condition: str, status: int
) -> None:
    digest = image.layer_digests[0]
    answer = await cache.get(blob(digest), [("Range", "bytes=1-9"), ("If-Range", condition.format(digest))])
    assert (answer.status, answer.body == (LAYER[1:10] if status == 206 else LAYER)) == (status, True)


@pytest.mark.parametrize("path", ["tag", "digest"])
async def test_a_range_of_a_manifest_is_exact(cache: RunningCache, image: Image, path: str) -> None:
    answer = await cache.get(TAG if path == "tag" else manifest(image.digest), [("Range", "bytes=2-5")])
    assert (answer.status, answer.body) == (206, image.data[2:6])
    assert answer.headers.get("Content-Range") == f"bytes 2-5/{len(image.data)}"
    assert (await cache.get(TAG)).body == image.data


@pytest.mark.parametrize("asking", ["bytes=2-5", "bytes=99999999-"])
@pytest.mark.parametrize("kind", ["manifest", "blob", "held blob"])
async def test_head_knows_no_ranges(cache: RunningCache, image: Image, kind: str, asking: str) -> None:
    """RFC 9110 section 14.2: a Range is for GET only; a size taken from a 206 would be wrong."""
    path, size = (TAG, len(image.data)) if kind == "manifest" else (blob(image.layer_digests[0]), SIZE)
    if kind == "held blob":
        await cache.get(path)
    answer = await cache.head(path, [("Range", asking)])
    assert (answer.status, answer.headers.get("Content-Length")) == (200, str(size))


@pytest.mark.parametrize("asking", ["bytes=0-", "bytes=-5", "bytes=0-0,1-1"])
async def test_an_empty_blob_has_no_part(cache: RunningCache, registry: ScriptedRegistry, asking: str) -> None:
    path = blob(registry.add_blob(REPO, b""))
    for _ in ("cold", "warm"):
        answer = await cache.get(path, [("Range", asking)])
        assert (answer.status, answer.body, answer.clean_end) == (200, b"", True)
