"""Lists and several endpoints, attacked: hostile mirrors, hostile lists, hostile clients, a disk that is full or forgets."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import socket
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from yarl import URL

from proxy import send as sending
from proxy.config.file import validate
from proxy.errors import UpstreamUnavailable
from proxy.metrics import Metrics
from proxy.names import Repository
from proxy.names import digest_of as parsed_digest_of
from proxy.storage import catalog as catalogs
from proxy.storage.base import Origin
from proxy.storage.catalog import Catalog
from proxy.storage.space import Space
from proxy.upstream.endpoints import Endpoints
from proxy.upstream.reply import Where
from tests.blackbox.addressing import DEFAULT, Client, digests_of, next_of, tags_of
from tests.blackbox.oracle import (
    LARGE,
    SMALL,
    blob_of,
    blob_path,
    error_of,
    manifest_path,
    pulls_well,
    vouched_wrongly,
    wrong_files,
)
from tests.blackbox.test_closing_clients import take
from tests.conftest import UPSTREAM, RunningCache, StartCache, running, settings, upstream
from tests.fakes import answers
from tests.fakes.answers import Step, compose, status
from tests.fakes.client import raw_exchange
from tests.fakes.content import DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Manifest, digest_of
from tests.fakes.lists import referrers_tag
from tests.fakes.messages import Answer, Request
from tests.fakes.registry import ScriptedRegistry
from tests.unit.test_endpoints import run

REPO = "team/app"
SIGNATURE = "application/vnd.example.signature"
SOON = 20.0
QUICK = {"connect": "2s", "headers": "2s", "head": "2s", "token": "2s", "progress": "300ms", "endpoint": "500ms"}
Forward = Callable[[float], None]


@pytest.fixture
async def mirror() -> AsyncIterator[ScriptedRegistry]:
    """Listed before ``registry``, which is the authority."""
    async with ScriptedRegistry() as scripted:
        yield scripted


@pytest.fixture
def wind(monkeypatch: pytest.MonkeyPatch) -> Forward:
    """Sets the clock of the wall, in either direction."""
    real, ahead = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + ahead[0])

    def go(seconds: float) -> None:
        ahead[0] += seconds

    return go


def section(*endpoints: ScriptedRegistry | str, **keys: Any) -> dict[str, Any]:
    """An upstream with these endpoints."""
    urls = [endpoint if isinstance(endpoint, str) else endpoint.url for endpoint in endpoints]
    return {"name": UPSTREAM, "endpoints": urls, "allowAddresses": ["127.0.0.0/8"], "timeouts": QUICK, **keys}


def everything(request: Request) -> bool:
    """Matches every request."""
    return True


def always(registry: ScriptedRegistry, *steps: Step) -> None:
    """From now on everything is answered so."""
    registry.script("*", everything, compose(*steps), forever=True)


def client_of(cache: RunningCache) -> Client:
    """A client that asks about ``team/app``."""
    return Client(cache, DEFAULT, REPO)


def api(digest: str) -> str:
    """The path of the referrers of a digest."""
    return f"/v2/{REPO}/referrers/{digest}"


def signed(*registries: ScriptedRegistry, by: int = 3) -> Manifest:
    """An image that all of them have, with so many signatures."""
    images = [registry.add_image(REPO, "1", [b"layer"]) for registry in registries]
    for registry in registries:
        for number in range(by):
            registry.add_artifact(REPO, images[0], SIGNATURE, data=b"%d" % number)
    return images[0]


def index_of_bytes(body: bytes, link: str | None = None) -> Answer:
    """A page of referrers made by hand."""
    return status(200, body, OCI_INDEX, {"Link": link} if link else {})


# --- a mirror and what there is ---


@pytest.mark.parametrize("kind", ["empty index", "empty index under the tag"])
async def test_a_mirror_cannot_say_that_there_are_no_signatures(
    mirror: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, kind: str
) -> None:
    """Only the last endpoint can say that something is not there, and an empty list says just that: registries that have
    the API answer so for whatever they do not know, as does a mirror that only has what was pulled through it."""
    image = signed(registry)
    mirror.add_blob(REPO, b"anything")
    if kind == "empty index under the tag":
        for one in (mirror, registry):
            one.lists.referrers_api = False
        registry.push_referrers_tag(REPO, image.digest)
        mirror.add_manifest(
            REPO,
            json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode(),
            OCI_INDEX,
            referrers_tag(image.digest),
        )
    cache = await start_cache(section(mirror, registry))
    assert len(digests_of(await client_of(cache).get(f"referrers/{image.digest}"))) == 3


async def test_an_empty_list_of_a_mirror_does_not_replace_what_is_held_while_the_registry_is_down(
    mirror: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, wind: Forward
) -> None:
    """What is held is served, and stays."""
    image = signed(registry)
    mirror.add_blob(REPO, b"anything")
    cache = await start_cache(section(mirror, registry))
    always_404 = mirror.script("*", api(image.digest), answers.oci_error(404, "NAME_UNKNOWN"), forever=True)
    assert len(digests_of(await client_of(cache).get(f"referrers/{image.digest}"))) == 3
    always_404.cancel()
    await registry.stop()
    wind(61)
    for _ in range(2):
        assert len(digests_of(await client_of(cache).get(f"referrers/{image.digest}"))) == 3
        wind(61)


async def test_a_list_is_not_put_together_from_two_endpoints(
    mirror: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """A cursor means something to the endpoint that gave it only: half of one list and half of another hide what is in
    neither, and that would be kept for a minute."""
    image = signed(mirror, registry, by=4)
    listed = registry.referrers(REPO, image.digest)

    def page(items: list[Any], link: str | None) -> Answer:
        document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": items}
        return index_of_bytes(json.dumps(document).encode(), link)

    def of(request: Request, size: int) -> Answer:
        number = int(request.params.get("page", ["1"])[0])
        more = len(listed) > number * size
        link = f'<{api(image.digest)}?page={number + 1}>; rel="next"' if more else None
        return page(listed[(number - 1) * size : number * size], link)

    mirror.script("GET", api(image.digest), lambda request: of(request, 1), status(500), forever=True)
    registry.script("GET", api(image.digest), lambda request: of(request, 2), forever=True)
    cache = await start_cache(section(mirror, registry))
    answer = await client_of(cache).get(f"referrers/{image.digest}")
    if answer.status == 200:
        assert sorted(digests_of(answer)) == sorted(item["digest"] for item in listed)
    else:
        assert error_of(answer)[0] in (502, 503)
    again = await client_of(cache).get(f"referrers/{image.digest}")
    assert sorted(digests_of(again)) == sorted(item["digest"] for item in listed)


async def test_a_page_of_tags_is_asked_of_who_gave_its_cursor(
    mirror: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """Whoever follows the links sees every tag, or an error: never a list that lacks some without a word."""
    tags = [f"v{number}" for number in range(6)]
    for one in (mirror, registry):
        for tag in tags:
            one.add_image(REPO, tag, [b"layer"])

    def of(request: Request, size: int) -> Answer:
        number = int(request.params.get("page", ["1"])[0])
        more = len(tags) > number * size
        link = [("Link", f'</v2/{REPO}/tags/list?page={number + 1}>; rel="next"')] if more else []
        return answers.as_json({"name": REPO, "tags": tags[(number - 1) * size : number * size]}, headers=link)

    path = f"/v2/{REPO}/tags/list"
    mirror.script("GET", path, lambda request: of(request, 1), status(500), forever=True)
    registry.script("GET", path, lambda request: of(request, 2), forever=True)
    cache = await start_cache(section(mirror, registry))
    answer = await client_of(cache).get("tags/list")
    found = []
    while answer.status == 200:
        found += tags_of(answer)
        target = next_of(answer)
        if target is None:
            assert found == tags
            return
        answer = await cache.get(target)
    assert error_of(answer)[0] >= 400


async def test_a_mirror_that_lies_about_a_size_does_not_keep_what_is_held_from_its_readers(
    mirror: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """Held for one repository, asked for in another: the mirror answers HEAD with a login page, the registry rightly."""
    data = blob_of("shared", SMALL)
    digest = registry.add_blob(REPO, data)
    other = blob_path(registry.add_blob("team/other", data), "team/other")
    always(mirror, answers.oci_error(404, "NAME_UNKNOWN"))
    cache = await start_cache(section(mirror, registry))
    await pulls_well(cache, blob_path(digest), data)
    mirror._scripts.clear()
    always(mirror, status(200, b"<html>log in</html>", "text/html"))
    await pulls_well(cache, other, data)


async def test_a_type_that_a_mirror_made_up_does_not_spoil_the_registrys_answer(
    mirror: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """A manifest without ``mediaType``: the type is whatever the sender says."""
    config = registry.add_blob(REPO, b"{}")
    data = json.dumps(
        {"schemaVersion": 2, "config": {"mediaType": "application/json", "digest": config, "size": 2}, "layers": []}
    ).encode()
    registry.add_manifest(REPO, data, OCI_MANIFEST, "1")
    mirror.add_manifest(REPO, data, DOCKER_MANIFEST, "1")
    cache = await start_cache(section(mirror, registry))
    assert (await cache.get(manifest_path("1"))).status == 200
    await mirror.stop()
    answer = await cache.get(manifest_path("1"), [("Accept", OCI_MANIFEST)])
    assert (answer.status, answer.body) == (200, data), answer.body


# --- sizes and turns ---


@pytest.mark.parametrize("size", [SMALL, 600_000])
@pytest.mark.parametrize("more", [-100, 1000])
async def test_a_size_that_a_mirror_made_up_before_it_broke_off_does_not_spoil_a_small_blob(
    mirror: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, size: int, more: int
) -> None:
    """The client has seen nothing yet: the registry has the right one."""
    data = blob_of("broken lie", size)
    path = blob_path(registry.add_blob(REPO, data))
    mirror.add_blob(REPO, data)
    mirror.script("GET", path, compose(answers.claim_length(size + more), answers.cut(1000, "rst")), forever=True)
    cache = await start_cache(section(mirror, registry))
    answer = await cache.get(path, within=SOON)
    assert not vouched_wrongly(answer, data)
    assert (answer.status, answer.body) == (200, data), answer.body[:300]
    await cache.settled()
    assert wrong_files(cache) == []


async def test_a_size_that_a_mirror_made_up_spoils_one_pull_at_most(
    mirror: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """Of a large blob the client has had something; the next pull is good, however well the mirror's probes are answered."""
    data = blob_of("broken lie", LARGE)
    path = blob_path(registry.add_blob(REPO, data))
    mirror.add_blob(REPO, data)
    mirror.script("GET", path, compose(answers.claim_length(LARGE + 10), answers.cut(1_200_000, "rst")), forever=True)
    cache = await start_cache(section(mirror, registry))
    assert not vouched_wrongly(await cache.get(path, within=SOON), data)
    await cache.settled()
    await pulls_well(cache, path, data)


