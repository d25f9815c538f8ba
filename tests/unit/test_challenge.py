"""``WWW-Authenticate``: every challenge of every line is read, and no line does harm."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.challenge import Basic, Bearer, Challenge, find_challenge, parse_challenges

HUB = 'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/debian:pull"'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        pytest.param('Basic realm="simple"', [("basic", {"realm": "simple"})], id="RFC9110-basic"),
        pytest.param(
            'Basic realm="simple", Newauth realm="apps", type=1, title="Login to \\"apps\\""',
            [("basic", {"realm": "simple"}), ("newauth", {"realm": "apps", "type": "1", "title": 'Login to "apps"'})],
            id="RFC9110-11.6.1",
        ),
        pytest.param(
            'Newauth realm="apps", type=1, title="Login to \\"apps\\"", Basic realm="simple"',
            [("newauth", {"realm": "apps", "type": "1", "title": 'Login to "apps"'}), ("basic", {"realm": "simple"})],
            id="RFC9110-the-other-way-round",
        ),
        pytest.param(
            'Bearer realm="example", error="invalid_token", error_description="The access token expired"',
            [("bearer", {"realm": "example", "error": "invalid_token", "error_description": "The access token expired"})],
            id="RFC6750-3",
        ),
        pytest.param(
            HUB,
            [
                (
                    "bearer",
                    {
                        "realm": "https://auth.docker.io/token",
                        "service": "registry.docker.io",
                        "scope": "repository:library/debian:pull",
                    },
                )
            ],
            id="distribution-spec",
        ),
        pytest.param(
            "Bearer realm=https://gcr.io/v2/token,service=gcr.io",
            [("bearer", {"realm": "https://gcr.io/v2/token", "service": "gcr.io"})],
            id="bare",
        ),
        pytest.param('BEARER REALM="a", Service="b"', [("bearer", {"realm": "a", "service": "b"})], id="case"),
        pytest.param('Bearer realm = "a" ,\t service\t=\tb', [("bearer", {"realm": "a", "service": "b"})], id="white-space"),
        pytest.param('Bearer  ,, realm="a",,service=b,', [("bearer", {"realm": "a", "service": "b"})], id="empty-elements"),
        pytest.param('Bearer realm="a\\\\b\\c"', [("bearer", {"realm": "a\\bc"})], id="escapes"),
        pytest.param(
            'Bearer realm="a, Basic realm=b"',
            [("bearer", {"realm": "a, Basic realm=b"})],
            id="a-challenge-in-quotes-is-none",
        ),
        pytest.param('Bearer realm=""', [("bearer", {"realm": ""})], id="empty-value"),
        pytest.param('Bearer realm="a", realm="b"', [("bearer", {"realm": "a"})], id="the-first-of-two-holds"),
        pytest.param("Basic", [("basic", {})], id="scheme-alone"),
        pytest.param("Basic, Bearer realm=a", [("basic", {}), ("bearer", {"realm": "a"})], id="scheme-alone-first"),
        pytest.param("", [], id="empty"),
        pytest.param(" , ,", [], id="separators-only"),
        pytest.param('"Bearer" realm="a"', [], id="quoted-scheme"),
        pytest.param('realm="a"', [], id="parameter-without-scheme"),
        pytest.param('Bearer realm="a", service="b', [("bearer", {"realm": "a"})], id="unclosed-quote-ends-the-line"),
        pytest.param(
            "Bearer realm=\u0441\u043e",
            [("bearer", {"realm": "\u0441\u043e"})],
            id="foreign-letters-are-kept-for-the-realm-check",
        ),
    ],
)
def test_a_line_holds_challenges(line: str, expected: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges([line]) == [Challenge(scheme, parameters) for scheme, parameters in expected]


def test_every_line_counts() -> None:
    assert [found.scheme for found in parse_challenges(["Negotiate", 'Basic realm="a"', HUB])] == [
        "negotiate",
        "basic",
        "bearer",
    ]


def test_a_line_that_cannot_be_read_does_not_hide_the_next() -> None:
    assert find_challenge(['Bearer realm="unclosed', "@@@", "x" * 100_000, HUB]) is not None


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([HUB], Bearer("https://auth.docker.io/token", "registry.docker.io", ("repository:library/debian:pull",))),
        (
            [f'Basic realm="x", {HUB}'],
            Bearer("https://auth.docker.io/token", "registry.docker.io", ("repository:library/debian:pull",)),
        ),
        (['Basic realm="x"', "bearer realm=a"], Bearer("a", "", ())),
        (
            ['Bearer realm="a",scope="repository:x:pull aws  repository:y:pull"'],
            Bearer("a", "", ("repository:x:pull", "aws", "repository:y:pull")),
        ),
        (['Bearer realm="a",scope=""'], Bearer("a", "", ())),
        (['Bearer realm=""', "Bearer realm=b"], Bearer("b", "", ())),
        (["Bearer", "Bearer service=a"], None),
        (["Bearer", 'Basic realm="a"'], Basic()),
        (['Basic realm="a"'], Basic()),
        (["basic"], Basic()),
        (["Negotiate abcdef==", 'Digest realm="a", nonce="b"'], None),
        (["Negotiate abcdef=="], None),
        ([], None),
    ],
)
def test_bearer_is_preferred_to_any_other(lines: list[str], expected: Bearer | Basic | None) -> None:
    assert find_challenge(lines) == expected


PIECES = st.lists(
    st.sampled_from(
        [
            "Bearer",
            "Basic",
            " ",
            "  ",
            "\t",
            ",",
            "=",
            '"',
            "\\",
            '\\"',
            "realm",
            "scope",
            "a",
            '="',
            "\0",
            "\n",
            "\r",
            "\u0661",
            "\u00e9",
            "/",
        ]
    ),
    max_size=60,
).map("".join)


@given(st.lists(st.text(max_size=60) | PIECES, max_size=4))
def test_no_header_raises_and_names_are_lower_case(lines: list[str]) -> None:
    for challenge in parse_challenges(lines):
        assert challenge.scheme.isascii()
        assert challenge.scheme == challenge.scheme.lower()
        assert all(name == name.lower() for name in challenge.parameters)
    find_challenge(lines)


TOKEN = st.text("abcXYZ019!#$%&'*+.^_`|~-", min_size=1, max_size=8)
VALUE = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E) | st.just("\t"), max_size=20)


def quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@given(
    st.lists(st.tuples(TOKEN, st.dictionaries(TOKEN.map(str.lower), VALUE, max_size=3)), min_size=1, max_size=4),
    st.sampled_from([", ", ",", " ,\t"]),
)
def test_what_was_written_by_the_grammar_is_read_back(challenges: list[tuple[str, dict[str, str]]], comma: str) -> None:
    line = comma.join(
        " ".join([scheme, comma.join(f"{name}={quoted(value)}" for name, value in parameters.items())]).rstrip()
        for scheme, parameters in challenges
    )
    expected = [Challenge(scheme.lower(), parameters) for scheme, parameters in challenges]
    assert parse_challenges([line]) == expected
    assert parse_challenges([item for item in line.splitlines() if item]) == expected


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        " ",
        "a ",
        "a=",
        "a,",
        '"',
        'a="',
        "\\",
        'a="\\',
        "a\t",
        ",",
        "=",
        " =",
        'a="b"',
        'a="b" ',
        "Bearer ",
        "a = b,",
        '\\"',
        "a  =",
        '="',
    ],
)
@pytest.mark.parametrize("start", ["", "Bearer ", 'Bearer realm="'])
@pytest.mark.parametrize("size", [16 * 1024, 100_000])
def test_no_header_takes_long(start: str, unit: str, size: int) -> None:
    line = (start + unit * (size // len(unit) + 1))[:size]
    began = time.perf_counter()
    parse_challenges([line])
    assert time.perf_counter() - began < 2
