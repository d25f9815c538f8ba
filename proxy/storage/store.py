"""One cache directory: the files and the catalog together.

Content is *held* once its file is complete, hashed, synced, on its final name, and in the catalog, in that order. A
crash between these steps leaves either a spool, which the next start removes, or a file without a record, which the
next start enters. Whose it is comes before all that: its link is in the catalog, and beside it what the link is found
again from (*notes*; public blobs have none), before its file has its final name. Files are the truth; the catalog is
found again from them.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from proxy.credentials.credential import Proof
from proxy.errors import CacheFailing
from proxy.manifests import Manifest
from proxy.metrics import Metrics
from proxy.names import Digest, Repository, Tag
from proxy.storage.base import Origin, StoredBlob
from proxy.storage.catalog import Catalog, Listed, Tagged
from proxy.storage.eviction import Eviction
from proxy.storage.layout import UNBOUNDED, Layout, SpoolFile
from proxy.storage.recovery import open_catalog, reconcile
from proxy.storage.space import Limits, charge

log = logging.getLogger(__name__)

T = TypeVar("T")
_MAX_LIST = 256 * 1024
_TagNote = tuple[str, Repository, Tag, str, Digest, float]


class Store:
    """Content by digest, and what is known of it. Errors of disk and database end here: reading what cannot be read is
    a miss, and what cannot be saved is not saved."""

    def __init__(self, layout: Layout, catalog: Catalog, metrics: Metrics, timer: Callable[[], float]) -> None:
        self._layout = layout
        self._catalog = catalog
        self._metrics = metrics
        self._notes = threading.Lock()
        self._eviction = Eviction(layout, catalog, metrics, timer)

    @classmethod
    def open(
        cls,
        directory: Path,
        metrics: Metrics,
        limits: Limits = UNBOUNDED,
        timer: Callable[[], float] = time.monotonic,
    ) -> Store:
        """Opens the directory and makes catalog and files agree; raises ``DirectoryUnusable``, ``CatalogTooNew``."""
        layout = Layout.open(directory, limits)
        try:
            store = cls(layout, open_catalog(layout), metrics, timer)
        except BaseException:
            layout.close()
            raise
        try:
            layout.prepare()
            reconcile(layout, store._catalog, metrics)
            layout.space.count(sum(map(charge, store._catalog.digests().values())))
        except BaseException:
            store.close()
            raise
        return store

    def close(self) -> None:
        """Commits what is pending and gives the directory up."""
        self._catalog.close()
        self._layout.close()

    @property
    def withdrawals(self) -> int:
        """How many withdrawals there were since the start."""
        return self._catalog.withdrawals

    # -- reading: inline, microseconds -------------------------------------------------------------------------------

    def open_blob(self, digest: Digest) -> StoredBlob | None:
        """The content if it is held. The caller closes it."""
        try:
            entry = self._catalog.blob(digest)
            if entry is None:
                return None
            try:
                descriptor = self._layout.open_blob(digest, entry[0])
            except FileNotFoundError:
                self._metrics.quarantined.inc()
                descriptor = None
            if descriptor is None:
                self._eviction.lost(digest)
                return None
            return StoredBlob(digest, descriptor, entry[0])
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise CacheFailing("pullcache has too many files open; raise its limit (ulimit -n)") from error
            log.warning("%s cannot be opened: %s", digest, error)
            return None
        except sqlite3.Error:
            log.exception("the catalog cannot be read")
            return None

    def has(self, digest: Digest) -> bool:
        """Whether the content is held."""
        return self._read(lambda: self._catalog.blob(digest)) is not None

    def held_size(self, digest: Digest) -> int | None:
        """Bytes of content that is held."""
        entry = self._read(lambda: self._catalog.blob(digest))
        return entry[0] if entry else None

    def manifest(self, digest: Digest) -> tuple[bytes, str, float] | None:
        """Bytes and media type of a manifest that is held, and when it was stored (seconds since the epoch)."""
        entry = self._read(lambda: self._catalog.blob(digest))
        if entry is None or entry[1] is None or (blob := self.open_blob(digest)) is None:
            return None
        try:
            body, stored = os.pread(blob.descriptor, blob.size, 0), blob.stored
        except OSError:
            return None
        finally:
            blob.close()
        # The whole is in memory anyway, so rot is seen here and not at the client.
        return (body, entry[1], stored) if digest.matches(body) else None

    def size_of(self, upstream: str, repository: Repository, digest: Digest) -> int | None:
        """The size as held manifests of that repository state it."""
        return self._read(lambda: self._catalog.stated_size(upstream, repository, digest))

    def is_linked(self, upstream: str, repository: Repository, digest: Digest, *, public: bool) -> bool:
        """Whether it was proved that ``digest`` is in that repository; ``public``: to the anonymous."""
        return bool(self._read(lambda: self._catalog.is_linked(upstream, repository, digest, public=public)))

    def is_named(self, upstream: str, repository: Repository, digest: Digest, *, public: bool) -> bool:
        """Whether a manifest that is linked to that repository names ``digest``; ``public``: for the anonymous."""
        return bool(self._read(lambda: self._catalog.is_named(upstream, repository, digest, public=public)))

    def named_by(self, upstream: str, repository: Repository, digest: Digest, latest: Sequence[Digest]) -> Digest | None:
        """A held manifest of that repository that names ``digest``: the first of ``latest`` that does, else any."""
        return self._read(lambda: self._catalog.named_by(upstream, repository, digest, latest))

    def is_others(self, upstream: str, digest: Digest) -> bool:
        """Whether ``digest`` is private content that this upstream never gave, or whose links are all gone: then its word
        that it has it proves nothing, the bytes alone do."""
        return bool(self._read(lambda: self._catalog.is_others(upstream, digest)))

    def is_public(self, digest: Digest) -> bool:
        """Whether some registry has given ``digest`` to the anonymous."""
        return bool(self._read(lambda: self._catalog.is_public(digest)))

    def was_given(self, upstream: str, repository: Repository, proof: Proof) -> bool:
        """Whether anything was given from that repository by that proof, and that was not withdrawn."""
        return bool(self._read(lambda: self._catalog.was_given(upstream, repository, proof)))

    def tagged(self, upstream: str, repository: Repository, tag: Tag, accept: str) -> Tagged | None:
        """Where the tag pointed last, for clients of that class of ``Accept`` or others that would be given the same."""
        return self._read(lambda: self._catalog.tag(upstream, repository, tag, accept))

    def referrers(self, upstream: str, repository: Repository, subject: Digest, *, public: bool) -> Listed | None:
        """What the upstream last said that refers to a manifest; ``public``: to the anonymous."""
        return self._read(lambda: self._catalog.referrers(upstream, repository, subject, public=public))

    def touch(self, digest: Digest, *, is_pull: bool = False) -> None:
        """Somebody uses content: it stays for a while. ``is_pull``: it is an image that is pulled."""
        self._eviction.touch(digest, is_pull=is_pull)

    # -- writing: blocking, to be called in a thread -----------------------------------------------------------------

    def spool(self, digest: Digest) -> SpoolFile | None:
        """A file for a download, or None when the disk takes no more."""
        try:
            return self._layout.spool(digest)
        except OSError as error:
            log.warning("nothing can be saved: %s", error)
            return None

    def adopt(self, spool: SpoolFile, digest: Digest, size: int, origin: Origin) -> None:
        """Holds a finished, verified download from now on; raises ``OSError`` when it cannot."""
        try:
            self._hold(spool, origin, digest, size)
        except sqlite3.Error as error:
            raise OSError(errno.EIO, f"the catalog was not written: {error}") from error

    def put_manifest(self, origin: Origin, digest: Digest, body: bytes, manifest: Manifest) -> bool:
        """Holds a verified manifest and its link from now on. False when the disk did not take it."""
        spool = self.spool(digest)
        if spool is None:
            self._metrics.unsaved.inc()
            return False
        try:
            try:
                spool.write(body, len(body))
                self._hold(spool, origin, digest, len(body), manifest)
            finally:
                spool.close()
            return True
        except (OSError, sqlite3.Error) as error:
            log.warning("%s was not saved: %s", digest, error)
            self._metrics.unsaved.inc()
            return False

    def set_tag(self, upstream: str, repository: Repository, tag: Tag, accept: str, digest: Digest, checked: float) -> None:
        """Remembers where the upstream says that the tag points."""
        before = self._tag_rows(upstream, repository, tag, accept)
        if self._wait(self._catalog.set_tag(upstream, repository, tag, accept, digest, checked)) and before != [digest]:
            self._write_notes({digest, *before})

    def forget_tag(self, upstream: str, repository: Repository, tag: Tag, accept: str) -> None:
        """Forgets a tag that its upstream no longer has, for clients of that class of ``Accept``."""
        before = self._tag_rows(upstream, repository, tag, accept)
        if before and self._wait(self._catalog.forget_tag(upstream, repository, tag, accept)):
            self._write_notes(set(before))

    def link(self, origin: Origin, digest: Digest) -> None:
        """Remembers that the upstream has ``digest`` in that repository."""
        if self._wait(self._catalog.link(origin, digest)):
            self._write_notes({digest}, always=origin.proof != "anonymous")

    def withdraw(self, upstream: str, repository: Repository, proof: Proof) -> None:
        """Forgets that anything was given from that repository by that proof; the content stays, for who may read it."""
        try:
            linked = self._catalog.withdraw(upstream, repository, proof).result()
        except sqlite3.Error as error:
            log.warning("the catalog was not written: %s", error)
            return
        if linked:
            log.warning(
                "%s of %s is not given any more (%s): %d links are withdrawn", repository, upstream, proof, len(linked)
            )
            self._write_notes(set(linked), always=True)  # what is public once more has them too: they say so

    def put_referrers(self, origin: Origin, subject: Digest, body: bytes, checked: float) -> None:
        """Remembers what the upstream says that refers to a manifest; a list that is very long is not kept."""
        if len(body) <= _MAX_LIST and self._layout.space.lacking(len(body)) <= 0:
            self._wait(self._catalog.set_referrers(origin, subject, body, checked))

    def _hold(self, spool: SpoolFile, origin: Origin, digest: Digest, size: int, manifest: Manifest | None = None) -> None:
        """Holds what is in ``spool``; raises ``OSError``, ``sqlite3.Error``. First it is somebody's, then it is there: held
        and nobody's yet it would be anybody's for a moment, and after a crash in it."""
        self._catalog.link(origin, digest).result()
        is_private = self.is_void(origin) or origin.proof != "anonymous"
        if is_private or manifest is not None or self._layout.read_meta(digest) is not None:
            self._write_meta(digest, manifest.media_type if manifest else None)
        with self._eviction.placing(digest):
            spool.adopt(digest)
            before = self._catalog.add(digest, size, manifest).result()
        if before is not None:
            self._layout.space.drop(before)
        elif manifest is not None:
            self._eviction.entered(digest)

    def tidy(self) -> None:
        """Removes what is nobody's, and what is too much; to be called now and then."""
        self._eviction.tidy()

    def is_void(self, origin: Origin) -> bool:
        """Whether the right by which something was got has been withdrawn since: then it proves nothing."""
        return self._catalog.is_void(origin)

    def _tag_rows(self, upstream: str, repository: Repository, tag: Tag, accept: str) -> list[Digest]:
        return self._read(lambda: self._catalog.tagged_digests(upstream, repository, tag, accept)) or []

    def _write_notes(self, digests: set[Digest], *, always: bool = False) -> None:
        """Renews what is written beside content, after the catalog has changed. ``always``: also beside what has no notes
        and is not held yet, so that it is known to be private."""
        for digest in digests:
            try:
                entry = self._catalog.blob(digest)
                is_noted = entry is not None and (entry[1] is not None or self._layout.read_meta(digest) is not None)
                if always or is_noted:
                    self._write_meta(digest)
            except (OSError, sqlite3.Error) as error:
                log.warning("what is known of %s is in the catalog only: %s", digest, error)

    def _wait(self, future: Future[None]) -> bool:
        try:
            future.result()
        except sqlite3.Error as error:
            log.warning("the catalog was not written: %s", error)
            return False
        return True

    def _read(self, query: Callable[[], T]) -> T | None:
        try:
            return query()
        except sqlite3.Error:
            log.exception("the catalog cannot be read")
            return None

    def _write_meta(self, digest: Digest, media_type: str | None = None) -> None:
        """Renews what is written beside content; ``media_type``: of a manifest that the catalog does not know yet."""
        with self._notes:  # what is read last is written last
            entry = self._catalog.blob(digest)
            links, tags = self._catalog.provenance(digest)
            self._layout.write_meta(
                digest,
                {
                    "mediaType": media_type or (entry[1] if entry else None),
                    "links": [
                        {"upstream": upstream, "repository": repository, "proof": proof}
                        for upstream, repository, proof in links
                    ],
                    "tags": [
                        {"upstream": upstream, "repository": repository, "tag": tag, "accept": accept, "checked": checked}
                        for upstream, repository, tag, accept, checked in tags
                    ],
                },
            )
