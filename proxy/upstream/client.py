"""The calls to a registry: manifests and blobs, by HEAD and GET, anonymous so far.

Everything that can go wrong between here and there becomes one of our errors on this page; the text names the upstream,
what it said, and what to do. Redirects are followed by hand: each hop is a new request with headers of its own, and
``Authorization`` goes to the endpoint's own origin only, never again once the request has left it (T04).
"""

from __future__ import annotations

import asyncio
import errno
import json
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
from yarl import URL

from proxy import __version__
from proxy.config import UpstreamConfig
from proxy.errors import (
    BlobUnknown,
    Denied,
    ManifestUnknown,
    RangeInvalid,
    RegistryError,
    TooManyRequests,
    UpstreamBroken,
    UpstreamFailing,
    UpstreamUnavailable,
)
from proxy.logs import printable
from proxy.manifests import MAX_BYTES
from proxy.metrics import Metrics
from proxy.names import Digest, Reference, Repository, parse_digest
from proxy.upstream.addresses import socket_factory
from proxy.upstream.auth import RealmRefused, Tokens, check_realm
from proxy.upstream.challenge import Bearer, find_bearer
from proxy.upstream.resolver import Resolver

T = TypeVar("T")

_MAX_HOPS = 5
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_TOKEN = 64 * 1024
_MAX_ERROR = 64 * 1024
_MAX_FIELD = 32 * 1024
_READ_BUFFER = 256 * 1024
_CONNECTIONS = 64
_RESET_DELAYS = (0.0, 0.05, 0.2)  # a connection that is dropped before its answer is tried again
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
_RETRY_AFTER = re.compile(r"\d{1,6}|[A-Za-z]{3}, \d\d [A-Za-z]{3} \d{4} \d\d:\d\d:\d\d GMT", re.ASCII)


@dataclass(frozen=True, slots=True)
class ManifestHead:
    """What a HEAD tells of a manifest; None where the upstream did not say."""

    digest: Digest | None
    size: int | None
    media_type: str


@dataclass(frozen=True, slots=True)
class ManifestBody:
    """A manifest as it came, not verified."""

    body: bytes
    content_type: str


class BlobStream:
    """A blob being received."""

    def __init__(self, response: aiohttp.ClientResponse, where: _Where, offset: int, size: int | None) -> None:
        self.offset = offset
        self.size = size
        self._response = response
        self._where = where
        self._broken: RegistryError | None = None

    async def read(self) -> bytes:
        """Some more bytes; empty at a clean end."""
        if self._broken is not None:
            raise self._broken
        content = self._response.content
        try:
            with _errors(self._where):
                data = await content.readany()
        except UpstreamFailing as error:
            # What arrived before the break is good as far as it goes: a re-open asks from the first byte not received.
            content.set_exception(None)  # type: ignore[arg-type]
            data, self._broken = content.read_nowait(), error
            if not data:
                raise
        self._where.metrics.upstream_bytes.labels(self._where.name).inc(len(data))
        return data

    def close(self) -> None:
        """Gives the connection back, or drops it where more would come."""
        _done(self._response)


@dataclass(frozen=True, slots=True)
class _Where:
    """Whom an error message is about."""

    name: str
    endpoint: URL
    metrics: Metrics

    def __str__(self) -> str:
        host = self.endpoint.host_port_subcomponent
        return self.name if host == self.name else f"{self.name} ({host})"


