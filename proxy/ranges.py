"""The ``Range`` header of a request (RFC 9110 section 14), parsed before the size of the content is known.

One range is honoured. Several, or a form that is not understood, mean the whole content: podman's partial pulls break on
416 and accept 200 (containers/image ``docker_image_src.go``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from proxy.errors import RangeInvalid

_SINGLE = re.compile(r"bytes=[ \t]*([0-9]{0,19})-([0-9]{0,19})[ \t]*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Span:
    """A part of content of known size: bytes ``start`` up to, not including, ``stop``."""

    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Range:
    """What a client asks: ``first`` to ``last`` (both included; None = to the end), or the last ``suffix`` bytes."""

    first: int | None
    last: int | None
    suffix: int | None = None

    def within(self, size: int) -> Span | None:
        """The part of content of ``size`` bytes; None if the whole is to be sent; raises ``RangeInvalid``."""
        if size == 0:
            return None
        first = self.first if self.first is not None else max(0, size - (self.suffix or 0))
        if first >= size:
            raise RangeInvalid(
                f"the range begins at or after the end of the content ({size} bytes)",
                headers={"Content-Range": f"bytes */{size}"},
            )
        return Span(first, size if self.last is None else min(self.last + 1, size))


def parse_range(header: str | None) -> Range | None:
    """The range asked for, or None for the whole content."""
    match = _SINGLE.fullmatch(header) if header is not None else None
    if match is None:
        return None
    first, last = match.groups()
    if not first:
        return Range(None, None, int(last)) if last else None
    if last and int(last) < int(first):
        return None
    return Range(int(first), int(last) if last else None)
