"""``pullcache warm`` as a program of its own, before a cache and scripted registries: what it asks for, as whom, in which
order, and what it says in the end."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pty
import re
import signal
import socket
import sys
import termios
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from proxy import app
from proxy.config.file import validate
from tests.blackbox.private import ALICE, ANNE, APP, BOB, LIB, Account, PrivateRegistry, deployed, fill, until, with_access
from tests.conftest import UPSTREAM, RunningCache, StartCache, settings, upstream
from tests.fakes.answers import compose, gate, status
from tests.fakes.answers import cut as cut_off
from tests.fakes.content import Image
from tests.fakes.registry import ScriptedRegistry
from tests.unit.test_kubernetes import dump
from tests.unit.test_kustomize import PAGE_KUSTOMIZATION, PAGE_POD

ROOT = Path(__file__).parents[2]


@dataclass
class Outcome:
    """How it ended, and what it said."""

    code: int
    table: str
    said: str

    def row(self, image: str) -> str:
        """The one row about an image."""
        (row,) = [line for line in self.table.splitlines() if image in line]
        return row


async def start(*arguments: str, stdin: str = "", cwd: Path = ROOT) -> asyncio.subprocess.Process:
    """The command under way; its input given."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "warm", *arguments),
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it for what runs behind it
    )
    assert process.stdin is not None
    process.stdin.write(stdin.encode())
    process.stdin.close()
    return process


async def ended(process: asyncio.subprocess.Process) -> Outcome:
    """How it ends, within a minute."""
    async with asyncio.timeout(60):
        table, said = await process.communicate()
    assert process.returncode is not None
    return Outcome(process.returncode, table.decode(), said.decode())


async def warm(cache: RunningCache | str, *arguments: str, stdin: str = "", cwd: Path = ROOT) -> Outcome:
    """A whole run against a cache."""
    url = cache if isinstance(cache, str) else f"http://127.0.0.1:{cache.port}"
    return await ended(await start("--server", url, *arguments, stdin=stdin, cwd=cwd))


def a_pod(name: str, *images: str, secrets: tuple[str, ...] = (), namespace: str = "default") -> dict[str, Any]:
    """A pod with a container an image."""
    return {
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "containers": [{"name": f"c{number}", "image": image} for number, image in enumerate(images)],
            "imagePullSecrets": [{"name": secret} for secret in secrets],
        },
    }


def a_secret(name: str, account: Account, registry: str = UPSTREAM, namespace: str = "default") -> dict[str, Any]:
    """A pull secret of an account."""
    content = json.dumps({"auths": {registry: {"username": account.user, "password": account.password}}})
    return {
        "kind": "Secret",
        "type": "kubernetes.io/dockerconfigjson",
        "metadata": {"name": name, "namespace": namespace},
        "data": {".dockerconfigjson": base64.b64encode(content.encode()).decode()},
    }


async def holds(cache: RunningCache, image: Image) -> bool:
    """Whether all of an image is in the cache, once it has saved what it has given."""
    await cache.settled()
    parts = {image.digest: image.data, image.config_digest: image.config} | dict(
        zip(image.layer_digests, image.layers, strict=True)
    )
    return all(cache.held(digest) == data for digest, data in parts.items())


@asynccontextmanager
async def verifying(directory: Path, *upstreams: dict[str, Any]) -> AsyncIterator[str]:
    """A cache that tells its clients its true address, where they get their tokens; its URL."""
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        config = validate(settings(directory, *upstreams, externalURL=url, alwaysPullImages=False))
        async with app.build(config) as built:
            runner = web.ServerRunner(built.listener, shutdown_timeout=2)
            await runner.setup()
            try:
                await web.SockSite(runner, listening).start()
                yield url
            finally:
                await runner.cleanup()


@pytest.fixture
async def private() -> AsyncIterator[PrivateRegistry]:
    """A registry with accounts."""
    async with PrivateRegistry() as registry:
        yield registry


# --- images by name ---


