"""F30: a download that breaks again and again goes on from the first byte that is missing, and its client sees nothing."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from itertools import cycle

import pytest

from tests.blackbox.oracle import blob_of, blob_path, wrong_files
from tests.conftest import StartCache, upstream
from tests.fakes import answers
from tests.fakes.messages import Answer, Cut, Ending, Headers, Request
from tests.fakes.registry import ScriptedRegistry

SEED = 20260729
SIZE = 100 * 1024 * 1024
CUTS = 20
ENDINGS: tuple[Ending, ...] = ("fin", "rst", "stall")
IN_FLIGHT = 4 * 1024 * 1024
"""What a reset can destroy: the buffers of both kernels, and the reader's."""


@dataclass
class Storage:
    """Object storage behind signed URLs: each is good until the next one is signed."""

    data: bytes
    cuts: list[tuple[int, Ending]]
    signed: int = 0
    refused: int = 0
    began: list[int] = field(default_factory=list)
    ended: list[tuple[int, Ending | None]] = field(default_factory=list)

    def sign(self, base: str) -> Answer:
        """A redirect to a URL of its own."""
        self.signed += 1
        return answers.redirect(f"{base}/storage/blob?X-Amz-Signature={self.signed}")

    def serve(self, request: Request) -> Answer:
        """The bytes from where they are asked, up to the next cut."""
        if request.params.get("X-Amz-Signature") != [str(self.signed)] or request.headers.has("Authorization"):
            self.refused += 1
            return answers.status(403, b"<Error><Code>AccessDenied</Code></Error>", "application/xml")
        asked = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", "bytes=0-") or "")
        assert asked is not None, request.headers
        start = int(asked[1])
        self.began.append(start)
        while self.cuts and self.cuts[0][0] <= start:
            self.cuts.pop(0)
        faults: tuple[Cut, ...] = ()
        if self.cuts:
            at, how = self.cuts.pop(0)
            faults = (Cut(at - start, how),)
            self.ended.append((at, how))
        else:
            self.ended.append((len(self.data), None))
        headers = Headers([("Content-Type", "binary/octet-stream")])
        if not request.headers.has("Range"):
            return Answer(200, headers, self.data, faults=faults)
        headers = headers.plus([("Content-Range", f"bytes {start}-{len(self.data) - 1}/{len(self.data)}")])
        return Answer(206, headers, self.data[start:], faults=faults)


async def test_twenty_cuts_are_invisible(
    registry: ScriptedRegistry, start_cache: StartCache, capsys: pytest.CaptureFixture[str]
) -> None:
    """F30: 100 MB behind signed redirects, ended by FIN, RST and stall in turn."""
    data = blob_of(SEED, SIZE)
    path = blob_path(registry.add_blob("team/app", data))
    points = sorted(random.Random(SEED).sample(range(1, SIZE), CUTS))
    storage = Storage(data, list(zip(points, cycle(ENDINGS), strict=False)))
    async with ScriptedRegistry() as elsewhere:
        registry.script("GET", path, lambda _: storage.sign(elsewhere.url), forever=True)
        elsewhere.script("GET", "/storage/blob", storage.serve, forever=True)
        cache = await start_cache(upstream(registry, timeouts={"progress": "300ms"}))
        answer = await cache.get(path, within=60)
        same = answer.body == data
        assert (answer.status, answer.clean_end, same) == (200, True, True), answer.why
        sent = elsewhere.bytes_sent("/storage/blob")
    lost = 0
    for (stop, how), start in zip(storage.ended, storage.began[1:], strict=False):
        assert start <= stop
        if how == "rst":
            assert stop - start <= IN_FLIGHT
        else:
            assert start == stop, f"after {how} the first byte not received is asked for"
        lost += stop - start
    with capsys.disabled():
        print(
            f"\n{SIZE} bytes, {CUTS} cuts, seed {SEED}: {len(storage.began)} requests, {storage.signed} URLs, "
            f"{storage.refused} refused, {sent} bytes from upstream, {lost} of them lost to resets"
        )
    assert sent == SIZE + lost
    assert [how for _, how in storage.ended] == [*(how for _, how in zip(points, cycle(ENDINGS), strict=False)), None]
    assert (len(storage.began), storage.signed, storage.refused) == (CUTS + 1, CUTS + 1, 0)
    assert cache.metric("resumes_total") == CUTS
    await cache.settled()
    assert cache.metric("fills_total", result="held") == 1
    assert wrong_files(cache) == []