@pytest.mark.parametrize("first", ["lacks it", "is down"])
async def test_after_a_corrupt_body_the_next_pull_begins_behind_who_sent_it(
    mirror: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, first: str
) -> None:
    """Three endpoints: one that does not have it, one that has it wrong, one that has it right."""
    data = blob_of("turns", LARGE)
    digest = registry.add_blob(REPO, data)
    path = blob_path(digest)
    async with ScriptedRegistry() as corrupt:
        corrupt.add_blob(REPO, data)
        corrupt.script("GET", path, answers.flip_bit(LARGE // 2), forever=True)
        mirror.add_blob(REPO, b"anything")
        cache = await start_cache(section(mirror, corrupt, registry))
        if first == "is down":
            await mirror.stop()
        assert not (await cache.get(path, within=SOON)).clean_end
        await cache.settled()
        await pulls_well(cache, path, data)


# --- who decides that an endpoint rests ---


@pytest.mark.parametrize(
    "kind",
    ["a cursor that is none", "a digest of another kind", "a blob that is too large", "a size that a manifest made up"],
)
async def test_a_client_cannot_put_a_mirror_to_rest(
    mirror: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path, kind: str
) -> None:
    """By what it asks for, or by an image that it made: that the answer is no use says nothing about the endpoint."""
    data, large = blob_of("rest", SMALL), blob_of("large", LARGE)
    entry = {"mediaType": "application/octet-stream", "digest": digest_of(large), "size": LARGE}
    lying = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": {**entry, "size": SMALL}, "layers": []}
    for one in (mirror, registry):
        one.add_blob(REPO, data)
        one.add_blob(REPO, large)
        one.add_manifest(REPO, json.dumps(lying).encode(), OCI_MANIFEST, "lying")
    mirror.lists.cursor = "next"
    path = blob_path(digest_of(data))
    directory = tmp_path / "cache"
    limit = {"directory": str(directory), "maxBlobSize": "1Mi"} if "large" in kind else {"directory": str(directory)}
    cache = await start_cache(section(mirror, registry), directory=directory, cache=limit)
    if kind == "a cursor that is none":
        assert (await cache.get(f"/v2/{REPO}/tags/list?next=a")).status in (200, 400, 404, 502)
    elif kind == "a digest of another kind":
        strange = blob_path(f"sha512:{'0' * 128}")
        mirror.script("*", strange, answers.oci_error(400, "DIGEST_INVALID"), forever=True)
        assert (await cache.get(strange)).status in (400, 404, 502)
    else:
        if "manifest" in kind:
            assert (await cache.get(manifest_path("lying"))).status == 200
        answer = await cache.get(blob_path(digest_of(large)))
        assert answer.status == 502 or not answer.clean_end
    await cache.settled()
    await pulls_well(cache, path, data)
    assert (mirror.count("GET", path), registry.count("GET", path)) == (1, 0)


# --- links and queries of any bytes ---


ODD_LINKS = [
    "?last=\xff",
    "?last=\xc3",
    "?last=\xe4",
    "?\xed\xa0\x80=1",
    "?last=%FF%FE",
    "?last=%ED%A0%80",
    "?a=%00",
    "?a=\x7f",
]


@pytest.mark.parametrize("target", ODD_LINKS)
async def test_a_link_of_any_bytes_is_a_next_page_or_a_502(
    cache: RunningCache, registry: ScriptedRegistry, target: str
) -> None:
    """Never a fault of pullcache: for tags and for referrers."""
    image = signed(registry)
    link = f'</v2/x/y{target}>; rel="next"'
    registry.script("GET", f"/v2/{REPO}/tags/list", answers.as_json({"name": REPO, "tags": ["1"]}, headers=[("Link", link)]))
    document = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode()
    registry.script("GET", api(image.digest), index_of_bytes(document, link))
    for rest in ("tags/list", f"referrers/{image.digest}"):
        answer = await cache.get(f"/v2/{REPO}/{rest}")
        assert answer.status in (200, 502), answer.body
        if answer.status == 200 and rest == "tags/list":
            target_of_ours = next_of(answer)
            assert target_of_ours is None or (await cache.get(target_of_ours)).status in (200, 502)


async def test_a_cursor_of_any_bytes_comes_back_as_it_was(cache: RunningCache, registry: ScriptedRegistry) -> None:
    """Cursors are the upstream's own: percent-encoded bytes that are no text are bytes all the same."""
    registry.add_image(REPO, "1", [b"layer"])
    path = f"/v2/{REPO}/tags/list"
    link = f'<{path}?cursor=%FF%00%80a>; rel="next"'
    registry.script("GET", path, answers.as_json({"name": REPO, "tags": ["1"]}, headers=[("Link", link)]))
    answer = await cache.get(path)
    if answer.status == 200:
        target = next_of(answer)
        assert target is not None
        await cache.get(target)
        assert registry.seen("GET", path)[-1].target == f"{path}?cursor=%FF%00%80a"
    else:
        assert error_of(answer)[0] == 502


ODD_QUERIES = [
    b"last=\xff",
    b"last=\xed\xa0\x80",
    b"last=%ff",
    b"last=%ED%A0%80",
    b"\xff=1",
    b"last=%00",
    b"last=%0d%0aX-Evil:1",
    b"last=%25%32%35",
    b"n=1&n=%FF",
    b"n=\xd9\xa1",
    b"n=1&last=%ff",
    b"artifactType=%ED%A0%80",
    b"artifactType=\xff",
    b"ns=%FF",
    b"ns=registry.test%0d%0aX-Evil:1",
    b"%",
]


@pytest.mark.parametrize("query", ODD_QUERIES)
@pytest.mark.parametrize("rest", ["tags/list", f"referrers/{digest_of(b'x')}"], ids=["tags", "referrers"])
async def test_a_query_of_any_bytes_is_no_fault_of_pullcache(
    cache: RunningCache, registry: ScriptedRegistry, rest: str, query: bytes
) -> None:
    """Whatever a client writes there: an answer below 500, and no header that it made up."""
    registry.add_image(REPO, "1", [b"layer"])
    registry.lists.page_size = 1
    registry.add_image(REPO, "2", [b"layer"])
    head = f"GET /v2/{REPO}/{rest}?".encode() + query + b" HTTP/1.1\r\nHost: cache\r\nConnection: close\r\n\r\n"
    got = await raw_exchange(cache.host, cache.port, head)
    assert got.startswith((b"HTTP/1.1 ", b"HTTP/1.0 ")), got[:200]
    assert int(got[9:12]) < 500, got
    assert b"\r\nX-Evil" not in got


# --- a list that nobody can read is a failure, and what is held is served ---


def nested(depth: int, how: str) -> bytes:
    """An index with one descriptor that holds something so deep."""
    deep = "[" * depth + "]" * depth if how == "lists" else '{"a":' * depth + "1" + "}" * depth
    entry = f'{{"mediaType":"{OCI_MANIFEST}","digest":"{digest_of(b"x")}","size":1,"x":{deep}}}'
    return f'{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[{entry}]}}'.encode()


@pytest.mark.parametrize("how", ["lists", "objects"])
@pytest.mark.parametrize("depth", [*range(900, 1000, 7), 100, 500, 2000])
async def test_a_list_of_any_depth_is_passed_on_or_a_502(
    cache: RunningCache, registry: ScriptedRegistry, depth: int, how: str
) -> None:
    """With and without a filter, fresh and held: never a fault of pullcache."""
    image = signed(registry)
    registry.script("GET", api(image.digest), index_of_bytes(nested(depth, how)), forever=True)
    for query in ("", "?artifactType=a", "?artifactType=a", ""):
        answer = await cache.get(f"{api(image.digest)}{query}")
        assert answer.status in (200, 502), (depth, answer.body)


@pytest.mark.parametrize("what", ["deep", "a link that is no text", "no utf-8", "a number without end"])
async def test_whatever_comes_instead_of_a_list_what_is_held_is_served(
    cache: RunningCache, registry: ScriptedRegistry, wind: Forward, what: str
) -> None:
    """Stale, with a warning."""
    image = signed(registry)
    held = (await client_of(cache).get(f"referrers/{image.digest}")).body
    good = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []}).encode()
    steps: dict[str, list[Answer]] = {
        "deep": [index_of_bytes(nested(depth, "lists")) for depth in range(940, 1000, 3)],
        "a link that is no text": [index_of_bytes(good, '</x?last=\xff>; rel="next"')],
        "no utf-8": [index_of_bytes(b"\xff\xfe" + good)],
        "a number without end": [index_of_bytes(good[:-1] + b',"x":' + b"9" * 5000 + b"}")],
    }
    for step in steps[what]:
        wind(61)
        registry.script("GET", api(image.digest), step)
        answer = await client_of(cache).get(f"referrers/{image.digest}")
        assert answer.status == 200, answer.body
        if answer.headers.has("Warning"):
            assert answer.body == held
        held = answer.body


