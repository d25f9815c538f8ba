"""One request to a registry and its answer: what it holds, what it means, and how it is read.

Foreign exceptions of a request become ours on this page; every text names the upstream, what it said, and what to do.
"""

from __future__ import annotations

import errno
import json
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import aiohttp
from yarl import URL

from proxy.credentials.credential import Credential
from proxy.errors import (
    Denied,
    RangeInvalid,
    RegistryError,
    TooManyRequests,
    UpstreamBroken,
    UpstreamFailing,
    UpstreamIntercepted,
    UpstreamRefused,
    UpstreamUnavailable,
)
from proxy.logs import printable
from proxy.names import Digest, Repository, parse_digest
from proxy.upstream.auth import same_origin

_MAX_ERROR = 64 * 1024
_SIGNATURE = 8  # characters; what is shorter is in every text
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
_RETRY_AFTER = re.compile(r"\d{1,6}|[A-Za-z]{3}, \d\d [A-Za-z]{3} \d{4} \d\d:\d\d:\d\d GMT", re.ASCII)
_TLS = "TLS 1.2 is the least that is spoken"
_ABOUT_OURS = ("CERTIFICATE_REQUIRED", "ALERT_BAD_CERTIFICATE", "ALERT_UNKNOWN_CA", "ALERT_CERTIFICATE", "ACCESS_DENIED")


class Dropped(UpstreamUnavailable):
    """The connection ended before an answer began."""


class Garbled(UpstreamBroken):
    """What came is no answer: perhaps what was left over from the one before, on the same connection."""


@dataclass(frozen=True, slots=True)
class Where:
    """Whom a request goes to, and whom an error message is about."""

    name: str
    endpoint: URL

    def __str__(self) -> str:
        host = self.endpoint.host_port_subcomponent
        return self.name if host == self.name else f"{self.name} ({host})"


@dataclass(frozen=True, slots=True)
class Request:
    """What a repository is asked for: the same at every endpoint, and whoever asks."""

    method: str
    kind: Literal["manifest", "blob", "list"]
    path: str
    repository: Repository
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """What a 206 says that it brings: the first byte's place, and the size of the whole if it is told."""

    start: int
    total: int | None


@dataclass(frozen=True, slots=True)
class _Said:
    """What the body of an error said, and whether a registry said it."""

    text: str
    is_registry: bool


