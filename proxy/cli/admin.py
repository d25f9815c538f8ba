"""What operators ask of a pullcache: of one that runs through its admin listener, else of its directory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import HTTPRedirectHandler, HTTPSHandler, ProxyHandler, Request, build_opener

import click

from proxy.config.values import Address
from proxy.logs import printable

if TYPE_CHECKING:
    from proxy.config.model import Config

ADMIN = "127.0.0.1:5001"
_EVERY = ("", "0.0.0.0", "::")  # noqa: S104 - told apart, not bound
SECONDS = 30.0
"""A plugin that gives credentials may take its time."""
_MOST = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Admin:
    """Where operators ask, as one says it: an address, or the configuration of the pullcache that is meant."""

    address: str | None = None
    config: Config | None = None
    token_file: Path | None = None
    ca_file: Path | None = None

    @property
    def url(self) -> str:
        """Its address; the default one where none is said."""
        if self.address is not None or self.config is None:
            return self.address or ADMIN
        scheme = "https" if self.config.admin_listener.tls_cert_file else "http"
        return f"{scheme}://{reachable(self.config.admin)}"

    @property
    def token(self) -> Path | None:
        """The file of its token."""
        return self.token_file or (self.config.admin_listener.token_file if self.config else None)


def reachable(address: Address) -> str:
    """Where this machine finds a listener: one on every interface on loopback."""
    return str(Address("127.0.0.1" if address.host in _EVERY else address.host, address.port))


class Unasked(Exception):
    """There is no answer; the text says why, and what to do. ``is_nobody``: nobody listens there."""

    def __init__(self, text: str, *, is_nobody: bool = False) -> None:
        super().__init__(text)
        self.is_nobody = is_nobody


def answer(admin: Admin, path: str, query: Mapping[str, str], *, is_change: bool = False) -> dict[str, Any]:
    """What a pullcache says: a running one, or, where nobody listens and no address was named, one made of the configuration
    and the cache directory for this question alone, which asks what it must ask. Raises ``Unasked``. Blocks."""
    try:
        return ask(admin, path, query, is_change=is_change)
    except Unasked as error:
        if not error.is_nobody or admin.address is not None:
            raise
    click.echo(f"nobody listens on {admin.url}: told from the configuration and the cache directory alone", err=True)
    return _alone(admin.config, path, query)


def _alone(config: Config | None, path: str, query: Mapping[str, str]) -> dict[str, Any]:
    from proxy import app
    from proxy.cli.serve import REFUSALS
    from proxy.config.file import validate
    from proxy.errors import RegistryError

    async def act() -> dict[str, Any]:
        async with app.build(config or validate({})) as cache:
            return await cache.actions[path].answer(query)

    try:
        return asyncio.run(act())
    except RegistryError as error:
        return {"error": error.message}
    except (*REFUSALS, ValueError) as error:
        raise Unasked(str(error)) from error


def ask(admin: Admin, path: str, query: Mapping[str, str], *, is_change: bool = False) -> dict[str, Any]:
    """What a running pullcache says; raises ``Unasked``. Blocks."""
    url = admin.url if "://" in admin.url else f"http://{admin.url}"
    form = urlencode({key: value for key, value in query.items() if value})
    try:
        request = Request(f"{url}{path}?{form}")  # noqa: S310 - the operator's own address
        if is_change:
            request.method, request.data = "POST", b""
            request.add_header("Content-Type", "application/json")
        found = _asked(request, admin.token, admin.ca_file)
    except HTTPError as error:
        raise Unasked(f"{admin.url}: {_refusal(error, admin.token)}") from error
    except (URLError, OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        is_nobody = isinstance(reason, ConnectionRefusedError)
        said = getattr(reason, "strerror", None) or reason
        raise Unasked(f"{admin.url} cannot be asked: {said}; {_hint(url, reason)}", is_nobody=is_nobody) from error
    if not isinstance(found, dict):
        raise Unasked(f"{admin.url} does not answer as a pullcache; {_hint(url, None)}")
    return found


def _refusal(error: HTTPError, token: Path | None) -> str:
    if error.code == 401:
        return f"{token} does not hold its token" if token else "it wants its token; give --token-file"
    if error.code == 400:
        with contextlib.suppress(OSError, ValueError, HTTPException, TypeError, KeyError):
            return printable(str(json.loads(error.read(_MOST))["error"]))
    return f"it answered {error.code}; is this its admin address?"


def _asked(request: Request, token_file: Path | None, ca_file: Path | None) -> Any:
    try:
        if token_file is not None:
            request.add_header("Authorization", f"Bearer {_token_in(token_file)}")
        tls = ssl.create_default_context(cafile=ca_file)
    except (OSError, ValueError) as error:
        file = getattr(error, "filename", None) or ca_file or token_file
        raise Unasked(f"{file}: cannot be used: {getattr(error, 'strerror', None) or error}") from error
    with build_opener(ProxyHandler({}), HTTPSHandler(context=tls), _NoRedirect()).open(request, timeout=SECONDS) as reply:
        return json.loads(reply.read(_MOST))


class _NoRedirect(HTTPRedirectHandler):
    """The token is for the address that was named, and no other."""

    def redirect_request(self, *_: object) -> None:
        return None


def _token_in(file: Path) -> str:
    """What a file holds, if a header can show it: the texts of other errors would quote it."""
    content = file.read_bytes().strip()
    if not re.fullmatch(rb"[!-~]+", content):
        raise Unasked(f"{file}: holds no token: one line without spaces is needed")
    return content.decode()


def _hint(url: str, reason: object) -> str:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return "give its CA: --ca-file"
    if isinstance(reason, ssl.SSLError):
        return "if it has no TLS, write --admin http://..."
    if url.startswith("http://") and not isinstance(reason, ConnectionRefusedError | socket.gaierror):
        return "if it has TLS, write --admin https://..."
    return "is pullcache running, and is this its admin address?"
