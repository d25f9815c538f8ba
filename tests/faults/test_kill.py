"""F01, F13: the real process, killed at any moment and at each step, and with a disk whose n-th call fails.

After every kill each file under ``blobs/`` is hashed; after the restart nothing unknown may lie in the directory, and the
pull must be good. ``PULLCACHE_FAULTS=long`` runs more of all of it; ``PULLCACHE_SEED`` repeats a run.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import random
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fakes.answers import slow
from tests.fakes.client import NoResponse, fetch, open_stream
from tests.fakes.content import Image
from tests.fakes.registry import ScriptedRegistry
from tests.real.services import Pullcache, missing, pullcache_config

LONG = os.environ.get("PULLCACHE_FAULTS") == "long"
ROUNDS = 100 if LONG else 12
SEED = int(os.environ.get("PULLCACHE_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
REPOSITORY = "team/app"
LAYERS = 7
OUR_OWN = {"oci-layout", "index.json", "cache.db", "cache.db-wal", "cache.db-shm", "lock", "reserve"}
WITHIN = 60.0

_no_strace = missing("strace")
needs_strace = pytest.mark.skipif(_no_strace is not None, reason=str(_no_strace))


@dataclass
class Bench:
    """A server process, the registry that it is before, and the truth about both."""

    server: Pullcache
    registry: ScriptedRegistry
    cache: Path
    dice: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    images: int = 0
    received: int = 0

    def image(self, most: int = 2_000_000) -> Image:
        """A new image, in the registry only."""
        self.images += 1
        layers = [self.dice.randbytes(self.dice.randrange(1, most)) for _ in range(LAYERS)]
        return self.registry.add_image(REPOSITORY, f"v{self.images}", layers)

    async def start(self) -> None:
        """Start the process; it must become ready."""
        began = time.monotonic()
        await asyncio.to_thread(self.server.start)
        self.counts["starts"] += 1
        self.counts["slowest start, ms"] = max(self.counts["slowest start, ms"], int(1000 * (time.monotonic() - began)))

    async def get(self, kind: str, reference: str) -> bytes | None:
        """The body if it ended cleanly; what ends cleanly is right, always (N1)."""
        host, _, port = self.server.host.rpartition(":")
        try:
            stream = await open_stream(host, int(port), "GET", f"/v2/{REPOSITORY}/{kind}/{reference}", within=WITHIN)
        except (NoResponse, OSError):
            return None
        body = bytearray()
        try:
            while data := await stream.read():
                body += data
                self.received += len(data)
        except OSError:
            pass
        finally:
            await stream.abort()
        if stream.status != 200 or not stream.clean_end:
            return None
        digest = stream.headers.get("Docker-Content-Digest")
        assert f"sha256:{hashlib.sha256(body).hexdigest()}" == digest, f"N1: wrong bytes for {kind}/{reference}"
        assert ":" not in reference or reference == digest
        return bytes(body)

    async def pull(self, image: Image, tag: str, together: bool = True) -> int:
        """Manifest, config and layers; how many of these were got whole."""
        wanted = {image.config_digest: image.config, **dict(zip(image.layer_digests, image.layers, strict=True))}
        manifest = await self.get("manifests", tag)
        if together:
            bodies = await asyncio.gather(*(self.get("blobs", digest) for digest in wanted))
        else:
            bodies = [await self.get("blobs", digest) for digest in wanted]
        return (manifest == image.data) + sum(got == body for got, body in zip(bodies, wanted.values(), strict=True))

    def files(self) -> set[str]:
        """All that lies in the directory."""
        return {str(item.relative_to(self.cache)) for item in self.cache.rglob("*") if not item.is_dir()}

    def assert_stored_right(self) -> None:
        """Whatever stands under blobs/ is what its name says (N2)."""
        for path in (self.cache / "blobs").rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    found = hashlib.file_digest(file, path.parent.name).hexdigest()
                assert found == path.name, f"N2: {path} holds other bytes"
                self.counts["files hashed"] += 1

    def assert_nothing_unknown(self) -> None:
        """Nothing that a crash left stays; every file under blobs/ has its record."""
        connection = sqlite3.connect(f"file:{self.cache}/cache.db?mode=ro", uri=True)
        known = [digest.replace(":", "/") for (digest,) in connection.execute("SELECT digest FROM blobs")]
        connection.close()
        blobs, notes = {f"blobs/{name}" for name in known}, {f"meta/{name}.json" for name in known}
        left = self.files() - blobs - notes - OUR_OWN
        assert not left, f"left over: {sorted(left)}"
        assert blobs <= self.files()

    async def survive(self, image: Image, tag: str) -> None:
        """What must be so after any kill."""
        self.assert_stored_right()
        await self.start()
        self.assert_nothing_unknown()
        assert await self.pull(image, tag) == LAYERS + 2, "the pull after the restart is good (N5)"

    async def held(self, image: Image) -> int:
        """How many of the image's blobs and manifest are stored, after what runs has settled."""
        names = {image.digest, image.config_digest, *image.layer_digests}
        paths = [self.cache / "blobs" / name.replace(":", "/") for name in names]
        for _ in range(500):
            if all(path.exists() for path in paths):
                break
            await asyncio.sleep(0.01)
        return sum(path.exists() for path in paths)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A running process with an empty cache; at the end, the counts."""
    cache = tmp_path / "cache"
    async with ScriptedRegistry() as registry:
        config = pullcache_config(cache, "registry.test", registry.url)
        server = Pullcache(config, root=tmp_path / "server")
        made = Bench(server, registry, cache, random.Random(SEED))
        try:
            await made.start()
            yield made
        finally:
            await asyncio.to_thread(server.kill)
            print(f"seed {SEED}: {dict(made.counts)}")
            print(server.log[-3000:])


async def test_killed_at_any_moment_of_eight_downloads(bench: Bench) -> None:
    """F01."""
    image = bench.image()
    began = asyncio.get_running_loop().time()
    assert await bench.pull(image, f"v{bench.images}") == LAYERS + 2
    usual = asyncio.get_running_loop().time() - began
    for number in range(ROUNDS):
        image, bench.received = bench.image(), 0
        tag = f"v{bench.images}"
        scripts = [
            bench.registry.script("GET", f"/v2/{REPOSITORY}/blobs/{digest}", slow(bench.dice.randrange(1 << 20, 8 << 20)))
            for digest in image.layer_digests[:: bench.dice.randrange(2, 6)]
        ]
        pulling = asyncio.create_task(bench.pull(image, tag))
        if number % 2:
            await asyncio.wait({pulling}, timeout=bench.dice.uniform(0, 1.5 * usual))
        else:  # up to the last byte: then the process is at saving
            total = sum(map(len, (image.data, image.config, *image.layers)))
            threshold = bench.dice.choice([total, bench.dice.randrange(total), bench.dice.randrange(total)])
            while bench.received < threshold and not pulling.done():
                await asyncio.sleep(0)
        bench.counts["killed in the middle" if not pulling.done() else "killed after the last byte"] += 1
        await asyncio.to_thread(bench.server.kill)
        bench.counts["bodies whole before the kill"] += await pulling
        for script in scripts:
            script.cancel()
        await bench.survive(image, tag)
    assert bench.counts["killed in the middle"], "the moments were no test"


# --- at each step: strace ---


@asynccontextmanager
async def strace(bench: Bench, inject: str, log: Path) -> AsyncIterator[None]:
    """Injects faults into the running process; counts its system calls from now on."""
    call = inject.partition(":")[0]
    command = ["strace", "-f", "-o", str(log), "-e", f"trace={call}", "-e", f"inject={inject}", "-p", str(bench.server.pid)]
    process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    try:
        first = await asyncio.wait_for(process.stderr.readline(), WITHIN)
        if b"attached" not in first:
            pytest.skip(f"strace cannot attach here: {first.decode().strip()}")
        draining = asyncio.create_task(process.stderr.read())
        yield
    finally:
        if not ended(bench):
            process.send_signal(signal.SIGINT)  # detaches
        try:
            await asyncio.wait_for(process.wait(), 1)
        except TimeoutError:  # seen with strace 6.1 and a process of many threads that is dead
            process.kill()
            await process.wait()
    await draining


def ended(bench: Bench) -> bool:
    """Whether the process is dead."""
    assert bench.server.pid is not None
    try:
        status = Path(f"/proc/{bench.server.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return status in "ZX"


STEPS = {"fsync": 4, "rename,renameat,renameat2": 3, "write": 3, "pwrite64": 3}
"""System calls of the storage path and the last n of each; strace counts per thread, hence they are not many."""


@needs_strace
@pytest.mark.parametrize("call", STEPS)
async def test_killed_at_each_step(bench: Bench, tmp_path: Path, call: str) -> None:
    """F01: SIGKILL at the n-th write, sync and rename, instead of it."""
    numbers = range(1, 25 if LONG else STEPS[call] + 1)
    for number in numbers:
        image = bench.image(200_000)
        tag = f"v{bench.images}"
        async with strace(bench, f"{call}:signal=SIGKILL:when={number}", tmp_path / "strace.log"):
            await bench.pull(image, tag, together=False)
            if not ended(bench):  # what is still being saved
                await bench.held(image)
        bench.counts["killed" if ended(bench) else "untouched"] += 1
        await asyncio.to_thread(bench.server.kill)
        await bench.survive(image, tag)
        if not bench.counts["killed"]:
            break
        if bench.counts["untouched"]:
            break
    print(f"{call}: {dict(bench.counts)}")
    assert bench.counts["killed"], f"no {call} was met"


def _when(number: int, for_ever: bool) -> str:
    return f"{number}+" if for_ever else f"{number}"


@needs_strace
@pytest.mark.parametrize("for_ever", [False, True], ids=["once", "for ever"])
@pytest.mark.parametrize("call", STEPS)
async def test_a_disk_that_fails_at_the_nth_call_is_noticed_by_no_client(
    bench: Bench, tmp_path: Path, call: str, for_ever: bool
) -> None:
    """F13: the bytes are right, nothing wrong is stored, the process goes on, and keeps all when the disk works again."""
    log = tmp_path / "strace.log"
    for number, error in itertools.product(range(1, 12 if LONG else 3), ("EIO", "ENOSPC")):
        image = bench.image(200_000)
        tag = f"v{bench.images}"
        async with strace(bench, f"{call}:error={error}:when={_when(number, for_ever)}", log):
            assert await bench.pull(image, tag, together=number % 2 == 0) == LAYERS + 2
            assert not ended(bench)
        bench.counts["failed calls"] += log.read_text().count("(INJECTED)")
        bench.assert_stored_right()
        assert await bench.pull(image, tag) == LAYERS + 2
        assert await bench.held(image) == LAYERS + 2, "what was not saved is saved by the next pull"
    assert bench.counts["failed calls"], "nothing was injected"
    await asyncio.to_thread(bench.server.stop)
    await bench.start()
    bench.assert_nothing_unknown()


@needs_strace
async def test_a_slow_disk_does_not_hold_up_the_event_loop(bench: Bench, tmp_path: Path) -> None:
    """T50, F19: while a sync takes 3 s, ``/v2/`` and what is arriving go on."""
    image = bench.image(200_000)
    host, _, port = bench.server.host.rpartition(":")
    slowest = answers = 0.0
    loop = asyncio.get_running_loop()
    assert await bench.get("manifests", f"v{bench.images}") is not None
    log = tmp_path / "strace.log"
    async with strace(bench, "fsync:delay_enter=3000000", log):
        pulls = asyncio.gather(*(bench.get("blobs", digest) for digest in image.layer_digests))
        deadline = loop.time() + 3
        while loop.time() < deadline:
            began = loop.time()
            assert (await fetch(host, int(port), "GET", "/v2/", within=WITHIN)).status == 200
            slowest = max(slowest, loop.time() - began)
            answers += 1
        assert list(await pulls) == list(image.layers)
    print(f"{answers:g} answers, the slowest after {slowest:.3f} s")
    assert "fsync(" in log.read_text()
    assert slowest < 2
    assert answers > 10
