"""Kubernetes manifests as they are given to a command: files, directories, standard input, kustomizations. Blocking.

Nothing is fetched, and a kustomization reads what kustomize would let it read: files in and below its own directory, and
other directories with a kustomization of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from proxy import files
from proxy.kubernetes.documents import MAX_BYTES, DocumentsInvalid, parse_documents
from proxy.kubernetes.kustomize import FILE_NAMES, apply, parse_kustomization
from proxy.kubernetes.pods import Objects, read_objects
from proxy.logs import printable

STDIN = "-"
_SUFFIXES = (".yaml", ".yml", ".json")
_MAX_FILES = 1000
_MAX_DEPTH = 32
_MAX_ALL = 4 * MAX_BYTES


class FilesUnusable(Exception):
    """What was given cannot be read as it is; a line for each fault."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


def read_files(names: Sequence[str], stdin: BinaryIO) -> tuple[Objects, tuple[str, ...]]:
    """The objects in files, directories and, for ``-``, standard input, and what is to be said about them; raises
    ``FilesUnusable``."""
    reader = _Reader(stdin)
    objects = Objects()
    try:
        for name in names:
            objects += reader.given(name)
    except _Stop as error:
        reader.faults[str(error)] = None
    if reader.faults:
        raise FilesUnusable(list(reader.faults))
    return objects, tuple(reader.notes)


class _Stop(Exception):
    """No more is read; the text says why."""


class _Reader:
    """One reading: its bounds, the directories that it is in, and what it has to say."""

    def __init__(self, stdin: BinaryIO) -> None:
        self._stdin = stdin
        self._files = 0
        self._bytes = 0
        self._within: list[Path] = []
        self.faults: dict[str, None] = {}
        self.notes: dict[str, None] = {}

    def given(self, name: str) -> Objects:
        """What a user has named."""
        path = Path(name)
        with self._noting(name):
            if name == STDIN:
                content = self._stdin.read(MAX_BYTES + 1)
                return read_objects(parse_documents(self._counted(content), "standard input"))
            if path.is_dir():
                return self._directory(path)
            if path.name in FILE_NAMES:
                return self._kustomization(path)
            return self._file(path)
        return Objects()

    @contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        """Notes a fault, and goes on with what is next."""
        try:
            yield
        except OSError as error:
            self.faults[f"{printable(name)}: cannot be read: {error.strerror or 'no file can have that name'}"] = None
        except DocumentsInvalid as error:
            self.faults[str(error)] = None
        except ValueError:
            self.faults[f"{printable(name)}: no file can have that name"] = None

    def _counted(self, content: bytes) -> bytes:
        self._files += 1
        self._bytes += len(content)
        if self._files > _MAX_FILES or self._bytes > _MAX_ALL:
            raise _Stop(f"more than {_MAX_FILES} files or {_MAX_ALL // 1024 // 1024} MiB; give them in several calls")
        return content

    def _file(self, path: Path) -> Objects:
        return read_objects(parse_documents(self._counted(files.read(path, MAX_BYTES)), printable(str(path), 4096)))

    def _directory(self, path: Path) -> Objects:
        """As ``kubectl apply -f`` reads it, not recursively; a kustomization in it is followed instead."""
        if (kustomization := _kustomization_in(path)) is not None:
            return self._kustomization(kustomization)
        found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
        if not found:
            raise DocumentsInvalid(f"{printable(str(path), 4096)}: no *.yaml, *.yml or *.json in it")
        objects = Objects()
        for file in found:
            with self._noting(str(file)):
                objects += self._file(file)
        return objects

    def _kustomization(self, path: Path) -> Objects:
        source, real = printable(str(path), 4096), path.parent.resolve()
        if real in self._within:
            raise DocumentsInvalid(f"{source}: a circle of kustomizations: its resources lead back to it")
        if len(self._within) == _MAX_DEPTH:
            raise DocumentsInvalid(f"{source}: more than {_MAX_DEPTH} kustomizations within each other")
        content = parse_documents(self._counted(files.read(path, MAX_BYTES)), source)
        kustomization = parse_kustomization(content, source)
        for name in kustomization.not_evaluated:
            self.notes[f"{source}: '{name}' is not evaluated"] = None
        objects = Objects()
        self._within.append(real)
        for resource in kustomization.resources:
            with self._noting(f"{source}: {resource}"):
                objects += self._resource(path.parent, resource, source)
        self._within.pop()
        return apply(kustomization, objects)

    def _resource(self, base: Path, resource: str, source: str) -> Objects:
        shown = f"{source}: resources: {printable(resource)}"
        path = base / resource
        if "://" in resource or (_is_remote(resource) and not path.exists()):
            self.notes[f"{shown}: a URL, which is not followed"] = None
            return Objects()
        if Path(resource).is_absolute():
            raise DocumentsInvalid(f"{shown}: absolute; write it relative to the kustomization")
        if path.is_dir():
            if (kustomization := _kustomization_in(path)) is None:
                raise DocumentsInvalid(f"{shown}: a directory without a kustomization.yaml")
            return self._kustomization(kustomization)
        if not path.resolve().is_relative_to(base.resolve()):
            raise DocumentsInvalid(f"{shown}: a file that is not in or below the directory of the kustomization")
        return self._file(path)


def _kustomization_in(path: Path) -> Path | None:
    return next((path / name for name in FILE_NAMES if (path / name).is_file()), None)


def _is_remote(resource: str) -> bool:
    """Other forms that kustomize takes for a repository, where there is no file of that name."""
    return resource.startswith(("git@", "github.com/", "git::")) or "?ref=" in resource
