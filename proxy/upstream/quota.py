"""What a registry says of its rate limit: Docker Hub's headers, in both spellings (docs.docker.com, "Pull usage")."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from proxy.logs import printable

_COUNT = re.compile(r"(\d{1,12})(?:\s*;\s*w=(\d{1,9}))?", re.ASCII)
_SPELLINGS = ("ratelimit-", "x-ratelimit-")


@dataclass(frozen=True, slots=True)
class RateLimit:
    """So many pulls of ``limit`` are left in ``window`` seconds, for ``source`` (an address or an account)."""

    limit: int | None
    remaining: int | None
    window: int | None
    source: str
    told: float
    """When it was said, in seconds of the clock that ``is_low`` is asked by."""

    def is_low(self, reserve: int, now: float) -> bool:
        """Whether fewer than ``reserve`` pulls are left, as far as is known: what was said a window or a day ago is over."""
        is_known = self.remaining is not None and now - self.told < min(self.window or _HOUR, _DAY)
        return is_known and self.remaining is not None and self.remaining < reserve


_HOUR, _DAY = 3600, 86_400


def parse_rate_limit(headers: Mapping[str, str], now: float) -> RateLimit | None:
    """What the headers of an answer say; None where they say nothing."""
    limit = remaining = window = None
    for spelling in _SPELLINGS:
        if found := _COUNT.fullmatch(headers.get(f"{spelling}limit", "").strip()):
            limit, window = int(found[1]), int(found[2]) if found[2] else window
        if found := _COUNT.fullmatch(headers.get(f"{spelling}remaining", "").strip()):
            remaining, window = int(found[1]), int(found[2]) if found[2] else window
    if limit is None and remaining is None:
        return None
    return RateLimit(limit, remaining, window, printable(headers.get("docker-ratelimit-source", ""), 64), now)


def parse_retry_after(value: str, now: float) -> float:
    """Seconds that ``Retry-After`` asks to wait, as a number or a date (RFC 9110 10.2.3); 0 where it cannot be read.

    ``now``: seconds since the epoch.
    """
    if value.isascii() and value.isdigit() and len(value) < 10:
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return 0.0
