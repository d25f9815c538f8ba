"""What ``pullcache explain`` says of an image, and that a pull then does what it said; with a server, and without one."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.config.file import validate
from proxy.manifests import OCI_INDEX, OCI_MANIFEST
from tests.blackbox.oracle import manifest_path
from tests.blackbox.private import ALICE, APP, WRONG, Clock, PrivateRegistry, Served, Stock, deployed, with_access
from tests.conftest import UPSTREAM, settings, upstream
from tests.fakes.answers import before_headers, oci_error, status, too_many_requests, with_headers
from tests.fakes.content import Image
from tests.fakes.registry import ScriptedRegistry

REPO = "team/app"
NAME = f"{UPSTREAM}/{REPO}"
BY_KUBERNETES: dict[str, Any] = {"alwaysPullImages": False, "backoff": {}}


@asynccontextmanager
async def serving(tmp_path: Path, registry: ScriptedRegistry, **sections: Any) -> AsyncIterator[Served]:
    """A cache with its admin listener, before ``registry``."""
    keys = {name: sections.pop(name) for name in ("rateLimitReserve",) if name in sections}
    config = validate(settings(tmp_path / "cache", upstream(registry, **keys), **BY_KUBERNETES | sections))
    async with deployed(config) as served:
        yield served


async def explained(cache: Served, image: str, platform: str = "") -> dict[str, Any]:
    """What the admin listener answers."""
    answer = await cache.admin(f"/explain?image={image}" + (f"&platform={platform}" if platform else ""))
    assert answer.status == 200
    said: dict[str, Any] = json.loads(answer.body)
    return said


async def hold(cache: Served, image: Image, tag: str) -> None:
    """Pulls it, all of it."""
    assert (await cache.get(manifest_path(tag))).status == 200
    config = json.loads(image.data)["config"]["digest"]
    for digest in (config, *image.layer_digests):
        assert (await cache.get(f"/v2/{REPO}/blobs/{digest}")).status == 200
    async with asyncio.timeout(10):
        while cache.metric("fills_in_flight"):
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("query", ["", "?", "?image=", "?imag=debian", "?platform=linux/amd64"])
async def test_who_names_no_image_is_shown_how(tmp_path: Path, registry: ScriptedRegistry, query: str) -> None:
    async with serving(tmp_path, registry) as cache:
        answer = await cache.admin(f"/explain{query}")
    assert (answer.status, answer.headers.get("Content-Type")) == (400, "application/json")
    assert "/explain?image=docker.io/library/debian:12" in json.loads(answer.body)["error"]


async def test_a_name_in_full_and_how_it_is_reached(tmp_path: Path, registry: ScriptedRegistry) -> None:
    async with serving(tmp_path, registry) as cache:
        said = await explained(cache, NAME)
        assert (said["image"], said["registry"], said["repository"]) == (f"{NAME}:latest", UPSTREAM, REPO)
        assert (said["tag"], said["digest"]) == ("latest", None)
        assert f"ns={UPSTREAM}" in said["upstream"]["routing"]
        assert "the default upstream" in said["upstream"]["routing"]
        digest = "sha256:" + "0" * 64
        said = await explained(cache, f"{NAME}:1@{digest}")
        assert (said["tag"], said["digest"]) == ("1", digest)
        assert "platform: " in (await explained(cache, NAME, "windows"))["error"]


@pytest.mark.parametrize(
    ("tag", "keys", "policy", "pull"),
    [
        ("1", {}, "IfNotPresent", "served from the cache, and nobody is asked"),
        ("latest", {}, "Always", "asks registry.test by one HEAD"),
        ("1", {"alwaysPullImages": True}, "Always", "asks registry.test by one HEAD"),
        ("1", {"offline": True}, "Never", "served from the cache, and nobody is asked"),
        (
            "1",
            {"imagePullPolicy": {"rules": [{"match": "*", "policy": "IfNotPresent", "maxAge": "0s"}]}},
            "IfNotPresent",
            "asks registry.test by one HEAD",
        ),
        (
            "1",
            {"rules": [{"name": "none", "match": "*", "action": "deny"}]},
            "IfNotPresent",
            "refused: the rule 'none' denies it",
        ),
    ],
)
async def test_what_is_held_and_what_a_pull_would_do(
    tmp_path: Path, registry: ScriptedRegistry, tag: str, keys: dict[str, Any], policy: str, pull: str
) -> None:
    image = registry.add_image(REPO, tag, [b"layer one", b"layer two"])
    async with serving(tmp_path, registry) as cache:
        nothing = await explained(cache, f"{NAME}:{tag}")
        assert nothing["held"] == {
            "complete": False,
            "manifest": None,
            "confirmedAgo": None,
            "missing": [],
            "error": None,
            "images": [],
        }
        assert nothing["pull"] == f"a pull fetches it from {UPSTREAM}"
        await cache.get(manifest_path(tag))
        part = await explained(cache, f"{NAME}:{tag}")
        assert part["held"]["missing"][1:] == list(image.layer_digests)
        assert part["pull"].endswith("; 3 blobs of it are not held, and are fetched from registry.test")
        await hold(cache, image, tag)
    asked = len(registry.requests)
    async with serving(tmp_path, registry, **keys) as cache:
        said = await explained(cache, f"{NAME}:{tag}")
        held = said["held"]
        assert (held["complete"], held["manifest"], held["missing"]) == (True, image.digest, [])
        assert held["images"][0]["bytes"] >= len(b"layer onelayer two")
        assert 0 <= held["confirmedAgo"] < 60
        assert said["imagePullPolicy"]["policy"] == policy
        assert said["fresh"] == ("nobody is asked" in pull or "refused" in pull)
        assert pull in said["pull"]
        assert len(registry.requests) == asked, "nobody was asked for it"
        await cache.get(manifest_path(tag))
        assert len(registry.requests) - asked == ("HEAD" in pull), "a pull does what was said"


async def test_each_platform_is_told(tmp_path: Path, registry: ScriptedRegistry) -> None:
    """An index is held if one platform's image is, or the one that is asked for."""
    images = [registry.add_image(REPO, None, [name.encode()], architecture=name) for name in ("amd64", "arm64")]
    registry.add_index(REPO, "1", images)
    async with serving(tmp_path, registry) as cache:
        await cache.get(manifest_path("1"))
        assert (await explained(cache, f"{NAME}:1"))["held"]["complete"] is False
        await hold(cache, images[0], images[0].digest)
        for platform, is_held, missing in (
            ("", True, []),
            ("linux/amd64", True, []),
            ("linux/arm64", False, [images[1].digest]),
            ("linux/s390x", False, []),
            ("all", False, [images[1].digest]),
        ):
            held = (await explained(cache, f"{NAME}:1", platform))["held"]
            assert (held["complete"], held["missing"]) == (is_held, missing), platform
        assert [image["platform"] for image in held["images"]] == ["linux/amd64", "linux/arm64"]
        for platform, rest in (
            ("linux/arm64", "; 1 manifest of it is not held, and is fetched from registry.test"),
            ("linux/s390x", "; there is no manifest for linux/s390x in it; the platforms in it: linux/amd64, linux/arm64"),
        ):
            said = await explained(cache, f"{NAME}:1", platform)
            assert said["pull"] == f"a pull is served from the cache, and nobody is asked{rest}"
            assert (said["held"]["error"] or "") == ("" if platform == "linux/arm64" else rest.removeprefix("; "))