async def test_images_are_held_afterwards_and_served_when_the_registry_is_gone(
    registry: ScriptedRegistry, start_cache: StartCache
) -> None:
    """By tag and by digest, each blob fetched once; the second run, without a registry, is served from the cache."""
    cache = await start_cache(upstream(registry), alwaysPullImages=False)
    one = registry.add_image("team/app", "1", [b"layer one", b"shared" * 100_000])
    two = registry.add_image("team/app", "2", [b"layer two", b"shared" * 100_000])
    images = [f"{UPSTREAM}/team/app:1", f"{UPSTREAM}/team/app@{two.digest}"]
    first = await warm(cache, *images)
    assert (first.code, [first.row(image).split()[-1] for image in images]) == (0, ["pulled"] * 2), first
    assert await holds(cache, one)
    assert await holds(cache, two)
    assert all(
        registry.count("GET", f"/v2/team/app/blobs/{digest}") == 1 for digest in one.layer_digests + two.layer_digests
    )
    await registry.stop()
    assert (await warm(cache, *images)).code == 0
    answer = await cache.get(f"/v2/{UPSTREAM}/team/app/blobs/{one.layer_digests[1]}")
    assert (answer.status, answer.body) == (200, one.layers[1])


async def test_the_platforms_that_are_asked_for_and_no_others(registry: ScriptedRegistry, cache: RunningCache) -> None:
    children = [registry.add_image("team/app", None, [f"layer {number}".encode()]) for number in range(3)]
    registry.add_index("team/app", "1", children)  # of linux/amd64, arm64, arm
    ref = f"{UPSTREAM}/team/app:1"
    outcome = await warm(cache, ref, "--platform", "linux/arm64", "--platform", "linux/s390x")
    assert outcome.code == 1
    rows = outcome.table.splitlines()
    assert (rows[1].split()[1], rows[1].split()[-1]) == ("linux/arm64", "pulled")
    assert "there is no manifest for linux/s390x in it; the platforms in it: linux/amd64, linux/arm64" in rows[2]
    assert [await holds(cache, child) for child in children] == [False, True, False]
    assert (await warm(cache, ref, "--platform", "all")).code == 0
    assert [await holds(cache, child) for child in children] == [True] * 3


async def test_what_fails_is_told_and_the_others_are_pulled(registry: ScriptedRegistry, cache: RunningCache) -> None:
    image = registry.add_image("team/app", "1", [b"layer"])
    outcome = await warm(cache, f"{UPSTREAM}/team/gone:1", "other.test/x:1", f"{UPSTREAM}/team/app:1")
    assert outcome.code == 1
    assert "ErrImagePull: " in outcome.row("team/gone")
    assert "MANIFEST_UNKNOWN" in outcome.row("team/gone")
    assert "other.test" in outcome.row("other.test/x")
    assert "2 not" in outcome.said
    assert await holds(cache, image)


async def test_a_tag_that_is_always_is_asked_with_no_cache(registry: ScriptedRegistry) -> None:
    """Seen where no cache is between: by ``latest``, and not by another tag or by a digest."""
    image = registry.add_image(f"{UPSTREAM}/team/app", "latest", [b"layer"])
    registry.add_image(f"{UPSTREAM}/team/app", "1", [b"other layer"])
    name = f"{UPSTREAM}/team/app"
    assert (await warm(registry.url, name, f"{name}:1", f"{name}@{image.digest}")).code == 0
    asked = {
        request.path.rpartition("/")[2]: request.headers.get("Cache-Control")
        for request in registry.seen("GET")
        if "/manifests/" in request.path
    }
    assert asked == {"latest": "no-cache", "1": None, image.digest: None}


async def test_what_breaks_off_is_continued_and_what_is_wrong_is_refused(registry: ScriptedRegistry) -> None:
    """Seen where no cache is between, which would have withheld it."""
    repository = f"{UPSTREAM}/team/app"
    image = registry.add_image(repository, "1", [b"a layer" * 10_000])
    layer = f"/v2/{repository}/blobs/{image.layer_digests[0]}"
    registry.script("GET", layer, cut_off(30_000, "rst"))
    assert (await warm(registry.url, f"{UPSTREAM}/team/app:1")).code == 0
    assert registry.seen("GET", layer)[1].headers.has("Range")
    registry.script("GET", layer, compose(status(200, b"x" * len(image.layers[0]))))
    outcome = await warm(registry.url, f"{UPSTREAM}/team/app:1")
    assert (outcome.code, "another digest" in outcome.row("team/app")) == (1, True)


