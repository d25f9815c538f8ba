"""How much of the disk one cache directory may take.

    |-- held --|-- granted to spools --|...free...|-- minFree --|
    |------------- cache.maxSize -------------|

Whoever writes asks first. So content, spools and catalog together never take more than ``cache.maxSize``, and what
``cache.minFree`` keeps free for others is not touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

_BLOCK = 4096
_TRIES = 8


@dataclass(frozen=True, slots=True)
class Limits:
    """``max_size``: bytes, None for all that the disk has; ``min_free``: bytes, or below 1 a part of the disk."""

    max_size: int | None
    min_free: float


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system: bytes in all, those that are free, and whether it can take another file."""

    size: int
    free: int
    takes_files: bool


def charge(size: int) -> int:
    """Bytes of the disk that content of a size takes, with what is noted beside it."""
    return -(-size // _BLOCK) * _BLOCK + _BLOCK


class Space:
    """That of one directory; thread-safe.

    ``disk``: raises ``OSError`` where it does not answer. ``own``: bytes that the directory takes beside content and spools.
    ``evict``: removes content of so many bytes, or what it can, and tells how many they were; it blocks.
    """

    def __init__(self, limits: Limits, disk: Callable[[], Disk], own: Callable[[], int]) -> None:
        self._limits = limits
        self._disk = disk
        self._own = own
        self.evict: Callable[[int], int] = lambda need: 0
        self._held = 0
        self._granted = 0
        self._unwritten = 0
        self._lock = threading.Lock()
        self._evicting = threading.Lock()

    @property
    def held(self) -> int:
        """Bytes that content takes."""
        return self._held

    def lacking(self, count: int = 0) -> int:
        """How many bytes have to go before ``count`` more may be written; none have to where it is not above 0."""
        try:
            disk = self._disk()
        except OSError:
            return max(count, 1)
        limits = self._limits
        floor = int(limits.min_free * disk.size if limits.min_free < 1 else limits.min_free)
        lack = floor + self._unwritten + count - disk.free
        if limits.max_size is not None:
            lack = max(lack, self._own() + self._held + self._granted + count - limits.max_size)
        return lack if disk.takes_files else max(lack, 1)

    def grant(self, count: int) -> bool:
        """Whether a spool may take ``count`` bytes more; content that has to give way for it goes. It blocks."""
        if self._limits.max_size is not None and count > self._limits.max_size:
            return False
        if self._try(count):
            return True
        with self._evicting:
            for _ in range(_TRIES):  # others write meanwhile
                if self._try(count):
                    return True
                if not self.evict(self.lacking(count)):
                    return False
        return False

    def shrink(self) -> None:
        """Makes room where it is short: others take of the disk, too. It blocks."""
        with self._evicting:
            if (lack := self.lacking()) > 0:
                self.evict(lack)

    def _try(self, count: int) -> bool:
        with self._lock:
            if self.lacking(count) > 0:
                return False
            self._granted += count
            self._unwritten += count
            return True

    def wrote(self, count: int) -> None:
        """So much of what was granted is on the disk."""
        with self._lock:
            self._unwritten -= count

    def give_back(self, granted: int, written: int) -> None:
        """A spool is gone, or is content now."""
        with self._lock:
            self._granted -= granted
            self._unwritten -= granted - written

    def keep(self, size: int) -> None:
        """Content of that size is held."""
        with self._lock:
            self._held += charge(size)

    def drop(self, size: int) -> None:
        """Content of that size is held no more."""
        with self._lock:
            self._held -= charge(size)

    def count(self, held: int) -> None:
        """All content takes so many bytes."""
        with self._lock:
            self._held = held
