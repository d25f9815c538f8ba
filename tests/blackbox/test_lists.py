"""Lists of tags: every page is had through the cache, under the name that the client uses, whatever upstream links say."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.blackbox.addressing import DEFAULT, NS, PREFIX, Client, Style, next_of, tags_of
from tests.blackbox.oracle import error_of, forget_peak, peak_memory
from tests.blackbox.test_credentials_stay import CANARY, SECRETS
from tests.blackbox.test_upstream_errors import FAILING, REFUSING
from tests.conftest import UPSTREAM, RunningCache, StartCache, upstream
from tests.fakes import answers
from tests.fakes.answers import as_json, chunked, compose, status, with_headers
from tests.fakes.messages import BEFORE_HEADERS, Answer, Headers
from tests.fakes.recorder import Sink
from tests.fakes.registry import ScriptedRegistry

REPO = "team/app"
LIST = f"/v2/{REPO}/tags/list"
TAGS = sorted(["1", "1.0", "1.0.1", "2", "Latest", "_", "alpine", "latest", "v1-rc.1", "x" * 128, "zz"])
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
HUB, PORTED = "docker.io", "registry.test:5000"


@pytest.fixture
def tagged(registry: ScriptedRegistry) -> ScriptedRegistry:
    """The upstream, with ``TAGS``."""
    tag(registry, REPO)
    return registry


def tag(registry: ScriptedRegistry, repo: str, tags: list[str] = TAGS) -> None:
    """Give a repository its tags."""
    image = registry.add_image(repo, None, [b"layer"])
    for name in tags:
        registry.move_tag(repo, name, image.digest)


def default_client(cache: RunningCache) -> Client:
    """A client that names ``team/app`` without a registry."""
    return Client(cache, DEFAULT, REPO)


# --- paging, in every way of addressing ---

WAYS = {
    "default": (UPSTREAM, DEFAULT, REPO, REPO),
    "prefix": (UPSTREAM, PREFIX, REPO, REPO),
    "ns": (UPSTREAM, NS, REPO, REPO),
    "prefix of a port": (PORTED, Style(prefix="registry.test_5000"), "a/b/c/d", "a/b/c/d"),
    "ns with a port": (PORTED, Style(ns=PORTED), "a/b/c/d", "a/b/c/d"),
    "prefix of one's own": (UPSTREAM, Style(prefix="mine"), REPO, REPO),
    "library, by default": (HUB, DEFAULT, "app", "library/app"),
    "library, by prefix": (HUB, Style(prefix=HUB), "app", "library/app"),
    "library, by ns": (HUB, Style(ns=HUB), "app", "library/app"),
    "library, by an alias": (HUB, Style(ns="index.docker.io"), "app", "library/app"),
    "library, in full": (HUB, Style(ns=HUB), "library/app", "library/app"),
    "prefix and ns": (UPSTREAM, Style(prefix=UPSTREAM, ns=UPSTREAM), REPO, REPO),
    "a path like a registry's": (UPSTREAM, NS, "other.test/app", "other.test/app"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("paging", ["client", "registry", "cursor"])
async def test_every_page_is_had_through_the_cache_under_the_name_that_the_client_asked_for(
    registry: ScriptedRegistry, start_cache: StartCache, way: str, paging: str
) -> None:
    """From link to link: no tag is missing or comes twice, and each link keeps the client's prefix and ``ns``."""
    name, style, repo, there = WAYS[way]
    own = {"pathPrefix": "mine"} if style.prefix == "mine" else {}
    client = Client(await start_cache(upstream(registry, name, **own)), style, repo)
    tag(registry, there)
    query = {"n": "3"} if paging == "client" else {}
    registry.lists.page_size = None if paging == "client" else 3
    registry.lists.cursor = "next_page" if paging == "cursor" else None
    pages = await client.pages("tags/list", **query)
    assert [tag for page in pages for tag in tags_of(page)] == TAGS
    assert len(pages) == 4
    for page in pages:
        assert json.loads(page.body)["name"] == client.name
    for page in pages[:-1]:
        link = urlsplit(next_of(page) or "")
        assert link.path == f"/v2/{client.name}/tags/list"
        assert parse_qs(link.query).get("ns") == ([style.ns] if style.ns else None)
    assert [request.path for request in registry.requests] == [f"/v2/{there}/tags/list"] * 4
    assert not any("ns" in request.params for request in registry.requests)


