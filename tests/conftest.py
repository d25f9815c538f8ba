"""A whole cache in the test's own event loop, before scripted registries; nothing may be left over when it has stopped.

``registry`` is the upstream, ``cache`` a cache before it that knows it as ``registry.test``; ``start_cache`` makes others.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from proxy import admin, app
from proxy.config.file import validate
from proxy.config.model import Config
from proxy.metrics import Metrics
from tests.fakes.client import Stream, WireResponse, fetch, open_stream
from tests.fakes.registry import ScriptedRegistry

UPSTREAM = "registry.test"
Pairs = list[tuple[str, str]]


class RunningCache:
    """A cache that listens on loopback, seen from outside; ``metric`` and ``files`` look inside for assertions."""

    def __init__(self, config: Config, metrics: Metrics, port: int, admin_port: int) -> None:
        self.config = config
        self.host = "127.0.0.1"
        self.port = port
        self.admin_port = admin_port
        self.directory = config.cache.directory
        self._metrics = metrics

    async def get(self, target: str, headers: Pairs | None = None, **options: Any) -> WireResponse:
        """GET of a raw request target; sees the wire."""
        return await fetch(self.host, self.port, "GET", target, headers or [], **options)

    async def head(self, target: str, headers: Pairs | None = None, **options: Any) -> WireResponse:
        """HEAD of a raw request target."""
        return await fetch(self.host, self.port, "HEAD", target, headers or [], **options)

    async def open(self, target: str, headers: Pairs | None = None, **options: Any) -> Stream:
        """GET whose body is read by hand."""
        return await open_stream(self.host, self.port, "GET", target, headers or [], **options)

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels, for example ``metric("fills_total", result="held")``."""
        total = 0.0
        for family in self._metrics.registry.collect():
            for sample in family.samples:
                if sample.name == f"pullcache_{name}" and labels.items() <= sample.labels.items():
                    total += sample.value
        return total

    def files(self, folder: str = "") -> list[Path]:
        """Every file below a folder of the cache directory."""
        return sorted(path for path in (self.directory / folder).rglob("*") if not path.is_dir())

    def held(self, digest: str) -> bytes | None:
        """What is stored for ``digest``."""
        path = self.directory / "blobs" / digest.replace(":", "/")
        return path.read_bytes() if path.exists() else None

    async def settled(self) -> None:
        """Waits until no download is running."""
        async with asyncio.timeout(30):
            while self.metric("fills_in_flight"):
                await asyncio.sleep(0.002)


StartCache = Callable[..., Awaitable[RunningCache]]


BACKOFF: dict[str, Any] = {"backoff": {}}
"""The section as it is by default, for those whose subject it is."""


def settings(directory: Path, *upstreams: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """A configuration as YAML would give it."""
    return {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "cache": {"directory": str(directory), **sections.pop("cache", {})},
        "defaultUpstream": upstreams[0]["name"],
        "alwaysPullImages": True,  # what a tag costs is seen, whatever its name; policies have tests of their own
        "backoff": {"initial": "0s", "notFound": "0s", "refused": "0s"},  # and so is what a second attempt costs
        "upstreams": list(upstreams),
        **sections,
    }


def upstream(registry: ScriptedRegistry, name: str = UPSTREAM, **keys: Any) -> dict[str, Any]:
    """The section of a scripted registry."""
    return {"name": name, "endpoints": [registry.url], "allowAddresses": [f"{registry.host.rpartition(':')[0]}/32"], **keys}


@asynccontextmanager
async def running(config: Config) -> AsyncIterator[RunningCache]:
    """Serves ``config`` on ports of its own."""
    async with app.build(config) as built, AsyncExitStack() as stack:
        ports = []
        for runner in (
            web.ServerRunner(built.listener, shutdown_timeout=2),
            web.ServerRunner(admin.listener(built.metrics, lambda: True, built.actions)),
        ):
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            ports.append(runner.addresses[0][1])
        yield RunningCache(config, built.metrics, *ports)


def _descriptors() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue
    return found


@pytest.fixture
async def start_cache(tmp_path: Path) -> AsyncIterator[StartCache]:
    """Starts caches; at the end fails the test if a task, a descriptor, a spool file or a lock is left."""
    tasks, descriptors = asyncio.all_tasks(), _descriptors()
    directories: list[Path] = []
    async with AsyncExitStack() as stack:

        async def start(*upstreams: dict[str, Any], directory: Path | None = None, **sections: Any) -> RunningCache:
            where = directory or tmp_path / f"cache{len(directories)}"
            directories.append(where)
            config = validate(settings(where, *upstreams, **sections))
            return await stack.enter_async_context(running(config))

        yield start
    deadline = asyncio.get_running_loop().time() + 5
    while (left := _left(tasks, descriptors)) and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)  # what the registry's side still has to close
    assert not left, f"left over: {left}"
    for directory in directories:
        assert not list((directory / "ingest").iterdir()), "spool files are left"
        with (directory / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _left(tasks: set[asyncio.Task[Any]], descriptors: set[str]) -> list[str]:
    """Tasks, and descriptors other than sockets of the scripted registry, that were not there before."""
    scripted = "tests/fakes"
    running = asyncio.all_tasks() - tasks - {asyncio.current_task()}
    ours = [repr(task) for task in running if scripted not in repr(task)]
    return ours + [item for item in _descriptors() - descriptors if "socket:" not in item]


@pytest.fixture
async def registry() -> AsyncIterator[ScriptedRegistry]:
    """The upstream."""
    async with ScriptedRegistry() as scripted:
        yield scripted


@pytest.fixture
async def cache(registry: ScriptedRegistry, start_cache: StartCache) -> RunningCache:
    """A cache before ``registry``."""
    return await start_cache(upstream(registry))
