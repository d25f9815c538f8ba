"""``pullcache explain``: asks a running pullcache what it would do about an image, and says it for people."""

from __future__ import annotations

import json
import ssl
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

import click

SECONDS = 30.0
"""A plugin that gives credentials may take its time."""
_MOST = 1024 * 1024


def run(image: str, admin: str, token_file: Path | None = None, ca_file: Path | None = None) -> int:
    """The exit code: 0 where the image is one of the cache's and allowed, else 1."""
    try:
        found = ask(image, admin, token_file, ca_file)
    except Unasked as error:
        click.echo(f"cannot explain: {error}", err=True)
        return 1
    for line in lines(found):
        click.echo(line)
    return 0 if found.get("allowed") else 1


class Unasked(Exception):
    """There is no answer; the text says why, and what to do."""


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
        raise Unasked(f"{admin}: {wanted if error.code == 401 else f'it answered {error.code}'}") from error
    except (URLError, OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise Unasked(f"{admin} cannot be asked: {reason}; {_hint(url, reason)}") from error
    if not isinstance(found, dict):
        raise Unasked(f"{admin} does not answer as a pullcache; {_hint(url, None)}")
    return found


def _asked(request: Request, token_file: Path | None, ca_file: Path | None) -> Any:
    try:
        if token_file is not None:
            request.add_header("Authorization", f"Bearer {token_file.read_text().strip()}")
        tls = ssl.create_default_context(cafile=ca_file)
    except (OSError, ValueError) as error:
        file = getattr(error, "filename", None) or ca_file or token_file
        raise Unasked(f"{file}: cannot be used: {getattr(error, 'strerror', None) or error}") from error
    with build_opener(ProxyHandler({}), HTTPSHandler(context=tls)).open(request, timeout=SECONDS) as answer:
        return json.loads(answer.read(_MOST))


def _hint(url: str, reason: object) -> str:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return "give its CA: --ca-file"
    if url.startswith("http://") and not isinstance(reason, ConnectionRefusedError):
        return "if it has TLS, write --admin https://..."
    return "is pullcache running, and is this its admin address?"


def lines(found: dict[str, Any]) -> list[str]:
    """An explanation, a line a subject."""
    told = [f"image       {found['image']}"] if "image" in found else []
    if "error" in found:
        return [*told, f"error       {found['error']}"]
    upstream = found["upstream"]
    told.append(f"upstream    {upstream['name']} at {', then '.join(upstream['endpoints'])}")
    told.append(f"access      {found['access']}")
    allowed = "allowed" if found["allowed"] else "denied"
    told.append(f"rules       {allowed}" + (f" by '{found['rule']}'" if found["rule"] else ", no rule matches"))
    if found["dryRunDenied"]:
        told.append(f"            '{found['dryRunDenied']}' would deny it, were it not on dryRun")
    policy = found["imagePullPolicy"]
    again = f"; asked for again after {policy['maxAge']:g} s" if policy["maxAge"] is not None else ""
    told.append(f"policy      {policy['policy']}: {policy['why']}{again}")
    credentials = found["credentials"]
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