KINDS: dict[str, dict[str, Any]] = {
    "takes both": {},
    "takes both, without regard to case": {"order": lambda tag: f"{tag.lower()} {tag}"},
    "takes both, and capitals come last without regard to case": {"order": lambda tag: f"{tag.lower()} {tag.swapcase()}"},
    "pages by three": {"takes_n": False, "page_size": 3},
    "pages by five": {"takes_n": False, "page_size": 5},
    "does not page": {"takes_n": False, "takes_last": False},
    "neither pages nor sorts": {"takes_n": False, "takes_last": False, "order": None},
    "only goes on": {"takes_n": False},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 4])
async def test_n_and_last_hold_whatever_the_upstream_makes_of_them(
    cache: RunningCache, registry: ScriptedRegistry, kind: str, n: int
) -> None:
    """A registry that sends more than was asked for, or the same each time, is paged here, in the order of the spec."""
    tag(registry, REPO, TAGS[::2] + TAGS[1::2])
    for name, value in KINDS[kind].items():
        setattr(registry.lists, name, value)
    pages = [tags_of(page) for page in await default_client(cache).pages("tags/list", n=str(n))]
    every = sorted(TAGS, key=KINDS[kind].get("order") or str)
    assert [tag for page in pages for tag in page] == every
    assert max(len(page) for page in pages) <= n
    rest = await default_client(cache).pages("tags/list", last="alpine")
    assert [tag for page in rest for tag in tags_of(page)] == every[every.index("alpine") + 1 :]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_whole_list_is_in_order(cache: RunningCache, registry: ScriptedRegistry, kind: str) -> None:
    """Lexical order, of bytes or without regard to case (OCI distribution spec, "Listing Tags")."""
    tag(registry, REPO, TAGS[::2] + TAGS[1::2])
    for name, value in KINDS[kind].items():
        setattr(registry.lists, name, value)
    pages = [tags_of(page) for page in await default_client(cache).pages("tags/list")]
    assert [tag for page in pages for tag in page] == sorted(TAGS, key=KINDS[kind].get("order") or str)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_tag_that_goes_between_two_pages_takes_no_other_with_it(
    cache: RunningCache, registry: ScriptedRegistry, kind: str
) -> None:
    tag(registry, REPO, TAGS[::2] + TAGS[1::2])
    for name, value in KINDS[kind].items():
        setattr(registry.lists, name, value)
    first = await default_client(cache).get("tags/list", n="2")
    registry.remove(REPO, tags_of(first)[-1])
    found, target = tags_of(first), next_of(first)
    while target is not None:
        assert len(found) < 50, "this list has no end"
        page = await cache.get(target)
        found, target = found + tags_of(page), next_of(page)
    assert sorted(found) == TAGS


async def test_n_and_last_reach_the_upstream_as_they_are(cache: RunningCache, tagged: ScriptedRegistry) -> None:
    assert tags_of(await default_client(cache).get("tags/list", n="2", last="1.0.1")) == ["2", "Latest"]
    [request] = tagged.requests
    assert request.params == {"n": ["2"], "last": ["1.0.1"]}


async def test_the_link_says_where_the_next_page_begins(cache: RunningCache, tagged: ScriptedRegistry) -> None:
    answer = await Client(cache, Style(ns=UPSTREAM), REPO).get("tags/list", n="2")
    link = urlsplit(next_of(answer) or "")
    assert parse_qs(link.query) == {"n": ["2"], "last": ["1.0"], "ns": [UPSTREAM]}
    last = await default_client(cache).get("tags/list", n="100")
    assert (tags_of(last), next_of(last)) == (TAGS, None)


async def test_the_headers_of_a_list(cache: RunningCache, tagged: ScriptedRegistry) -> None:
    client = default_client(cache)
    queries: tuple[dict[str, str], ...] = ({}, {"n": "2"})
    for query in queries:
        answer, head = await client.get("tags/list", **query), await client.ask("HEAD", "tags/list", query=query)
        assert answer.headers.getall("Content-Type") == ["application/json"]
        assert answer.headers.getall("Cache-Control") == ["no-cache"]
        assert answer.headers.getall("Content-Length") == [str(len(answer.body))]
        assert answer.headers.get("Docker-Distribution-Api-Version") == "registry/2.0"
        assert not answer.headers.has("Warning")
        assert set(json.loads(answer.body)) == {"name", "tags"}
        assert (head.status, head.body) == (200, b"")
        for name in ("Content-Type", "Content-Length", "Cache-Control", "Link"):
            assert head.headers.getall(name) == answer.headers.getall(name)


