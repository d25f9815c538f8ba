"""A real multi-architecture image, made of Debian packages, as an OCI layout.

Run as ``python -m tests.real.image DIRECTORY`` it makes the image and prints its digests.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

TAG = "12"
PLATFORMS = ("linux/amd64", "linux/arm64")
BIG_LAYER = 100_000_000
"""The last layer of linux/amd64 is uncompressed and larger than this."""

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
TAR_TYPE = "application/vnd.oci.image.layer.v1.tar"
GZIP_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"

_RECIPE = 1  # count up when the image below changes: the directory in the cache is named after it
_COMMON = ("base-files", "base-passwd", "bash", "dash", "coreutils", "perl-base", "ca-certificates")
_TREE = {
    "base": "",
    "perl": "usr/(bin|lib/[^/]+|share)/perl|usr/(bin|lib|share)/python3",
    "certificates": "(usr/share|etc)/ca-certificates",
    "big": "usr/lib/[^/]+/lib(LLVM|icu|z3)",
}
_LEFT_OUT = re.compile(r"(dev|proc|sys|etc/apt|var/(lib|cache)/apt|var/log|tmp)(/|$)")
MERGED_USR = Path("/usr/share/mmdebstrap/hooks/merged-usr")


class ImageError(RuntimeError):
    """The image could not be made."""


@dataclass(frozen=True)
class RealImage:
    """What the layout holds, by digest."""

    layout: Path
    index: str
    manifests: dict[str, str] = field(default_factory=dict)
    """Platform -> digest of its manifest."""
    contents: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Platform -> digests of its config and its layers, in the order of the manifest."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Digest -> size, for the index, the manifests and all blobs."""

    @property
    def blobs(self) -> frozenset[str]:
        """Every config and layer of every platform."""
        return frozenset(digest for contents in self.contents.values() for digest in contents)

    @property
    def everything(self) -> frozenset[str]:
        """Index, manifests, configs and layers."""
        return frozenset(self.sizes)

    @property
    def biggest(self) -> str:
        """The largest blob."""
        return max(self.blobs, key=lambda digest: self.sizes[digest])

    def of(self, platform: str) -> frozenset[str]:
        """Everything that a pull of one platform needs."""
        return frozenset((self.index, self.manifests[platform], *self.contents[platform]))

    def path(self, digest: str) -> Path:
        """The file of one blob or manifest."""
        return blob_path(self.layout, digest)


def blob_path(layout: Path, digest: str) -> Path:
    """Where an OCI layout keeps a digest."""
    algorithm, _, value = digest.partition(":")
    return layout / "blobs" / algorithm / value


def read(layout: Path) -> RealImage:
    """Describe an OCI layout that holds one multi-architecture image."""
    top = json.loads((layout / "index.json").read_text())["manifests"][0]
    image = RealImage(layout, top["digest"])
    image.sizes[top["digest"]] = top["size"]
    for entry in json.loads(image.path(top["digest"]).read_text())["manifests"]:
        platform = f"{entry['platform']['os']}/{entry['platform']['architecture']}"
        manifest = json.loads(image.path(entry["digest"]).read_text())
        parts = [manifest["config"], *manifest["layers"]]
        image.manifests[platform] = entry["digest"]
        image.contents[platform] = tuple(part["digest"] for part in parts)
        image.sizes.update((part["digest"], part["size"]) for part in (entry, *parts))
    return image


def _layout(cache: Path) -> Path:
    return cache / f"layout-{_RECIPE}"


def build(cache: Path) -> RealImage:
    """The image, made on the first call and kept in ``cache``."""
    done = _layout(cache)
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.is_dir():
            with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as name:
                _Builder(Path(name)).build()
                (Path(name) / "layout").rename(done)
    return read(done)


