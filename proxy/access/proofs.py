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
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal

from cachetools import LRUCache, TTLCache

from proxy.access.attempts import Attempts
from proxy.access.caller import Caller
from proxy.config import AccessConfig, UpstreamConfig
from proxy.credentials.credential import ANONYMOUS, QUOTA, SECRET, Identity
from proxy.errors import (
    BlobUnknown,
    Denied,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    Unauthorized,
    UpstreamFailing,
    UpstreamUnavailable,
)
from proxy.names import Repository
from proxy.once import Once
from proxy.rules import may_read
from proxy.storage.store import Store
from proxy.threads import Threads
from proxy.upstream.client import Upstream

log = logging.getLogger(__name__)

_REFUSED = 10.0  # seconds that a no to a credential is remembered: its owner may just have been given the right
_FAILING = 5.0  # seconds in which an upstream that failed is not asked for what it has said yes to before
_PATIENCE = 20.0
_AT_ONCE = 5  # credentials of one client that are tried at the same time

Mode = Literal["public", "verify", "shared"]


@dataclass(frozen=True, slots=True)
class Probe:
    """Asks the upstream for ``what`` of a repository, in somebody's name; raises ``RegistryError`` unless it is a yes."""

    what: str
    ask: Callable[[Identity], Awaitable[None]]


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


