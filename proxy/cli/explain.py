"""``pullcache explain``: what a pullcache would do about an image, for people; it is asked where it runs."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import HTTPRedirectHandler, HTTPSHandler, ProxyHandler, Request, build_opener

import click

from proxy.config.values import Address

if TYPE_CHECKING:
    from proxy.config.model import Config

ADMIN = "127.0.0.1:5001"
_EVERY = ("", "0.0.0.0", "::")  # noqa: S104 - told apart, not bound
SECONDS = 30.0
"""A plugin that gives credentials may take its time."""
_MOST = 1024 * 1024


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


def run(image: str, admin: Admin, platform: str, *, as_json: bool) -> int:
    """The exit code: 0 where the image is one of the cache's and allowed, else 1."""
    try:
        found = ask(image, admin.url, admin.token, admin.ca_file, platform)
    except Unasked as error:
        if not error.is_nobody or admin.address is not None:
            click.echo(f"cannot explain: {error}", err=True)
            return 1
        click.echo(f"nobody listens on {admin.url}: told from the configuration and the cache directory alone", err=True)
        try:
            found = asyncio.run(_alone(admin.config, image, platform))
        except _refusals() as refusal:
            click.echo(f"cannot explain: {refusal}", err=True)
            return 1
    for line in [json.dumps(found, indent=1)] if as_json else lines(found):
        click.echo(line)
    return 0 if found.get("allowed") else 1


async def _alone(config: Config | None, image: str, platform: str) -> dict[str, Any]:
    """The explanation of a pullcache that does not run; raises what refuses its start."""
    from proxy import app
    from proxy.config.file import validate

    async with app.build(config or validate({})) as cache:
        return await cache.explain(image, platform)


def _refusals() -> tuple[type[Exception], ...]:
    from proxy.cli.serve import REFUSALS

    return REFUSALS


def reachable(address: Address) -> str:
    """Where this machine finds a listener: one on every interface on loopback."""
    return str(Address("127.0.0.1" if address.host in _EVERY else address.host, address.port))


class Unasked(Exception):
    """There is no answer; the text says why, and what to do. ``is_nobody``: nobody listens there."""

    def __init__(self, text: str, *, is_nobody: bool = False) -> None:
        super().__init__(text)
        self.is_nobody = is_nobody


def ask(
    image: str, admin: str, token_file: Path | None = None, ca_file: Path | None = None, platform: str = ""
) -> dict[str, Any]:
    """What a running pullcache says of an image, of one platform where one is given; raises ``Unasked``. Blocks."""
    url = admin if "://" in admin else f"http://{admin}"
    query = urlencode({"image": image} | ({"platform": platform} if platform else {}))
    try:
        found = _asked(Request(f"{url}/explain?{query}"), token_file, ca_file)  # noqa: S310 - the operator's own address
    except HTTPError as error:
        wanted = f"{token_file} does not hold its token" if token_file else "it wants its token; give --token-file"
        other = f"it answered {error.code}; is this its admin address?"
        raise Unasked(f"{admin}: {wanted if error.code == 401 else other}") from error
    except (URLError, OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        is_nobody = isinstance(reason, ConnectionRefusedError)
        said = getattr(reason, "strerror", None) or reason
        raise Unasked(f"{admin} cannot be asked: {said}; {_hint(url, reason)}", is_nobody=is_nobody) from error
    if not isinstance(found, dict):
        raise Unasked(f"{admin} does not answer as a pullcache; {_hint(url, None)}")
    return found


def _asked(request: Request, token_file: Path | None, ca_file: Path | None) -> Any:
    try:
        if token_file is not None:
            request.add_header("Authorization", f"Bearer {_token_in(token_file)}")
        tls = ssl.create_default_context(cafile=ca_file)
    except (OSError, ValueError) as error:
        file = getattr(error, "filename", None) or ca_file or token_file
        raise Unasked(f"{file}: cannot be used: {getattr(error, 'strerror', None) or error}") from error
    with build_opener(ProxyHandler({}), HTTPSHandler(context=tls), _NoRedirect()).open(request, timeout=SECONDS) as answer:
        return json.loads(answer.read(_MOST))


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


def lines(found: dict[str, Any]) -> list[str]:
    """An explanation, a line a subject."""
    told = [f"image       {found['image']}"] if "image" in found else []
    if "error" in found:
        return [*told, f"error       {found['error']}"]
    upstream = found["upstream"]
    told.append(f"upstream    {upstream['name']} at {', then '.join(upstream['endpoints'])}")
    told.append(f"            by {upstream['routing']}")
    told.append(f"access      {found['access']}")
    allowed = "allowed" if found["allowed"] else "denied"
    told.append(f"rules       {allowed}" + (f" by '{found['rule']}'" if found["rule"] else ", no rule matches"))
    if found["dryRunDenied"]:
        told.append(f"            '{found['dryRunDenied']}' would deny it, were it not on dryRun")
    policy = found["imagePullPolicy"]
    again = f"; asked for again after {policy['maxAge']:g} s" if policy["maxAge"] is not None else ""
    told.append(f"policy      {policy['policy']}: {policy['why']}{again}")
    told += _held_lines(found["held"], found["fresh"])
    told += _upstream_lines(found)
    told += _credential_lines(found)
    return [*told, f"now         {found['pull']}"]


def _held_lines(held: dict[str, Any], is_fresh: bool | None) -> list[str]:
    if held["manifest"] is None:
        return ["held        nothing"]
    age = held["confirmedAgo"]
    told = [f"held        {held['manifest']}"]
    if age is not None:
        told[0] += f", confirmed {age:g} s ago ({'fresh' if is_fresh else 'to be asked for again'})"
    told += [f"            {image['platform'] or 'image'}: {_parts(image)}" for image in held["images"]]
    return [*told, f"            {held['error']}"] if held["error"] else told


def _parts(image: dict[str, Any]) -> str:
    """How much of one platform's image is held."""
    if image["complete"]:
        return f"whole, {image['bytes']} bytes of blobs"
    if image["manifest"] in image["missing"]:
        return "its manifest is not held"
    return f"{len(image['missing'])} of its {image['held'] + len(image['missing'])} blobs are missing"


def _upstream_lines(found: dict[str, Any]) -> list[str]:
    told = [f"outage      {found['upstream']['outage']}"] if found["upstream"]["outage"] else []
    for back in found["backoff"]:
        told.append(f"back-off    {back['nextAttemptIn']:g} s more, for {back['for']}: {back['error']}")
    for limit in found["rateLimit"]:
        left = f"{limit['remaining'] if limit['remaining'] is not None else '?'} of {limit['limit'] or '?'} pulls left"
        per = f" in {limit['window']} s" if limit["window"] else ""
        source = f", for {limit['source']}" if limit["source"] else ""
        told.append(f"rate limit  {left}{per}, asking as {limit['of']}{source}; said {limit['toldAgo']:g} s ago")
    return told


def _credential_lines(found: dict[str, Any]) -> list[str]:
    credentials = found["credentials"]
    told = []
    if found["credentialFailure"]:
        told.append(f"credential  cannot be had: {found['credentialFailure']}")
    elif found["access"] == "verify":
        told.append("credential  the client's own, where the registry does not give it to the anonymous")
    elif not credentials:
        told.append("credential  none: it is asked for anonymously")
    for number, credential in enumerate(credentials, start=1):
        said = credential["upstreamSaid"] or "not shown to it yet"
        told.append(f"credential  {number}. {credential['source']}, entry '{credential['registry']}'; upstream: {said}")
    return told
