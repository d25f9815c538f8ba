"""Downloads: one for each digest, whoever and however many ask for it.

The table of downloads in flight changes in ``join`` and ``_ended`` alone; beside it only failures are remembered. A second
download of a digest runs where the first cannot serve a reader: its window has moved on, or it has just failed. A fill
(``Fill``) is a task of its own: it outlives the clients that follow it, and none of them can slow it. It knows nothing of
registries: a *source* is whatever can open the content as a stream at an offset.

    source(0) -> hash, save, wake the readers -> broken? source(n) -> end: digest right? release the end
              -> fsync, rename, fsync, catalog -> held -> out of the table

A newcomer follows the open spool until the content is held, so there is no moment in which it is neither here nor there. A
download that waits for its turn (``admission``) is in the table and nothing else, without task and file; it goes when the
last who waits for it has gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable
from contextlib import closing
from functools import partial
from typing import Protocol

from cachetools import TTLCache

from proxy.admission import Admission, Ticket, Transfer
from proxy.errors import CacheFailing, RangeInvalid, RegistryError, UpstreamBroken, UpstreamUnavailable
from proxy.metrics import Metrics
from proxy.names import Digest
from proxy.spool import Abandoned, Spool, SpoolReader
from proxy.storage.base import Origin
from proxy.storage.store import Store
from proxy.threads import Threads

log = logging.getLogger(__name__)

VERIFIED_FIRST = 1024 * 1024
"""Content up to this size is verified before its status line, so that its failure has a status of its own."""

_REOPENS = 5
_PROGRESS = 64 * 1024
_DELAYS = (0.0, 0.1, 0.4, 1.0, 2.0)
_STUCK = 15 * 60.0
_FLOOR = 10 * 1024
_REMEMBERED = 30.0
_TURN = 15 * 60.0


class Stream(Protocol):
    """Content being received."""

    @property
    def offset(self) -> int:
        """Where in the content the first byte stands; not always where it was asked to."""
        ...

    @property
    def size(self) -> int | None:
        """Bytes of the whole content, if the sender told."""
        ...

    async def read(self) -> bytes:
        """Some more bytes; empty at a clean end. Raises ``UpstreamFailing`` when the stream breaks."""
        ...

    def blame(self) -> None:
        """What it brought was wrong: its sender is to be asked after others for a while."""
        ...

    def close(self) -> None:
        """Gives the connection back."""
        ...


Source = Callable[[int, int], Awaitable[Stream]]
"""Opens the content at an offset, at the endpoint whose turn the number is; raises ``RegistryError``."""


class Mismatch(UpstreamBroken):
    """The content is not what its digest or its manifest says. Asking the same endpoint again would not mend it."""


class _OtherSize(UpstreamBroken):
    """Who continues a download says that it has another size: one of them lies, and the next answer may tell who."""


class Fill:
    """One download."""

    def __init__(self, spool: Spool, origin: Origin, source: Source, turn: int, limit: int, floor: float) -> None:
        self.spool = spool
        self.origin = origin
        self._source = source
        self._turn = turn
        self._limit = limit
        self._floor = floor
        self.transfer: Transfer | None = None
        """What it is in the line; None before it is entered there."""
        self._floor_end = 0.0
        self._floor_bytes = 0

    def can_serve(self, origin: Origin, start: int, *, own: bool) -> bool:
        """Whether a client of ``origin`` that wants it from ``start`` on may follow. Nobody stands in the line of another
        upstream than his own. ``own``: nobody follows another origin, either."""
        if self.origin.name != origin.name and self.transfer is not None and self.transfer.state == "waiting":
            return False
        return (self.origin == origin or not own) and self.spool.serves(start)

    async def download(self, threads: Threads, metrics: Metrics) -> None:
        """Receives the content until it is complete and verified; raises ``RegistryError`` or ``Abandoned``."""
        spool, loop = self.spool, asyncio.get_running_loop()
        attempt = reopens = mark = 0
        clean_end: int | None = None
        moved = loop.time()
        while True:
            stream: Stream | None = None
            try:
                with closing(await self._source(spool.received, self._turn + attempt)) as stream:
                    self._agree(stream, attempt)
                    spool.announce()
                    await self._receive(stream, threads)
                if self._complete():
                    break
                broken: RegistryError = Mismatch(
                    f"the upstream ended {spool.digest} after {spool.received} bytes; expected "
                    f"{'other content' if spool.size is None else f'{spool.size} bytes'}"
                )
                if clean_end == spool.received:  # the same end twice: it is the end
                    raise broken
                clean_end = spool.received
            except RangeInvalid as error:
                raise Mismatch(f"{spool.digest} has no byte {spool.received} upstream, and is not complete") from error
            except Mismatch:
                if stream is not None and attempt == 0:  # of several, nobody knows which one lied
                    stream.blame()
                raise
            except RegistryError as error:
                if not spool.announced:
                    raise
                if self._complete():  # it broke behind the last byte
                    break
                broken = error
            if spool.received - mark >= _PROGRESS:
                mark, reopens, moved = spool.received, 0, loop.time()
            if reopens == _REOPENS or loop.time() - moved > _STUCK:
                raise Mismatch(broken.message) if isinstance(broken, _OtherSize) else broken
            log.info("%s broke off after %d bytes (%s): continuing", spool.digest, spool.received, broken)
            metrics.resumes.inc()
            await asyncio.sleep(_DELAYS[reopens])
            reopens += 1
            attempt += 1

    def _agree(self, stream: Stream, attempt: int) -> None:
        spool = self.spool
        if stream.offset > spool.received:
            raise UpstreamBroken(f"the upstream sent {spool.digest} from byte {stream.offset}, not {spool.received}")
        if stream.size is not None:
            if spool.size is None:
                spool.size = stream.size
            elif spool.size != stream.size:
                text = f"{spool.digest} is {spool.size} bytes, but the upstream announces {stream.size}"
                raise _OtherSize(text) if attempt else Mismatch(text)
        if (spool.size or 0) > self._limit:
            raise Mismatch(f"{spool.digest} has {spool.size} bytes; cache.maxBlobSize allows {self._limit}")

    async def _receive(self, stream: Stream, threads: Threads) -> None:
        spool = self.spool
        skip = spool.received - stream.offset  # the whole content may come where its rest was asked for
        limit = self._limit if spool.size is None else spool.size
        self._restart_floor()
        skip_end = asyncio.get_running_loop().time() + _STUCK
        while data := await self._read(stream):
            if skip:
                if asyncio.get_running_loop().time() > skip_end:
                    raise UpstreamUnavailable(f"the upstream repeats what is here of {spool.digest}, too slowly")
                data, skip = data[skip:], max(0, skip - len(data))
                if not data:
                    continue
            if spool.received + len(data) > limit:
                raise Mismatch(f"the upstream sends more than the {limit} bytes that {spool.digest} may have")
            before = asyncio.get_running_loop().time()
            await spool.commit(data, await threads.run(spool.absorb, data))
            self._floor_end += asyncio.get_running_loop().time() - before  # the disk and the readers are not its fault

    async def _read(self, stream: Stream) -> bytes:
        try:
            async with asyncio.timeout_at(self._floor_end):
                data = await stream.read()
        except TimeoutError as error:
            raise UpstreamUnavailable(f"the upstream sent under {_FLOOR} bytes in {self._floor:g} s") from error
        self._floor_bytes += len(data)
        if self._floor_bytes >= _FLOOR:
            self._restart_floor()
        return data

    def _restart_floor(self) -> None:
        self._floor_bytes = 0
        self._floor_end = asyncio.get_running_loop().time() + self._floor

    def _complete(self) -> bool:
        spool = self.spool
        if spool.size is None:
            return spool.agrees()
        if spool.received < spool.size:
            return False
        if not spool.agrees():
            raise Mismatch(f"the upstream's content is not what {spool.digest} names; nothing was kept")
        return True


class Fetcher:
    """The table of downloads in flight."""

    def __init__(self, store: Store, threads: Threads, metrics: Metrics, admission: Admission, limit: int) -> None:
        self._store = store
        self._threads = threads
        self._metrics = metrics
        self._admission = admission
        self._limit = limit
        self._fills: dict[Digest, Fill] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._turns: TTLCache[tuple[Digest, Origin], int] = TTLCache(4096, _TURN)
        self._failed: TTLCache[tuple[Digest, Origin], str] = TTLCache(4096, _REMEMBERED)

    def origin(self, digest: Digest) -> Origin | None:
        """Where a download in flight comes from, if there is one."""
        fill = self._fills.get(digest)
        return fill.origin if fill else None

    def join(
        self,
        digest: Digest,
        origin: Origin,
        source: Source,
        *,
        size: int | None,
        start: int,
        floor: float,
        image: Hashable = None,
        own: bool = False,
        again: bool = False,
    ) -> SpoolReader:
        """A reader of the download of ``digest``, which begins when its turn comes unless it is in flight.

        ``size``: as a manifest states it, if one does. ``start``: the first byte that the client wants. A client that comes
        back for the rest of content that has just turned out to be wrong is refused, so that it goes on elsewhere, whosever
        download it was; one that begins anew is not. ``image``: what is pulled, where that is counted. ``own``: not a
        download of another origin, which has just failed this client. ``again``: that download was this client's, who has
        been told nothing yet.
        """
        if start > 0 and not again and (reason := self._failed.get((digest, origin))) is not None:
            raise UpstreamBroken(f"the download failed a moment ago: {reason}")
        fill = self._fills.get(digest)
        if fill is not None and fill.can_serve(origin, start, own=own):
            self._metrics.followers.inc()
            reader = fill.spool.attach(start, origin, self._join_line(fill, image))
            reader.follows = True
            return reader
        spool = Spool(digest, None)
        spool.size = size
        turn = self._turns.get((digest, origin), 0)
        fill = self._fills[digest] = Fill(spool, origin, source, turn, self._limit, floor)
        return spool.attach(start, origin, self._join_line(fill, image))

    def _join_line(self, fill: Fill, image: Hashable) -> Ticket:
        if fill.transfer is not None:
            return self._admission.join(fill.transfer, image)
        ticket = self._admission.enter(
            fill.spool.digest, fill.origin.name, image, partial(self._start, fill), partial(self._drop, fill)
        )
        fill.transfer = ticket.transfer
        return ticket

    def _start(self, fill: Fill) -> None:
        """Its turn has come."""
        fill.spool.begin(self._store.spool(fill.spool.digest))
        task = asyncio.create_task(self._run(fill), name=f"fill {fill.spool.digest}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _drop(self, fill: Fill, reason: RegistryError | None) -> None:
        """Its turn will not come: it has waited too long, or for nobody any more."""
        if reason is not None:
            fill.spool.fail(reason)
        self._ended(fill)

    async def close(self) -> None:
        """Stops every download."""
        self._admission.close(CacheFailing("pullcache is shutting down"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, fill: Fill) -> None:
        self._metrics.in_flight.inc()
        result = "failed"
        try:
            await fill.download(self._threads, self._metrics)
            fill.spool.release()
            result = "held" if await self._save(fill) else "passed"
        except Abandoned:
            result = "abandoned"
            fill.spool.fail(CacheFailing("nobody was reading, and the disk takes no more"))
        except asyncio.CancelledError:
            fill.spool.fail(CacheFailing("pullcache is shutting down"))
            raise
        except RegistryError as error:
            self._remember(fill, error)
            fill.spool.fail(error)
        except Exception as error:
            log.exception("the download of %s failed by a fault of pullcache", fill.spool.digest)
            fill.spool.fail(CacheFailing(f"pullcache failed: {type(error).__name__}"))
        finally:
            self._ended(fill)
            if fill.transfer is not None:
                self._admission.end(fill.transfer, has_failed=result == "failed")
            self._metrics.fills.labels(result).inc()
            if result in ("passed", "abandoned"):
                self._metrics.unsaved.inc()
            self._metrics.in_flight.dec()

    async def _save(self, fill: Fill) -> bool:
        file = fill.spool.file
        if file is None:
            return False
        try:
            await self._threads.run(self._store.adopt, file, fill.spool.digest, fill.spool.received, fill.origin)
        except OSError as error:
            log.warning("%s was served but not saved: %s", fill.spool.digest, error)
            return False
        return True

    def _remember(self, fill: Fill, error: RegistryError) -> None:
        if fill.spool.announced or isinstance(error, Mismatch):
            log.warning("the download of %s failed: %s", fill.spool.digest, error)
        if isinstance(error, Mismatch):
            key = fill.spool.digest, fill.origin
            for origin in {fill.origin, *fill.spool.told}:  # who followed holds wrong bytes, too, and asks its own upstream
                self._failed[fill.spool.digest, origin] = str(error)
            self._turns[key] = self._turns.get(key, 0) + 1  # the next download begins at the next endpoint
            self._metrics.mismatches.labels(fill.origin.name).inc()

    def _ended(self, fill: Fill) -> None:
        if self._fills.get(fill.spool.digest) is fill:
            del self._fills[fill.spool.digest]
        fill.spool.finish()
