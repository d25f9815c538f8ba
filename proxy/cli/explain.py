"""``pullcache explain``: asks a running pullcache what it would do about an image, and says it for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import ProxyHandler, Request, build_opener

import click

SECONDS = 30.0
"""A plugin that gives credentials may take its time."""
_MOST = 1024 * 1024


def run(image: str, admin: str, token_file: Path | None) -> int:
    """The exit code: 0 where the image is one of the cache's and allowed, else 1."""
    url = admin if "://" in admin else f"http://{admin}"
    request = Request(f"{url}/explain?image={quote(image, safe='')}")  # noqa: S310 - the operator's own address
    try:
        if token_file is not None:
            request.add_header("Authorization", f"Bearer {token_file.read_text().strip()}")
        with build_opener(ProxyHandler({})).open(request, timeout=SECONDS) as answer:
            found = json.loads(answer.read(_MOST))
    except HTTPError as error:
        reason = "it wants its token; give --token-file" if error.code == 401 else f"it answered {error.code}"
        click.echo(f"cannot explain: {admin}: {reason}", err=True)
        return 1
    except (URLError, OSError, ValueError) as error:
        click.echo(f"cannot explain: {admin} cannot be asked: {getattr(error, 'reason', error)}", err=True)
        return 1
    for line in lines(found):
        click.echo(line)
    return 0 if found.get("allowed") else 1


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
