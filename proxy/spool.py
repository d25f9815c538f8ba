"""The bytes of one download, between the one who writes them and those who read them.

    0            saved          received                 size
    |--- file ---|--- window ---|...not yet here.........|

As a rule everything is in the file and the window is empty. Where the disk takes no more, the file stays as it is and a
bounded window in memory goes on in its place: it keeps what the slowest reader has not had, the writer waits while it is
full, and a reader that comes later than its beginning needs a download of its own. No client notices.

Of content whose size is known, the last ``WITHHELD`` bytes are not *released* to readers before ``release`` says that the
digest agrees: so a body never ends cleanly on wrong bytes. Where the size is not known, the end itself is withheld.

All methods but ``absorb`` belong to the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Protocol

from proxy.names import Digest
from proxy.storage.base import FileSpan, Origin, Piece
from proxy.storage.layout import SpoolFile

log = logging.getLogger(__name__)

WITHHELD = 64 * 1024
WINDOW = 8 * 1024 * 1024
_PIECE = 1024 * 1024


class Abandoned(Exception):
    """Nobody reads, and nothing is being saved: there is no reason to go on."""


class Place(Protocol):
    """A client's place in the line in which a download waits for its turn."""

    @property
    def runs(self) -> bool:
        """Whether the download has had its turn."""
        ...

    @property
    def may_run(self) -> bool:
        """Whether it runs, or waits for a slot of its upstream and nothing else."""
        ...

    def send_away(self) -> Exception:
        """What a client is told that has waited long enough."""
        ...

    def leave(self) -> None:
        """The client has gone."""
        ...


