"""The tokens that pullcache gives: random handles to credentials that are held in memory, for minutes."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from proxy.credentials.credential import Credential

ANONYMOUS_HANDLE = "anonymous"
"""What those without a credential are given; nothing is held for it, and ``Handles.find`` does not know it."""


@dataclass(frozen=True, slots=True)
class _Held:
    credential: Credential
    owner: str
    ends: float


class Handles:
    """Handles and what they stand for, each for ``life`` seconds.

    At most ``per_owner`` of one owner and ``size`` in all: the oldest goes first, the owner's own before others'. Nothing of
    a handle or credential is in its ``repr``.
    """

    def __init__(self, timer: Callable[[], float], life: float = 300.0, per_owner: int = 1024, size: int = 16384) -> None:
        self._timer = timer
        self._life = life
        self._per_owner = per_owner
        self._size = size
        self._held: OrderedDict[str, _Held] = OrderedDict()  # oldest first, which is also the order in which they end
        self._owned: dict[str, OrderedDict[str, None]] = {}
        self._latest: dict[tuple[str, Credential], str] = {}

    def __len__(self) -> int:
        """How many are held."""
        return len(self._held)

    @property
    def promised_life(self) -> float:
        """Seconds that a handle still lives when it is given, at least: what ``expires_in`` may say."""
        return self._life / 2

    def give(self, credential: Credential, owner: str) -> str:
        """A handle to ``credential``: for the same owner the same one again, as long as half its life is still to come.

        ``owner`` is whatever stands for one client to the caller: it pays for its own handles.
        """
        now = self._timer()
        self.drop_expired()
        key = (owner, credential)
        latest = self._latest.get(key)
        if latest is not None and self._held[latest].ends - now > self.promised_life:
            return latest
        if len(self._owned.get(owner, ())) >= self._per_owner:
            self._drop(next(iter(self._owned[owner])))
        elif len(self._held) >= self._size:
            self._drop(next(iter(self._held)))
        handle = secrets.token_urlsafe(32)
        self._held[handle] = _Held(credential, owner, now + self._life)
        self._owned.setdefault(owner, OrderedDict())[handle] = None
        self._latest[key] = handle
        return handle

    def find(self, handle: str) -> Credential | None:
        """What ``handle`` stands for; None if it was never given, or its life is over."""
        self.drop_expired()
        held = self._held.get(handle)
        return held.credential if held is not None else None

    def drop_expired(self) -> None:
        """Forgets those whose life is over; ``give`` and ``find`` do so themselves."""
        now = self._timer()
        while self._held and self._held[oldest := next(iter(self._held))].ends <= now:
            self._drop(oldest)

    def _drop(self, handle: str) -> None:
        held = self._held.pop(handle)
        owned = self._owned[held.owner]
        del owned[handle]
        if not owned:
            del self._owned[held.owner]
        if self._latest.get((held.owner, held.credential)) == handle:
            del self._latest[held.owner, held.credential]