async def test_a_list_of_none_has_no_link_and_costs_at_most_one_question(
    cache: RunningCache, tagged: ScriptedRegistry
) -> None:
    answer = await default_client(cache).get("tags/list", n="0")
    assert (tags_of(answer), next_of(answer)) == ([], None)
    assert len(tagged.requests) <= 1


@pytest.mark.parametrize("n", ["-1", "x", "", "1.5", "1e3", "0x10", " 1", "1 ", "+1", "\u0663", "1,2", "NaN", "\x00"])
async def test_a_number_that_is_none_is_400_without_any_contact(
    cache: RunningCache, tagged: ScriptedRegistry, n: str
) -> None:
    answer = await default_client(cache).get("tags/list", n=n)
    assert error_of(answer)[:2] == (400, "PAGINATION_NUMBER_INVALID")
    assert tagged.connections == 0


@pytest.mark.parametrize("n", ["9" * 19, "9" * 5000])
async def test_a_number_beyond_all_measure_does_no_harm(cache: RunningCache, tagged: ScriptedRegistry, n: str) -> None:
    answer = await default_client(cache).get("tags/list", n=n)
    assert (answer.status == 200 and tags_of(answer) == TAGS) or error_of(answer)[:2] == (400, "PAGINATION_NUMBER_INVALID")


@pytest.mark.parametrize(
    "last",
    [
        "a&n=1",
        "a#b",
        "a b",
        "../../_catalog",
        "a\r\nX: y",
        "\x00",
        "%2e%2e",
        "a?b",
        "\u00e9",
        "y" * 129,
        "y" * 7000,
        "",
        "-",
    ],
)
async def test_what_follows_last_stays_in_it(cache: RunningCache, tagged: ScriptedRegistry, last: str) -> None:
    """Whatever a client writes there, no other parameter, path or header comes of it upstream."""
    answer = await default_client(cache).get("tags/list", last=last)
    assert answer.status in (200, 400)
    for request in tagged.requests:
        assert request.path == LIST
        assert set(request.params) <= {"n", "last"}
        assert request.params.get("last", [last]) == [last]
        assert not request.headers.has("X")


@pytest.mark.parametrize(
    ("target", "status_", "code"),
    [
        ("/v2/no/such/tags/list", 404, "NAME_UNKNOWN"),
        ("/v2/Upper/tags/list?ns=registry.test", 400, "NAME_INVALID"),
        ("/v2/team/app/tags/list?ns=quay.test", 404, "NAME_UNKNOWN"),
        ("/v2/quay.test/team/app/tags/list", 404, "NAME_UNKNOWN"),
        ("/v2/registry.test/tags/list", 400, "NAME_INVALID"),
        ("/v2/tags/list", 404, "NAME_UNKNOWN"),
        ("/v2/team/app/tags", 404, "NAME_UNKNOWN"),
        ("/v2/team/app/tags/list/", 404, "NAME_UNKNOWN"),
        ("/v2/team/app/tags/1", 404, "NAME_UNKNOWN"),
        ("/v2/team%2Fapp/tags/list", 404, "NAME_UNKNOWN"),
        ("/v2/_catalog", 404, "NAME_UNKNOWN"),
    ],
)
async def test_what_has_no_list_is_refused(
    cache: RunningCache, tagged: ScriptedRegistry, target: str, status_: int, code: str
) -> None:
    for query in ("", "n=1"):
        answer = await cache.get(f"{target}{'&' if '?' in target else '?'}{query}".rstrip("?&"))
        assert error_of(answer)[:2] == (status_, code)
    assert tagged.connections == 0 or "no/such" in target


# --- links of the upstream ---


@pytest.fixture
async def sink() -> AsyncIterator[Sink]:
    """Where nobody may call."""
    async with Sink() as recorder:
        yield recorder


