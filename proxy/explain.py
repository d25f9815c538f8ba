"""What this cache would do about an image, and with which credential: names and sources, never a secret."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxy.access.proofs import mode_of
from proxy.credentials.credential import Credential
from proxy.credentials.secrets import PullSecrets
from proxy.errors import RegistryError
from proxy.image_pull_policy import PullPolicies
from proxy.names import parse_image_name
from proxy.policy import Routes
from proxy.rules import Rules
from proxy.upstream.client import Upstream


class Explain:
    """Answers for one running cache."""

    def __init__(
        self,
        routes: Routes,
        upstreams: Mapping[str, Upstream],
        rules: Rules,
        policies: PullPolicies,
        pull_secrets: PullSecrets,
    ) -> None:
        self._routes = routes
        self._upstreams = upstreams
        self._rules = rules
        self._policies = policies
        self._pull_secrets = pull_secrets

    async def __call__(self, text: str) -> dict[str, Any]:
        """What is known of the image that a user means by ``text``; ``error`` where it is no image of this cache."""
        try:
            image = parse_image_name(text)
        except RegistryError as error:
            return {"error": error.message}
        if image.host not in self._routes.names:
            known = ", ".join(sorted(self._routes.names))
            return {"image": str(image), "error": f"{image.host} is not among the upstreams of this cache ({known})"}
        upstream = self._upstreams[image.host]
        name = f"{image.host}/{image.repository}"
        verdict = self._rules.decide(name)
        policy = self._policies.decide(name, image.reference)
        found = await self._pull_secrets.lookup(name)
        return {
            "image": str(image),
            "upstream": {"name": upstream.name, "endpoints": upstream.config.endpoints},
            "access": mode_of(upstream.config, image.repository),
            "allowed": verdict.allowed,
            "rule": verdict.rule,
            "dryRunDenied": verdict.dry_run_denied,
            "imagePullPolicy": {"policy": policy.policy, "why": policy.why, "maxAge": policy.max_age},
            "credentials": [_described(upstream, credential) for credential in found.credentials],
            "credentialFailure": found.failure,
        }


def _described(upstream: Upstream, credential: Credential) -> dict[str, Any]:
    return {"source": credential.source, "registry": credential.registry, "upstreamSaid": upstream.said(credential)}
