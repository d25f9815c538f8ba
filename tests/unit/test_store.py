"""Files and catalog together: files are the truth, and whatever is lost of the catalog is found again from them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy.credentials.credential import Proof
from proxy.manifests import OCI_INDEX, OCI_MANIFEST, parse_manifest
from proxy.metrics import Metrics
from proxy.names import Digest, Repository, Tag, digest_of
from proxy.storage.base import Origin
from proxy.storage.catalog import Catalog
from proxy.storage.database import SCHEMA_VERSION, CatalogTooNew
from proxy.storage.layout import DirectoryUnusable, SpoolFile
from proxy.storage.store import Store

UP, REPO, ACCEPT = "registry.test", Repository("team/app"), "modern"
ELSEWHERE = Repository("team/other")
PUBLIC = Origin(UP, REPO, "anonymous")
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


def put_blob(store: Store, body: bytes = LAYER, origin: Origin = PUBLIC) -> Digest:
    digest = digest_of(body)
    spool = store.spool(digest)
    assert spool is not None
    spool.write(body)
    store.adopt(spool, digest, len(body), origin)
    spool.close()
    return digest


def put_manifest(store: Store, body: bytes = MANIFEST, origin: Origin = PUBLIC, media_type: str = OCI_MANIFEST) -> Digest:
    digest = digest_of(body)
    assert store.put_manifest(origin, digest, body, parse_manifest(body, media_type))
    return digest


def may_read(store: Store, digest: Digest, repository: Repository = REPO, *, public: bool = True) -> bool:
    """Whether who may read the repository may read this without a question upstream."""
    return store.is_linked(UP, repository, digest, public=public)


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
    held = store.manifest(MANIFEST_DIGEST)
    assert held is not None
    assert held[:2] == (MANIFEST, OCI_MANIFEST)
    tagged = store.tagged(UP, REPO, Tag("1"), ACCEPT)
    assert tagged is not None
    assert (tagged.digest, tagged.checked) == (MANIFEST_DIGEST, 1.0)
    assert may_read(store, MANIFEST_DIGEST)
    assert may_read(store, LAYER_DIGEST)
    assert store.is_named(UP, REPO, LAYER_DIGEST, public=True)
    assert store.is_public(LAYER_DIGEST)
    assert store.size_of(UP, REPO, LAYER_DIGEST) == store.held_size(LAYER_DIGEST) == len(LAYER)
    for digest in (MANIFEST_DIGEST, LAYER_DIGEST):
        assert not may_read(store, digest, ELSEWHERE, public=False)
    assert not store.is_named(UP, ELSEWHERE, LAYER_DIGEST, public=False)


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
            put_manifest(store, origin=Origin(UP, repository, "anonymous"))
        store.link(Origin(UP, repositories[2], "anonymous"), MANIFEST_DIGEST)  # proved by a HEAD
        put_blob(store)
    (path / "cache.db").unlink()
    with opened(path) as store:
        for digest in (MANIFEST_DIGEST, LAYER_DIGEST):
            assert [may_read(store, digest, repository) for repository in repositories] == [True] * 3


def notes_of(path: Path, digest: Digest) -> Path:
    return path / "meta" / digest.algorithm / f"{digest.hex}.json"


@pytest.mark.parametrize("proof", ["anonymous", "secret", "client"])
def test_to_whom_content_was_given_is_written_beside_it_and_found_again(path: Path, proof: Proof) -> None:
    with opened(path) as store:
        put_manifest(store, origin=Origin(UP, REPO, proof))
        put_blob(store, origin=Origin(UP, REPO, proof))
    assert json.loads(notes_of(path, MANIFEST_DIGEST).read_bytes())["links"] == [
        {"upstream": UP, "repository": REPO, "proof": proof}
    ]
    (path / "cache.db").unlink()
    public = proof == "anonymous"
    with opened(path) as store:
        assert may_read(store, MANIFEST_DIGEST) is public
        assert may_read(store, MANIFEST_DIGEST, public=False)
        assert [given for given in ("anonymous", "secret", "client") if store.was_given(UP, REPO, given)] == [proof]
        assert may_read(store, LAYER_DIGEST) is public
        assert may_read(store, LAYER_DIGEST, public=False)
        assert store.is_public(LAYER_DIGEST) is public
        assert store.is_named(UP, REPO, LAYER_DIGEST, public=False)


@pytest.mark.parametrize(
    ("written", "proof"),
    [
        pytest.param({}, "anonymous", id="of-a-version-that-asked-anonymously-only"),
        pytest.param({"proof": "anonymous"}, "anonymous", id="anonymous"),
        pytest.param({"proof": "secret"}, "secret", id="secret"),
        pytest.param({"proof": "of a later version"}, "client", id="unknown-is-the-narrowest"),
        pytest.param({"proof": None}, "client", id="null"),
        pytest.param({"proof": ["anonymous"]}, "client", id="list"),
    ],
)
def test_what_a_note_says_of_the_proof(path: Path, written: dict[str, object], proof: Proof) -> None:
    with opened(path) as store:
        put_manifest(store)
    (path / "cache.db").unlink()
    notes = json.loads(notes_of(path, MANIFEST_DIGEST).read_bytes())
    notes["links"] = [{"upstream": UP, "repository": REPO} | written]
    notes_of(path, MANIFEST_DIGEST).write_text(json.dumps(notes))
    with opened(path) as store:
        assert [given for given in ("anonymous", "secret", "client") if store.was_given(UP, REPO, given)] == [proof]


@pytest.mark.parametrize("proof", ["secret", "client"])
def test_a_blob_that_a_private_manifest_names_is_not_public_when_the_catalog_is_lost(path: Path, proof: Proof) -> None:
    with opened(path) as store:
        put_manifest(store, origin=Origin(UP, REPO, proof))
        put_blob(store, origin=Origin(UP, REPO, proof))
        put_manifest(store, manifest_of("whose writer knows a digest"), Origin(UP, ELSEWHERE, "anonymous"))
    (path / "cache.db").unlink()
    with opened(path) as store:
        assert body_of(store, LAYER_DIGEST) == LAYER
        assert not store.is_public(LAYER_DIGEST)
        assert [may_read(store, LAYER_DIGEST, where, public=False) for where in (REPO, ELSEWHERE)] == [True, False]
        assert not any(may_read(store, LAYER_DIGEST, where) for where in (REPO, ELSEWHERE))


@pytest.mark.parametrize("proof", ["secret", "client"])
def test_a_private_manifest_that_a_public_index_names_is_not_public_when_the_catalog_is_lost(
    path: Path, proof: Proof
) -> None:
    descriptor = {"mediaType": OCI_MANIFEST, "digest": str(MANIFEST_DIGEST), "size": len(MANIFEST)}
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [descriptor]}).encode()
    with opened(path) as store:
        put_manifest(store, origin=Origin(UP, REPO, proof))
        put_manifest(store, index, Origin(UP, ELSEWHERE, "anonymous"), OCI_INDEX)
        assert not may_read(store, MANIFEST_DIGEST, ELSEWHERE)
    (path / "cache.db").unlink()
    with opened(path) as store:
        assert store.was_given(UP, ELSEWHERE, "anonymous")
        assert not may_read(store, MANIFEST_DIGEST, ELSEWHERE)
        assert not store.is_public(MANIFEST_DIGEST)


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("proof", ["secret", "client"])
@pytest.mark.parametrize("put", [put_blob, put_manifest])
def test_after_a_crash_in_the_moment_in_which_it_has_its_name_content_is_whose_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[..., Digest], proof: Proof, lost: bool
) -> None:
    """A public image names it. ``lost``: the catalog is, too."""
    crashed, adopt = path.parent / "crashed", SpoolFile.adopt
    index = {"mediaType": OCI_INDEX, "schemaVersion": 2}
    names = [{"mediaType": OCI_MANIFEST, "digest": str(MANIFEST_DIGEST), "size": len(MANIFEST)}]

    def crash(spool: SpoolFile, digest: Digest) -> None:
        adopt(spool, digest)
        shutil.copytree(path, crashed)

    with opened(path) as store:
        elsewhere = Origin(UP, ELSEWHERE, "anonymous")
        put_manifest(store, manifest_of("whose writer knows a digest"), elsewhere)
        put_manifest(store, json.dumps(index | {"manifests": names}).encode(), elsewhere, OCI_INDEX)
        monkeypatch.setattr(SpoolFile, "adopt", crash)
        digest = put(store, origin=Origin(UP, REPO, proof))
    if lost:
        for file in crashed.glob("cache.db*"):
            file.unlink()
    with opened(crashed) as store:
        assert store.has(digest)
        assert not store.is_public(digest)
        assert [may_read(store, digest, where, public=False) for where in (REPO, ELSEWHERE)] == [True, False]
        held = store.manifest(digest)
        assert (held and held[:2]) == ((MANIFEST, OCI_MANIFEST) if put is put_manifest else None)


@pytest.mark.parametrize("put", [put_blob, put_manifest])
def test_content_is_somebodys_before_it_is_held(
    path: Path, monkeypatch: pytest.MonkeyPatch, put: Callable[..., Digest]
) -> None:
    seen: list[tuple[bool, bool]] = []
    add = Catalog.add

    def look(catalog: Catalog, digest: Digest, *rest: Any) -> Any:
        seen.append((catalog.is_linked(UP, REPO, digest, public=False), catalog.blob(digest) is not None))
        return add(catalog, digest, *rest)

    with opened(path) as store:
        monkeypatch.setattr(Catalog, "add", look)
        put(store, origin=Origin(UP, REPO, "client"))
    assert seen == [(True, False)]


# --- what is withdrawn ---


@pytest.mark.parametrize("again", [None, "client", "secret"])
def test_a_blob_that_became_private_is_not_public_when_the_catalog_is_lost(path: Path, again: Proof | None) -> None:
    """``again``: it was then given to somebody, who was asked whether he may have it."""
    with opened(path) as store:
        put_blob(store)
        assert not notes_of(path, LAYER_DIGEST).exists(), "what is public has none"
        store.withdraw(UP, REPO, "anonymous")
        put_manifest(store, manifest_of("whose writer knows a digest"), Origin(UP, ELSEWHERE, "anonymous"))
        if again:
            store.link(Origin(UP, REPO, again, since=store.withdrawals), LAYER_DIGEST)
    (path / "cache.db").unlink()
    with opened(path) as store:
        assert store.has(LAYER_DIGEST)
        assert not store.is_public(LAYER_DIGEST)
        assert [may_read(store, LAYER_DIGEST, where, public=False) for where in (REPO, ELSEWHERE)] == [bool(again), False]


def test_a_blob_of_which_nothing_was_known_is_private_once_it_is_linked_so(path: Path) -> None:
    with opened(path):
        pass
    file_of(path, LAYER_DIGEST).write_bytes(LAYER)
    with opened(path) as store:
        assert store.is_others(UP, LAYER_DIGEST)
        store.link(Origin(UP, REPO, "client"), LAYER_DIGEST)
        put_manifest(store, origin=Origin(UP, ELSEWHERE, "anonymous"))
    (path / "cache.db").unlink()
    with opened(path) as store:
        assert not store.is_public(LAYER_DIGEST)


def test_a_blob_that_is_public_again_is_so_when_the_catalog_is_lost(path: Path) -> None:
    with opened(path) as store:
        put_blob(store)
        store.withdraw(UP, REPO, "anonymous")
        put_blob(store, origin=Origin(UP, REPO, "anonymous", since=store.withdrawals))
    (path / "cache.db").unlink()
    with opened(path) as store:
        assert may_read(store, LAYER_DIGEST)


@pytest.mark.parametrize("lost", [False, True])
def test_what_was_got_by_a_right_that_is_withdrawn_is_nobodys(path: Path, lost: bool) -> None:
    """The download was on its way."""
    with opened(path) as store:
        store.withdraw(UP, REPO, "anonymous")
        put_blob(store)
        store.link(PUBLIC, LAYER_DIGEST)
        store.put_referrers(PUBLIC, MANIFEST_DIGEST, b"[]", 1.0)
        put_manifest(store, manifest_of("whose writer knows a digest"), Origin(UP, ELSEWHERE, "anonymous"))
    if lost:
        (path / "cache.db").unlink()
    with opened(path) as store:
        assert body_of(store, LAYER_DIGEST) == LAYER
        assert not store.was_given(UP, REPO, "anonymous")
        assert not store.is_public(LAYER_DIGEST)
        assert store.is_others(UP, LAYER_DIGEST)


def test_a_blob_of_an_image_that_was_withdrawn_is_not_public_when_the_catalog_is_lost(path: Path) -> None:
    """That no link is left of the manifest that names it does not make it one that only public manifests name."""
    with opened(path) as store:
        put_manifest(store, origin=Origin(UP, REPO, "secret"))
        put_blob(store, origin=Origin(UP, REPO, "secret"))
        put_manifest(store, manifest_of("whose writer knows a digest"), Origin(UP, ELSEWHERE, "anonymous"))
        store.withdraw(UP, REPO, "secret")
    (path / "cache.db").unlink()
    with opened(path) as store:
        assert store.has(LAYER_DIGEST)
        assert not store.is_public(LAYER_DIGEST)
        assert not may_read(store, LAYER_DIGEST, ELSEWHERE)


def test_what_is_withdrawn_is_not_given_any_more_and_stays_so(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The content stays, for who may read it; the notes beside it are changed with the catalog."""
    ours = Origin(UP, REPO, "secret")
    subject = digest_of(b"subject")
    with opened(path) as store:
        put_manifest(store, origin=ours)
        put_manifest(store, origin=Origin(UP, ELSEWHERE, "secret"))
        put_blob(store, origin=ours)
        store.link(PUBLIC, subject)
        store.put_referrers(ours, MANIFEST_DIGEST, b"[]", 1.0)
        store.withdraw(UP, REPO, "secret")
        assert "2 links are withdrawn" in caplog.text
        assert store.referrers(UP, REPO, MANIFEST_DIGEST, public=False) is None
    for lost in (False, True):
        if lost:
            (path / "cache.db").unlink()
        with opened(path) as store:
            assert not store.was_given(UP, REPO, "secret")
            assert not may_read(store, MANIFEST_DIGEST, public=False)
            assert not may_read(store, LAYER_DIGEST, public=False)
            assert may_read(store, MANIFEST_DIGEST, ELSEWHERE, public=False)
            assert body_of(store, LAYER_DIGEST) == LAYER
            assert may_read(store, subject) is not lost


