"""Files and catalog together: files are the truth, and whatever is lost of the catalog is found again from them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxy.manifests import OCI_MANIFEST, parse_manifest
from proxy.metrics import Metrics
from proxy.names import Digest, Repository, Tag, digest_of
from proxy.storage.catalog import SCHEMA_VERSION, CatalogTooNew
from proxy.storage.layout import DirectoryUnusable
from proxy.storage.store import Store

UP, REPO, ACCEPT = "registry.test", Repository("team/app"), "modern"
LAYER = b"layer " * 5000
TYPE = b'"mediaType": "application/vnd.oci.image.manifest.v1+json", '


def manifest_of(name: str) -> bytes:
    """A manifest with LAYER in it, of which there are many."""
    descriptor = {"digest": str(digest_of(LAYER)), "size": len(LAYER)}
    return json.dumps({"schemaVersion": 2, "config": {**descriptor, "name": name}, "layers": [descriptor]}).encode()


MANIFEST = manifest_of("0")
MANIFEST_DIGEST, LAYER_DIGEST = digest_of(MANIFEST), digest_of(LAYER)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@contextlib.contextmanager
def opened(path: Path, metrics: Metrics | None = None) -> Iterator[Store]:
    store = Store.open(path, metrics or Metrics())
    try:
        yield store
    finally:
        store.close()


def put_blob(store: Store, body: bytes = LAYER) -> Digest:
    digest = digest_of(body)
    spool = store.spool()
    assert spool is not None
    spool.write(body)
    store.adopt(spool, digest, len(body), UP, REPO)
    spool.close()
    return digest


def put_manifest(store: Store, body: bytes = MANIFEST, repository: Repository = REPO) -> Digest:
    digest = digest_of(body)
    assert store.put_manifest(UP, repository, digest, body, parse_manifest(body, OCI_MANIFEST))
    return digest


@pytest.fixture
def bounded() -> Iterator[None]:
    """What hangs fails."""

    def give_up(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fill(path: Path) -> None:
    """One image, with its tag."""
    with opened(path) as store:
        put_blob(store)
        store.set_tag(UP, REPO, Tag("1"), ACCEPT, put_manifest(store), 1.0)


def body_of(store: Store, digest: Digest) -> bytes | None:
    blob = store.open_blob(digest)
    if blob is None:
        return None
    try:
        return os.pread(blob.descriptor, blob.size + 1, 0)
    finally:
        blob.close()


def file_of(path: Path, digest: Digest) -> Path:
    return path / "blobs" / digest.algorithm / digest.hex


def assert_held(store: Store) -> None:
    assert body_of(store, LAYER_DIGEST) == LAYER
    assert store.manifest(MANIFEST_DIGEST) == (MANIFEST, OCI_MANIFEST)
    tagged = store.tagged(UP, REPO, Tag("1"), ACCEPT)
    assert tagged is not None
    assert (tagged.digest, tagged.checked) == (MANIFEST_DIGEST, 1.0)
    assert store.is_linked(UP, REPO, MANIFEST_DIGEST)
    assert store.is_linked(UP, REPO, LAYER_DIGEST)
    assert store.size_of(UP, REPO, LAYER_DIGEST) == len(LAYER)
    assert not store.is_linked(UP, Repository("team/other"), LAYER_DIGEST)


def test_what_is_held_is_held_after_a_restart(path: Path) -> None:
    fill(path)
    with opened(path) as store:
        assert_held(store)


# --- the catalog is lost ---


def _overwrite(start: int, stop: int | None) -> Callable[[Path], None]:
    def damage(database: Path) -> None:
        body = bytearray(database.read_bytes())
        end = len(body) if stop is None else stop
        body[start:end] = b"\xa5" * (end - start)
        database.write_bytes(body)

    return damage


def _replace_by_folder(database: Path) -> None:
    database.unlink()
    database.mkdir()


def _old_and_empty(database: Path) -> None:
    connection = sqlite3.connect(database)
    connection.executescript("DROP TABLE blobs; DROP TABLE children; DROP TABLE links; DROP TABLE tags;")
    connection.close()


@pytest.mark.parametrize(
    "lose",
    [
        pytest.param(lambda database: database.unlink(), id="deleted"),
        pytest.param(lambda database: database.write_bytes(b""), id="empty"),
        pytest.param(lambda database: database.write_bytes(b"garbage" * 4096), id="garbage"),
        pytest.param(lambda database: os.truncate(database, 5000), id="truncated"),
        pytest.param(_overwrite(0, 4096), id="first page"),
        pytest.param(_overwrite(4096, None), id="all but the first page"),
        pytest.param(_overwrite(8192, None), id="all but the first two pages"),
        pytest.param(_replace_by_folder, id="a directory"),
        pytest.param(_old_and_empty, id="without tables"),
    ],
)
def test_a_catalog_that_is_lost_is_found_again_from_the_files(path: Path, lose: Callable[[Path], object]) -> None:
    fill(path)
    lose(path / "cache.db")
    with opened(path) as store:
        assert_held(store)
        put_manifest(store, manifest_of("another"))
    with opened(path) as store:
        assert_held(store)


def test_a_catalog_that_is_set_aside_is_kept(path: Path) -> None:
    fill(path)
    (path / "cache.db").write_bytes(b"garbage" * 4096)
    with opened(path):
        assert [file.read_bytes() for file in (path / "quarantine").iterdir()] == [b"garbage" * 4096]


def test_each_tag_is_found_again_where_it_pointed_last(path: Path) -> None:
    """In whatever order the notes are read."""
    moved = {Tag(f"t{number}"): [manifest_of(f"{number} {state}") for state in ("old", "new")] for number in range(12)}
    with opened(path) as store:
        for tag, bodies in moved.items():
            for checked, body in enumerate(bodies, 1):
                store.set_tag(UP, REPO, tag, ACCEPT, put_manifest(store, body), float(checked))
    (path / "cache.db").unlink()
    with opened(path) as store:
        found = {tag: store.tagged(UP, REPO, tag, ACCEPT) for tag in moved}
        wrong = [tag for tag, bodies in moved.items() if (at := found[tag]) is None or at.digest != digest_of(bodies[-1])]
        assert not wrong


def test_a_tag_that_is_forgotten_is_not_found_again(path: Path) -> None:
    fill(path)
    with opened(path) as store:
        store.forget_tag(UP, REPO, Tag("1"), ACCEPT)
        assert store.tagged(UP, REPO, Tag("1"), ACCEPT) is None
    (path / "cache.db").unlink()
    with opened(path) as store:
        assert store.tagged(UP, REPO, Tag("1"), ACCEPT) is None
        assert store.manifest(MANIFEST_DIGEST) is not None


def test_links_of_every_repository_are_found_again(path: Path) -> None:
    repositories = [Repository(name) for name in ("team/app", "team/other", "third")]
    with opened(path) as store:
        for repository in repositories[:2]:
            put_manifest(store, repository=repository)
        store.link(UP, repositories[2], MANIFEST_DIGEST)  # proved by a HEAD
    (path / "cache.db").unlink()
    with opened(path) as store:
        assert [store.is_linked(UP, repository, LAYER_DIGEST) for repository in repositories] == [True] * 3


@pytest.mark.parametrize(
    "notes",
    [
        b"",
        b"{}",
        b"[]",
        b"\xff\xfe",
        b'{"mediaType": "text/html", "links": [], "tags": []}',
        b'{"mediaType": 5, "links": 5, "tags": 5}',
        b"{" + TYPE + b'"links": [{"upstream": "x", "repository": "../.."}], "tags": []}',
        b"{" + TYPE + b'"links": [{"upstream": "\\ud800", "repository": "a"}], "tags": []}',
        b"{"
        + TYPE
        + b'"links": [], "tags": [{"upstream": "x", "repository": "a", "tag": "1", "accept": "a", "checked": NaN}]}',
        b"{"
        + TYPE
        + b'"links": [], "tags": [{"upstream": "x", "repository": "a", "tag": "../x", "accept": "a", "checked": 1}]}',
    ],
)
@pytest.mark.usefixtures("bounded")
def test_notes_that_are_damaged_cost_the_notes_and_not_the_start(path: Path, notes: bytes) -> None:
    fill(path)
    (path / "cache.db").unlink()
    (path / "meta" / "sha256" / f"{MANIFEST_DIGEST.hex}.json").write_bytes(notes)
    with opened(path) as store:
        assert body_of(store, MANIFEST_DIGEST) == MANIFEST
        assert body_of(store, LAYER_DIGEST) == LAYER
        store.set_tag(UP, REPO, Tag("1"), ACCEPT, put_manifest(store), 1.0)
        assert_held(store)


@pytest.mark.parametrize("error", ["database is locked", "disk I/O error", "database or disk is full"])
def test_a_catalog_that_cannot_be_opened_just_now_is_not_thrown_away(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    """F11, F13: the disk's trouble does not make the catalog wrong."""
    fill(path)
    connect = sqlite3.connect

    class Troubled(sqlite3.Connection):
        def execute(self, *_: object) -> sqlite3.Cursor:
            raise sqlite3.OperationalError(error)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", lambda *a, **o: connect(*a, **o, factory=Troubled))
        with contextlib.suppress(sqlite3.OperationalError, DirectoryUnusable):  # it may say that it cannot start
            Store.open(path, Metrics()).close()
    assert list((path / "quarantine").iterdir()) == []
    assert (path / "cache.db").exists()