class _Sink:
    """A file of the layout being written; hashes what goes through."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> str:
        """Close the file; the digest of its content."""
        self._file.close()
        return f"sha256:{self._hash.hexdigest()}"


class _Tee:
    """Hashes a tar on its way into a compressor."""

    def __init__(self, target: gzip.GzipFile) -> None:
        self._target = target
        self._hash = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._target.write(data)

    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"


@dataclass(frozen=True)
class _Layer:
    descriptor: dict[str, Any]
    diff_id: str
    entries: int


class _LayerWriter:
    """One layer: a tar, gzipped or not."""

    def __init__(self, directory: Path, name: str, compressed: bool) -> None:
        self._path = directory / f"layer-{name}"
        self._sink = _Sink(self._path)
        self._gzip: gzip.GzipFile | None = None
        self._tee: _Tee | None = None
        self._entries = 0
        if compressed:
            # mtime=0 and no name: the same content gives the same digest.
            self._gzip = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=self._sink, mtime=0)
            self._tee = _Tee(self._gzip)
        stream = cast(IO[bytes], self._tee or self._sink)  # a stream is only written to
        self._tar = tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, member: tarfile.TarInfo, source: tarfile.TarFile) -> None:
        self._entries += 1
        self._tar.addfile(member, source.extractfile(member) if member.isreg() else None)

    def finish(self, layout: Path) -> _Layer:
        self._tar.close()
        if self._gzip is not None:
            self._gzip.close()
        digest = self._sink.close()
        self._path.rename(blob_path(layout, digest))
        media_type = GZIP_TYPE if self._gzip is not None else TAR_TYPE
        descriptor = {"mediaType": media_type, "digest": digest, "size": self._sink.size}
        return _Layer(descriptor, self._tee.digest() if self._tee is not None else digest, self._entries)


class _Builder:
    """Makes the image in a directory of its own, as ``layout``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._layout = directory / "layout"
        self._release = _os_release()
        self._shared: _Layer | None = None

    def build(self) -> None:
        (self._layout / "blobs" / "sha256").mkdir(parents=True)
        entries = []
        for platform in PLATFORMS:
            system, architecture = platform.split("/")
            descriptor = self._platform(architecture)
            entries.append({**descriptor, "platform": {"architecture": architecture, "os": system}})
        index = self._json({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": entries}, INDEX_TYPE)
        top = {**index, "annotations": {"org.opencontainers.image.ref.name": TAG}}
        (self._layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
        (self._layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))

    def _platform(self, architecture: str) -> dict[str, Any]:
        big = architecture == "amd64"
        packages = [*_COMMON, "python3-minimal", _llvm()] if big else list(_COMMON)
        layers = self._layers(self._packages(architecture, packages), architecture)
        if big and layers[-1].descriptor["size"] <= BIG_LAYER:
            raise ImageError(f"the big layer has only {layers[-1].descriptor['size']} bytes")
        created = "2026-01-01T00:00:00Z"
        config = {
            "created": created,
            "architecture": architecture,
            "os": "linux",
            "config": {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["/bin/bash"]},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created": created, "created_by": "mmdebstrap"} for _ in layers],
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": self._json(config, CONFIG_TYPE),
            "layers": [layer.descriptor for layer in layers],
        }
        return self._json(manifest, MANIFEST_TYPE)

    def _packages(self, architecture: str, packages: Iterable[str]) -> Path:
        """The unpacked packages of one architecture, as one tar."""
        suite = self._release["VERSION_CODENAME"]
        sources = apt_sources(suite)
        settings = self._directory / "apt.conf"
        settings.write_text(apt_settings())
        target = self._directory / f"{architecture}.tar"
        command = [
            "mmdebstrap",
            "--variant=extract",
            "--format=tar",
            f"--architectures={architecture}",
            f"--aptopt={settings}",
            f"--include={','.join(packages)}",
        ]
        if MERGED_USR.is_dir():
            command.append(f"--hook-dir={MERGED_USR}")
        tool([*command, suite, str(target), *map(str, sources)])
        return target

    def _layers(self, tree: Path, architecture: str) -> list[_Layer]:
        """Split one tar into layers; the certificates are one layer for all architectures."""
        patterns = {name: re.compile(pattern) for name, pattern in _TREE.items() if pattern}
        writers = {name: _LayerWriter(self._directory, name, compressed=name != "big") for name in _TREE}
        with tarfile.open(tree, mode="r|") as source:
            for member in source:
                member.name = re.sub(r"^(\./)+|^\.$", "", member.name)
                if member.islnk():
                    member.linkname = re.sub(r"^(\./)+", "", member.linkname)
                if not member.name or _LEFT_OUT.match(member.name):
                    continue
                place = member.linkname if member.islnk() else member.name
                name = next((name for name, pattern in patterns.items() if pattern.match(place)), "base")
                writers[name].add(member, source)
        tree.unlink()
        layers = {name: writer.finish(self._layout) for name, writer in writers.items()}
        if self._shared is None:
            self._shared = layers["certificates"]
        elif layers["certificates"] != self._shared:
            blob_path(self._layout, layers["certificates"].descriptor["digest"]).unlink()
            layers["certificates"] = self._shared
        for name in [name for name, layer in layers.items() if not layer.entries]:
            blob_path(self._layout, layers.pop(name).descriptor["digest"]).unlink()
        return list(layers.values())

    def _json(self, content: dict[str, Any], media_type: str) -> dict[str, Any]:
        """Store a JSON document; its descriptor."""
        data = json.dumps(content, separators=(",", ":")).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        blob_path(self._layout, digest).write_bytes(data)
        return {"mediaType": media_type, "digest": digest, "size": len(data)}


def _os_release() -> dict[str, str]:
    pairs = (line.partition("=") for line in Path("/etc/os-release").read_text().splitlines())
    release = {name: value.strip('"') for name, _, value in pairs}
    if "VERSION_CODENAME" not in release:
        raise ImageError("this is no Debian release with a code name")
    return release


def apt_sources(suite: str) -> list[Path]:
    """The machine's own apt sources, as far as they are about its release."""
    folder = Path("/etc/apt/sources.list.d")
    files = [Path("/etc/apt/sources.list"), *sorted(folder.glob("*.list")), *sorted(folder.glob("*.sources"))]
    about = re.compile(rf"^[^#\n]*\b{re.escape(suite)}\b", re.MULTILINE)
    found = [file for file in files if file.is_file() and about.search(file.read_text())]
    if not found:
        raise ImageError(f"apt has no sources for {suite}")
    return found


def apt_settings() -> str:
    """How the machine's own apt fetches (proxies, certificates, credentials)."""
    fetching = tool(["apt-config", "dump", "Acquire"])
    return f'{fetching}Dir::Etc::netrc "/etc/apt/auth.conf";\nDir::Etc::netrcparts "/etc/apt/auth.conf.d";\n'


def _llvm() -> str:
    """The name of the newest LLVM library: the one really large thing in the image."""
    found = tool(["apt-cache", "search", "--names-only", "^libllvm"])
    names = re.findall(r"^(libllvm(\d+)) ", found, re.MULTILINE)
    if not names:
        raise ImageError("apt knows no libllvm package (apt-get update)")
    return str(max(names, key=lambda name: int(name[1]))[0])


def tool(command: list[str]) -> str:
    """Run one of Debian's tools to its end; its standard output."""
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600, env=environment)
    if done.returncode:
        raise ImageError(f"{command[0]} failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    return done.stdout


def missing(cache: Path) -> str | None:
    """Why ``build(cache)`` cannot work here, if so."""
    if _layout(cache).is_dir():
        return None
    absent = [name for name in ("mmdebstrap", "apt-config", "apt-cache") if shutil.which(name) is None]
    return f"not installed: {', '.join(absent)} (tests/real/install.sh)" if absent else None


def main() -> None:
    """Make the image in the directory given, and say what it is."""
    image = build(Path(sys.argv[1]))
    print(f"{image.layout}\nindex {image.index}")
    for platform, digest in image.manifests.items():
        print(f"{platform} {digest}")
        for part in image.contents[platform]:
            print(f"  {part} {image.sizes[part]}")


if __name__ == "__main__":
    main()
