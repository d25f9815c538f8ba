"""Names of images and of their parts: the grammars, parsed once into values that the rest relies on.

Anchored, ASCII only, without backtracking traps. The rules are those of the Go library ``distribution/reference``
(``regexp.go``, ``normalize.go``), which containerd, Docker and the kubelet use, and of the OCI distribution spec.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import NewType

from proxy.errors import DigestInvalid, ManifestUnknown, NameInvalid

Repository = NewType("Repository", str)
"""A repository path within its registry, such as ``library/debian``; matches the grammar."""

Tag = NewType("Tag", str)
"""A tag; matches the grammar."""

DOCKER_HUB = "docker.io"
DOCKER_HUB_ALIASES = frozenset({"index.docker.io", "registry-1.docker.io"})
"""Other names that images and mirror configurations use for Docker Hub."""

DEFAULT_TAG = Tag("latest")
REPOSITORY_MAX = 255

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*", re.ASCII)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", re.ASCII)
_LABEL = r"(?:[A-Za-z0-9]|[A-Za-z0-9][A-Za-z0-9-]{0,61}[A-Za-z0-9])"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{{1,5}})?", re.ASCII)
_IMAGE_ID = re.compile(r"[a-f0-9]{64}", re.ASCII)
_HEX = {"sha256": re.compile(r"[0-9a-f]{64}", re.ASCII), "sha512": re.compile(r"[0-9a-f]{128}", re.ASCII)}


@dataclass(frozen=True, slots=True, order=True)
class Digest:
    """The address of content: ``algorithm:hex``. sha256 and sha512 are known, as in the OCI image spec."""

    algorithm: str
    hex: str

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.hex}"

    def matches(self, content: bytes) -> bool:
        """Whether ``content`` is what this digest names."""
        return hashlib.new(self.algorithm, content).hexdigest() == self.hex

    def hasher(self) -> hashlib._Hash:
        """A fresh hash of this digest's algorithm."""
        return hashlib.new(self.algorithm)


def digest_of(content: bytes) -> Digest:
    """The sha256 digest of ``content``."""
    return Digest("sha256", hashlib.sha256(content).hexdigest())


Reference = Tag | Digest


def parse_digest(text: str) -> Digest:
    """The digest that ``text`` is; raises ``DigestInvalid``."""
    algorithm, _, digits = text.partition(":")
    pattern = _HEX.get(algorithm)
    if pattern is None or not pattern.fullmatch(digits):
        raise DigestInvalid(
            "the digest is not valid: expected sha256:<64 hex digits> or sha512:<128 hex digits>, lower case"
        )
    return Digest(algorithm, digits)


def parse_repository(text: str) -> Repository:
    """The repository that ``text`` names; raises ``NameInvalid``."""
    if len(text) > REPOSITORY_MAX:
        raise NameInvalid(f"the repository name is longer than {REPOSITORY_MAX} characters")
    if not _REPOSITORY.fullmatch(text):
        if _REPOSITORY.fullmatch(text.lower()):
            raise NameInvalid("the repository name must be lowercase")
        raise NameInvalid(
            "the repository name is not valid: components of a-z and 0-9, joined by '.', '_', '__' or '-', separated by '/'"
        )
    return Repository(text)


def path_form(host: str) -> str:
    """A registry host as a component of a path, in which ``:`` is not allowed."""
    return host.replace(":", "_")


def is_tag(text: str) -> bool:
    """Whether ``text`` is a tag."""
    return bool(_TAG.fullmatch(text))


def parse_tag(text: str) -> Tag:
    """The tag that ``text`` is; raises ``ManifestUnknown``, since the OCI conformance suite wants 404."""
    if not is_tag(text):
        raise ManifestUnknown("no such manifest: the tag is not valid (at most 128 of A-Z a-z 0-9 _ . -)")
    return Tag(text)


def parse_reference(text: str) -> Reference:
    """A tag, or, when there is a ``:`` in it, a digest."""
    return parse_digest(text) if ":" in text else parse_tag(text)


def is_host(text: str) -> bool:
    """Whether ``text`` is a host with an optional port."""
    return bool(_HOST.fullmatch(text))


def is_host_like(component: str) -> bool:
    """Whether the first component of a name is a registry, not a part of a Docker Hub path."""
    return component == "localhost" or "." in component or ":" in component or component != component.lower()


def canonical_host(host: str) -> str:
    """The one name of a registry that has several: Docker Hub's aliases become ``docker.io``."""
    return DOCKER_HUB if host in DOCKER_HUB_ALIASES else host


def qualify(host: str, repository: Repository) -> Repository:
    """On Docker Hub a name without ``/`` is an official image and lives under ``library/``."""
    return parse_repository(f"library/{repository}") if host == DOCKER_HUB and "/" not in repository else repository


@dataclass(frozen=True, slots=True)
class ImageName:
    """An image name in full. ``tag`` is None only where a digest stands without a tag."""

    host: str
    repository: Repository
    tag: Tag | None
    digest: Digest | None

    @property
    def reference(self) -> Reference:
        """What a runtime asks for: the digest if there is one, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.host}/{self.repository}{tag}{digest}"


def parse_image_name(text: str) -> ImageName:
    """The image that a user means by ``text``, defaults filled in; raises ``RegistryError`` of what is wrong."""
    if _IMAGE_ID.fullmatch(text):
        raise NameInvalid("64 hex digits are an image ID, not an image name")
    rest, _, digest_text = text.partition("@")
    digest = parse_digest(digest_text) if "@" in text else None
    first, slash, path = rest.partition("/")
    if not slash or not (is_host_like(first)):
        host, path = DOCKER_HUB, rest
    else:
        host = canonical_host(first)
        if not is_host(host):
            raise NameInvalid("the registry in the image name is not a valid host")
    name, colon, tag_text = path.partition(":")
    if colon and not _TAG.fullmatch(tag_text):
        raise NameInvalid("the tag in the image name is not valid")
    tag = Tag(tag_text) if colon else None if digest else DEFAULT_TAG
    return ImageName(host, qualify(host, parse_repository(name)), tag, digest)
