"""Which images go, against a plain model: never a part of one, never what is spared, and something while anything may."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.manifests import OCI_INDEX, OCI_MANIFEST, Descriptor, Manifest
from proxy.names import Digest, digest_of
from proxy.storage.catalog import Catalog
from proxy.storage.replacement import Pull

SIZE = 10
BLOBS = [digest_of(f"blob {number}".encode()) for number in range(12)]


class Machine(RuleBasedStateMachine):
    """Images that share blobs, and indexes of them."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self.catalog = Catalog.open(Path(self._folder.name) / "cache.db")
        self.serial = 0
        self.named: dict[Digest, list[Digest]] = {}
        self.held: set[Digest] = set()
        self.indexes: set[Digest] = set()

    def teardown(self) -> None:
        """Closes it."""
        self.catalog.close()
        self._folder.cleanup()

    def _add(self, children: list[Digest], media_type: str) -> Digest:
        self.serial += 1
        digest = digest_of(f"manifest {self.serial}".encode())
        manifest = Manifest(media_type, tuple(Descriptor(child, SIZE) for child in children))
        self.catalog.add(digest, SIZE, manifest).result()
        self.named[digest] = children
        self.held.add(digest)
        return digest

    @rule(blobs=st.lists(st.sampled_from(BLOBS), min_size=1, max_size=4, unique=True))
    def image(self, blobs: list[Digest]) -> None:
        """An image is pulled whole."""
        self._add(blobs, OCI_MANIFEST)
        for blob in blobs:
            self.catalog.add(blob, SIZE).result()
        self.held.update(blobs)

    @rule(blob=st.sampled_from(BLOBS))
    def blob(self, blob: Digest) -> None:
        """A blob comes by itself."""
        self.catalog.add(blob, SIZE).result()
        self.held.add(blob)

    @precondition(lambda self: self.named)
    @rule(data=st.data())
    def index(self, data: st.DataObject) -> None:
        """An index of images, which need not be held."""
        leaves = [digest for digest in self.named if digest not in self.indexes]
        children = data.draw(st.lists(st.sampled_from(leaves), min_size=1, max_size=3, unique=True))
        self.indexes.add(self._add(children, OCI_INDEX))

    @precondition(lambda self: self.named)
    @rule(data=st.data(), again=st.booleans())
    def pull(self, data: st.DataObject, again: bool) -> None:
        """Somebody pulls something that was here once."""
        digest = data.draw(st.sampled_from(sorted(self.named, key=str)))
        self.catalog.pulled([Pull(digest, 1.0, again)]).result()

    @rule(need=st.integers(1, 12), data=st.data())
    def evict(self, need: int, data: st.DataObject) -> None:
        """Room is made; each image is gone or as it was."""
        spared = data.draw(st.sets(st.sampled_from(sorted(self.held, key=str)), max_size=3)) if self.held else set()
        before = {digest: self._parts(digest) for digest in self._held_images()}
        gone = self.catalog.evict(need * SIZE, spared.__contains__, []).result()
        digests = {each.digest for each in gone}
        assert digests <= self.held - spared
        assert len(digests) == len(gone)
        self.held -= digests
        for digest, parts in before.items():
            if digest in self.indexes & self.held:
                assert self._parts(digest) or not parts, "an index goes with the last of its images"
            elif digest in self.held:
                assert parts == self._parts(digest), "an image is never half gone because of us"
        if len(gone) < need:
            assert not [digest for digest in self._held_images() if self._may_go(digest, spared)]

    @rule(data=st.data())
    def drop_loose(self, data: st.DataObject) -> None:
        """What nothing names goes by its age."""
        spared = data.draw(st.sets(st.sampled_from(BLOBS), max_size=3))
        gone = self.catalog.evict_loose(float("inf"), spared.__contains__).result()
        loose = {blob for blob in self.held & {*BLOBS} if not self._parents(blob)}
        assert {each.digest for each in gone} == loose - spared
        self.held -= loose - spared

    def _held_images(self) -> list[Digest]:
        return [digest for digest in self.named if digest in self.held]

    def _parts(self, digest: Digest) -> set[Digest]:
        return {child for child in self.named[digest] if child in self.held}

    def _parents(self, digest: Digest) -> list[Digest]:
        return [parent for parent in self._held_images() if digest in self.named[parent]]

    def _may_go(self, digest: Digest, spared: set[Digest]) -> bool:
        own = {child for child in self._parts(digest) if self._parents(child) == [digest]}
        is_index_of_something = digest in self.indexes and bool(self._parts(digest))
        return not is_index_of_something and not spared & {digest, *own, *self._parents(digest)}

    @invariant()
    def the_records_say_what_is_held(self) -> None:
        """And every image has its place, every blob without a name its age."""
        assert set(self.catalog.digests()) == self.held
        rows: Any = self.catalog._reader.execute("SELECT digest FROM images").fetchall()
        assert {row[0] for row in rows} == {str(digest) for digest in self._held_images()}
        rows = self.catalog._reader.execute("SELECT digest FROM loose").fetchall()
        assert {row[0] for row in rows} == {str(blob) for blob in self.held & {*BLOBS} if not self._parents(blob)}


TestReplacement = Machine.TestCase
TestReplacement.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