def test_a_list_of_referrers_is_withdrawn_where_it_is_all_that_was_given(path: Path) -> None:
    with opened(path) as store:
        store.put_referrers(PUBLIC, MANIFEST_DIGEST, b"[]", 1.0)
        assert store.referrers(UP, REPO, MANIFEST_DIGEST, public=True) is not None
        store.withdraw(UP, REPO, "anonymous")
        assert store.referrers(UP, REPO, MANIFEST_DIGEST, public=False) is None


def test_withdrawing_what_was_not_given_is_silent(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(path) as store:
        store.withdraw(UP, REPO, "secret")
    assert not caplog.records


# --- damaged notes ---


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
        assert not may_read(store, LAYER_DIGEST, public=False), "who named it is not known any more"
        store.set_tag(UP, REPO, Tag("1"), ACCEPT, put_manifest(store), 1.0)
        store.link(PUBLIC, LAYER_DIGEST)
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
        assert not may_read(store, LAYER_DIGEST, public=False)
        assert store.manifest(LAYER_DIGEST) is None


def test_a_record_without_a_file_is_dropped_at_the_start(path: Path) -> None:
    fill(path)
    file_of(path, LAYER_DIGEST).unlink()
    with opened(path) as store:
        assert not store.has(LAYER_DIGEST)
        assert store.open_blob(LAYER_DIGEST) is None
        assert store.has(MANIFEST_DIGEST)
        assert may_read(store, LAYER_DIGEST), "it stays proved"


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
