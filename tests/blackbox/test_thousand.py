"""T27, F30, F31: a thousand answers that are corrupt, short, long or mislabelled; none may end cleanly or be stored."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from dataclasses import dataclass, replace

import pytest

from tests.blackbox.oracle import blob_of, blob_path, vouched_wrongly, wrong_files
from tests.conftest import RunningCache
from tests.fakes import answers
from tests.fakes.answers import Step, compose
from tests.fakes.client import NoResponse, WireResponse
from tests.fakes.messages import Answer, Ending
from tests.fakes.registry import ScriptedRegistry

SEED = 20260729
CASES = 1_000
AT_ONCE = 60
ENDINGS: tuple[Ending, ...] = ("fin", "rst")
KI, MI = 1024, 1024 * 1024
REPO = "team/app"

# Once: the first answer only, so that what is asked for next is the truth. Ever: as often as is asked.
HEALING = ("cut fin", "cut rst")
CORRUPT = ("flip", "extra", "drop", "swap", "claim more", "claim less", "html", "foreign digest", "short 206")
REOPENED = ("other range", "mislabelled range", "range ignored", "total changed", "416", "swapped rest", "flipped rest")
EVER = ("always cut", "always flipped", "always short", "always claiming more")
KINDS = ("truth", *HEALING, *HEALING, *CORRUPT, *REOPENED, *EVER)


@dataclass(frozen=True)
class Case:
    """One blob, what its registry does to it, and who asks how."""

    number: int
    kind: str
    framing: str
    size: int
    version: str
    span: str | None
    steps: tuple[Step, ...]


def size_of(rng: random.Random) -> int:
    """Around every size at which the cache does something else."""
    near = rng.randint(-2, 2)
    small, few = rng.randint(3, 4000), rng.randint(MI + 3, 4 * MI)
    kinds = (rng.choice((0, 2)), 2, small, 64 * KI + near, 64 * KI + near, MI + near, MI + 64 * KI + near, few)
    return rng.choice(kinds)


def span_of(rng: random.Random, size: int) -> str | None:
    """A range, or none."""
    first = rng.randrange(max(size, 1))
    last = rng.randint(first, max(size, 1))
    return rng.choice((None, None, None, f"{first}-", f"{first}-{last}", f"-{rng.randint(1, size + 1)}", "0-"))


def flipped(at: int) -> Step:
    """One bit of the body is wrong, wherever it is; of an empty body, its length."""

    def rewrite(answer: Answer) -> Answer:
        body = bytearray(answer.payload)
        if body:
            body[min(at, len(body) - 1)] ^= 1
        return replace(answer, body=bytes(body) or b"x")

    return answers.modifier(rewrite)


def steps_of(rng: random.Random, kind: str, frame: Step, size: int) -> tuple[Step, ...]:
    """What the registry does, request by request."""
    at = rng.randrange(max(size, 1))
    where = rng.choice((0, 1, size // 2, max(size - 1, 0), size, at))
    fin, rst = (compose(frame, answers.cut(where, how)) for how in ENDINGS)
    cut = rng.choice((fin, rst))
    flip, flipped_rest = flipped(at), flipped(-1)
    other = answers.swap_body(rng.randbytes(size or 1))
    more = answers.claim_length(size + rng.randint(1, 100_000))
    fewer = answers.claim_length(max(size - rng.randint(1, 100_000), 0))
    partial = answers.compose(
        answers.status(206, rng.randbytes(at + 1), headers={"Content-Range": f"bytes 0-{at}/{max(size, at + 1)}"}), frame
    )
    offset = rng.choice((-100, -1, 1, 100, 100_000))
    one: dict[str, tuple[Step, ...]] = {
        "truth": (frame,),
        "cut fin": (fin,),
        "cut rst": (rst,),
        "flip": (compose(flip, frame),),
        "extra": (compose(answers.extra_bytes(rng.randbytes(rng.choice((1, 100, 70_000)))), frame),),
        "drop": (compose(answers.drop_last(rng.randint(1, size + 1)), frame),),
        "swap": (compose(other, frame),),
        "claim more": (more,),
        "claim less": (fewer,),
        "html": (answers.status(200, b"<html>" * 100, "text/html"),),
        "foreign digest": (compose(flip, answers.with_headers({"Docker-Content-Digest": "sha256:" + "0" * 64}), frame),),
        "short 206": (partial,),
        "other range": (cut, answers.wrong_range(offset)),
        "mislabelled range": (cut, answers.wrong_range(offset, admitted=False)),
        "range ignored": (cut, answers.ignore_range()),
        "total changed": (cut, answers.changed_total(rng.choice((-1, 1, 1000)))),
        "416": (cut, answers.oci_error(416, "RANGE_INVALID")),
        "swapped rest": (cut, other),
        "flipped rest": (cut, flipped_rest),
        "always cut": (cut,),
        "always flipped": (compose(flip, frame),),
        "always short": (compose(answers.drop_last(1), frame),),
        "always claiming more": (more,),
    }
    return one[kind]


def cases(seed: int, count: int) -> list[Case]:
    """The same cases for the same seed."""
    rng = random.Random(seed)
    frames: dict[str, Step] = {
        "length": answers.with_headers({}),
        "chunked": answers.chunked(16 * KI),
        "close": answers.close_delimited(),
    }
    made = []
    for number in range(count):
        kind, framing, size = rng.choice(KINDS), rng.choice(list(frames)), size_of(rng)
        if kind in EVER:
            size = size or 2  # these last some seconds, and empty ones cannot be tried beside each other
        version = rng.choice(("1.1", "1.1", "1.0"))
        steps = steps_of(rng, kind, frames[framing], size)
        made.append(Case(number, kind, framing, size, version, span_of(rng, size), steps))
    return made


def unprovable(answer: WireResponse) -> bool:
    """Whether docs/threats.md excepts it: of content that claims to be large, a range that ends before the last byte."""
    span = re.fullmatch(r"bytes \d+-(\d+)/(\d+)", answer.headers.get("Content-Range") or "")
    return answer.status == 206 and span is not None and int(span[2]) > MI and int(span[1]) < int(span[2]) - 1


class Trial:
    """Cases before one cache, and what came of them."""

    def __init__(self, cache: RunningCache, registry: ScriptedRegistry) -> None:
        self.cache = cache
        self.registry = registry
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._places = asyncio.Semaphore(AT_ONCE)

    async def lie(self, case: Case) -> None:
        """Lets one case happen, and judges what the client sees."""
        data, path = self._content(case)
        script = self.registry.script("GET", path, *case.steps, forever=case.kind.startswith("always"))
        headers = [("Range", f"bytes={case.span}")] if case.span else []
        async with self._places:
            try:
                answer = await self.cache.get(path, headers, version=case.version)
            except (NoResponse, TimeoutError) as error:
                self.faults.append(f"{case} no end: {error!r}")
                return
        good = answer.status in (200, 206) and answer.clean_end
        self.counts["good" if good else "error" if answer.clean_end else "cut off"] += 1
        if vouched_wrongly(answer, data):
            if unprovable(answer):
                self.counts["good"] -= 1
                self.counts["wrong in a range that nothing can prove"] += 1
            else:
                self.faults.append(f"{case} ended cleanly with wrong bytes: {answer.status} {answer.headers}")
        if case.kind in ("truth", *HEALING) and not (good or answer.status == 416):
            self.faults.append(f"{case} was not healed: {answer.status} {answer.body[:300]!r} {answer.why}")
        script.cancel()

    async def pull_again(self, case: Case) -> None:
        """The next pull, with the truth upstream."""
        data, path = self._content(case)
        async with self._places:
            answer = await self.cache.get(path)
        if not (answer.status == 200 and answer.clean_end and answer.body == data):
            self.faults.append(f"{case} then the next pull was not good: {answer.status} {answer.why} {answer.body[:300]!r}")

    def _content(self, case: Case) -> tuple[bytes, str]:
        data = case.number.to_bytes(2) if case.size == 2 else blob_of(f"{SEED} {case.number}", case.size)
        repository = f"team/app{case.number}"
        return data, blob_path(self.registry.add_blob(repository, data), repository)


async def test_of_a_thousand_lies_none_ends_cleanly_and_none_is_stored(
    cache: RunningCache, registry: ScriptedRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    """T27, F30, F31: every framing, every size, HTTP/1.1 and 1.0, whole and range; afterwards the next pull is good."""
    trial = Trial(cache, registry)
    empty: list[Case] = []
    others: list[Case] = []
    for case in cases(SEED, CASES):
        (others if case.size else empty).append(case)
    for case in empty:  # there is only one such content: it is made cold again each time
        await trial.lie(case)
        await cache.settled()
        await trial.pull_again(case)
        await cache.settled()
        trial.faults += [f"{case} stored wrong: {path}" for path in wrong_files(cache)]
        for path in cache.files("blobs"):
            path.unlink()
    await asyncio.gather(*map(trial.lie, others))
    await cache.settled()
    stored = wrong_files(cache)
    await asyncio.gather(*map(trial.pull_again, others))
    await cache.settled()
    stored += wrong_files(cache)
    with capsys.disabled():
        resumes = int(cache.metric("resumes_total"))
        print(f"\n{CASES} answers, seed {SEED}: {dict(trial.counts)}, {resumes} resumes, {len(stored)} stored wrong")
    assert not trial.faults, "\n".join([f"{len(trial.faults)} faults", *trial.faults[:20]])
    assert not stored
    assert trial.counts["good"] > CASES // 4
    assert trial.counts["cut off"] > CASES // 20
    assert trial.counts["error"] > CASES // 20