async def test_what_is_anothers_is_not_held_here(tmp_path: Path, registry: ScriptedRegistry) -> None:
    """By digest: what a repository was never proved to have is not told as held for it."""
    image = registry.add_image(REPO, "1", [b"layer"])
    async with serving(tmp_path, registry) as cache:
        await hold(cache, image, "1")
        assert (await explained(cache, f"{NAME}@{image.digest}"))["held"]["complete"]
        assert not (await explained(cache, f"{UPSTREAM}/other/app@{image.digest}"))["held"]["complete"]


async def test_never_says_what_will_be_missing(tmp_path: Path, registry: ScriptedRegistry) -> None:
    registry.add_image(REPO, "1", [b"layer"])
    async with serving(tmp_path, registry) as cache:
        await cache.get(manifest_path("1"))
    async with serving(tmp_path, registry, offline=True) as cache:
        assert (
            "2 blobs of it are not held, and then it fails with ErrImageNeverPull"
            in (await explained(cache, f"{NAME}:1"))["pull"]
        )
        assert (
            "refused with ErrImageNeverPull: it is not held, and no registry is asked: offline is true"
            in (await explained(cache, f"{NAME}:2"))["pull"]
        )


async def test_back_off_is_told_with_its_time(clock: Clock, tmp_path: Path, registry: ScriptedRegistry) -> None:
    """For whom, why, and when the next attempt is; a held tag is served meanwhile."""
    image = registry.add_image(REPO, "latest", [b"layer"])
    async with serving(tmp_path, registry) as cache:
        await hold(cache, image, "latest")
        registry.script("*", lambda request: "manifests" in request.path, status(500), forever=True)
        for tag in ("latest", "1"):
            await cache.get(manifest_path(tag))
        said = await explained(cache, NAME)
        (back,) = said["backoff"]
        assert back["for"] == "anybody"
        assert "answered 500" in back["error"]
        assert 0 < back["nextAttemptIn"] <= 10
        assert "a pull is served what is held, with a Warning, and nobody is asked: " in said["pull"]
        assert "answered 500; the next attempt is in " in said["pull"]
        assert "a pull fails, nobody is asked: " in (await explained(cache, f"{NAME}:1"))["pull"]
        clock.advance(10)
        assert (await explained(cache, NAME))["backoff"] == []
    async with serving(tmp_path, registry, staleIfError=False) as cache:
        await cache.get(manifest_path("latest"))
        assert "a pull fails, since nothing stale is served: " in (await explained(cache, NAME))["pull"]


