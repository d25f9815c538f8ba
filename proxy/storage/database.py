"""A sqlite database: its form, a connection that reads, and one thread that writes in groups.

Reads are inline (microseconds, the pages are in memory). What waits to be written is committed together: many writes at once
cost as much as one.
"""

from __future__ import annotations

import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SCHEMA_1 = """
CREATE TABLE blobs (
  digest TEXT PRIMARY KEY, size INTEGER NOT NULL, media_type TEXT  -- media_type: of manifests, NULL for all else
) WITHOUT ROWID;
CREATE TABLE children (
  parent TEXT NOT NULL, digest TEXT NOT NULL, size INTEGER NOT NULL, PRIMARY KEY (parent, digest)
) WITHOUT ROWID;
CREATE INDEX children_by_digest ON children (digest);
CREATE TABLE links (
  digest TEXT NOT NULL, upstream TEXT NOT NULL, repository TEXT NOT NULL, PRIMARY KEY (digest, upstream, repository)
) WITHOUT ROWID;
CREATE TABLE tags (
  upstream TEXT NOT NULL, repository TEXT NOT NULL, tag TEXT NOT NULL, accept TEXT NOT NULL,
  digest TEXT NOT NULL, checked REAL NOT NULL, UNIQUE (upstream, repository, tag, accept, digest)
);
-- A tag may have two rows: where it points, and, until that manifest is held, where it pointed last that is held. Their
-- order is that of their row numbers: clocks go back.
"""
_SCHEMA_2 = """
CREATE TABLE referrers (
  upstream TEXT NOT NULL, repository TEXT NOT NULL, subject TEXT NOT NULL, body BLOB NOT NULL, checked REAL NOT NULL,
  PRIMARY KEY (upstream, repository, subject)
);
"""
_SCHEMA_3 = """
ALTER TABLE links ADD COLUMN proof TEXT NOT NULL DEFAULT 'anonymous';  -- whoever asked until now was
CREATE INDEX links_by_repository ON links (upstream, repository, proof);
ALTER TABLE referrers ADD COLUMN proof TEXT NOT NULL DEFAULT 'anonymous';
"""
_SCHEMA_4 = """
CREATE TABLE images (
  digest TEXT PRIMARY KEY, place INTEGER NOT NULL UNIQUE, pulled REAL NOT NULL, is_wanted INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE hand (place INTEGER NOT NULL);
CREATE TABLE loose (digest TEXT PRIMARY KEY, since REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX loose_by_age ON loose (since);
CREATE TABLE doomed (digest TEXT PRIMARY KEY) WITHOUT ROWID;  -- no record any more; the file is to be removed
INSERT INTO hand VALUES (0);
INSERT INTO images (digest, place, pulled)
  SELECT digest, row_number() OVER (), 1.0 * strftime('%s') FROM blobs WHERE media_type IS NOT NULL;
INSERT INTO loose SELECT digest, 1.0 * strftime('%s') FROM blobs WHERE media_type IS NULL AND NOT EXISTS
  (SELECT 1 FROM children JOIN blobs AS held ON held.digest = parent WHERE children.digest = blobs.digest);
"""
_SCHEMA_5 = """
ALTER TABLE blobs ADD COLUMN checked REAL DEFAULT 0;  -- when it was last found whole; NULL: before it is served
CREATE INDEX blobs_by_check ON blobs (checked);
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;  -- of the directory as a whole
"""
_STEPS = (_SCHEMA_1, _SCHEMA_2, _SCHEMA_3, _SCHEMA_4, _SCHEMA_5)
SCHEMA_VERSION = len(_STEPS)
_TABLES = {"blobs", "children", "links", "tags", "referrers", "images", "hand", "loose", "doomed", "facts"}
_GROUP = 256


Change = Callable[[sqlite3.Connection], object]


@dataclass(frozen=True, slots=True)
class _Job:
    change: Change
    future: Future[Any]
    is_durable: bool


class CatalogTooNew(Exception):
    """The database was written by a later version, which this one must not touch."""


class Database:
    """A database file. ``read``: the connection for reading."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.read = self._connect()
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="catalog", daemon=True)

    @classmethod
    def open(cls, path: Path) -> Database:
        """Opens, or makes, the database at ``path``; raises ``sqlite3.DatabaseError`` or ``CatalogTooNew``."""
        database = cls(path)
        try:
            database._prepare()
        except BaseException:
            database.read.close()
            raise
        database._thread.start()
        return database

    def _prepare(self) -> None:
        version = self.read.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise CatalogTooNew(
                f"{self._path} was written by a later version of pullcache (schema {version}; this knows {SCHEMA_VERSION}); "
                "use that version, or another directory"
            )
        self.read.execute("PRAGMA journal_mode = WAL")
        for number, step in enumerate(_STEPS[version:], start=version + 1):
            self.read.executescript(f"BEGIN; {step} PRAGMA user_version = {number}; COMMIT;")
        found = {row[0] for row in self.read.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        if not found >= _TABLES:
            raise sqlite3.DatabaseError("a table is missing")
        if (verdict := self.read.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(verdict)

    def close(self) -> None:
        """Commits what is queued, and closes."""
        self._queue.put(None)
        self._thread.join()
        self.read.close()

    def write(self, change: Change, *, is_durable: bool = False) -> Future[Any]:
        """Makes a change when it has its turn, whole or not at all. The future has its result once it is committed.

        ``is_durable``: and once it would survive a power cut; others do as soon as a later one is.
        """
        future: Future[Any] = Future()
        self._queue.put(_Job(change, future, is_durable))
        return future

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, timeout=5)
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    def _run(self) -> None:
        connection = self._connect()
        while True:
            group = [self._queue.get()]
            while len(group) < _GROUP and not self._queue.empty():
                group.append(self._queue.get())
            jobs = [job for job in group if job is not None]
            if not self._commit(connection, jobs) and len(jobs) > 1:
                for job in jobs:  # one of them is at fault: the others shall not share its fate
                    self._commit(connection, [job])
            if None in group:
                connection.close()
                return

    def _commit(self, connection: sqlite3.Connection, jobs: list[_Job]) -> bool:
        try:
            is_durable = any(job.is_durable for job in jobs)
            connection.execute(f"PRAGMA synchronous = {'FULL' if is_durable else 'NORMAL'}")
            connection.execute("BEGIN IMMEDIATE")
            results = [job.change(connection) for job in jobs]
            connection.execute("COMMIT")
        except Exception as error:  # also what is no text or no number for sqlite: the caller's to hear
            with contextlib.suppress(sqlite3.Error):
                connection.rollback()
            if len(jobs) == 1:
                jobs[0].future.set_exception(error if isinstance(error, sqlite3.Error) else sqlite3.DataError(str(error)))
            return False
        for job, result in zip(jobs, results, strict=True):
            job.future.set_result(result)
        return True
