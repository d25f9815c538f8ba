"""Files that change while we run: secrets and certificates are read again every few seconds, and at SIGHUP at once.

What cannot be used is said once, shown in the metrics for as long as it lasts, and changes nothing: what was good stays.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

from proxy import files
from proxy.metrics import Metrics
from proxy.threads import Threads

log = logging.getLogger(__name__)


class Faults(Exception):
    """What cannot be used of what was read, a line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = tuple(lines)


class Watch:
    """Reads again what may have changed: each ``reread`` uses what is new, and raises ``Faults``."""

    def __init__(self, seconds: float, metrics: Metrics) -> None:
        self._seconds = seconds
        self._metrics = metrics
        self._rereads: list[tuple[str, Callable[[], Awaitable[None]]]] = []
        self._faults: dict[str, tuple[str, ...]] = {}
        self._now = asyncio.Event()

    def add(self, what: str, reread: Callable[[], Awaitable[None]]) -> None:
        """Watches one thing more; ``what`` names it in the metrics."""
        self._rereads.append((what, reread))
        self._metrics.unusable_files.labels(what).set(0)

    def soon(self) -> None:
        """Looks at once."""
        self._now.set()

    async def look(self) -> None:
        """Reads everything once."""
        for what, reread in self._rereads:
            lines: tuple[str, ...] = ()
            try:
                await reread()
            except Faults as faults:
                lines = faults.lines
            except Exception:
                log.exception("%s could not be read again", what)
                continue
            before = self._faults.get(what, ())
            for line in lines:
                if line not in before:
                    log.error("%s", line)
            if before and not lines:
                log.info("%s: all can be used again", what)
            self._faults[what] = lines
            self._metrics.unusable_files.labels(what).set(len(lines))

    @property
    def faults(self) -> list[str]:
        """What could not be used when it was last read."""
        return [line for lines in self._faults.values() for line in lines]

    async def run(self) -> None:
        """Looks again and again, until it is cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await self._now.wait()
            self._now.clear()
            await self.look()


def when_changed(
    paths: Sequence[Path], use: Callable[[], None], faults: type[Exception] | tuple[type[Exception], ...], threads: Threads
) -> Callable[[], Awaitable[None]]:
    """A reread that calls ``use`` when the content of ``paths`` is another than last time; what ``use`` raises of
    ``faults`` is a fault of the files. The first time counts as a change: what is in use may be what was there before."""
    known: list[tuple[bytes, ...]] = []

    def contents() -> tuple[bytes, ...]:
        return tuple(files.read(path) for path in paths)

    async def reread() -> None:
        try:
            found = await threads.run(contents)
        except OSError as error:
            raise Faults(
                [f"{error.filename}: cannot be read: {error.strerror}; what it held before is still used"]
            ) from None
        if known == [found]:
            return
        try:
            await threads.run(use)
        except faults as error:
            raise Faults([f"{error}; what it held before is still used"]) from None
        if known:
            log.info("%s: the new content is used", ", ".join(str(path) for path in paths))
        known.clear()
        with suppress(OSError):  # what changed while it was used is perhaps not what is in use
            if await threads.run(contents) == found:
                known.append(found)

    return reread
