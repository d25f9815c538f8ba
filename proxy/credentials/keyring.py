"""Which credentials are for an image, and in which order: as the kubelet decides (``pkg/credentialprovider/keyring.go``).

A key is a host with an optional port and path. What is surprising here comes from the Go library through which the kubelet
sees keys and images: ``url.Parse``, ``net.SplitHostPort`` and ``filepath.Match``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from urllib.parse import unquote

from proxy.credentials.docker_config import Entry
from proxy.names import DOCKER_HUB

_HUB_KEY = "index.docker.io"

_URL = re.compile(r"(?:[^/?#]*@)?([^/?#]*)((?:/[^?#]*)?)")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_CHARACTER = r"[^ %\\^`{|}]"
_HOST = re.compile(rf"(?!\[)(?:{_CHARACTER}*:[0-9]*|(?:(?!:){_CHARACTER})*)|\[{_CHARACTER}*\](?::[0-9]*)?")
_HOST_AND_PORT = re.compile(r"(?:\[([^\[\]]*)\]|([^:\[\]]*)):([0-9]*)")
_LABEL_PART = re.compile(r"(\*)|\[((?:[^\]-](?:-[^\]-])?)+)\]|([^\[*])")
_CLASS_ITEM = re.compile(r"([^-])(?:-(.))?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Key:
    labels: tuple[re.Pattern[str], ...]
    port: str
    path: str

    def is_for_host(self, host: str) -> bool:
        labels, port = _split_host(host)
        return (
            port == self.port
            and len(labels) == len(self.labels)
            and all(pattern.fullmatch(label) for pattern, label in zip(self.labels, labels, strict=True))
        )

    def is_for(self, host: str, path: str) -> bool:
        return path.startswith(self.path) and self.is_for_host(host)


def matches(pattern: str, image: str) -> bool:
    """Whether a key of a pull secret, or one of a plugin's ``matchImages``, is for an image (``host[:port]/path``).

    The scheme of a key is dropped, and ``/v1/`` or ``/v2/`` at the beginning of its path. The port must be the same text,
    and the host have as many labels, each matching with ``*`` and ``[...]``; the path is a prefix of the image's as text,
    not by its components. Case counts. A pattern that cannot be read is for no image.
    """
    key, target = _key(_reduce(pattern)), _parse(image)
    return key is not None and target is not None and key.is_for(*target)


class Keyring:
    """Entries by their keys. Two keyrings are equal when they hold equal entries in the same order."""

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        """``entries`` in the order of their sources: those of one key are tried in it."""
        self.entries = tuple(entries)
        by_key: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if (reduced := _reduce(entry.registry)) is not None:
                by_key.setdefault(reduced, []).append(entry)
        self._hub = by_key.get(_HUB_KEY, [])
        self._index = [
            (key, by_key[reduced]) for reduced in sorted(by_key, reverse=True) if (key := _key(reduced)) is not None
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyring) and self.entries == other.entries

    __hash__ = None  # type: ignore[assignment]

    def matching(self, image: str) -> list[Entry]:
        """The entries for an image, named in full (``docker.io/library/debian``), in the order to try them.

        Longer paths go before shorter ones and names before patterns: reverse lexical order of the keys. Only if there is
        none are those of ``index.docker.io`` used for Docker Hub. An entry that is kept for other repositories is as if
        absent: it neither matches nor hides those.
        """
        if (target := _parse(image)) is None:
            return []
        found = [entry for key, entries in self._index if key.is_for(*target) for entry in entries if _may_use(entry, image)]
        if not found and _is_hub(target[0]):
            found = [entry for entry in self._hub if _may_use(entry, image)]
        return found

    def concerns(self, registry: str) -> bool:
        """Whether an entry could be for some image of a registry (``host[:port]``), whatever its path and repositories."""
        if (target := _parse(registry)) is None:
            return False
        host = target[0]
        return any(key.is_for_host(host) for key, _ in self._index) or (_is_hub(host) and bool(self._hub))


def _is_hub(host: str) -> bool:
    """The kubelet takes ``localhost`` and other bare names for Docker Hub too: its names may be short, these are not."""
    return host in (DOCKER_HUB, _HUB_KEY)


def _may_use(entry: Entry, image: str) -> bool:
    host, _, path = image.partition("/")
    if host == DOCKER_HUB and "/" not in path:
        image = f"{host}/library/{path}"
    return not entry.repositories or any(fnmatchcase(image, glob) for glob in entry.repositories)


def _reduce(key: str) -> str | None:
    """A key without what does not count; None if it cannot be read."""
    parsed = _parse(key.removeprefix("https://") if key.startswith("https://") else key.removeprefix("http://"))
    if parsed is None:
        return None
    host, path = parsed
    if path.startswith(("/v1/", "/v2/")):
        path = path[3:]
    return host if path == "/" else host + path


def _parse(text: str) -> tuple[str, str] | None:
    """Host with port, and path, as ``url.Parse`` finds them; what follows ``?`` or ``#`` is neither, a user is dropped."""
    url = _URL.match(text)
    if url is None or _CONTROL.search(text) or not _HOST.fullmatch(url[1]):
        return None
    return url[1], unquote(url[2])


def _key(reduced: str | None) -> _Key | None:
    parsed = None if reduced is None else _parse(reduced)
    if parsed is None:
        return None
    host, path = parsed
    labels, port = _split_host(host)
    patterns = [pattern for label in labels if (pattern := _label(label)) is not None]
    return _Key(tuple(patterns), port, path) if len(patterns) == len(labels) else None


def _split_host(host: str) -> tuple[list[str], str]:
    """Labels and port, as ``net.SplitHostPort`` finds it: with brackets in a host that are not around it, there is none."""
    if found := _HOST_AND_PORT.fullmatch(host):
        return (found[1] or found[2] or "").split("."), found[3]
    return host.split("."), ""


def _label(glob: str) -> re.Pattern[str] | None:
    """One label of a host as ``filepath.Match`` reads it; None where that says ``ErrBadPattern``."""
    chunks, position = [""], 0
    while position < len(glob):
        part = _LABEL_PART.match(glob, position)
        if part is None:
            return None
        star, items, character = part.groups()
        position = part.end()
        if star:
            chunks.append("")
        else:
            chunks[-1] += _class(items) if items else re.escape(character)
    first, *rest = chunks
    if rest:
        # each middle part is taken where it first fits, which is never worse; trying others would take time without end
        first += "".join(f"(?>.*?{chunk})" for chunk in rest[:-1]) + f".*{rest[-1]}"
    return re.compile(first, re.DOTALL)


def _class(items: str) -> str:
    ranges = [(low, high or low) for low, high in _CLASS_ITEM.findall(items)]
    body = "".join(f"{re.escape(low)}-{re.escape(high)}" for low, high in ranges if low <= high)
    return f"[{body}]" if body else "(?!)"
