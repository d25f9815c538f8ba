"""A disk with foreign things on it, without room, or slow, and a clock that jumps: pulls are good all the same."""

from __future__ import annotations

import asyncio
import os
import random
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunningCache, StartCache, upstream
from tests.fakes.answers import compose, gate
from tests.fakes.client import fetch, finish
from tests.fakes.content import Image
from tests.fakes.registry import ScriptedRegistry
from tests.real.services import Pullcache, pullcache_config, status_of

MIB = 1024 * 1024
LAYER = random.Random(1).randbytes(2 * MIB)
EACH_TIME = {"backoff": {"initial": "0s"}}
"""A registry that is back is asked again at once."""
LARGE = random.Random(2).randbytes(20 * MIB)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
LIBFAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
needs_faketime = pytest.mark.skipif(LIBFAKETIME is None, reason="not installed: faketime (tests/real/install.sh)")


@contextmanager
def disk(where: Path, options: str) -> Iterator[Path]:
    """A tmpfs of its own at ``where``."""
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"mode=0700,{options}", "tmpfs", str(where)]
    if os.geteuid() != 0 or subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs root, to mount a tmpfs")
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts small disks; they are gone after the test."""
    stack: list[Any] = []

    def mount(options: str) -> Path:
        context = disk(tmp_path / f"disk{len(stack)}", options)
        stack.append(context)
        return context.__enter__()

    yield mount
    for context in stack:
        context.__exit__(None, None, None)


async def assert_pulled(cache: RunningCache, image: Image, tag: str = "1") -> None:
    """The whole image, byte for byte."""
    answer = await cache.get(f"/v2/team/app/manifests/{tag}")
    assert (answer.status, answer.body, answer.clean_end) == (200, image.data, True)
    for digest, data in zip(image.layer_digests, image.layers, strict=True):
        answer = await cache.get(f"/v2/team/app/blobs/{digest}")
        assert (answer.status, answer.body == data, answer.clean_end) == (200, True, True)
    await cache.settled()


# --- foreign things ---

Make = Callable[[Path, Path], object]
FOREIGN: dict[str, Make] = {
    "symlink": lambda path, canary: path.symlink_to(canary),
    "hard link": lambda path, canary: path.hardlink_to(canary),
    "fifo": lambda path, _: os.mkfifo(path),
    "device": lambda path, _: os.mknod(path, 0o20600, os.makedev(1, 5)),
    "directory": lambda path, _: path.mkdir(),
    "truncated": lambda path, _: path.write_bytes(LAYER[:-1]),
}


@pytest.mark.parametrize("what", ["layer", "manifest"])
@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs_root) if kind == "device" else kind for kind in FOREIGN])
async def test_what_stands_in_a_blobs_place_is_quarantined_and_fetched_again(
    cache: RunningCache, registry: ScriptedRegistry, tmp_path: Path, kind: str, what: str
) -> None:
    """T37."""
    image = registry.add_image("team/app", "1", [LAYER])
    await assert_pulled(cache, image)
    digest, right = (image.digest, image.data) if what == "manifest" else (image.layer_digests[0], LAYER)
    place = cache.directory / "blobs" / digest.replace(":", "/")
    canary = tmp_path / "canary"
    secret = bytes(len(right))  # of the right size
    canary.write_bytes(secret)
    place.unlink()
    FOREIGN[kind](place, canary)
    await asyncio.gather(*(assert_pulled(cache, image) for _ in range(4)))
    assert canary.read_bytes() == secret
    assert (place.is_symlink(), cache.held(digest)) == (False, right)
    assert cache.metric("quarantined_total") == 1
    assert len(list((cache.directory / "quarantine").iterdir())) == 1
    fetched = len(registry.seen("GET"))
    await assert_pulled(cache, image)
    assert len(registry.seen("GET")) == fetched, "it is held again"


# --- no room ---


def fill_up(path: Path) -> None:
    """Takes 97 % of the room, or every inode where they are few."""
    free = os.statvfs(path)
    if free.f_files < 1000:
        for number in range(free.f_favail):
            (path / f"ballast{number}").touch()
    else:
        (path / "ballast").write_bytes(bytes(int(free.f_blocks * free.f_frsize * 0.97)))


@pytest.mark.parametrize("options", ["size=40m", "size=40m,nr_inodes=40"])
async def test_a_full_disk_takes_nothing_and_fails_nobody_until_there_is_room_again(
    mounted: Callable[[str], Path], registry: ScriptedRegistry, start_cache: StartCache, options: str
) -> None:
    """F11, F12."""
    path = mounted(options)
    cache = await start_cache(upstream(registry), directory=path)
    fill_up(path)
    image = registry.add_image("team/app", "1", [LAYER, LAYER[:1000], LAYER[::-1]])
    for _ in range(3):
        await asyncio.gather(*(assert_pulled(cache, image) for _ in range(4)))
    assert cache.files("blobs") == cache.files("ingest") == []
    assert cache.metric("unsaved_total") >= 4
    assert cache.metric("fills_total", result="passed") >= 3
    assert cache.metric("fills_total", result="failed") == 0
    for ballast in path.glob("ballast*"):
        ballast.unlink()
    await assert_pulled(cache, image)
    assert [cache.held(digest) for digest in image.layer_digests] == list(image.layers)
    assert cache.held(image.digest) == image.data


@pytest.mark.parametrize("with_slow", [True, False], ids=["a slow reader", "quick readers only"])
async def test_a_disk_that_fills_up_in_mid_download_is_noticed_by_no_client(
    mounted: Callable[[str], Path], registry: ScriptedRegistry, start_cache: StartCache, with_slow: bool
) -> None:
    """F11: others take the disk meanwhile, and somebody joins late: where all others have moved on, what the disk did not
    take has gone from memory, and a second download is needed."""
    directory = mounted("size=40m")
    cache = await start_cache(upstream(registry), directory=directory)
    digest = registry.add_blob("team/app", LARGE)
    path = f"/v2/team/app/blobs/{digest}"
    is_half, go_on = asyncio.Event(), asyncio.Event()
    registry.script("GET", path, compose(gate(is_half, after=10 * MIB), gate(go_on, after=18 * MIB)))
    early = [await cache.open(path) for _ in range(4)]
    firsts = [await stream.read_all(8 * MIB) for stream in early]
    free = os.statvfs(directory)
    (directory / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - MIB))
    is_half.set()
    slow = [await cache.open(path, receive_buffer=64 * 1024)] if with_slow else []
    tail = asyncio.create_task(cache.get(path, [("Range", f"bytes={19 * MIB}-")]))
    near = 18 * MIB - 64 * 1024
    heads = await asyncio.gather(*(stream.read_all(near - 8 * MIB) for stream in early))
    late = asyncio.create_task(cache.get(path))
    followers = len(early) + len(slow)  # without the first, with the tail
    async with asyncio.timeout(30):
        while registry.count("GET", path) < 2 and cache.metric("followers_total") <= followers:
            await asyncio.sleep(0.005)
    go_on.set()
    rests, slow_bodies, answer, end = await asyncio.gather(
        asyncio.gather(*(finish(stream) for stream in early)),
        asyncio.gather(*(finish(stream) for stream in slow)),
        late,
        tail,
    )
    assert [first + head + rest.body == LARGE for first, head, rest in zip(firsts, heads, rests, strict=True)] == [True] * 4
    assert [body.body == LARGE for body in slow_bodies] == [True] * len(slow)
    assert answer.body == LARGE
    assert (end.status, end.body == LARGE[19 * MIB :]) == (206, True)
    assert all(one.clean_end for one in (*rests, *slow_bodies, answer, end))
    downloads = registry.count("GET", path)
    assert downloads == 1 if with_slow else downloads in (1, 2), "2 where memory had moved on when the late one came"
    for stream in (*early, *slow):
        await stream.close()
    await cache.settled()
    assert cache.files("blobs") == cache.files("ingest") == []
    assert cache.metric("fills_total", result="failed") == 0
    assert cache.metric("unsaved_total") >= downloads, "it is counted, though the disk had room at the start"


async def test_what_is_held_is_served_after_a_start_on_a_disk_that_is_full_to_the_last_byte(
    mounted: Callable[[str], Path], registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path
) -> None:
    """F11: the real process, since the catalog opens anew."""
    path = mounted("size=12m")
    image = registry.add_image("team/app", "1", [LAYER])
    config = pullcache_config(path, "registry.test", registry.url, **EACH_TIME)
    server = Pullcache(config, root=tmp_path / "server")
    try:
        await asyncio.to_thread(server.start)
        await pull(server, image, "1")
        await asyncio.to_thread(server.stop)
        with (path / "ballast").open("wb", buffering=0) as ballast:
            try:
                while ballast.write(bytes(4096)):
                    pass
            except OSError:
                pass
        await asyncio.to_thread(server.start)
        fetched = registry.bytes_sent()
        await pull(server, image, "1")
        assert registry.bytes_sent() == fetched, "nothing was fetched again"
        await registry.stop()
        await pull(server, image, "1")
        await registry.start()
        (path / "ballast").unlink()
        more = registry.add_image("team/app", "2", [LAYER[::-1]])
        await pull(server, more, "2")
        assert not list((path / "quarantine").iterdir()), "a full disk does not make the catalog wrong"
    finally:
        await asyncio.to_thread(server.kill)


# --- the real process: many at once, and another time ---


async def pull(server: Pullcache, image: Image, tag: str) -> str | None:
    """The whole image, byte for byte; the Warning with the manifest."""
    host, _, port = server.host.rpartition(":")
    manifest = await fetch(host, int(port), "GET", f"/v2/team/app/manifests/{tag}")
    assert (manifest.status, manifest.body) == (200, image.data)
    for digest, data in zip(image.layer_digests, image.layers, strict=True):
        answer = await fetch(host, int(port), "GET", f"/v2/team/app/blobs/{digest}")
        assert (answer.status, answer.body == data, answer.clean_end) == (200, True, True)
    return manifest.headers.get("Warning")


async def test_two_hundred_cold_misses_do_not_keep_others_waiting(registry: ScriptedRegistry, tmp_path: Path) -> None:
    """T50: /v2/ goes on being answered; the bounds are generous, since machine and upstream are shared with the test."""
    bodies = [random.Random(number).randbytes(MIB // 2) for number in range(200)]
    digests = [registry.add_blob("team/app", body) for body in bodies]
    answers: list[float] = []
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            began = time.monotonic()
            assert status_of(f"{server.url}/v2/", timeout=30) == 200
            answers.append(time.monotonic() - began)

    with Pullcache(pullcache_config(tmp_path / "cache", "registry.test", registry.url, **EACH_TIME)) as server:
        host, _, port = server.host.rpartition(":")
        asking = asyncio.create_task(asyncio.to_thread(ask))
        try:
            paths = [f"/v2/team/app/blobs/{digest}" for digest in digests]
            got = await asyncio.gather(*(fetch(host, int(port), "GET", path, within=120) for path in paths))
        finally:
            over.set()
            await asking
        assert [answer.body == body and answer.clean_end for answer, body in zip(got, bodies, strict=True)] == [True] * 200
        print(f"{len(answers)} answers meanwhile, the slowest after {max(answers):.3f} s")
        assert len(answers) > 20
        assert max(answers) < 5


class Shifted(Pullcache):
    """pullcache with a clock of its own, which ``shift`` sets, also while it runs. Monotonic time stays true."""

    def __init__(self, config: dict[str, Any], root: Path) -> None:
        root.mkdir()
        self._file = root / "clock"
        environment = {
            "LD_PRELOAD": str(LIBFAKETIME),  # not by faketime(1): that stays in between, and signals end at it
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
        super().__init__(config, root=root, environment=environment)
        self.shift("+0d")

    def shift(self, offset: str) -> None:
        """So far from the true time, from now on."""
        fresh = self._file.with_suffix(".new")
        fresh.write_text(f"{offset}\n")
        fresh.replace(self._file)


@needs_faketime
@pytest.mark.parametrize("restart", [True, False], ids=["at the start", "in the run"])
async def test_a_clock_that_jumps_costs_no_blob_and_no_tag(
    registry: ScriptedRegistry, tmp_path: Path, restart: bool
) -> None:
    """F50: ± 400 days, and back 1 h."""
    image = registry.add_image("team/app", "1", [LAYER])
    server = Shifted(pullcache_config(tmp_path / "cache", "registry.test", registry.url, **EACH_TIME), tmp_path / "server")
    try:
        await asyncio.to_thread(server.start)
        assert await pull(server, image, "1") is None
        fetched = registry.bytes_sent()
        for offset in ("+400d", "-400d", "+0d", "-1h"):
            if restart:
                await asyncio.to_thread(server.stop)
            server.shift(offset)
            if restart:
                await asyncio.to_thread(server.start)
            await registry.stop()
            warning = await pull(server, image, "1")
            age = re.search(r"last confirmed (-?\d+) s ago", warning or "")
            assert age, f"{offset}: {warning}"
            assert 0 <= int(age[1]) <= 801 * 86400
            assert offset != "+400d" or int(age[1]) > 399 * 86400, "the clock did not jump: the test is none"
            await registry.start()
            assert await pull(server, image, "1") is None
        assert registry.bytes_sent() == fetched, "no blob and no manifest is fetched again"
    finally:
        await asyncio.to_thread(server.kill)


@needs_faketime
async def test_a_tag_that_moved_after_the_clock_went_back_is_served_where_it_points(
    registry: ScriptedRegistry, tmp_path: Path
) -> None:
    """F50: stale, too, and after a restart."""
    old = registry.add_image("team/app", "1", [LAYER])
    server = Shifted(pullcache_config(tmp_path / "cache", "registry.test", registry.url, **EACH_TIME), tmp_path / "server")
    try:
        await asyncio.to_thread(server.start)
        await pull(server, old, "1")
        server.shift("-1h")
        new = registry.add_image("team/app", "1", [LAYER[::-1]])
        await pull(server, new, "1")
        await registry.stop()
        assert await pull(server, new, "1") is not None
    finally:
        await asyncio.to_thread(server.kill)