LINKS: dict[str, Callable[[str], str]] = {
    "absolute": lambda target: f"https://registry.test{target}",
    "another host": lambda target: f"http://{{sink}}{target}",
    "another host without scheme": lambda target: f"//{{sink}}{target}",
    "with a password": lambda target: f"https://user:{CANARY}@registry.test{target}",
    "another repository": lambda target: target.replace(REPO, "other/secret"),
    "another path": lambda target: "/elsewhere?" + target.partition("?")[2],
    "only a query": lambda target: "?" + target.partition("?")[2],
    "relative to the list": lambda target: "list?" + target.partition("?")[2],
    "more parameters": lambda target: f"{target}&orderby=name&x=%26%3D%00%0d%0a",
    "an ns of its own": lambda target: f"{target}&ns=evil.test",
    "a fragment": lambda target: f"{target}#x",
}


@pytest.mark.parametrize("style", [DEFAULT, PREFIX, NS], ids=["default", "prefix", "ns"])
@pytest.mark.parametrize("cursor", [None, "nextToken"], ids=["last", "cursor"])
@pytest.mark.parametrize("form", LINKS)
async def test_wherever_a_link_leads_the_next_page_is_had_through_the_cache(
    cache: RunningCache, tagged: ScriptedRegistry, sink: Sink, style: Style, cursor: str | None, form: str
) -> None:
    """Only what says where to go on is taken from a link: never its host, nor its path; and nobody else is asked."""
    tagged.lists.cursor = cursor
    tagged.lists.link_to = lambda target: LINKS[form](target).replace("{sink}", sink.host)
    client = Client(cache, style, REPO)
    pages = await client.pages("tags/list", n="4")
    assert [tag for page in pages for tag in tags_of(page)] == TAGS
    for page in pages:
        link = next_of(page)
        assert link is None or urlsplit(link).path == f"/v2/{client.name}/tags/list"
        assert link is None or parse_qs(urlsplit(link).query).get("ns") == ([style.ns] if style.ns else None)
        assert CANARY not in repr(page)
    assert sink.silent
    assert {request.path for request in tagged.requests} == {LIST}
    assert not tagged.heard(CANARY)


@pytest.mark.parametrize(
    "line",
    [
        '<{next}>; rel="next"',
        "<{next}>; rel=next",
        '<{next}>;rel="next"',
        '<{next}> ; rel="next" ; title="a, b; c"',
        '</first>; rel="first", <{next}>; rel="next"',
        '<{next}>; rel="next", </last>; rel="last"',
        '<{next}>; title="x"; rel="next"',
        '<{next}>; REL="NEXT"',
    ],
)
async def test_a_link_may_be_written_in_any_way_that_rfc_8288_allows(
    cache: RunningCache, tagged: ScriptedRegistry, line: str
) -> None:
    there = line.replace("{next}", f"{LIST}?n=20&last=1")
    tagged.script("GET", LIST, compose(as_json({"name": REPO, "tags": ["1"]}), with_headers({"Link": there})))
    first, rest = await default_client(cache).pages("tags/list", n="20")
    assert tags_of(first) + tags_of(rest) == TAGS


@pytest.mark.parametrize(
    "line",
    ["", "<", "<>", "next", "</v2/x", f"{LIST}?n=1&last=1", '<>; rel="next"', '</v2/>; rel="prev"', "<" * 9000, "\xff\xfe"],
)
async def test_a_link_that_is_none_costs_no_more_than_the_pages_behind_it(
    cache: RunningCache, tagged: ScriptedRegistry, line: str
) -> None:
    page = answers.modifier(lambda answer: Answer(200, answer.headers.plus([("Link", line)]), answer.body))
    tagged.script("GET", LIST, compose(as_json({"name": REPO, "tags": ["1"]}), page), forever=True)
    answer = await default_client(cache).get("tags/list", n="1")
    assert tags_of(answer) == ["1"]
    link = next_of(answer)
    assert link is None or urlsplit(link).path == LIST


async def test_a_link_in_circles_costs_one_question_a_page(cache: RunningCache, tagged: ScriptedRegistry) -> None:
    """What an endless list costs is for the client to say, who asks for each page; the cache asks for none by itself."""
    circle = with_headers({"Link": f'<{LIST}?n=1&last=1>; rel="next"'})
    tagged.script("GET", LIST, compose(as_json({"name": REPO, "tags": ["1"]}), circle), forever=True)
    target: str | None = f"{LIST}?n=1"
    for asked in range(1, 6):
        if target is None:
            break
        answer = await cache.get(target)
        assert tags_of(answer) in (["1"], [])
        assert len(tagged.requests) <= asked
        target = next_of(answer)