def test_a_newer_catalog_is_refused_and_the_directory_is_as_it_was(path: Path) -> None:
    fill(path)
    connection = sqlite3.connect(path / "cache.db", isolation_level=None)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    (path / "ingest" / "of-the-later-version").write_bytes(b"half")

    def look() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}

    before = look()
    with pytest.raises(CatalogTooNew):
        Store.open(path, Metrics())
    assert look() == before
    with pytest.raises(CatalogTooNew):  # and not "in use"
        Store.open(path, Metrics())


# --- files and catalog disagree ---


def test_a_file_without_a_record_is_entered_at_the_start_and_nobody_may_read_it_unasked(path: Path) -> None:
    """F01: killed between the rename and the commit."""
    with opened(path):
        pass
    file_of(path, LAYER_DIGEST).write_bytes(LAYER)
    with opened(path) as store:
        assert body_of(store, LAYER_DIGEST) == LAYER
        assert not store.is_linked(UP, REPO, LAYER_DIGEST)
        assert store.manifest(LAYER_DIGEST) is None


def test_a_record_without_a_file_is_dropped_at_the_start(path: Path) -> None:
    fill(path)
    file_of(path, LAYER_DIGEST).unlink()
    with opened(path) as store:
        assert not store.has(LAYER_DIGEST)
        assert store.open_blob(LAYER_DIGEST) is None
        assert store.has(MANIFEST_DIGEST)
        assert store.is_linked(UP, REPO, LAYER_DIGEST), "it stays proved"


