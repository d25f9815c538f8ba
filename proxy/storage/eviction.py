"""Makes room in a cache directory: what goes is forgotten first, for good, and then its file is removed.

A crash between the two leaves a file without a record, of which the catalog knows that it is to go. Who has a file open
reads on; who opens one a moment too late misses it, and fetches it anew.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from cachetools import TTLCache

from proxy.metrics import Metrics
from proxy.names import Digest
from proxy.storage.catalog import Catalog
from proxy.storage.layout import Layout
from proxy.storage.replacement import LOOSE_AGE, STEPS, Evicted, Pull
from proxy.storage.space import charge

log = logging.getLogger(__name__)

IN_USE = 60.0
"""Seconds for which what a client has asked for stays: the rest of its image comes within that."""
_MOST = 65_536
_LOOKS = 20_000 // STEPS


class Eviction:
    """That of one directory; thread-safe. ``timer``: seconds, of a clock that is never set."""

    def __init__(self, layout: Layout, catalog: Catalog, metrics: Metrics, timer: Callable[[], float]) -> None:
        self._layout = layout
        self._catalog = catalog
        self._metrics = metrics
        self._used: TTLCache[Digest, None] = TTLCache(_MOST, IN_USE, timer=timer)
        self._young: TTLCache[Digest, None] = TTLCache(_MOST, IN_USE, timer=timer)
        self._pulls: dict[Digest, Pull] = {}
        self._marking = threading.Lock()  # for moments: the event loop waits for it
        self._placing: Counter[Digest] = Counter()
        self._files = threading.Lock()
        layout.space.evict = self._make_room

    def touch(self, digest: Digest, *, is_pull: bool) -> None:
        """Somebody uses content: it stays for a while. ``is_pull``: it is an image that is pulled."""
        with self._marking:
            self._used[digest] = None
            if is_pull:
                self._pulls[digest] = Pull(digest, time.time(), digest not in self._young)

    def entered(self, digest: Digest) -> None:
        """An image has come: what is asked of it for a while is one pull with that."""
        with self._marking:
            self._young[digest] = None

    @contextmanager
    def placing(self, digest: Digest) -> Iterator[None]:
        """Content gets its file, and then its record: no file of it is removed meanwhile."""
        with self._files:
            self._placing[digest] += 1
        try:
            yield
        finally:
            with self._files:
                self._placing[digest] -= 1
                self._placing += Counter()  # drops what is at 0

    def lost(self, digest: Digest) -> None:
        """Content has no file any more."""

        def count(done: Future[int | None]) -> None:
            if done.exception() is None and (size := done.result()) is not None:
                self._layout.space.drop(size)

        self._catalog.remove(digest).add_done_callback(count)

    def tidy(self) -> None:
        """Writes down what was pulled, removes loose blobs whose time is over, and makes room where it is short. Blocks."""
        try:
            if pulls := self._take_pulls():
                self._catalog.pulled(pulls).result()
            while self._remove(self._catalog.evict_loose(time.time() - LOOSE_AGE, self._is_in_use).result()):
                pass
        except sqlite3.Error as error:
            log.warning("the catalog was not written: %s", error)
        self._layout.space.shrink()

    def _make_room(self, need: int) -> int:
        """Removes content of ``need`` bytes, or what may go; the bytes that it took. Loose blobs go first, then images, then
        loose blobs that have just come."""
        freed = 0
        try:
            for evict in self._ways():
                while freed < need and (gone := evict(need - freed)):
                    freed += gone
        except sqlite3.Error as error:
            log.warning("the catalog was not written: %s", error)
        return freed

    def _ways(self) -> Iterator[Callable[[int], int]]:
        def loose(before: float) -> int:
            return self._remove(self._catalog.evict_loose(before, self._is_in_use).result())

        def images(need: int) -> int:
            for _ in range(_LOOKS):  # where all are marked or in use
                if gone := self._catalog.evict(need, self._is_in_use, self._take_pulls()).result():
                    return self._remove(gone)
            return 0

        yield lambda need: loose(time.time() - LOOSE_AGE)
        yield images
        yield lambda need: loose(time.time())

    def _take_pulls(self) -> list[Pull]:
        with self._marking:
            pulls, self._pulls = self._pulls, {}
        return list(pulls.values())

    def _is_in_use(self, digest: Digest) -> bool:
        is_made = digest in self._placing or any(spool.digest == digest for spool in tuple(self._layout.spools))
        return is_made or digest in self._used

    def _remove(self, gone: Collection[Evicted]) -> int:
        """Removes the files of what was forgotten; the bytes that they took."""
        removed = [each for each in gone if self._unlink(each)]
        self._metrics.evicted.inc(len(removed))
        self._catalog.removed([each.digest for each in removed])
        return sum(charge(each.size) for each in removed)

    def _unlink(self, gone: Evicted) -> bool:
        with self._files:
            if gone.digest in self._placing or self._catalog.blob(gone.digest) is not None:
                return False  # it has come back meanwhile
            try:
                self._layout.remove(gone.digest)
            except OSError as error:
                log.warning("the file of %s cannot be removed: %s", gone.digest, error)
                return False
        self._layout.space.drop(gone.size)
        return True