class Spool:
    """The growing content of one download."""

    def __init__(self, digest: Digest, file: SpoolFile | None) -> None:
        self.digest = digest
        self.received = 0
        self.size: int | None = None
        self.announced = False
        self.released = False
        self.failure: Exception | None = None
        self.told: set[Origin] = set()  # by what name those asked who were given a status, and so perhaps bytes
        self._file = file
        self._saving = file is not None
        self._saved = 0
        self._window = bytearray()
        self._window_start = 0
        self._hash = digest.hasher()
        self._readers: set[SpoolReader] = set()
        self._waiters: list[asyncio.Future[None]] = []
        self._writing = True

    # -- the writer --------------------------------------------------------------------------------------------------

    @property
    def file(self) -> SpoolFile | None:
        """The file that holds everything received, or None if it does not."""
        return self._file if self._saving else None

    def begin(self, file: SpoolFile | None) -> None:
        """The writer begins; what it saves goes to ``file``, if there is one."""
        self._file = file
        self._saving = file is not None

    def absorb(self, data: bytes) -> bool:
        """Hashes and saves ``data``: blocking, to be called in a thread. Whether the disk took it."""
        self._hash.update(data)
        if self._file is None or not self._saving:
            return False
        try:
            self._file.write(data, self.size)
        except OSError as error:
            log.warning("%s is passed through and not saved: %s", self.digest, error)
            return False
        return True

    async def commit(self, data: bytes, saved: bool) -> None:
        """Shows absorbed ``data`` to the readers; waits while the window is full. Raises ``Abandoned``."""
        self.received += len(data)
        if saved:
            self._saved = self.received
        else:
            if self._saving or not self._window:
                self._saving = False
                self._window_start = self.received - len(data)
            self._window += data
        self._wake()
        while not self._saving:
            self._trim()
            if not self._readers:
                raise Abandoned
            if len(self._window) < WINDOW:
                return
            await self.change()

    def announce(self) -> None:
        """The sender has begun: the size is known, if it ever will be before the end."""
        self.announced = True
        self._wake()

    def agrees(self) -> bool:
        """Whether what was received is what the digest names."""
        return self._hash.hexdigest() == self.digest.hex

    def release(self) -> None:
        """The digest agrees: readers may have the end."""
        self.size = self.received
        self.released = True
        self._wake()

    def fail(self, failure: Exception) -> None:
        """No more will come; readers get ``failure`` where the bytes end."""
        self.failure = failure
        self._wake()

    def finish(self) -> None:
        """The writer has ended; the file is given back when the last reader has."""
        self._writing = False
        self._give_back()

    # -- the readers -------------------------------------------------------------------------------------------------

    def serves(self, start: int) -> bool:
        """Whether a reader that begins at ``start`` can still be served."""
        return self.failure is None and (self._saving or self._window_start <= max(self._first(start), self._saved))

    def attach(self, start: int, origin: Origin | None = None, place: Place | None = None) -> SpoolReader:
        """A reader that will begin at ``start``, for a client that asked for the content as ``origin``'s."""
        reader = SpoolReader(self, self._first(start), origin, place)
        self._readers.add(reader)
        return reader

    def detach(self, reader: SpoolReader) -> None:
        """A reader has left."""
        self._readers.discard(reader)
        self._wake()
        self._give_back()

    def _first(self, start: int) -> int:
        """Where a reader really begins: of content of unknown size nobody can be given a part."""
        return start if self.size is not None else 0

    def readable(self) -> int:
        """Where the bytes end that readers may have now."""
        if self.released or self.size is None:
            return self.received
        return min(self.received, self.size - WITHHELD)

    def piece(self, start: int, stop: int) -> Piece:
        """Some bytes from ``start`` on, all before ``stop``, which is not past ``readable``."""
        if start < self._saved and self._file is not None:
            return FileSpan(self._file.descriptor, start, min(stop, self._saved) - start)
        offset = start - self._window_start
        if offset < 0:
            raise IndexError("these bytes are gone")  # by what serves() says it cannot be; never send others in their place
        return bytes(self._window[offset : min(stop - self._window_start, offset + _PIECE)])

    def moved(self) -> None:
        """A reader has moved on."""
        if not self._saving:
            self._wake()

    async def change(self) -> None:
        """Waits until something has changed."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _trim(self) -> None:
        needed = min((reader.position for reader in self._readers), default=self.received)
        surplus = min(needed - self._window_start, len(self._window))
        if surplus >= _PIECE or surplus == len(self._window) > 0:
            del self._window[:surplus]
            self._window_start += surplus

    def _give_back(self) -> None:
        if not self._writing and not self._readers and self._file is not None:
            self._file.close()
            self._file = None
            self._saving = False


class SpoolReader:
    """One client's way through the content, at its own pace."""

    def __init__(self, spool: Spool, start: int, origin: Origin | None, place: Place | None) -> None:
        self._spool = spool
        self._origin = origin
        self._place = place
        self.position = start
        self.follows = False  # whether another client had begun the download

    @property
    def digest(self) -> Digest:
        """What the bytes hash to."""
        return self._spool.digest

    @property
    def size(self) -> int | None:
        """Bytes in all, once known."""
        return self._spool.size

    async def ready(self, at_once_above: int, patience: float, proved_size: int | None = None) -> None:
        """Waits until a status can be given: small content is whole and verified, larger content has begun to come.

        Raises what the download failed with. ``patience`` bounds, in seconds, the wait for small content that has begun, and
        that for a download's turn. ``proved_size``: of content that the client is known to have a right to: after that
        patience it is given a status before the sender has begun, if nothing but a slot is waited for.
        """
        spool = self._spool
        if not await self._has_begun(patience):
            if proved_size is not None and proved_size == spool.size and proved_size > at_once_above and self._is_near():
                self._tell()
                return
            if self._place is not None and not self._place.runs:
                raise self._place.send_away()
            await self._has_begun(None)  # the sender's own limits bound it

        def decided() -> bool:
            larger = spool.received > at_once_above if spool.size is None else spool.size > at_once_above
            return spool.released or larger or spool.failure is not None

        try:
            async with asyncio.timeout(patience):
                while not decided():
                    await spool.change()
        except TimeoutError:
            pass
        if spool.failure is not None and not spool.released:
            raise spool.failure
        self._tell()

    async def _has_begun(self, patience: float | None) -> bool:
        """Waits for the sender to begin, or to fail; False: not within ``patience``."""
        try:
            async with asyncio.timeout(patience):
                while not self._spool.announced and self._spool.failure is None:
                    await self._spool.change()
        except TimeoutError:
            return False
        return True

    def _is_near(self) -> bool:
        return self._place is None or self._place.may_run

    def _tell(self) -> None:
        """The client is given a status."""
        if self._origin is not None:
            self._spool.told.add(self._origin)

    async def read(self, start: int, stop: int | None) -> AsyncIterator[Piece]:
        """The bytes as they become readable; raises what the download failed with where they end early."""
        spool = self._spool
        self.position = start
        while True:
            end = spool.readable() if stop is None else min(stop, spool.readable())
            if self.position < end:
                piece = spool.piece(self.position, end)
                yield piece
                self.position += piece.count if isinstance(piece, FileSpan) else len(piece)
                spool.moved()
            elif self.position == stop or (spool.released and self.position >= spool.received):
                return
            elif spool.failure is not None:
                raise spool.failure
            else:
                await spool.change()

    def close(self) -> None:
        """The client has had enough."""
        self._spool.detach(self)
        if self._place is not None:
            self._place.leave()
