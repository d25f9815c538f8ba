"""Decisions, each a pure function: which upstream a request means, what to ask it for, what to say of the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from proxy.errors import NameInvalid, NameUnknown, RegistryError, UpstreamFailing
from proxy.manifests import MODERN
from proxy.names import Repository, canonical_host, is_host_like, parse_repository, path_form, qualify

Decision = Literal["hit", "revalidated", "refreshed", "miss", "followed", "stale", "negative", "denied"]
"""What was decided about a request, in one word for clients, access log and figures.

hit: held, nobody asked; revalidated: held, the upstream has just confirmed the tag; refreshed: the tag had moved, and the
new one was got, or told of by HEAD; miss: not held, the upstream was asked; followed: a download that another had begun;
stale: the upstream fails, what is held is served; negative, denied: errors, see ``decision_of``.
"""


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
        if len(namespaces) != 1:
            raise NameUnknown("'ns' is given more than once: it says which registry is meant, and there is one only")
        if upstream not in routes.names:
            raise _not_an_upstream("named in 'ns'")
        path = rest if slash and first in (upstream, path_form(upstream)) else name  # override_path says it twice
    else:
        first = canonical_host(first)
        if slash and first in routes.prefixes:
            upstream, path = routes.prefixes[first], rest
        elif is_host_like(first) or first in routes.prefixes:
            if first in routes.prefixes:
                raise NameInvalid("the name holds a registry but no repository")
            raise _not_an_upstream("in the name")
        elif routes.default is None:
            raise NameUnknown("the name holds no registry, and this cache has no defaultUpstream: write REGISTRY/NAME")
        else:
            upstream, path = routes.default, name
    return Route(upstream, qualify(upstream, parse_repository(path)))


def _not_an_upstream(where: str) -> NameUnknown:
    """Its text does not repeat the registry: no error repeats what a client sent. The access log has it."""
    return NameUnknown(
        f"the registry {where} is not among the upstreams of this cache; have it added to 'upstreams' there, or pull "
        "without the cache"
    )


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
    return f"served from the cache, last confirmed {age_header(age)} s ago: {failure}"


def decision_of(error: RegistryError) -> Decision:
    """What was decided where a request ends in ``error``.

    negative: there is none, or none to be had now, whoever asks: 404, 5xx, and whatever fails upstream, its limit of the
    rate (429) and its no to this cache's own secret (403) among it. denied: not for this client (401, 403, a rule, too many
    wrong credentials), or not a request that this cache answers (any other 4xx).
    """
    is_negative = isinstance(error, UpstreamFailing) or error.status == 404 or error.status >= 500
    return "negative" if is_negative else "denied"


_MOST_SECONDS = 2**31


def age_header(age: float) -> str:
    """``age`` (seconds) as ``Age`` states it: whole, and never negative, though clocks go back (RFC 9111, 5.1 and 1.2.2)."""
    return str(int(min(max(0.0, age), _MOST_SECONDS)))


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
    if wanted & {"*/*", "application/*"} or not modern or modern == MODERN:
        return Accept(", ".join(MODERN), "")
    return Accept(", ".join(modern), ",".join(modern))
