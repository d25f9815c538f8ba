"""Where a credential may go, and the tokens of one upstream: from its challenge to what answers it.

All state is in one object a registry: nothing of one upstream can reach another (pulp_container, CVE-2026-103868). A
challenge decides nothing by itself: its realm must be at the upstream's own origin or at a host listed in its
``tokenHosts``, and the scope is ours, this repository and pull only (T01, T02, T09).
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from cachetools import TLRUCache, TTLCache
from yarl import URL

from proxy.credentials.credential import Credential
from proxy.errors import Denied, RegistryError, UpstreamBroken, UpstreamFailing
from proxy.names import Repository
from proxy.once import Once
from proxy.upstream.challenge import Basic, Bearer

_PRINTABLE = re.compile(r"[\x21-\x7e]{1,16384}", re.ASCII)
_KNOWN_SCOPES = frozenset({"aws"})  # public.ecr.aws; it names no repository and no action
_OURS = frozenset({"scope", "service", "account", "offline_token", "client_id"})
_LIFE_DEFAULT = 60.0  # distribution spec/auth/token.md: "defaults to 60 seconds"
_LIFE_MAX = 3600.0
_LIFE_USED = 0.8
_CLIENTS_LIFE = 240.0  # a client's credential is the key to its token, and is not to be in memory for longer
_FAILURE_REMEMBERED = 60.0
_REFUSAL_REMEMBERED = 10.0  # of a credential: its owner may just have been given the right


class RealmRefused(UpstreamBroken):
    """The challenge names a token server that this upstream may not use."""


@dataclass(frozen=True, slots=True)
class _Token:
    value: str
    seconds: float


Key = tuple[str, str, tuple[str, ...], Credential | None]
Ask = Callable[[URL], Awaitable[bytes]]
"""Fetches a token answer; raises ``RegistryError``."""


def same_origin(one: URL, other: URL) -> bool:
    """Whether scheme, host and port are the same, a default port spelt out or not."""
    return (one.scheme, one.raw_host, one.port) == (other.scheme, other.raw_host, other.port)


def may_carry(url: URL, endpoint: URL, token_hosts: Sequence[str] = ()) -> bool:
    """Whether what proves who asks may be sent to ``url``: the endpoint's own origin, or a token host that is listed for
    it; from https never to http.

    The one decision for the request itself, for each hop of its redirects, and for the token server.
    """
    if url.scheme == "http" and endpoint.scheme == "https":
        return False
    return same_origin(url, endpoint) or _authority(url) in token_hosts


def check_realm(realm: str, endpoint: URL, token_hosts: Sequence[str]) -> URL:
    """The token server's address, if this upstream may use it; raises ``RealmRefused``.

    One function for every time a challenge is answered: https unless the endpoint itself is plain, no user information,
    no fragment, and the endpoint's own origin or a listed host.
    """
    try:
        url = URL(realm)
        host = url.raw_host
    except (ValueError, IndexError) as error:  # IndexError: yarl 1.x, of "//[]@"
        raise RealmRefused("the realm of its challenge is not an address") from error
    if len(realm) > 2048 or not realm.isascii() or not host or url.scheme not in ("https", "http"):
        raise RealmRefused("the realm of its challenge is not an http address")
    if url.user is not None or url.password is not None or url.fragment:
        raise RealmRefused("the realm of its challenge holds user information or a fragment")
    if url.scheme == "http" and endpoint.scheme == "https":
        raise RealmRefused(f"the realm of its challenge is at http://{host}, and the registry is on https")
    if not may_carry(url, endpoint, token_hosts):
        raise RealmRefused(
            f"its challenge names the token server {_authority(url)}; if you trust that, list it in tokenHosts"
        )
    return url.without_query_params(*_OURS)


def _authority(url: URL) -> str:
    return f"{url.host_subcomponent}:{url.port}" if url.explicit_port is not None else url.host_subcomponent or ""


class Tokens:
    """The tokens of one upstream, for as long as they live."""

    def __init__(self, timer: Callable[[], float]) -> None:
        self._tokens: TLRUCache[Key, _Token] = TLRUCache(4096, ttu=lambda _, token, now: now + token.seconds, timer=timer)
        self._failures: TLRUCache[Key, RegistryError] = TLRUCache(4096, ttu=_failure_ends, timer=timer)
        self._challenges: TTLCache[tuple[str, Repository], Bearer | Basic] = TTLCache(4096, 24 * 3600, timer=timer)
        self._once: Once[Key, str] = Once(outlives_callers=True)  # it has a bound of its own, and its failure counts

    def expected(self, endpoint: URL, repository: Repository) -> Bearer | Basic | None:
        """The challenge that this repository made before: answering it unasked saves a request."""
        return self._challenges.get((str(endpoint), repository))

    def expect(self, endpoint: URL, repository: Repository, challenge: Bearer | Basic) -> None:
        """Remembers the challenge of a repository."""
        self._challenges[(str(endpoint), repository)] = challenge

    async def get(
        self, realm: URL, bearer: Bearer, repository: Repository, ask: Ask, credential: Credential | None = None
    ) -> str:
        """A token for pulling from ``repository``, given to ``credential`` or to anybody; raises ``RegistryError``.

        A failure is the answer for a minute; the failure of a credential, for ten seconds.
        """
        key = self._key(realm, bearer, repository, credential)
        if failure := self._failures.get(key):
            raise _afresh(failure)
        if token := self._tokens.get(key):
            return token.value

        async def fetch() -> str:
            query = [("service", bearer.service)] if bearer.service else []
            query += [("scope", item) for item in key[2]]
            try:
                token = parse_token(await ask(realm.extend_query(query)))
            except RegistryError as error:
                self._failures[key] = _afresh(error)
                raise
            self._tokens[key] = (
                token
                if credential is None or credential.is_ours
                else replace(token, seconds=min(token.seconds, _CLIENTS_LIFE))
            )
            return token.value

        return await self._once.run(key, fetch)

    def refuse(
        self,
        realm: URL,
        bearer: Bearer,
        repository: Repository,
        failure: RegistryError,
        credential: Credential | None = None,
    ) -> None:
        """The registry did not take a fresh token: that is its answer, for as long as any failure is."""
        self._failures[self._key(realm, bearer, repository, credential)] = _afresh(failure)

    async def close(self) -> None:
        """Stops what is being asked."""
        await self._once.close()

    def _key(self, realm: URL, bearer: Bearer, repository: Repository, credential: Credential | None) -> Key:
        scope = (f"repository:{repository}:pull", *(item for item in bearer.scope if item in _KNOWN_SCOPES))
        return str(realm), bearer.service, scope, credential

    def given_to(self, credential: Credential | None) -> list[str]:
        """The tokens that a credential, or anybody, was given."""
        return [token.value for key, token in list(self._tokens.items()) if key[3] == credential]

    def drop_expired(self) -> None:
        """Forgets what is over, and with it the credentials of clients that it was given to."""
        self._tokens.expire()
        self._failures.expire()

    def renounce(self, repository: Repository, credential: Credential | None) -> None:
        """Forgets the tokens for a repository that a credential, or anybody, was given, and that one was refused."""
        scope = f"repository:{repository}:pull"
        for key in [key for key in list(self._tokens) if key[2][0] == scope and key[3] == credential]:
            self._tokens.pop(key, None)
        for key, failure in list(self._failures.items()):
            if key[2][0] == scope and key[3] == credential and isinstance(failure, Denied):
                self._failures.pop(key, None)

    def forget(self, credential: Credential) -> None:
        """Forgets what was given to a credential, and what was refused it."""
        for memory in (self._tokens, self._failures):
            for key in [key for key in list(memory) if key[-1] == credential]:
                memory.pop(key, None)

    def forget_failures(self) -> None:
        """Forgets where its token server failed, which is back; what was refused stays so."""
        for key, failure in list(self._failures.items()):
            if isinstance(failure, UpstreamFailing):
                self._failures.pop(key, None)

    def drop(self, value: str) -> None:
        """Forgets a token that the registry did not accept."""
        for key, token in list(self._tokens.items()):
            if token.value == value:
                self._tokens.pop(key, None)


def _afresh(failure: RegistryError) -> RegistryError:
    """The same without its traceback, which would grow, and whose frames hold what was shown."""
    return copy.copy(failure)


def _failure_ends(key: Key, _: RegistryError, now: float) -> float:
    return now + (_FAILURE_REMEMBERED if key[-1] is None else _REFUSAL_REMEMBERED)


def parse_token(body: bytes) -> _Token:
    """The token in a token server's answer; raises ``UpstreamBroken``. Its life is clamped to a minute up to an hour."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UpstreamBroken("its token server did not answer with JSON") from error
    value = (document.get("token") or document.get("access_token")) if isinstance(document, dict) else None
    if not isinstance(value, str) or not _PRINTABLE.fullmatch(value):
        raise UpstreamBroken("its token server gave no usable token")
    life = document.get("expires_in")
    if isinstance(life, bool) or not isinstance(life, int | float) or life != life:  # NaN is not itself
        life = _LIFE_DEFAULT
    return _Token(value, min(max(life, _LIFE_DEFAULT), _LIFE_MAX) * _LIFE_USED)
