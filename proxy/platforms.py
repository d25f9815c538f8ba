"""Platforms, and which manifests of an index are for one: as containerd chooses (``containerd/platforms``)."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from proxy.errors import ManifestUnknown
from proxy.logs import printable
from proxy.manifests import Manifest
from proxy.names import Digest

_PART = re.compile(r"[a-z0-9_.]{1,32}", re.ASCII)
_ARCHITECTURES = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386", "i686": "386", "armhf": "arm"}
_DEFAULT_VARIANTS = {"amd64": 1, "arm": 7, "arm64": 8}
_MACHINES = {"armv6l": "arm/v6", "armv7l": "arm/v7", "armv8l": "arm/v7"}


@dataclass(frozen=True, slots=True)
class Platform:
    """What an image is for. Every platform, where ``os`` is ``all``."""

    os: str
    architecture: str = ""
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    @property
    def rank(self) -> int | None:
        """How much of its architecture a variant wants; None where variants have no order."""
        if not self.variant:
            return _DEFAULT_VARIANTS.get(self.architecture, 0)
        number = self.variant.removeprefix("v")
        is_ordered = self.architecture in _DEFAULT_VARIANTS and number.isascii() and number.isdigit() and len(number) < 4
        return int(number) if is_ordered else None

    def runs(self, other: Platform) -> bool:
        """Whether what is for ``other`` runs on this: the same, or a variant that wants no more."""
        if (self.os, self.architecture) != (other.os, other.architecture):
            return False
        if self.rank is None or other.rank is None:
            return self.variant == other.variant
        return other.rank <= self.rank


ALL = Platform("all")


def parse_platform(text: str) -> Platform:
    """``os/architecture`` with an optional ``/variant``, or ``all``; raises ``ValueError``."""
    parts = text.lower().split("/")
    if text == "all":
        return ALL
    if not 2 <= len(parts) <= 3 or not all(_PART.fullmatch(part) for part in parts):
        raise ValueError("not a platform; write for example linux/amd64, linux/arm/v7 or all")
    os, architecture, *variant = parts
    return Platform(os, _ARCHITECTURES.get(architecture, architecture), *variant)


def platform_of(machine: str) -> Platform:
    """The platform of the containers on a machine, by what ``uname -m`` says of it."""
    return parse_platform(f"linux/{_MACHINES.get(machine, machine)}")


def select(manifest: Manifest, body: bytes, wanted: Platform) -> tuple[Digest, ...]:
    """The manifests in an index that are for a platform: the one of the best variant, or all; raises ``ManifestUnknown``."""
    if wanted == ALL:
        return tuple(dict.fromkeys(child.digest for child in manifest.children))
    listed = platforms(manifest, body)
    fitting = [(platform.rank or 0, digest) for platform, digest in listed if platform and wanted.runs(platform)]
    if not fitting:
        known = ", ".join(dict.fromkeys(printable(str(platform), 64) for platform, _ in listed if platform)) or "none"
        raise ManifestUnknown(f"there is no manifest for {wanted} in it; the platforms in it: {printable(known, 512)}")
    return (max(fitting, key=lambda each: each[0])[1],)


def platforms(manifest: Manifest, body: bytes) -> list[tuple[Platform | None, Digest]]:
    """The manifests in an index, and what each is for; None where it does not say."""
    return [(_platform(item), child.digest) for item, child in zip(_items(body), manifest.children, strict=True)]


def _items(body: bytes) -> list[Any]:
    found: list[Any] = json.loads(body)["manifests"]  # which has been checked
    return found


def _platform(item: dict[str, Any]) -> Platform | None:
    said = item.get("platform")
    if not isinstance(said, dict):
        return None
    values = (said.get(key) or "" for key in ("os", "architecture", "variant"))
    return Platform(*(value if isinstance(value, str) else "" for value in values))