class Reply:
    """An answer whose headers are here. Whoever gets it closes it."""

    def __init__(self, response: aiohttp.ClientResponse, where: Where) -> None:
        self._response = response
        self._broken: RegistryError | None = None
        self.credential: Credential | None = None
        """What the request showed, for texts that say whose it was."""
        self.hide: Callable[[str], str] = str
        """Takes out of a text what must not be repeated."""
        self.where = where
        self.status = response.status
        self.headers = response.headers
        self.length = _number(response.headers.get("Content-Length", ""))
        self.content_type = response.headers.get("Content-Type", "")

    @property
    def is_own(self) -> bool:
        """Whether the endpoint itself answered, not a host that it redirected to."""
        return same_origin(self._response.url, self.where.endpoint)

    @property
    def media_type(self) -> str:
        """``Content-Type`` without parameters."""
        return self.content_type.partition(";")[0].strip().lower()

    @property
    def is_json(self) -> bool:
        """Whether a program answered, not a page for people."""
        return self.media_type == "application/json" or self.media_type.endswith("+json")

    @property
    def is_challenge(self) -> bool:
        """Whether a registry wants to know who asks, though in words of its own (Amazon ECR: "Not Authorized")."""
        return (
            self.status == 401 and "WWW-Authenticate" in self.headers and "Docker-Distribution-Api-Version" in self.headers
        )

    @property
    def digest(self) -> Digest | None:
        """``Docker-Content-Digest``: what the upstream says, which proves nothing."""
        try:
            return parse_digest(self.headers.get("Docker-Content-Digest", ""))
        except RegistryError:
            return None

    @property
    def part(self) -> Part | None:
        """``Content-Range``, where it can be understood."""
        found = _CONTENT_RANGE.fullmatch(self.headers.get("Content-Range", ""))
        return Part(int(found[1]), None if found[3] == "*" else int(found[3])) if found else None

    async def read(self) -> bytes:
        """Some more bytes of the body; empty at a clean end."""
        if self._broken is not None:
            raise self._broken
        content = self._response.content
        try:
            with foreign_errors(self.where):
                return await content.readany()
        except UpstreamFailing as error:
            # What arrived before the break is good as far as it goes: a re-open asks from the first byte not received.
            content.set_exception(None)  # type: ignore[arg-type]
            data, self._broken = content.read_nowait(), error
            if not data:
                raise
            return data

    async def body(self, limit: int) -> bytes:
        """The whole body; raises ``UpstreamBroken`` when it is larger than ``limit``, or not as long as announced."""
        if (self.length or 0) > limit:
            raise UpstreamBroken(f"{self.where} announces {self.length} bytes where at most {limit} are taken")
        body = bytearray()
        while data := await self.read():
            body += data
            if len(body) > limit:
                raise UpstreamBroken(f"{self.where} sends more than {limit} bytes where no more are taken")
        if self.length is not None and self.length != len(body):
            raise UpstreamBroken(f"{self.where} sent {len(body)} bytes and had announced {self.length}")
        return bytes(body)

    def close(self) -> None:
        """Gives the connection back, or drops it where more would come."""
        content = self._response.content
        if content.at_eof() and content.exception() is None and self._broken is None:
            self._response.release()
        else:
            self._response.close()

    async def check(self, unknown: RegistryError) -> None:
        """Passes an answer that holds content; raises what any other one means, ``unknown`` for a 404."""
        where, status = self.where, self.status
        if status in (200, 206):
            encoding = self.headers.get("Content-Encoding", "identity").strip().lower()
            if encoding not in ("", "identity"):
                raise UpstreamBroken(
                    f"{where} sent content in the coding {printable(encoding, 32)}; digests are of plain bytes"
                )
            return
        said = await self._said()
        text = f"{where} answered {status}{f': {said.text}' if said.text else ''}"
        page = self.media_type == "text/html" or (self.media_type.startswith("text/") and self._response.method == "HEAD")
        if status == 404 and page:
            raise UpstreamBroken(f"{text}, which is no registry's answer; is it up behind its proxy?")
        if status == 404:
            raise type(unknown)(f"{unknown.message} ({said.text})") if said.text else unknown
        if status in (401, 403) and self.is_own and (said.is_registry or self.is_challenge):
            raise Denied(f"{text}; {asked_as(self.credential)}")
        if status == 416 and "Range" in self._response.request_info.headers:
            raise RangeInvalid(text)
        if status == 429:
            after = self.headers.get("Retry-After", "")
            raise TooManyRequests(
                f"{text}; its rate limit is used up",
                headers={"Retry-After": after} if _RETRY_AFTER.fullmatch(after) else {},
            )
        if status in (401, 403):
            raise UpstreamIntercepted(f"{text}, which is no registry's refusal; is a firewall or a login page in between?")
        if 400 <= status < 500:
            raise UpstreamRefused(text)
        raise UpstreamBroken(text, retry_after=self.headers.get("Retry-After", "") if status == 503 else "")

    async def _said(self) -> _Said:
        if self._response.method == "HEAD":  # without a body the headers have to tell
            return _Said("", self.is_json)
        if not self.is_json:
            return _Said("", False)
        try:
            first = json.loads(await self.body(_MAX_ERROR))["errors"][0]
            code, message = str(first["code"]), str(first.get("message") or "")
        except (RegistryError, ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
            return _Said("", False)
        text = f"{code} {message}".strip()
        for value in self._response.url.query.values():  # a signature, where it was redirected
            text = text.replace(value, "[redacted]") if len(value) >= _SIGNATURE else text
        return _Said(printable(self.hide(text), 256), code in ("UNAUTHORIZED", "DENIED") or self.status == 401)


def asked_as(credential: Credential | None) -> str:
    """Who asked, and what a refusal then means."""
    if credential is None:
        return "the repository is private or does not exist, and this cache asks anonymously"
    if credential.is_ours:
        return f"the repository does not exist, or what {credential.source} holds for {credential.registry} does not open it"
    return "the repository does not exist, or the credential does not open it"


@contextmanager
def foreign_errors(where: Where) -> Iterator[None]:
    """aiohttp's exceptions become ours."""
    try:
        yield
    except aiohttp.ClientConnectorError as error:
        raise UpstreamUnavailable(_no_connection(where, error)) from error
    except aiohttp.ClientHttpProxyError as error:
        raise UpstreamUnavailable(f"the httpProxy answered {error.status} when asked to connect to {where}") from error
    except aiohttp.ServerTimeoutError as error:
        raise UpstreamUnavailable(f"{where} cannot be reached: no connection in time") from error
    except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
        if _refuses_ours(error.__cause__):  # TLS 1.3 looks at our certificate when the handshake is over for us
            raise UpstreamUnavailable(_no_tls(where, error.__cause__)) from error
        raise Dropped(f"{where} dropped the connection") from error
    except aiohttp.ClientPayloadError as error:
        raise UpstreamUnavailable(f"{where} broke off in the middle of the content") from error
    except aiohttp.ClientResponseError as error:
        raise Garbled(f"{where} sent what is not valid HTTP") from error
    except (aiohttp.ClientError, ValueError) as error:
        raise UpstreamBroken(f"{where} sent what is not valid HTTP") from error


def _no_connection(where: Where, error: aiohttp.ClientConnectorError) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        reason = getattr(error.certificate_error, "verify_message", "") or "not valid"
        return f"the TLS certificate of {where} is not accepted: {reason}; give its CA as caFile"
    cause = error.os_error
    reason = "connection refused" if cause.errno == errno.ECONNREFUSED else printable(str(cause))
    if isinstance(error, aiohttp.ClientSSLError):
        return _no_tls(where, cause)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"the name of {where}, or of where it redirects to, cannot be resolved"
    if isinstance(error, aiohttp.ClientProxyConnectionError):
        return f"the httpProxy that leads to {where} cannot be reached: {reason}"
    if error.ssl is not False and isinstance(cause, ConnectionResetError | ConnectionAbortedError | BrokenPipeError):
        return f"TLS with {where} failed: it hung up in the handshake; {_TLS}"
    return f"{where} cannot be reached: {reason}"


def _refuses_ours(cause: BaseException | None) -> bool:
    """Whether the other side has said in TLS that it does not accept our certificate, or the lack of one."""
    return isinstance(cause, ssl.SSLError) and any(word in (cause.reason or "") for word in _ABOUT_OURS)


def _no_tls(where: Where, cause: BaseException | None) -> str:
    reason = getattr(cause, "reason", None) or ""
    text = f"TLS with {where} failed{f' ({reason})' if reason else ''}"
    if _refuses_ours(cause):
        return f"{text}: it does not accept our certificate, or wants one; see clientCertFile"
    if "HANDSHAKE_FAILURE" in reason:
        return f"{text}; {_TLS}; perhaps it wants a certificate: see clientCertFile"
    if "WRONG_VERSION_NUMBER" in reason:
        return f"{text}: it does not speak TLS there; if it is on http, write http:// in its address"
    return f"{text}; {_TLS}"


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else None