async def test_no_secret_comes_out_in_a_link_or_goes_in_by_a_client(cache: RunningCache, tagged: ScriptedRegistry) -> None:
    tagged.require_token()
    answer = await default_client(cache).ask("GET", "tags/list", SECRETS, {"n": "1"})
    assert tags_of(answer) == TAGS[:1]
    assert tagged.tokens.issued
    for token in tagged.tokens.issued:
        assert token not in repr(answer)
    assert not tagged.heard(CANARY)
    [scope] = {scope for request in tagged.seen(path="/token") for scope in request.params["scope"]}
    assert scope == f"repository:{REPO}:pull"


# --- upstreams that are hostile or broken ---


def told(body: bytes, content_type: str = "application/json") -> Answer:
    """A list with any body."""
    return status(200, body, content_type)


def deep(depth: int) -> bytes:
    """JSON that nests."""
    return b'{"name": "x", "tags": ' + b"[" * depth + b"]" * depth + b"}"


NO_LIST: dict[str, Answer] = {
    "no JSON": told(b'{"name": "team/app", "tags": ["1"'),
    "a page": told(b"<html>sign in</html>", "text/html"),
    "nothing": told(b""),
    "no content": status(204),
    "null": told(b"null"),
    "an array": told(b'["1"]'),
    "a string": told(b'"1"'),
    "a number": told(b"1"),
    "no tags": told(b'{"name": "team/app"}'),
    "tags as a string": told(b'{"name": "team/app", "tags": "1"}'),
    "tags as an object": told(b'{"name": "team/app", "tags": {"1": "2"}}'),
    "tags as a number": told(b'{"name": "team/app", "tags": 1}'),
    "numbers as tags": told(b'{"name": "team/app", "tags": [1, 2]}'),
    "objects as tags": told(b'{"name": "team/app", "tags": [{"name": "1"}]}'),
    "lists as tags": told(b'{"name": "team/app", "tags": [["1"]]}'),
    "no UTF-8": told(b'{"name": "team/app", "tags": ["\xff\xfe"]}'),
    "deep": told(deep(100_000)),
    "lists without end": told(b'{"name": "x", "tags": [' + b"[]," * 2_000_000 + b"[]]}"),
    "a huge number": told(b'{"name": "team/app", "tags": ' + b"9" * 10_000 + b"}"),
    "compressed": status(200, b"\x1f\x8b\x08\x00", "application/json", {"Content-Encoding": "gzip"}),
    "an error with 200": as_json({"errors": [{"code": "UNKNOWN", "message": "x"}]}),
}


@pytest.mark.parametrize("kind", NO_LIST)
async def test_what_is_no_list_is_502_and_not_remembered(cache: RunningCache, tagged: ScriptedRegistry, kind: str) -> None:
    tagged.script("GET", LIST, NO_LIST[kind])
    before = forget_peak()
    got = error_of(await default_client(cache).get("tags/list"))
    assert peak_memory() - before < 100_000_000, "a few MB of JSON must not become hundreds in memory"
    assert got[:2] == (502, "UNKNOWN")
    assert UPSTREAM in got[2]
    assert tags_of(await default_client(cache).get("tags/list")) == TAGS


async def test_a_repository_without_tags_has_an_empty_list(cache: RunningCache, registry: ScriptedRegistry) -> None:
    """Some registries say null for it."""
    registry.script("GET", LIST, as_json({"name": REPO, "tags": None}), as_json({"name": REPO, "tags": []}))
    for _ in range(2):
        assert tags_of(await default_client(cache).get("tags/list")) == []


ILLEGAL = [
    *(
        "",
        " ",
        "-x",
        ".x",
        "a/b",
        "a:b",
        "../../x",
        "a\r\nX-Evil: 1",
        "a\x00b",
        "a>; rel=next",
        "\u00e9",
        "\ud800",
        "<script>",
    ),
    *("x" * 129, "y" * 100_000, "a&n=1", "a?b", "a#b", "a%2Fb", "sha256:" + "0" * 64),
]


