"""Decisions, each a pure function: which upstream a request means, what to ask it for, what to say of what is stale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from proxy.errors import NameInvalid, NameUnknown
from proxy.manifests import MODERN
from proxy.names import Repository, canonical_host, is_host_like, parse_repository, path_form, qualify


@dataclass(frozen=True, slots=True)
class Routes:
    """The closed list of what a request can mean: forms in a path, and names in ``ns``."""

    prefixes: Mapping[str, str]
    names: frozenset[str]
    default: str | None


@dataclass(frozen=True, slots=True)
class Route:
    """The upstream, by name, and the repository there."""

    upstream: str
    repository: Repository


def route(routes: Routes, namespaces: Sequence[str], name: str) -> Route:
    """What a request means by ``name`` and its ``ns`` parameters; raises ``NameUnknown`` or ``NameInvalid``.

    ``ns`` is what containerd sends to a mirror (``docs/hosts.md``): with it the path is taken as it is, but for the
    upstream's own name, which stands before it once more where ``override_path`` is used. Without it a first component
    that is host-like must be a configured upstream; only other names go to the default upstream. What is not configured is
    404, without any contact: an unknown name never falls to the default (image confusion).
    """
    first, slash, rest = name.partition("/")
    if namespaces:
        upstream = canonical_host(namespaces[0])
        if len(namespaces) != 1 or upstream not in routes.names:
            raise NameUnknown("the registry named in 'ns' is not among the upstreams of this cache")
        path = rest if slash and first in (upstream, path_form(upstream)) else name  # override_path says it twice
    else:
        first = canonical_host(first)
        if slash and first in routes.prefixes:
            upstream, path = routes.prefixes[first], rest
        elif is_host_like(first) or first in routes.prefixes:
            if first in routes.prefixes:
                raise NameInvalid("the name holds a registry but no repository")
            raise NameUnknown("the registry in the name is not among the upstreams of this cache")
        elif routes.default is None:
            raise NameUnknown("the name holds no registry, and this cache has no defaultUpstream")
        else:
            upstream, path = routes.default, name
    return Route(upstream, qualify(upstream, parse_repository(path)))


@dataclass(frozen=True, slots=True)
class Staleness:
    """Whether a held tag is served that its upstream does not confirm. ``max_stale``: seconds since it last did, None for
    however long; ``deleted_grace``: seconds from the first time that the upstream says it is gone."""

    if_error: bool
    max_stale: float | None
    deleted_grace: float

    def serves(self, age: float) -> bool:
        """Whether it is served while the upstream fails, confirmed ``age`` seconds ago."""
        return self.if_error and (self.max_stale is None or age <= self.max_stale)


def stale_warning(age: float, failure: str) -> str:
    """What a client is told that is served what was true ``age`` seconds ago."""
    return f"served from the cache, last confirmed {max(0, int(age))} s ago: {failure}"


@dataclass(frozen=True, slots=True)
class Accept:
    """What manifests a client takes. ``sent`` goes upstream; clients of one ``key`` may share an answer."""

    sent: str
    key: str


def classify_accept(lines: Sequence[str]) -> Accept:
    """The class of a client's ``Accept`` lines, all of them (Docker sends several, in random order).

    Who takes anything, or all four modern types, or nothing that is known, is asked the modern types for. Schema 1 is
    never asked for: registries would convert to it, and it is not served.
    """
    wanted = {item.partition(";")[0].strip().lower() for line in lines for item in line.split(",")}
    modern = tuple(kind for kind in MODERN if kind in wanted)
    if "*/*" in wanted or not modern or modern == MODERN:
        return Accept(", ".join(MODERN), "")
    return Accept(", ".join(modern), ",".join(modern))
