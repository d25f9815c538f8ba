"""What a client is told about each answer: one word of ``Pullcache-Decision``, and ``Age``. The same word is in the access
log and in the figures."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest

from proxy.policy import Decision
from tests.blackbox.oracle import LARGE, blob_of, blob_path, manifest_path
from tests.blackbox.private import started, until
from tests.conftest import Pairs, RunningCache, StartCache, upstream
from tests.fakes.answers import Step, before_headers, compose, gate, oci_error, status, too_many_requests
from tests.fakes.client import WireResponse, fetch, raw_exchange
from tests.fakes.content import Image, digest_of
from tests.fakes.registry import ScriptedRegistry

REPO, DENIED_REPO = "team/app", "team/secret"
HELD, MOVED, ABSENT = "1", "moved", "9"
CONTENT_AGE, TAG_AGE, LIST_AGE = 7200, 3600, 30
SLACK = 60
"""Seconds that a machine may pause."""

ALWAYS: dict[str, Any] = {"alwaysPullImages": True}
IF_NOT_PRESENT: dict[str, Any] = {"alwaysPullImages": False}
OFFLINE: dict[str, Any] = {"alwaysPullImages": False, "offline": True}
RULES = [{"name": "closed", "match": f"*/{DENIED_REPO}", "action": "deny"}]

ZEROS = f"sha256:{'0' * 64}"
LAYER, NEW_LAYER, UNHELD = b"the layer of what is held", b"the layer of what is new", b"a layer that nobody has pulled"
DIGEST, UNHELD_DIGEST = digest_of(LAYER), digest_of(UNHELD)

TAG, NEW_TAG, NO_TAG = manifest_path(HELD), manifest_path(MOVED), manifest_path(ABSENT)
BLOB, NEW_BLOB, NO_BLOB = blob_path(DIGEST), blob_path(UNHELD_DIGEST), blob_path(ZEROS)
LIST = f"/v2/{REPO}/tags/list"
MANIFEST, REFERRERS, OLD_REFERRERS = "manifest by digest", "referrers, asked for lately", "referrers, asked for long ago"
"""Paths that are known once there is an image."""


CACHE_STATUS = {
    "hit": "pullcache; hit",
    "revalidated": "pullcache; hit; detail=revalidated",
    "refreshed": "pullcache; fwd=stale",
    "miss": "pullcache; fwd=miss",
    "followed": "pullcache; fwd=miss; collapsed",
    "stale": "pullcache; hit; detail=stale",
}
"""RFC 9211, of what has content."""


def age_in(directory: Path, content: float = CONTENT_AGE, tags: float = TAG_AGE, lists: float = LIST_AGE) -> None:
    """Puts back what a cache that has stopped remembers of time, by so many seconds."""
    now = time.time()
    for file in (directory / "blobs").rglob("*"):
        if file.is_file():
            os.utime(file, (now - content, now - content))
    with closing(sqlite3.connect(directory / "cache.db")) as catalog, catalog:
        catalog.execute("UPDATE tags SET checked = ?", (now - tags,))
        catalog.execute("UPDATE referrers SET checked = ?", (now - lists,))
        catalog.execute("UPDATE referrers SET checked = ? WHERE subject = ?", (now - tags, ZEROS))


@dataclass(frozen=True)
class Row:
    """A request, what the registry says to all it is asked, and what the client is told. ``age``: None where it is an error,
    or of no content: just now."""

    path: str
    status: int
    decision: Decision
    age: int | None
    method: str = "GET"
    keys: dict[str, Any] = field(default_factory=lambda: IF_NOT_PRESENT)
    headers: Pairs = field(default_factory=list)
    upstream: Step | None = None
    body: bytes = b""


def both(path: str, decision: Decision, age: int, **more: Any) -> list[Row]:
    """By GET and by HEAD."""
    return [Row(path, 200, decision, age, method, **more) for method in ("GET", "HEAD")]


def refused(path: str, code: int, decision: Decision, **more: Any) -> list[Row]:
    """By GET and by HEAD."""
    return [Row(path, code, decision, None, method, **more) for method in ("GET", "HEAD")]


FAILS: Step = status(500)
SINGLE = [("Range", "bytes=2-4")]
ROWS = [
    *(Row("/v2/", 200, "hit", None, method) for method in ("GET", "HEAD")),
    # held, and nobody is asked
    *both(TAG, "hit", TAG_AGE),
    *both(TAG, "hit", TAG_AGE, keys=OFFLINE),
    *both(MANIFEST, "hit", CONTENT_AGE),
    *both(BLOB, "hit", CONTENT_AGE),
    *both(REFERRERS, "hit", LIST_AGE),
    Row(f"{REFERRERS}?artifactType=application/x", 200, "hit", LIST_AGE),
    Row(BLOB, 206, "hit", CONTENT_AGE, headers=SINGLE),
    *(Row(path, 304, "hit", age, headers=[("If-None-Match", "*")]) for path, age in ((TAG, TAG_AGE), (BLOB, CONTENT_AGE))),
    # the tag is asked about
    *both(TAG, "revalidated", 0, keys=ALWAYS),
    Row(TAG, 304, "revalidated", 0, "HEAD", keys=ALWAYS, headers=[("If-None-Match", "*")]),
    *both(NEW_TAG, "refreshed", 0, keys=ALWAYS),
    *both(NEW_TAG, "hit", TAG_AGE),
    *both(TAG, "stale", TAG_AGE, keys=ALWAYS, upstream=FAILS),
    *both(TAG, "stale", TAG_AGE, keys=ALWAYS, upstream=before_headers("rst")),
    *both(OLD_REFERRERS, "stale", TAG_AGE, upstream=FAILS),
    # not held
    *both(manifest_path("new"), "miss", 0),
    *both(manifest_path("new"), "miss", 0, keys=ALWAYS),
    *both(NEW_BLOB, "miss", 0),
    Row(NEW_BLOB, 206, "miss", 0, headers=SINGLE),
    *both(LIST, "miss", 0),
    *both(OLD_REFERRERS, "miss", 0),
    *both(f"/v2/{REPO}/referrers/{DIGEST}", "miss", 0),
    # none, or none now
    *refused(NO_TAG, 404, "negative"),
    *refused(NO_TAG, 404, "negative", keys=OFFLINE),
    *refused(TAG, 404, "negative", keys=ALWAYS, upstream=oci_error(404, "MANIFEST_UNKNOWN")),
    *refused(NO_BLOB, 404, "negative"),
    *refused(NO_TAG, 502, "negative", upstream=FAILS),
    *refused(NO_TAG, 503, "negative", upstream=before_headers("rst")),
    *refused(NO_TAG, 429, "negative", upstream=too_many_requests(7)),
    *refused(LIST, 502, "negative", upstream=FAILS),
    *refused("/v2/unknown.test/a/manifests/1", 404, "negative"),
    *refused("/v2/_catalog", 404, "negative"),
    # not for this client, or not a request that is answered
    *refused(NO_TAG, 403, "denied", upstream=oci_error(403, "DENIED")),
    *refused(NO_TAG, 403, "denied", upstream=oci_error(401, "UNAUTHORIZED")),
    *refused(manifest_path("1", DENIED_REPO), 403, "denied"),
    *refused(f"/v2/{REPO}/blobs/sha256:short", 400, "denied"),
    *refused(f"{LIST}?n=x", 400, "denied"),
    Row(BLOB, 416, "denied", None, headers=[("Range", "bytes=1000-")]),
    Row(f"/v2/{REPO}/blobs/uploads/", 405, "denied", None, "POST"),
    Row(TAG, 413, "denied", None, body=b"x" * 70_000),
]


@pytest.fixture
def image(registry: ScriptedRegistry) -> Image:
    """What is held."""
    registry.add_image(REPO, MOVED, [LAYER])
    return registry.add_image(REPO, HELD, [LAYER])


@pytest.fixture
async def directory(tmp_path: Path, registry: ScriptedRegistry, image: Image) -> Path:
    """Where it is held, for some time; what else the registry has is new."""
    path = tmp_path / "held"
    async with started(path, upstream(registry)) as cache:
        for held in (TAG, NEW_TAG, BLOB, path_of(REFERRERS, image), path_of(OLD_REFERRERS, image)):
            assert (await cache.get(held)).status == 200
        await cache.settled()
    age_in(path)
    registry.add_image(REPO, MOVED, [NEW_LAYER])
    registry.add_image(REPO, "new", [NEW_LAYER])
    registry.add_blob(REPO, UNHELD)
    return path


def path_of(name: str, image: Image) -> str:
    """The path that is meant."""
    known = {
        MANIFEST: manifest_path(image.digest),
        REFERRERS: f"/v2/{REPO}/referrers/{image.digest}",
        OLD_REFERRERS: f"/v2/{REPO}/referrers/{ZEROS}",
    }
    path, question, query = name.partition("?")
    return f"{known.get(path, path)}{question}{query}"


def told(answer: WireResponse) -> tuple[list[str], int | None]:
    """The words, of which there should be one, and ``Age``."""
    ages = answer.headers.getall("Age")
    assert len(ages) <= 1
    assert all(age.isdecimal() for age in ages)
    return answer.headers.getall("Pullcache-Decision"), int(ages[0]) if ages else None


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.method} {row.path} {row.status} {row.decision}")
async def test_every_answer_says_what_was_decided_and_how_old_it_is(
    start_cache: StartCache,
    registry: ScriptedRegistry,
    image: Image,
    directory: Path,
    caplog: pytest.LogCaptureFixture,
    row: Row,
) -> None:
    """``Age`` (RFC 9111, 5.1): seconds since the upstream was last heard to say this; of content by digest, since it was
    stored."""
    cache = await start_cache(upstream(registry), directory=directory, rules=RULES, **row.keys)
    if row.upstream is not None:
        registry.script("*", lambda _: True, row.upstream, forever=True)
    with caplog.at_level(logging.INFO, logger="proxy.access"):
        path = path_of(row.path, image)
        answer = await fetch(cache.host, cache.port, row.method, path, row.headers, body=row.body)
        await until(lambda: cache.metric("requests_total") == 1)
    words, age = told(answer)
    assert (answer.status, words) == (row.status, [row.decision])
    assert age in ([0] if not row.age else range(row.age, row.age + SLACK))
    assert answer.headers.get("Cache-Status") == (None if row.age is None else CACHE_STATUS[row.decision])
    assert cache.metric("requests_total", decision=row.decision, status=str(row.status)) == 1
    (line,) = [record for record in caplog.records if record.name == "proxy.access"]
    assert vars(line)["fields"]["decision"] == row.decision


async def test_who_joins_a_download_is_told_that_he_followed(cache: RunningCache, registry: ScriptedRegistry) -> None:
    """The first client, who began it, was told ``miss``; who comes when all is held, ``hit``."""
    data = blob_of("followed", LARGE)
    path = blob_path(registry.add_blob(REPO, data))
    go_on = asyncio.Event()
    registry.script("GET", path, gate(go_on, after=LARGE // 2))
    first = await cache.open(path)
    await first.read(1)
    second = await cache.open(path)
    part = await cache.get(path, [("Range", "bytes=0-9")])
    go_on.set()
    for stream in (first, second):
        await stream.read_all()
        await stream.close()
    await cache.settled()
    last = await cache.get(path)
    words = [stream.headers.getall("Pullcache-Decision") for stream in (first, second, part, last)]
    assert words == [["miss"], ["followed"], ["followed"], ["hit"]]
    assert second.headers.get("Cache-Status") == CACHE_STATUS["followed"]
    assert [stream.headers.getall("Age") for stream in (first, second, part)] == [["0"]] * 3
    assert registry.count("GET", path) == 1


async def test_whose_own_download_it_is_was_not_followed(start_cache: StartCache, tmp_path: Path) -> None:
    """A second registry's client follows the download from the first; that fails, and his own is begun: a ``miss``."""
    async with ScriptedRegistry() as failing, ScriptedRegistry() as sound:
        data = blob_of("own", LARGE)
        digest = failing.add_blob(REPO, data)
        sound.add_blob(REPO, data)
        go_on = asyncio.Event()
        path = f"/v2/{REPO}/blobs/{digest}"
        failing.script("GET", path, compose(status(500), gate(go_on)), forever=True)
        cache = await start_cache(upstream(failing, "a.test"), upstream(sound, "b.test"), directory=tmp_path / "cache")
        first = asyncio.create_task(cache.get(f"/v2/a.test/{REPO}/blobs/{digest}"))
        await failing.wait_for(lambda: failing.count("GET", path))
        second = asyncio.create_task(cache.get(f"/v2/b.test/{REPO}/blobs/{digest}"))
        await until(lambda: cache.metric("followers_total") == 1)
        go_on.set()
        answers = await asyncio.gather(first, second)
        await cache.settled()
    assert [answer.headers.getall("Pullcache-Decision") for answer in answers] == [["negative"], ["miss"]]
    assert answers[1].body == data


@pytest.mark.parametrize("path", [TAG, MANIFEST, BLOB, REFERRERS])
async def test_age_is_not_negative_when_the_clock_has_gone_back(
    start_cache: StartCache, registry: ScriptedRegistry, image: Image, directory: Path, path: str
) -> None:
    age_in(directory, *[-100_000] * 3)
    cache = await start_cache(upstream(registry), directory=directory, **OFFLINE)
    answer = await cache.get(path_of(path, image))
    assert (answer.status, *told(answer)) == (200, ["hit"], 0)


async def test_what_is_not_http_is_denied(cache: RunningCache) -> None:
    """What aiohttp finds wrong has the header as well."""
    answer = await raw_exchange(cache.host, cache.port, b"GET /v2/ HTTP/1.1\r\nbad header\r\n\r\n")
    assert b" 400 " in answer.partition(b"\r\n")[0]
    assert b"\r\nPullcache-Decision: denied\r\n" in answer


def test_every_word_is_in_the_table() -> None:
    """``followed`` has a test of its own."""
    assert {row.decision for row in ROWS} | {"followed"} == set(get_args(Decision))