@pytest.mark.parametrize("page", [None, "last"], ids=["whole", "paged"])
@pytest.mark.parametrize("bad", ILLEGAL, ids=lambda bad: repr(bad[:12]))
async def test_only_legal_tags_are_passed_on(
    cache: RunningCache, registry: ScriptedRegistry, bad: str, page: str | None
) -> None:
    """A tag that breaks the grammar is left out, or the list is refused; it never becomes part of a header or a request."""
    link = {"Link": f'<{LIST}?n=3&last=2>; rel="next"'} if page else {}
    listed = as_json({"name": REPO, "tags": ["1", "2", bad]}, headers=list(link.items()))
    registry.script("GET", LIST, listed, forever=True)
    answer = await default_client(cache).get("tags/list", n="3")
    assert not answer.headers.has("X-Evil")
    if answer.status != 200:
        assert error_of(answer)[:2] == (502, "UNKNOWN")
        return
    assert tags_of(answer) == ["1", "2"]
    if (target := next_of(answer)) is not None:
        await cache.get(target)
        assert set(registry.requests[-1].params) <= {"n", "last"}
        assert registry.requests[-1].path == LIST


async def test_a_list_under_another_name_is_told_under_the_one_that_was_asked(
    cache: RunningCache, registry: ScriptedRegistry
) -> None:
    """The name in an upstream's list is its own affair; on Docker Hub it is with ``library/``."""
    for name in ("other/secret", None, 5, "<script>"):
        registry.script("GET", LIST, as_json({"name": name, "tags": ["1"], "secret": CANARY}))
        answer = await Client(cache, NS, REPO).get("tags/list")
        assert json.loads(answer.body) == {"name": REPO, "tags": ["1"]}


async def test_no_tag_comes_twice(cache: RunningCache, registry: ScriptedRegistry) -> None:
    registry.script("GET", LIST, as_json({"name": REPO, "tags": ["2", "1", "2", "2", "1", "3"]}))
    tags = tags_of(await default_client(cache).get("tags/list"))
    assert sorted(tags) == ["1", "2", "3"]


async def test_a_long_list_is_whole_or_refused_in_little_memory(cache: RunningCache, registry: ScriptedRegistry) -> None:
    """10 MB of tags at once, where ``n`` was not asked for."""
    tags = [f"{number:0100}" for number in range(100_000)]
    registry.script("GET", LIST, as_json({"name": REPO, "tags": tags}))
    before = forget_peak()
    answer = await default_client(cache).get("tags/list")
    assert peak_memory() - before < 200_000_000
    if answer.status == 200:
        assert tags_of(answer) == tags
    else:
        assert error_of(answer)[:2] == (502, "UNKNOWN")


@pytest.mark.parametrize("framing", ["chunked", "close", "length"])
async def test_a_list_without_end_is_refused_and_hung_up_on(
    cache: RunningCache, registry: ScriptedRegistry, framing: Any
) -> None:
    async def tags() -> AsyncIterator[bytes]:
        yield b'{"name": "team/app", "tags": ["1"'
        while True:
            yield b', "1"' * 10_000

    length = 1 << 62 if framing == "length" else None
    headers = Headers([("Content-Type", "application/json")])
    registry.script("GET", LIST, Answer(headers=headers, body=tags, framing=framing, content_length=length))
    before = forget_peak()
    assert error_of(await default_client(cache).get("tags/list"))[:2] == (502, "UNKNOWN")
    assert peak_memory() - before < 200_000_000
    await registry.wait_for(lambda: registry.open_connections == 0)


@pytest.mark.parametrize("step", [chunked(), chunked(1)], ids=["chunked", "chunked by the byte"])
async def test_a_list_may_be_framed_in_any_way(
    cache: RunningCache, tagged: ScriptedRegistry, step: answers.Modifier
) -> None:
    tagged.script("GET", LIST, step)
    assert tags_of(await default_client(cache).get("tags/list")) == TAGS


@pytest.mark.parametrize("how", ["fin", "rst"])
async def test_a_list_that_breaks_off_is_no_list(cache: RunningCache, tagged: ScriptedRegistry, how: Any) -> None:
    tagged.script("GET", LIST, answers.cut(30, how), forever=True)
    answer = await default_client(cache).get("tags/list")
    assert error_of(answer)[0] in (502, 503)


