"""The tables of ``docs/kubernetes.md``: pull policy x what is held x who asks x how the registry does. Each cell is run."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.oracle import manifest_path
from tests.blackbox.private import (
    ALICE,
    APP,
    BOB,
    OPEN,
    PrivateRegistry,
    fill,
    secret_for,
    started,
    with_access,
)
from tests.fakes.answers import Step, gate, oci_error, status, too_many_requests
from tests.fakes.messages import Request

PAGE = Path(__file__).parents[2] / "docs" / "kubernetes.md"
ACCESS = {"Public": ("public",), "Private": ("shared", "verify"), "Not given": ("no right",)}
"""What a table is about, and the access that it is run with."""
COLUMNS = {
    "`Always`, held": [("Always", True)],
    "not held": [("Always", False), ("IfNotPresent", False)],
    "`IfNotPresent` or `Never`, held": [("IfNotPresent", True), ("Never", True)],
    "`IfNotPresent`, held": [("IfNotPresent", True)],
    "`Never`, not held": [("Never", False)],
    "`Never`": [("Never", True), ("Never", False)],
}
STATES: dict[str, Step | None] = {
    "up": None,
    "changed": None,
    "404": oci_error(404, "MANIFEST_UNKNOWN"),
    "401": oci_error(401, "UNAUTHORIZED"),
    "403": oci_error(403, "DENIED"),
    "429": too_many_requests(7),
    "500": status(500),
    "403 in HTML": status(403, b"<html>blocked</html>", "text/html"),
    "no answer": None,
    "connection refused": None,
}
QUICK = {"connect": "300ms", "headers": "300ms", "token": "300ms", "head": "300ms", "endpoint": "300ms"}
CELL = re.compile(r"(?P<status>\d{3})(?: \((?P<other>\d{3})\))? `(?P<decision>[a-z]+)`(?:: (?P<asked>.+))?")


@dataclass(frozen=True)
class Case:
    """One cell, for one access, policy and whether it is held."""

    access: str
    policy: str
    is_held: bool
    state: str
    status: int
    decision: str
    asked: str

    def __str__(self) -> str:
        return f"{self.access}-{self.policy}-{'held' if self.is_held else 'absent'}-{self.state}"


def cases() -> Iterator[Case]:
    """What the page says."""
    heading, columns = "", list[str]()
    for line in PAGE.read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| registry |"):
            columns = cells[1:]
        elif heading in ACCESS and line.startswith("| ") and cells[0] in STATES:
            for column, cell in zip(columns, cells[1:], strict=True):
                found = CELL.fullmatch(cell)
                assert found is not None, cell
                for number, access in enumerate(ACCESS[heading]):
                    code = int(found["other"] if number and found["other"] else found["status"])
                    for policy, is_held in COLUMNS[column]:
                        yield Case(access, policy, is_held, cells[0], code, found["decision"], found["asked"] or "")


CASES = list(cases())


def test_the_tables_are_whole() -> None:
    """Each policy, held or not, with each access, in each state."""
    told = {(case.access, case.policy, case.is_held, case.state) for case in CASES}
    accesses = [access for group in ACCESS.values() for access in group]
    assert told == {
        (access, policy, is_held, state)
        for access in accesses
        for policy in ("Always", "IfNotPresent", "Never")
        for is_held in (True, False)
        for state in STATES
    }
    assert len(CASES) == len(told)


def named(request: Request) -> str:
    """A request as the page has it."""
    return "tags" if request.path.endswith("/tags/list") else request.method


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_a_cell(tmp_path: Path, case: Case) -> None:
    """A GET of a tag: status, what was decided, and what the registry was asked for it, in order."""
    repository = OPEN if case.access == "public" else APP
    mode = "verify" if case.access == "no right" else case.access
    hers = ALICE.headers if mode == "verify" else None
    rules = [{"match": "*:other", "policy": "IfNotPresent"}, {"match": "*", "policy": case.policy}]
    by_rule: dict[str, Any] = {"alwaysPullImages": False, "imagePullPolicy": {"rules": rules}}
    async with PrivateRegistry("token") as registry:
        stock = fill(registry)
        image = stock.open if case.access == "public" else stock.app
        registry.add_image(repository, "other", [b"another image"])
        section = with_access(registry, mode, section={"timeouts": QUICK})
        sections = {"imagePullSecrets": [secret_for(tmp_path)]} if mode == "shared" else {}
        async with started(tmp_path / "cache", section, **sections) as cache:
            for tag in ("other", *(["1"] if case.is_held else [])):
                assert (await cache.get(manifest_path(tag, repository), hers)).status == 200
        async with started(tmp_path / "cache", section, **sections, **by_rule) as cache:
            if case.access != "no right":  # the token is there, and her right was proved
                await cache.head(manifest_path("absent", repository), hers)
                assert (await cache.get(manifest_path("other", repository), hers)).status == 200
            if case.state == "changed":
                image = registry.add_image(repository, "1", [b"a new layer"])
            elif case.state == "no answer":
                registry.fault = gate(asyncio.Event())
            elif case.state == "connection refused":
                await registry.stop()
            else:
                registry.fault = STATES[case.state]
            before = len(registry.requests)
            answer = await cache.get(manifest_path("1", repository), BOB.headers if case.access == "no right" else hers)
            asked = [named(request) for request in registry.requests[before:] if request.path.startswith("/v2/")]
    assert (answer.status, answer.headers.get("Pullcache-Decision")) == (case.status, case.decision)
    assert ", ".join(asked) == case.asked
    if answer.status == 200:
        is_new = case.state != "changed" or case.decision in ("refreshed", "miss")
        assert (answer.body == image.data) == is_new
        assert bool(answer.headers.get("Warning")) == (case.decision == "stale")
    elif case.policy == "Never":
        assert b"ErrImageNeverPull" in answer.body
