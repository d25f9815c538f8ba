"""The fakes do on the wire what their names say."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from . import answers
from .answers import Step, compose
from .client import NoResponse, WireResponse, fetch, finish, open_stream, open_wire, raw_exchange, read_head
from .content import OCI_INDEX, OCI_MANIFEST, digest_of
from .dns import Query, ScriptedDNS, with_resolver, write_resolv_conf
from .lists import referrers_tag
from .messages import BEFORE_HEADERS, Answer, Request
from .recorder import Sink
from .registry import ScriptedRegistry
from .tls import Authority, HalfHandshake
from .tokens import TokenServer, basic

pytestmark = pytest.mark.asyncio

REPO = "team/app"
DATA = bytes(range(256)) * 1000
PATH = f"/v2/{REPO}/blobs/{digest_of(DATA)}"

Get = Callable[..., Coroutine[Any, Any, WireResponse]]


@pytest.fixture
async def reg() -> AsyncIterator[ScriptedRegistry]:
    """A registry with one blob."""
    async with ScriptedRegistry() as registry:
        registry.add_blob(REPO, DATA)
        yield registry


@pytest.fixture
def get(reg: ScriptedRegistry) -> Get:
    """Ask the registry for the blob, by a script if one is given."""

    async def ask(step: Step | None = None, *, method: str = "GET", span: str | None = None) -> WireResponse:
        if step is not None:
            reg.script("*", PATH, step)
        headers = [("Range", f"bytes={span}")] if span else []
        return await fetch("127.0.0.1", reg.port, method, PATH, headers)

    return ask


def error_code(response: WireResponse) -> str:
    """The code in an error of the specified form."""
    code = json.loads(response.body)["errors"][0]["code"]
    assert isinstance(code, str)
    return code


# --- the truthful registry ---


async def test_tells_the_truth_by_default(reg: ScriptedRegistry, get: Get) -> None:
    whole = await get()
    assert (whole.status, whole.body, whole.clean_end) == (200, DATA, True)
    assert whole.headers.get("docker-content-digest") == digest_of(DATA)
    assert whole.headers.getall("CONTENT-LENGTH") == [str(len(DATA))]
    assert whole.headers.get("Accept-Ranges") == "bytes"
    head = await get(method="HEAD")
    assert (head.status, head.headers, head.body, head.clean_end) == (200, whole.headers, b"", True)
    assert reg.bytes_sent(PATH) == reg.bytes_sent() == len(DATA)
    assert reg.count("GET", PATH) == reg.count("HEAD", PATH) == 1


@pytest.mark.parametrize(
    ("span", "first", "last"),
    [
        ("0-0", 0, 0),
        ("10-19", 10, 19),
        ("255990-", 255990, 255999),
        ("5-999999", 5, 255999),
        ("-6", 255994, 255999),
    ],
)
async def test_serves_a_range(get: Get, span: str, first: int, last: int) -> None:
    part = await get(span=span)
    assert (part.status, part.body) == (206, DATA[first : last + 1])
    assert part.headers.get("Content-Range") == f"bytes {first}-{last}/{len(DATA)}"


async def test_refuses_a_range_beyond_the_end(get: Get) -> None:
    refused = await get(span=f"{len(DATA)}-")
    assert (refused.status, refused.headers.get("Content-Range")) == (416, f"bytes */{len(DATA)}")


async def test_honours_if_range(reg: ScriptedRegistry) -> None:
    for tag, status in ((f'"{digest_of(DATA)}"', 206), ('"other"', 200)):
        headers = [("Range", "bytes=1-"), ("If-Range", tag)]
        assert (await fetch("127.0.0.1", reg.port, "GET", PATH, headers)).status == status


async def test_serves_images_indexes_and_lists(reg: ScriptedRegistry) -> None:
    image = reg.add_image(REPO, "v1", [b"one", b"two"], urls=["http://sink.test/layer"])
    other = reg.add_image(REPO, None, [b"three"], subject=image)
    index = reg.add_index(REPO, "all", [image, other])

    async def ask(path: str) -> WireResponse:
        return await fetch("127.0.0.1", reg.port, "GET", f"/v2/{REPO}/{path}")

    by_tag = await ask("manifests/v1")
    assert (by_tag.body, by_tag.headers.get("Content-Type")) == (image.data, OCI_MANIFEST)
    assert (await ask(f"manifests/{image.digest}")).body == image.data
    assert digest_of(image.data) == image.digest == by_tag.headers.get("Docker-Content-Digest")
    assert json.loads(image.data)["layers"][0]["urls"] == ["http://sink.test/layer"]
    assert (await ask(f"blobs/{image.layer_digests[1]}")).body == b"two"
    assert (await ask(f"blobs/{image.config_digest}")).body == image.config
    listed = await ask("manifests/all")
    assert (listed.body, listed.headers.get("Content-Type")) == (index.data, OCI_INDEX)

    assert json.loads((await ask("tags/list")).body) == {"name": REPO, "tags": ["all", "v1"]}
    page = await ask("tags/list?n=1")
    assert json.loads(page.body)["tags"] == ["all"]
    assert page.headers.get("Link") == f'</v2/{REPO}/tags/list?n=1&last=all>; rel="next"'
    assert json.loads((await ask("tags/list?n=1&last=all")).body)["tags"] == ["v1"]
    referrers = json.loads((await ask(f"referrers/{image.digest}")).body)
    assert [entry["digest"] for entry in referrers["manifests"]] == [other.digest]

    reg.move_tag(REPO, "v1", other.digest)
    assert (await ask("manifests/v1")).body == other.data
    reg.remove(REPO, other.digest)
    assert error_code(await ask("manifests/v1")) == "MANIFEST_UNKNOWN"
    reg.remove(REPO, image.config_digest)
    assert error_code(await ask(f"blobs/{image.config_digest}")) == "BLOB_UNKNOWN"
    reg.remove(REPO)
    assert error_code(await ask("manifests/all")) == "NAME_UNKNOWN"


# --- lists ---


@pytest.fixture
def tagged(reg: ScriptedRegistry) -> ScriptedRegistry:
    """The registry with five tags."""
    image = reg.add_image(REPO, None, [b"layer"])
    for tag in ("c", "a", "B", "10", "9"):
        reg.move_tag(REPO, tag, image.digest)
    return reg


async def list_of(reg: ScriptedRegistry, target: str) -> tuple[list[Any], str | None]:
    """A page of tags or referrers, and the target of the link to the next."""
    answer = await fetch("127.0.0.1", reg.port, "GET", target)
    assert answer.status == 200, answer.body
    link = answer.headers.get("Link")
    assert link is None or (link.startswith("<") and link.endswith('>; rel="next"'))
    document = json.loads(answer.body)
    return document.get("tags", document.get("manifests")), link and link[1:].partition(">")[0]


@pytest.mark.parametrize(
    ("query", "page", "link"),
    [
        ("", ["10", "9", "B", "a", "c"], None),
        ("?n=5", ["10", "9", "B", "a", "c"], None),
        ("?n=0", [], None),
        ("?n=2", ["10", "9"], "?n=2&last=9"),
        ("?n=2&last=9", ["B", "a"], "?n=2&last=a"),
        ("?n=2&last=a", ["c"], None),
        ("?last=C", ["a", "c"], None),
        ("?last=c", [], None),
    ],
)
async def test_tags_are_listed_in_order_from_last_up_to_n(
    tagged: ScriptedRegistry, query: str, page: list[str], link: str | None
) -> None:
    path = f"/v2/{REPO}/tags/list"
    assert await list_of(tagged, path + query) == (page, link and path + link)


@pytest.mark.parametrize("n", ["-1", "x", "", "1.5", "%D9%A3"])
async def test_a_number_of_tags_that_is_none_is_refused(tagged: ScriptedRegistry, n: str) -> None:
    answer = await fetch("127.0.0.1", tagged.port, "GET", f"/v2/{REPO}/tags/list?n={n}")
    assert (answer.status, error_code(answer)) == (400, "PAGINATION_NUMBER_INVALID")


@pytest.mark.parametrize("cursor", [None, "token"])
@pytest.mark.parametrize("size", [1, 2, 5])
async def test_a_registry_may_page_by_itself_and_by_a_cursor(
    tagged: ScriptedRegistry, size: int, cursor: str | None
) -> None:
    tagged.lists.page_size, tagged.lists.cursor = size, cursor
    found, target = await list_of(tagged, f"/v2/{REPO}/tags/list?n=4")
    while target:
        assert f"{cursor or 'last'}=" in target
        page, target = await list_of(tagged, target)
        assert len(page) <= size
        found += page
    assert found == ["10", "9", "B", "a", "c"]
    if cursor:
        assert (await list_of(tagged, f"/v2/{REPO}/tags/list?last=c"))[0][:1] == ["10"], "last means nothing"


async def test_a_registry_may_page_as_it_pleases(tagged: ScriptedRegistry) -> None:
    path = f"/v2/{REPO}/tags/list?n=1&last=9"
    tagged.lists.takes_n = False
    assert (await list_of(tagged, path))[0] == ["B", "a", "c"]
    tagged.lists.page_size = 2
    assert await list_of(tagged, path) == (["B", "a"], f"/v2/{REPO}/tags/list?n=1&last=a")
    tagged.lists.page_size, tagged.lists.takes_last = None, False
    assert await list_of(tagged, path) == (["10", "9", "B", "a", "c"], None)
    tagged.lists.order = None
    assert await list_of(tagged, path) == (["c", "a", "B", "10", "9"], None)
    tagged.lists.order, tagged.lists.takes_n, tagged.lists.takes_last = str.lower, True, True
    assert await list_of(tagged, f"/v2/{REPO}/tags/list?n=1&last=a") == (["B"], f"/v2/{REPO}/tags/list?n=1&last=B")
    assert (await list_of(tagged, f"/v2/{REPO}/tags/list?n=1&last=B"))[0] == ["c"]


async def test_links_may_lead_anywhere(tagged: ScriptedRegistry) -> None:
    tagged.lists.link_to = lambda target: f"https://else.test{target}&x=1"
    assert (await list_of(tagged, f"/v2/{REPO}/tags/list?n=1"))[
        1
    ] == f"https://else.test/v2/{REPO}/tags/list?n=1&last=10&x=1"


async def test_referrers_say_what_they_are_and_are_filtered(reg: ScriptedRegistry) -> None:
    subject = reg.add_image(REPO, "1", [b"layer"])
    notes = {"who": "me"}
    a = reg.add_artifact(REPO, subject, "application/a", annotations=notes)
    b = reg.add_artifact(REPO, subject, config_type="application/b")
    path = f"/v2/{REPO}/referrers/{subject.digest}"
    first = a.descriptor(artifactType="application/a", annotations=notes)
    second = b.descriptor(artifactType="application/b")
    answer = await fetch("127.0.0.1", reg.port, "GET", path)
    assert answer.headers.get("Content-Type") == OCI_INDEX
    assert json.loads(answer.body) == {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [first, second]}
    for filters, found in ((True, [second]), (False, [first, second])):
        reg.lists.filters = filters
        answer = await fetch("127.0.0.1", reg.port, "GET", f"{path}?artifactType=application%2Fb")
        assert json.loads(answer.body)["manifests"] == found
        assert answer.headers.get("OCI-Filters-Applied") == ("artifactType" if filters else None)
    assert await list_of(reg, f"/v2/{REPO}/referrers/{digest_of(b'other')}") == ([], None)
    refused = await fetch("127.0.0.1", reg.port, "GET", f"/v2/{REPO}/referrers/sha256:short")
    assert (refused.status, error_code(refused)) == (400, "DIGEST_INVALID")


@pytest.mark.parametrize("cursor", [None, "next"])
async def test_referrers_may_be_paged(reg: ScriptedRegistry, cursor: str | None) -> None:
    subject = reg.add_image(REPO, "1", [b"layer"])
    made = [reg.add_artifact(REPO, subject, f"a/{n % 2}", data=bytes([n])).digest for n in range(7)]
    reg.lists.referrers_page_size, reg.lists.cursor = 2, cursor
    for query, expected in (("", made), ("?artifactType=a%2F0", made[::2])):
        found, target = await list_of(reg, f"/v2/{REPO}/referrers/{subject.digest}{query}")
        while target:
            page, target = await list_of(reg, target)
            assert len(page) <= 2
            found += page
        assert [entry["digest"] for entry in found] == expected


async def test_without_the_api_a_tag_holds_the_referrers(reg: ScriptedRegistry) -> None:
    reg.lists.referrers_api = False
    subject = reg.add_image(REPO, "1", [b"layer"])
    made = reg.add_artifact(REPO, subject, "application/a")
    answer = await fetch("127.0.0.1", reg.port, "GET", f"/v2/{REPO}/referrers/{subject.digest}")
    assert (answer.status, answer.body) == (404, b"404 page not found\n")
    path = f"/v2/{REPO}/manifests/{subject.digest.replace(':', '-')}"
    assert (await fetch("127.0.0.1", reg.port, "GET", path)).status == 404
    index = reg.push_referrers_tag(REPO, subject.digest)
    answer = await fetch("127.0.0.1", reg.port, "GET", path)
    assert (answer.body, answer.headers.get("Content-Type")) == (index.data, OCI_INDEX)
    assert json.loads(index.data)["manifests"] == [made.descriptor(artifactType="application/a")]
    assert len(referrers_tag(digest_of(b"", "sha512"))) == len("sha512-") + 64


async def test_knows_its_other_algorithms_and_limits(reg: ScriptedRegistry) -> None:
    digest = reg.add_blob(REPO, b"x", alg="sha512")
    assert (await fetch("127.0.0.1", reg.port, "GET", f"/v2/{REPO}/blobs/{digest}")).body == b"x"
    assert (await fetch("127.0.0.1", reg.port, "GET", "/v2/")).body == b"{}"
    assert error_code(await fetch("127.0.0.1", reg.port, "PUT", PATH, body=b"x")) == "UNSUPPORTED"


async def test_records_requests_exactly(reg: ScriptedRegistry) -> None:
    wire = await open_wire("127.0.0.1", reg.port)
    async with wire:
        await wire.send(b"POST /a%2Fb?x=1&x=%202 HTTP/1.1\r\nX-One: 1\r\nx-one:2\r\nContent-Length: 3\r\n\r\nabc")
        await finish(await read_head(wire, "POST"))
        chunks = b"1;ext=1\r\nx\r\n2\r\nyz\r\n0\r\nTrailer: t\r\n\r\n"
        await wire.send(b"PUT /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks)
        await finish(await read_head(wire, "PUT"))
    first, second = reg.requests
    assert (first.method, first.path, first.query, first.body) == ("POST", "/a%2Fb", "x=1&x=%202", b"abc")
    assert first.params == {"x": ["1", " 2"]}
    assert list(first.headers)[:2] == [("X-One", "1"), ("x-one", "2")]
    assert first.headers.getall("X-ONE") == ["1", "2"]
    assert second.body == b"xyz"
    assert reg.heard("Trailer: t")
    assert not reg.heard(b"canary")
    assert first.connection_id == second.connection_id == reg.connections == 1
    await reg.wait_for(lambda: reg.open_connections == 0)


async def test_drops_what_is_not_http(reg: ScriptedRegistry) -> None:
    assert await raw_exchange("127.0.0.1", reg.port, b"nonsense\r\n\r\n") == b""
    assert (reg.malformed, reg.requests) == (1, [])


async def test_stops_and_starts_on_the_same_port(reg: ScriptedRegistry, get: Get) -> None:
    port = reg.port
    stream = await open_stream("127.0.0.1", port, "GET", "/v2/")
    await reg.stop()
    async with stream:
        assert (await stream.read_all(), stream.clean_end) == (b"{}", True)
        assert not await stream.wire.more()
    with pytest.raises(ConnectionRefusedError):
        await get()
    await reg.start()
    assert reg.port == port
    assert (await get()).body == DATA


async def test_listens_on_ipv6() -> None:
    async with ScriptedRegistry("::1") as reg:
        assert reg.url == f"http://[::1]:{reg.port}"
        assert (await fetch("::1", reg.port, "GET", "/v2/")).status == 200
        assert reg.requests[0].headers.get("Host") == reg.host


# --- scripts ---


async def test_script_is_consumed_in_order_then_truth_returns(reg: ScriptedRegistry, get: Get) -> None:
    script = reg.script("GET", PATH, answers.status(500), lambda request: answers.status(503, request.path.encode()))
    reg.script("GET", lambda request: request.path.startswith("/v2/team/"), answers.status(502))
    assert (await get(method="HEAD")).status == 200
    assert [(await get()).status for _ in range(2)] == [500, 503]
    assert (script.used, script.exhausted) == (2, True)
    assert [(await get()).status for _ in range(2)] == [502, 200]


async def test_script_for_ever_repeats_its_last_step_until_cancelled(reg: ScriptedRegistry, get: Get) -> None:
    script = reg.script("*", PATH, answers.status(500), answers.status(503), forever=True)
    assert [(await get()).status for _ in range(4)] == [500, 503, 503, 503]
    script.cancel()
    assert (await get()).status == 200


async def test_failure_of_a_script_comes_out(get: Get) -> None:
    def broken(request: Request) -> Answer:
        raise LookupError(request.path)

    with pytest.RaisesGroup(LookupError):
        async with ScriptedRegistry() as reg:
            reg.script("*", "/v2/", broken)
            with pytest.raises(NoResponse):
                await fetch("127.0.0.1", reg.port, "GET", "/v2/")


# --- faults of the connection ---


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("after", [0, 1, 100_000, len(DATA) - 1])
@pytest.mark.parametrize("framing", [None, answers.chunked(), answers.close_delimited()])
async def test_cut_ends_after_exactly_so_many_bytes(
    get: Get, how: Any, after: int, framing: answers.Modifier | None
) -> None:
    steps = [step for step in (framing, answers.cut(after, how)) if step]
    response = await get(compose(*steps))
    assert response.body == DATA[:after]
    assert how in response.why
    close_delimited = not response.headers.has("Content-Length") and not response.headers.has("Transfer-Encoding")
    assert response.clean_end == (close_delimited and how == "fin")


async def test_reset_waits_for_a_slow_reader_to_have_everything(reg: ScriptedRegistry) -> None:
    data = bytes(3_000_000)
    digest = reg.add_blob(REPO, data)
    path = f"/v2/{REPO}/blobs/{digest}"
    reg.script("GET", path, answers.cut(len(data) - 1, "rst"))
    stream = await open_stream("127.0.0.1", reg.port, "GET", path, receive_buffer=4096)
    async with stream:
        response = await finish(stream)
    assert (len(response.body), response.why) == (len(data) - 1, "rst with 1 bytes missing")


async def test_reset_is_given_up_when_the_client_was_faster(reg: ScriptedRegistry) -> None:
    reg.script("GET", PATH, answers.cut(len(DATA) - 1, "rst"))
    stream = await open_stream("127.0.0.1", reg.port, "GET", PATH, receive_buffer=4096)
    await reg.wait_for(lambda: reg.bytes_sent(PATH) == len(DATA) - 1)
    assert reg.open_connections == 1
    await stream.abort()
    await reg.wait_for(lambda: reg.open_connections == 0)


async def test_cut_at_the_end_spares_a_length_but_not_the_final_chunk(get: Get) -> None:
    assert (await get(answers.cut(len(DATA)))).clean_end
    unfinished = await get(compose(answers.chunked(), answers.cut(len(DATA))))
    assert (unfinished.body, unfinished.clean_end) == (DATA, False)
    assert (await get(answers.cut(len(DATA) + 1))).clean_end


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_before_headers_there_is_nothing(get: Get, how: Any) -> None:
    with pytest.raises(NoResponse) as caught:
        await get(answers.before_headers(how))
    assert caught.value.partial == b""
    assert caught.value.why.startswith(how)


@pytest.mark.parametrize("after", [BEFORE_HEADERS, 0, 7])
async def test_stall_lasts_until_the_client_leaves(reg: ScriptedRegistry, after: int) -> None:
    reg.script("GET", PATH, answers.cut(after, "stall"))
    wire = await open_wire("127.0.0.1", reg.port)
    await wire.send(f"GET {PATH} HTTP/1.1\r\n\r\n".encode())
    await reg.wait_for(lambda: reg.seen() and reg.bytes_sent(PATH) == max(after, 0))
    assert reg.open_connections == 1
    await wire.close()
    await reg.wait_for(lambda: reg.open_connections == 0)


async def test_stall_ends_with_the_registry() -> None:
    async with ScriptedRegistry() as reg:
        reg.script("GET", "/v2/", answers.before_headers("stall"))
        wire = await open_wire("127.0.0.1", reg.port)
        await wire.send(b"GET /v2/ HTTP/1.1\r\n\r\n")
        await reg.wait_for(reg.seen)
    assert not await wire.more()
    await wire.close()


@pytest.mark.parametrize("framing", [answers.compose(), answers.chunked(1000)])
async def test_gate_holds_the_body_until_opened(reg: ScriptedRegistry, framing: Step) -> None:
    event = asyncio.Event()
    reg.script("GET", PATH, compose(framing, answers.gate(event, after=100)))
    async with await open_stream("127.0.0.1", reg.port, "GET", PATH) as stream:
        assert await stream.read_all(100) == DATA[:100]
        assert reg.bytes_sent(PATH) == 100
        event.set()
        assert await stream.read_all() == DATA[100:]
        assert stream.clean_end


async def test_gate_before_headers_holds_everything(reg: ScriptedRegistry, get: Get) -> None:
    event = asyncio.Event()
    waiting = asyncio.create_task(get(answers.gate(event)))
    await reg.wait_for(lambda: reg.count("GET", PATH) == 1)
    assert not waiting.done()
    event.set()
    assert (await waiting).body == DATA


async def test_gate_is_given_up_when_the_client_leaves(reg: ScriptedRegistry) -> None:
    reg.script("GET", PATH, answers.gate(asyncio.Event(), after=5))
    stream = await open_stream("127.0.0.1", reg.port, "GET", PATH)
    await stream.abort()
    await reg.wait_for(lambda: reg.open_connections == 0)


async def test_slow_takes_its_time(get: Get) -> None:
    begun = asyncio.get_running_loop().time()
    response = await get(compose(answers.swap_body(b"x" * 50), answers.slow(500)))
    assert asyncio.get_running_loop().time() - begun > 0.09
    assert response.body == b"x" * 50


@pytest.mark.parametrize("framing", ["chunked", "close", "length"])
async def test_endless_runs_until_the_client_leaves(reg: ScriptedRegistry, framing: Any) -> None:
    reg.script("GET", PATH, answers.endless("application/x-zeros", framing=framing))
    async with await open_stream("127.0.0.1", reg.port, "GET", PATH) as stream:
        assert stream.headers.get("Content-Type") == "application/x-zeros"
        assert await stream.read_all(5_000_000) == bytes(5_000_000)
    await reg.wait_for(lambda: reg.open_connections == 0)


async def test_raw_sends_exactly_that(reg: ScriptedRegistry) -> None:
    rubbish = b"HTTP/1.1 200 OK\nContent-Length: 5\r\n\x00"
    reg.script("GET", "/v2/", answers.raw(rubbish))
    assert await raw_exchange("127.0.0.1", reg.port, b"GET /v2/ HTTP/1.1\r\n\r\n") == rubbish
    reg.script("GET", "/v2/", answers.raw(b"HTTP/1.1 2", "rst"))
    with pytest.raises(NoResponse) as caught:
        await fetch("127.0.0.1", reg.port, "GET", "/v2/")
    assert (caught.value.partial, caught.value.why[:3]) == (b"HTTP/1.1 2", "rst")


# --- damage ---


@pytest.mark.parametrize(
    ("step", "body"),
    [
        (answers.flip_bit(0), b"\x01" + DATA[1:]),
        (answers.flip_bit(-1), DATA[:-1] + b"\xfe"),
        (answers.extra_bytes(b"more"), DATA + b"more"),
        (answers.drop_last(10), DATA[:-10]),
        (answers.drop_last(len(DATA) + 1), b""),
        (answers.swap_body(b"other"), b"other"),
    ],
)
async def test_damage_looks_like_a_complete_response(get: Get, step: Step, body: bytes) -> None:
    response = await get(step)
    assert (response.status, response.body, response.clean_end) == (200, body, True)
    assert response.headers.get("Docker-Content-Digest") == digest_of(DATA)


async def test_chunked_and_close_delimited_replace_the_length(get: Get) -> None:
    chunked = await get(answers.chunked(1000))
    assert chunked.headers.get("Transfer-Encoding") == "chunked"
    closing = await get(answers.close_delimited())
    for response in (chunked, closing):
        assert not response.headers.has("Content-Length")
        assert (response.body, response.clean_end) == (DATA, True)


async def test_claimed_length_is_a_lie(get: Get) -> None:
    more = await get(answers.claim_length(len(DATA) + 5))
    assert (more.body, more.clean_end, more.why) == (DATA, False, "fin with 5 bytes missing")
    less = await get(compose(answers.swap_body(b"abcdef"), answers.claim_length(4)))
    assert (less.body, less.clean_end, less.extra) == (b"abcd", True, b"ef")


async def test_lies_about_ranges(get: Get) -> None:
    ignored = await get(answers.ignore_range(), span="10-19")
    assert (ignored.status, ignored.body) == (200, DATA)
    shifted = await get(answers.wrong_range(5), span="10-19")
    assert (shifted.status, shifted.body) == (206, DATA[15:25])
    assert shifted.headers.get("Content-Range") == f"bytes 15-24/{len(DATA)}"
    open_ended = await get(answers.wrong_range(-5), span="10-")
    assert open_ended.body == DATA[5:]
    hidden = await get(answers.wrong_range(5, admitted=False), span="10-19")
    assert (hidden.status, hidden.body) == (206, DATA[15:25])
    assert hidden.headers.getall("Content-Range") == [f"bytes 10-19/{len(DATA)}"]
    total = await get(answers.changed_total(-1), span="10-19")
    assert total.headers.getall("Content-Range") == [f"bytes 10-19/{len(DATA) - 1}"]
    assert (await get(answers.changed_total(1))).body == (await get(answers.wrong_range(1))).body == DATA


async def test_headers_set_repeated_and_removed(get: Get) -> None:
    changed = await get(answers.with_headers({"content-type": "text/html", "X-New": "1"}))
    assert changed.headers.getall("Content-Type") == ["text/html"]
    assert changed.headers.get("x-new") == "1"
    doubled = await get(answers.with_headers([("ETag", "a"), ("ETag", "b"), ("Content-Length", "7")]))
    assert doubled.headers.getall("ETag") == ["a", "b"]
    assert doubled.headers.getall("Content-Length") == ["7", str(len(DATA))]
    assert (doubled.clean_end, doubled.why[:22]) == (False, "useless Content-Length")
    fewer = await get(answers.without_headers("docker-content-digest", "etag"))
    assert not fewer.headers.has("Docker-Content-Digest")
    assert not fewer.headers.has("ETag")


async def test_whole_answers(get: Get) -> None:
    plain = await get(answers.status(418, b"tea", "text/tea", {"X-Pot": "1"}))
    assert (plain.status, plain.body, plain.headers.get("X-Pot")) == (418, b"tea", "1")
    assert (await get(answers.status(599))).reason == "Unknown"
    moved = await get(answers.redirect("http://elsewhere.test/x", 302))
    assert (moved.status, moved.headers.get("Location")) == (302, "http://elsewhere.test/x")
    refused = await get(answers.unauthorized(["Basic realm=a", "Bearer realm=b"]))
    assert refused.headers.getall("WWW-Authenticate") == ["Basic realm=a", "Bearer realm=b"]
    assert (refused.status, error_code(refused)) == (401, "UNAUTHORIZED")
    limited = await get(answers.too_many_requests(30))
    assert (limited.status, limited.headers.get("Retry-After")) == (429, "30")
    assert error_code(limited) == "TOOMANYREQUESTS"
    abused = await get(answers.too_many_requests(plain=True))
    assert (abused.headers.get("Content-Type"), abused.headers.has("Retry-After")) == ("text/plain", False)
    assert json.loads((await get(answers.as_json({"a": 1}))).body) == {"a": 1}


async def test_modifiers_compose_in_any_order(get: Get) -> None:
    steps = [answers.chunked(64), answers.ignore_range(), answers.flip_bit(1), answers.cut(100, "rst")]
    for order in (steps, steps[::-1]):
        response = await get(compose(*order), span="5-")
        assert (response.status, response.body) == (200, b"\x00\x00" + DATA[2:100])
        assert (response.clean_end, response.headers.get("Transfer-Encoding")) == (False, "chunked")
    answered = await get(compose(answers.status(200, b"page"), answers.with_headers({"X": "y"})))
    assert (answered.body, answered.headers.get("X")) == (b"page", "y")


# --- access control ---


async def test_tokens_open_one_repository(reg: ScriptedRegistry) -> None:
    reg.add_blob("other/app", b"secret")
    reg.require_token(service="svc")

    async def ask(path: str, authorization: str | None = None) -> WireResponse:
        headers = [("Authorization", authorization)] if authorization else []
        return await fetch("127.0.0.1", reg.port, "GET", path, headers)

    challenge = (await ask(PATH)).headers.get("WWW-Authenticate")
    assert challenge == f'Bearer realm="{reg.url}/token",service="svc",scope="repository:{REPO}:pull"'
    answer = json.loads((await ask(f"/token?service=svc&scope=repository:{REPO}:pull,push")).body)
    bearer = f"Bearer {answer['token']}"
    assert (await ask(PATH, bearer)).status == (await ask("/v2/", bearer)).status == 200
    elsewhere = await ask(f"/v2/other/app/blobs/{digest_of(b'secret')}", bearer)
    assert elsewhere.status == 401
    assert 'error="insufficient_scope"' in (elsewhere.headers.get("WWW-Authenticate") or "")
    assert (await ask(PATH, "Bearer made-up")).status == 401
    assert reg.count("GET", "/token") == 1
    reg.tokens.revoke()
    assert (await ask(PATH, bearer)).status == 401
    reg.open_to_all()
    assert (await ask(PATH)).status == 200


async def test_token_server_with_a_password_elsewhere_and_by_script(reg: ScriptedRegistry) -> None:
    async with ScriptedRegistry() as auth:
        auth.tokens = TokenServer(("user", "pass"), expires_in=60)
        reg.require_token(f"{auth.url}/token", scope="aws", tokens=auth.tokens)

        async def token(authorization: str) -> WireResponse:
            headers = [("Authorization", authorization)]
            return await fetch("127.0.0.1", auth.port, "GET", "/token?scope=aws", headers)

        assert (await token(basic("user", "wrong"))).status == (await token("Basic ?")).status == 401
        granted = json.loads((await token(basic("user", "pass"))).body)
        assert granted["expires_in"] == 60
        assert granted["token"] in auth.tokens.issued
        mine = auth.tokens.issue(["aws"], "mine")
        auth.script("GET", "/token", answers.as_json({"access_token": mine}))
        assert json.loads((await token("")).body) == {"access_token": "mine"}
        for good in (granted["token"], mine):
            headers = [("Authorization", f"Bearer {good}")]
            assert (await fetch("127.0.0.1", reg.port, "GET", PATH, headers)).status == 200


async def test_basic_lets_in_one_user(reg: ScriptedRegistry) -> None:
    reg.require_basic("user", "pass")
    script = reg.script("GET", PATH, answers.status(500))
    for password, status in (("wrong", 401), ("pass", 500), ("pass", 200)):
        headers = [("Authorization", basic("user", password))]
        assert (await fetch("127.0.0.1", reg.port, "GET", PATH, headers)).status == status
    assert script.used == 1


# --- the sink ---


@pytest.mark.parametrize("host", ["127.0.0.2", "::1"])
async def test_sink_remembers_every_contact(host: str) -> None:
    async with Sink(host) as sink:
        assert sink.silent
        wire = await open_wire(host, sink.port)
        assert not sink.silent
        await wire.send(b"GET / HTTP/1.1\r\n\r\n")
        await sink.wait_for(lambda: sink.contacts[0].data.endswith(b"\r\n\r\n"))
        await wire.close()
        await sink.wait_for(lambda: sink.contacts[0].closed)
    assert [bytes(contact.data) for contact in sink.contacts] == [b"GET / HTTP/1.1\r\n\r\n"]


# --- the client ---


async def test_client_reads_slowly_and_hangs_up(reg: ScriptedRegistry) -> None:
    reg.script("GET", PATH, answers.endless(), forever=True)
    stream = await open_stream("127.0.0.1", reg.port, "GET", PATH, receive_buffer=4096)
    assert await stream.read(10) == bytes(10)
    assert (stream.clean_end, stream.why) == (False, "")
    await stream.close()
    stream = await open_stream("127.0.0.1", reg.port, "GET", PATH)
    await stream.abort()
    await reg.wait_for(lambda: reg.open_connections == 0)


async def test_client_stops_at_its_limit(reg: ScriptedRegistry) -> None:
    response = await fetch("127.0.0.1", reg.port, "GET", PATH, read_limit=100)
    assert (response.body, response.clean_end, response.why) == (DATA[:100], False, "read limit reached")


async def test_client_gives_up_in_time(reg: ScriptedRegistry) -> None:
    reg.script("GET", PATH, answers.before_headers("stall"))
    with pytest.raises(TimeoutError):
        await fetch("127.0.0.1", reg.port, "GET", PATH, within=0.05)
    reg.script("GET", PATH, answers.cut(3, "stall"))
    async with await open_stream("127.0.0.1", reg.port, "GET", PATH, within=0.05) as stream:
        assert await stream.read(10) == DATA[:3]
        with pytest.raises(TimeoutError):
            await stream.read(10)


@pytest.mark.parametrize(
    ("wire", "body", "why"),
    [
        (b"5\r\nhello\r\n0\r\n\r\n", b"hello", "final chunk seen"),
        (b"5;x=y\r\nhello\r\n0\r\nTrailer: 1\r\n\r\n", b"hello", "final chunk seen"),
        (b"5\r\nhello\r\n0\r\n", b"hello", "fin before the final chunk"),
        (b"5\r\nhel", b"hel", "fin before the final chunk"),
        (b"5\r\nhelloX\r\n0\r\n\r\n", b"hello", "malformed chunk"),
        (b"zz\r\nhello\r\n", b"", "malformed chunk"),
        (b"-1\r\nhello\r\n", b"", "malformed chunk"),
    ],
)
async def test_client_judges_chunks(reg: ScriptedRegistry, wire: bytes, body: bytes, why: str) -> None:
    head = b"HTTP/1.1 103 Hints\r\n\r\nHTTP/1.1 200\r\nTransfer-Encoding: chunked\r\n\r\n"
    reg.script("GET", "/v2/", answers.raw(head + wire, "fin" if why.startswith("fin") else "stall"))
    response = await fetch("127.0.0.1", reg.port, "GET", "/v2/")
    assert (response.body, response.why, response.clean_end) == (body, why, why == "final chunk seen")


async def test_raw_exchange_sees_pipelined_answers(reg: ScriptedRegistry) -> None:
    twice = b"GET /v2/ HTTP/1.1\r\n\r\n" + b"GET /v2/ HTTP/1.0\r\n\r\n"
    assert (await raw_exchange("127.0.0.1", reg.port, twice)).count(b"HTTP/1.1 200 OK\r\n") == 2
    assert reg.connections == 1
    once = await raw_exchange("127.0.0.1", reg.port, b"GET /v2/ HTTP/1.1\r\n\r\n", until=b"{}")
    assert once.endswith(b"{}")


# --- TLS ---


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """One authority for all tests."""
    return Authority(tmp_path_factory.mktemp("ca"))


async def test_good_certificate_is_accepted(ca: Authority) -> None:
    async with ScriptedRegistry(ssl=ca.good(), name="localhost") as reg:
        assert reg.url == f"https://localhost:{reg.port}"
        digest = reg.add_blob(REPO, DATA)
        path = f"/v2/{REPO}/blobs/{digest}"
        ok = await fetch("127.0.0.1", reg.port, "GET", path, ssl=ca.client_context())
        assert (ok.body, ok.clean_end) == (DATA, True)
        for how in ("fin", "rst"):
            reg.script("GET", path, answers.cut(1000, how))
            short = await fetch("127.0.0.1", reg.port, "GET", path, ssl=ca.client_context())
            assert (short.body, short.clean_end) == (DATA[:1000], False)


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("expired", "certificate has expired"),
        ("wrong_name", "not valid for"),
        ("self_signed", "self-signed certificate"),
        ("foreign", "unable to get local issuer|self-signed certificate in certificate chain"),
        ("outdated", None),
    ],
)
async def test_bad_servers_are_refused_before_any_request(ca: Authority, kind: str, complaint: str | None) -> None:
    context: ssl.SSLContext = getattr(ca, kind)()
    async with ScriptedRegistry(ssl=context) as reg:
        with pytest.raises(ssl.SSLError if complaint else ConnectionResetError, match=complaint):
            await fetch("127.0.0.1", reg.port, "GET", "/v2/", ssl=ca.client_context())
        await reg.wait_for(lambda: reg.open_connections == 0)
        assert (reg.connections, reg.requests) == (1, [])


async def test_flaws_are_only_what_they_claim_to_be(ca: Authority) -> None:
    lenient = ca.client_context()
    lenient.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        lenient.minimum_version = ssl.TLSVersion.TLSv1
    async with ScriptedRegistry(ssl=ca.outdated()) as reg:
        assert (await fetch("127.0.0.1", reg.port, "GET", "/v2/", ssl=lenient)).status == 200
    credulous = ca.client_context()
    async with ScriptedRegistry(ssl=ca.self_signed()) as reg:
        credulous.load_verify_locations(str(ca.directory / "self-signed.pem"))
        assert (await fetch("127.0.0.1", reg.port, "GET", "/v2/", ssl=credulous)).status == 200


async def test_pair_of_files_is_good(ca: Authority) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*ca.pair("127.0.0.1", stem="mine"))
    async with ScriptedRegistry(ssl=context) as reg:
        assert (await fetch("127.0.0.1", reg.port, "GET", "/v2/", ssl=ca.client_context())).status == 200


@pytest.mark.parametrize("how", ["fin", "rst", "stall"])
async def test_handshake_breaks_off_half_way(ca: Authority, how: Any) -> None:
    async with HalfHandshake(ca.good(), how) as server:
        with pytest.raises(TimeoutError if how == "stall" else OSError):
            await fetch("127.0.0.1", server.port, "GET", "/", ssl=ca.client_context(), within=0.5)
        assert server.attempts == 1


# --- DNS ---


async def resolve(server: ScriptedDNS, name: str, kind: int = 1) -> tuple[int, list[bytes]]:
    """Ask one question; the code of the reply and its addresses."""
    loop = asyncio.get_running_loop()
    reply: asyncio.Future[bytes] = loop.create_future()

    class Asker(asyncio.DatagramProtocol):
        def datagram_received(self, data: bytes, addr: object) -> None:
            reply.set_result(data)

    transport, _ = await loop.create_datagram_endpoint(Asker, remote_addr=(server.address, server.port))
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    question = labels + b"\0" + kind.to_bytes(2, "big") + b"\0\1"
    transport.sendto(b"\xab\xcd\1\0\0\1\0\0\0\0\0\0" + question)
    try:
        async with asyncio.timeout(5):
            data = await reply
    finally:
        transport.close()
    assert data[:2] == b"\xab\xcd"
    assert data[12:].startswith(question)
    rest, addresses = data[12 + len(question) :], []
    for _ in range(int.from_bytes(data[6:8], "big")):
        size = int.from_bytes(rest[10:12], "big")
        assert rest[6:10] == bytes(4)
        addresses.append(rest[12 : 12 + size])
        rest = rest[12 + size :]
    assert not rest
    return data[3] & 15, addresses


async def test_dns_follows_its_script() -> None:
    async with ScriptedDNS() as dns:
        dns.script("A.test.", ["192.0.2.1", "192.0.2.2", "2001:db8::1"], "SERVFAIL", "NXDOMAIN", ["127.0.0.1"])
        assert await resolve(dns, "a.TEST") == (0, [b"\xc0\0\2\1", b"\xc0\0\2\2"])
        assert await resolve(dns, "a.test", 28) == (0, [b" \1\r\xb8" + bytes(11) + b"\1"])
        assert await resolve(dns, "a.test", 65) == (0, [])
        codes = [await resolve(dns, "a.test") for _ in range(4)]
        assert codes == [(2, []), (3, []), (0, [b"\x7f\0\0\1"]), (0, [b"\x7f\0\0\1"])]
        assert await resolve(dns, "b.test") == (3, [])
        dns.script("c.test", "TIMEOUT")
        asking = asyncio.create_task(resolve(dns, "c.test"))
        await dns.wait_for(lambda: dns.seen("c.test", "A"))
        asking.cancel()
        assert dns.queries[2] == Query("a.test", "TYPE65")


def can_replace_resolver() -> bool:
    """Whether this machine lets us bind port 53 and make mount namespaces."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_replace_resolver(), reason="needs root and mount namespaces")
async def test_process_can_be_made_to_ask_it(tmp_path: Path) -> None:
    code = "import socket; print(*sorted({a[4][0] for a in socket.getaddrinfo('reg.fake.test', 443)}))"
    async with ScriptedDNS("127.0.0.54", 53) as dns:
        dns.script("reg.fake.test", ["192.0.2.7", "2001:db8::7"])
        argv = with_resolver([sys.executable, "-c", code], write_resolv_conf(tmp_path / "resolv.conf", dns.address))
        process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.PIPE)
        output, _ = await asyncio.wait_for(process.communicate(), 30)
        assert (process.returncode, output.split()) == (0, [b"192.0.2.7", b"2001:db8::7"])
        assert {query.type for query in dns.seen("reg.fake.test")} == {"A", "AAAA"}
