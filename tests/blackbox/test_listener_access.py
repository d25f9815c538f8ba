"""Who may use the listeners: users, client certificates, rules, the admin token; and what ``explain`` tells."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import bcrypt
import pytest
import trustme

from proxy.config.file import validate
from tests.blackbox.helpers import message
from tests.blackbox.private import (
    ALICE,
    APP,
    BOB,
    CONTENT,
    EXTERNAL,
    LIB,
    OPEN,
    PROXYS,
    WRONG,
    Account,
    PrivateRegistry,
    Served,
    Stock,
    assert_bare,
    bearer,
    body_of,
    challenges,
    deployed,
    fetch_from,
    fill,
    parts,
    secret_for,
    until,
    with_access,
)
from tests.conftest import UPSTREAM, Pairs, settings, upstream
from tests.fakes.answers import oci_error, status
from tests.fakes.client import NoResponse, WireResponse
from tests.fakes.tokens import basic

REALM = "Images of the corp"
USER, OTHER = Account("ursula", "urs-c4n4ry-pass"), Account("olaf", "0laf-c4n4ry-pass")
QUICK = {"connect": "300ms", "headers": "300ms", "token": "300ms", "head": "300ms", "endpoint": "300ms"}


@pytest.fixture
async def registry() -> AsyncIterator[PrivateRegistry]:
    """The upstream."""
    async with PrivateRegistry() as scripted:
        yield scripted


@pytest.fixture
def stock(registry: PrivateRegistry) -> Stock:
    """What it has."""
    return fill(registry)


def htpasswd(folder: Path, *accounts: Account) -> Path:
    """A file of users, as ``htpasswd -B`` writes it."""
    file = folder / "htpasswd"
    lines = [f"{each.user}:{bcrypt.hashpw(each.password.encode(), bcrypt.gensalt(4)).decode()}\n" for each in accounts]
    file.write_text("".join(lines))
    return file


def listening(
    folder: Path,
    *upstreams: dict[str, Any],
    tls: ssl.SSLContext | None = None,
    admin_tls: ssl.SSLContext | None = None,
    **sections: Any,
) -> AbstractAsyncContextManager[Served]:
    """A whole cache with these sections; files are read again when it is told to."""
    config = validate(settings(folder / "cache", *upstreams, **{"rereadFilesEvery": "1h", **sections}))
    return deployed(config, tls, admin_tls)


def guarded(folder: Path, registry: PrivateRegistry, **more: Any) -> AbstractAsyncContextManager[Served]:
    """A cache whose listener has users, before a registry of which all is public here."""
    listener = {"htpasswdFile": str(htpasswd(folder, USER, OTHER)), "realm": REALM} | more.pop("listener", {})
    return listening(folder, upstream(registry), listener=listener, **more)


# --- users ---

EVERYTHING = ("/v2/", "/v2", "/v2/_catalog", "/v2/nonsense", f"/v2/{OPEN}/blobs/sha256:junk", "/v2/UPPER/tags/list")


@pytest.mark.parametrize(
    "shown",
    [
        [],
        Account(USER.user, "wrong").headers,
        Account("nobody", USER.password).headers,
        Account(USER.user, "").headers,
        Account("", USER.password).headers,
        Account(USER.user.upper(), USER.password).headers,
        Account(USER.user, USER.password + "\0").headers,
        [("Authorization", "Basic Og==")],
        [("Authorization", "Basic !")],
        bearer("x" * 43),
        bearer("anonymous"),
        [("Authorization", USER.header.replace("Basic", "Negotiate"))],
    ],
)
async def test_without_a_user_every_path_is_401_with_the_configured_realm(
    tmp_path: Path, registry: PrivateRegistry, stock: Stock, shown: Pairs
) -> None:
    """Whatever method and Host; no registry is asked, and what is held is not told."""
    async with guarded(tmp_path, registry) as cache:
        assert (await cache.get(parts(OPEN, stock.open)["tag"], USER.headers)).status == 200
        questions = len(registry.requests)
        for path in (*EVERYTHING, *parts(OPEN, stock.open).values(), *parts(APP, stock.app).values()):
            for method, more in (
                ("GET", []),
                ("HEAD", []),
                ("GET", [("Host", "evil.test"), ("X-Forwarded-Host", "evil.test")]),
            ):
                answer = await cache.ask(method, path, [*shown, *more])
                if answer.status == 429:
                    continue  # wrong ones are bounded, see below
                assert (answer.status, challenges(answer)) == (401, [f'Basic realm="{REALM}"'])
                assert_bare(answer, stock.open)
                assert b"evil" not in answer.body
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            answer = await cache.ask(method, parts(OPEN, stock.open)["tag"], shown)
            assert answer.status in (401, 405, 429)
            assert_bare(answer, stock.open)
        assert len(registry.requests) == questions


async def test_the_right_user_gets_what_the_listener_has_and_his_password_goes_nowhere(
    tmp_path: Path, registry: PrivateRegistry, stock: Stock
) -> None:
    async with guarded(tmp_path, registry) as cache:
        assert (await cache.get("/v2/", USER.headers)).status == 200
        for account in (USER, OTHER):
            for part in CONTENT:
                answer = await cache.get(parts(OPEN, stock.open)[part], account.headers)
                assert (answer.status, answer.body) == (200, body_of(stock.open, part))
                assert answer.headers.get("Cache-Control") == "private, no-store"
            denied = await cache.get(parts(APP, stock.app)["tag"], account.headers)
            assert denied.status == 403, "the right to use the listener is none at the registry"
        assert not registry.knows("c4n4ry")
        assert registry.shown() == set()


async def test_wrong_passwords_are_bounded_and_right_ones_are_not(
    tmp_path: Path, registry: PrivateRegistry, stock: Stock
) -> None:
    """Ten a minute and address; who is known to be right goes on, and so does another address."""
    async with guarded(tmp_path, registry) as cache:
        path = parts(OPEN, stock.open)["tag"]
        assert (await cache.get(path, OTHER.headers)).status == 200
        found = [(await cache.get(path, Account(USER.user, f"wrong-{n}").headers)) for n in range(30)]
        assert [answer.status for answer in found] == [401] * 10 + [429] * 20
        assert all(1 <= int(answer.headers.get("Retry-After") or 0) <= 60 for answer in found[10:])
        assert (await cache.get(path, OTHER.headers)).status == 200
        answer = await fetch_from("127.0.0.2", cache, "GET", path, USER.headers)  # type: ignore[arg-type]
        assert answer.status == 200


@pytest.mark.parametrize("extra", [1, 100, 5000])
async def test_a_password_that_cannot_be_checked_whole_is_refused(
    tmp_path: Path, registry: PrivateRegistry, stock: Stock, extra: int
) -> None:
    """bcrypt sees 72 bytes: what is longer must not pass by its beginning; and the challenge is there all the same."""
    long = Account("long", "p" * 72)
    async with listening(tmp_path, upstream(registry), listener={"htpasswdFile": str(htpasswd(tmp_path, long))}) as cache:
        path = parts(OPEN, stock.open)["tag"]
        assert (await cache.get(path, long.headers)).status == 200
        answer = await cache.get(path, Account("long", "p" * (72 + extra)).headers)
        assert (answer.status, challenges(answer)) == (401, ['Basic realm="pullcache"'])


async def test_each_user_may_read_what_his_globs_say(tmp_path: Path, registry: PrivateRegistry, stock: Stock) -> None:
    """Everything else is 403 DENIED before any registry is asked; who is not named has what ``*`` has."""
    users = {USER.user: [f"{UPSTREAM}/open/*"], "*": [f"{UPSTREAM}/{LIB}"]}
    registry.public |= {APP, LIB}
    async with guarded(tmp_path, registry, listener={"users": users}) as cache:
        for account, repository, image, may in (
            (USER, OPEN, stock.open, True),
            (OTHER, LIB, stock.lib, True),
            (USER, LIB, stock.lib, False),
            (OTHER, OPEN, stock.open, False),
            (USER, APP, stock.app, False),
            (OTHER, APP, stock.app, False),
        ):
            questions = len(registry.requests)
            for form in (repository, f"{UPSTREAM}/{repository}"):
                for path in (*parts(form, image).values(), parts(form, image)["tag"] + f"?ns={UPSTREAM}"):
                    if "ns=" in path and form != repository:
                        continue
                    answer = await cache.get(path, account.headers)
                    assert (answer.status == 200) == may, (account.user, path)
                    if not may:
                        assert answer.status == 403
                        assert json.loads(answer.body)["errors"][0]["code"] == "DENIED"
                        assert account.user in message(answer)
                        assert_bare(answer, image)
            assert may or len(registry.requests) == questions
        foreign = parts(OPEN, stock.lib)["layer"]
        assert (await cache.get(foreign, USER.headers)).status == 404, "nor by its digest through what he may read"


async def test_users_are_read_again_and_those_who_are_gone_are_out(
    tmp_path: Path, registry: PrivateRegistry, stock: Stock
) -> None:
    """A remembered yes ends with the file that it was by; a file that cannot be used changes nothing."""
    path = parts(OPEN, stock.open)["tag"]
    async with guarded(tmp_path, registry) as cache:
        assert (await cache.get(path, USER.headers)).status == 200
        new = Account(USER.user, "new-c4n4ry")
        htpasswd(tmp_path, new)

        async def settled(account: Account, code: int) -> None:
            async with asyncio.timeout(10):
                while (await fetch_from("127.0.0.2", cache, "GET", path, account.headers)).status != code:  # type: ignore[arg-type]
                    cache.cache.reload()
                    await asyncio.sleep(0.05)

        await settled(new, 200)
        for gone in (USER, OTHER):
            assert (await cache.get(path, gone.headers)).status == 401
        (tmp_path / "htpasswd").write_text("broken")
        cache.cache.reload()
        await until(lambda: cache.metric("unusable_files", what="htpasswd") == 1)
        assert (await cache.get(path, new.headers)).status == 200
        htpasswd(tmp_path, OTHER)
        cache.cache.reload()
        await until(lambda: cache.metric("unusable_files", what="htpasswd") == 0)
        assert (await cache.get(path, OTHER.headers)).status == 200
        assert (await cache.get(path, new.headers)).status == 401


# --- TLS and client certificates ---


class Certificates:
    """The listener's certificate, and clients of one authority and of another."""

    def __init__(self, folder: Path) -> None:
        self.servers, self.clients, self.others = trustme.CA(), trustme.CA(), trustme.CA()
        leaf = self.servers.issue_cert("127.0.0.1")
        self.certificate, self.key, self.client_ca = (folder / name for name in ("cert.pem", "key.pem", "ca.pem"))
        self.certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        leaf.private_key_pem.write_to_path(str(self.key))
        self.clients.cert_pem.write_to_path(str(self.client_ca))

    def listener(self, *, of_clients: bool = True) -> dict[str, Any]:
        """The keys of a listener."""
        keys = {"tlsCertFile": str(self.certificate), "tlsKeyFile": str(self.key)}
        return keys | ({"clientCAFile": str(self.client_ca)} if of_clients else {})

    def client(self, name: str | None = None, *, of_other: bool = False) -> ssl.SSLContext:
        """A client that trusts the listener, and shows a certificate of that common name."""
        context = ssl.create_default_context()
        self.servers.configure_trust(context)
        if name is not None:
            (self.others if of_other else self.clients).issue_cert("client.test", common_name=name).configure_cert(context)
        return context


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    """All of them."""
    return Certificates(tmp_path)


