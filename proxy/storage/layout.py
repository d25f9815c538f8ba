"""Content on the local disk: a valid OCI image layout, with pullcache's own files beside it.

    DIRECTORY/
      oci-layout, index.json         so that other tools read it (OCI image spec, image-layout.md)
      blobs/<algorithm>/<hex>        content; whatever stands here was complete, hashed and synced first
      meta/<algorithm>/<hex>.json    beside each manifest and private blob: what the catalog can be rebuilt from
      ingest/                        spools and other files in the making; emptied at every start
      quarantine/                    what stood under blobs/ and was not what its name says
      cache.db                       the catalog
      reserve                        given up when the disk is full at a start, so that the catalog can be opened
      lock                           held by the one process that works here

Nothing is written onto its final name: write, hash, fsync, rename, fsync of the folder. Names of files are digests that
passed the grammar, opened relative to folders that were opened at the start, never through a symbolic link.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from proxy.errors import RegistryError
from proxy.names import Digest, parse_digest
from proxy.storage.space import Disk, Limits, Space, charge

log = logging.getLogger(__name__)

ALGORITHMS = ("sha256", "sha512")
UNBOUNDED = Limits(None, 0.05)
"""All of the disk but a part that is left free."""
_RESERVE = 1024 * 1024
_STEP = 64 * 1024 * 1024
"""What is granted at once to content of which the size is not known."""
_OWN = ("cache.db", "cache.db-wal", "cache.db-shm", "reserve", "index.json", "oci-layout", "lock")

_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "fuse.sshfs", "fuse.glusterfs"}
)
_NOT_A_FILE = frozenset({errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EISDIR, errno.ENOTDIR})
_OPEN = os.O_CLOEXEC | os.O_NOFOLLOW


class DirectoryUnusable(Exception):
    """The cache directory cannot be used; the text names it, says why and what to do."""


class SpoolFile:
    """A file in ``ingest/`` that becomes content, or is removed."""

    def __init__(self, layout: Layout, name: str, descriptor: int, digest: Digest | None) -> None:
        self._layout = layout
        self.name = name
        self.digest = digest
        self.descriptor = descriptor
        self.named = True
        self._granted = 0
        self._written = 0

    def write(self, data: bytes, size: int | None = None) -> None:
        """Writes all of ``data``; raises ``OSError``, also when the disk should take no more. ``size``: of the whole, if it
        is known."""
        wanted = self._written + len(data)
        if charge(wanted) > self._granted:
            step = charge(wanted if size is None or size < wanted else size) - self._granted
            if size is None:
                step = max(step, _STEP)
            if not self._layout.space.grant(step):
                raise OSError(errno.ENOSPC, "cache.maxSize and cache.minFree leave no room for it, and nothing more may go")
            self._granted += step
        view = memoryview(data)
        while view:
            count = os.write(self.descriptor, view)
            self._written += count
            self._layout.space.wrote(count)
            view = view[count:]

    def adopt(self, digest: Digest) -> None:
        """Puts the file in its place, for good; the caller has checked that it holds what ``digest`` names."""
        self._layout._place(self, digest)
        self.named = False
        self._layout.space.keep(self._written)
        self._give_back()

    def _give_back(self) -> None:
        granted, self._granted = self._granted, 0
        written, self._written = self._written, 0
        self._layout.space.give_back(granted, written)

    def close(self) -> None:
        """Closes the file, and removes it if it was not adopted."""
        try:
            if self.named:
                self.named = False
                os.unlink(self.name, dir_fd=self._layout.ingest)
        except OSError as error:
            log.warning("a spool could not be removed: %s", error)
        finally:
            os.close(self.descriptor)
            self._layout.spools.discard(self)
            self._give_back()


class Layout:
    """The files of one cache directory. Blocking; one instance a directory, guarded by a lock."""

    def __init__(self, path: Path, root: int, lock: int, limits: Limits) -> None:
        self.path = path
        self.space = Space(limits, self._disk, self._own)
        self.spools: set[SpoolFile] = set()
        self._root = root
        self._lock = lock
        self._serial = itertools.count()
        self.ingest = self._folder("ingest")
        self._quarantine = self._folder("quarantine")
        self._blobs = {algorithm: self._folder(f"blobs/{algorithm}") for algorithm in ALGORITHMS}
        self._meta = {algorithm: self._folder(f"meta/{algorithm}") for algorithm in ALGORITHMS}

    @classmethod
    def open(cls, path: Path, limits: Limits = UNBOUNDED) -> Layout:
        """The directory at ``path``, made if it is missing, locked and swept; raises ``DirectoryUnusable``."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _OPEN)
        except OSError as error:
            reason = error.strerror or str(error)
            if path.is_symlink():
                reason = "it is a symbolic link; name the real directory"
            elif path.exists() and not path.is_dir():
                reason = "it is not a directory; name one, or a place where one can be made"
            raise DirectoryUnusable(f"cache.directory: {path} cannot be used: {reason}") from error
        lock = -1
        try:
            _check_root(path, os.fstat(root))
            lock = os.open("lock", os.O_RDWR | os.O_CREAT | _OPEN, 0o600, dir_fd=root)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            layout = cls(path, root, lock, limits)
        except OSError as error:
            for descriptor in (root, lock):
                if descriptor >= 0:
                    os.close(descriptor)
            if isinstance(error, BlockingIOError):
                raise DirectoryUnusable(
                    f"cache.directory: {path} is in use by another pullcache; stop that one, or use another directory"
                ) from error
            raise DirectoryUnusable(f"cache.directory: {path} cannot be used: {error}") from error
        except DirectoryUnusable:
            os.close(root)
            raise
        return layout

    def give_up_reserve(self) -> bool:
        """Frees a little of a full disk. Whether there was something to free."""
        try:
            os.unlink("reserve", dir_fd=self._root)
        except OSError:
            return False
        return True

    def prepare(self) -> None:
        """Removes what a crash left in the making, and makes the directory a layout; raises ``OSError``."""
        self._sweep()
        self._make_reserve()
        self._describe("oci-layout", {"imageLayoutVersion": "1.0.0"})
        index = "application/vnd.oci.image.index.v1+json"
        self._describe("index.json", {"schemaVersion": 2, "mediaType": index, "manifests": []})

    def close(self) -> None:
        """Gives the directory up."""
        for descriptor in (
            self.ingest,
            self._quarantine,
            *self._blobs.values(),
            *self._meta.values(),
            self._root,
            self._lock,
        ):
            os.close(descriptor)

    def spool(self, digest: Digest | None = None) -> SpoolFile:
        """A new, empty file in ``ingest/``, perhaps to become the content of ``digest``; raises ``OSError``."""
        name = f"{os.getpid()}-{next(self._serial)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _OPEN
        spool = SpoolFile(self, name, os.open(name, flags, 0o600, dir_fd=self.ingest), digest)
        self.spools.add(spool)
        return spool

    def _disk(self) -> Disk:
        disk = os.fstatvfs(self._root)
        return Disk(disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize, disk.f_files == 0 or disk.f_favail > 0)

    def _own(self) -> int:
        """Bytes of the catalog and of what else stands in the directory itself."""
        size = 0
        for name in _OWN:
            with contextlib.suppress(OSError):
                size += charge(os.stat(name, dir_fd=self._root, follow_symlinks=False).st_size)
        return size

    def open_blob(self, digest: Digest, size: int) -> int | None:
        """A descriptor of the content, or None where there is none.

        What is there but is not a file of our own of that size (a symbolic or hard link, a device, a truncated file) goes
        into quarantine: raises ``FileNotFoundError``. Any other ``OSError`` is the disk's trouble, or the system's.
        """
        folder = self._blobs[digest.algorithm]
        descriptor = -1
        try:
            descriptor = os.open(digest.hex, os.O_RDONLY | os.O_NONBLOCK | _OPEN, dir_fd=folder)
            found = os.fstat(descriptor)
            if (
                stat.S_ISREG(found.st_mode)
                and found.st_size == size
                and found.st_nlink == 1
                and found.st_uid == os.geteuid()
            ):
                return descriptor
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in _NOT_A_FILE:
                raise
        if descriptor >= 0:
            os.close(descriptor)
        self.set_aside_blob(digest)
        raise FileNotFoundError(errno.ENOENT, "not a file of ours, moved into quarantine", digest.hex)

    def remove(self, digest: Digest) -> None:
        """Removes content and what is written beside it, where it is there; raises ``OSError``."""
        for folder, name in ((self._blobs, digest.hex), (self._meta, f"{digest.hex}.json")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=folder[digest.algorithm])

    def contents(self) -> Iterator[tuple[Digest, int]]:
        """Digest and size of every file under ``blobs/`` that has a digest for a name."""
        for algorithm, folder in self._blobs.items():
            with os.scandir(folder) as entries:
                for entry in entries:
                    try:
                        digest = parse_digest(f"{algorithm}:{entry.name}")
                    except RegistryError:
                        continue  # not ours: left alone, never served
                    yield digest, entry.stat(follow_symlinks=False).st_size

    def write_meta(self, digest: Digest, document: dict[str, Any]) -> None:
        """Replaces what is written beside content, for good; raises ``OSError``."""
        self._write(f"{digest.hex}.json", self._meta[digest.algorithm], document)

    def read_meta(self, digest: Digest) -> dict[str, Any] | None:
        """What is written beside content, or None if nothing readable is."""
        return _read_json(f"{digest.hex}.json", self._meta[digest.algorithm])

    def drop_notes(self, kept: Collection[Digest]) -> None:
        """Removes what is written beside content that is not there, since a crash came before it; raises ``OSError``."""
        for algorithm, folder in self._meta.items():
            for name in os.listdir(folder):
                try:
                    digest = parse_digest(f"{algorithm}:{name.removesuffix('.json')}")
                except RegistryError:
                    continue
                if name.endswith(".json") and digest not in kept:
                    os.unlink(name, dir_fd=folder)

    def set_aside(self, name: str) -> None:
        """Moves a file of the directory itself (the catalog) into quarantine."""
        os.rename(name, f"{name}-{self._stamp()}", src_dir_fd=self._root, dst_dir_fd=self._quarantine)

    def _folder(self, relative: str) -> int:
        current = os.dup(self._root)
        for part in relative.split("/"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o700, dir_fd=current)
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | _OPEN, dir_fd=current)
            os.close(current)
            current = inner
        return current

    def _sweep(self) -> None:
        """No file in the making is ever needed again."""
        with os.scandir(self.ingest) as entries:
            for entry in entries:
                if not entry.is_dir(follow_symlinks=False):
                    os.unlink(entry.name, dir_fd=self.ingest)

    def _make_reserve(self) -> None:
        if self.space.lacking(_RESERVE) > 0:
            return
        with contextlib.suppress(OSError):
            descriptor = os.open("reserve", os.O_WRONLY | os.O_CREAT | _OPEN, 0o600, dir_fd=self._root)
            try:
                os.posix_fallocate(descriptor, 0, _RESERVE)
            finally:
                os.close(descriptor)

    def _describe(self, name: str, document: dict[str, Any]) -> None:
        """Writes a file of the layout, unless a good one stands there."""
        if _read_json(name, self._root) is None:
            self._write(name, self._root, document)

    def _write(self, name: str, folder: int, document: dict[str, Any]) -> None:
        spool = self.spool()
        try:
            data = json.dumps(document, indent=1).encode()
            spool.write(data, len(data))
            os.fsync(spool.descriptor)
            os.rename(spool.name, name, src_dir_fd=self.ingest, dst_dir_fd=folder)
            spool.named = False
            os.fsync(folder)
        finally:
            spool.close()

    def _place(self, spool: SpoolFile, digest: Digest) -> None:
        folder = self._blobs[digest.algorithm]
        os.fsync(spool.descriptor)
        try:
            os.rename(spool.name, digest.hex, src_dir_fd=self.ingest, dst_dir_fd=folder)
        except (IsADirectoryError, FileExistsError, NotADirectoryError):
            self.set_aside_blob(digest)
            os.rename(spool.name, digest.hex, src_dir_fd=self.ingest, dst_dir_fd=folder)
        os.fsync(folder)

    def set_aside_blob(self, digest: Digest) -> None:
        """Moves what stands at a digest's place, and does not belong there, into quarantine."""
        log.warning("%s is not a file of ours, or not what its name says: moved into quarantine", digest)
        target = f"{digest.algorithm}-{digest.hex}-{self._stamp()}"
        with contextlib.suppress(FileNotFoundError):
            os.rename(digest.hex, target, src_dir_fd=self._blobs[digest.algorithm], dst_dir_fd=self._quarantine)

    def _stamp(self) -> str:
        return f"{os.getpid()}-{next(self._serial)}-{os.urandom(4).hex()}"


def _read_json(name: str, folder: int) -> dict[str, Any] | None:
    try:
        with open(os.open(name, os.O_RDONLY | os.O_NONBLOCK | _OPEN, dir_fd=folder), encoding="utf-8") as file:
            document = json.load(file)
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _check_root(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise DirectoryUnusable(f"cache.directory: {path} belongs to another user (uid {found.st_uid}); chown it")
    if found.st_mode & 0o022:
        raise DirectoryUnusable(f"cache.directory: {path} is writable for others; chmod 700 it")
    kind = _file_system(path)
    if kind in _NETWORK:
        raise DirectoryUnusable(
            f"cache.directory: {path} is on a network file system ({kind}), where the catalog is not safe; use a local disk"
        )


def _file_system(path: Path) -> str:
    """The type of the file system that ``path`` is on; empty where the system does not tell."""
    best, kind = "", ""
    try:
        real = str(path.resolve())
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                before, _, after = line.partition(" - ")
                mount = before.split()[4]
                if (real == mount or real.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
                    best, kind = mount, after.split()[0]
    except OSError:
        pass
    return kind