async def test_what_one_question_was_answered_is_not_told_of_others(tmp_path: Path, registry: ScriptedRegistry) -> None:
    """While GETs of manifests are too many, HEADs are asked; while a tag fails, the blobs of what is held are fetched; a
    refusal is not served stale. And a pull then does what was said."""
    registry.add_image(REPO, "latest", [b"layer"])
    tag = manifest_path("latest")
    async with serving(tmp_path, registry) as cache:
        assert (await cache.get(tag)).status == 200
        registry.script("GET", manifest_path("2"), too_many_requests(600))
        assert (await cache.get(manifest_path("2"))).status == 429
        said = await explained(cache, NAME)
        assert said["pull"].startswith("a pull asks registry.test by one HEAD")
        assert (await explained(cache, f"{NAME}:3"))["pull"].startswith("a pull fails, nobody is asked: ")
        assert (await cache.get(tag)).headers.getall("Pullcache-Decision") == ["revalidated"]

        registry.script("HEAD", tag, status(500))
        assert (await cache.get(tag)).headers.getall("Pullcache-Decision") == ["stale"]
        said = await explained(cache, NAME)
        assert "a pull is served what is held, with a Warning, and nobody is asked: " in said["pull"]
        assert said["pull"].endswith("; 2 blobs of it are not held, and are fetched from registry.test")
    async with serving(tmp_path, registry) as cache:
        registry.script("*", lambda request: REPO in request.path, oci_error(403, "DENIED"), forever=True)
        assert (await cache.get(tag)).status == 403
        assert (await explained(cache, NAME))["pull"].startswith("a pull fails, nobody is asked: ")
        asked = len(registry.requests)
        assert (await cache.get(tag)).status == 403
        assert len(registry.requests) == asked


