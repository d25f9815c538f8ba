"""What this cache would do about an image, and why: rules, what is held, how its registry does. Never a secret."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from proxy.access.proofs import mode_of
from proxy.credentials.credential import QUOTA, Credential
from proxy.credentials.secrets import PullSecrets
from proxy.errors import Denied, RegistryError, TooManyRequests
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

    async def answer(self, query: Mapping[str, str]) -> dict[str, Any]:
        """What is known of the ``image`` of a query, perhaps of one ``platform``; raises ``ValueError`` if it has none."""
        if not query.get("image"):
            raise ValueError("which image? Ask for example /explain?image=docker.io/library/debian:12")
        return await self(query["image"], query.get("platform", ""))

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
            {"for": _NAMES[proof], "error": failed.error.message, "nextAttemptIn": round(left, 1)}
            for proof, failed, left in upstream.held_back(image.repository, image.reference)
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
            else self._pull(image, policy, held, upstream),
        }

    def _routing(self, image: ImageName) -> str:
        """How a request comes to that upstream."""
        path = self._upstreams[image.host].config.prefix
        default = ", or neither: it is the default upstream" if self._routes.default == image.host else ""
        return f"ns={image.host}, or the path /v2/{path}/{image.repository}{default}"

    def _pull(self, image: ImageName, policy: PullDecision, held: Holding, upstream: Upstream) -> str:
        """In one sentence what a pull would do now."""
        is_public, age = mode_of(upstream.config, image.repository) == "public", held.age or 0.0
        if held.manifest is None:
            if not policy.asks:
                return f"a pull is refused with ErrImageNeverPull: it is not held, and no registry is asked: {policy.why}"
            why, _ = _hindrance(image, upstream, is_public=is_public, by_head=False)
            return f"a pull fails, nobody is asked: {why}" if why else f"a pull fetches it from {upstream.name}"
        rest = _rest(held, upstream, image, asks=policy.asks)
        is_spared = policy.policy != "Always" and upstream.is_saving(QUOTA)
        if image.digest is not None or policy.serves_held(age) or is_spared:
            right = " but for the right to read it" if policy.asks and not is_public else ""
            return f"a pull is served from the cache, and nobody is asked{right}{rest}"
        why, is_refused = _hindrance(image, upstream, is_public=is_public, by_head=True)
        if not why:
            return f"a pull asks {upstream.name} by one HEAD; where the tag has not moved it is served from the cache{rest}"
        if is_refused:
            return f"a pull fails, nobody is asked: {why}"
        if self._staleness.serves(age):
            return f"a pull is served what is held, with a Warning, and nobody is asked: {why}{rest}"
        return f"a pull fails, since nothing stale is served: {why}"


def _hindrance(image: ImageName, upstream: Upstream, *, is_public: bool, by_head: bool) -> tuple[str, bool]:
    """Why the registry is not asked for that now, whoever wants it, and until when; and whether it has refused it."""
    if upstream.outage:
        return f"{upstream.outage}; it is probed every 5 s", False
    for proof, failed, left in upstream.held_back(image.repository, image.reference, by_head=by_head):
        is_refused = isinstance(failed.error, Denied)
        is_anothers = proof == "client" or (is_refused and proof == "anonymous" and not is_public)
        if not is_anothers:
            return f"{failed.error.message}; the next attempt is in {left:.3g} s", is_refused
    return "", False


def _rest(held: Holding, upstream: Upstream, image: ImageName, *, asks: bool) -> str:
    """What becomes of the parts that are not held."""
    if held.error:
        return f"; {held.error}"
    if not held.missing:
        return ""
    manifests = len({each.manifest for each in held.wanted} & set(held.missing))
    counts = ((manifests, "manifest"), (len(held.missing) - manifests, "blob"))
    parts = " and ".join(f"{count} {kind}{'s' if count > 1 else ''}" for count, kind in counts if count)
    are = "is" if len(held.missing) == 1 else "are"
    if not asks:
        return f"; {parts} of it {are} not held, and then it fails with ErrImageNeverPull"
    limits = upstream.held_back(image.repository, image.reference, by_head=not manifests)
    limited = any(isinstance(each.error, TooManyRequests) and proof != "client" for proof, each, _ in limits)
    if upstream.outage or limited:
        return f"; {parts} of it {are} not held, and cannot be had now"
    return f"; {parts} of it {are} not held, and {are} fetched from {upstream.name}"


def _held(held: Holding) -> dict[str, Any]:
    return {
        "complete": held.is_complete,
        "manifest": str(held.manifest) if held.manifest else None,
        "confirmedAgo": None if held.age is None else round(held.age, 1),
        "missing": [str(digest) for digest in held.missing],
        "error": held.error or None,
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
