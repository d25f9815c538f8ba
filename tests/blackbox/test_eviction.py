"""What goes where there is no room, seen from outside: whole images, the bound always kept, and nothing that is in use."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from proxy.storage import eviction
from tests.blackbox.oracle import REPO, blob_path, manifest_path
from tests.blackbox.private import Clock
from tests.conftest import RunningCache, StartCache, upstream
from tests.fakes.content import Image
from tests.fakes.registry import ScriptedRegistry

MIB = 1024 * 1024
ROOM: dict[str, Any] = {"maxSize": "16Mi", "minFree": "0"}


def size_of(directory: Path) -> int:
    """What a directory takes of the disk."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def add(registry: ScriptedRegistry, tag: str, *seeds: object, size: int = MIB) -> Image:
    """An image with a layer a seed; equal seeds are equal layers."""
    return registry.add_image(REPO, tag, [random.Random(str(seed)).randbytes(size) for seed in seeds])


async def pull(cache: RunningCache, image: Image, tag: str) -> None:
    """A whole pull, as a runtime does it; the bound holds at each step."""
    asks = [(manifest_path(tag), image.data), (blob_path(image.config_digest), image.config)]
    asks += [(blob_path(digest), data) for digest, data in zip(image.layer_digests, image.layers, strict=True)]
    for path, data in asks:
        answer = await cache.get(path)
        same = answer.body == data
        assert (answer.status, same) == (200, True)
        await cache.settled()
        assert size_of(cache.directory) <= 16 * MIB


def parts(image: Image) -> list[str]:
    """What an image is of."""
    return [image.digest, image.config_digest, *image.layer_digests]


def whole(cache: RunningCache, image: Image) -> bool | None:
    """Whether an image is held: all of it, nothing of it (False), or a part (None)."""
    held = {cache.held(digest) is not None for digest in parts(image)}
    return held.pop() if len(held) == 1 else None


async def test_the_images_that_came_first_go_whole_and_the_bound_always_holds(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry
) -> None:
    """And what went can be pulled anew."""
    cache = await start_cache(upstream(registry), cache=ROOM, alwaysPullImages=False)
    images = {str(number): add(registry, str(number), f"{number}a", f"{number}b") for number in range(20)}
    for tag, image in images.items():
        await pull(cache, image, tag)
        clock.advance(eviction.IN_USE + 1)
    held = [whole(cache, image) for image in images.values()]
    assert held == [False] * (20 - sum(map(bool, held))) + [True] * sum(map(bool, held)), held
    assert 5 <= sum(map(bool, held)) <= 7
    asked = len(registry.requests)
    await pull(cache, images["19"], "19")
    assert len(registry.requests) == asked
    await pull(cache, images["0"], "0")
    assert whole(cache, images["0"]) is True


async def test_a_layer_that_a_held_image_shares_stays(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry
) -> None:
    cache = await start_cache(upstream(registry), cache=ROOM, alwaysPullImages=False)
    images = {str(number): add(registry, str(number), "base", number, f"{number}b") for number in range(12)}
    for tag, image in images.items():
        await pull(cache, image, tag)
        clock.advance(eviction.IN_USE + 1)
    base = images["0"].layer_digests[0]
    assert registry.count("GET", blob_path(base)) == 1
    assert cache.held(base) is not None
    assert [whole(cache, image) for image in images.values()][-4:] == [True] * 4


async def test_t46_a_scan_does_not_push_out_what_is_pulled_again_and_again(
    clock: Clock, start_cache: StartCache, registry: ScriptedRegistry
) -> None:
    """Ten times what there is room for, each pulled once; the hot images are still there."""
    cache = await start_cache(upstream(registry), cache=ROOM, alwaysPullImages=False)
    hot = {f"hot{number}": add(registry, f"hot{number}", f"hot{number}") for number in range(5)}
    for _ in range(2):
        for tag, image in hot.items():
            await pull(cache, image, tag)
        clock.advance(eviction.IN_USE + 1)
    for number in range(150):
        await pull(cache, add(registry, f"junk{number}", f"junk{number}"), f"junk{number}")
        clock.advance(eviction.IN_USE + 1)
    assert [whole(cache, image) for image in hot.values()] == [True] * 5
