"""The ways in which a client may name a repository of this cache, each as a client that asks in that way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from tests.conftest import UPSTREAM, Pairs, RunningCache
from tests.fakes.client import WireResponse, fetch

MAX_PAGES = 100


@dataclass(frozen=True)
class Style:
    """A way: what stands before a repository in the path, and in ``ns``, for one upstream."""

    prefix: str = ""
    ns: str | None = None

    def name(self, repo: str) -> str:
        """The repository as this client names it."""
        return f"{self.prefix}/{repo}" if self.prefix else repo

    def target(self, repo: str, rest: str, **query: str) -> str:
        """The request target of something in a repository, such as ``tags/list``."""
        parameters = query | ({"ns": self.ns} if self.ns else {})
        return f"/v2/{self.name(repo)}/{rest}" + (f"?{urlencode(parameters, quote_via=quote)}" if parameters else "")


DEFAULT, PREFIX, NS = Style(), Style(prefix=UPSTREAM), Style(ns=UPSTREAM)

styles = pytest.mark.parametrize("style", [DEFAULT, PREFIX, NS], ids=["default", "prefix", "ns"])
names = pytest.mark.parametrize("repo", ["app", "a/b-c/d.e/f__g/h0"], ids=["flat", "nested"])


@dataclass(frozen=True)
class Client:
    """Asks one cache about one repository in one way."""

    cache: RunningCache
    style: Style
    repo: str

    @property
    def name(self) -> str:
        """The repository as it is named in requests."""
        return self.style.name(self.repo)

    async def ask(
        self,
        method: str,
        rest: str,
        headers: Pairs | None = None,
        query: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> WireResponse:
        """A request about something in the repository; its answer must end as HTTP wants it."""
        target = self.style.target(self.repo, rest, **(query or {}))
        answer = await fetch(self.cache.host, self.cache.port, method, target, headers or [], body=body)
        assert answer.clean_end, answer.why
        assert method != "HEAD" or answer.extra == b"", "a body follows the answer to HEAD"
        return answer

    async def get(self, rest: str, **query: str) -> WireResponse:
        """GET of something in the repository."""
        return await self.ask("GET", rest, query=query)

    async def pages(self, rest: str, **query: str) -> list[WireResponse]:
        """A list from its first page to its last, each as the link of the one before it says, at this cache."""
        answer = await self.get(rest, **query)
        found = [answer]
        while (target := next_of(answer)) is not None:
            assert len(found) < MAX_PAGES, "this list has no end"
            answer = await self.cache.get(target)
            found.append(answer)
        return found


def next_of(answer: WireResponse) -> str | None:
    """The target to which an answer's link leads: of this cache, hence without scheme and host."""
    links = answer.headers.getall("Link")
    if not links:
        return None
    [link] = links
    target, closed, relation = link.removeprefix("<").partition(">")
    assert link.startswith("<"), link
    assert (closed, relation.replace(" ", "")) == (">", ';rel="next"'), link
    assert target.startswith("/v2/"), link
    assert all(" " < letter < "\x7f" for letter in link.replace(" ", "")), link
    return target


def tags_of(answer: WireResponse) -> list[Any]:
    """The tags that an answer lists."""
    assert answer.status == 200, (answer.status, answer.body[:300])
    tags = json.loads(answer.body)["tags"]
    assert isinstance(tags, list)
    return tags


def index_of(answer: WireResponse) -> dict[str, Any]:
    """The index that an answer to a question for referrers is; its form is checked (OCI distribution spec 1.1.1)."""
    assert answer.status == 200, (answer.status, answer.body[:300])
    assert answer.headers.getall("Content-Type") == ["application/vnd.oci.image.index.v1+json"]
    index: dict[str, Any] = json.loads(answer.body, parse_constant=_no_json)
    assert (index["schemaVersion"], index["mediaType"]) == (2, "application/vnd.oci.image.index.v1+json")
    assert isinstance(index["manifests"], list)
    return index


def _no_json(constant: str) -> None:
    """Python reads and writes NaN and Infinity; clients do not."""
    raise AssertionError(f"{constant} is no JSON")


def digests_of(answer: WireResponse) -> list[str]:
    """The digests of the referrers in an answer."""
    return [entry["digest"] for entry in index_of(answer)["manifests"]]
