"""``pullcache explain``: what a pullcache would do about an image, for people."""

from __future__ import annotations

import json
from typing import Any

import click

from proxy.cli.admin import Admin, Unasked, answer


def run(image: str, admin: Admin, platform: str, *, as_json: bool) -> int:
    """The exit code: 0 where the image is one of the cache's and allowed, else 1."""
    try:
        found = answer(admin, "/explain", {"image": image, "platform": platform})
    except Unasked as error:
        click.echo(f"cannot explain: {error}", err=True)
        return 1
    for line in [json.dumps(found, indent=1)] if as_json else lines(found):
        click.echo(line)
    return 0 if found.get("allowed") else 1


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
