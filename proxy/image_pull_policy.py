"""When a registry is asked about an image that is held: ``imagePullPolicy``, as Kubernetes derives and names it.

A cache sees a reference, never the pod and its policy: so the policy is derived from the reference, as the API server does
where a pod has none, and the operator's rules go before that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxy.config.model import Config, ImagePullPolicyRule, PullPolicy
from proxy.names import DEFAULT_TAG, Digest, Reference, Tag
from proxy.rules import compile_glob


@dataclass(frozen=True, slots=True)
class PullDecision:
    """The policy of one reference. ``max_age``: seconds after which a held tag is asked for again; ``why``: what decided,
    for people; ``is_wish``: a client has decided, for itself alone."""

    policy: PullPolicy
    why: str
    max_age: float | None = None
    is_wish: bool = False

    @property
    def asks(self) -> bool:
        """Whether an upstream may be asked at all."""
        return self.policy != "Never"

    def serves_held(self, age: float) -> bool:
        """Whether what a tag pointed at ``age`` seconds ago is served without a question."""
        if self.policy == "IfNotPresent" and self.max_age is not None:
            return 0 <= age < self.max_age
        return self.policy != "Always"


def derived_policy(tag: Tag | None, digest: Digest | None) -> PullPolicy:
    """The policy of a container that names none (Kubernetes ``pkg/apis/core/v1/defaults.go``, ``SetDefaults_Container``).

    No tag and no digest is ``latest``. ``latest`` is ``Always`` even with a digest behind it: the code looks at the tag.
    """
    if tag is None and digest is None:
        tag = DEFAULT_TAG
    return "Always" if tag == DEFAULT_TAG else "IfNotPresent"


class PullPolicies:
    """The policies of one configuration: offline, then ``alwaysPullImages``, then the first rule that matches, then the
    default of the reference."""

    def __init__(self, config: Config) -> None:
        self._offline = config.offline
        self._always = config.always_pull_images
        self._rules: Sequence[ImagePullPolicyRule] = config.image_pull_policy.rules

    def decide(self, name: str, reference: Reference | None) -> PullDecision:
        """The policy of ``reference`` in ``name``, ``registry/repository``. None is a list, which is no image: it is always
        asked for, unless nobody may be."""
        if self._offline:
            return PullDecision("Never", "offline is true")
        if reference is None:
            return PullDecision("Always", "it is a list")
        tag = None if isinstance(reference, Digest) else reference
        if self._always and tag is not None:
            return PullDecision("Always", "alwaysPullImages is true")
        image = f"{name}@{reference}" if tag is None else f"{name}:{reference}"
        for number, rule in enumerate(self._rules):
            if compile_glob(rule.match).match(image):
                return PullDecision(rule.policy, f"imagePullPolicy.rules[{number}] ('{rule.match}')", rule.max_age)
        if tag is None:
            return PullDecision("IfNotPresent", "the default of a digest")
        policy = derived_policy(tag, None)
        return PullDecision(
            policy, "the default of 'latest'" if policy == "Always" else "the default of a tag that is not 'latest'"
        )


def anew(decision: PullDecision, cache_control: Sequence[str]) -> PullDecision:
    """What becomes of it where a client wants what is held to be confirmed (``no-cache``, RFC 9111 section 5.2.1.4), as
    ``pullcache warm`` does for a pod that is ``Always``. What is never asked for is not asked for then, either."""
    wants = any(part.strip().lower() == "no-cache" for line in cache_control for part in line.split(","))
    if not wants or not decision.asks or decision.policy == "Always":
        return decision
    return PullDecision("Always", "the client sent Cache-Control: no-cache", is_wish=True)


def never_pulled(what: str, decision: PullDecision) -> str:
    """What a client is told that wants what is not here, or not proved to be its to read, where nobody may be asked."""
    return f"ErrImageNeverPull: {what} is not held for this client, and no registry is asked: {decision.why}"