async def refused(cache: Served, path: str, context: ssl.SSLContext) -> bool:
    """Whether the connection comes to nothing."""
    try:
        await cache.get(path, tls=context)
    except (ssl.SSLError, NoResponse, ConnectionError):
        return True
    return False


async def test_without_a_certificate_of_the_authority_there_is_no_connection(
    tmp_path: Path, registry: PrivateRegistry, stock: Stock, certificates: Certificates
) -> None:
    async with listening(tmp_path, upstream(registry), listener=certificates.listener()) as cache:
        path = parts(OPEN, stock.open)["tag"]
        assert (await cache.get(path, tls=certificates.client("node-1"))).status == 200
        questions = len(registry.requests)
        for context in (certificates.client(), certificates.client("node-1", of_other=True)):
            for target in (path, "/v2/", "/token"):
                assert await refused(cache, target, context)
        assert len(registry.requests) == questions


async def test_globs_go_by_the_common_name(
    tmp_path: Path, registry: PrivateRegistry, stock: Stock, certificates: Certificates
) -> None:
    users = {"node-1": [f"{UPSTREAM}/open/*"], "*": [f"{UPSTREAM}/mallory/*"]}
    registry.public |= {LIB}
    async with listening(tmp_path, upstream(registry), listener=certificates.listener() | {"users": users}) as cache:
        path = parts(OPEN, stock.open)["tag"]
        answer = await cache.get(path, tls=certificates.client("node-1"))
        assert answer.status == 200
        assert answer.headers.get("Cache-Control") == "private, no-store", "it is for this user"
        denied = await cache.get(path, tls=certificates.client("node-2"))
        assert (denied.status, "node-2" in message(denied)) == (403, True)
        assert (await cache.get("/v2/mallory/pub/manifests/1", tls=certificates.client("node-2"))).status == 200
        for name in ("node-1", "node-2"):
            assert (await cache.get(parts(LIB, stock.lib)["tag"], tls=certificates.client(name))).status == 403


