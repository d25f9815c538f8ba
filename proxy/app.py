"""The composition root: a configuration in, one running cache out. Every object of the program is made here."""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from proxy.config import Config
from proxy.discovery import Discovery
from proxy.edge import Edge, Route
from proxy.fetch import Fetcher
from proxy.handlers import Handlers
from proxy.listener import Listener
from proxy.metrics import Metrics
from proxy.policy import Routes
from proxy.pull import Pull
from proxy.storage.store import Store
from proxy.threads import Threads
from proxy.upstream.client import Upstream


@dataclass(frozen=True, slots=True)
class Cache:
    """A cache that is ready to be listened for."""

    listener: Listener
    metrics: Metrics


def routes_of(config: Config) -> Routes:
    """The closed list of names that requests may use."""
    prefixes = {form: upstream.name for upstream in config.upstreams for form in (upstream.name, upstream.prefix)}
    return Routes(prefixes, frozenset(upstream.name for upstream in config.upstreams), config.default_name)


def endpoints(handlers: Handlers) -> list[Route]:
    """The paths of the registry API. Raw paths: an encoded character is in no name, so it is in no path (T36)."""
    return [
        ("base", re.compile(r"/v2/?"), handlers.base),
        ("manifest", re.compile(r"/v2/(?P<name>[^%\\]+)/manifests/(?P<reference>[^/%\\]+)"), handlers.manifest),
        ("blob", re.compile(r"/v2/(?P<name>[^%\\]+)/blobs/(?P<digest>[^/%\\]+)"), handlers.blob),
        ("tags", re.compile(r"/v2/(?P<name>[^%\\]+)/tags/list"), handlers.tags),
        ("referrers", re.compile(r"/v2/(?P<name>[^%\\]+)/referrers/(?P<digest>[^/%\\]+)"), handlers.referrers),
        ("other", re.compile(r"/v2/.*", re.DOTALL), handlers.not_offered),
    ]


@asynccontextmanager
async def build(config: Config) -> AsyncIterator[Cache]:
    """The whole object graph, taken down in reverse order.

    Raises ``DirectoryUnusable``, ``CatalogTooNew``, or ``TLSFileUnusable``.
    """
    metrics = Metrics()
    instance = f"pullcache-{secrets.token_hex(8)}"
    async with AsyncExitStack() as stack:
        store = Store.open(config.cache.directory, metrics)
        stack.callback(store.close)
        threads = Threads()
        stack.callback(threads.close)  # before the store: what runs in a thread uses it
        upstreams = {}
        for settings in config.upstreams:
            upstreams[settings.name] = Upstream(settings, metrics, instance)
            stack.push_async_callback(upstreams[settings.name].close)
        fetcher = Fetcher(store, threads, metrics, config.cache.max_blob_size)
        stack.push_async_callback(fetcher.close)
        pull = Pull(upstreams, store, fetcher, threads, metrics)
        discovery = Discovery(upstreams, store, threads, metrics)
        handlers = Handlers(pull, discovery, routes_of(config), metrics, instance)
        yield Cache(Listener(Edge(endpoints(handlers), metrics), metrics), metrics)
