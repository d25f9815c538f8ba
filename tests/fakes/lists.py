"""How a registry lists tags and referrers: what the OCI distribution spec 1.1.1 leaves to it, each choice an attribute."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from .answers import as_json, oci_error, status
from .messages import Answer, Request

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_NOT_IN_TAGS = re.compile(r"[^A-Za-z0-9._-]")
_NOT_FOUND = status(404, b"404 page not found\n", "text/plain; charset=utf-8")
"""How the ``distribution`` registry answers an endpoint that it does not have."""

Entries = list[dict[str, Any]]
Link = list[tuple[str, str]]


def referrers_tag(digest: str) -> str:
    """The tag that holds the referrers of a digest where there is no API for them ("Referrers Tag Schema")."""
    algorithm, _, encoded = digest.partition(":")
    return _NOT_IN_TAGS.sub("-", f"{algorithm[:32]}-{encoded[:64]}")


def referrer(manifest: Mapping[str, Any], descriptor: dict[str, Any]) -> dict[str, Any]:
    """How a list of referrers describes a manifest: what it is an artifact of, and its annotations."""
    kind = manifest.get("artifactType") or manifest.get("config", {}).get("mediaType")
    more = {"artifactType": kind, "annotations": manifest.get("annotations")}
    return descriptor | {key: value for key, value in more.items() if value}


@dataclass
class Lists:
    """The choices of one registry; as it is made, it is one that pages only when asked to."""

    page_size: int | None = None
    """No page of tags is longer, whatever ``n`` is."""

    takes_n: bool = True
    """Whether ``n`` counts; there are registries that page as they please, or not at all."""

    takes_last: bool = True
    """Whether ``last`` counts."""

    order: Callable[[str], str] | None = str
    """What tags are sorted by; none where they are in the order in which they came, as of ``distribution`` before 3.0."""

    referrers_page_size: int | None = None
    """No page of referrers is longer."""

    cursor: str | None = None
    """The name of an opaque parameter in links, which alone continues a list: ``last`` then means nothing."""

    link_to: Callable[[str], str] = str
    """What stands in a link for a path and query of this registry, for example an absolute URL."""

    filters: bool = True
    """Whether referrers are filtered by ``artifactType``."""

    referrers_api: bool = True
    """Whether there is an endpoint for referrers."""

    def tags(self, repo: str, held: Iterable[str], request: Request) -> Answer:
        """A page of tags, in lexical order."""
        asked = request.params.get("n", [""])[0]
        if "n" in request.params and not (asked.isascii() and asked.isdecimal()):
            return oci_error(400, "PAGINATION_NUMBER_INVALID", "invalid number of results requested")
        last = self._continued(request, "last")
        if last is None:
            return oci_error(400, "PAGINATION_NUMBER_INVALID", "not a cursor of this registry")
        key = self.order or str
        found = sorted(held, key=key) if self.order else list(held)
        rest = [tag for tag in found if key(tag) > key(last) or not self.takes_last]
        limits = [int(asked)] if asked and self.takes_n else []
        limits += [] if self.page_size is None else [self.page_size]
        page = rest[: min(limits, default=len(rest))]
        link: Link = []
        if page and len(page) < len(rest):
            link = self._link(f"/v2/{repo}/tags/list", [("n", asked or str(len(page)))], "last", page[-1])
        return as_json({"name": repo, "tags": page}, headers=link)

    def referrers(self, repo: str, digest: str, entries: Entries, request: Request, media_type: str) -> Answer:
        """A page of referrers, in the order in which they came."""
        if not self.referrers_api:
            return _NOT_FOUND
        if not _DIGEST.fullmatch(digest):
            return oci_error(400, "DIGEST_INVALID", "provided digest is not valid")
        kinds = request.params.get("artifactType", [])
        headers = []
        if kinds and self.filters:
            entries = [entry for entry in entries if entry.get("artifactType") == kinds[0]]
            headers = [("OCI-Filters-Applied", "artifactType")]
        digests = [entry["digest"] for entry in entries]
        last = self._continued(request, "after")
        if last is None or (last and last not in digests):
            return oci_error(400, "UNSUPPORTED", "not a place in this list")
        start = digests.index(last) + 1 if last else 0
        page = entries[start:][: self.referrers_page_size]
        if page and start + len(page) < len(entries):
            kept = [("artifactType", kind) for kind in kinds]
            headers += self._link(f"/v2/{repo}/referrers/{digest}", kept, "after", page[-1]["digest"])
        document = {"schemaVersion": 2, "mediaType": media_type, "manifests": page}
        return status(200, json.dumps(document).encode(), media_type, headers)

    def _continued(self, request: Request, place: str) -> str | None:
        """After which entry to go on; none for a cursor that this registry never gave."""
        text = request.params.get(self.cursor or place, [""])[0]
        if self.cursor is None:
            return text
        try:
            return base64.urlsafe_b64decode(text).decode()
        except (binascii.Error, UnicodeDecodeError):
            return None

    def _link(self, path: str, kept: list[tuple[str, str]], place: str, last: str) -> Link:
        """The header that names the next page."""
        where = (place, last) if self.cursor is None else (self.cursor, base64.urlsafe_b64encode(last.encode()).decode())
        target = self.link_to(f"{path}?{urlencode([*kept, where])}")
        return [("Link", f'<{target}>; rel="next"')]