async def test_a_cache_that_is_busy_is_asked_again_when_it_said(registry: ScriptedRegistry) -> None:
    repository = f"{UPSTREAM}/team/app"
    image = registry.add_image(repository, "1", [b"layer"])
    paths = (f"/v2/{repository}/manifests/1", f"/v2/{repository}/blobs/{image.layer_digests[0]}")
    for path in paths:
        registry.script("GET", path, status(503, b"", headers={"Retry-After": "1"}))
    outcome = await warm(registry.url, f"{UPSTREAM}/team/app:1")
    assert outcome.code == 0
    assert [registry.count("GET", path) for path in paths] == [2, 2]
    assert outcome.said.count(f"{UPSTREAM}/team/app:1: asked for again for up to 45 s: ") == 1


async def test_one_that_is_to_come_back_tomorrow_is_not_waited_for(registry: ScriptedRegistry) -> None:
    registry.script("GET", f"/v2/{UPSTREAM}/team/app/manifests/1", status(503, b"", headers={"Retry-After": "86400"}))
    assert "503" in (await warm(registry.url, f"{UPSTREAM}/team/app:1")).row("team/app")


# --- manifests of Kubernetes ---


async def test_the_pod_and_the_kustomization_of_the_kubernetes_page(private: PrivateRegistry, tmp_path: Path) -> None:
    """https://kubernetes.io/docs/concepts/containers/images/, with the secret beside it, before a private registry behind
    ``access: verify``. Afterwards the registry may be away."""
    private.allow(ALICE, "janedoe/awesomeapp")
    private.add_image("janedoe/awesomeapp", "v1", [b"private layer", b"another" * 50_000])
    site = tmp_path / "site"
    site.mkdir()
    (site / "pod.yaml").write_text(PAGE_POD)
    (site / "kustomization.yaml").write_text(PAGE_KUSTOMIZATION)
    secret = a_secret("myregistrykey", ALICE, "https://index.docker.io/v1/", "awesomeapps")
    (site / "secret.yaml").write_text(dump(secret))
    async with verifying(tmp_path / "cache", with_access(private, "verify", "docker.io")) as url:
        without = await warm(url, "-f", ".", cwd=site)
        assert without.code == 1
        assert "no pull secret myregistrykey in namespace awesomeapps" in without.said
        assert "docker.io/janedoe/awesomeapp:v1" in without.table
        first = await warm(url, "-f", ".", "-f", "secret.yaml", cwd=site)
        assert first.code == 0, first
        assert "warning" not in first.said
        assert (ALICE.user, ALICE.password) in private.shown()
        await private.stop()
        assert (await warm(url, "-f", ".", "-f", "secret.yaml", cwd=site)).code == 0
        for outcome in (without, first):
            assert ALICE.password not in outcome.table + outcome.said


async def test_each_pod_shows_the_secrets_that_are_its_own(private: PrivateRegistry, tmp_path: Path) -> None:
    """Of its namespace; several in turn until one opens; and where one is for the image, never nobody's name."""
    fill(private)
    app_image, lib = f"{UPSTREAM}/{APP}:1", f"{UPSTREAM}/{LIB}:1"
    manifests = dump(
        a_pod("turns", app_image, secrets=("bobs", "annes")),
        a_pod("elsewhere", lib, secrets=("alices",), namespace="other"),
        a_secret("bobs", BOB),
        a_secret("annes", ANNE),
        a_secret("alices", ALICE),
    )
    async with verifying(tmp_path / "cache", with_access(private, "verify")) as url:
        outcome = await warm(url, "-f", "-", stdin=manifests)
    assert outcome.code == 1
    assert outcome.row(app_image).endswith("pulled")
    assert "ErrImagePull" in outcome.row(lib)
    assert (
        "Pod other/elsewhere: no pull secret alices in namespace other; the one in namespace default is not" in outcome.said
    )
    users = {user for user, _ in private.shown()}
    assert users == {BOB.user, ANNE.user}
    for account in (ALICE, ANNE, BOB):
        assert account.password not in outcome.table + outcome.said