async def test_a_list_that_rotted_in_the_catalog_is_asked_for_again(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path
) -> None:
    """It is a miss, as of everything else that cannot be read; not a fault, and not passed on."""
    image = signed(registry)
    directory = tmp_path / "cache"
    async with running(validate(settings(directory, upstream(registry)))) as cache:
        assert len(digests_of(await client_of(cache).get(f"referrers/{image.digest}"))) == 3
    with sqlite3.connect(directory / "cache.db") as database:
        database.execute("UPDATE referrers SET body = substr(body, 1, 100)")
    database.close()
    async with running(validate(settings(directory, upstream(registry)))) as cache:
        for query in ("", f"?artifactType={SIGNATURE}"):
            answer = await cache.get(f"{api(image.digest)}{query}")
            assert len(digests_of(answer)) == 3


# --- disk, clocks, descriptors ---


async def test_lists_are_not_kept_where_the_disk_should_take_no_more(
    cache: RunningCache, registry: ScriptedRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below 5 % nothing is kept, lists among it: thousands of them, each of a quarter of a megabyte, are a gigabyte."""
    image = signed(registry)
    monkeypatch.setattr(Space, "lacking", lambda self, count=0: 1)
    for _ in range(2):
        assert len(digests_of(await client_of(cache).get(f"referrers/{image.digest}"))) == 3
    assert registry.count("GET", api(image.digest)) == 2


def test_lists_from_the_future_do_not_push_out_those_of_today(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that was ahead and was set right: what is written last stays."""
    monkeypatch.setattr(catalogs, "_MAX_LISTS", 3)
    catalog = Catalog.open(tmp_path / "cache.db")
    try:
        repository, now = Repository(REPO), time.time()
        subjects = [parsed_digest_of(b"%d" % number) for number in range(5)]
        for number, subject in enumerate(subjects[:4]):
            catalog.set_referrers(Origin(UPSTREAM, repository, "anonymous"), subject, b"{}", now + 1e6 + number).result(5)
        catalog.set_referrers(Origin(UPSTREAM, repository, "anonymous"), subjects[4], b"{}", now).result(5)
        assert catalog.referrers(UPSTREAM, repository, subjects[4], public=True) is not None
        assert catalog.referrers(UPSTREAM, repository, subjects[0], public=True) is None
    finally:
        catalog.close()


async def test_a_client_who_closes_while_descriptors_are_scarce_is_no_fault_of_pullcache(
    cache: RunningCache, registry: ScriptedRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """To look whether it had taken all needs one more descriptor; where there is none, nothing fails for that."""
    path = blob_path(registry.add_blob(REPO, b"x" * 700))
    await pulls_well(cache, path, b"x" * 700)
    look, looked, looking = sending._Socket.all_taken, 0, False

    def all_taken(wire: sending._Socket) -> bool:
        nonlocal looked, looking
        looked, looking = looked + 1, True
        try:
            return look(wire)
        finally:
            looking = False

    def scarce(call: Callable[..., Any]) -> Callable[..., Any]:
        def make(*args: Any, **options: Any) -> Any:
            if looking:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return call(*args, **options)

        return make

    names = {name: getattr(socket, name) for name in dir(socket)}
    monkeypatch.setattr(sending, "socket", SimpleNamespace(**names | {"socket": scarce(socket.socket)}))
    monkeypatch.setattr(os, "dup", scarce(os.dup))
    monkeypatch.setattr(sending._Socket, "all_taken", all_taken)
    before = len(os.listdir("/proc/self/fd"))
    async with asyncio.timeout(SOON):
        while looked < 3:
            assert await asyncio.to_thread(take, cache.port, path)
    assert not cache.metric("requests_total", kind="blob", status="500")
    assert "fault of pullcache" not in caplog.text
    async with asyncio.timeout(SOON):
        while len(os.listdir("/proc/self/fd")) > before:
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("kind", ["tags/list", "manifests/big"])
async def test_a_client_who_resets_an_answer_from_memory_floods_no_log(
    cache: RunningCache, registry: ScriptedRegistry, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """It is one line of the access log that it left, not a traceback each time."""
    tags = [f"{number:0100d}" for number in range(60_000)]
    registry.add_image(REPO, "1", [b"layer"])
    listed = answers.as_json({"name": REPO, "tags": tags})
    registry.script("GET", f"/v2/{REPO}/tags/list", listed, forever=True)
    entry = {"mediaType": OCI_MANIFEST, "digest": digest_of(b"x"), "size": 1}
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry] * 40_000}).encode()
    registry.add_manifest(REPO, index, OCI_INDEX, "big")
    for number in range(1, 21):
        stream = await cache.open(f"/v2/{REPO}/{kind}", receive_buffer=4096)
        await stream.abort()
        async with asyncio.timeout(SOON):
            while cache.metric("requests_total", status="left") < number:
                await asyncio.sleep(0.002)
        gc.collect()
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []


