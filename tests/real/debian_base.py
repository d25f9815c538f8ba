"""The base image of the Dockerfile, made of Debian packages: what ``debian:bookworm-slim`` is, without asking a registry.

It has the packages of that image (those that Debian calls required, and apt), without documentation, and the three
settings by which the image differs from an installed Debian. It is not that image byte for byte.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import tempfile
from pathlib import Path

from .image import MERGED_USR, ImageError, apt_settings, apt_sources, tool

SUITE = "bookworm"
NAME = "docker.io/library/debian:bookworm-slim"

_RECIPE = 1  # count up when the command below changes: the file in the cache is named after it
_NOT_INSTALLED = ("/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/man/*")
_CLEAN = (
    'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };\n'
    'Dir::Cache::pkgcache ""; Dir::Cache::srcpkgcache "";\n'
)


def missing() -> str | None:
    """Why ``build()`` cannot work here, if so."""
    absent = [name for name in ("mmdebstrap", "apt-config") if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (tests/real/install.sh)"
    try:
        apt_sources(SUITE)
    except ImageError as error:
        return str(error)
    return None


def build(cache: Path) -> Path:
    """The root file system as a tar, made on the first call and kept in ``cache`` until the machine's apt sources change."""
    cache.mkdir(parents=True, exist_ok=True)
    done = _target(cache)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.is_file():
            for old in cache.glob("*.tar"):
                old.unlink()
            with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as name:
                _build(Path(name)).rename(done)
    return done


def _target(cache: Path) -> Path:
    """Named after all that it is made of; the sources and settings of apt are in it, for the Dockerfile's apt-get."""
    sources = [source.read_text() for source in apt_sources(SUITE)]
    known = hashlib.sha256("\0".join([str(_RECIPE), apt_settings(), *sources]).encode())
    return cache / f"{SUITE}-{known.hexdigest()[:16]}.tar"


def _build(directory: Path) -> Path:
    target = directory / "base.tar"
    settings = directory / "apt.conf"
    settings.write_text(apt_settings())
    clean = directory / "docker-clean"
    clean.write_text(_CLEAN)
    tool(
        [
            "mmdebstrap",
            "--variant=minbase",
            "--include=usr-is-merged",  # else apt takes usrmerge, and all of perl with it
            *([f"--hook-dir={MERGED_USR}"] if MERGED_USR.is_dir() else []),
            f"--aptopt={settings}",
            "--dpkgopt=force-unsafe-io",
            *(f"--dpkgopt=path-exclude={pattern}" for pattern in _NOT_INSTALLED),
            '--customize-hook=rm -f "$1"/var/cache/apt/*.bin',
            # Uploaded, not an option: as an option it would clean up the machine that builds.
            f"--customize-hook=upload {clean} /etc/apt/apt.conf.d/docker-clean",
            SUITE,
            str(target),
            *map(str, apt_sources(SUITE)),
        ]
    )
    return target
