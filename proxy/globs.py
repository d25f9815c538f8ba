"""Whether a glob can match any image at all: one that cannot is hardly meant.

Decided of the glob and the form that image names have, both as sequences of sets of characters. The form is a little wider
than the grammar (``names.py``), so that only what is certain is said.
"""

from __future__ import annotations

import fnmatch
import re
import string
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from proxy.names import DOCKER_HUB

_ALNUM = frozenset(string.ascii_lowercase + string.digits)
_PATH = _ALNUM | set("._-/")
_WORD = frozenset(string.ascii_letters + string.digits + "_")
_ALL = _WORD | _PATH | set(":@[]")
_HEX = {"sha256": 64, "sha512": 128}
_PIECE = re.compile(r"\[!?\]?[^\]]*\]|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Part:
    """One of these characters, or, with ``is_many``, any number of them."""

    chars: frozenset[str]
    is_many: bool = False


def pointless(glob: str, registries: Sequence[str], *, is_tagged: bool = False) -> str:
    """What to tell of a glob that matches no ``registry/repository`` of these registries, or, where it ``is_tagged``, no
    ``registry/repository:tag`` and no ``registry/repository@digest``; empty where it can match."""
    forms = [form for registry in registries for form in _forms(registry, is_tagged=is_tagged)]
    if _can_match(glob, forms):
        return ""
    hub, slash, rest = glob.partition("/")
    name = f"{hub}/library/{rest}" if hub == DOCKER_HUB and slash and "/" not in rest else glob
    better = [name, *([f"{name}:*"] if is_tagged else []), f"{name}/*", f"{registries[0]}/base/*"]
    return (
        f"'{glob}' matches nothing of {', '.join(registries)}; it is about registry/repository{':tag' if is_tagged else ''}"
        f": write for example {next(each for each in better if _can_match(each, forms))}"
    )


def idle_rules(
    key: str, globs: Sequence[str], registries: Sequence[str], *, is_tagged: bool = False, passing: Collection[int] = ()
) -> list[str]:
    """A line for each rule that decides nothing: no image of these registries is like it, or one before it takes all. The
    first that matches decides; ``passing``: the numbers of those that never do.

    They do no harm, and one configuration may be for several caches: so it is a warning, no fault.
    """
    told = []
    for number, glob in enumerate(globs):
        before = (place for place, other in enumerate(globs[:number]) if other in ("*", glob) and place not in passing)
        if nothing := pointless(glob, registries, is_tagged=is_tagged):
            told.append(f"{key}[{number}].match: {nothing}")
        elif (first := next(before, None)) is not None:
            told.append(
                f"{key}[{number}].match: '{glob}' is never reached: {key}[{first}] ('{globs[first]}') before it matches all "
                "that it does, and the first decides; move it before that one, or remove one of them"
            )
    return told


def _forms(registry: str, *, is_tagged: bool) -> Iterable[list[_Part]]:
    """What images of a registry look like; those of Docker Hub have a ``library/`` or a user before their name."""
    component = [_Part(_ALNUM), _Part(_PATH, is_many=True)]
    name = [*_text(f"{registry}/"), *([*component, *_text("/")] if registry == DOCKER_HUB else []), *component]
    if not is_tagged:
        return [name]
    tag = [*_text(":"), _Part(_WORD), _Part(_WORD | set(".-"), is_many=True)]
    digests = ([*_text(f"@{name}:"), *[_Part(frozenset("0123456789abcdef"))] * digits] for name, digits in _HEX.items())
    return [[*name, *end] for end in (tag, *digests)]


def _text(text: str) -> list[_Part]:
    return [_Part(frozenset(char)) for char in text]


def _parts(glob: str) -> list[_Part]:
    """A glob as ``fnmatch`` reads it."""
    found = []
    for piece in _PIECE.findall(glob):
        matches = re.compile(fnmatch.translate(piece)).match
        found.append(_Part(frozenset(filter(matches, _ALL)), is_many=piece == "*"))
    return found


def _can_match(glob: str, forms: Iterable[Sequence[_Part]]) -> bool:
    parts = _parts(glob)
    return any(_meet(parts, form) for form in forms)


def _meet(one: Sequence[_Part], other: Sequence[_Part]) -> bool:
    """Whether some text is of both forms."""
    seen: set[tuple[int, int]] = set()
    ways = [(0, 0)]
    while ways:
        at = left, right = ways.pop()
        if at in seen:
            continue
        seen.add(at)
        if at == (len(one), len(other)):
            return True
        mine, theirs = one[left : left + 1], other[right : right + 1]
        ways += [(left + 1, right) for part in mine if part.is_many] + [(left, right + 1) for part in theirs if part.is_many]
        ways += [(left + (not a.is_many), right + (not b.is_many)) for a in mine for b in theirs if a.chars & b.chars]
    return False
