"""What is known of the content: sizes, media types, who may be served what, and where tags pointed last.

An index only: all of it can be found again from the files, so losing it loses no content.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from cachetools import FIFOCache

from proxy.credentials.credential import Proof
from proxy.manifests import Manifest, is_same_for
from proxy.names import Digest, Repository, Tag, parse_digest
from proxy.storage import replacement
from proxy.storage.base import Origin
from proxy.storage.database import Database

_MAX_LISTS = 4096


@dataclass(frozen=True, slots=True)
class Tagged:
    """Where a tag pointed when its upstream was last asked (``checked``: seconds since the epoch)."""

    digest: Digest
    checked: float


@dataclass(frozen=True, slots=True)
class Listed:
    """What an upstream said that refers to a manifest, when it was last asked (seconds since the epoch)."""

    body: bytes
    checked: float


class Catalog:
    """The database of one cache directory."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._reader = database.read
        self._write = database.write
        self.withdrawals = 0
        """How many there were since it was opened."""
        self._withdrawn: FIFOCache[tuple[str, Repository, Proof], int] = FIFOCache(65536)
        self._withdrawing = threading.Lock()

    @classmethod
    def open(cls, path: Path) -> Catalog:
        """Opens, or makes, the database at ``path``; raises ``sqlite3.DatabaseError`` or ``CatalogTooNew``."""
        return cls(Database.open(path))

    def close(self) -> None:
        """Commits what is queued, and closes."""
        self._database.close()

    # -- reading ---------------------------------------------------------------------------------------------------

    def blob(self, digest: Digest) -> tuple[int, str | None] | None:
        """Size and media type (of manifests) of content that is held."""
        row = self._reader.execute("SELECT size, media_type FROM blobs WHERE digest = ?", (str(digest),)).fetchone()
        return (row[0], row[1]) if row else None

    def stated_size(self, upstream: str, repository: Repository, digest: Digest) -> int | None:
        """The size that a repository's manifests state for ``digest``, if all of them agree. What manifests of another
        repository say counts for nothing here: one that lies must not spoil the content for others."""
        rows = self._reader.execute(
            "SELECT DISTINCT size FROM children JOIN links ON links.digest = children.parent "
            "WHERE children.digest = ? AND upstream = ? AND repository = ?",
            (str(digest), upstream, repository),
        ).fetchall()
        return int(rows[0][0]) if len(rows) == 1 else None

    def is_linked(self, upstream: str, repository: Repository, digest: Digest, *, public: bool) -> bool:
        """Whether it was proved that ``digest`` is in that repository; ``public``: to the anonymous."""
        row = self._reader.execute(
            "SELECT 1 FROM links WHERE digest = ? AND upstream = ? AND repository = ? AND (proof = 'anonymous' OR NOT ?)",
            (str(digest), upstream, repository, public),
        ).fetchone()
        return row is not None

    def is_named(self, upstream: str, repository: Repository, digest: Digest, *, public: bool) -> bool:
        """Whether a manifest that is linked to that repository names ``digest``; ``public``: for the anonymous."""
        row = self._reader.execute(
            "SELECT 1 FROM children JOIN links ON links.digest = children.parent WHERE children.digest = ? "
            "AND upstream = ? AND repository = ? AND (proof = 'anonymous' OR NOT ?) LIMIT 1",
            (str(digest), upstream, repository, public),
        ).fetchone()
        return row is not None

    def named_by(self, upstream: str, repository: Repository, digest: Digest, latest: Sequence[Digest]) -> Digest | None:
        """A held manifest of that repository that names ``digest``: the first of ``latest`` that does, else any, but for
        equal questions the same."""
        naming = (
            "SELECT parent FROM children JOIN blobs ON blobs.digest = parent JOIN links ON links.digest = parent "
            "WHERE children.digest = ? AND upstream = ? AND repository = ?"
        )
        of_it = (str(digest), upstream, repository)
        for parent in latest:
            if self._reader.execute(f"{naming} AND parent = ?", (*of_it, str(parent))).fetchone():
                return parent
        row = self._reader.execute(f"{naming} ORDER BY parent LIMIT 1", of_it).fetchone()
        return parse_digest(row[0]) if row else None

    def is_others(self, upstream: str, digest: Digest) -> bool:
        """Whether ``digest`` was given neither by this upstream nor to the anonymous, and is held all the same, or was given
        by others. What is held and has no links at all was somebody's."""
        row = self._reader.execute(
            "SELECT (EXISTS (SELECT 1 FROM blobs WHERE digest = ?1) OR EXISTS (SELECT 1 FROM links WHERE digest = ?1)) "
            "AND NOT EXISTS (SELECT 1 FROM links WHERE digest = ?1 AND (upstream = ?2 OR proof = 'anonymous'))",
            (str(digest), upstream),
        ).fetchone()
        return bool(row[0])

    def is_public(self, digest: Digest) -> bool:
        """Whether some registry has given ``digest`` to the anonymous."""
        row = self._reader.execute(
            "SELECT 1 FROM links WHERE digest = ? AND proof = 'anonymous' LIMIT 1", (str(digest),)
        ).fetchone()
        return row is not None

    def is_void(self, origin: Origin) -> bool:
        """Whether the right by which something was got has been withdrawn since: then it proves nothing."""
        return self._withdrawn.get((origin.upstream, origin.repository, origin.proof), 0) > origin.since

    def was_given(self, upstream: str, repository: Repository, proof: Proof) -> bool:
        """Whether anything was given from that repository by that proof."""
        row = self._reader.execute(
            "SELECT 1 FROM links WHERE upstream = ?1 AND repository = ?2 AND proof = ?3 UNION ALL "
            "SELECT 1 FROM referrers WHERE upstream = ?1 AND repository = ?2 AND proof = ?3 LIMIT 1",
            (upstream, repository, proof),
        ).fetchone()
        return row is not None

    def tag(self, upstream: str, repository: Repository, tag: Tag, accept: str) -> Tagged | None:
        """The held manifest that the tag pointed at last, for clients of that class of ``Accept``; where there is none, the
        one of another class for which the upstream was asked last and that is the same for them."""
        rows = self._reader.execute(
            "SELECT digest, tags.checked, accept, media_type FROM tags JOIN blobs USING (digest) WHERE upstream = ? "
            "AND repository = ? AND tag = ? AND media_type IS NOT NULL ORDER BY accept = ? DESC, tags.rowid DESC",
            (upstream, repository, tag, accept),
        ).fetchall()
        for digest, checked, asked, media_type in rows:
            if asked == accept or is_same_for(media_type, asked, accept):
                return Tagged(parse_digest(digest), checked)
        return None

    def digests(self) -> dict[Digest, int]:
        """Digest and size of all that is held."""
        return {parse_digest(digest): size for digest, size in self._reader.execute("SELECT digest, size FROM blobs")}

    def doomed(self) -> list[Digest]:
        """What was forgotten, and has perhaps a file still."""
        rows = self._reader.execute(
            "SELECT digest FROM doomed WHERE NOT EXISTS (SELECT 1 FROM blobs WHERE blobs.digest = doomed.digest)"
        )
        return [parse_digest(row[0]) for row in rows]

    def tagged_digests(self, upstream: str, repository: Repository, tag: Tag, accept: str) -> list[Digest]:
        """Every manifest that the tag has a row for."""
        rows = self._reader.execute(
            "SELECT digest FROM tags WHERE upstream = ? AND repository = ? AND tag = ? AND accept = ?",
            (upstream, repository, tag, accept),
        )
        return [parse_digest(row[0]) for row in rows]

    def referrers(self, upstream: str, repository: Repository, subject: Digest, *, public: bool) -> Listed | None:
        """What refers to a manifest, as it was last said; ``public``: to the anonymous."""
        row = self._reader.execute(
            "SELECT body, checked FROM referrers WHERE upstream = ? AND repository = ? AND subject = ? "
            "AND (proof = 'anonymous' OR NOT ?)",
            (upstream, repository, str(subject), public),
        ).fetchone()
        return Listed(row[0], row[1]) if row else None

    def provenance(self, digest: Digest) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, str, str, float]]]:
        """Links (upstream, repository, proof) and tags (upstream, repository, tag, accept, checked) of a manifest."""
        links = self._reader.execute(
            "SELECT upstream, repository, proof FROM links WHERE digest = ?", (str(digest),)
        ).fetchall()
        tags = self._reader.execute(
            "SELECT upstream, repository, tag, accept, checked FROM tags WHERE digest = ?", (str(digest),)
        ).fetchall()
        return links, tags

    # -- writing: each returns a future that is done once the change is committed ------------------------------------
    #
    # Whether it is void is looked at when a write has its turn: if it is not, a withdrawal has its turn after it.

    def add(self, digest: Digest, size: int, manifest: Manifest | None = None) -> Future[int | None]:
        """Content is held from now on. The result: its size where it was held before."""

        def write(connection: sqlite3.Connection) -> int | None:
            media_type = manifest.media_type if manifest else None
            before = connection.execute("SELECT size FROM blobs WHERE digest = ?", (str(digest),)).fetchone()
            connection.execute(
                "INSERT INTO blobs (digest, size, media_type, checked) VALUES (?1, ?2, ?3, ?4) "
                "ON CONFLICT DO UPDATE SET size = ?2, media_type = ifnull(?3, media_type), checked = ?4",
                (str(digest), size, media_type, time.time()),
            )
            if manifest:
                connection.executemany(
                    "INSERT OR REPLACE INTO children VALUES (?, ?, ?)",
                    [(str(digest), str(child.digest), child.size) for child in manifest.children],
                )
            children = [child.digest for child in manifest.children] if manifest else None
            replacement.enter(connection, digest, children, time.time())
            return before[0] if before else None

        return self._write(write)

    def remove(self, digest: Digest) -> Future[int | None]:
        """Content is held no more. What named it, and what it named, stays proved. The result: its size, if it was held."""

        def write(connection: sqlite3.Connection) -> int | None:
            row = connection.execute("DELETE FROM blobs WHERE digest = ? RETURNING size", (str(digest),)).fetchone()
            replacement.leave(connection, digest)
            return row[0] if row else None

        return self._write(write)

    def evict(
        self, need: int, is_spared: replacement.Spared, pulls: Collection[replacement.Pull]
    ) -> Future[list[replacement.Evicted]]:
        """Forgets images until ``need`` bytes of content are to be removed, or after some steps. ``pulls``: the latest."""

        def write(connection: sqlite3.Connection) -> list[replacement.Evicted]:
            replacement.pulled(connection, pulls)
            return replacement.evict(connection, need, is_spared)

        return self._write(write, is_durable=True)

    def evict_loose(self, before: float, is_spared: replacement.Spared) -> Future[list[replacement.Evicted]]:
        """Forgets blobs that came before then and that no held manifest names."""
        return self._write(lambda connection: replacement.evict_loose(connection, before, is_spared), is_durable=True)

    def pulled(self, pulls: Collection[replacement.Pull]) -> Future[None]:
        """Images were pulled."""
        return self._write(lambda connection: replacement.pulled(connection, pulls))

    def removed(self, digests: Collection[Digest]) -> Future[None]:
        """The files of what was forgotten are removed."""
        rows = [(str(digest),) for digest in digests]
        return self._write(lambda connection: connection.executemany("DELETE FROM doomed WHERE digest = ?", rows))

    def link(self, origin: Origin, digest: Digest) -> Future[None]:
        """It was proved that ``digest`` is in that repository. What anybody may have needs no other proof; what a secret of
        this cache opens, none of a client's."""

        def write(connection: sqlite3.Connection) -> None:
            if not self.is_void(origin):
                connection.execute(
                    "INSERT INTO links VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET proof = excluded.proof "
                    "WHERE proof = 'client' OR excluded.proof = 'anonymous'",
                    (str(digest), origin.upstream, origin.repository, origin.proof),
                )

        return self._write(write)

    def withdraw(self, upstream: str, repository: Repository, proof: Proof) -> Future[list[Digest]]:
        """What was given from that repository by that proof is not given any more, nor what a right of before is still to
        bring. The result: what was linked by it."""
        row = (upstream, repository, proof)
        with self._withdrawing:
            self.withdrawals += 1
            self._withdrawn[row] = self.withdrawals

        def write(connection: sqlite3.Connection) -> list[Digest]:
            matches = "WHERE upstream = ? AND repository = ? AND proof = ?"
            linked = connection.execute(f"SELECT digest FROM links {matches}", row).fetchall()  # noqa: S608 - our own words
            for table in ("links", "referrers"):
                connection.execute(f"DELETE FROM {table} {matches}", row)  # noqa: S608 - our own words
            return [parse_digest(digest) for (digest,) in linked]

        return self._write(write)

    def share(self, digests: Collection[Digest]) -> Future[None]:
        """Of content whose links are lost: what only public manifests name was public, and is so again."""

        def write(connection: sqlite3.Connection) -> None:
            connection.executemany(
                "INSERT OR IGNORE INTO links SELECT ?1, upstream, repository, 'anonymous' FROM children "
                "JOIN links ON links.digest = parent WHERE children.digest = ?1 "
                "AND NOT EXISTS (SELECT 1 FROM links WHERE digest = ?1) AND NOT EXISTS (SELECT 1 FROM children AS c WHERE "
                "c.digest = ?1 AND NOT EXISTS (SELECT 1 FROM links AS l WHERE l.digest = c.parent "
                "AND l.proof = 'anonymous'))",
                [(str(digest),) for digest in digests],
            )

        return self._write(write)

    def set_tag(
        self, upstream: str, repository: Repository, tag: Tag, accept: str, digest: Digest, checked: float
    ) -> Future[None]:
        """The upstream says where the tag points."""
        row = (upstream, repository, tag, accept, str(digest), checked)

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT OR REPLACE INTO tags VALUES (?, ?, ?, ?, ?, ?)", row)  # a new row number each time
            connection.execute(
                "DELETE FROM tags WHERE upstream = ?1 AND repository = ?2 AND tag = ?3 AND accept = ?4 AND digest != ?5 AND "
                "(EXISTS (SELECT 1 FROM blobs WHERE blobs.digest = ?5 AND media_type IS NOT NULL) OR "
                "NOT EXISTS (SELECT 1 FROM blobs WHERE blobs.digest = tags.digest AND media_type IS NOT NULL))",
                row[:5],
            )

        return self._write(write)

    def forget_tag(self, upstream: str, repository: Repository, tag: Tag, accept: str) -> Future[None]:
        """The upstream says that the tag is gone, for clients of that class of ``Accept``."""
        row = (upstream, repository, tag, accept)
        return self._write(
            lambda connection: connection.execute(
                "DELETE FROM tags WHERE upstream = ? AND repository = ? AND tag = ? AND accept = ?", row
            )
        )

    def set_referrers(self, origin: Origin, subject: Digest, body: bytes, checked: float) -> Future[None]:
        """The upstream says what refers to a manifest. The oldest lists go when there are too many: those of the
        lowest row numbers, since clocks go back."""

        def write(connection: sqlite3.Connection) -> None:
            if self.is_void(origin):
                return
            row = (origin.upstream, origin.repository, str(subject), body, checked, origin.proof)
            connection.execute("INSERT OR REPLACE INTO referrers VALUES (?, ?, ?, ?, ?, ?)", row)
            connection.execute(
                "DELETE FROM referrers WHERE rowid <= (SELECT rowid FROM referrers ORDER BY rowid DESC LIMIT 1 OFFSET ?)",
                (_MAX_LISTS,),
            )

        return self._write(write)
