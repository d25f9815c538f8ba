"""How long nobody asks again after a failure: ImagePullBackOff, as the kubelet counts it.

10 s, doubling, at most 300 s (kubelet ``pkg/kubelet/kubelet.go``, ``imageBackOffPeriod`` and ``MaxImageBackOff``; client-go
``util/flowcontrol/backoff.go``). Unlike the kubelet, pullcache forgets at success.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Window:
    """A time after a failure, in seconds of one clock."""

    began: float
    seconds: float

    def left(self, now: float) -> float:
        """Seconds until the next attempt; 0 where it may be made."""
        return max(0.0, self.began + self.seconds - now)


def next_window(last: Window | None, now: float, initial: float, most: float) -> Window:
    """The window that a failure begins; ``last`` is that of the failure before. Where nothing has failed for twice ``most``
    the growth begins anew (client-go ``hasExpired``)."""
    if last is None or now - last.began > 2 * most:
        return Window(now, min(initial, most))
    return Window(now, min(last.seconds * 2, most))