def test_a_file_that_goes_while_running_is_a_miss(path: Path) -> None:
    fill(path)
    with opened(path) as store:
        file_of(path, LAYER_DIGEST).unlink()
        assert store.open_blob(LAYER_DIGEST) is None
        assert put_blob(store) == LAYER_DIGEST
        assert body_of(store, LAYER_DIGEST) == LAYER


@pytest.mark.parametrize("with_notes", [False, True])
def test_a_file_of_other_bytes_without_a_record_is_never_served(path: Path, with_notes: bool) -> None:
    """T37: nobody has hashed it, so its name proves nothing."""
    fill(path)
    (path / "cache.db").unlink()
    digest, right = (MANIFEST_DIGEST, MANIFEST) if with_notes else (LAYER_DIGEST, LAYER)
    file_of(path, digest).write_bytes(right[:-1] + b"?")
    with opened(path) as store:
        assert body_of(store, digest) is None
        assert store.manifest(digest) is None


def test_a_manifest_that_rots_is_not_served_and_heals(path: Path) -> None:
    fill(path)
    file_of(path, MANIFEST_DIGEST).write_bytes(MANIFEST[:-1] + b"?")
    with opened(path) as store:
        assert store.manifest(MANIFEST_DIGEST) is None
        put_manifest(store)
        assert_held(store)


def test_what_is_not_a_file_of_ours_is_a_miss_that_is_counted(path: Path, tmp_path: Path) -> None:
    """T37."""
    fill(path)
    canary = tmp_path / "canary"
    canary.write_bytes(LAYER)
    metrics = Metrics()
    with opened(path, metrics) as store:
        file_of(path, LAYER_DIGEST).unlink()
        file_of(path, LAYER_DIGEST).symlink_to(canary)
        assert store.open_blob(LAYER_DIGEST) is None
        assert store.open_blob(LAYER_DIGEST) is None
        assert b"pullcache_quarantined_total 1.0" in metrics.render()
        put_blob(store)
        assert body_of(store, LAYER_DIGEST) == LAYER
    assert canary.read_bytes() == LAYER
