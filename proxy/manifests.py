"""What pullcache must know of a manifest: its media type, and what it names. The bytes themselves stay as they came.

OCI image spec 1.1 (``manifest.md``, ``image-index.md``) and Docker image manifest version 2, schema 2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from proxy.errors import DigestInvalid
from proxy.names import Digest, parse_digest
from proxy.unique import KeyTwice, unique

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"

MODERN = (OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST)
"""The manifest types of today, asked of every upstream by a client that takes them all."""

INDEXES = frozenset({OCI_INDEX, DOCKER_LIST})
GENERIC = frozenset({"", "application/json", "text/plain", "application/octet-stream"})
"""Content types that say nothing: the body's own ``mediaType`` holds."""

MAX_BYTES = 8 * 1024 * 1024
"""Larger manifests are refused; containerd takes 4,393,216 bytes, the OCI spec asks for at least 4 MiB."""

_KEYS = {key.lower(): key for key in ("schemaVersion", "mediaType", "manifests", "config", "layers", "fsLayers")}

_MAX_ELEMENTS = 250_000
"""Commas and brackets: bounds the time that parsing holds the interpreter."""


class ManifestInvalid(Exception):
    """The bytes are not a manifest that can be trusted; the text says why."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A digest with the size that the manifest states for it."""

    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A checked manifest or index."""

    media_type: str
    children: tuple[Descriptor, ...]


def parse_manifest(body: bytes, content_type: str) -> Manifest:
    """The manifest in ``body``, sent as ``content_type``; raises ``ManifestInvalid``.

    A document that could be read in two ways (CVE-2021-41190: an index and an image at once, a key twice, two types) is
    refused.
    """
    document = _parse_json(body)
    if any(key.lower() in _KEYS and key not in _KEYS.values() for key in document):
        raise ManifestInvalid("a key in it is written in another case, which some clients read as the real one")
    if document.get("schemaVersion") != 2:
        raise ManifestInvalid("its schemaVersion is not 2 (schema 1 images are not supported; rebuild and push the image)")
    is_index = "manifests" in document
    if is_index and ("layers" in document or "config" in document or "fsLayers" in document):
        raise ManifestInvalid("it is an index and an image at once")
    if not is_index and "config" not in document:
        raise ManifestInvalid("it has neither 'manifests' nor 'config'")
    media_type = _media_type(document, content_type, is_index)
    listed = _list(document, "manifests") if is_index else [document["config"], *_list(document, "layers")]
    return Manifest(media_type, tuple(_descriptor(item) for item in listed))


def is_same_for(media_type: str, asked: str, wanted: str) -> bool:
    """Whether a manifest of that type, at which a tag points for clients of one class of ``Accept``, ``asked``, is what
    those of another, ``wanted``, are given. A class names types with commas between; the empty one takes all of today.

    They must take it, and it must be the whole: registries give the image of one platform, out of an index, to who takes no
    index (distribution ``registry/handlers/manifests.go``), and that is not what others should get.
    """
    was_offered, takes = (frozenset(key.split(",") if key else MODERN) for key in (asked, wanted))
    return media_type in takes and (media_type in INDEXES or takes & INDEXES <= was_offered)


def _parse_json(body: bytes) -> dict[str, Any]:
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > _MAX_ELEMENTS:
        raise ManifestInvalid("it has too many elements")
    try:
        document = json.loads(body.decode("utf-8"), object_pairs_hook=unique)
    except KeyTwice:
        raise ManifestInvalid("a key stands in it twice") from None
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(f"it is not JSON: {type(error).__name__}") from error
    if not isinstance(document, dict):
        raise ManifestInvalid("it is not a JSON object")
    return document


def _media_type(document: dict[str, Any], content_type: str, is_index: bool) -> str:
    sent = content_type.partition(";")[0].strip().lower()
    inner = document.get("mediaType")
    if inner is not None and not (isinstance(inner, str) and inner.isascii() and inner.isprintable() and len(inner) < 256):
        raise ManifestInvalid("its mediaType is not a media type")
    if inner and sent not in GENERIC and sent != inner.lower():
        raise ManifestInvalid(f"it was sent as {sent} and calls itself {inner}")
    media_type = inner or (sent if sent not in GENERIC else OCI_INDEX if is_index else OCI_MANIFEST)
    if media_type not in MODERN:
        raise ManifestInvalid("its media type is not one of a manifest or an index")
    if (media_type in INDEXES) != is_index:
        raise ManifestInvalid(f"its content is not what its type {media_type} says")
    return media_type


def _list(document: dict[str, Any], key: str) -> list[Any]:
    value = document.get(key)
    if value is None:  # Go writes null for an empty list
        return []
    if not isinstance(value, list):
        raise ManifestInvalid(f"its '{key}' is not a list")
    return value


def _descriptor(item: object) -> Descriptor:
    if not isinstance(item, dict):
        raise ManifestInvalid("it has a descriptor that is not an object")
    digest, size = item.get("digest"), item.get("size")
    if not isinstance(digest, str) or not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**63:
        raise ManifestInvalid("it has a descriptor without digest or size")
    try:
        return Descriptor(parse_digest(digest), size)
    except DigestInvalid as error:
        raise ManifestInvalid("it names a digest that is not valid") from error
