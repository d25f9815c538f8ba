"""Which images may be pulled at all, and which a user may read: globs over ``registry/repository``.

A glob is a shell pattern as Kubernetes and many others write it: ``*`` any text, ``?`` any one character, ``[abc]`` one of
these, ``[!abc]`` none of these. Here ``*`` and ``?`` match ``/`` too, so ``docker.io/*`` is everything of Docker Hub; a glob
matches the whole name, and upper and lower case differ.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from proxy.config.model import RuleConfig


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules say of one name."""

    allowed: bool
    rule: str | None
    """The name of the rule that decided; None if none did, which allows."""
    dry_run_denied: str | None
    """The name of the dry-run rule that would deny it, were no rule a dry run; None if none would."""


class Rules:
    """The rules in their order: the first that matches decides, and what none matches is allowed.

    A rule on dry run never decides, and the search goes on after it.
    """

    def __init__(self, rules: Sequence[RuleConfig]) -> None:
        self._rules = [(compile_glob(rule.match), rule) for rule in rules]

    def decide(self, name: str) -> Verdict:
        """Whether ``name``, ``registry/repository``, may be pulled."""
        tried: RuleConfig | None = None
        for pattern, rule in self._rules:
            if not pattern.match(name):
                continue
            if not rule.dry_run:
                return Verdict(rule.action == "allow", rule.name, _denied_by(tried))
            tried = tried or rule
        return Verdict(True, None, _denied_by(tried))


def may_read(globs: Sequence[str], name: str) -> bool:
    """Whether any glob matches ``name``, ``registry/repository``; none of none."""
    return any(compile_glob(glob).match(name) for glob in globs)


@lru_cache(4096)
def compile_glob(glob: str) -> re.Pattern[str]:
    """A pattern whose ``match`` takes a whole name, as the glob says."""
    return re.compile(fnmatch.translate(glob))


def _denied_by(rule: RuleConfig | None) -> str | None:
    return rule.name if rule is not None and rule.action == "deny" else None
