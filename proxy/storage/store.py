"""One cache directory: the files and the catalog together.

Content is *held* once its file is complete, hashed, synced, on its final name, and in the catalog, in that order. A
crash between these steps leaves either a spool, which the next start removes, or a file without a record, which the
next start enters. Whose it is comes before all that: its link is in the catalog, and beside it what the link is found
again from (*notes*; public blobs have none), before its file has its final name. Files are the truth; the catalog is
found again from them.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from proxy.credentials.credential import Proof
from proxy.errors import CacheFailing, RegistryError
from proxy.manifests import MAX_BYTES, Manifest, ManifestInvalid, parse_manifest
from proxy.metrics import Metrics
from proxy.names import Digest, Repository, Tag, parse_repository, parse_tag
from proxy.storage.base import Origin, StoredBlob
from proxy.storage.catalog import Catalog, Listed, Tagged
from proxy.storage.layout import DirectoryUnusable, Layout, SpoolFile

log = logging.getLogger(__name__)

T = TypeVar("T")
_MAX_LIST = 256 * 1024
_TagNote = tuple[str, Repository, Tag, str, Digest, float]


class Store:
    """Content by digest, and what is known of it. Errors of disk and database end here: reading what cannot be read is
    a miss, and what cannot be saved is not saved."""

    def __init__(self, layout: Layout, catalog: Catalog, metrics: Metrics) -> None:
        self._layout = layout
        self._catalog = catalog
        self._metrics = metrics
        self._notes = threading.Lock()

    @classmethod
    def open(cls, directory: Path, metrics: Metrics) -> Store:
        """Opens the directory and makes catalog and files agree; raises ``DirectoryUnusable``, ``CatalogTooNew``."""
        layout = Layout.open(directory)
        try:
            store = cls(layout, _open_catalog(layout), metrics)
        except BaseException:
            layout.close()
            raise
        try:
            layout.prepare()
            store._reconcile()
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
                self._catalog.remove(digest)
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

    # -- writing: blocking, to be called in a thread -----------------------------------------------------------------

    def spool(self) -> SpoolFile | None:
        """A file for a download, or None when the disk should take no more."""
        if not self._layout.has_room():
            return None
        try:
            return self._layout.spool()
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
        spool = self.spool()
        if spool is None:
            self._metrics.unsaved.inc()
            return False
        try:
            try:
                spool.write(body)
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
        if len(body) <= _MAX_LIST and self._layout.has_room():
            self._wait(self._catalog.set_referrers(origin, subject, body, checked))

    def _hold(self, spool: SpoolFile, origin: Origin, digest: Digest, size: int, manifest: Manifest | None = None) -> None:
        """Holds what is in ``spool``; raises ``OSError``, ``sqlite3.Error``. First it is somebody's, then it is there: held
        and nobody's yet it would be anybody's for a moment, and after a crash in it."""
        self._catalog.link(origin, digest).result()
        is_private = self.is_void(origin) or origin.proof != "anonymous"
        if is_private or manifest is not None or self._layout.read_meta(digest) is not None:
            self._write_meta(digest, manifest.media_type if manifest else None)
        spool.adopt(digest)
        self._catalog.add(digest, size, manifest).result()

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

    def _reconcile(self) -> None:
        """Makes the catalog say what the files are."""
        known = self._catalog.digests()
        pending: list[Future[None]] = []
        found: list[Digest] = []
        tags: list[_TagNote] = []
        contents = dict(self._layout.contents())
        for digest, size in contents.items():
            if known.pop(digest, None) is None:
                pending += self._recover(digest, size, tags)
                if self._layout.read_meta(digest) is None:
                    found.append(digest)
        pending += [self._catalog.remove(digest) for digest in known]
        pending.append(self._catalog.share(found))
        try:
            self._layout.drop_notes(contents)
        except OSError as error:
            log.warning("notes beside content that is not there were not removed: %s", error)
        pending += [self._catalog.set_tag(*note) for note in sorted(tags, key=lambda note: note[-1])]
        for future in pending:
            self._wait(future)

    def _recover(self, digest: Digest, size: int, tags: list[_TagNote]) -> list[Future[None]]:
        """Enters a file without a record, if it holds what its name says.

        Without notes beside it nothing is known of who may read it: unless public manifests alone name it, its first
        reader costs a download.
        """
        try:
            body = self._verified(digest, size)
        except OSError:
            return []
        meta = self._layout.read_meta(digest)
        if meta is None or (body is None and meta.get("mediaType") is not None):
            return [self._catalog.add(digest, size)]
        try:
            media_type = meta["mediaType"]
            manifest = parse_manifest(body, str(media_type)) if body is not None and media_type is not None else None
            links = [
                Origin(str(link["upstream"]), parse_repository(link["repository"]), _proof(link)) for link in meta["links"]
            ]
            tags += [
                (
                    str(note["upstream"]),
                    parse_repository(note["repository"]),
                    parse_tag(note["tag"]),
                    str(note["accept"]),
                    digest,
                    float(note["checked"]),
                )
                for note in meta["tags"]
            ]
        except (KeyError, TypeError, ValueError, RegistryError, ManifestInvalid):
            log.warning("what is written beside %s cannot be read", digest)
            return [self._catalog.add(digest, size)]
        return [self._catalog.add(digest, size, manifest), *(self._catalog.link(link, digest) for link in links)]

    def _verified(self, digest: Digest, size: int) -> bytes | None:
        """The content if it is small enough to be a manifest, else None; raises ``OSError`` where it is not what it
        should be, and sets it aside."""
        descriptor = self._layout.open_blob(digest, size)
        if descriptor is None:
            raise FileNotFoundError(digest.hex)
        with open(descriptor, "rb") as file:
            found = hashlib.file_digest(file, digest.algorithm).hexdigest()
            if found != digest.hex:
                self._metrics.quarantined.inc()
                self._layout.set_aside_blob(digest)
                raise OSError(errno.EIO, "the content is not what its name says", digest.hex)
            file.seek(0)
            return file.read() if size <= MAX_BYTES else None


def _proof(link: dict[str, object]) -> Proof:
    """To whom a link says that content was given; before it was written down, everything was asked for anonymously."""
    proof = link.get("proof", "anonymous")
    return "anonymous" if proof == "anonymous" else "secret" if proof == "secret" else "client"


def _open_catalog(layout: Layout) -> Catalog:
    """The catalog of a directory; a damaged one is set aside, and what it said is found again from the files.

    Raises ``DirectoryUnusable`` where it cannot be opened just now.
    """
    path = layout.path / "cache.db"
    try:
        if path.exists() and not path.is_file():
            raise sqlite3.DatabaseError("it is not a file")
        return Catalog.open(path)
    except sqlite3.OperationalError as error:
        if layout.give_up_reserve():
            return _open_catalog(layout)
        raise DirectoryUnusable(f"cache.directory: {path} cannot be opened: {error}") from error
    except sqlite3.DatabaseError as error:
        log.warning("the catalog is damaged (%s): it is set aside and found again from the files", error)
        for name in ("cache.db", "cache.db-wal", "cache.db-shm"):
            if (layout.path / name).exists():
                layout.set_aside(name)
        return Catalog.open(path)