@pytest.mark.parametrize("kind", [*FAILING, *REFUSING])
async def test_what_the_upstream_answers_instead_of_a_list(
    cache: RunningCache, registry: ScriptedRegistry, kind: str
) -> None:
    """The same statuses and codes as for manifests, but that an unknown repository is an unknown name."""
    step, expected, code = {**FAILING, **REFUSING}[kind]
    script = registry.script("*", lambda request: True, step, forever=True)
    answer = await default_client(cache).get("tags/list")
    got = error_of(answer)
    assert got[:2] == (expected, "NAME_UNKNOWN" if expected == 404 else code)
    assert UPSTREAM in got[2]
    assert answer.headers.get("WWW-Authenticate") is None
    expected_after = {
        "429 with Retry-After": "7",
        "429 in plain text": "7",
        "429 with a date": "Wed, 21 Oct 2026 07:28:00 GMT",
    }
    assert answer.headers.get("Retry-After") == expected_after.get(kind)
    script.cancel()
    tag(registry, REPO)
    assert tags_of(await default_client(cache).get("tags/list")) == TAGS, "a failure is not remembered"


@pytest.mark.parametrize("after", [BEFORE_HEADERS, 10], ids=["headers", "body"])
async def test_an_upstream_that_stalls_is_given_up(tagged: ScriptedRegistry, start_cache: StartCache, after: int) -> None:
    times = {"headers": "300ms", "head": "300ms", "connect": "300ms", "progress": "600ms"}
    cache = await start_cache(upstream(tagged, timeouts=times))
    tagged.script("GET", LIST, answers.cut(after, "stall"), forever=True)
    assert error_of(await default_client(cache).get("tags/list"))[:2] == (503, "UNAVAILABLE")
    await tagged.wait_for(lambda: tagged.open_connections == 0)


# --- crowds ---


@pytest.mark.parametrize("failing", [False, True], ids=["well", "failing"])
async def test_fifty_clients_at_once_are_one_question(cache: RunningCache, tagged: ScriptedRegistry, failing: bool) -> None:
    opened = asyncio.Event()
    step = answers.oci_error(500, "UNKNOWN") if failing else compose()
    tagged.script("GET", LIST, compose(step, answers.gate(opened)), forever=True)
    client = default_client(cache)
    asking = [asyncio.create_task(client.get("tags/list", n="2")) for _ in range(50)]
    try:
        await tagged.wait_for(lambda: tagged.count("GET", LIST))
        await until_served(cache, 50)
    finally:
        opened.set()
    found = await asyncio.gather(*asking)
    assert {answer.status for answer in found} == {502 if failing else 200}
    assert tagged.count("GET", LIST) == 1


async def test_clients_who_ask_for_different_pages_get_their_own(cache: RunningCache, tagged: ScriptedRegistry) -> None:
    client = default_client(cache)
    asked: list[dict[str, str]] = [
        {},
        {"n": "1"},
        {"n": "2"},
        {"n": "2", "last": "1"},
        {"last": "zz"},
        {"n": "2", "last": "Latest"},
    ]
    found = await asyncio.gather(*(client.get("tags/list", **query) for query in asked * 5))
    wanted = [TAGS, TAGS[:1], TAGS[:2], TAGS[1:3], [], TAGS[5:7]]
    assert [tags_of(answer) for answer in found] == wanted * 5


async def test_a_client_who_leaves_takes_nothing_from_the_others(cache: RunningCache, tagged: ScriptedRegistry) -> None:
    opened = asyncio.Event()
    tagged.script("GET", LIST, answers.gate(opened), forever=True)
    leaving = asyncio.create_task(cache.open(LIST))
    await tagged.wait_for(lambda: tagged.count("GET", LIST) == 1)
    staying = asyncio.create_task(default_client(cache).get("tags/list"))
    await until_served(cache, 2)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    opened.set()
    assert tags_of(await staying) == TAGS


async def until_served(cache: RunningCache, clients: int) -> None:
    """Waits until so many clients are connected and their requests have been read: later ones have been answered."""
    async with asyncio.timeout(30):
        while cache.metric("connections") < clients:
            await asyncio.sleep(0.002)
    for _ in range(3):
        await cache.get("/v2/")


def test_the_tags_of_these_tests_are_legal() -> None:
    """Else a test would show nothing of what is left out."""
    assert all(TAG.fullmatch(name) for name in TAGS)
    assert not any(TAG.fullmatch(name) for name in ILLEGAL)