@dataclass(slots=True)
class _Turns:
    free: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))
    users: int = 0


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
        self._private: TTLCache[_Key, Denied] = TTLCache(16384, 60.0, timer=timer)  # what the anonymous, or we, may not read
        self._refused: TTLCache[_Key, Denied] = TTLCache(16384, _REFUSED, timer=timer)
        self._not_wrong: TTLCache[tuple[bytes, str], bool] = TTLCache(16384, 60.0, timer=timer)
        self._failing: TTLCache[str, bool] = TTLCache(1024, _FAILING, timer=timer)
        self._once: Once[tuple[_Key, str], None] = Once()
        self._turns: dict[str, _Turns] = {}

    async def identity(self, upstream: Upstream, repository: Repository, caller: Caller, probe: Probe) -> Identity:
        """In whose name ``caller`` reads a repository.

        Raises ``Unauthorized`` where a credential would be needed or is refused, ``Denied`` where none would help, and any
        ``RegistryError`` of the upstream.
        """
        mode = mode_of(upstream.config, repository)
        if mode == "shared":
            await self._prove(upstream, repository, SECRET, probe, caller)
            return SECRET
        if mode == "public" and not self._has_secret(upstream.config):
            return ANONYMOUS
        client = Identity("client", caller.credential)
        if caller.credential is not None and upstream.key in self._failing and self._has_yes(upstream, repository, client):
            return client  # whether the anonymous may read it cannot be found out now
        try:
            await self._prove(upstream, repository, ANONYMOUS, probe, caller)
            return QUOTA
        except (Denied, ManifestUnknown, BlobUnknown, NameUnknown, UpstreamFailing) as error:
            if mode == "public" or (caller.credential is None and not isinstance(error, Denied)):
                raise
            if caller.credential is None:
                raise Unauthorized(f"{repository} of {upstream.name} is not public: {error.message}") from None
        try:
            await self._prove(upstream, repository, client, probe, caller)
        except Denied as error:
            raise Unauthorized(f"{upstream.name} does not give {repository} to this credential: {error.message}") from None
        return client

    def _has_yes(self, upstream: Upstream, repository: Repository, identity: Identity) -> bool:
        """Whether a yes is remembered that may be used while the upstream cannot be asked."""
        checked = self._yes.get(self._key(upstream, repository, identity))
        return checked is not None and self._timer() - checked < sum(
            _ages(upstream.config.access or AccessConfig(), identity)
        )

    async def withdraw(self, upstream: Upstream, repository: Repository, identity: Identity, refusal: Denied) -> None:
        """The registry has refused what it gave before: no yes of that identity holds any longer."""
        key = self._key(upstream, repository, identity)
        self._yes.pop(key, None)
        if identity.proof == "client":
            self._refused[key] = refusal
            return
        self._private[key] = refusal
        await self._threads.run(self._store.withdraw, upstream.key, repository, identity.proof)

    def forget_secret(self) -> None:
        """Our own secrets are others now: neither yes nor no to them holds any longer."""
        for memory in (self._yes, self._private):
            for key in [key for key in list(memory) if key[0] == SECRET.proof.encode()]:
                memory.pop(key, None)

    async def close(self) -> None:
        """Ends what is being asked."""
        await self._once.close()

    async def _prove(
        self, upstream: Upstream, repository: Repository, identity: Identity, probe: Probe, caller: Caller
    ) -> None:
        """A yes that is not too old; raises ``RegistryError`` where there is none."""
        key = self._key(upstream, repository, identity)
        fresh, stale = _ages(upstream.config.access or AccessConfig(), identity)
        checked = self._yes.get(key)
        age = self._timer() - checked if checked is not None else float("inf")
        if age < fresh:
            return
        for memory in (self._private, self._refused):
            if (refusal := memory.get(key)) is not None:
                raise type(refusal)(refusal.message)
        was_given = age < fresh + stale or (
            identity.proof != "client" and self._store.was_given(upstream.key, repository, identity.proof)
        )
        if was_given and upstream.key in self._failing:
            return
        try:
            await self._once.run(
                (key, probe.what), lambda: self._ask(key, upstream, repository, identity, probe, caller, is_known=was_given)
            )
        except UpstreamFailing as failure:
            self._failing[upstream.key] = True
            if not was_given:
                raise
            log.warning(
                "%s of %s is served on the yes of %s: %s", repository, upstream.name, identity.proof, failure.message
            )

    async def _ask(
        self,
        key: _Key,
        upstream: Upstream,
        repository: Repository,
        identity: Identity,
        probe: Probe,
        caller: Caller,
        *,
        is_known: bool,
    ) -> None:
        """Asks the upstream, within the number of attempts that wrong credentials may cost it."""
        try:
            async with asyncio.timeout(_PATIENCE), self._turn(caller.address if identity.proof == "client" else ""):
                is_known = is_known or identity.proof != "client" or (key[0], upstream.key) in self._not_wrong
                attempt = None if is_known else self._attempts.begin(caller.address, upstream.name)
                try:
                    await probe.ask(identity)
                except Denied as error:
                    await self.withdraw(upstream, repository, identity, error)
                    raise
                except RegistryError as error:
                    if attempt is not None and isinstance(error, UpstreamFailing):
                        attempt.succeeded()  # it was not heard
                    elif identity.proof == "client":
                        self._not_wrong[key[0], upstream.key] = True
                    raise
                if attempt is not None:
                    attempt.succeeded()
                if identity.proof == "client":
                    self._not_wrong[key[0], upstream.key] = True
                self._yes[key] = self._timer()
        except TimeoutError as error:
            raise UpstreamUnavailable(f"{upstream.name} did not say in time who may read {repository}") from error

    @asynccontextmanager
    async def _turn(self, address: str) -> AsyncIterator[None]:
        """Waits until few enough credentials of one client are being tried: a right one takes its attempt back."""
        if not address:
            yield
            return
        turns = self._turns.setdefault(address, _Turns())
        turns.users += 1
        try:
            async with turns.free:
                yield
        finally:
            turns.users -= 1
            if not turns.users:
                del self._turns[address]

    def _key(self, upstream: Upstream, repository: Repository, identity: Identity) -> _Key:
        credential = identity.credential
        if credential is None:
            return identity.proof.encode(), upstream.key, repository
        parts = (credential.username, credential.password, credential.identity_token)
        text = b"".join(len(part).to_bytes(8) + part for part in (part.encode("utf-8", "surrogatepass") for part in parts))
        return hmac.digest(self._hash_key, text, hashlib.sha256), upstream.key, repository