async def test_verify_goes_together_with_client_certificates_over_tls(
    tmp_path: Path, registry: PrivateRegistry, stock: Stock, certificates: Certificates
) -> None:
    """The certificate says who may connect and what may be read at all; the credential, what the registry gives."""
    listener = certificates.listener() | {"users": {"node-1": [f"{UPSTREAM}/*"], "node-2": [f"{UPSTREAM}/{LIB}"]}}
    node = certificates.client("node-1")
    async with listening(
        tmp_path, with_access(registry, "verify"), listener=listener, externalURL=EXTERNAL, tls=node
    ) as cache:
        assert (await cache.get("/v2/")).status == 401
        given = json.loads((await cache.get("/token", ALICE.headers)).body)["token"]
        for headers in (ALICE.headers, bearer(given)):
            for part in ("tag", "digest"):
                answer = await cache.get(parts(APP, stock.app)[part], headers)
                assert (answer.status, answer.body) == (200, body_of(stock.app, part))
            denied = await cache.get(parts(APP, stock.app)["tag"], headers, tls=certificates.client("node-2"))
            assert denied.status == 403
            assert (await cache.get(parts(LIB, stock.lib)["tag"], headers, tls=certificates.client("node-2"))).status == 200
        for headers in (WRONG.headers, BOB.headers, []):
            assert (await cache.get(parts(APP, stock.app)["tag"], headers)).status == 401
        assert await refused(cache, "/token", certificates.client())


