"""Files that are exchanged while a cache runs, in the way in which Kubernetes exchanges them; and waiting for the effect."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

WITHIN = 10.0
"""Seconds in which what is new is promised to be used."""


class Mounted:
    """A directory as the kubelet mounts a Secret there (``pkg/volume/util/atomic_writer.go``).

    Each file is a link through ``..data``, itself a link, which is exchanged in one step; then the old files are removed.
    """

    def __init__(self, directory: Path, files: Mapping[str, str | bytes]) -> None:
        self.directory = directory
        self._number = 0
        directory.mkdir(parents=True)
        self.write(files)

    def write(self, files: Mapping[str, str | bytes]) -> None:
        """Let it hold these files, and no others."""
        self._number += 1
        now, before = (self.directory / f"..{number}" for number in (self._number, self._number - 1))
        now.mkdir()
        for name, content in files.items():
            (now / name).write_bytes(content.encode() if isinstance(content, str) else content)
        new = self.directory / "..data_tmp"
        new.symlink_to(now.name)
        new.replace(self.directory / "..data")
        links = {path.name for path in self.directory.iterdir() if not path.name.startswith("..")}
        for name in files.keys() - links:
            (self.directory / name).symlink_to(Path("..data") / name)
        for name in links - files.keys():
            (self.directory / name).unlink()
        if before.exists():
            shutil.rmtree(before)

    def path(self, name: str) -> Path:
        """Where a file of it is found."""
        return self.directory / name


def pull_secret(entries: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """A Secret of type ``kubernetes.io/dockerconfigjson``: host -> user and password."""
    auths = {host: {"auth": base64.b64encode(":".join(pair).encode()).decode()} for host, pair in entries.items()}
    return {".dockerconfigjson": json.dumps({"auths": auths})}


async def until(condition: Callable[[], object], what: str, within: float = WITHIN) -> None:
    """Wait until something is so."""
    try:
        async with asyncio.timeout(within):
            while not condition():
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"{what}: not within {within:g} s") from None
