"""The policy of a reference: as Kubernetes derives it, and as the operator's rules say."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.app import idle_rules_of
from proxy.config.file import ConfigError, validate
from proxy.config.model import PullPolicy
from proxy.image_pull_policy import PullDecision, PullPolicies, derived_policy
from proxy.names import Reference, Tag, parse_digest, parse_image_name

DIGEST = parse_digest("sha256:" + "a" * 64)
NAME = "docker.io/library/debian"


def decide(reference: Reference, name: str = NAME, **keys: Any) -> PullDecision:
    """What a configuration with these keys decides."""
    return PullPolicies(validate(keys)).decide(name, reference)


@pytest.mark.parametrize(
    ("image", "policy"),
    [
        ("debian", "Always"),
        ("debian:latest", "Always"),
        ("debian:12", "IfNotPresent"),
        ("debian:latest-slim", "IfNotPresent"),
        ("debian:Latest", "IfNotPresent"),
        (f"debian@{DIGEST}", "IfNotPresent"),
        (f"debian:12@{DIGEST}", "IfNotPresent"),
        (f"debian:latest@{DIGEST}", "Always"),
        ("registry.corp:5000/team/app", "Always"),
        ("registry.corp:5000/team/app:1", "IfNotPresent"),
    ],
)
def test_the_policy_that_a_pod_is_given_which_names_none(image: str, policy: PullPolicy) -> None:
    """Kubernetes ``SetDefaults_Container``: the tag alone decides, so ``latest`` with a digest is ``Always``."""
    parsed = parse_image_name(image)
    assert derived_policy(parsed.tag, parsed.digest) == policy


def rules(*pairs: tuple[str, str]) -> dict[str, Any]:
    """Rules, each a glob and a policy."""
    return {"imagePullPolicy": {"rules": [{"match": match, "policy": policy} for match, policy in pairs]}}


@pytest.mark.parametrize(
    ("keys", "reference", "policy", "why"),
    [
        pytest.param({}, Tag("latest"), "Always", "default", id="latest"),
        pytest.param({}, Tag("12"), "IfNotPresent", "default", id="tag"),
        pytest.param({}, DIGEST, "IfNotPresent", "default", id="digest"),
        pytest.param(rules(("*:12", "Never")), Tag("12"), "Never", "rules[0] ('*:12')", id="a-rule"),
        pytest.param(rules(("quay.io/*", "Never")), Tag("12"), "IfNotPresent", "default", id="a-rule-for-others"),
        pytest.param(
            rules(("quay.io/*", "Never"), ("docker.io/*", "Always"), ("*", "Never")),
            Tag("12"),
            "Always",
            "rules[1]",
            id="the-first-that-matches",
        ),
        pytest.param(rules((NAME, "Never")), Tag("12"), "IfNotPresent", "default", id="the-whole-with-its-tag"),
        pytest.param(rules(("*@sha256:*", "Never")), DIGEST, "Never", "rules[0]", id="a-rule-for-digests"),
        pytest.param(rules(("*:*", "Never")), DIGEST, "Never", "rules[0]", id="a-digest-has-a-colon-too"),
        pytest.param(
            {"alwaysPullImages": True} | rules(("*", "Never")), Tag("12"), "Always", "alwaysPullImages", id="every-tag"
        ),
        pytest.param({"alwaysPullImages": True}, DIGEST, "IfNotPresent", "default", id="and-no-digest"),
        pytest.param({"offline": True} | rules(("*", "Always")), Tag("latest"), "Never", "offline", id="offline"),
        pytest.param({"offline": True}, DIGEST, "Never", "offline", id="offline-digest"),
    ],
)
def test_what_decides(keys: dict[str, Any], reference: Reference, policy: PullPolicy, why: str) -> None:
    """Offline, then ``alwaysPullImages``, then the first rule that matches, then the default."""
    decision = decide(reference, **keys)
    assert decision.policy == policy
    assert why in decision.why
    assert decision.asks == (policy != "Never")


@pytest.mark.parametrize(
    ("decision", "age", "served"),
    [
        (PullDecision("Always", ""), 0, False),
        (PullDecision("IfNotPresent", ""), 1e9, True),
        (PullDecision("Never", ""), 1e9, True),
        (PullDecision("IfNotPresent", "", 60), 59, True),
        (PullDecision("IfNotPresent", "", 60), 60, False),
        (PullDecision("IfNotPresent", "", 60), -1, False),
        (PullDecision("IfNotPresent", "", 0), 0, False),
    ],
)
def test_whether_what_is_held_is_served_unasked(decision: PullDecision, age: float, served: bool) -> None:
    """A clock that went back makes nothing young again."""
    assert decision.serves_held(age) is served


def test_lists_are_asked_for_unless_nobody_may_be() -> None:
    for keys, policy in (({}, "Always"), ({"offline": True}, "Never"), (rules(("*", "Never")), "Always")):
        assert PullPolicies(validate(keys)).decide(NAME, None).policy == policy


def test_every_fault_is_named_at_once() -> None:
    """With its key, and what to write."""
    with pytest.raises(ConfigError) as caught:
        validate(
            {
                "offline": "maybe",
                "imagePullPolicy": {
                    "rules": [
                        {"match": "*", "policy": "always"},
                        {"policy": "Never"},
                        {"match": "*", "policy": "Always", "maxAge": "1h"},
                        {"match": "*", "policy": "IfNotPresent", "maxAge": 5},
                        {"match": "quay.io/[a", "policy": "Never"},
                    ]
                },
            }
        )
    text = str(caught.value)
    for part in (
        "imagePullPolicy.rules[0].policy: ",
        "it has to be 'Always', 'IfNotPresent' or 'Never'",
        "imagePullPolicy.rules[1].match: is needed",
        "imagePullPolicy.rules[2]: maxAge belongs to policy: IfNotPresent, and Always asks every time; write policy: "
        "IfNotPresent, or leave maxAge out",
        "imagePullPolicy.rules[3].maxAge: not a duration",
        "imagePullPolicy.rules[4].match: ",
        "offline: true or false is needed",
    ):
        assert part in text


def test_offline_and_always_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"offline: excludes alwaysPullImages"):
        validate({"offline": True, "alwaysPullImages": True})


@pytest.mark.parametrize("said", [False, "false"])
def test_an_age_of_what_is_never_served_stale_is_refused_with_every_other_fault(said: object) -> None:
    with pytest.raises(ConfigError) as caught:
        validate({"staleIfError": said, "maxStale": "1h", "offline": "perhaps"})
    assert [fault.partition(":")[0] for fault in caught.value.faults] == ["maxStale", "offline"]
    validate({"staleIfError": True, "maxStale": "1h"})


@pytest.mark.parametrize(
    ("matches", "told"),
    [
        ([], {}),
        (["ghcr.io/a/*", "ghcr.io/*", "*:dev", "*"], {}),
        (["ghcr.io/a/b", "ghcr.io/*"], {0: "write for example ghcr.io/a/b:*"}),
        (
            ["quay.io/*", "ghcr.io/*"],
            {0: "'quay.io/*' matches nothing of docker.io, ghcr.io; it is about registry/repository:tag"},
        ),
        (
            ["ghcr.io/*", "*:dev", "ghcr.io/*"],
            {2: "'ghcr.io/*' is never reached: imagePullPolicy.rules[0] ('ghcr.io/*') before it"},
        ),
        (
            ["*", "ghcr.io/*", "*"],
            {
                1: "'ghcr.io/*' is never reached: imagePullPolicy.rules[0] ('*') before it",
                2: "'*' is never reached: imagePullPolicy.rules[0] ('*') before it",
            },
        ),
        (["*", "quay.io/*"], {1: "'quay.io/*' matches nothing of"}),
    ],
)
def test_a_rule_that_decides_nothing_is_told(matches: list[str], told: dict[int, str]) -> None:
    """No image is like it, or one before it takes all that it would."""
    upstreams = {"upstreams": [{"name": "docker.io"}, {"name": "ghcr.io"}]}
    lines = idle_rules_of(validate(rules(*((match, "Never") for match in matches)) | upstreams))
    assert len(lines) == len(told)
    for line, (number, part) in zip(lines, told.items(), strict=True):
        assert line.startswith(f"imagePullPolicy.rules[{number}].match: ")
        assert part in line


def test_a_rule_on_what_may_be_pulled_that_decides_nothing_is_told_too() -> None:
    """A denial that is never reached denies nothing. One on ``dryRun`` never decides, so it stands before no other."""
    listed = [
        {"name": "trial", "match": "*", "action": "deny", "dryRun": True},
        {"name": "all", "match": "*", "action": "allow"},
        {"name": "none of these", "match": "ghcr.io/bad/*", "action": "deny"},
        {"name": "with a tag", "match": "ghcr.io/bad/app:1", "action": "deny"},
    ]
    lines = idle_rules_of(validate({"rules": listed, "upstreams": [{"name": "ghcr.io"}]}))
    assert [line.partition(": ")[0] for line in lines] == ["rules[2].match", "rules[3].match"]
    assert "'ghcr.io/bad/*' is never reached: rules[1] ('*') before it" in lines[0]
    assert "'ghcr.io/bad/app:1' matches nothing of ghcr.io; it is about registry/repository: write" in lines[1]
