"""Questions to one upstream: challenges, tokens, and the credentials that answer them.

Everything that proves who asks is in one object an upstream, and nothing of one can reach another.
"""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

from cachetools import LRUCache, TTLCache
from yarl import URL

from proxy.config import UpstreamConfig
from proxy.credentials.credential import Asker, Credential, Identity
from proxy.credentials.programs import ProgramFailed
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
from proxy.upstream.reply import Dropped, Reply, Where, asked_as
from proxy.upstream.transport import REDIRECTS, Transport, at

_MAX_TOKEN = 64 * 1024
_LOOKUP = 20.0
_FORM = {"Content-Type": "application/x-www-form-urlencoded"}

Lookup = Callable[[str], Awaitable[Sequence[Credential]]]
"""The secrets for an image (``host/repository``), in the order in which they are tried; raises ``ProgramFailed``."""


@dataclass(frozen=True, slots=True)
class Shown:
    """Who asks, and what is shown to each endpoint for it by GET, in turn; None is nothing."""

    asker: Asker
    credentials: Mapping[URL, Sequence[Credential | None]]


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
        self.said: LRUCache[Credential, str] = LRUCache(256)
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

    async def probe(self, where: Where) -> None:
        """Whether an endpoint answers at all; raises ``RegistryError`` where it does not, or only to say that it fails."""
        reply = await self.transport.hop("GET", at(where, "/v2/"), {"Via": f"1.1 {self._instance}"}, where)
        reply.close()
        if reply.status >= 500 or reply.status == 429:
            raise UpstreamBroken(f"{where} answered {reply.status}")

    async def prepare(self, repository: Repository, asker: Asker) -> Shown:
        """Looks up what is shown in the name of ``asker``, before any endpoint's time runs: a program may have to tell.

        Raises ``UpstreamUnavailable`` where it takes too long; its answer is then there for the next one who asks.
        """
        identity = asker.identity
        if identity.proof == "client":
            return Shown(asker, {endpoint: [identity.credential] for endpoint in self._tokens})
        if identity.proof == "anonymous" and not identity.with_secret:
            return Shown(asker, {endpoint: [None] for endpoint in self._tokens})
        try:
            async with asyncio.timeout(_LOOKUP):
                found = {endpoint: await self._secrets(endpoint, repository, identity) for endpoint in self._tokens}
        except TimeoutError:
            raise UpstreamUnavailable(f"the credential for {self._config.name} did not come in time") from None
        return Shown(asker, found)

    async def ask(
        self, method: str, where: Where, path: str, repository: Repository, headers: dict[str, str], shown: Shown
    ) -> Reply:
        """The answer to a request, redirects followed and challenge answered; raises ``RegistryError``.

        Several secrets are tried in turn until one is not refused (kubelet ``kuberuntime_image.go``); none after one
        that was accepted, and no anonymous attempt where there is a secret, unless it is there for its quota only.
        """
        asker = shown.asker
        via = f"{asker.via}, 1.1 {self._instance}" if asker.via else f"1.1 {self._instance}"
        candidates = shown.credentials[where.endpoint]
        if method == "HEAD" and asker.identity.with_secret:
            candidates = [None]  # it costs no quota, and says whether the repository is public still
        for number, credential in enumerate(candidates, start=1):
            if asker.wants_a_right:  # a token that was given before tells of the right that was there before
                self._tokens[where.endpoint].renounce(repository, credential)
            is_last = number == len(candidates)
            try:
                reply = await self._ask_as(credential, method, where, path, repository, headers | {"Via": via})
            except Denied as error:
                self._note(asker.identity, credential, error.message)
                if not is_last:
                    continue
                if isinstance(error, CredentialRefused) and asker.identity.credential is None:
                    raise SecretRefused(error.message) from None
                raise
            refused = reply.status in (401, 403) and reply.is_own
            self._note(asker.identity, credential, f"{where} answered {reply.status}")
            if not refused and len(candidates) > 1:
                self._accepted[where.endpoint, repository] = credential
            if is_last or not refused:
                return reply
            reply.close()
        raise AssertionError("the last one answers or raises")

    async def _secrets(self, endpoint: URL, repository: Repository, identity: Identity) -> Sequence[Credential | None]:
        """What of our own is shown to an endpoint, in turn: first what it has accepted before."""
        # A mirror is a host of its own: what is for the registry is not for it.
        host = self._config.name if endpoint == self._registry else endpoint.host_port_subcomponent
        found: list[Credential | None] = []
        try:
            found += await self._lookup(f"{host}/{repository}")
        except ProgramFailed as error:
            if not identity.with_secret and endpoint == self._registry:  # to ask as nobody would be another question
                raise UpstreamUnavailable(f"the credential for {self._config.name} cannot be had: {error}") from None
        if identity.with_secret or not found:
            found.append(None)
        accepted = self._accepted.get((endpoint, repository))
        return sorted(found, key=lambda credential: credential is None or credential != accepted)

    async def _ask_as(
        self,
        credential: Credential | None,
        method: str,
        where: Where,
        path: str,
        repository: Repository,
        headers: dict[str, str],
    ) -> Reply:
        """One fresh token for one refusal: a registry that goes on refusing has answered."""
        tokens = self._tokens[where.endpoint]
        shown = ""
        if challenge := tokens.expected(where.endpoint, repository):
            shown = await self._authorization(where, repository, challenge, credential)
        reply = await self.transport.follow(method, where, path, headers, shown)
        reply.shown(credential, shown)
        if reply.status != 401 or not reply.is_own:
            return reply
        challenge = find_challenge(reply.headers.getall("WWW-Authenticate", []))
        if challenge is None or (isinstance(challenge, Basic) and not _basic(credential)):
            return reply
        try:
            tokens.expect(where.endpoint, repository, challenge)
            tokens.drop(shown.removeprefix("Bearer "))
            fresh = await self._authorization(where, repository, challenge, credential)
            if fresh != shown:
                reply.close()
                reply = await self.transport.follow(method, where, path, headers, fresh)
                reply.shown(credential, fresh)
                if reply.status != 401:
                    return reply
        except BaseException:
            reply.close()
            raise
        try:
            if isinstance(challenge, Basic):
                raise CredentialRefused(f"{where} answered 401; {asked_as(credential)}")
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
        there = Where(f"the token server of {where.name}", realm.origin())

        async def fetch(url: URL) -> bytes:
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

        return await self._tokens[where.endpoint].get(realm, bearer, repository, fetch, credential)

    async def _token_body(self, reply: Reply, credential: Credential | None) -> bytes:
        if reply.status == 200:
            return await reply.body(_MAX_TOKEN)
        text = f"{reply.where} answered {reply.status}"
        if credential is not None and reply.status in (400, 401, 403):
            raise CredentialRefused(f"{text}; {asked_as(credential)}")
        if reply.status in (401, 403) and reply.is_json:  # ghcr.io says so of a private repository
            raise Denied(f"{text}; {asked_as(None)}")
        if reply.status == 429:
            raise TooManyRequests(f"{text}; its rate limit is used up")
        if reply.status in REDIRECTS:
            self.transport.refused("redirect").inc()
        raise UpstreamBroken(text)

    def _note(self, identity: Identity, credential: Credential | None, text: str) -> None:
        """What was said to a secret of ours last, for ``explain``; a client's is nobody's business."""
        if credential is not None and identity.proof != "client":
            self.said[credential] = text


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
