"""The pull secrets of this cache, as their files, helper programs and plugins hold them now: the one owner of that state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from proxy.config.model import PullSecretSource
from proxy.config.upstreams import UpstreamConfig
from proxy.credentials.credential import Credential, Found
from proxy.credentials.docker_config import Entry
from proxy.credentials.helpers import CredentialHelpers
from proxy.credentials.keyring import Keyring
from proxy.credentials.programs import ProgramFailed
from proxy.credentials.providers import Providers
from proxy.credentials.sources import Reading, read
from proxy.threads import Threads
from proxy.watch import Faults

log = logging.getLogger(__name__)

_STORE_ASKED_EVERY = 300.0


@dataclass(frozen=True, slots=True)
class _Store:
    """What a ``credsStore`` knew when it was asked last."""

    asked: float = float("-inf")
    entries: tuple[Entry, ...] = ()
    fault: str = ""


class PullSecrets:
    """What is shown to registries in this cache's own name.

    ``changed`` is called with the secrets that are no more when others are used from then on. A file that cannot be read or
    decoded keeps what it held last.
    """

    def __init__(
        self,
        sources: Sequence[PullSecretSource],
        helpers: CredentialHelpers,
        providers: Providers,
        threads: Threads,
        timer: Callable[[], float],
        changed: Callable[[Collection[Credential]], None],
    ) -> None:
        self._sources = sources
        self._helpers = helpers
        self._providers = providers
        self._threads = threads
        self._timer = timer
        self._changed = changed
        self._good: dict[str, Reading] = {}
        self._stores: dict[str, _Store] = {}
        self._keyring = Keyring()
        self._failing: set[str] = set()
        self._concerned: dict[str, bool] = {}  # asked with each request, and the same until the keyring is another

    async def reread(self) -> None:
        """Uses what the files hold now; raises ``Faults`` with those that cannot be used, after the others were."""
        readings = await self._threads.run(read, self._sources)
        faults: list[str] = []
        good: dict[str, Reading] = {}
        for name, reading in readings.items():
            if not reading.fault:
                good[name] = reading
                continue
            # What cannot be used now keeps what it held; a Secret that is gone from its directory is not here.
            kept = {old: before for old, before in self._good.items() if old == name or old.startswith(f"{name}/")}
            faults.append(reading.fault + ("; what it held before is still used" if kept else ""))
            good |= kept
        self._good = good
        entries: list[Entry] = []
        for reading in self._good.values():
            if reading.config is not None:
                entries += reading.config.entries
                if reading.config.store:
                    entries += await self._stored(reading.config.store, faults)
        if tuple(entries) != self._keyring.entries:
            before, self._keyring = self._keyring, await self._threads.run(Keyring, entries)
            self._concerned = {}
            now = {entry.credential for entry in entries}
            gone = {entry.credential for entry in before.entries if entry.credential is not None} - now
            self._changed(gone)
            if before.entries:
                log.info("the pull secrets have changed: %d entries, %d of before dropped", len(entries), len(gone))
        if faults:
            raise Faults(faults)

    async def lookup(self, image: str) -> Found:
        """The credentials for ``image`` (``host/repository``), in the order in which they are to be tried."""
        found: dict[Credential, None] = {}
        failures: list[str] = []
        for entry in self._keyring.matching(image):
            if entry.credential is not None:
                found[entry.credential] = None
                continue
            try:
                credential = await self._helpers.get(entry.helper, entry.registry)
            except ProgramFailed as error:
                if entry.helper not in self._failing:
                    log.warning("%s: %s", entry.registry, error)
                self._failing.add(entry.helper)
                failures.append(str(error))
                continue
            self._failing.discard(entry.helper)
            if credential is not None:
                found[credential] = None
        given = await self._providers.lookup(image)
        found |= dict.fromkeys(given.credentials)
        return Found(tuple(found), "; ".join([*failures, *([given.failure] if given.failure else [])]))

    def concerns(self, upstream: UpstreamConfig) -> bool:
        """Whether there may be a secret for images of that registry, or for a mirror of it."""
        known = self._concerned.get(upstream.key)
        if known is None:
            known = any(self._keyring.concerns(host) or self._providers.concerns(host) for host in upstream.hosts)
            self._concerned[upstream.key] = known
        return known

    def renew(self) -> None:
        """Helper programs and plugins are asked again for what they gave; it is used until they have answered."""
        self._helpers.renew()
        self._providers.renew()

    async def _stored(self, store: str, faults: list[str]) -> tuple[Entry, ...]:
        """What a ``credsStore`` knows; the program is started now and then only."""
        known = self._stores.get(store, _Store())
        if self._timer() - known.asked >= _STORE_ASKED_EVERY:
            try:
                source = f"docker-credential-{store}"
                entries = tuple(Entry(key, helper=store, source=source) for key in await self._helpers.registries(store))
                known = _Store(self._timer(), entries)
            except ProgramFailed as error:
                known = _Store(self._timer(), known.entries, str(error))
            self._stores[store] = known
        if known.fault:
            faults.append(known.fault)
        return known.entries
