"""Small files that an operator names: read whole, bounded, and nothing but files. Blocking."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MAX_BYTES = 4 * 1024 * 1024


def read(path: Path, limit: int = MAX_BYTES) -> bytes:
    """What the file holds; raises ``OSError``, also where it is no file: a FIFO would hold us until somebody writes."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a file", str(path))
        content = b""
        while data := os.read(descriptor, MAX_BYTES):
            content += data
            if len(content) > limit:
                raise OSError(errno.EFBIG, f"it is larger than {limit // 1024 // 1024} MiB", str(path))
        return content
    finally:
        os.close(descriptor)