async def test_users_over_tls_and_nothing_without_it(
    tmp_path: Path, registry: PrivateRegistry, stock: Stock, certificates: Certificates
) -> None:
    """TLS 1.2 is the least."""
    path = parts(OPEN, stock.open)["tag"]
    listener = certificates.listener(of_clients=False)
    async with guarded(tmp_path, registry, listener=listener, tls=certificates.client()) as cache:
        old = certificates.client()
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        for context in (certificates.client(), old):
            assert (await cache.get(path, USER.headers, tls=context)).body == stock.open.data
            answer = await cache.get(path, tls=context)
            assert (answer.status, challenges(answer)) == (401, [f'Basic realm="{REALM}"'])
        with pytest.raises((NoResponse, ConnectionError)):
            await cache.get(path, USER.headers, tls=None)


# --- behind something that ends TLS ---


async def test_the_client_is_whom_the_front_says(tmp_path: Path, registry: PrivateRegistry, stock: Stock) -> None:
    """The last entry of ``X-Forwarded-For``, which the front has written; what a client wrote before it does not count."""
    async with listening(
        tmp_path, with_access(registry, "verify"), listener={"tlsTerminatedInFront": True}, externalURL=EXTERNAL
    ) as cache:
        path, codes = parts(APP, stock.app)["tag"], []
        for number in range(25):
            account = Account("alice", f"wrong-{number}")
            shown = [*account.headers, ("X-Forwarded-For", f"10.1.1.{number}, 10.0.0.9")]
            codes.append((await cache.get(path, shown)).status)
        assert len({each for each in registry.shown() if each[1].startswith("wrong")}) == 10
        assert codes == [401] * 10 + [429] * 15
        assert (await cache.get(path, [*ALICE.headers, ("X-Forwarded-For", "10.0.0.9, 10.0.0.10")])).status == 200


