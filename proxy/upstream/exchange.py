"""Questions to one upstream: challenges, tokens, and the credentials that answer them.

Everything that proves who asks is in one object an upstream, and nothing of one can reach another.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from urllib.parse import urlencode

from cachetools import LRUCache, TTLCache
from yarl import URL

from proxy.config.upstreams import UpstreamConfig
from proxy.credentials.credential import Asker, Credential, Found, Identity
from proxy.errors import (
    CredentialRefused,
    Denied,
    RegistryError,
    SecretRefused,
    TooManyRequests,
    UpstreamBroken,
    UpstreamUnavailable,
)
from proxy.metrics import Metrics
from proxy.names import Repository
from proxy.upstream.auth import RealmRefused, Tokens, check_realm
from proxy.upstream.challenge import Basic, Bearer, find_challenge
from proxy.upstream.quota import RateLimit, parse_rate_limit
from proxy.upstream.reply import Dropped, Reply, Request, Where, asked_as
from proxy.upstream.transport import REDIRECTS, Transport, at

_MAX_TOKEN = 64 * 1024
_LOOKUP = 10.0
_LOOKUP_FOR_QUOTA = 2.0
_SLOW = 10.0  # seconds in which nobody waits again for what did not come in time
_SHORTEST = 3  # what is shorter stands in every text
_FORM = {"Content-Type": "application/x-www-form-urlencoded"}

Lookup = Callable[[str], Awaitable[Found]]
"""The secrets for an image (``host/repository``), in the order in which they are tried."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Who asks, and what is shown to each endpoint for it by GET, in turn; None is nothing."""

    asker: Asker
    credentials: Mapping[URL, Sequence[Credential | None]]
    failure: str = ""
    """Why there may be more, which cannot be had just now."""

    @property
    def number(self) -> int:
        """The same for the same identity that shows the same, in whatever order; it tells nothing of it."""
        credentials = frozenset((endpoint, frozenset(tried)) for endpoint, tried in self.credentials.items())
        return hash((self.asker.identity, credentials))