async def test_the_reserve_of_the_rate_limit_is_for_tags_past_their_age(tmp_path: Path, registry: ScriptedRegistry) -> None:
    """A tag that is ``Always`` is asked for, however few pulls are left."""
    for tag in ("latest", "1"):
        registry.add_image(REPO, tag, [b"layer"])
        registry.script("GET", manifest_path(tag), with_headers({"ratelimit-limit": "100", "ratelimit-remaining": "1"}))
    policy = {"rules": [{"match": "*:1", "policy": "IfNotPresent", "maxAge": "0s"}]}
    async with serving(tmp_path, registry, rateLimitReserve=5, imagePullPolicy=policy) as cache:
        for tag, pull, decision in (
            ("latest", "a pull asks registry.test by one HEAD", "revalidated"),
            ("1", "a pull is served from the cache, and nobody is asked", "hit"),
        ):
            await cache.get(manifest_path(tag))
            assert (await explained(cache, f"{NAME}:{tag}"))["pull"].startswith(pull)
            assert (await cache.get(manifest_path(tag))).headers.getall("Pullcache-Decision") == [decision]


async def test_what_one_client_is_refused_is_not_told_of_others(
    tmp_path: Path, private: PrivateRegistry, stock: Stock
) -> None:
    """With ``verify`` the anonymous are refused what is private, and so is a wrong credential; others may have it."""
    section, sections = with_access(private, "verify"), {"alwaysPullImages": True, "externalURL": "https://cache.test"}
    async with deployed(validate(settings(tmp_path / "cache", section, **BY_KUBERNETES | sections))) as cache:
        for credential, code in ((ALICE, 200), (WRONG, 401)):
            assert (await cache.get(f"/v2/{APP}/manifests/1", credential.headers)).status == code
        said = await explained(cache, f"{UPSTREAM}/{APP}:1")
        assert said["held"]["manifest"] == stock.app.digest
        assert [back["for"] for back in said["backoff"]] == ["anybody", "a client's own credential"]
        assert said["pull"].startswith(f"a pull asks {UPSTREAM} by one HEAD; ")
        said = await explained(cache, f"{UPSTREAM}/{APP}@{stock.app.digest}")
        assert said["pull"].startswith("a pull is served from the cache, and nobody is asked but for the right to read it;")


async def test_a_404_is_told(tmp_path: Path, registry: ScriptedRegistry) -> None:
    registry.script("*", manifest_path("1"), oci_error(404, "MANIFEST_UNKNOWN"), forever=True)
    async with serving(tmp_path, registry) as cache:
        await cache.get(manifest_path("1"))
        said = await explained(cache, f"{NAME}:1")
        assert "has no manifest 1" in said["backoff"][0]["error"]
        assert "a pull fails, nobody is asked: " in said["pull"]


async def test_an_outage_is_told(clock: Clock, tmp_path: Path, registry: ScriptedRegistry) -> None:
    registry.script("*", lambda _: True, before_headers("rst"), forever=True)
    async with serving(tmp_path, registry) as cache:
        assert (await explained(cache, f"{NAME}:1"))["upstream"]["outage"] is None
        await cache.get(manifest_path("1"))
        said = await explained(cache, f"{NAME}:2")
        assert "dropped the connection" in said["upstream"]["outage"]
        assert said["pull"].endswith("; it is probed every 5 s")