async def test_without_a_front_nobody_says_who_he_is(tmp_path: Path, registry: PrivateRegistry, stock: Stock) -> None:
    async with listening(tmp_path, with_access(registry, "verify"), externalURL=EXTERNAL) as cache:
        path = parts(APP, stock.app)["tag"]
        for number in range(25):
            account = Account("alice", f"wrong-{number}")
            await cache.get(path, [*account.headers, ("X-Forwarded-For", f"10.1.1.{number}"), ("X-Real-IP", "10.2.2.2")])
        assert len(registry.shown()) == 10


# --- the admin listener ---

TOKEN = "adm1n-c4n4ry-0123456789abcdef"


@pytest.mark.parametrize(
    "shown",
    [
        [],
        bearer("wrong-" + TOKEN),
        bearer(TOKEN[:-1]),
        bearer(TOKEN + "a"),
        [("Authorization", TOKEN)],
        [("Authorization", basic("admin", TOKEN))],
        [("Authorization", f"Bearer {TOKEN}".upper())],
        [("Cookie", TOKEN)],
    ],
)
async def test_the_admin_token_opens_figures_and_explanations_and_health_is_for_all(
    tmp_path: Path, registry: PrivateRegistry, stock: Stock, shown: Pairs
) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    async with listening(tmp_path, upstream(registry), adminListener={"tokenFile": str(tmp_path / "token")}) as cache:
        closed = ("/metrics", f"/explain?image={UPSTREAM}/{OPEN}", f"/metrics?token={TOKEN}", "/", "/explain")
        for path in ("/healthz", "/readyz"):
            assert (await cache.admin(path, shown)).status == 200
        for path in closed:
            answer = await cache.admin(path, shown)
            assert answer.status == 401
            assert answer.headers.get("WWW-Authenticate") == 'Bearer realm="pullcache admin"'
            assert TOKEN.encode() not in answer.body
            assert b"pullcache_" not in answer.body
        for path in closed[:2]:
            assert (await cache.admin(path, bearer(TOKEN))).status == 200
        assert (await cache.get("/v2/", bearer(TOKEN))).status == 200, "the other listener knows nothing of it"


async def test_the_admin_token_is_read_again(tmp_path: Path, registry: PrivateRegistry) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    async with listening(tmp_path, upstream(registry), adminListener={"tokenFile": str(file)}) as cache:
        file.write_text("another-0123456789")
        async with asyncio.timeout(10):
            cache.cache.reload()
            while (await cache.admin("/metrics", bearer("another-0123456789"))).status != 200:
                await asyncio.sleep(0.05)
        assert (await cache.admin("/metrics", bearer(TOKEN))).status == 401
        file.write_text("short")
        cache.cache.reload()
        await until(lambda: cache.metric("unusable_files", what="admin token") == 1)
        assert (await cache.admin("/metrics", bearer("another-0123456789"))).status == 200
        assert (await cache.admin("/metrics", bearer("short"))).status == 401


