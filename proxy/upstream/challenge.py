"""``WWW-Authenticate``: which challenges a registry makes (RFC 9110 section 11.6.1; distribution ``spec/auth/token.md``)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_PARAMETER = re.compile(rf'({_WORD})[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))', re.ASCII)
_SCHEME = re.compile(rf"({_WORD})(?:[ \t]+|$|(?=,))", re.ASCII)
_SEPARATOR = re.compile(r"[ \t,]*", re.ASCII)
_MAX = 16 * 1024


@dataclass(frozen=True, slots=True)
class Bearer:
    """Where to get a token, and for what."""

    realm: str
    service: str
    scope: tuple[str, ...]
    error: str = field(default="", compare=False)
    """What was wrong with the token that was shown (RFC 6750 section 3.1)."""


@dataclass(frozen=True, slots=True)
class Basic:
    """User and password are wanted, by the registry itself."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """One scheme with its parameters; names in lower case."""

    scheme: str
    parameters: dict[str, str]


def parse_challenges(lines: Iterable[str]) -> list[Challenge]:
    """Every challenge of every line, several in one line included. What cannot be read ends its line."""
    challenges: list[Challenge] = []
    for line in lines:
        position = 0
        if len(line) > _MAX:
            continue
        while position < len(line):
            position = _skip(line, position)
            if (parameter := _PARAMETER.match(line, position)) and challenges:
                name, quoted, bare = parameter.groups()
                value = re.sub(r"\\(.)", r"\1", quoted) if quoted is not None else bare
                challenges[-1].parameters.setdefault(name.lower(), value)
                position = parameter.end()
            elif scheme := _SCHEME.match(line, position):
                challenges.append(Challenge(scheme[1].lower(), {}))
                position = scheme.end()
            else:
                break
    return challenges


def find_challenge(lines: Iterable[str]) -> Bearer | Basic | None:
    """The challenge to answer: Bearer with a realm is preferred to Basic; None if there is neither."""
    challenges = parse_challenges(lines)
    for challenge in challenges:
        if challenge.scheme == "bearer" and (realm := challenge.parameters.get("realm")):
            scope = tuple(challenge.parameters.get("scope", "").split())
            error = challenge.parameters.get("error", "")
            return Bearer(realm, challenge.parameters.get("service", ""), scope, error)
    return Basic() if any(challenge.scheme == "basic" for challenge in challenges) else None


def _skip(line: str, position: int) -> int:
    match = _SEPARATOR.match(line, position)
    return match.end() if match else position