async def test_the_rate_limit_is_told(tmp_path: Path, registry: ScriptedRegistry) -> None:
    registry.add_image(REPO, "1", [b"layer"])
    told = {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": "76;w=21600", "docker-ratelimit-source": "192.0.2.9"}
    registry.script("GET", manifest_path("1"), with_headers(told))
    async with serving(tmp_path, registry) as cache:
        assert (await explained(cache, f"{NAME}:1"))["rateLimit"] == []
        await cache.get(manifest_path("1"))
        (limit,) = (await explained(cache, f"{NAME}:1"))["rateLimit"]
        assert 0 <= limit.pop("toldAgo") < 60
        assert limit == {"of": "anybody", "limit": 100, "remaining": 76, "window": 21600, "source": "192.0.2.9"}
        registry.script("*", lambda _: True, too_many_requests(600), forever=True)
        await cache.get(manifest_path("2"))
        said = await explained(cache, f"{NAME}:3")
        assert "rate limit is used up" in said["backoff"][0]["error"]
        assert 590 < said["backoff"][0]["nextAttemptIn"] <= 600


# --- the command ---


async def command(*arguments: str) -> tuple[int, str, str]:
    """Runs ``pullcache explain``."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "explain", *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_it_works_with_the_server_and_without(tmp_path: Path, registry: ScriptedRegistry) -> None:
    """The same of the same directory, but for what only a running one knows."""
    image = registry.add_image(REPO, "1", [b"layer"])
    written = settings(tmp_path / "cache", upstream(registry), alwaysPullImages=False)
    file = tmp_path / "config.yaml"
    async with serving(tmp_path, registry) as cache:
        await hold(cache, image, "1")
        file.write_text(yaml.safe_dump(written | {"admin": f"127.0.0.1:{cache.admin_port}"}))
        code, text, noise = await command(f"{NAME}:1", "--config", str(file))
        assert (code, noise) == (0, "")
        running = json.loads((await command(f"{NAME}:1", "--config", str(file), "--json"))[1])
    asked = len(registry.requests)
    code, alone, noise = await command(f"{NAME}:1", "--config", str(file))
    assert code == 0
    assert noise.startswith("nobody listens on http://127.0.0.1:")
    assert noise.endswith(": told from the configuration and the cache directory alone\n")
    for line in (f"image       {NAME}:1", f"held        {image.digest}", "policy      IfNotPresent: "):
        assert line in text
        assert line in alone
    for told in (text, alone):
        assert told.splitlines()[-1] == "now         a pull is served from the cache, and nobody is asked"
    stopped = json.loads((await command(f"{NAME}:1", "--config", str(file), "--json"))[1])
    for found in (running, stopped):
        found["held"].pop("confirmedAgo")
    assert stopped == running
    assert len(registry.requests) == asked


async def test_whoever_has_pulled_a_tag_it_is_held(tmp_path: Path, registry: ScriptedRegistry) -> None:
    """A client of another ``Accept`` had it: a runtime is served that, so it is told; with a server, and without one. What a
    runtime might not be given is not held for it."""
    image = registry.add_image(REPO, "image", [b"layer"])
    index = registry.add_index(REPO, "index", [image])
    file = tmp_path / "config.yaml"
    async with serving(tmp_path, registry) as cache:
        for tag, accept in (("index", OCI_INDEX), ("image", OCI_MANIFEST)):
            assert (await cache.get(manifest_path(tag), [("Accept", accept)])).status == 200
        said = {tag: await explained(cache, f"{NAME}:{tag}") for tag in ("index", "image")}
    file.write_text(yaml.safe_dump(settings(tmp_path / "cache", upstream(registry), **BY_KUBERNETES)))
    for tag, held, pull in (
        ("index", index.digest, "a pull is served from the cache, and nobody is asked"),
        ("image", None, f"a pull fetches it from {UPSTREAM}"),
    ):
        alone = json.loads((await command(f"{NAME}:{tag}", "--config", str(file), "--json"))[1])
        for told in (said[tag], alone):
            assert told["held"]["manifest"] == held
            assert told["pull"].startswith(pull)


async def test_a_directory_that_another_one_uses_is_not_read_beside_it(tmp_path: Path, registry: ScriptedRegistry) -> None:
    """Its admin address was not found, so it is not asked; the text says so."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings(tmp_path / "cache", upstream(registry)) | {"admin": "127.0.0.1:1"}))
    async with serving(tmp_path, registry):
        code, text, noise = await command(NAME, "--config", str(file))
    assert (code, text) == (1, "")
    assert "cannot explain: " in noise
    assert str(tmp_path / "cache") in noise
