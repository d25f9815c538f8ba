"""How many images, transfers and questions: what a configuration may say, and which image a blob counts for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from proxy.answers import Target
from proxy.config.file import ConfigError, load, validate
from proxy.credentials.credential import ANONYMOUS, Asker
from proxy.image_pull_policy import PullDecision
from proxy.manifests import parse_manifest
from proxy.metrics import Metrics
from proxy.names import Digest, Repository, digest_of
from proxy.pull.images import Images
from proxy.storage.base import Origin
from proxy.storage.store import Store


def upstream(**keys: Any) -> dict[str, Any]:
    return {"upstreams": [{"name": "quay.io", **keys}]}


@pytest.mark.parametrize(
    ("serialize", "most", "limit"),
    [
        (None, None, None),
        (True, None, 1),
        (False, None, None),
        (None, 1, 1),
        (None, 2, 2),
        (False, 1, 1),
        (False, 7, 7),
        (True, 1, 1),
    ],
)
def test_how_many_images_at_once(serialize: bool | None, most: int | None, limit: int | None) -> None:
    """The kubelet's ``serializeImagePulls`` and ``maxParallelImagePulls``, but that without them there is no limit."""
    given = {"serializeImagePulls": serialize, "maxParallelImagePulls": most}
    assert validate({key: value for key, value in given.items() if value is not None}).image_limit == limit
    assert validate(given).image_limit == limit


def test_the_defaults() -> None:
    config = validate({})
    assert config.queue_timeout == 120
    for each in config.upstreams:
        assert (each.max_concurrent_fetches, each.requests_per_second, each.request_burst) == (16, None, None)


@pytest.mark.parametrize(
    ("keys", "fault"),
    [
        ({"maxParallelImagePulls": 0}, "maxParallelImagePulls: not a whole number of at least 1"),
        ({"maxParallelImagePulls": -1}, "maxParallelImagePulls: not a whole number of at least 1"),
        ({"maxParallelImagePulls": 1.5}, "maxParallelImagePulls: not a whole number of at least 1"),
        ({"maxParallelImagePulls": True}, "maxParallelImagePulls: not a whole number of at least 1"),
        ({"serializeImagePulls": True, "maxParallelImagePulls": 2}, "contradicts serializeImagePulls: true"),
        ({"serializeImagePulls": "true", "maxParallelImagePulls": "2"}, "contradicts serializeImagePulls: true"),
        ({"maxParallelImagePulls": "0"}, "maxParallelImagePulls: not a whole number of at least 1"),
        ({"maxParallelImagePulls": "1.5"}, "maxParallelImagePulls: not a whole number of at least 1"),
        ({"serializeImagePulls": "perhaps"}, "serializeImagePulls: true or false is needed"),
        ({"queueTimeout": "4m1s"}, "queueTimeout: at most 4m: containerd gives up"),
        ({"queueTimeout": "0s"}, "queueTimeout: more than 0s is needed"),
        ({"queueTimeout": 60}, "queueTimeout: not a duration"),
        (upstream(maxConcurrentFetches=0), "upstreams[0].maxConcurrentFetches: not a whole number of at least 1"),
        (upstream(requestsPerSecond=-1), "upstreams[0].requestsPerSecond: not a number of more than 0"),
        (upstream(requestsPerSecond="nan"), "upstreams[0].requestsPerSecond: not a number of more than 0"),
        (upstream(rateLimitReserve=-1), "upstreams[0].rateLimitReserve: not a whole number of at least 0"),
        (upstream(rateLimitReserve="some"), "upstreams[0].rateLimitReserve: not a whole number of at least 0"),
        (upstream(requestsPerSecond=0), "leave the key out: then there is no limit"),
        (upstream(requestsPerSecond=float("nan")), "upstreams[0].requestsPerSecond: not a number of more than 0"),
        (upstream(requestsPerSecond=float("inf")), "upstreams[0].requestsPerSecond: not a number of more than 0"),
        (upstream(requestsPerSecond=5, requestBurst=-1), "upstreams[0].requestBurst: not a whole number of at least 1"),
        (upstream(requestsPerSecond=5, requestBurst=0), "upstreams[0].requestBurst: not a whole number of at least 1"),
        (upstream(requestBurst=5), "upstreams[0].requestBurst: it is what requestsPerSecond allows after a pause"),
    ],
)
def test_what_is_refused(keys: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(keys)
    assert len(caught.value.faults) == 1
    assert fault in caught.value.faults[0]


async def test_numbers_may_be_variables_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("IMAGES", "3"), ("RATE", "0.5"), ("RESERVE", "20")):
        monkeypatch.setenv(name, value)
    file = tmp_path / "config.yaml"
    file.write_text(
        "maxParallelImagePulls: ${IMAGES}\nupstreams: [{name: quay.io, requestsPerSecond: '${RATE}',"
        " requestBurst: '${IMAGES}', maxConcurrentFetches: '${IMAGES}', rateLimitReserve: '${RESERVE}'}]"
    )
    config = await load(file)
    (registry,) = config.upstreams
    assert (config.image_limit, registry.requests_per_second, registry.request_burst) == (3, 0.5, 3)
    assert (registry.max_concurrent_fetches, registry.rate_limit_reserve) == (3, 20)


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(
            {
                "serializeImagePulls": True,
                "maxParallelImagePulls": 3,
                "queueTimeout": "5m",
                "offline": True,
                "alwaysPullImages": True,
                "upstreams": [
                    {"name": "quay.io", "requestBurst": 5},
                    {"name": "ghcr.io", "requestsPerSecond": 0, "maxConcurrentFetches": "many"},
                ],
            }
        )
    keys = {fault.partition(":")[0] for fault in caught.value.faults}
    assert keys == {
        "maxParallelImagePulls",
        "queueTimeout",
        "offline",
        "upstreams[0].requestBurst",
        "upstreams[1].requestsPerSecond",
        "upstreams[1].maxConcurrentFetches",
    }