class Exchange:
    """Asks the endpoints of one upstream. What proves who asks is kept by endpoint: they share no token."""

    def __init__(self, config: UpstreamConfig, metrics: Metrics, instance: str, lookup: Lookup) -> None:
        self._config = config
        self._instance = instance
        self._lookup = lookup
        self._registry = URL(config.endpoints[-1])
        loop = asyncio.get_running_loop()
        self._tokens = {URL(endpoint): Tokens(loop.time) for endpoint in config.endpoints}
        self._accepted: TTLCache[tuple[URL, Repository], Credential | None] = TTLCache(4096, 3600, timer=loop.time)
        self._slow: TTLCache[str, bool] = TTLCache(1, _SLOW, timer=loop.time)
        self.said: LRUCache[Credential, str] = LRUCache(256)
        self.rate_limits: LRUCache[Credential | None, RateLimit] = LRUCache(256)
        """What was said of the quota of the anonymous, and of each secret of ours."""
        self.transport = Transport(config, metrics)

    async def close(self) -> None:
        """Drops every connection."""
        for tokens in self._tokens.values():
            await tokens.close()
        await self.transport.close()

    def drop_expired(self) -> None:
        """Forgets the tokens whose time is over."""
        for tokens in self._tokens.values():
            tokens.drop_expired()

    def forget(self, credential: Credential) -> None:
        """Drops the tokens of a secret that is no more."""
        for tokens in self._tokens.values():
            tokens.forget(credential)
        self.said.pop(credential, None)
        self.rate_limits.pop(credential, None)

    async def probe(self, where: Where, path: str = "") -> None:
        """Whether an endpoint and its token server answer, at ``/v2/`` or for ``path``, which is asked for as by nobody;
        raises ``RegistryError`` where one does not, or only to say that it fails."""
        headers = {"Via": f"1.1 {self._instance}"}
        reply = await self.transport.hop("HEAD" if path else "GET", at(where, path or "/v2/"), headers, where)
        reply.close()
        if reply.status >= 500 or reply.status == 429:
            raise UpstreamBroken(f"{where} answered {reply.status}")
        if reply.status == 401 and isinstance(challenge := _challenge_of(reply), Bearer):
            with suppress(RealmRefused, Denied, TooManyRequests):  # what it says of the anonymous is an answer
                realm = check_realm(challenge.realm, where.endpoint, self._config.token_hosts_of(str(where.endpoint)))
                query = {"service": challenge.service} if challenge.service else {}
                scope = [("scope", each) for each in challenge.scope if path]
                await self._fetch_token(where, realm.extend_query([*query.items(), *scope]), None)

    def forget_failures(self) -> None:
        """The upstream is back: so its token servers are."""
        for tokens in self._tokens.values():
            tokens.forget_failures()

    async def prepare(self, repository: Repository, asker: Asker, *, by_head: bool = False) -> Shown:
        """Looks up what is shown in the name of ``asker``, before any endpoint's time runs: a program may have to tell.

        Raises ``UpstreamUnavailable`` where it takes too long; its answer is then there for the next one who asks. What is
        for the quota only is not waited for, and not shown by HEAD, which costs none and tells whether all is public still.
        """
        identity = asker.identity
        if identity.proof == "client":
            return Shown(asker, {endpoint: [identity.credential] for endpoint in self._tokens})
        if identity.proof == "anonymous" and (by_head or not identity.with_secret):
            return Shown(asker, {endpoint: [None] for endpoint in self._tokens})
        found: dict[URL, Sequence[Credential | None]] = {}
        failures: list[str] = []
        try:
            if self._config.name in self._slow:
                raise TimeoutError
            async with asyncio.timeout(_LOOKUP_FOR_QUOTA if identity.with_secret else _LOOKUP):
                for endpoint in self._tokens:
                    found[endpoint] = await self._secrets(endpoint, repository, identity, failures)
        except TimeoutError:
            self._slow.setdefault(self._config.name, True)
            if not identity.with_secret:
                raise UpstreamUnavailable(f"the credential for {self._config.name} did not come in time") from None
            found = {endpoint: [None] for endpoint in self._tokens}
        return Shown(asker, found, "; ".join(failures))

    async def ask(self, where: Where, request: Request, shown: Shown) -> Reply:
        """The answer to a request, redirects followed and challenge answered; raises ``RegistryError``.

        Several secrets are tried in turn until one is not refused (kubelet ``kuberuntime_image.go``); none after one
        that was accepted, and no anonymous attempt where there is a secret, unless it is there for its quota only.
        """
        asker = shown.asker
        via = f"{asker.via}, 1.1 {self._instance}" if asker.via else f"1.1 {self._instance}"
        request = replace(request, headers={**request.headers, "Via": via})
        best: Reply | Denied | None = None
        doubt = shown.failure
        try:
            for credential in shown.credentials[where.endpoint]:
                if asker.is_fresh:
                    self._tokens[where.endpoint].renounce(request.repository, credential)
                outcome = await self._try(credential, where, request)
                self._note(asker.identity, credential, where, outcome)
                best = _better(best, outcome)
                if isinstance(outcome, CredentialRefused) and asker.identity.credential is None:
                    doubt = outcome.message
                if _rank(outcome) == _YES:
                    ours = credential if asker.identity.credential is None else None
                    self._accepted[where.endpoint, request.repository] = ours
                    break
        except BaseException:
            _close(best)
            raise
        if doubt and _rank(best) == _REFUSED and not asker.identity.with_secret:
            _close(best)  # that the others have no right says nothing of what this one opens
            raise SecretRefused(doubt)
        if isinstance(best, Reply):
            return best
        if isinstance(best, CredentialRefused) and not (best.is_certain or asker.wants_a_right):
            raise UpstreamBroken(f"{best.message}; it said so in a page for people, which may be a gateway's")
        raise best or AssertionError("something is always shown, if only nothing")

    async def _try(self, credential: Credential | None, where: Where, request: Request) -> Reply | Denied:
        try:
            return await self._ask_as(credential, where, request)
        except Denied as refusal:
            return refusal

    @contextmanager
    def hiding(self, shown: Shown) -> Iterator[None]:
        """No text of an error repeats what was shown, wherever in its answer a registry has put it."""
        try:
            yield
        except RegistryError as error:
            for endpoint, credentials in shown.credentials.items():
                error.message = self._without(endpoint, credentials, error.message)
            error.args = (error.message,)
            raise

    def _without(self, endpoint: URL, credentials: Sequence[Credential | None], text: str) -> str:
        secrets: set[str] = set()
        for credential in credentials:
            secrets |= set(self._tokens[endpoint].given_to(credential))
            if credential is not None:
                secrets |= {credential.password, credential.identity_token, _basic(credential).removeprefix("Basic ")}
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, "[redacted]") if len(secret) >= _SHORTEST else text
        return text

    async def _secrets(
        self, endpoint: URL, repository: Repository, identity: Identity, failures: list[str]
    ) -> Sequence[Credential | None]:
        """What of our own is shown to an endpoint, in turn: first what it has accepted before."""
        # A mirror is a host of its own: what is for the registry is not for it.
        host = self._config.name if endpoint == self._registry else endpoint.host_port_subcomponent
        told = await self._lookup(f"{host}/{repository}")
        if told.failure and not identity.with_secret and endpoint == self._registry:
            if not told.credentials:  # to ask as nobody would be another question
                raise UpstreamUnavailable(f"the credential for {self._config.name} cannot be had: {told.failure}")
            failures.append(told.failure)
        found: list[Credential | None] = list(told.credentials)
        if identity.with_secret or not found:
            found.append(None)
        accepted = self._accepted.get((endpoint, repository))
        return sorted(found, key=lambda credential: credential is None or credential != accepted)

    async def _ask_as(self, credential: Credential | None, where: Where, request: Request) -> Reply:
        """One fresh token for one refusal: a registry that goes on refusing has answered."""
        tokens, repository = self._tokens[where.endpoint], request.repository
        shown = ""
        if challenge := tokens.expected(where.endpoint, repository):
            shown = await self._authorization(where, repository, challenge, credential)
        reply = await self.transport.follow(where, request, shown)
        reply.credential, reply.hide = credential, partial(self._without, where.endpoint, [credential])
        if reply.status != 401 or not reply.is_own:
            return reply
        challenge = _challenge_of(reply)
        if challenge is None or (isinstance(challenge, Basic) and not _basic(credential)):
            return reply
        try:
            tokens.expect(where.endpoint, repository, challenge)
            tokens.drop(shown.removeprefix("Bearer "))
            fresh = await self._authorization(where, repository, challenge, credential)
            if fresh != shown:
                reply.close()
                reply = await self.transport.follow(where, request, fresh)
                reply.credential, reply.hide = credential, partial(self._without, where.endpoint, [credential])
                if reply.status != 401:
                    return reply
        except BaseException:
            reply.close()
            raise
        try:
            if isinstance(again := _challenge_of(reply), Bearer) and again.error == "invalid_token":
                raise UpstreamBroken(f"{where} does not know the tokens of its own token server; are both in order?")
            if isinstance(challenge, Basic):
                is_certain = reply.is_json or reply.is_challenge
                raise CredentialRefused(f"{where} answered 401; {asked_as(credential)}", is_certain=is_certain)
            await reply.check(UpstreamBroken(f"{where} refuses a fresh token"))
            raise AssertionError("a 401 does not pass")
        except RegistryError as error:
            if isinstance(challenge, Bearer):
                tokens.refuse(self._realm(where, challenge), challenge, repository, error, credential)
            raise
        finally:
            reply.close()

    async def _authorization(
        self, where: Where, repository: Repository, challenge: Bearer | Basic, credential: Credential | None
    ) -> str:
        """The header that answers a challenge; empty where there is nothing to show."""
        if isinstance(challenge, Basic):
            return _basic(credential)
        return f"Bearer {await self._token(where, repository, challenge, credential)}"

    def _realm(self, where: Where, bearer: Bearer) -> URL:
        """The token server that a challenge names, if this upstream may use it; raises ``UpstreamBroken``."""
        try:
            return check_realm(bearer.realm, where.endpoint, self._config.token_hosts_of(str(where.endpoint)))
        except RealmRefused as error:
            self.transport.refused("realm").inc()
            raise UpstreamBroken(f"{where} cannot be asked: {error}") from error

    async def _token(self, where: Where, repository: Repository, bearer: Bearer, credential: Credential | None) -> str:
        """A token for that challenge. Token requests are never redirected, and carry nothing but the credential."""
        realm = self._realm(where, bearer)

        async def fetch(url: URL) -> bytes:
            return await self._fetch_token(where, url, credential)

        return await self._tokens[where.endpoint].get(realm, bearer, repository, fetch, credential)

    async def _fetch_token(self, where: Where, url: URL, credential: Credential | None) -> bytes:
        there = Where(f"the token server of {where.name}", url.origin())
        method, target, headers, body = _token_request(url, credential)
        try:
            async with asyncio.timeout(self._config.timeouts.token):
                reply = await self.transport.hop(method, target, headers, there, again=(Dropped,), body=body)
                try:
                    return await self._token_body(reply, credential)
                finally:
                    reply.close()
        except TimeoutError as error:
            raise UpstreamUnavailable(f"{there} did not answer in time") from error

    async def _token_body(self, reply: Reply, credential: Credential | None) -> bytes:
        if reply.status == 200:
            return await reply.body(_MAX_TOKEN)
        text = f"{reply.where} answered {reply.status}"
        if credential is not None and reply.status in (400, 401, 403):
            raise CredentialRefused(f"{text}; {asked_as(credential)}", is_certain=reply.is_json)
        if reply.status in (401, 403) and reply.is_json:  # ghcr.io says so of a private repository
            raise Denied(f"{text}; {asked_as(None)}")
        if reply.status == 429:
            raise TooManyRequests(f"{text}; its rate limit is used up")
        if reply.status in REDIRECTS:
            self.transport.refused("redirect").inc()
        raise UpstreamBroken(text)

    def _note(self, identity: Identity, credential: Credential | None, where: Where, outcome: Reply | Denied) -> None:
        """What was said to a secret of ours last, for ``explain``, and of its quota; a client's is nobody's business."""
        if identity.proof == "client":
            return
        if isinstance(outcome, Reply) and outcome.is_own:
            limit = parse_rate_limit(outcome.headers, asyncio.get_running_loop().time())
            if limit is not None:
                self.rate_limits[credential] = limit
        if credential is not None:
            said = outcome.message if isinstance(outcome, Denied) else f"{where} answered {outcome.status}"
            self.said[credential] = said


