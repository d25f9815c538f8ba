"""What several of these tests say."""

from __future__ import annotations

import json

from tests.fakes.client import WireResponse
from tests.fakes.registry import ScriptedRegistry

REPO = "team/app"
TAG = f"/v2/{REPO}/manifests/1"


def message(answer: WireResponse) -> str:
    """What the registry error in an answer says."""
    error = json.loads(answer.body)["errors"][0]
    assert (answer.headers.get("Content-Type") or "").startswith("application/json")
    assert "pullcache failed" not in error["message"], "a fault of the cache, not of the registry"
    return str(error["message"])


def blob(registry: ScriptedRegistry, data: bytes = b"layer") -> str:
    """The path of a blob that the registry has."""
    return f"/v2/{REPO}/blobs/{registry.add_blob(REPO, data)}"


def token_requests(registry: ScriptedRegistry) -> int:
    """How often its token server was asked."""
    return len(registry.seen(path="/token"))