async def test_a_server_that_gives_its_tokens_elsewhere_is_to_be_named_as_there(
    private: PrivateRegistry, tmp_path: Path
) -> None:
    """No secret goes to an address that the user has not named."""
    fill(private)
    manifests = dump(a_pod("it", f"{UPSTREAM}/{APP}:1", secrets=("alices",)), a_secret("alices", ALICE))
    async with verifying(tmp_path / "cache", with_access(private, "verify")) as url:
        outcome = await warm(url.replace("127.0.0.1", "localhost"), "-f", "-", stdin=manifests)
    assert (outcome.code, "let --server be what externalURL says" in outcome.row(APP)) == (1, True), outcome
    assert not private.shown()


async def test_images_of_a_pod_come_in_turn_and_pods_at_the_same_time(
    registry: ScriptedRegistry, cache: RunningCache
) -> None:
    """The first layer of each pod is held back until that of the other was asked for; what is second in a pod is not asked
    for before its first is whole."""
    layers = {}
    for name in ("a1", "a2", "b1", "b2"):
        image = registry.add_image(f"team/{name}", "1", [f"layer {name}".encode() * 1000])
        layers[name] = f"/v2/team/{name}/blobs/{image.layer_digests[0]}"
    held = asyncio.Event()
    for name in ("a1", "b1"):
        registry.script("GET", layers[name], gate(held))
    manifests = dump(*(a_pod(pod, f"{UPSTREAM}/team/{pod}1:1", f"{UPSTREAM}/team/{pod}2:1") for pod in "ab"))
    process = await start("--server", f"http://127.0.0.1:{cache.port}", "-f", "-", stdin=manifests)
    await until(lambda: bool(registry.seen(path=layers["a1"]) and registry.seen(path=layers["b1"])))
    held.set()
    outcome = await ended(process)
    assert outcome.code == 0, outcome
    for pod in "ab":
        order = re.findall(rf"/v2/team/{pod}([12])/", " ".join(request.path for request in registry.requests))
        assert order == sorted(order)
        assert set(order) == {"1", "2"}


async def test_what_many_pods_want_is_pulled_once(registry: ScriptedRegistry) -> None:
    repository = f"{UPSTREAM}/team/app"
    registry.add_image(repository, "1", [b"layer"])
    manifests = dump(*(a_pod(f"p{number}", f"{UPSTREAM}/team/app:1") for number in range(9)))
    outcome = await warm(registry.url, "-f", "-", stdin=manifests)
    assert (outcome.code, outcome.table.count("pulled")) == (0, 1)
    assert registry.count("GET", f"/v2/{repository}/manifests/1") == 1


async def test_an_image_without_a_valid_name_is_told_and_the_rest_is_pulled(
    registry: ScriptedRegistry, cache: RunningCache
) -> None:
    image = registry.add_image("team/app", "1", [b"layer"])
    outcome = await warm(cache, "-f", "-", stdin=dump({}, a_pod("it", "Bad/Name", f"{UPSTREAM}/team/app:1")))
    assert outcome.code == 1
    assert "standard input: document 2: Pod default/it: InvalidImageName: Bad/Name" in outcome.row("container c0")
    assert await holds(cache, image)


# --- what is held, as the admin listener says ---

Holdings = Callable[[str, str], object]


@asynccontextmanager
async def admin_of(holdings: Holdings) -> AsyncIterator[str]:
    """An admin listener that says what is held of an image and platform; its address."""

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        query = request.rel_url.query
        return web.json_response({"image": query["image"], "held": holdings(query["image"], query["platform"])})

    runner = web.ServerRunner(web.Server(answer), shutdown_timeout=2)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


WHOLE = {"complete": True, "missing": []}
PART = {"complete": False, "missing": ["sha256:1", "sha256:2"]}


