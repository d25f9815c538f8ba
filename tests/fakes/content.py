"""What a registry holds, and what a correct registry answers about it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .answers import as_json, oci_error, status
from .lists import Lists, referrer, referrers_tag
from .messages import Answer, Request

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
OCTETS = "application/octet-stream"

ARCHITECTURES = ("amd64", "arm64", "arm", "ppc64le", "s390x", "riscv64")

_ROUTE = re.compile(r"/v2/(?P<repo>.+)/(?P<kind>blobs|manifests|referrers|tags)/(?P<reference>[^/]+)")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def digest_of(data: bytes, alg: str = "sha256") -> str:
    """The digest of some bytes, as registries write it."""
    return f"{alg}:{hashlib.new(alg, data).hexdigest()}"


@dataclass(frozen=True)
class Manifest:
    """A manifest as stored: exact bytes and what they are."""

    media_type: str
    data: bytes
    digest: str

    def descriptor(self, **more: Any) -> dict[str, Any]:
        """How an index refers to it."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": len(self.data), **more}


@dataclass(frozen=True)
class Image(Manifest):
    """An image as stored, with all its parts."""

    config: bytes
    config_digest: str
    layers: tuple[bytes, ...]
    layer_digests: tuple[str, ...]


@dataclass
class Repository:
    """The content of one repository."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    manifests: dict[str, Manifest] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)


class Content:
    """Repositories with their content, and the truth about them in HTTP; ``lists`` says how it lists."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lists = Lists()

    def repository(self, repo: str) -> Repository:
        """The repository of this name, made if need be."""
        return self.repositories.setdefault(repo, Repository())

    def add_blob(self, repo: str, data: bytes, alg: str = "sha256") -> str:
        """Store a blob; its digest."""
        digest = digest_of(data, alg)
        self.repository(repo).blobs[digest] = data
        return digest

    def add_manifest(self, repo: str, data: bytes, media_type: str, tag: str | None = None, alg: str = "sha256") -> str:
        """Store a manifest, and let a tag point at it; its digest."""
        manifest = Manifest(media_type, data, digest_of(data, alg))
        self._store(repo, manifest, tag)
        return manifest.digest

    def add_image(
        self,
        repo: str,
        tag: str | None,
        layers: Sequence[bytes],
        *,
        architecture: str = "amd64",
        media_type: str = OCI_MANIFEST,
        urls: Sequence[str] = (),
        subject: Manifest | None = None,
    ) -> Image:
        """Store an image with its config and layers; `urls` are named in every layer's descriptor."""
        layer_digests = tuple(self.add_blob(repo, layer) for layer in layers)
        rootfs = {"type": "layers", "diff_ids": layer_digests}
        config = json.dumps({"architecture": architecture, "os": "linux", "rootfs": rootfs}).encode()
        config_digest = self.add_blob(repo, config)
        elsewhere = {"urls": list(urls)} if urls else {}
        document: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": {"mediaType": OCI_CONFIG, "digest": config_digest, "size": len(config)},
            "layers": [
                {"mediaType": OCI_LAYER, "digest": digest, "size": len(layer), **elsewhere}
                for digest, layer in zip(layer_digests, layers, strict=True)
            ],
        }
        if subject is not None:
            document["subject"] = subject.descriptor()
        data = json.dumps(document).encode()
        image = Image(media_type, data, digest_of(data), config, config_digest, tuple(layers), layer_digests)
        self._store(repo, image, tag)
        return image

    def add_index(self, repo: str, tag: str | None, manifests: Sequence[Manifest], media_type: str = OCI_INDEX) -> Manifest:
        """Store an index over manifests, one architecture each."""
        entries = [
            manifest.descriptor(platform={"os": "linux", "architecture": architecture})
            for manifest, architecture in zip(manifests, ARCHITECTURES, strict=False)
        ]
        data = json.dumps({"schemaVersion": 2, "mediaType": media_type, "manifests": entries}).encode()
        index = Manifest(media_type, data, digest_of(data))
        self._store(repo, index, tag)
        return index

    def add_artifact(
        self,
        repo: str,
        subject: Manifest,
        artifact_type: str | None = None,
        *,
        tag: str | None = None,
        config_type: str = OCI_EMPTY,
        data: bytes = b"{}",
        annotations: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Store an artifact that refers to a manifest, which need not be there: a signature, for example."""
        config, layer = self.add_blob(repo, b"{}"), self.add_blob(repo, data)
        document: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": config_type, "digest": config, "size": 2},
            "layers": [{"mediaType": artifact_type or OCTETS, "digest": layer, "size": len(data)}],
            "subject": subject.descriptor(),
        }
        document |= {"artifactType": artifact_type} if artifact_type else {}
        document |= {"annotations": dict(annotations)} if annotations else {}
        body = json.dumps(document).encode()
        artifact = Manifest(OCI_MANIFEST, body, digest_of(body))
        self._store(repo, artifact, tag)
        return artifact

    def referrers(self, repo: str, digest: str) -> list[dict[str, Any]]:
        """The descriptors of what refers to a digest, in the order in which it came."""
        entries = []
        for manifest in self.repository(repo).manifests.values():
            document = json.loads(manifest.data) if b'"subject"' in manifest.data else {}
            if (document.get("subject") or {}).get("digest") == digest:
                entries.append(referrer(document, manifest.descriptor()))
        return entries

    def push_referrers_tag(self, repo: str, digest: str) -> Manifest:
        """Do what clients do where there is no API for referrers: let the tag of the subject hold their index."""
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": self.referrers(repo, digest)}
        data = json.dumps(document).encode()
        index = Manifest(OCI_INDEX, data, digest_of(data))
        self._store(repo, index, referrers_tag(digest))
        return index

    def move_tag(self, repo: str, tag: str, digest: str) -> None:
        """Let a tag point at another manifest from now on."""
        assert digest in self.repository(repo).manifests, "a tag points at a manifest that is there"
        self.repository(repo).tags[tag] = digest

    def remove(self, repo: str, reference: str | None = None) -> None:
        """Forget a tag, a manifest with its tags, a blob, or the whole repository."""
        if reference is None:
            del self.repositories[repo]
            return
        held = self.repositories[repo]
        found = [shelf.pop(reference, None) for shelf in (held.tags, held.manifests, held.blobs)]
        if not any(item is not None for item in found):
            raise KeyError(reference)
        held.tags = {tag: digest for tag, digest in held.tags.items() if digest != reference}

    def _store(self, repo: str, manifest: Manifest, tag: str | None) -> None:
        held = self.repository(repo)
        held.manifests[manifest.digest] = manifest
        if tag is not None:
            held.tags[tag] = manifest.digest

    # --- the truth ---

    def truth(self, request: Request) -> Answer:
        """What a correct registry answers."""
        if request.path.rstrip("/") == "/v2":
            return as_json({})
        route = _ROUTE.fullmatch(request.path)
        if route is None:
            return oci_error(404, "NAME_INVALID")
        if request.method not in ("GET", "HEAD"):
            return oci_error(405, "UNSUPPORTED")
        held = self.repositories.get(route["repo"])
        if held is None:
            return oci_error(404, "NAME_UNKNOWN", "repository name not known to registry")
        match route["kind"]:
            case "blobs":
                return _blob(held, route["reference"], request)
            case "manifests":
                return _manifest(held, route["reference"])
            case "tags":
                return self.lists.tags(route["repo"], held.tags, request)
            case _:
                digest = route["reference"]
                entries = self.referrers(route["repo"], digest)
                return self.lists.referrers(route["repo"], digest, entries, request, OCI_INDEX)


def repo_of(path: str) -> str | None:
    """The repository that a path is about."""
    route = _ROUTE.fullmatch(path)
    return route["repo"] if route else None


def _manifest(held: Repository, reference: str) -> Answer:
    manifest = held.manifests.get(held.tags.get(reference, reference))
    if manifest is None:
        return oci_error(404, "MANIFEST_UNKNOWN", "manifest unknown")
    headers = {"Docker-Content-Digest": manifest.digest, "ETag": f'"{manifest.digest}"'}
    return status(200, manifest.data, manifest.media_type, headers)


def _blob(held: Repository, digest: str, request: Request) -> Answer:
    data = held.blobs.get(digest)
    if data is None:
        return oci_error(404, "BLOB_UNKNOWN", "blob unknown to registry")
    etag = f'"{digest}"'
    headers = {"Docker-Content-Digest": digest, "Accept-Ranges": "bytes", "ETag": etag}
    asked = _RANGE.fullmatch(request.headers.get("Range") or "") if request.method == "GET" else None
    if asked is None or asked[0] == "bytes=-" or request.headers.get("If-Range", etag) != etag:
        return status(200, data, OCTETS, headers)
    if asked[1]:
        first = int(asked[1])
        last = min(int(asked[2] or len(data)), len(data) - 1)
    else:
        first = max(len(data) - int(asked[2]), 0)
        last = len(data) - 1
    if asked[1] and asked[2] and int(asked[2]) < first:
        return status(200, data, OCTETS, headers)
    if first > last:
        return oci_error(416, "RANGE_INVALID", headers=[("Content-Range", f"bytes */{len(data)}")])
    headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
    return status(206, data[first : last + 1], OCTETS, headers)
