"""Lists as documents: queries, links to next pages, tags, referrers; and that paging through any registry ends."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import parse_qsl, urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import PaginationNumberInvalid, RequestInvalid
from proxy.listings import (
    ListInvalid,
    ListQuery,
    next_page,
    of_type,
    page_of,
    parse_query,
    parse_referrers,
    parse_tags,
    referrers_document,
    referrers_tag,
)
from proxy.manifests import DOCKER_LIST, OCI_INDEX, OCI_MANIFEST
from proxy.names import Tag, digest_of, is_tag

TAG = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,10}", fullmatch=True)
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
PAIRS = st.lists(st.tuples(TEXT.filter(lambda name: name not in ("n", "ns")), TEXT), min_size=1, max_size=8)


def descriptor(content: bytes, **more: Any) -> dict[str, Any]:
    return {"mediaType": OCI_MANIFEST, "digest": str(digest_of(content)), "size": len(content), **more}


# --- the query of a client ---


@pytest.mark.parametrize("value", ["", "-1", "+1", "1.0", "abc", " 1", "0x10", "\u0661", "9" * 10])
def test_an_n_that_is_no_number_is_refused(value: str) -> None:
    with pytest.raises(PaginationNumberInvalid):
        parse_query(urlencode([("n", value)]))


def test_n_stands_once() -> None:
    with pytest.raises(PaginationNumberInvalid):
        parse_query("n=1&n=1")


@pytest.mark.parametrize("pairs", [[(str(i), "") for i in range(9)], [("last", "a" * 2048)]])
def test_a_query_has_bounds(pairs: list[tuple[str, str]]) -> None:
    with pytest.raises(RequestInvalid):
        parse_query(urlencode(pairs))


@given(PAIRS)
def test_what_a_cursor_says_reaches_the_upstream_as_it_was(pairs: list[tuple[str, str]]) -> None:
    encoded = parse_query(urlencode(pairs)).encoded()
    assert parse_qsl(encoded, keep_blank_values=True) == pairs
    assert encoded.isascii()
    assert encoded.isprintable()
    assert not set(encoded) & set(' "<>#\\')


# --- the link to the next page ---


@pytest.mark.parametrize(
    "line",
    [
        '</v2/a/tags/list?n=2&last=b>; rel="next"',
        "<https://elsewhere.test/x/y?n=2&last=b>;rel=next",
        '<?n=2&last=b>; title="a, <b>; rel=prev"; REL="Next"',
        '</first?n=1>; rel="first", </v2/a/tags/list?n=2&last=b&ns=other.test>; rel="prev next"',
    ],
)
def test_only_the_query_of_a_link_counts(line: str) -> None:
    assert next_page([line]) == ListQuery((("n", "2"), ("last", "b")))


@pytest.mark.parametrize(
    "line",
    ["", "<", "next", '</v2/?n=1>; rel="prev"', "</v2/?n=1>; rel=nextdoor", '</v2/?n=1>; rel="nextdoor"', "</v2/?n=1>"],
)
def test_what_names_no_next_page_is_the_end(line: str) -> None:
    assert next_page([line]) is None


@pytest.mark.parametrize(
    "target", ["/v2/a/tags/list", "/v2/?ns=b", "/v2/?n=-1", "/v2/?" + "&".join("abcdefghij"), "/v2/?last=" + "a" * 3000]
)
def test_a_next_page_that_cannot_be_asked_for_is_an_error_not_the_end(target: str) -> None:
    with pytest.raises(ListInvalid):
        next_page([f'<{target}>; rel="next"'])


@given(TEXT)
def test_any_link_is_a_page_the_end_or_an_error(line: str) -> None:
    try:
        query = next_page([line, f"<{line}>; rel=next"])
    except ListInvalid:
        return
    assert query is None or query.parameters


# --- tags ---


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)
    )
)
def test_only_a_list_of_tags_is_one(value: Any) -> None:
    for document in (value, {"tags": value}):
        try:
            found = parse_tags(json.dumps(document).encode())
        except ListInvalid:
            continue
        assert isinstance(document, dict)
        assert all(is_tag(tag) for tag in found)
        assert len(set(found)) == len(found)


@pytest.mark.parametrize("body", [b"", b"\xff", b"<html>", b"[" * 100_000, b'{"tags": {}}', b'{"tags": [1]}', b"[]", b"{}"])
def test_what_is_no_list_of_tags_is_refused(body: bytes) -> None:
    with pytest.raises(ListInvalid):
        parse_tags(body)


def test_what_is_no_legal_tag_is_left_out() -> None:
    assert parse_tags(b'{"tags": ["a", "../b", "", "a", "c d", ".x", "' + b"e" * 129 + b'"]}') == ["a"]
    assert parse_tags(b'{"tags": null}') == []


@given(st.lists(TAG, unique=True, max_size=30), st.integers(1, 7), st.booleans(), st.booleans(), st.integers(1, 9))
def test_paging_through_any_registry_brings_each_tag_once(
    names: list[str], n: int, knows_n: bool, knows_last: bool, own_page: int
) -> None:
    """Registries that page, that page only by their own size, and that answer with everything each time."""
    tags = [Tag(name) for name in sorted(names)]

    def upstream(query: ListQuery) -> tuple[list[Tag], ListQuery | None]:
        start = tags.index(Tag(query.last)) + 1 if knows_last and query.last is not None else 0
        size = min(query.n or own_page, own_page) if knows_n else len(tags)
        page = tags[start : start + size]
        more = knows_last and page and page[-1] != tags[-1]
        return page, ListQuery((("last", page[-1]), ("n", str(n)))) if more else None

    query: ListQuery | None = ListQuery((("n", str(n)),))
    found: list[Tag] = []
    for _ in range(len(tags) + 2):
        assert query is not None
        page, query = page_of(*_swap(upstream(query), query))
        assert len(page) <= n
        found += page
        if query is None:
            break
    assert query is None, "it ends"
    if knows_last or not knows_n:
        assert found == tags


def _swap(answer: tuple[list[Tag], ListQuery | None], query: ListQuery) -> tuple[list[Tag], ListQuery, ListQuery | None]:
    return answer[0], query, answer[1]


def test_none_are_wanted() -> None:
    assert page_of([Tag("a")], ListQuery((("n", "0"),)), ListQuery((("last", "a"),))) == ([], None)


def test_a_next_page_that_is_this_one_is_none() -> None:
    query = ListQuery((("last", "a"),))
    assert page_of([Tag("b")], query, query) == (["b"], None)


# --- referrers ---


def test_referrers_are_an_index_and_nothing_else() -> None:
    listed = [descriptor(b"one", artifactType="x/y"), descriptor(b"two", annotations={"a": "b"})]
    document = referrers_document(listed)
    assert parse_referrers(document, OCI_INDEX) == listed
    assert json.loads(document)["schemaVersion"] == 2
    for kind in (DOCKER_LIST, OCI_MANIFEST, "text/html"):
        with pytest.raises(ListInvalid):
            parse_referrers(document, kind)


@pytest.mark.parametrize(
    "hostile",
    [
        "text",
        1,
        None,
        [],
        {},
        {"digest": "sha256:0", "size": 1},
        {"digest": str(digest_of(b"")), "size": -1},
        {"digest": str(digest_of(b"")), "size": "1"},
        {"digest": "../../etc", "size": 1},
    ],
)
def test_one_descriptor_that_is_none_spoils_the_list(hostile: Any) -> None:
    body = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [descriptor(b"one"), hostile]}).encode()
    with pytest.raises(ListInvalid):
        parse_referrers(body, OCI_INDEX)


def test_a_filter_keeps_one_type_and_a_digest_stands_once() -> None:
    one, two = descriptor(b"one", artifactType="x/y"), descriptor(b"two", artifactType="x/z")
    document = referrers_document([one, two, one])
    assert json.loads(document)["manifests"] == [one, two]
    assert json.loads(of_type(document, "x/y"))["manifests"] == [one]
    assert json.loads(of_type(document, ""))["manifests"] == []


def test_the_tag_of_the_tag_schema() -> None:
    sha256 = digest_of(b"")
    assert referrers_tag(sha256) == f"sha256-{sha256.hex}"
    sha512 = type(sha256)("sha512", "ab" * 64)
    assert referrers_tag(sha512) == f"sha512-{'ab' * 32}", "64 hex digits at most"
    assert is_tag(referrers_tag(sha512))


def test_a_last_that_is_no_tag_is_a_cursor_and_takes_nothing_away() -> None:
    """Amazon ECR writes its cursor there; nothing follows from how it compares with tags."""
    page, following = [Tag("a"), Tag("b")], ListQuery((("last", "zz/9=="), ("n", "2")))
    assert page_of(page, ListQuery((("last", "zz/8=="), ("n", "2"))), following) == (page, following)


def test_a_registry_that_pages_in_an_order_of_its_own_loses_nothing() -> None:
    page = [Tag("v9"), Tag("latest")]
    assert page_of(page, ListQuery((("last", "v10"), ("n", "2"))), ListQuery((("last", "latest"),)))[0] == page