@pytest.mark.parametrize(
    ("written", "held", "code", "result", "asked"),
    [
        ("IfNotPresent", WHOLE, 0, "already held", []),
        ("IfNotPresent", PART, 0, "pulled", ["manifest", "blob", "blob"]),
        ("IfNotPresent", None, 0, "pulled", ["manifest", "blob", "blob"]),
        ("Always", WHOLE, 0, "already held", ["manifest"]),
        ("Always", PART, 0, "pulled", ["manifest", "blob", "blob"]),
        ("Never", WHOLE, 0, "already held", []),
        ("Never", PART, 1, "ErrImageNeverPull: missing (2 of its parts)", []),
        ("Never", None, 1, "ErrImageNeverPull: what is held is not known", []),
    ],
)
@pytest.mark.parametrize("check", [False, True])
async def test_policy_and_what_is_held_decide_what_is_asked_for(
    registry: ScriptedRegistry, written: str, held: object, code: int, result: str, asked: list[str], check: bool
) -> None:
    """With ``--check`` nothing is asked for at all."""
    registry.add_image(f"{UPSTREAM}/team/app", "1", [b"layer"])
    it = a_pod("it", f"{UPSTREAM}/team/app:1")
    it["spec"]["containers"][0]["imagePullPolicy"] = written
    more = ["--check"] if check else []

    def holdings(image: str, platform: str) -> object:
        return WHOLE if held and any("/blobs/" in request.path for request in registry.requests) else held

    async with admin_of(holdings) as admin:
        outcome = await warm(registry.url, "--admin", admin, "-f", "-", *more, stdin=dump(it))
    if check:
        asked, code = [], 0 if held == WHOLE else 1
        result = {0: "already held", 1: "missing (2 of its parts)" if held else "what is held is not known"}[code]
    assert (outcome.code, outcome.row("team/app").endswith(result)) == (code, True), outcome
    assert sorted(request.path.split("/")[-2].rstrip("s") for request in registry.requests) == sorted(asked)


async def test_what_has_come_and_is_not_held_is_told(registry: ScriptedRegistry) -> None:
    """A cache whose disk takes no more passes content through: the exit code says whether all is held."""
    registry.add_image(f"{UPSTREAM}/team/app", "1", [b"layer"])
    async with admin_of(lambda image, platform: PART) as admin:
        outcome = await warm(registry.url, "--admin", admin, f"{UPSTREAM}/team/app:1")
    assert outcome.code == 1
    assert "pulled, but not held: 2 of its parts are missing" in outcome.row("team/app")


async def test_where_nobody_says_what_is_held_that_is_said_once_and_all_is_pulled(
    registry: ScriptedRegistry, cache: RunningCache
) -> None:
    for name in ("a", "b"):
        registry.add_image(f"team/{name}", "1", [b"layer"])
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        admin = f"127.0.0.1:{closed.getsockname()[1]}"
        outcome = await warm(cache, "--admin", admin, f"{UPSTREAM}/team/a:1", f"{UPSTREAM}/team/b:1")
    assert outcome.code == 0
    assert outcome.said.count("what is held is not known") >= 1


async def test_a_report_says_why_there_is_nothing(registry: ScriptedRegistry, tmp_path: Path) -> None:
    """No such upstream, no such platform; and nothing is known where nobody says what is held."""
    registry.add_index("team/app", "1", [registry.add_image("team/app", None, [b"layer"], architecture="amd64")])
    async with deployed(validate(settings(tmp_path / "cache", upstream(registry)))) as cache:
        assert (await cache.get("/v2/team/app/manifests/1")).status == 200
        ref, other = f"{UPSTREAM}/team/app:1", "elsewhere.test/app:1"
        arguments = ("--server", f"http://127.0.0.1:{cache.port}", "--check", "--platform", "linux/s390x", ref, other)
        told = await ended(await start(*arguments, "--admin", f"127.0.0.1:{cache.admin_port}"))
        assert told.code == 1
        assert told.row(ref).endswith(
            "missing: there is no manifest for linux/s390x in it; the platforms in it: linux/amd64"
        )
        assert told.row(other).endswith(f"missing: elsewhere.test is not among the upstreams of this cache ({UPSTREAM})")
        told = await ended(await start(*arguments))
        assert (told.code, told.row(ref).endswith("what is held is not known")) == (1, True)
        assert told.said.count("warning: what is held is not known: give --admin, or --config instead of --server\n") == 1


