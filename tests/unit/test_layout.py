"""The cache directory: a valid OCI image layout, into which only whole, synced files of our own get, under one lock."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxy.names import digest_of
from proxy.storage import layout as layout_module
from proxy.storage.layout import DirectoryUnusable, Layout, SpoolFile

BODY = b"content " * 1000
DIGEST = digest_of(BODY)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def start(path: Path) -> Layout:
    """As ``Store`` does it."""
    opened = Layout.open(path)
    opened.prepare()
    return opened


@pytest.fixture
def layout(path: Path) -> Iterator[Layout]:
    opened = start(path)
    yield opened
    opened.close()


def files(path: Path) -> set[str]:
    """Every file below, relative."""
    return {str(item.relative_to(path)) for item in path.rglob("*") if not item.is_dir()}


def spooled(layout: Layout, body: bytes = BODY) -> SpoolFile:
    spool = layout.spool()
    spool.write(body)
    return spool


def hold(layout: Layout) -> None:
    spool = spooled(layout)
    spool.adopt(DIGEST)
    spool.close()


# --- what the directory is ---


def test_the_directory_is_an_oci_image_layout_that_only_the_owner_reads(layout: Layout, path: Path) -> None:
    assert json.loads((path / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((path / "index.json").read_bytes())
    assert (index["schemaVersion"], index["manifests"]) == (2, [])
    assert index["mediaType"] == "application/vnd.oci.image.index.v1+json"
    assert path.stat().st_mode & 0o777 == 0o700
    assert files(path) == {"oci-layout", "index.json", "lock", "reserve"}
    hold(layout)
    assert (path / "blobs" / "sha256" / DIGEST.hex).read_bytes() == BODY
    assert list(layout.contents()) == [(DIGEST, len(BODY))]


@pytest.mark.parametrize("name", ["oci-layout", "index.json"])
def test_a_description_that_a_crash_left_empty_is_written_anew(path: Path, name: str) -> None:
    start(path).close()
    before = (path / name).read_bytes()
    (path / name).write_bytes(b"")
    start(path).close()
    assert (path / name).read_bytes() == before


def test_index_json_that_another_tool_wrote_is_kept(path: Path) -> None:
    start(path).close()
    theirs = b'{"schemaVersion": 2, "manifests": [], "annotations": {"by": "somebody"}}'
    (path / "index.json").write_bytes(theirs)
    start(path).close()
    assert (path / "index.json").read_bytes() == theirs


def test_foreign_files_are_left_alone_and_are_not_content(path: Path) -> None:
    start(path).close()
    foreign = ["README", "blobs/README", "blobs/sha256/README", f"blobs/sha256/{DIGEST.hex.upper()}", "blobs/sha256/.tmp"]
    foreign += [f"blobs/sha256/{DIGEST.hex}.bak", f"blobs/sha512/{DIGEST.hex}", "quarantine/old", "ingest/folder/file"]
    for name in foreign:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(BODY)
    opened = start(path)
    try:
        assert list(opened.contents()) == []
        assert {name for name in foreign if (path / name).read_bytes() == BODY} == set(foreign)
    finally:
        opened.close()


def test_what_was_in_the_making_is_swept_at_the_start(path: Path, tmp_path: Path) -> None:
    start(path).close()
    canary = tmp_path / "canary"
    canary.write_bytes(b"canary")
    (path / "ingest" / "1-0").write_bytes(b"half")
    (path / "ingest" / "link").symlink_to(canary)
    os.mkfifo(path / "ingest" / "fifo")
    start(path).close()
    assert list((path / "ingest").iterdir()) == []
    assert canary.read_bytes() == b"canary"


# --- how content gets in ---


class Journal:
    """The order of syncs and renames, with names relative to the directory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.steps: list[tuple[str, str]] = []
        fsync, rename = os.fsync, os.rename

        def name(descriptor: int) -> str:
            return os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), root)

        def synced(descriptor: int) -> None:
            fsync(descriptor)
            self.steps.append(("fsync", name(descriptor)))

        def renamed(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
            rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            self.steps.append(("rename", f"{name(src_dir_fd)}/{source} {name(dst_dir_fd)}/{target}"))

        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr(os, "rename", renamed)


def test_adopting_syncs_the_file_then_renames_it_then_syncs_the_folder(
    layout: Layout, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = spooled(layout)
    source = f"ingest/{spool.name}"
    assert files(path) - {"oci-layout", "index.json", "lock", "reserve"} == {source}
    journal = Journal(monkeypatch, path)
    spool.adopt(DIGEST)
    target = f"blobs/sha256/{DIGEST.hex}"
    assert journal.steps == [("fsync", source), ("rename", f"{source} {target}"), ("fsync", "blobs/sha256")]
    spool.close()
    assert files(path) - {"oci-layout", "index.json", "lock", "reserve"} == {target}


def describe(layout: Layout, path: Path) -> None:
    for name in ("oci-layout", "index.json"):
        (path / name).unlink()
    layout.prepare()


@pytest.mark.parametrize(
    "action", [lambda layout, _: hold(layout), lambda layout, _: layout.write_meta(DIGEST, {"a": 1}), describe]
)
def test_no_file_gets_its_name_before_it_is_synced(
    layout: Layout, path: Path, monkeypatch: pytest.MonkeyPatch, action: Callable[[Layout, Path], None]
) -> None:
    journal = Journal(monkeypatch, path)
    action(layout, path)
    renames = [(at, text.split()[0]) for at, (kind, text) in enumerate(journal.steps) if kind == "rename"]
    assert renames
    for at, source in renames:
        assert ("fsync", source) in journal.steps[:at], f"{journal.steps[at]} without fsync"


def test_a_spool_that_is_closed_without_adoption_is_gone(layout: Layout, path: Path) -> None:
    spool = spooled(layout)
    spool.close()
    assert list((path / "ingest").iterdir()) == []
    assert list(layout.contents()) == []


def test_a_spool_takes_whole_writes_or_says_why_not(layout: Layout, path: Path) -> None:
    """F11, F15."""
    spool = layout.spool()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        spool.write(b"x" * 999)
        with pytest.raises(OSError, match="too large"):
            spool.write(b"y" * 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    spool.close()


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_file_that_cannot_be_synced_or_renamed_never_becomes_content(
    layout: Layout, path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """F13: an error of fsync means not committed."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    spool = spooled(layout)
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, fail)
        with pytest.raises(OSError, match="Input/output"):
            spool.adopt(DIGEST)
    spool.close()
    assert files(path) == {"oci-layout", "index.json", "lock", "reserve"}


def test_notes_that_the_disk_takes_only_in_part_do_not_replace_whole_ones(layout: Layout) -> None:
    """F11: a nearly full disk answers write() with fewer bytes, not with an error."""
    good = {"mediaType": "type", "links": [], "tags": []}
    layout.write_meta(DIGEST, good)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, hard))  # write() of more stops short at 40 bytes, then fails
    try:
        with contextlib.suppress(OSError):
            layout.write_meta(DIGEST, {**good, "links": [{"upstream": "registry.test", "repository": "team/app"}] * 9})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert layout.read_meta(DIGEST) == good


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"\xff", None])
def test_notes_that_cannot_be_read_are_none(layout: Layout, path: Path, garbage: bytes | None) -> None:
    assert layout.read_meta(DIGEST) is None
    if garbage is not None:
        (path / "meta" / "sha256" / f"{DIGEST.hex}.json").write_bytes(garbage)
    assert layout.read_meta(DIGEST) is None


# --- who may use it ---


def test_a_second_instance_is_refused_until_the_first_has_gone(layout: Layout, path: Path) -> None:
    """F04: by a lock, not by a file that is there."""
    for _ in range(100):
        with pytest.raises(DirectoryUnusable, match="in use by another pullcache") as refused:
            Layout.open(path)
        assert str(path) in str(refused.value)
    script = "import sys, pathlib, proxy.storage.layout as l; l.Layout.open(pathlib.Path(sys.argv[1]))"
    second = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=False, timeout=60)
    assert second.returncode != 0
    assert "in use by another pullcache" in second.stderr
    spool = spooled(layout)
    assert (path / "ingest" / spool.name).exists(), "a refused instance must not sweep"
    spool.close()


def test_a_lock_file_without_a_holder_is_no_obstacle(path: Path) -> None:
    """F04."""
    start(path).close()
    assert (path / "lock").exists()
    start(path).close()


def _symlink(path: Path) -> None:
    (path.parent / "real").mkdir(mode=0o700)
    path.symlink_to(path.parent / "real")


def _inner_symlink(path: Path) -> None:
    (path.parent / "real").mkdir(mode=0o700)
    path.mkdir(mode=0o700)
    (path / "blobs").symlink_to(path.parent / "real")


def _mode(mode: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        path.chmod(mode)

    return make


def _foreign(path: Path) -> None:
    path.mkdir(mode=0o700)
    os.chown(path, 12345, 12345)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(_symlink, "symbolic link", id="symlink"),
        pytest.param(lambda path: path.symlink_to("nowhere"), "symbolic link", id="dangling symlink"),
        pytest.param(_inner_symlink, "blobs", id="inner symlink"),
        pytest.param(_mode(0o770), "writable for others.*chmod 700", id="group-writable"),
        pytest.param(_mode(0o702), "writable for others.*chmod 700", id="world-writable"),
        pytest.param(_foreign, "another user.*12345.*chown", id="other owner", marks=needs_root),
        pytest.param(lambda path: path.write_bytes(b"mine"), "not a directory", id="file"),
    ],
)
def test_a_directory_that_is_not_ours_alone_is_refused_by_name(
    path: Path, make: Callable[[Path], None], reason: str
) -> None:
    """T37."""
    make(path)
    before = files(path.parent)
    with pytest.raises(DirectoryUnusable, match=f"(?i)^cache.directory: .*{reason}") as refused:
        Layout.open(path)
    assert str(path) in str(refused.value)
    assert {name for name in files(path.parent) if not name.endswith("lock")} == before, "nothing was made in it"


def test_a_network_file_system_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "_file_system", lambda _: "nfs4")
    with pytest.raises(DirectoryUnusable, match=r"network file system \(nfs4\)"):
        Layout.open(path)


# --- what is read ---


def _other_owner(path: Path, _: Path) -> None:
    path.write_bytes(BODY)
    os.chown(path, 12345, 12345)


FOREIGN: dict[str, Callable[[Path, Path], object]] = {
    "symlink": lambda path, canary: path.symlink_to(canary),
    "hard link": lambda path, canary: path.hardlink_to(canary),
    "fifo": lambda path, _: os.mkfifo(path),
    "device": lambda path, _: os.mknod(path, 0o20600, os.makedev(1, 5)),
    "directory": lambda path, _: path.mkdir(),
    "truncated": lambda path, _: path.write_bytes(BODY[:-1]),
    "longer": lambda path, _: path.write_bytes(BODY + b"x"),
    "empty": lambda path, _: path.write_bytes(b""),
    "other owner": _other_owner,
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=needs_root) if k in ("device", "other owner") else k for k in FOREIGN]
)
def test_what_is_not_a_whole_file_of_our_own_goes_into_quarantine(
    layout: Layout, path: Path, tmp_path: Path, kind: str
) -> None:
    """T37."""
    canary = tmp_path / "canary"
    canary.write_bytes(BODY)
    hold(layout)
    place = path / "blobs" / "sha256" / DIGEST.hex
    place.unlink()
    FOREIGN[kind](place, canary)
    with pytest.raises(FileNotFoundError, match="quarantine"):
        layout.open_blob(DIGEST, len(BODY))
    assert not os.path.lexists(place)
    assert len(list((path / "quarantine").iterdir())) == 1
    assert layout.open_blob(DIGEST, len(BODY)) is None
    FOREIGN[kind](place, canary)
    hold(layout)  # in its place, not through it
    descriptor = layout.open_blob(DIGEST, len(BODY))
    assert descriptor is not None
    assert os.read(descriptor, 1 << 20) == BODY
    os.close(descriptor)
    assert canary.read_bytes() == BODY