async def test_the_admin_listener_takes_client_certificates(
    tmp_path: Path, registry: PrivateRegistry, certificates: Certificates
) -> None:
    operator = certificates.client("operator")
    async with listening(tmp_path, upstream(registry), adminListener=certificates.listener(), admin_tls=operator) as cache:
        assert (await cache.admin("/metrics")).status == 200
        for context in (certificates.client(), certificates.client("operator", of_other=True)):
            with pytest.raises((ssl.SSLError, NoResponse, ConnectionError)):
                await cache.admin("/healthz", tls=context)


# --- rules ---


def rule(name: str, match: str, action: str, **more: Any) -> dict[str, Any]:
    """One rule."""
    return {"name": name, "match": match, "action": action, **more}


async def test_a_denied_image_is_403_with_the_rules_name_before_anybody_is_asked(
    tmp_path: Path, registry: PrivateRegistry, stock: Stock
) -> None:
    """Manifests, blobs, tags and referrers, held or not, by whatever form of its name; counted under the rule."""
    rules = [
        rule("our own", f"{UPSTREAM}/open/*", "allow"),
        rule("no mallory", "*/mallory/*", "deny"),
        rule("late", f"{UPSTREAM}/open/*", "deny"),
    ]
    async with listening(tmp_path, upstream(registry), rules=rules) as cache:
        denied = 0
        for form in ("mallory/pub", f"{UPSTREAM}/mallory/pub"):
            for path in parts(form, stock.hers).values():
                for method in ("GET", "HEAD"):
                    for headers in ([], ALICE.headers):
                        answer = await cache.ask(method, path, headers)
                        denied += 1
                        assert answer.status == 403
                        if method == "GET":
                            assert json.loads(answer.body)["errors"][0]["code"] == "DENIED"
                            assert "'no mallory'" in message(answer)
        assert registry.requests == []
        assert cache.metric("rule_hits_total", rule="no mallory", effect="denied") == denied
        for part in CONTENT:
            answer = await cache.get(parts(OPEN, stock.open)[part])
            assert (answer.status, answer.body) == (200, body_of(stock.open, part)), "the first that matches decides"
        assert cache.metric("rule_hits_total") == denied
        assert 'rule="no mallory"' in (await cache.admin("/metrics")).body.decode()


