"""Rules and globs: the first that matches decides, and a dry run only says what it would do."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.config.model import RuleConfig
from proxy.rules import Rules, Verdict, compile_glob, may_read

DEBIAN = "docker.io/library/debian"


def rules(*lines: str) -> Rules:
    """Rules written as ``allow|deny GLOB [dry]``; each is called by its whole line."""
    configured = []
    for line in lines:
        action, match, *dry = line.split()
        configured.append(RuleConfig.model_validate({"name": line, "match": match, "action": action, "dryRun": bool(dry)}))
    return Rules(configured)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param([], Verdict(True, None, None), id="no-rules"),
        pytest.param(["deny quay.io/*"], Verdict(True, None, None), id="none-matches"),
        pytest.param(["deny docker.io/*"], Verdict(False, "deny docker.io/*", None), id="denied"),
        pytest.param(["allow docker.io/*", "deny *"], Verdict(True, "allow docker.io/*", None), id="first-allows"),
        pytest.param(["deny *", "allow docker.io/*"], Verdict(False, "deny *", None), id="first-denies"),
        pytest.param(["allow quay.io/*", "deny *"], Verdict(False, "deny *", None), id="only-what-is-listed"),
        pytest.param(["deny docker.io/* dry"], Verdict(True, None, "deny docker.io/* dry"), id="dry-run-is-reported"),
        pytest.param(
            ["deny docker.io/* dry", "allow docker.io/*", "deny *"],
            Verdict(True, "allow docker.io/*", "deny docker.io/* dry"),
            id="dry-run-does-not-end-the-search",
        ),
        pytest.param(
            ["deny docker.io/* dry", "deny *"],
            Verdict(False, "deny *", "deny docker.io/* dry"),
            id="denied-by-a-later-one-all-the-same",
        ),
        pytest.param(
            ["allow *", "deny * dry"], Verdict(True, "allow *", None), id="dry-run-after-the-decision-is-not-reached"
        ),
        pytest.param(
            ["deny */debian dry", "deny * dry"], Verdict(True, None, "deny */debian dry"), id="first-of-two-dry-runs"
        ),
        pytest.param(["allow * dry", "deny *"], Verdict(False, "deny *", None), id="dry-run-does-not-allow-either"),
        pytest.param(
            ["allow */debian dry", "deny * dry"],
            Verdict(True, None, None),
            id="dry-run-that-would-allow-is-before-one-that-denies",
        ),
    ],
)
def test_the_first_that_matches_decides(lines: list[str], expected: Verdict) -> None:
    assert rules(*lines).decide(DEBIAN) == expected


@pytest.mark.parametrize(
    ("glob", "name", "matches"),
    [
        ("docker.io/library/debian", DEBIAN, True),
        ("docker.io/library", DEBIAN, False),
        ("docker.io/library/", DEBIAN, False),
        ("library/debian", DEBIAN, False),
        ("docker.io/*", DEBIAN, True),
        ("docker.io/*", "docker.io", False),
        ("docker.io/*", "docker.io.evil.test/library/debian", False),
        ("docker.io/*", "dockerxio/library/debian", False),
        ("docker.io*", "docker.io.evil.test/library/debian", True),
        ("*/debian", DEBIAN, True),
        ("*", DEBIAN, True),
        ("docker.io/?ibrary/debian", DEBIAN, True),
        ("docker.io?library/debian", DEBIAN, True),
        ("docker.io/library/?", DEBIAN, False),
        ("docker.io/library/[cd]ebian", DEBIAN, True),
        ("docker.io/library/[!cd]ebian", DEBIAN, False),
        ("docker.io/library/[a-c]ebian", DEBIAN, False),
        ("DOCKER.io/*", DEBIAN, False),
        ("docker.io/*", DEBIAN.upper(), False),
        ("docker.io/library/debian", DEBIAN + "\n", False),
        ("registry.test:5000/team/*", "registry.test:5000/team/app", True),
        ("registry.test:5000/team/*", "registry.test/team/app", False),
    ],
)
def test_a_glob_matches_whole_names_and_its_star_crosses_slashes(glob: str, name: str, matches: bool) -> None:
    assert may_read([glob], name) is matches
    assert rules(f"deny {glob}").decide(name).allowed is not matches


def test_any_of_several_globs_is_enough_and_none_is_not() -> None:
    assert may_read(["quay.io/*", "docker.io/library/*"], DEBIAN)
    assert not may_read(["quay.io/*", "docker.io/team/*"], DEBIAN)
    assert not may_read([], DEBIAN)


@given(st.text("ab/*?[]!-.", max_size=12), st.text("ab/*?[]!-.\n", max_size=12))
def test_globs_mean_what_fnmatchcase_says(glob: str, name: str) -> None:
    assert (compile_glob(glob).match(name) is not None) is fnmatch.fnmatchcase(name, glob)
