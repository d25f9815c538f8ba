"""Who may read a repository: to whom its registry has said yes, how lately, and when that ends.

Content is shared, permission is not. A yes belongs to the anonymous, to the secrets of this cache, or to one credential of a
client, and to one repository of one upstream. It is the answer to one HEAD, holds for a while, and is stretched while the
upstream cannot be asked; a no of the registry itself ends it at once, and with it every link that it had proved.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from cachetools import LRUCache, TTLCache

from proxy.access import probes
from proxy.access.attempts import Attempt, Attempts
from proxy.access.caller import Caller
from proxy.access.probes import Probe
from proxy.access.turns import Turns
from proxy.config.upstreams import AccessConfig, UpstreamConfig
from proxy.credentials.credential import ANONYMOUS, QUOTA, SECRET, Identity
from proxy.errors import (
    BlobUnknown,
    CredentialRefused,
    Denied,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    TooManyRequests,
    Unauthorized,
    UpstreamBroken,
    UpstreamFailing,
    UpstreamIntercepted,
    UpstreamUnavailable,
)
from proxy.names import Repository
from proxy.once import Once
from proxy.rules import may_read
from proxy.storage.store import Store
from proxy.threads import Threads
from proxy.upstream.client import Upstream

log = logging.getLogger(__name__)

_PRIVATE = 60.0  # seconds that a no to the anonymous, or to us, is remembered: each pull would cost it twice
_REFUSED = 10.0  # seconds that a no to a credential is remembered: its owner may just have been given the right
_FAILING = 5.0  # seconds in which an upstream that failed is not asked for what it has said yes to before
_PATIENCE = 20.0
_PATIENCE_GIVEN = 5.0  # where there was a yes before: containerd waits 30 s for all that is asked of a request
_AT_ONCE = 5  # credentials of one client that are tried at the same time: the right ones take their attempts back
_AT_ONCE_UPSTREAM = 20

Mode = Literal["public", "verify", "shared"]


_Key = tuple[bytes, str, Repository]


def mode_of(config: UpstreamConfig, repository: Repository) -> Mode:
    """How a repository is given; ``shared`` may be kept for some, and the others are public."""
    access = config.access or AccessConfig()
    if access.mode == "shared" and access.repositories and not may_read(access.repositories, f"{config.name}/{repository}"):
        return "public"
    return access.mode


def _ages(access: AccessConfig, identity: Identity) -> tuple[float, float]:
    """Seconds that a yes is fresh, and that it may be stretched by. What anybody was given, or our secret, needs no
    stretching: that it was is in the catalog."""
    match identity.proof:
        case "anonymous":
            return access.public_for, 0.0
        case "secret":
            return access.max_age, 0.0
        case "client":
            return access.max_age, access.stale_for


class Withdrawn(Denied):
    """The registry gives it to this identity no more; to another it may."""


@dataclass(frozen=True, slots=True)
class _Question:
    """Whether ``identity`` may read a repository, and how that is found out."""

    upstream: Upstream
    repository: Repository
    identity: Identity
    probe: Probe
    key: _Key
    address: str
    """Of the client whose credential it is about; empty where it is about none."""
    secrets: int
    """Which of our own secrets it is asked with, where it is in their name."""


class Access:
    """The yes and no of the upstreams. Credentials of clients are known by a keyed hash, whose key is made at the start and
    written nowhere."""

    def __init__(
        self,
        store: Store,
        threads: Threads,
        attempts: Attempts,
        has_secret: Callable[[UpstreamConfig], bool],
        timer: Callable[[], float],
    ) -> None:
        self._store = store
        self._threads = threads
        self._attempts = attempts
        self._has_secret = has_secret
        self._timer = timer
        self._hash_key = secrets.token_bytes(32)
        self._yes: LRUCache[_Key, float] = LRUCache(65536)
        self._noes: LRUCache[_Key, int] = LRUCache(65536)  # how many there were: a yes from before one of them is none
        # What the anonymous, or we, may not read; and then what a client's credential may not.
        self._private: TTLCache[_Key, str] = TTLCache(16384, _PRIVATE, timer=timer)
        self._refused: TTLCache[_Key, str] = TTLCache(16384, _REFUSED, timer=timer)
        self._tried: TTLCache[tuple[bytes, str], bool] = TTLCache(16384, 60.0, timer=timer)
        self._failing: TTLCache[tuple[_Key, str], bool] = TTLCache(16384, _FAILING, timer=timer)  # "": whatever it is asked
        self._secrets = 0  # how often they have changed: what was said to those of before is nothing to these
        self._once: Once[tuple[_Key, str], None] = Once(outlives_callers=True)  # bounded, and its answer is worth having
        self._turns = Turns()

    async def identity(self, upstream: Upstream, repository: Repository, caller: Caller, probe: Probe) -> Identity:
        """In whose name ``caller`` reads a repository.

        Raises ``Unauthorized`` where a credential would be needed or is refused, ``Denied`` where none would help, and any
        ``RegistryError`` of the upstream.
        """
        mode = mode_of(upstream.config, repository)
        if mode == "shared":
            await self._prove(self._question(upstream, repository, SECRET, probe))
            return SECRET
        if mode == "public" and not self._has_secret(upstream.config):
            return ANONYMOUS
        anyone = self._question(upstream, repository, ANONYMOUS, probe)
        client = self._question(upstream, repository, Identity("client", caller.credential), probe, caller.address)
        was_given = caller.credential is not None and self._was_given(client)
        try:
            if not (was_given and self._is_failing(anyone)):  # else it cannot be found out now
                await self._prove(anyone, is_short=was_given)
                return QUOTA
        except (Denied, ManifestUnknown, BlobUnknown, NameUnknown, UpstreamFailing) as error:
            if mode == "public" or (caller.credential is None and not isinstance(error, Denied)):
                raise
            if caller.credential is None:
                raise Unauthorized(f"{repository} of {upstream.name} is not public: {error.message}") from None
        try:
            await self._prove(client)
        except Denied as error:
            raise Unauthorized(f"{upstream.name} does not give {repository} to this credential: {error.message}") from None
        return client.identity

    def fallback(self, upstream: Upstream, repository: Repository, caller: Caller, identity: Identity) -> Identity | None:
        """In whose name what is held may be read where the upstream fails, and ``identity`` is not enough: the client's own,
        who was given it while it was not public."""
        if caller.credential is None or identity is not QUOTA or mode_of(upstream.config, repository) != "verify":
            return None
        client = Identity("client", caller.credential)
        question = self._question(upstream, repository, client, probes.of_list(upstream, repository), caller.address)
        return client if self._was_given(question) else None

    async def refused(self, upstream: Upstream, repository: Repository, identity: Identity, refusal: Denied) -> None:
        """The registry has refused something to whom it had said yes. Raises ``Withdrawn`` where it was the repository, and
        another identity may still read it, ``Unauthorized`` where that is for the client to show."""
        who = ANONYMOUS if identity.proof == "anonymous" else identity
        question = self._question(upstream, repository, who, probes.of_list(upstream, repository))
        was_given = question.key in self._yes or self._store.was_given(upstream.key, repository, who.proof)
        if not was_given or not await self._is_closed(question, refusal):
            return
        await self._withdraw(question, refusal)
        if who.proof == "client":
            raise Unauthorized(refusal.message)
        if mode_of(upstream.config, repository) == "verify":
            raise Withdrawn(refusal.message)

    def forget_secret(self) -> None:
        """Our own secrets are others now: neither yes nor no to them holds any longer."""
        self._secrets += 1
        for memory in (self._yes, self._private):
            for key in [key for key in list(memory) if key[0] == SECRET.proof.encode()]:
                memory.pop(key, None)

    async def close(self) -> None:
        """Ends what is being asked."""
        await self._once.close()

    async def _prove(self, question: _Question, *, is_short: bool = False) -> None:
        """A yes that is not too old; raises ``RegistryError`` where there is none. ``is_short``: as long as where there was
        a yes before is waited, and no longer."""
        key, upstream, repository = question.key, question.upstream, question.repository
        if self._age(key) < _ages_of(question)[0]:
            return
        for memory in (self._private, self._refused):
            if (refusal := memory.get(key)) is not None:
                raise Denied(refusal)
        was_given = self._was_given(question)
        if question.probe.asks_nobody:
            if not was_given:
                await question.probe.ask(question.identity)
            return
        if was_given and self._is_failing(question):
            return
        patience = _PATIENCE_GIVEN if was_given or is_short else _PATIENCE
        try:
            await self._once.run((key, question.probe.what), lambda: self._ask(question, patience, was_given=was_given))
        except UpstreamFailing as failure:
            # An odd answer, or none, is one to this question, which the client has chosen: it tells nothing of another's.
            is_all = isinstance(failure, TooManyRequests) or (isinstance(failure, UpstreamUnavailable) and upstream.is_out)
            self._failing[key, "" if is_all else question.probe.what] = True
            if not was_given:
                raise
            log.warning("%s of %s is served on the yes of before: %s", repository, upstream.name, failure.message)
        except (ManifestUnknown, BlobUnknown):
            if not was_given:
                raise
            await self._check_open(question)

    async def _check_open(self, question: _Question) -> None:
        """What was deleted upstream is served on to those who may read the repository; some registries say 404 where they
        mean 403, and of the tags then, too. Raises ``RegistryError``."""
        tags = probes.of_list(question.upstream, question.repository)
        await self._prove(replace(question, probe=tags), is_short=True)

    def _was_given(self, question: _Question) -> bool:
        """Whether there was a yes that may be stretched."""
        proof = question.identity.proof
        if self._age(question.key) < sum(_ages_of(question)):
            return True
        return proof != "client" and self._store.was_given(question.upstream.key, question.repository, proof)

    def _is_void(self, question: _Question) -> bool:
        return question.identity == SECRET and question.secrets != self._secrets

    def _is_failing(self, question: _Question) -> bool:
        return (question.key, "") in self._failing or (question.key, question.probe.what) in self._failing

    async def _ask(self, question: _Question, patience: float, *, was_given: bool) -> None:
        """Asks the upstream when it is the client's turn; raises ``UpstreamUnavailable`` where that takes too long."""
        upstream = question.upstream
        try:
            async with (
                asyncio.timeout(patience),
                self._turns.of(question.address, _AT_ONCE),
                self._turns.of(question.address and upstream.name, _AT_ONCE_UPSTREAM),
            ):
                await self._try(question, was_given=was_given)
        except TimeoutError as error:
            raise UpstreamUnavailable(f"{upstream.name} did not say in time who may read {question.repository}") from error

    async def _try(self, question: _Question, *, was_given: bool) -> None:
        """Asks within the number of attempts that wrong credentials may cost; remembers the answer."""
        who = (question.key[0], question.upstream.key)
        attempt = self._attempt(question, was_given=was_given)
        noes = self._noes.get(question.key, 0)
        try:
            await question.probe.ask(question.identity)
        except Denied as error:
            if not self._is_void(question) and (not was_given or await self._is_closed(question, error)):
                await self._withdraw(question, error)
            raise
        except RegistryError:
            self._tried[who] = True
            raise
        if attempt is not None:
            attempt.succeeded()
        self._tried[who] = True
        if noes != self._noes.get(question.key, 0):
            raise Denied(f"{question.upstream.name} has just closed {question.repository}")
        if question.probe.proves and not self._is_void(question):
            self._yes[question.key] = self._timer()

    def _attempt(self, question: _Question, *, was_given: bool) -> Attempt | None:
        """Counts a credential of a client of which nothing is known; raises ``TooManyAttempts``."""
        if not question.address or was_given or (question.key[0], question.upstream.key) in self._tried:
            return None
        return self._attempts.begin(question.address, question.upstream.name)

    async def _is_closed(self, question: _Question, refusal: Denied) -> bool:
        """Whether a no to whom the registry had said yes is about the repository: registries that scan refuse single
        artifacts. What may be another's word than the registry's ends no yes: raises ``UpstreamFailing`` then."""
        _check_certain(refusal)
        try:
            await probes.of_list(question.upstream, question.repository).ask(question.identity)
        except Denied as again:
            _check_certain(again)
            return True
        except NameUnknown:
            return True
        except UpstreamIntercepted:
            raise
        except UpstreamBroken:  # it is up, has refused, and lists nothing: nothing more is confirmed
            return False
        return False

    async def _withdraw(self, question: _Question, refusal: Denied) -> None:
        """No yes of that identity holds any longer, and no link that it had proved."""
        key = question.key
        self._yes.pop(key, None)
        self._noes[key] = self._noes.get(key, 0) + 1
        if question.identity.proof == "client":
            self._refused[key] = refusal.message
            return
        self._private[key] = refusal.message
        await self._threads.run(self._store.withdraw, question.upstream.key, question.repository, question.identity.proof)

    def _age(self, key: _Key) -> float:
        checked = self._yes.get(key)
        return self._timer() - checked if checked is not None else float("inf")

    def _question(
        self, upstream: Upstream, repository: Repository, identity: Identity, probe: Probe, address: str = ""
    ) -> _Question:
        credential = identity.credential
        who = identity.proof.encode()
        if credential is not None:
            parts = (credential.username, credential.password, credential.identity_token)
            encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
            text = b"".join(len(part).to_bytes(8) + part for part in encoded)
            who = hmac.digest(self._hash_key, text, hashlib.sha256)
        return _Question(upstream, repository, identity, probe, (who, upstream.key, repository), address, self._secrets)


def _ages_of(question: _Question) -> tuple[float, float]:
    return _ages(question.upstream.config.access or AccessConfig(), question.identity)


def _check_certain(refusal: Denied) -> None:
    if isinstance(refusal, CredentialRefused) and not refusal.is_certain:
        raise UpstreamBroken(f"{refusal.message}; it said so in a page for people, which may be a gateway's")