# --- how long a client waits ---


@pytest.mark.parametrize("limit", [15.0, 3.0], ids=["content", "the digest of a tag"])
@pytest.mark.parametrize("dead", [2, 3, 5, 10])
def test_however_many_endpoints_are_black_holes_a_client_is_answered_before_it_gives_up(dead: int, limit: float) -> None:
    """containerd waits 30 s for the headers of an answer. Also while all of them rest: that is how it goes on for as long
    as the site is cut off."""

    async def never(_: Where) -> None:
        await asyncio.sleep(10_000)

    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        listed = [Where(UPSTREAM, URL(f"https://e{number}.test")) for number in range(dead)]
        endpoints, waited = Endpoints(listed, 3.0, never, Metrics()), []
        for _ in range(3):
            began = loop.time()
            with pytest.raises(UpstreamUnavailable):
                await endpoints.ask(never, limit)
            waited.append(loop.time() - began)
        await endpoints.close()
        return waited

    assert max(run(main())) <= 30.001


# --- tokens ---


async def test_endpoints_that_share_a_token_server_share_no_token(
    mirror: ScriptedRegistry, registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """Not even where a mirror names the registry's token server and service as its own: each has tokens of its own."""
    image = registry.add_image(REPO, "1", [b"layer"])
    async with ScriptedRegistry() as auth:
        for one in (mirror, registry):
            one.require_token(realm=f"{auth.url}/token", service=UPSTREAM, tokens=auth.tokens)
        cache = await start_cache(section(mirror, registry, tokenHosts=[auth.host]))
        await pulls_well(cache, manifest_path("1"), image.data)
        assert not any(mirror.heard(token) for token in auth.tokens.issued if registry.heard(token))