async def test_a_rule_on_dry_run_decides_nothing_and_is_counted(
    tmp_path: Path, registry: PrivateRegistry, stock: Stock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    rules = [
        rule("try it", f"{UPSTREAM}/*", "deny", dryRun=True),
        rule("allow it", f"{UPSTREAM}/mallory/*", "allow", dryRun=True),
        rule("in earnest", f"{UPSTREAM}/mallory/*", "deny"),
    ]
    async with listening(tmp_path, upstream(registry), rules=rules) as cache:
        for part in CONTENT:
            answer = await cache.get(parts(OPEN, stock.open)[part])
            assert (answer.status, answer.body) == (200, body_of(stock.open, part))
        assert cache.metric("rule_hits_total", rule="try it", effect="dryrun") == len(CONTENT)
        assert "'try it'" in caplog.text
        answer = await cache.get("/v2/mallory/pub/manifests/1")
        assert (answer.status, "'in earnest'" in message(answer)) == (403, True)
        assert cache.metric("rule_hits_total", rule="in earnest", effect="denied") == 1
        assert cache.metric("rule_hits_total", rule="allow it") == 0


async def test_rules_come_before_credentials(tmp_path: Path, registry: PrivateRegistry, stock: Stock) -> None:
    """Where an upstream is ``verify``: who has a right there is denied all the same, and the registry hears nothing."""
    rules = [rule("not here", f"{UPSTREAM}/{APP}", "deny")]
    async with listening(tmp_path, with_access(registry, "verify"), rules=rules, externalURL=EXTERNAL) as cache:
        for headers in (ALICE.headers, [], WRONG.headers):
            for path in parts(APP, stock.app).values():
                answer = await cache.get(path, headers)
                assert answer.status == 403
                assert challenges(answer) == []
        assert registry.requests == []
        assert (await cache.get(parts(LIB, stock.lib)["tag"], ALICE.headers)).status == 200


# --- what explain tells ---


async def explained(cache: Served, image: str) -> tuple[dict[str, Any], WireResponse]:
    """What the admin listener says of an image."""
    answer = await cache.admin(f"/explain?image={image}")
    assert answer.status == (200 if image else 400)
    return json.loads(answer.body), answer


async def test_explain_names_the_source_and_what_upstream_said_last_and_never_the_secret(
    tmp_path: Path, registry: PrivateRegistry, stock: Stock
) -> None:
    """The registry that repeats the secret in its refusal included."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"auths": {f"{UPSTREAM}/team": {"username": "team", "password": "t3am-c4n4ry"}}}))
    secrets = [secret_for(tmp_path), {"file": str(config)}]
    registry.allow(Account("team", "t3am-c4n4ry"), LIB)
    section = with_access(registry, "shared", section={"timeouts": QUICK})
    rules = [rule("try", f"{UPSTREAM}/team/*", "deny", dryRun=True)]
    async with listening(tmp_path, section, imagePullSecrets=secrets, rules=rules) as cache:
        said, _ = await explained(cache, f"{UPSTREAM}/{APP}:1")
        assert said["image"].startswith(f"{UPSTREAM}/{APP}")
        assert (said["access"], said["allowed"], said["rule"], said["dryRunDenied"]) == ("shared", True, None, "try")
        assert (said["upstream"]["name"], said["upstream"]["endpoints"]) == (UPSTREAM, [registry.url])
        assert [each["registry"] for each in said["credentials"]] == [f"{UPSTREAM}/team", UPSTREAM]
        assert [str(config) in each["source"] for each in said["credentials"]] == [True, False]
        assert [each["upstreamSaid"] for each in said["credentials"]] == [None, None]
        assert registry.requests == [], "nobody is asked for it"

        assert (await cache.get(parts(APP, stock.app)["tag"])).status == 200
        said, _ = await explained(cache, f"{UPSTREAM}/{APP}:1")
        refused_one, taken = (each["upstreamSaid"] for each in said["credentials"])
        assert re.search(r"answered 401", refused_one)
        assert re.search(r"answered 200", taken)

        echo = f"who is t3am-c4n4ry or {PROXYS.password} or {PROXYS.header} {' '.join(registry.given)}"
        registry.fault = oci_error(403, "DENIED", echo)
        await cache.get(f"/v2/{APP}/manifests/2")
        said, answer = await explained(cache, f"{UPSTREAM}/{APP}:1")
        assert any("403" in each["upstreamSaid"] for each in said["credentials"])
        for text in ("c4n4ry", PROXYS.password, PROXYS.header, *registry.given):
            assert text not in answer.body.decode()

        registry.fault = status(503)
        await cache.get(f"/v2/{LIB}/manifests/1")
        said, _ = await explained(cache, f"{UPSTREAM}/{LIB}:1")
        assert any("503" in (each["upstreamSaid"] or "") for each in said["credentials"])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("", "image"),
        ("UPPER/case", "UPPER"),
        ("unknown.test/app:1", "unknown.test"),
        ("a b c", ""),
        ("%00%0a", ""),
        ("x" * 3000, ""),
    ],
)
async def test_explain_of_what_is_no_image_says_so(
    tmp_path: Path, registry: PrivateRegistry, image: str, words: str
) -> None:
    async with listening(tmp_path, upstream(registry)) as cache:
        said, _ = await explained(cache, image.replace(" ", "%20"))
        assert words in said["error"] or words == "image"


async def test_explain_tells_nothing_of_what_clients_show(tmp_path: Path, registry: PrivateRegistry, stock: Stock) -> None:
    async with listening(tmp_path, with_access(registry, "verify"), externalURL=EXTERNAL) as cache:
        for headers in (ALICE.headers, WRONG.headers):
            await cache.get(parts(APP, stock.app)["tag"], headers)
        said, answer = await explained(cache, f"{UPSTREAM}/{APP}")
        assert (said["access"], said["credentials"]) == ("verify", [])
        assert b"c4n4ry" not in answer.body
        assert b"alice" not in answer.body