async def test_what_the_cache_says_is_told_as_its_word() -> None:
    """And not as that of the registry behind it, which was perhaps never asked."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{closed.getsockname()[1]}"
        ref = f"{UPSTREAM}/team/app:1"
        told = await ended(await start("--server", f"http://{host}", ref))
    assert told.row(ref).endswith(f"ErrImagePull: the cache ({host}) cannot be reached: connection refused")


async def test_a_configuration_says_where_the_cache_is_and_by_which_paths(
    registry: ScriptedRegistry, start_cache: StartCache, tmp_path: Path
) -> None:
    """Its address, the path prefixes of its upstreams, and its admin address."""
    cache = await start_cache(upstream(registry, pathPrefix="corp"))
    image = registry.add_image("team/app", "1", [b"layer"])
    file = tmp_path / "config.yaml"
    sections = settings(cache.directory, upstream(registry, pathPrefix="corp"))
    sections |= {"listen": f"0.0.0.0:{cache.port}", "admin": f"127.0.0.1:{cache.admin_port}"}
    file.write_text(yaml.safe_dump(sections))
    outcome = await ended(await start("--config", str(file), f"{UPSTREAM}/team/app:1"))
    assert outcome.code == 0, outcome
    assert await holds(cache, image)


# --- what cannot be used ---


async def test_input_that_cannot_be_used_is_named_all_at_once_and_nothing_is_asked(
    registry: ScriptedRegistry, tmp_path: Path
) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    arguments = ["Bad/Name", f"{UPSTREAM}/team/app:1", "-f", "bad.yaml", "-f", "none.yaml", "--platform", "amd64"]
    outcome = await warm(f"{registry.url}/v2", *arguments, "--ca-file", "no.pem", cwd=tmp_path)
    assert outcome.code == 2
    assert outcome.table == ""
    lines = outcome.said.splitlines()
    for start_of in (
        "InvalidImageName: Bad/Name",
        "bad.yaml: line 2",
        "none.yaml: cannot be read",
        "--platform amd64",
        "--server",
    ):
        assert any(line.startswith(start_of) for line in lines), lines
    assert not registry.requests


async def test_where_nothing_names_an_image_that_is_an_error() -> None:
    """What comes before it in the pipe may have failed."""
    manifests = dump({"kind": "ConfigMap"}, {"kind": "Rollout", "spec": {"template": {"spec": {}}}})
    outcome = await warm("http://127.0.0.1:1", "-f", "-", stdin=manifests)
    assert (outcome.code, outcome.table) == (2, "")
    assert outcome.said == "no image is named there (2 objects have no pods)\n"


@pytest.mark.parametrize("arguments", [[], ["--check"], ["--server", "http://a", "--config", "b", "c"]])
async def test_a_call_without_anything_to_do_is_refused(arguments: list[str]) -> None:
    assert (await ended(await start(*arguments))).code == 2


async def test_it_can_be_stopped(registry: ScriptedRegistry, cache: RunningCache) -> None:
    """By Ctrl-C: it says what it had done, without a traceback."""
    image = registry.add_image("team/app", "1", [b"layer"])
    registry.add_image("team/quick", "1", [b"quick"])
    layer = f"/v2/team/app/blobs/{image.layer_digests[0]}"
    held = asyncio.Event()
    registry.script("GET", layer, gate(held))
    manifests = dump(a_pod("it", f"{UPSTREAM}/team/quick:1", f"{UPSTREAM}/team/app:1"))
    process = await start("--server", f"http://127.0.0.1:{cache.port}", "-f", "-", stdin=manifests)
    await until(lambda: bool(registry.seen(path=layer)))
    process.send_signal(signal.SIGINT)
    outcome = await ended(process)
    held.set()
    assert outcome.code == 1
    assert outcome.row("team/quick").endswith("pulled")
    assert outcome.row("team/app").endswith("stopped before it was done")
    assert "Traceback" not in outcome.said


async def test_on_a_terminal_there_is_a_bar_for_an_image(registry: ScriptedRegistry, cache: RunningCache) -> None:
    """With its name and how much has come; elsewhere a line tells that it has begun."""
    image = registry.add_image("team/app", "1", [b"a layer" * 100_000])
    ref = f"{UPSTREAM}/team/app:1"
    held = asyncio.Event()
    registry.script("GET", f"/v2/team/app/blobs/{image.layer_digests[0]}", gate(held, 100_000))
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    shown = b""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "proxy", "warm", "--server", f"http://127.0.0.1:{cache.port}", ref),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    with os.fdopen(ours, "rb", buffering=0) as screen:
        async with asyncio.timeout(60):
            while b"team/app:1" not in shown or b"%" not in shown:
                shown += await asyncio.to_thread(screen.read, 4096)
            held.set()
            table, _ = await process.communicate()
    assert process.returncode == 0
    assert b"pulled" in table
    assert f"warming {ref} (linux/" in (await warm(cache, ref)).said
