"""The catalog: what it answers, that writes do not fail each other, and what it does with a database of another time."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from proxy.credentials.credential import Proof
from proxy.manifests import DOCKER_LIST, OCI_INDEX, OCI_MANIFEST, Descriptor, Manifest
from proxy.names import Digest, Repository, Tag, digest_of
from proxy.storage import catalog as module
from proxy.storage import database
from proxy.storage.base import Origin
from proxy.storage.catalog import Catalog, Listed, Tagged
from proxy.storage.database import SCHEMA_VERSION, CatalogTooNew

UP, REPO, TAG, ACCEPT = "registry.test", Repository("team/app"), Tag("1"), "modern"
LAYER, OLD, NEW, OTHER = (digest_of(name) for name in (b"layer", b"old", b"new", b"other"))
MANIFEST = Manifest(OCI_MANIFEST, (Descriptor(LAYER, 5),))
ELSEWHERE = Repository("team/other")
PUBLIC, OURS, THEIRS = (Origin(UP, REPO, proof) for proof in ("anonymous", "secret", "client"))
ANOTHERS = Origin("other.test", REPO, "client")
PATIENCE = 3.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.db"


@pytest.fixture
def catalog(path: Path) -> Iterator[Catalog]:
    opened = Catalog.open(path)
    yield opened
    opened.close()


def done(*futures: Future[Any]) -> None:
    for future in futures:
        future.result(PATIENCE)


def test_what_was_written_is_there_after_reopening(path: Path) -> None:
    catalog = Catalog.open(path)
    catalog.add(OLD, 3, MANIFEST)
    catalog.add(LAYER, 5)
    catalog.link(PUBLIC, OLD)
    catalog.link(Origin(UP, ELSEWHERE, "secret"), OLD)
    catalog.set_tag(UP, REPO, TAG, ACCEPT, OLD, 1.5)
    catalog.close()  # commits what is queued
    catalog = Catalog.open(path)
    try:
        assert catalog.digests() == {OLD: 3, LAYER: 5}
        assert (catalog.blob(OLD), catalog.blob(LAYER), catalog.blob(NEW)) == ((3, OCI_MANIFEST), (5, None), None)
        assert catalog.tag(UP, REPO, TAG, ACCEPT) == Tagged(OLD, 1.5)
        links, tags = catalog.provenance(OLD)
        assert sorted(links) == [(UP, REPO, "anonymous"), (UP, ELSEWHERE, "secret")]
        assert tags == [(UP, REPO, TAG, ACCEPT, 1.5)]
    finally:
        catalog.close()


def is_linked(catalog: Catalog, digest: Digest, repository: Repository = REPO, upstream: str = UP) -> bool:
    """Whether anybody who may read the repository may read this."""
    return catalog.is_linked(upstream, repository, digest, public=False)


def is_named(catalog: Catalog, digest: Digest, repository: Repository = REPO, upstream: str = UP) -> bool:
    return catalog.is_named(upstream, repository, digest, public=False)


def test_a_link_is_to_a_manifest_and_what_that_names_is_named_and_nothing_else(catalog: Catalog) -> None:
    done(catalog.add(OLD, 3, MANIFEST), catalog.link(PUBLIC, OLD))
    assert (is_linked(catalog, OLD), is_named(catalog, OLD)) == (True, False)
    assert (is_linked(catalog, LAYER), is_named(catalog, LAYER)) == (False, True), "who names it need not have read it"
    assert not is_linked(catalog, NEW)
    assert not is_named(catalog, NEW)
    for repository, upstream in ((ELSEWHERE, UP), (REPO, "other.test")):
        assert not is_linked(catalog, OLD, repository, upstream)
        assert not is_named(catalog, LAYER, repository, upstream)


def test_content_that_is_removed_stays_proved(catalog: Catalog) -> None:
    done(catalog.add(OLD, 3, MANIFEST), catalog.link(PUBLIC, OLD), catalog.add(LAYER, 5), catalog.link(PUBLIC, LAYER))
    done(catalog.remove(LAYER))
    assert catalog.blob(LAYER) is None
    assert is_linked(catalog, LAYER)
    assert is_named(catalog, LAYER)
    assert catalog.stated_size(UP, REPO, LAYER) == 5


# --- to whom it was given ---


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (["anonymous"], "anonymous"),
        (["secret"], "secret"),
        (["client"], "client"),
        (["client", "secret"], "secret"),
        (["secret", "client"], "secret"),
        (["client", "anonymous"], "anonymous"),
        (["secret", "anonymous"], "anonymous"),
        (["anonymous", "client"], "anonymous"),
        (["anonymous", "secret"], "anonymous"),
        (["client", "secret", "anonymous", "client", "secret"], "anonymous"),
    ],
)
def test_a_link_has_the_proof_that_asks_least_of_a_reader(catalog: Catalog, given: list[Proof], kept: Proof) -> None:
    done(catalog.add(OLD, 3, MANIFEST), *(catalog.link(Origin(UP, REPO, proof), OLD) for proof in given))
    assert catalog.provenance(OLD)[0] == [(UP, REPO, kept)]


@pytest.mark.parametrize(("proof", "public"), [("anonymous", True), ("secret", False), ("client", False)])
def test_what_is_public_satisfies_everybody_and_the_rest_only_who_was_proved(
    catalog: Catalog, proof: Proof, public: bool
) -> None:
    origin = Origin(UP, REPO, proof)
    done(catalog.add(OLD, 3, MANIFEST), catalog.link(origin, OLD), catalog.set_referrers(origin, OLD, b"x", 1.0))
    assert catalog.is_linked(UP, REPO, OLD, public=True) is public
    assert catalog.is_named(UP, REPO, LAYER, public=True) is public
    assert (catalog.referrers(UP, REPO, OLD, public=True) is not None) is public
    assert catalog.is_public(OLD) is public
    assert catalog.is_linked(UP, REPO, OLD, public=False)
    assert catalog.is_named(UP, REPO, LAYER, public=False)
    assert catalog.referrers(UP, REPO, OLD, public=False) == Listed(b"x", 1.0)


def test_content_is_public_if_any_registry_gave_it_to_the_anonymous(catalog: Catalog) -> None:
    """A layer that is public somewhere: that it is in the private repository too needs the link all the same."""
    done(catalog.link(OURS, LAYER), catalog.link(Origin("other.test", ELSEWHERE, "anonymous"), LAYER))
    assert catalog.is_public(LAYER)
    assert not catalog.is_linked(UP, REPO, LAYER, public=True)
    assert not catalog.is_linked(UP, ELSEWHERE, LAYER, public=False)


@pytest.mark.parametrize(
    ("is_held", "links", "expected"),
    [
        pytest.param(False, [], False, id="nothing is known of it"),
        pytest.param(True, [], True, id="nobody's any more"),
        pytest.param(True, [ANOTHERS], True, id="another's"),
        pytest.param(False, [ANOTHERS], True, id="another's, and gone"),
        pytest.param(True, [ANOTHERS, THEIRS], False, id="this one's too"),
        pytest.param(True, [OURS], False, id="this one's"),
        pytest.param(True, [Origin("other.test", REPO, "anonymous")], False, id="public"),
        pytest.param(True, [ANOTHERS, Origin("third.test", REPO, "anonymous")], False, id="public somewhere"),
    ],
)
def test_content_is_others_unless_it_is_public_or_this_upstream_gave_it(
    catalog: Catalog, is_held: bool, links: list[Origin], expected: bool
) -> None:
    done(*(catalog.link(origin, LAYER) for origin in links), catalog.link(PUBLIC, OLD))
    if is_held:
        done(catalog.add(LAYER, 5))
    assert catalog.is_others(UP, LAYER) is expected


def test_what_was_given_is_known_by_proof_and_repository(catalog: Catalog) -> None:
    done(catalog.link(PUBLIC, OLD), catalog.link(PUBLIC, LAYER), catalog.link(OURS, NEW))
    assert catalog.was_given(UP, REPO, "anonymous")
    assert catalog.was_given(UP, REPO, "secret")
    assert not catalog.was_given(UP, REPO, "client")
    assert not catalog.was_given(UP, ELSEWHERE, "anonymous")
    assert not catalog.was_given("other.test", REPO, "anonymous")


def test_what_is_withdrawn_is_of_one_proof_of_one_repository(catalog: Catalog) -> None:
    others = [Origin(UP, ELSEWHERE, "secret"), Origin("other.test", REPO, "secret")]
    done(*(catalog.link(origin, LAYER) for origin in (OURS, *others)), catalog.link(PUBLIC, OLD), catalog.link(THEIRS, NEW))
    done(*(catalog.set_referrers(origin, LAYER, b"x", 1.0) for origin in (OURS, *others)))
    done(catalog.set_referrers(PUBLIC, OLD, b"y", 1.0), catalog.withdraw(UP, REPO, "secret"))
    assert not is_linked(catalog, LAYER)
    assert catalog.referrers(UP, REPO, LAYER, public=False) is None
    assert not catalog.was_given(UP, REPO, "secret")
    assert (is_linked(catalog, OLD), is_linked(catalog, NEW)) == (True, True)
    assert catalog.referrers(UP, REPO, OLD, public=True) == Listed(b"y", 1.0)
    for origin in others:
        assert is_linked(catalog, LAYER, origin.repository, origin.upstream)
        assert catalog.referrers(origin.upstream, origin.repository, LAYER, public=False) == Listed(b"x", 1.0)


def test_a_withdrawal_tells_what_it_took_away(catalog: Catalog) -> None:
    done(catalog.link(OURS, LAYER), catalog.link(OURS, OLD), catalog.link(THEIRS, NEW))
    assert set(catalog.withdraw(UP, REPO, "secret").result(PATIENCE)) == {LAYER, OLD}
    assert catalog.withdraw(UP, REPO, "secret").result(PATIENCE) == []


@pytest.mark.parametrize("fails", [False, True])
def test_a_right_that_was_withdrawn_proves_nothing_whatever_is_queued_when(
    catalog: Catalog, path: Path, fails: bool
) -> None:
    """Before it, and it is taken away; behind it, and it is not written; by a right that was proved later, and it is.
    ``fails``: something in the same group does, so that all of it is done again."""
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    queued: list[Future[None]] = [catalog.link(OURS, OLD), catalog.set_referrers(OURS, OLD, b"x", 1.0)]
    withdrawal = catalog.withdraw(UP, REPO, "secret")
    assert catalog.withdrawals == 1
    queued += [catalog.link(OURS, NEW), catalog.set_referrers(OURS, NEW, b"x", 1.0), catalog.link(THEIRS, LAYER)]
    later = Origin(UP, REPO, "secret", since=catalog.withdrawals)
    queued.append(catalog.link(later, OTHER))
    if fails:
        catalog.add(OTHER, 2**63)
    blocker.execute("ROLLBACK")
    blocker.close()
    done(*queued)
    # Whatever had its turn before the withdrawal was withdrawn is told, so that the notes of it are renewed.
    told = withdrawal.result(PATIENCE)
    assert set(told) <= {OLD}
    assert [is_linked(catalog, digest) for digest in (OLD, NEW, LAYER, OTHER)] == [False, False, True, True]
    assert [catalog.referrers(UP, REPO, digest, public=False) for digest in (OLD, NEW)] == [None, None]
    assert (catalog.is_void(OURS), catalog.is_void(later), catalog.is_void(THEIRS)) == (True, False, False)


def test_a_withdrawal_that_cannot_be_written_makes_void_all_the_same(catalog: Catalog) -> None:
    connection = sqlite3.connect(catalog._database._path, isolation_level=None)
    connection.execute("CREATE TRIGGER full BEFORE DELETE ON links BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    done(catalog.link(OURS, OLD))
    with pytest.raises(sqlite3.Error):
        catalog.withdraw(UP, REPO, "secret").result(PATIENCE)
    connection.close()
    done(catalog.link(OURS, NEW))
    assert not is_linked(catalog, NEW)


# --- content whose links are lost ---


def test_what_only_public_manifests_name_is_public_again(catalog: Catalog) -> None:
    public_elsewhere = Origin("other.test", ELSEWHERE, "anonymous")
    done(catalog.add(OLD, 3, MANIFEST), catalog.link(PUBLIC, OLD))
    done(catalog.add(NEW, 3, MANIFEST), catalog.link(public_elsewhere, NEW))
    done(catalog.add(LAYER, 5), catalog.share([LAYER, OTHER]))
    assert catalog.is_linked(UP, REPO, LAYER, public=True)
    assert catalog.is_linked("other.test", ELSEWHERE, LAYER, public=True)
    assert not is_linked(catalog, NEW)
    assert not catalog.is_public(OTHER), "nothing names it"


@pytest.mark.parametrize("proof", ["secret", "client"])
def test_what_a_private_manifest_names_stays_private(catalog: Catalog, proof: Proof) -> None:
    """Whoever can write a public manifest can name the blob in it."""
    done(catalog.add(OLD, 3, MANIFEST), catalog.link(Origin(UP, REPO, proof), OLD))
    done(catalog.add(NEW, 3, MANIFEST), catalog.link(Origin(UP, ELSEWHERE, "anonymous"), NEW))
    done(catalog.add(LAYER, 5), catalog.share([LAYER]))
    assert not catalog.is_public(LAYER)
    assert not is_linked(catalog, LAYER)
    assert not is_linked(catalog, LAYER, ELSEWHERE)


@pytest.mark.parametrize("proof", ["secret", "client"])
def test_what_is_linked_as_private_itself_stays_private_whoever_names_it(catalog: Catalog, proof: Proof) -> None:
    """A private manifest is named by no other; a public index that names it must not make it readable there."""
    index = Manifest(OCI_INDEX, (Descriptor(OLD, 3),))
    done(catalog.add(OLD, 3, MANIFEST), catalog.link(Origin(UP, REPO, proof), OLD))
    done(catalog.add(NEW, 3, index), catalog.link(Origin(UP, ELSEWHERE, "anonymous"), NEW), catalog.share([OLD, NEW]))
    assert not catalog.is_public(OLD)
    assert not is_linked(catalog, OLD, ELSEWHERE)


def test_what_is_linked_already_is_shared_no_second_time(catalog: Catalog) -> None:
    done(catalog.add(OLD, 3, MANIFEST), catalog.link(PUBLIC, OLD), catalog.link(PUBLIC, LAYER), catalog.share([LAYER]))
    assert catalog.provenance(LAYER)[0] == [(UP, REPO, "anonymous")]


def test_a_size_that_manifests_of_the_repository_disagree_about_is_not_stated(catalog: Catalog) -> None:
    done(catalog.add(OLD, 3, MANIFEST), catalog.add(OTHER, 3, Manifest(OCI_MANIFEST, (Descriptor(LAYER, 6),))))
    assert catalog.stated_size(UP, REPO, LAYER) is None
    done(catalog.link(PUBLIC, OLD), catalog.link(Origin(UP, ELSEWHERE, "anonymous"), OTHER))
    assert (catalog.stated_size(UP, REPO, LAYER), catalog.stated_size(UP, ELSEWHERE, LAYER)) == (5, 6)
    done(catalog.link(OURS, OTHER))
    assert (catalog.stated_size(UP, REPO, LAYER), catalog.stated_size(UP, ELSEWHERE, LAYER)) == (None, 6)


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


def test_where_there_is_none_of_its_own_the_last_of_a_class_that_is_given_the_same_counts(catalog: Catalog) -> None:
    """By the order in which the upstream was asked, not by clocks; and only what is held."""

    def found(accept: str) -> Tagged | None:
        return catalog.tag(UP, REPO, TAG, accept)

    both, wide = f"{OCI_INDEX},{OCI_MANIFEST}", f"{DOCKER_LIST},{OCI_INDEX},{OCI_MANIFEST}"
    done(catalog.add(OLD, 3, MANIFEST), catalog.add(NEW, 3, MANIFEST), catalog.add(OTHER, 3, Manifest(DOCKER_LIST, ())))
    tag(catalog, OLD, 2.0, accept="")
    assert found(both) == Tagged(OLD, 2.0)
    tag(catalog, NEW, 1.0, accept=wide)
    assert found(both) == Tagged(NEW, 1.0)
    tag(catalog, OTHER, 3.0, accept=DOCKER_LIST)
    assert found(both) == Tagged(NEW, 1.0), "it does not take that"
    assert found("") == Tagged(OLD, 2.0), "its own goes before"
    tag(catalog, LAYER, 4.0, accept=wide)  # told of, not held
    done(catalog.forget_tag(UP, REPO, TAG, both))
    assert found(both) == Tagged(NEW, 1.0), "it had none of its own, and others keep theirs"
    done(catalog.forget_tag(UP, REPO, TAG, wide))
    assert found(both) == Tagged(OLD, 2.0)
    assert catalog.tag(UP, REPO, Tag("2"), both) is None
    assert catalog.tag(UP, ELSEWHERE, TAG, both) is None
    assert catalog.tag("other.test", REPO, TAG, both) is None


# --- writing in groups ---

Bad = Callable[[Catalog], Future[Any]]
BAD: dict[str, Bad] = {
    "refused by the database": lambda catalog: catalog.add(OTHER, None),  # type: ignore[arg-type]
    "not storable": lambda catalog: catalog.add(OTHER, 2**63),
    "not text": lambda catalog: catalog.link(Origin("\ud800", REPO, "anonymous"), OTHER),
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


def referrers(catalog: Catalog, subject: Digest, repository: Repository = REPO, upstream: str = UP) -> Listed | None:
    return catalog.referrers(upstream, repository, subject, public=True)


def test_referrers_are_what_was_last_said_of_each_subject(catalog: Catalog) -> None:
    done(catalog.set_referrers(PUBLIC, OLD, b"one", 1.0), catalog.set_referrers(PUBLIC, OLD, b"two", 2.0))
    done(catalog.set_referrers(Origin(UP, ELSEWHERE, "anonymous"), OLD, b"three", 1.0))
    assert referrers(catalog, OLD) == Listed(b"two", 2.0)
    assert referrers(catalog, OLD, ELSEWHERE) == Listed(b"three", 1.0)
    assert referrers(catalog, NEW) is None
    assert referrers(catalog, OLD, upstream="other.test") is None


def test_referrers_that_were_said_to_some_replace_what_was_said_to_all(catalog: Catalog) -> None:
    """What is said last holds; the anonymous are then told nothing, rather than what is not for them."""
    done(catalog.set_referrers(PUBLIC, OLD, b"one", 1.0), catalog.set_referrers(THEIRS, OLD, b"two", 2.0))
    assert referrers(catalog, OLD) is None
    assert catalog.referrers(UP, REPO, OLD, public=False) == Listed(b"two", 2.0)


def test_the_oldest_lists_of_referrers_give_way(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_LISTS", 3)
    subjects = [digest_of(bytes([number])) for number in range(5)]
    done(*(catalog.set_referrers(PUBLIC, subject, b"x", float(number)) for number, subject in enumerate(subjects)))
    assert [subject for subject in subjects if referrers(catalog, subject)] == subjects[2:]


def of_schema(path: Path, version: int, *statements: str) -> None:
    """A database as the version of that time has left it."""
    steps = (database._SCHEMA_1, database._SCHEMA_2)[:version]
    connection = sqlite3.connect(path)
    connection.executescript(f"BEGIN; {' '.join(steps)} PRAGMA user_version = {version}; COMMIT;")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_database_of_the_first_schema_is_brought_up_to_date_and_keeps_what_it_says(path: Path) -> None:
    of_schema(path, 1, f"INSERT INTO blobs VALUES ('{LAYER}', 5, NULL)")
    for _ in range(2):
        catalog = Catalog.open(path)
        try:
            assert catalog.digests() == {LAYER: 5}
            done(catalog.set_referrers(PUBLIC, LAYER, b"x", 1.0))
            assert referrers(catalog, LAYER) == Listed(b"x", 1.0)
        finally:
            catalog.close()


def test_links_and_referrers_from_before_there_were_proofs_are_public(path: Path) -> None:
    """Everything was asked for anonymously then."""
    of_schema(
        path,
        2,
        f"INSERT INTO blobs VALUES ('{OLD}', 3, '{OCI_MANIFEST}')",
        f"INSERT INTO children VALUES ('{OLD}', '{LAYER}', 5)",
        f"INSERT INTO links VALUES ('{OLD}', '{UP}', '{REPO}')",
        f"INSERT INTO tags VALUES ('{UP}', '{REPO}', '{TAG}', '{ACCEPT}', '{OLD}', 1.5)",
        f"INSERT INTO referrers VALUES ('{UP}', '{REPO}', '{OLD}', x'78', 1.0)",
    )
    for _ in range(2):
        catalog = Catalog.open(path)
        try:
            assert catalog.provenance(OLD) == ([(UP, REPO, "anonymous")], [(UP, REPO, TAG, ACCEPT, 1.5)])
            assert catalog.is_linked(UP, REPO, OLD, public=True)
            assert catalog.is_named(UP, REPO, LAYER, public=True)
            assert referrers(catalog, OLD) == Listed(b"x", 1.0)
            assert pointed(catalog) == Tagged(OLD, 1.5)
        finally:
            catalog.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
    connection.close()