_YES, _ABSENT, _REFUSED, _UNKNOWN = 3, 2, 1, 0


def _rank(outcome: Reply | Denied | None) -> int:
    """What an answer is worth where several secrets are tried. Some registries hide behind a 404 what one may not read, so
    the next secret may see it; but where none does, it is told rather than a refusal."""
    if outcome is None or isinstance(outcome, Denied):
        return _UNKNOWN if outcome is None else _REFUSED
    if not outcome.is_own or outcome.status not in (401, 403, 404):
        return _YES
    return _ABSENT if outcome.status == 404 else _REFUSED


def _better(one: Reply | Denied | None, other: Reply | Denied) -> Reply | Denied:
    """The one to go on with; the later of equals. The one that is left is closed."""
    kept, left = (other, one) if one is None or _rank(other) >= _rank(one) else (one, other)
    _close(left)
    return kept


def _close(outcome: Reply | Denied | None) -> None:
    if isinstance(outcome, Reply):
        outcome.close()


def _challenge_of(reply: Reply) -> Bearer | Basic | None:
    return find_challenge(reply.headers.getall("WWW-Authenticate", []))


def _basic(credential: Credential | None) -> str:
    if credential is None or credential.identity_token:
        return ""
    return "Basic " + b64encode(f"{credential.username}:{credential.password}".encode()).decode()


def _token_request(url: URL, credential: Credential | None) -> tuple[str, URL, dict[str, str], bytes | None]:
    """GET, with user and password if there are; an identity token goes in a form (distribution ``spec/auth/oauth.md``)."""
    if credential is None or not credential.identity_token:
        return "GET", url, {"Authorization": proof} if (proof := _basic(credential)) else {}, None
    form = [
        ("grant_type", "refresh_token"),
        ("refresh_token", credential.identity_token),
        ("client_id", "pullcache"),
        ("service", url.query.get("service", "")),
        ("scope", " ".join(url.query.getall("scope", []))),
    ]
    return "POST", url.without_query_params("service", "scope"), _FORM, urlencode(form).encode()
