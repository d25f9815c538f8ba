"""What this cache would do about an image, and why: rules, what is held, how its registry does. Never a secret."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from proxy.access.proofs import mode_of
from proxy.credentials.credential import QUOTA, Credential
from proxy.credentials.secrets import PullSecrets
from proxy.errors import RegistryError
from proxy.held import Holding, holding
from proxy.image_pull_policy import PullDecision, PullPolicies
from proxy.names import ImageName, parse_image_name
from proxy.platforms import parse_platform
from proxy.policy import Routes, Staleness
from proxy.rules import Rules
from proxy.storage.store import Store
from proxy.upstream.client import Upstream
from proxy.upstream.quota import RateLimit

_NAMES = {"anonymous": "anybody", "secret": "a secret of the cache", "client": "a client's own credential"}


class Explain:
    """Answers for one cache, whether it serves or not."""

    def __init__(
        self,
        routes: Routes,
        upstreams: Mapping[str, Upstream],
        rules: Rules,
        policies: PullPolicies,
        staleness: Staleness,
        pull_secrets: PullSecrets,
        store: Store,
    ) -> None:
        self._routes = routes
        self._upstreams = upstreams
        self._rules = rules
        self._policies = policies
        self._staleness = staleness
        self._pull_secrets = pull_secrets
        self._store = store

    async def __call__(self, text: str, platform: str = "") -> dict[str, Any]:
        """What is known of the image that a user means by ``text``; ``error`` where it is no image of this cache.

        ``platform``: what of it has to be held, as ``linux/amd64``; empty: whichever of its platforms is held best.
        """
        try:
            image = parse_image_name(text)
            wanted = parse_platform(platform) if platform else None
        except RegistryError as error:
            return {"error": error.message}
        except ValueError as error:
            return {"error": f"platform: {error}"}
        if image.host not in self._routes.names:
            known = ", ".join(sorted(self._routes.names))
            return {"image": str(image), "error": f"{image.host} is not among the upstreams of this cache ({known})"}
        upstream = self._upstreams[image.host]
        name = f"{image.host}/{image.repository}"
        verdict = self._rules.decide(name)
        policy = self._policies.decide(name, image.reference)
        found = await self._pull_secrets.lookup(name)
        held = holding(self._store, upstream.key, image.repository, image.reference, wanted)
        back = [
            {"for": _NAMES[identity.proof], "error": failed.error.message, "nextAttemptIn": round(left, 1)}
            for identity, failed, left in upstream.held_back(image.repository, image.reference)
        ]
        return {
            "image": str(image),
            "registry": image.host,
            "repository": image.repository,
            "tag": image.tag,
            "digest": str(image.digest) if image.digest else None,
            "upstream": {
                "name": upstream.name,
                "endpoints": upstream.config.endpoints,
                "routing": self._routing(image),
                "outage": upstream.outage or None,
            },
            "access": mode_of(upstream.config, image.repository),
            "allowed": verdict.allowed,
            "rule": verdict.rule,
            "dryRunDenied": verdict.dry_run_denied,
            "imagePullPolicy": {"policy": policy.policy, "why": policy.why, "maxAge": policy.max_age},
            "held": _held(held),
            "fresh": held.age is None or policy.serves_held(held.age) if held.manifest else None,
            "backoff": back,
            "rateLimit": [_limit(credential, limit) for credential, limit in upstream.rate_limits.items()],
            "credentials": [_described(upstream, credential) for credential in found.credentials],
            "credentialFailure": found.failure,
            "pull": f"a pull is refused: the rule '{verdict.rule}' denies it"
            if not verdict.allowed
            else self._pull(image, policy, held, back, upstream),
        }

    def _routing(self, image: ImageName) -> str:
        """How a request comes to that upstream."""
        path = self._upstreams[image.host].config.prefix
        default = ", or neither: it is the default upstream" if self._routes.default == image.host else ""
        return f"ns={image.host}, or the path /v2/{path}/{image.repository}{default}"

    def _pull(
        self,
        image: ImageName,
        policy: PullDecision,
        held: Holding,
        back: list[dict[str, Any]],
        upstream: Upstream,
    ) -> str:
        """In one sentence what a pull would do now."""
        blocked = upstream.outage or (back[0]["error"] if back else "")
        when = (
            "it is probed every 5 s"
            if upstream.outage
            else f"the next attempt is in {back[0]['nextAttemptIn']:g} s"
            if back
            else ""
        )
        rest = _rest(held, upstream.name, asks=policy.asks, blocked=blocked)
        is_by_digest = image.digest is not None
        if held.manifest is None:
            if not policy.asks:
                return f"a pull is refused with ErrImageNeverPull: it is not held, and {policy.why}"
            if blocked:
                return f"a pull fails, nobody is asked: {blocked}; {when}"
            return f"a pull fetches it from {upstream.name}"
        if is_by_digest or policy.serves_held(held.age or 0.0) or upstream.is_saving(QUOTA):
            return f"a pull is served from the cache, and nobody is asked{rest}"
        if not blocked:
            return f"a pull asks {upstream.name} by one HEAD; where the tag has not moved it is served from the cache{rest}"
        if self._staleness.serves(held.age or 0.0):
            return f"a pull is served what is held, with a Warning, and nobody is asked: {blocked}; {when}{rest}"
        return f"a pull fails, since nothing stale is served: {blocked}; {when}"


def _rest(held: Holding, name: str, *, asks: bool, blocked: str) -> str:
    """What becomes of the blobs that are not held."""
    if held.is_complete:
        return ""
    count = f"{len(held.missing)} of its blobs" if held.missing else "its other parts"
    if not asks:
        return f"; {count} are not held, and then it fails with ErrImageNeverPull"
    return f"; {count} are not held, and {'cannot be had now' if blocked else f'fetched from {name}'}"


def _held(held: Holding) -> dict[str, Any]:
    return {
        "complete": held.is_complete,
        "manifest": str(held.manifest) if held.manifest else None,
        "confirmedAgo": None if held.age is None else round(held.age, 1),
        "missing": [str(digest) for digest in held.missing],
        "images": [
            {
                "platform": image.platform,
                "manifest": str(image.manifest),
                "complete": image.is_complete,
                "held": image.held,
                "bytes": image.size,
                "missing": [str(digest) for digest in image.missing],
            }
            for image in held.images
        ],
    }


def _limit(credential: Credential | None, limit: RateLimit) -> dict[str, Any]:
    return {
        "of": "anybody" if credential is None else credential.source,
        "limit": limit.limit,
        "remaining": limit.remaining,
        "window": limit.window,
        "source": limit.source,
        "toldAgo": round(asyncio.get_running_loop().time() - limit.told, 1),
    }


def _described(upstream: Upstream, credential: Credential) -> dict[str, Any]:
    return {"source": credential.source, "registry": credential.registry, "upstreamSaid": upstream.said(credential)}
