"""Requests of one upstream: connections, redirects, challenges.

Redirects are followed by hand: each hop is a new request with headers of its own, and ``Authorization`` goes to the
endpoint's own origin only, never again once the request has left it (T04).
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
from proxy.config import UpstreamConfig
from proxy.errors import Denied, RegistryError, TooManyRequests, UpstreamBroken, UpstreamUnavailable
from proxy.metrics import Metrics
from proxy.names import Repository
from proxy.upstream.addresses import is_allowed_literal, socket_factory
from proxy.upstream.auth import RealmRefused, Tokens, check_realm, same_origin
from proxy.upstream.challenge import Bearer, find_bearer
from proxy.upstream.reply import ANONYMOUS, Dropped, Garbled, Reply, Where, foreign_errors
from proxy.upstream.resolver import Resolver
from proxy.upstream.tls import context_of

_MAX_HOPS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_LOCATION = re.compile(r"[!-~]{1,16384}", re.ASCII)  # it becomes a request line: no space, no control character
_MAX_TOKEN = 64 * 1024
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


class Exchange:
    """The session of one upstream, shared with no other, and the tokens of each of its endpoints, which share none."""

    def __init__(self, config: UpstreamConfig, metrics: Metrics, instance: str) -> None:
        self._config = config
        self._metrics = metrics
        self._instance = instance
        loop = asyncio.get_running_loop()
        self._tokens = {URL(endpoint): Tokens(loop.time) for endpoint in config.endpoints}
        self._session = aiohttp.ClientSession(
            connector=_Connector(
                ssl=context_of(config),
                resolver=Resolver(config.timeouts.connect),
                # With httpProxy every connection is one to the proxy, which the operator named.
                socket_factory=None
                if config.http_proxy
                else socket_factory(config.allow_addresses, self._refused("address").inc),
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
        for tokens in self._tokens.values():
            await tokens.close()
        await self._session.close()

    async def probe(self, where: Where) -> None:
        """Whether an endpoint answers at all; raises ``RegistryError`` where it does not, or only to say that it fails."""
        reply = await self._hop("GET", _at(where, "/v2/"), {"Via": f"1.1 {self._instance}"}, where)
        reply.close()
        if reply.status >= 500 or reply.status == 429:
            raise UpstreamBroken(f"{where} answered {reply.status}")

    async def ask(
        self, method: str, where: Where, path: str, repository: Repository, headers: dict[str, str], via: str
    ) -> Reply:
        """The answer to a request, redirects followed and challenge answered; raises ``RegistryError``.

        One fresh token for one refusal: a registry that goes on refusing has answered.
        """
        tokens = self._tokens[where.endpoint]
        headers = headers | {"Via": f"{via}, 1.1 {self._instance}" if via else f"1.1 {self._instance}"}
        token = None
        if bearer := tokens.expected(where.endpoint, repository):
            token = await self._token(where, repository, bearer)
        reply = await self._follow(method, where, path, headers, token)
        if reply.status != 401 or not reply.is_own:
            return reply
        bearer = find_bearer(reply.headers.getall("WWW-Authenticate", []))
        if bearer is None:
            return reply
        reply.close()
        tokens.expect(where.endpoint, repository, bearer)
        if token:
            tokens.drop(token)
        fresh = await self._token(where, repository, bearer)
        reply = await self._follow(method, where, path, headers, fresh)
        if reply.status != 401:
            return reply
        try:
            await reply.check(UpstreamBroken(f"{where} refuses a fresh token"))
            raise AssertionError("a 401 does not pass")
        except RegistryError as error:
            tokens.refuse(self._realm(where, bearer), bearer, repository, error)
            raise
        finally:
            reply.close()

    def _realm(self, where: Where, bearer: Bearer) -> URL:
        """The token server that a challenge names, if this upstream may use it; raises ``UpstreamBroken``."""
        try:
            return check_realm(bearer.realm, where.endpoint, self._config.token_hosts_of(str(where.endpoint)))
        except RealmRefused as error:
            self._refused("realm").inc()
            raise UpstreamBroken(f"{where} cannot be asked: {error}") from error

    async def _token(self, where: Where, repository: Repository, bearer: Bearer) -> str:
        """A token for that challenge. Token requests are never redirected, and carry nothing of the client's."""
        realm = self._realm(where, bearer)

        there = Where(f"the token server of {where.name}", realm.origin())

        async def fetch(url: URL) -> bytes:
            try:
                async with asyncio.timeout(self._config.timeouts.token):
                    reply = await self._hop("GET", url, {}, there, again=(Dropped,))
                    try:
                        return await self._token_body(reply)
                    finally:
                        reply.close()
            except TimeoutError as error:
                raise UpstreamUnavailable(f"{there} did not answer in time") from error

        return await self._tokens[where.endpoint].get(realm, bearer, repository, fetch)

    async def _token_body(self, reply: Reply) -> bytes:
        if reply.status == 200:
            return await reply.body(_MAX_TOKEN)
        text = f"{reply.where} answered {reply.status}"
        if reply.status in (401, 403) and reply.is_json:  # ghcr.io says so of a private repository
            raise Denied(f"{text}; {ANONYMOUS}")
        if reply.status == 429:
            raise TooManyRequests(f"{text}; its rate limit is used up")
        if reply.status in _REDIRECTS:
            self._refused("redirect").inc()
        raise UpstreamBroken(text)

    async def _follow(self, method: str, where: Where, path: str, headers: dict[str, str], token: str | None) -> Reply:
        endpoint = where.endpoint
        url = _at(where, path)
        own = True
        for _ in range(_MAX_HOPS + 1):
            own = own and same_origin(url, endpoint)
            authorization = {"Authorization": f"Bearer {token}"} if token and own else {}
            reply = await self._hop(method, url, headers | authorization, where)
            if reply.status not in _REDIRECTS:
                return reply
            reply.close()
            url = self._next(url, reply.headers.get("Location", ""), where)
        self._refused("redirect").inc()
        raise UpstreamBroken(f"{where} redirects more than {_MAX_HOPS} times")

    def _next(self, url: URL, location: str, where: Where) -> URL:
        endpoint = where.endpoint
        try:
            target = url.join(URL(location, encoded=True))
            usable = (
                bool(_LOCATION.fullmatch(location)) and bool(target.host) and target.user is None and target.password is None
            )
        except ValueError:
            usable = False
        if not usable or target.scheme not in ("http", "https") or (target.scheme, endpoint.scheme) == ("http", "https"):
            self._refused("redirect").inc()
            raise UpstreamBroken(f"{where} redirects to what is no address on {endpoint.scheme}; this is not followed")
        return target.with_fragment(None)

    async def _hop(
        self,
        method: str,
        url: URL,
        headers: dict[str, str],
        where: Where,
        again: tuple[type[RegistryError], ...] = (Dropped, Garbled),
    ) -> Reply:
        """One request, one answer. What was dropped or garbled before its answer is tried again: GET changes nothing."""
        if self._proxy is not None and not is_allowed_literal(url.host or "", self._config.allow_addresses):
            self._refused("address").inc()
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

    def _refused(self, what: str) -> Counter:
        return self._metrics.refused.labels(self._config.name, what)


def _proxy_of(config: UpstreamConfig) -> tuple[URL | None, dict[str, str]]:
    """The proxy's address without its credentials, and the header with them: aiohttp itself would send Latin-1."""
    if config.http_proxy is None:
        return None, {}
    url = URL(config.http_proxy)
    if url.user is None and url.password is None:
        return url, {}
    return url.with_user(None), {"Proxy-Authorization": aiohttp.encode_basic_auth(url.user or "", url.password or "")}


def _at(where: Where, path: str) -> URL:
    return URL(f"{str(where.endpoint).rstrip('/')}{path}", encoded=True)
