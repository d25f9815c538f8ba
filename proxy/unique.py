"""JSON objects in which no key stands twice: what could be read in two ways is not read."""

from __future__ import annotations


class KeyTwice(ValueError):
    """A key stands twice in one object."""


def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """The object of these pairs (``json``'s ``object_pairs_hook``); raises ``KeyTwice``."""
    result = dict(pairs)
    if len(result) < len(pairs):
        raise KeyTwice
    return result
