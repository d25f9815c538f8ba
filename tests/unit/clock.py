"""Time that a test winds."""

from __future__ import annotations


class Clock:
    """Seconds that pass when told to: ``clock.now += 5``."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
