"""The catalog: what it answers, that writes do not fail each other, and what it does with a database of another time."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from proxy.manifests import OCI_MANIFEST, Descriptor, Manifest
from proxy.names import Digest, Repository, Tag, digest_of
from proxy.storage import catalog as module
from proxy.storage.catalog import SCHEMA_VERSION, Catalog, CatalogTooNew, Listed, Tagged

UP, REPO, TAG, ACCEPT = "registry.test", Repository("team/app"), Tag("1"), "modern"
LAYER, OLD, NEW, OTHER = (digest_of(name) for name in (b"layer", b"old", b"new", b"other"))
MANIFEST = Manifest(OCI_MANIFEST, (Descriptor(LAYER, 5),))
PATIENCE = 3.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.db"


@pytest.fixture
def catalog(path: Path) -> Iterator[Catalog]:
    opened = Catalog.open(path)
    yield opened
    opened.close()


def done(*futures: Future[None]) -> None:
    for future in futures:
        future.result(PATIENCE)


def test_what_was_written_is_there_after_reopening(path: Path) -> None:
    catalog = Catalog.open(path)
    catalog.add(OLD, 3, MANIFEST)
    catalog.add(LAYER, 5)
    catalog.link(UP, REPO, OLD)
    catalog.set_tag(UP, REPO, TAG, ACCEPT, OLD, 1.5)
    catalog.close()  # commits what is queued
    catalog = Catalog.open(path)
    try:
        assert catalog.digests() == {OLD: 3, LAYER: 5}
        assert (catalog.blob(OLD), catalog.blob(LAYER), catalog.blob(NEW)) == ((3, OCI_MANIFEST), (5, None), None)
        assert catalog.tag(UP, REPO, TAG, ACCEPT) == Tagged(OLD, 1.5)
        assert catalog.provenance(OLD) == ([(UP, REPO)], [(UP, REPO, TAG, ACCEPT, 1.5)])
    finally:
        catalog.close()


def test_a_link_covers_what_the_manifest_names_and_nothing_else(catalog: Catalog) -> None:
    done(catalog.add(OLD, 3, MANIFEST), catalog.link(UP, REPO, OLD))
    assert catalog.is_linked(UP, REPO, OLD)
    assert catalog.is_linked(UP, REPO, LAYER)
    assert not catalog.is_linked(UP, REPO, NEW)
    assert not catalog.is_linked(UP, Repository("team/other"), LAYER)
    assert not catalog.is_linked("other.test", REPO, LAYER)


def test_content_that_is_removed_stays_proved(catalog: Catalog) -> None:
    done(catalog.add(OLD, 3, MANIFEST), catalog.link(UP, REPO, OLD), catalog.add(LAYER, 5), catalog.remove(LAYER))
    assert catalog.blob(LAYER) is None
    assert catalog.is_linked(UP, REPO, LAYER)
    assert catalog.stated_size(UP, REPO, LAYER) == 5


def test_a_size_that_manifests_of_the_repository_disagree_about_is_not_stated(catalog: Catalog) -> None:
    elsewhere = Repository("team/other")
    done(catalog.add(OLD, 3, MANIFEST), catalog.add(OTHER, 3, Manifest(OCI_MANIFEST, (Descriptor(LAYER, 6),))))
    assert catalog.stated_size(UP, REPO, LAYER) is None
    done(catalog.link(UP, REPO, OLD), catalog.link(UP, elsewhere, OTHER))
    assert (catalog.stated_size(UP, REPO, LAYER), catalog.stated_size(UP, elsewhere, LAYER)) == (5, 6)
    done(catalog.link(UP, REPO, OTHER))
    assert (catalog.stated_size(UP, REPO, LAYER), catalog.stated_size(UP, elsewhere, LAYER)) == (None, 6)


def test_content_seen_again_as_a_blob_stays_a_manifest(catalog: Catalog) -> None:
    done(catalog.add(OLD, 3, MANIFEST), catalog.add(OLD, 3))
    assert catalog.blob(OLD) == (3, OCI_MANIFEST)


# --- tags ---


def tag(catalog: Catalog, digest: Digest, checked: float, name: Tag = TAG, accept: str = ACCEPT) -> None:
    done(catalog.set_tag(UP, REPO, name, accept, digest, checked))


def pointed(catalog: Catalog) -> Tagged | None:
    return catalog.tag(UP, REPO, TAG, ACCEPT)


def test_a_tag_whose_new_manifest_is_not_held_keeps_the_old_one_for_stale(catalog: Catalog) -> None:
    done(catalog.add(OLD, 3, MANIFEST))
    tag(catalog, OLD, 1.0)
    tag(catalog, NEW, 2.0)
    assert pointed(catalog) == Tagged(OLD, 1.0)
    tag(catalog, OTHER, 3.0)  # and again, before the second was ever held
    assert pointed(catalog) == Tagged(OLD, 1.0)
    done(catalog.add(NEW, 3, MANIFEST))
    assert pointed(catalog) == Tagged(OLD, 1.0), "it does not point there any more"
    done(catalog.add(OTHER, 3, MANIFEST))
    assert pointed(catalog) == Tagged(OTHER, 3.0)
    tag(catalog, OTHER, 4.0)
    assert pointed(catalog) == Tagged(OTHER, 4.0)
    assert catalog.provenance(OLD)[1] == [], "the history ends with a new manifest that is held"


def test_a_tag_needs_a_manifest_not_just_bytes(catalog: Catalog) -> None:
    done(catalog.add(OLD, 3))
    tag(catalog, OLD, 1.0)
    assert pointed(catalog) is None


@pytest.mark.parametrize("back", [1.0, 3600.0, 400 * 86400.0])
def test_a_tag_that_moves_after_the_clock_went_back_points_at_the_new_manifest(catalog: Catalog, back: float) -> None:
    """F50: told of first (HEAD), held then (GET), as ``pull`` does it."""
    done(catalog.add(OLD, 3, MANIFEST))
    tag(catalog, OLD, 1e9)
    tag(catalog, NEW, 1e9 - back)
    done(catalog.add(NEW, 3, MANIFEST))
    now = pointed(catalog)
    assert now is not None
    assert now.digest == NEW


def test_tags_classes_of_accept_and_repositories_are_apart(catalog: Catalog) -> None:
    done(catalog.add(OLD, 3, MANIFEST), catalog.add(NEW, 3, MANIFEST))
    tag(catalog, OLD, 1.0)
    tag(catalog, NEW, 2.0, accept="docker")
    tag(catalog, NEW, 2.0, name=Tag("2"))
    done(catalog.set_tag("other.test", REPO, TAG, ACCEPT, NEW, 2.0))
    assert pointed(catalog) == Tagged(OLD, 1.0)
    done(catalog.forget_tag(UP, REPO, TAG, ACCEPT))
    assert pointed(catalog) is None
    assert catalog.tag(UP, REPO, TAG, "docker") == Tagged(NEW, 2.0)
    assert catalog.tag(UP, REPO, Tag("2"), ACCEPT) == Tagged(NEW, 2.0)
    assert catalog.tag("other.test", REPO, TAG, ACCEPT) == Tagged(NEW, 2.0)


# --- writing in groups ---

Bad = Callable[[Catalog], Future[None]]
BAD: dict[str, Bad] = {
    "refused by the database": lambda catalog: catalog.add(OTHER, None),  # type: ignore[arg-type]
    "not storable": lambda catalog: catalog.add(OTHER, 2**63),
    "not text": lambda catalog: catalog.link("\ud800", REPO, OTHER),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_write_that_fails_fails_alone(catalog: Catalog, path: Path, bad: str) -> None:
    """All are queued while somebody else holds the database, so that they are one group."""
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    good = [catalog.add(digest_of(b"%d" % number), number) for number in range(20)]
    failing = BAD[bad](catalog)
    good += [catalog.add(digest_of(b"%d" % number), number) for number in range(20, 40)]
    assert not any(future.done() for future in good)
    blocker.execute("ROLLBACK")
    blocker.close()
    done(*good)
    with pytest.raises((sqlite3.Error, OverflowError, UnicodeError)):
        failing.result(PATIENCE)
    assert sorted(catalog.digests().values()) == list(range(40))
    done(catalog.add(OLD, 3))


def test_a_future_is_done_only_once_others_can_see_the_change(catalog: Catalog, path: Path) -> None:
    for number in range(50):
        done(catalog.add(digest_of(b"%d" % number), number))
        with sqlite3.connect(path) as other:
            assert other.execute("SELECT count(*) FROM blobs").fetchone() == (number + 1,)
        other.close()


def test_a_database_that_is_held_by_somebody_else_fails_the_write_not_the_catalog(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect

    def impatient(*args: object, **options: object) -> sqlite3.Connection:
        return connect(*args, **{**options, "timeout": 0.05})  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(sqlite3, "connect", impatient)
    catalog = Catalog.open(path)
    blocker = connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            catalog.add(OLD, 3).result(PATIENCE)
        blocker.execute("ROLLBACK")
        done(catalog.add(NEW, 3))
        assert catalog.digests() == {NEW: 3}
    finally:
        blocker.close()
        catalog.close()


# --- databases of another time ---


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_newer_schema_is_refused_and_untouched(path: Path, mode: str) -> None:
    Catalog.open(path).close()
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute(f"PRAGMA journal_mode = {mode}")
    connection.execute("CREATE TABLE of_the_future (x)")
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(CatalogTooNew, match="later version") as refused:
        Catalog.open(path)
    assert str(path) in str(refused.value)
    assert path.read_bytes() == before


def test_a_file_that_is_no_database_is_an_error_that_names_it_so(path: Path) -> None:
    path.write_bytes(b"garbage" * 1000)
    with pytest.raises(sqlite3.DatabaseError):
        Catalog.open(path)
    assert path.read_bytes() == b"garbage" * 1000


def test_referrers_are_what_was_last_said_of_each_subject(catalog: Catalog) -> None:
    done(catalog.set_referrers(UP, REPO, OLD, b"one", 1.0), catalog.set_referrers(UP, REPO, OLD, b"two", 2.0))
    done(catalog.set_referrers(UP, Repository("team/other"), OLD, b"three", 1.0))
    assert catalog.referrers(UP, REPO, OLD) == Listed(b"two", 2.0)
    assert catalog.referrers(UP, Repository("team/other"), OLD) == Listed(b"three", 1.0)
    assert catalog.referrers(UP, REPO, NEW) is None
    assert catalog.referrers("other.test", REPO, OLD) is None


def test_the_oldest_lists_of_referrers_give_way(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_LISTS", 3)
    subjects = [digest_of(bytes([number])) for number in range(5)]
    done(*(catalog.set_referrers(UP, REPO, subject, b"x", float(number)) for number, subject in enumerate(subjects)))
    assert [subject for subject in subjects if catalog.referrers(UP, REPO, subject)] == subjects[2:]


def test_a_database_of_the_first_schema_is_brought_up_to_date_and_keeps_what_it_says(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(f"BEGIN; {module._SCHEMA_1} PRAGMA user_version = 1; COMMIT;")
    connection.execute("INSERT INTO blobs VALUES (?, 5, NULL)", (str(LAYER),))
    connection.commit()
    connection.close()
    for _ in range(2):
        catalog = Catalog.open(path)
        try:
            assert catalog.digests() == {LAYER: 5}
            done(catalog.set_referrers(UP, REPO, LAYER, b"x", 1.0))
            assert catalog.referrers(UP, REPO, LAYER) == Listed(b"x", 1.0)
        finally:
            catalog.close()