# --- which image ---

APP, LIB = Repository("team/app"), Repository("team/lib")
LAYER, OWN, UNKNOWN = (digest_of(text) for text in (b"layer", b"own", b"unknown"))


def target(repository: Repository = APP, client: int = 1) -> Target:
    return Target("quay.io", "quay.io", repository, Asker(ANONYMOUS), PullDecision("Always", ""), client=client)


def hold(store: Store, repository: Repository, *layers: Digest, note: str) -> Digest:
    """A manifest of that repository that names these."""
    kind = "application/vnd.oci.image.manifest.v1+json"
    entries = [{"mediaType": "a/b", "digest": str(layer), "size": 1} for layer in layers]
    document = {"schemaVersion": 2, "mediaType": kind, "config": entries[0], "layers": entries, "annotations": {"n": note}}
    body = json.dumps(document).encode()
    digest = digest_of(body)
    assert store.put_manifest(Origin("quay.io", repository, "anonymous"), digest, body, parse_manifest(body, kind))
    return digest


def test_which_image_a_blob_is_for(tmp_path: Path) -> None:
    """Of several the one that this client was given last in this repository."""
    store = Store.open(tmp_path / "cache", Metrics())
    try:
        images = Images(store, lambda: 0.0, are_counted=True)
        first, second = (hold(store, APP, LAYER, note=note) for note in "12")
        third = hold(store, APP, LAYER, OWN, note="3")
        other = hold(store, LIB, LAYER, note="4")
        assert images.of(target(), UNKNOWN) == ("quay.io", APP, UNKNOWN)
        assert images.of(target(), OWN) == ("quay.io", APP, third)
        assert images.of(target(LIB), LAYER) == ("quay.io", LIB, other)
        assert (
            images.of(target(), LAYER)
            == images.of(target(client=2), LAYER)
            == ("quay.io", APP, min(first, second, third, key=str))
        )
        for given in (first, second, third, digest_of(b"an index"), other):
            images.serve(target(), given)
            images.serve(target(client=2), first)
            expected = given if given in (first, second, third) else third
            assert images.of(target(), LAYER) == ("quay.io", APP, expected)
            assert images.of(target(client=2), LAYER) == ("quay.io", APP, first)
        for number in range(100):
            images.serve(target(), digest_of(str(number).encode()))
        assert images.of(target(), OWN) == ("quay.io", APP, third)
    finally:
        store.close()


def test_where_images_are_not_counted_nobody_looks(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "cache", Metrics())
    store.close()
    images = Images(store, lambda: 0.0, are_counted=False)
    images.serve(target(), LAYER)
    assert images.of(target(), LAYER) is None