class Upstream:
    """One registry: its connections, tokens and addresses, shared with no other."""

    def __init__(self, config: UpstreamConfig, metrics: Metrics, instance: str) -> None:
        self.name = config.name
        self.config = config
        self._metrics = metrics
        self._instance = instance
        self._endpoints = [URL(endpoint) for endpoint in config.endpoints]
        self._timeouts = config.timeouts
        self._session: aiohttp.ClientSession | None = None
        self._tokens: Tokens | None = None

    async def start(self) -> None:
        """Makes the session; contacts nobody. Raises ``OSError`` or ``ssl.SSLError`` for an unusable ``caFile``."""
        context = ssl.create_default_context()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.config.ca_file:
            context.load_verify_locations(self.config.ca_file)
        if self.config.insecure_skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            self._metrics.insecure.labels(self.name).set(1)
        factory = socket_factory(self.config.allow_addresses, self._metrics.refused.labels(self.name, "address").inc)
        self._tokens = Tokens(asyncio.get_running_loop().time)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                ssl=context,
                resolver=Resolver(self._timeouts.connect),
                socket_factory=factory,
                limit=_CONNECTIONS,
                ttl_dns_cache=10,
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timeouts.connect),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            requote_redirect_url=False,
            read_bufsize=_READ_BUFFER,
            max_line_size=_MAX_FIELD,
            max_field_size=_MAX_FIELD,
        )

    async def close(self) -> None:
        """Drops every connection."""
        if self._session is not None:
            await self._session.close()

    # -- what pull asks ----------------------------------------------------------------------------------------------

    async def head_manifest(self, repository: Repository, reference: Reference, accept: str, via: str) -> ManifestHead:
        """What the upstream says of a manifest, by HEAD; raises ``RegistryError``."""

        async def ask(endpoint: URL) -> ManifestHead:
            path = f"/v2/{repository}/manifests/{reference}"
            async with self._request("HEAD", endpoint, path, repository, {"Accept": accept}, via) as response:
                if response.status == 405:
                    return ManifestHead(None, None, "")
                await self._check(
                    response, endpoint, ManifestUnknown(_missing(self.name, repository, "manifest", reference))
                )
                return ManifestHead(_digest_header(response), _length(response), _content_type(response))

        return await self._any_endpoint(ask, within=self._timeouts.head)

    async def get_manifest(self, repository: Repository, reference: Reference, accept: str, via: str) -> ManifestBody:
        """A manifest, up to the largest allowed; raises ``RegistryError``."""

        async def ask(endpoint: URL) -> ManifestBody:
            path = f"/v2/{repository}/manifests/{reference}"
            async with self._request("GET", endpoint, path, repository, {"Accept": accept}, via) as response:
                await self._check(
                    response, endpoint, ManifestUnknown(_missing(self.name, repository, "manifest", reference))
                )
                body = await self._bounded(response, endpoint, MAX_BYTES)
                length = _length(response)
                if length is not None and length != len(body):
                    raise UpstreamBroken(f"{self.name} sent {len(body)} bytes of a manifest of {length}")
                return ManifestBody(body, _content_type(response))

        return await self._any_endpoint(ask)

    async def head_blob(self, repository: Repository, digest: Digest, via: str) -> int | None:
        """The size of a blob; raises ``RegistryError``. Where HEAD is not to be had (signed GET URLs), one byte is asked."""
        path = f"/v2/{repository}/blobs/{digest}"
        unknown = BlobUnknown(_missing(self.name, repository, "blob", digest))

        async def ask(endpoint: URL) -> int | None:
            async with self._request("HEAD", endpoint, path, repository, {}, via) as response:
                left = response.url.origin() != endpoint.origin()
                if not (response.status == 405 or (left and response.status in (400, 401, 403))):
                    await self._check(response, endpoint, unknown)
                    if (length := _length(response)) is not None:
                        return length
            async with self._request("GET", endpoint, path, repository, {"Range": "bytes=0-0"}, via) as response:
                await self._check(response, endpoint, unknown)
                span = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
                if response.status == 206:
                    return int(span[3]) if span and span[3] != "*" else None
                return _length(response)

        return await self._any_endpoint(ask)

    async def open_blob(self, repository: Repository, digest: Digest, offset: int, attempt: int, via: str) -> BlobStream:
        """A blob from ``offset`` on, at the endpoint whose turn the ``attempt`` is; raises ``RegistryError``."""
        path = f"/v2/{repository}/blobs/{digest}"
        headers = {"Range": f"bytes={offset}-"} if offset else {}

        async def ask(endpoint: URL) -> BlobStream:
            response = await self._answer("GET", endpoint, path, repository, headers, via)
            try:
                await self._check(response, endpoint, BlobUnknown(_missing(self.name, repository, "blob", digest)))
                where = self._where(endpoint)
                if response.status != 206:
                    return BlobStream(response, where, 0, _length(response))
                span = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
                if span is None:
                    raise UpstreamBroken(f"{where} sent a part of a blob without saying which")
                return BlobStream(response, where, int(span[1]), None if span[3] == "*" else int(span[3]))
            except BaseException:
                response.close()
                raise

        return await self._any_endpoint(ask, attempt)

    # -- how it is asked ---------------------------------------------------------------------------------------------

    async def _any_endpoint(self, ask: Callable[[URL], Awaitable[T]], attempt: int = 0, within: float | None = None) -> T:
        """The answer of the first endpoint that is not failing, beginning with the one whose turn it is."""
        turn = attempt % len(self._endpoints)
        failure: UpstreamFailing | None = None
        for endpoint in self._endpoints[turn:] + self._endpoints[:turn]:
            limit = within or self._timeouts.connect + self._timeouts.headers
            try:
                async with asyncio.timeout(limit):
                    return await ask(endpoint)
            except TimeoutError:
                self._count("any", "error")
                failure = UpstreamUnavailable(
                    f"{self._where(endpoint)} did not answer within {limit:g} s; is it up, and reachable from the cache?"
                )
            except UpstreamFailing as error:
                failure = error
        assert failure is not None
        raise failure

    @asynccontextmanager
    async def _request(
        self, method: str, endpoint: URL, path: str, repository: Repository, headers: dict[str, str], via: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The answer to a request, given back when the block is left."""
        response = await self._answer(method, endpoint, path, repository, headers, via)
        try:
            yield response
        finally:
            _done(response)

    async def _answer(
        self, method: str, endpoint: URL, path: str, repository: Repository, headers: dict[str, str], via: str
    ) -> aiohttp.ClientResponse:
        """The answer to a request, redirects followed and challenge answered.

        One fresh token for one refusal: a registry that goes on refusing has answered.
        """
        assert self._tokens is not None
        headers = headers | {"Via": f"{via}, 1.1 {self._instance}" if via else f"1.1 {self._instance}"}
        token = None
        if bearer := self._tokens.expected(endpoint, repository):
            token = await self._token(endpoint, repository, bearer)
        response = await self._follow(method, endpoint, path, headers, token)
        if response.status != 401 or response.url.origin() != endpoint.origin():
            return response
        bearer = find_bearer(response.headers.getall("WWW-Authenticate", []))
        if bearer is None:
            return response
        response.close()
        if token:
            self._tokens.drop(token)
        fresh = await self._token(endpoint, repository, bearer)
        response = await self._follow(method, endpoint, path, headers, fresh)
        if response.status != 401:
            self._tokens.expect(endpoint, repository, bearer)
        return response

    async def _token(self, endpoint: URL, repository: Repository, bearer: Bearer) -> str:
        """A token for that challenge. Token requests are never redirected, and carry nothing of the client's."""
        assert self._tokens is not None
        where = self._where(endpoint)
        try:
            realm = check_realm(bearer.realm, endpoint, self.config.token_hosts)
        except RealmRefused as error:
            self._metrics.refused.labels(self.name, "realm").inc()
            raise UpstreamBroken(f"{where} cannot be asked: {error}") from error

        async def ask(url: URL) -> bytes:
            try:
                async with asyncio.timeout(self._timeouts.token):
                    response = await self._hop("GET", url, {}, where)
                    try:
                        return await self._token_answer(response, endpoint)
                    finally:
                        _done(response)
            except TimeoutError as error:
                raise UpstreamUnavailable(f"the token server of {where} did not answer in time") from error

        return await self._tokens.get(realm, bearer, repository, ask)

    async def _token_answer(self, response: aiohttp.ClientResponse, endpoint: URL) -> bytes:
        where, status = self._where(endpoint), response.status
        if status == 200:
            return await self._bounded(response, endpoint, _MAX_TOKEN)
        said = await self._said(response, endpoint)
        text = f"the token server of {where} answered {status}{f': {said.text}' if said.text else ''}"
        if status in (401, 403) and said.is_registry:
            raise Denied(f"{text}; the repository is private or does not exist, and this cache asks anonymously")
        if status == 429:
            raise TooManyRequests(f"{text}; its rate limit is used up")
        if status in _REDIRECTS:
            self._metrics.refused.labels(self.name, "redirect").inc()
        raise UpstreamBroken(text)

    async def _follow(
        self, method: str, endpoint: URL, path: str, headers: dict[str, str], token: str | None
    ) -> aiohttp.ClientResponse:
        where = self._where(endpoint)
        url = URL(f"{str(endpoint).rstrip('/')}{path}", encoded=True)
        own = True
        for _ in range(_MAX_HOPS + 1):
            own = own and url.origin() == endpoint.origin()
            authorization = {"Authorization": f"Bearer {token}"} if token and own else {}
            response = await self._hop(method, url, headers | authorization, where)
            if response.status not in _REDIRECTS:
                return response
            location = response.headers.get("Location", "")
            response.close()
            url = self._next(url, location, endpoint, where)
        self._metrics.refused.labels(self.name, "redirect").inc()
        raise UpstreamBroken(f"{where} redirects more than {_MAX_HOPS} times")

    def _next(self, url: URL, location: str, endpoint: URL, where: _Where) -> URL:
        try:
            target = url.join(URL(location, encoded=True))
            usable = bool(location) and bool(target.host) and target.user is None and target.password is None
        except ValueError:
            usable = False
        if not usable or target.scheme not in ("http", "https") or (target.scheme == "http" and endpoint.scheme == "https"):
            self._metrics.refused.labels(self.name, "redirect").inc()
            raise UpstreamBroken(f"{where} redirects to what is not an address on {endpoint.scheme}; this is not followed")
        return target.with_fragment(None)

    async def _hop(self, method: str, url: URL, headers: dict[str, str], where: _Where) -> aiohttp.ClientResponse:
        """One request, one answer. A connection dropped before its answer is tried again: GET and HEAD change nothing."""
        assert self._session is not None
        plain = {"User-Agent": f"pullcache/{__version__}", "Accept-Encoding": "identity"}
        for remaining, delay in zip(reversed(range(len(_RESET_DELAYS))), _RESET_DELAYS, strict=True):
            await asyncio.sleep(delay)
            try:
                with _errors(where):
                    response = await self._session.request(method, url, headers=plain | headers, allow_redirects=False)
            except _Dropped:
                self._count(method, "error")
                if not remaining:
                    raise
                continue
            except RegistryError:
                self._count(method, "error")
                raise
            self._count(method, f"{response.status // 100}xx")
            return response
        raise AssertionError("the last attempt answers or raises")

    async def _bounded(self, response: aiohttp.ClientResponse, endpoint: URL, limit: int) -> bytes:
        """The whole body; raises ``UpstreamBroken`` when it is larger than ``limit``."""
        where = self._where(endpoint)
        if (_length(response) or 0) > limit:
            raise UpstreamBroken(f"{where} announces {_length(response)} bytes where at most {limit} are taken")
        body = bytearray()
        with _errors(where):
            async for data in response.content.iter_any():
                body += data
                if len(body) > limit:
                    raise UpstreamBroken(f"{where} sends more than {limit} bytes where no more are taken")
        return bytes(body)

    async def _check(self, response: aiohttp.ClientResponse, endpoint: URL, unknown: RegistryError) -> None:
        """Passes an answer that holds content; raises what any other one means."""
        where, status = self._where(endpoint), response.status
        if status in (200, 206):
            encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
            if encoding not in ("", "identity"):
                raise UpstreamBroken(
                    f"{where} sent content in the coding {printable(encoding, 32)}; digests are of plain bytes"
                )
            return
        said = await self._said(response, endpoint)
        text = f"{where} answered {status}{f': {said.text}' if said.text else ''}"
        if status == 404:
            unknown.message += f" ({said.text})" if said.text else ""
            raise unknown
        if status in (401, 403) and response.url.origin() == endpoint.origin() and said.is_registry:
            raise Denied(f"{text}; the repository is private or does not exist, and this cache asks anonymously")
        if status == 416:
            raise RangeInvalid(text)
        if status == 429:
            after = response.headers.get("Retry-After", "")
            raise TooManyRequests(
                f"{text}; its rate limit is used up", headers={"Retry-After": after} if _RETRY_AFTER.fullmatch(after) else {}
            )
        if status in (401, 403):
            raise UpstreamBroken(f"{text}, which is no registry's refusal; is a firewall or a login page in between?")
        raise UpstreamBroken(text)

    async def _said(self, response: aiohttp.ClientResponse, endpoint: URL) -> _Said:
        kind = _content_type(response).partition(";")[0].strip().lower()
        is_json = kind == "application/json" or kind.endswith("+json")
        if response.method == "HEAD":
            return _Said("", is_json or (response.status == 401 and "WWW-Authenticate" in response.headers))
        if not is_json:
            return _Said("", False)
        try:
            first = json.loads(await self._bounded(response, endpoint, _MAX_ERROR))["errors"][0]
            code, message = str(first["code"]), str(first.get("message") or "")
        except (RegistryError, ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
            return _Said("", False)
        refusal = code in ("UNAUTHORIZED", "DENIED") or response.status == 401
        return _Said(printable(f"{code} {message}".strip(), 256), refusal)

    def _where(self, endpoint: URL) -> _Where:
        return _Where(self.name, endpoint, self._metrics)

    def _count(self, method: str, status: str) -> None:
        self._metrics.upstream_requests.labels(self.name, method, status).inc()


@dataclass(frozen=True, slots=True)
class _Said:
    """What the body of an error said, and whether a registry said it."""

    text: str
    is_registry: bool


class _Dropped(UpstreamUnavailable):
    """The connection ended before an answer began."""


@contextmanager
def _errors(where: _Where) -> Iterator[None]:
    """Foreign exceptions of a request become ours."""
    try:
        yield
    except aiohttp.ClientConnectorCertificateError as error:
        reason = getattr(error.certificate_error, "verify_message", "") or "not valid"
        raise UpstreamUnavailable(
            f"the TLS certificate of {where} is not accepted: {reason}; give its CA as caFile"
        ) from error
    except aiohttp.ClientSSLError as error:
        raise UpstreamUnavailable(
            f"TLS with {where} failed: {type(error.__cause__).__name__}; TLS 1.2 is the least"
        ) from error
    except aiohttp.ClientConnectorDNSError as error:
        raise UpstreamUnavailable(f"the name of {where}, or of where it redirects to, cannot be resolved") from error
    except aiohttp.ClientConnectorError as error:
        cause = error.os_error
        reason = "connection refused" if cause.errno == errno.ECONNREFUSED else printable(str(cause))
        raise UpstreamUnavailable(f"{where} cannot be reached: {reason}") from error
    except (aiohttp.ServerTimeoutError, TimeoutError) as error:
        if isinstance(error, aiohttp.ServerTimeoutError):
            raise UpstreamUnavailable(f"{where} cannot be reached: no connection in time") from error
        raise
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
        raise _Dropped(f"{where} dropped the connection") from error
    except aiohttp.ClientPayloadError as error:
        raise UpstreamUnavailable(f"{where} broke off in the middle of the content") from error
    except (aiohttp.ClientError, ValueError) as error:
        raise UpstreamBroken(f"{where} sent what is not valid HTTP") from error


def _done(response: aiohttp.ClientResponse) -> None:
    if response.content.at_eof() and response.content.exception() is None:
        response.release()
    else:
        response.close()


def _missing(name: str, repository: Repository, kind: str, reference: Reference) -> str:
    return f"{name} has no {kind} {reference} in {repository}"


def _length(response: aiohttp.ClientResponse) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None


def _content_type(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("Content-Type", "")


def _digest_header(response: aiohttp.ClientResponse) -> Digest | None:
    try:
        return parse_digest(response.headers.get("Docker-Content-Digest", ""))
    except RegistryError:
        return None
