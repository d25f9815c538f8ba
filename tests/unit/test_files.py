"""Small files: whole or not at all, and never something else that has a name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from proxy import files


@pytest.mark.parametrize("size", [0, 1, files.MAX_BYTES])
def test_a_file_is_read_whole(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(b"x" * size)
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert files.read(tmp_path / name) == b"x" * size


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("fifo", "it is not a file"),
        ("directory", "it is not a file"),
        ("large", "it is larger than 4 MiB"),
        ("missing", "No such file or directory"),
    ],
)
def test_what_cannot_be_read_is_refused_and_left_closed(tmp_path: Path, kind: str, reason: str) -> None:
    """A FIFO that nobody writes to would hold the reader for ever."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    (tmp_path / "large").write_bytes(b"x" * (files.MAX_BYTES + 1))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match=reason):
        files.read(tmp_path / kind)
    assert len(os.listdir("/proc/self/fd")) == len(before)
