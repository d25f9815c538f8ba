"""What a start finds again: the catalog is an index, and the files are the truth."""

from __future__ import annotations

import errno
import hashlib
import logging
import sqlite3
from concurrent.futures import Future
from typing import Any

from proxy.credentials.credential import Proof
from proxy.errors import RegistryError
from proxy.manifests import MAX_BYTES, ManifestInvalid, parse_manifest
from proxy.metrics import Metrics
from proxy.names import Digest, Repository, Tag, parse_repository, parse_tag
from proxy.storage.base import Origin
from proxy.storage.catalog import Catalog
from proxy.storage.layout import DirectoryUnusable, Layout

log = logging.getLogger(__name__)

_TagNote = tuple[str, Repository, Tag, str, Digest, float]


def open_catalog(layout: Layout) -> Catalog:
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
            return open_catalog(layout)
        raise DirectoryUnusable(f"cache.directory: {path} cannot be opened: {error}") from error
    except sqlite3.DatabaseError as error:
        log.warning("the catalog is damaged (%s): it is set aside and found again from the files", error)
        for name in ("cache.db", "cache.db-wal", "cache.db-shm"):
            if (layout.path / name).exists():
                layout.set_aside(name)
        return Catalog.open(path)


def reconcile(layout: Layout, catalog: Catalog, metrics: Metrics) -> None:
    """Makes the catalog say what the files are."""
    for digest in (doomed := catalog.doomed()):
        layout.remove(digest)
    catalog.removed(doomed)
    known = catalog.digests()
    pending: list[Future[Any]] = []
    found: list[Digest] = []
    tags: list[_TagNote] = []
    contents = dict(layout.contents())
    for digest, size in contents.items():
        if known.pop(digest, None) is None:
            pending += _recover(layout, catalog, metrics, digest, size, tags)
            if layout.read_meta(digest) is None:
                found.append(digest)
    pending += [catalog.remove(digest) for digest in known]
    pending.append(catalog.share(found))
    try:
        layout.drop_notes(contents)
    except OSError as error:
        log.warning("notes beside content that is not there were not removed: %s", error)
    pending += [catalog.set_tag(*note) for note in sorted(tags, key=lambda note: note[-1])]
    for future in pending:
        if (failure := future.exception()) is not None:
            log.warning("the catalog was not written: %s", failure)


def _recover(
    layout: Layout, catalog: Catalog, metrics: Metrics, digest: Digest, size: int, tags: list[_TagNote]
) -> list[Future[Any]]:
    """Enters a file without a record, if it holds what its name says.

    Without notes beside it nothing is known of who may read it: unless public manifests alone name it, its first
    reader costs a download.
    """
    try:
        body = _verified(layout, metrics, digest, size)
    except OSError:
        return []
    meta = layout.read_meta(digest)
    if meta is None or (body is None and meta.get("mediaType") is not None):
        return [catalog.add(digest, size)]
    try:
        media_type = meta["mediaType"]
        manifest = parse_manifest(body, str(media_type)) if body is not None and media_type is not None else None
        links = [Origin(str(link["upstream"]), parse_repository(link["repository"]), _proof(link)) for link in meta["links"]]
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
        return [catalog.add(digest, size)]
    return [catalog.add(digest, size, manifest), *(catalog.link(link, digest) for link in links)]


def _verified(layout: Layout, metrics: Metrics, digest: Digest, size: int) -> bytes | None:
    """The content if it is small enough to be a manifest, else None; raises ``OSError`` where it is not what it
    should be, and sets it aside."""
    descriptor = layout.open_blob(digest, size)
    if descriptor is None:
        raise FileNotFoundError(digest.hex)
    with open(descriptor, "rb") as file:
        found = hashlib.file_digest(file, digest.algorithm).hexdigest()
        if found != digest.hex:
            metrics.quarantined.inc()
            layout.set_aside_blob(digest)
            raise OSError(errno.EIO, "the content is not what its name says", digest.hex)
        file.seek(0)
        return file.read() if size <= MAX_BYTES else None


def _proof(link: dict[str, object]) -> Proof:
    """To whom a link says that content was given; before it was written down, everything was asked for anonymously."""
    proof = link.get("proof", "anonymous")
    return "anonymous" if proof == "anonymous" else "secret" if proof == "secret" else "client"
