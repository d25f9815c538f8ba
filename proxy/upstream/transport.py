"""Requests of one upstream: connections, TLS, a proxy in between, redirects.

Redirects are followed by hand: each hop is a new request with headers of its own, and ``Authorization`` goes where it may
only, never again once the request has left the endpoint's own origin (T04).
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import aiohttp
from aiohttp.connector import Connection
from prometheus_client import Counter
from yarl import URL

from proxy import __version__
from proxy.config.upstreams import UpstreamConfig
from proxy.errors import RegistryError, UpstreamBroken, UpstreamUnavailable
from proxy.metrics import Metrics
from proxy.upstream.addresses import is_allowed_literal, socket_factory
from proxy.upstream.auth import may_carry
from proxy.upstream.reply import Dropped, Garbled, Reply, Request, Where, foreign_errors
from proxy.upstream.resolver import Resolver
from proxy.upstream.tls import context_of

_MAX_HOPS = 5
REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LOCATION = re.compile(r"[!-~]{1,16384}", re.ASCII)  # it becomes a request line: no space, no control character
_MAX_FIELD = 32 * 1024
_READ_BUFFER = 256 * 1024
_CONNECTIONS = 1024  # a slow download must not keep a tag's question waiting
_TRIES = ((0.0, False), (0.05, False), (0.2, True))  # seconds before each try of a connection, and which is the last


class _Connector(aiohttp.TCPConnector):
    """Takes no connection from the pool on which something has come that nobody asked for: it would be taken for the
    answer to the next request."""

    async def _get(self, key: Any, traces: Any) -> Connection | None:
        while (connection := await super()._get(key, traces)) is not None:
            if connection.protocol is None or not connection.protocol.should_close:
                break
            connection.close()
        return connection


class Transport:
    """The session of one upstream, shared with no other."""

    def __init__(self, config: UpstreamConfig, metrics: Metrics) -> None:
        self._config = config
        self._metrics = metrics
        self._tls = context_of(config)
        self._session = aiohttp.ClientSession(
            connector=_Connector(
                resolver=Resolver(config.timeouts.connect),
                # With httpProxy every connection is one to the proxy, which the operator named.
                socket_factory=None
                if config.http_proxy
                else socket_factory(config.allow_addresses, self.refused("address").inc),
                limit=_CONNECTIONS,
                ttl_dns_cache=10,
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=config.timeouts.connect),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            requote_redirect_url=False,
            read_bufsize=_READ_BUFFER,
            max_line_size=_MAX_FIELD,
            max_field_size=_MAX_FIELD,
        )
        # aiohttp would repeat a GET by itself, once, at once and uncounted; _hop does it instead.
        self._session._retry_connection = False
        self._proxy, self._proxy_auth = _proxy_of(config)
        if config.insecure_skip_verify:
            metrics.insecure.labels(config.name).set(1)

    async def close(self) -> None:
        """Drops every connection."""
        await self._session.close()

    def use_files_again(self) -> None:
        """Connections from now on use the certificates that the files hold now; raises ``TLSFileUnusable``."""
        self._tls = context_of(self._config)

    async def follow(self, where: Where, request: Request, authorization: str = "") -> Reply:
        """The answer to a request, redirects followed; raises ``RegistryError``."""
        endpoint = where.endpoint
        url = at(where, request.path)
        own = True
        for _ in range(_MAX_HOPS + 1):
            own = own and may_carry(url, endpoint)
            proof = {"Authorization": authorization} if authorization and own else {}
            reply = await self.hop(request.method, url, {**request.headers, **proof}, where)
            if reply.status not in REDIRECTS:
                return reply
            reply.close()
            url = self._next(url, reply.headers.get("Location", ""), where)
        self.refused("redirect").inc()
        raise UpstreamBroken(f"{where} redirects more than {_MAX_HOPS} times")

    def _next(self, url: URL, location: str, where: Where) -> URL:
        endpoint = where.endpoint
        try:
            target = url.join(URL(location, encoded=True))
            usable = (
                bool(_LOCATION.fullmatch(location)) and bool(target.host) and target.user is None and target.password is None
            )
        except (ValueError, IndexError):  # IndexError: yarl 1.x, of "//[]@"
            usable = False
        if not usable or target.scheme not in ("http", "https") or (target.scheme, endpoint.scheme) == ("http", "https"):
            self.refused("redirect").inc()
            raise UpstreamBroken(f"{where} redirects to what is no address on {endpoint.scheme}; this is not followed")
        return target.with_fragment(None)

    async def hop(
        self,
        method: str,
        url: URL,
        headers: dict[str, str],
        where: Where,
        again: tuple[type[RegistryError], ...] = (Dropped, Garbled),
        body: bytes | None = None,
    ) -> Reply:
        """One request, one answer. What was dropped or garbled before its answer is tried again: GET changes nothing."""
        if self._proxy is not None and not is_allowed_literal(url.host or "", self._config.allow_addresses):
            self.refused("address").inc()
            raise UpstreamUnavailable(f"{where} leads to {url.host}, which is no public address and not in allowAddresses")
        plain = {"User-Agent": f"pullcache/{__version__}", "Accept-Encoding": "identity"}
        if url.scheme == "http":  # the proxy reads these, and no tunnel leads past it
            plain |= self._proxy_auth
        for delay, is_last in _TRIES:
            await asyncio.sleep(delay)
            try:
                with foreign_errors(where):
                    response = await self._session.request(
                        method,
                        url,
                        headers=plain | headers,
                        data=body,
                        ssl=self._tls,
                        allow_redirects=False,
                        proxy=self._proxy,
                        proxy_headers=self._proxy_auth if url.scheme == "https" else None,
                    )
            except RegistryError as error:
                self._count(method, "error")
                if not is_last and isinstance(error, again):
                    continue
                raise
            self._count(method, f"{response.status // 100}xx")
            return Reply(response, where)
        raise AssertionError("the last attempt answers or raises")

    def _count(self, method: str, status: str) -> None:
        self._metrics.upstream_requests.labels(self._config.name, method, status).inc()

    def refused(self, what: str) -> Counter:
        """The counter of what an upstream asked for and did not get."""
        return self._metrics.refused.labels(self._config.name, what)


def _proxy_of(config: UpstreamConfig) -> tuple[URL | None, dict[str, str]]:
    """The proxy's address without its credentials, and the header with them: aiohttp itself would send Latin-1."""
    if config.http_proxy is None:
        return None, {}
    url = URL(config.http_proxy)
    if url.user is None and url.password is None:
        return url, {}
    return url.with_user(None), {"Proxy-Authorization": aiohttp.encode_basic_auth(url.user or "", url.password or "")}


def at(where: Where, path: str) -> URL:
    """The address of a path of the API at an endpoint."""
    return URL(f"{str(where.endpoint).rstrip('/')}{path}", encoded=True)
