"""What a registry has lately failed to give, or refused, or does not have: for a while nobody asks it again.

One attempt a window, and everybody has its answer. A failure begins a window that grows (``backoff``); a refusal, and that
something is not there, hold for a short while only: a tag that was just pushed must appear.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from cachetools import LRUCache

from proxy.backoff import Window, next_window
from proxy.config.model import BackoffConfig
from proxy.errors import (
    BlobUnknown,
    Denied,
    ManifestUnknown,
    NameUnknown,
    RegistryError,
    SecretRefused,
    TooManyRequests,
    UpstreamFailing,
)

E = TypeVar("E", bound=RegistryError)
K = TypeVar("K", bound=Hashable)

_MOST = 10_000


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt that failed, and the time in which there is no other."""

    error: RegistryError
    window: Window


class Failures(Generic[K]):
    """The failed attempts of one upstream, by what was asked and in whose name. At most 10,000 of each kind: many names that
    do not exist push out no failure."""

    def __init__(self, config: BackoffConfig, timer: Callable[[], float]) -> None:
        self._config = config
        self._timer = timer
        self._failures: LRUCache[K, Failed] = LRUCache(_MOST)
        self._noes: LRUCache[K, Failed] = LRUCache(_MOST)
        self._trying: set[K] = set()
        self._ended = -math.inf

    @contextmanager
    def attempt(self, key: K) -> Iterator[None]:
        """Asks, or raises what was answered last, where that was a short while ago or somebody is finding it out."""
        self.check(key)
        began = self._timer()
        is_trial = self._known(key) is not None
        if is_trial:
            self._trying.add(key)
        try:
            yield
        except RegistryError as error:
            self.remember(key, error, began=began)
            raise
        else:
            self.forget(key)
        finally:
            if is_trial:
                self._trying.discard(key)

    def check(self, key: K) -> None:
        """Raises what was answered last, if it may not be asked for again yet."""
        failed, now = self._known(key), self._timer()
        if failed is not None and (failed.window.left(now) > 0 or key in self._trying):
            raise again(failed.error, failed.window.left(now), now - failed.window.began)

    def remember(self, key: K, error: RegistryError, retry_after: float | None = None, began: float | None = None) -> None:
        """An attempt that ``began`` then has failed. ``retry_after``: the seconds that the registry asks to wait, 0 where it
        does not say; without it a 429 is not remembered: that is about who asks, not about what. Attempts that were under
        way together are one failure, and one from before an outage was over is none."""
        if error.is_remembered:
            return
        now, config = self._timer(), self._config
        began = now if began is None else began
        fresh = copy.copy(error)  # without its traceback, whose frames hold what was shown
        match error:
            case ManifestUnknown() | BlobUnknown() | NameUnknown():
                self._failures.pop(key, None)
                self._noes[key] = Failed(fresh, Window(now, config.not_found))
            case Denied() | SecretRefused():
                self._failures.pop(key, None)
                self._noes[key] = Failed(fresh, Window(now, config.refused))
            case TooManyRequests() if retry_after is None:
                pass
            case UpstreamFailing() if config.initial > 0 and began >= self._ended:
                last = self._failures.get(key)
                if last is not None and began <= last.window.began:
                    return
                self._noes.pop(key, None)
                window = next_window(last.window if last else None, now, config.initial, config.max)
                self._failures[key] = Failed(fresh, Window(now, retry_after) if retry_after else window)

    def forget(self, key: K) -> None:
        """It was given."""
        self._failures.pop(key, None)
        self._noes.pop(key, None)

    def forget_before(self, key: K, began: float) -> None:
        """What was asked for then was given: what failed before is forgotten, what has failed since holds."""
        if (failed := self._known(key)) is not None and failed.window.began < began:
            self.forget(key)

    def end(self, since: float = -math.inf) -> None:
        """What has failed since then may be asked for again: the registry is back. What it has refused it has answered."""
        self._ended = self._timer()
        for key in [key for key, failed in self._failures.items() if failed.window.began >= since]:
            del self._failures[key]

    def clear(self) -> None:
        """Everything may be asked for again."""
        self._failures.clear()
        self._noes.clear()

    def drop_expired(self) -> None:
        """Forgets what is over, and with it in whose name it was asked."""
        now = self._timer()
        for memory, kept in ((self._failures, 2 * self._config.max), (self._noes, 0.0)):
            for key, failed in list(memory.items()):
                if now - failed.window.began > max(failed.window.seconds, kept):
                    del memory[key]

    def all(self) -> dict[K, tuple[Failed, float]]:
        """What is not asked for now, and for how many seconds, for people."""
        now = self._timer()
        known = {**self._noes, **self._failures}
        return {key: (failed, left) for key, failed in known.items() if (left := failed.window.left(now)) > 0}

    def known(self) -> set[K]:
        """Everything that is remembered."""
        return {*self._noes, *self._failures}

    def _known(self, key: K) -> Failed | None:
        return self._failures.get(key) or self._noes.get(key)


def again(error: E, seconds: float, age: float) -> E:
    """An error of ``age`` seconds ago, for somebody for whom nobody was asked: the next attempt is in so many seconds."""
    wait = max(1, math.ceil(seconds))
    at = time.strftime("%H:%M:%S", time.gmtime(time.time() + wait))
    told = copy.copy(error)
    told.message = f"{error.message}; it was not asked again: the next attempt is in {wait} s, at {at} UTC"
    told.args = (told.message,)
    told.headers = {**error.headers, "Retry-After": str(wait)} if error.status in (429, 502, 503) else error.headers
    told.is_remembered, told.age = True, age
    return told
