"""How often credentials may be tried: wrong ones are bounded for a client and for an upstream, right ones cost nothing."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

from proxy.errors import TooManyAttempts


class Attempt:
    """One attempt that has begun; it counts until its window has passed, or it succeeded."""

    __slots__ = ("_take_out", "began", "client", "upstream")

    def __init__(self, client: str, upstream: str, began: float, take_out: Callable[[Attempt], None]) -> None:
        self.client = client
        self.upstream = upstream
        self.began = began
        self._take_out = take_out

    def succeeded(self) -> None:
        """The credential was right: the attempt is not counted. Again has no effect."""
        self._take_out(self)


class Attempts:
    """Attempts with credentials not known to be right, within the last ``window`` seconds.

    ``client`` is whatever stands for one to the caller, such as its address; ``upstream`` is one of a closed list. An
    attempt that is refused is counted nowhere, so never more than ``per_upstream`` of each upstream are held, however many
    clients come.
    """

    def __init__(
        self, timer: Callable[[], float], per_client: int = 10, per_upstream: int = 60, window: float = 60.0
    ) -> None:
        self._timer = timer
        self._limits = (per_client, per_upstream)
        self._window = window
        self._all: OrderedDict[Attempt, None] = OrderedDict()
        self._by_client: dict[str, OrderedDict[Attempt, None]] = {}
        self._by_upstream: dict[str, OrderedDict[Attempt, None]] = {}

    def __len__(self) -> int:
        """How many are held."""
        return len(self._all)

    def begin(self, client: str, upstream: str) -> Attempt:
        """Counts one attempt; raises ``TooManyAttempts``, with ``Retry-After``, where one has used up its own."""
        now = self._timer()
        while self._all and (oldest := next(iter(self._all))).began + self._window <= now:
            self._take_out(oldest)
        per_client, per_upstream = self._limits
        mine = self._by_client.get(client, ())
        theirs = self._by_upstream.get(upstream, ())
        for held, limit, who in ((mine, per_client, "from this client"), (theirs, per_upstream, f"to {upstream}")):
            if len(held) >= limit:
                seconds = max(1, math.ceil(next(iter(held)).began + self._window - now))
                raise TooManyAttempts(
                    f"too many attempts {who} with wrong credentials; try again in {seconds} s, with the right ones",
                    headers={"Retry-After": str(seconds)},
                )
        attempt = Attempt(client, upstream, now, self._take_out)
        self._all[attempt] = None
        self._by_client.setdefault(client, OrderedDict())[attempt] = None
        self._by_upstream.setdefault(upstream, OrderedDict())[attempt] = None
        return attempt

    def _take_out(self, attempt: Attempt) -> None:
        if attempt not in self._all:
            return
        del self._all[attempt]
        for table, key in ((self._by_client, attempt.client), (self._by_upstream, attempt.upstream)):
            del table[key][attempt]
            if not table[key]:
                del table[key]
