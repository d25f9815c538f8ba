"""The lists of the registry API, as documents: tags of a repository, referrers of a manifest, and their pages.

OCI distribution spec 1.1.1, "Listing Tags" and "Listing Referrers". Nothing of an upstream's document is passed on that
was not understood: a list is read, judged, and written anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from proxy.errors import PaginationNumberInvalid, RequestInvalid
from proxy.manifests import OCI_INDEX, ManifestInvalid, parse_manifest
from proxy.names import Digest, Tag, is_tag

MAX_PAGE = 8 * 1024 * 1024
"""Larger pages are refused; a hundred thousand tags are some 3 MiB."""

_MAX_ELEMENTS = 250_000
"""Commas and brackets: empty lists take seven times their size in memory."""

_MAX_PARAMETERS = 8
_MAX_QUERY = 2048
_NUMBER = re.compile(r"\d{1,9}", re.ASCII)
_LINK = re.compile(r"<([^<>]{1,4096})>((?:\s*;\s*[\w*-]+(?:\s*=\s*(?:\"[^\"]*\"|[^\s;,\"]*))?)*)", re.ASCII)
_DESCRIPTOR = ("mediaType", "digest", "size", "urls", "annotations", "data", "artifactType", "platform")
_MEDIA_TYPE = re.compile(r"[!-~]{1,255}", re.ASCII)
_REL_NEXT = re.compile(r";\s*rel\s*=\s*(?:\"(?:[^\"]*\s)?next(?:\s[^\"]*)?\"|next(?=\s*(?:;|$)))", re.ASCII | re.IGNORECASE)


class ListInvalid(Exception):
    """The bytes are not the list that they should be; the text says why."""


@dataclass(frozen=True, slots=True)
class ListQuery:
    """What a client asks of a list: ``n`` and ``last``, and whatever cursor its upstream gave it before."""

    parameters: tuple[tuple[str, str], ...] = ()

    @property
    def n(self) -> int | None:
        """The most entries that are wanted."""
        return next((int(value) for name, value in self.parameters if name == "n"), None)

    @property
    def last(self) -> str | None:
        """The entry after which to begin."""
        return next((value for name, value in self.parameters if name == "last"), None)

    def limited(self, n: int) -> ListQuery:
        """The same with another ``n``."""
        return ListQuery((("n", str(n)), *(pair for pair in self.parameters if pair[0] != "n")))

    def encoded(self) -> str:
        """As it stands in a URL."""
        return urlencode(self.parameters, quote_via=quote, safe="", errors="surrogateescape")


def parse_query(text: str) -> ListQuery:
    """The query of a list, as it stands in a URL, but for ``ns``; raises ``PaginationNumberInvalid`` or ``RequestInvalid``.

    Bytes that are no text are kept: a cursor is for its upstream to understand.
    """
    try:
        pairs = parse_qsl(text, keep_blank_values=True, errors="surrogateescape", max_num_fields=_MAX_PARAMETERS + 1)
    except ValueError as error:
        raise RequestInvalid("the query is longer than that of any list") from error
    parameters = tuple(pair for pair in pairs if pair[0] != "ns")
    numbers = [value for name, value in parameters if name == "n"]
    if len(numbers) > 1 or not all(_NUMBER.fullmatch(value) for value in numbers):
        raise PaginationNumberInvalid("n is not valid: expected one number of at least 0")
    if len(parameters) > _MAX_PARAMETERS or len(text) > _MAX_QUERY:
        raise RequestInvalid("the query is longer than that of any list")
    return ListQuery(parameters)


def next_page(link: Sequence[str]) -> ListQuery | None:
    """The query of the next page, if a ``Link`` header (RFC 8288) names one; raises ``ListInvalid``.

    Only its query counts: where to ask is ours to say, whatever host and path the header names.
    """
    for target, parameters in (match for line in link for match in _LINK.findall(line)):
        if not _REL_NEXT.search(parameters):
            continue
        try:
            parsed = parse_query(urlsplit(target).query)
        except (ValueError, PaginationNumberInvalid, RequestInvalid) as error:
            raise ListInvalid("its link to the next page cannot be understood") from error
        if not parsed.parameters:
            raise ListInvalid("its link to the next page does not say which")
        return parsed
    return None


def parse_tags(body: bytes) -> list[Tag]:
    """The tags in a page; raises ``ListInvalid``. What is no legal tag could not be asked for, and is left out."""
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > _MAX_ELEMENTS:
        raise ListInvalid("it has too many elements")
    try:
        document = json.loads(body)
        tags = document["tags"] if isinstance(document, dict) else 0
    except (ValueError, RecursionError, KeyError) as error:
        raise ListInvalid("it is not a list of tags") from error
    if tags is None:  # Go writes null for an empty list
        return []
    if not isinstance(tags, list):
        raise ListInvalid("it is not a list of tags")
    if not all(isinstance(tag, str) for tag in tags):
        raise ListInvalid("it names tags that are no text")
    return [Tag(tag) for tag in dict.fromkeys(tags) if is_tag(tag)]


def page_of(tags: list[Tag], query: ListQuery, following: ListQuery | None) -> tuple[list[Tag], ListQuery | None]:
    """The page that ``query`` means, and the query of the next one, out of what the upstream answered to it.

    Registries that do not page (docker-registry 2.8) answer with everything each time, in no order: the page is then cut
    out here. Those that page in an order of their own, byte by byte or whatever the case, are left theirs.
    """
    if _is_ignored(query, tags):
        tags = [tag for tag in sorted(tags) if tag > (query.last or "")]
    elif following is None and tags not in (sorted(tags), sorted(tags, key=str.lower)):
        tags = sorted(tags)
    if query.n == 0:
        return [], None
    if query.n is not None and len(tags) > query.n:
        tags = tags[: query.n]
        return tags, ListQuery((("n", str(query.n)), ("last", tags[-1])))
    return tags, following if following != query else None


def _is_ignored(query: ListQuery, tags: list[Tag]) -> bool:
    """Whether the upstream pays no heed to ``last``: it lists that very tag, or more than ``n`` and some that come after it
    in no order, byte by byte or whatever the case. A ``last`` that is no tag is a cursor, as of Amazon ECR."""
    last = query.last or ""
    if not is_tag(last) or last in tags:
        return last in tags
    is_longer = query.n is not None and len(tags) > query.n
    return is_longer and any(tag < last and tag.lower() < last.lower() for tag in tags)


def tags_document(name: str, tags: list[Tag]) -> bytes:
    """A page of tags, of the repository as the client names it."""
    return json.dumps({"name": name, "tags": tags}).encode()


def parse_referrers(body: bytes, content_type: str) -> list[dict[str, Any]]:
    """The descriptors in a list of referrers; raises ``ListInvalid``."""
    try:
        manifest = parse_manifest(body, content_type)
    except ManifestInvalid as error:
        raise ListInvalid(str(error)) from error
    if manifest.media_type != OCI_INDEX:
        raise ListInvalid(f"it is {manifest.media_type}, not an OCI index")
    try:
        listed = json.loads(body).get("manifests") or []
    except RecursionError as error:
        raise ListInvalid("it is nested too deep") from error
    descriptors = [{key: item[key] for key in _DESCRIPTOR if item.get(key) is not None} for item in listed]
    for item in descriptors:
        notes = item.get("annotations", {})
        kinds = [item.get("mediaType"), *([kind] if (kind := item.get("artifactType")) else [])]
        if not all(isinstance(kind, str) and _MEDIA_TYPE.fullmatch(kind) for kind in kinds):
            raise ListInvalid("it has a descriptor whose type is no media type")
        if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
            raise ListInvalid("it has a descriptor whose annotations are no text")
        if not all(_is_flat(value) for value in item.values()):
            raise ListInvalid("it has a descriptor with what no descriptor has")
    return descriptors


def _is_flat(value: Any) -> bool:
    """Whether this is text or a number, or a list of texts, or a map of these: what the properties of a descriptor are."""
    if isinstance(value, dict):
        return all(isinstance(item, str) or (isinstance(item, list) and _is_flat(item)) for item in value.values())
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str | int)


def referrers_document(descriptors: list[dict[str, Any]]) -> bytes:
    """An OCI index of descriptors, each digest once."""
    unique = {descriptor["digest"]: descriptor for descriptor in descriptors}
    return json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(unique.values())}).encode()


def of_type(document: bytes, artifact_type: str) -> bytes:
    """One of our own lists of referrers, with only those of that ``artifactType``."""
    listed = json.loads(document)["manifests"]
    return referrers_document([item for item in listed if item.get("artifactType") == artifact_type])


def referrers_tag(subject: Digest) -> Tag:
    """The tag under which registries without the referrers API have the list ("Referrers Tag Schema")."""
    return Tag(f"{subject.algorithm[:32]}-{subject.hex[:64]}")
