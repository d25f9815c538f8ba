"""Our own TLS: bad files are named before they are used, and new ones hold for every handshake that follows."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from proxy import certificates
from proxy.certificates import CertificateUnusable, Material, ServerTLS, load, user_of

NAMES = ("localhost", "127.0.0.1", "::1")
DAY = datetime.timedelta(days=1)


class Party:
    """An authority with a server certificate of its own, and clients."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.authority = trustme.CA()
        self.ca = self.write("ca.pem", self.authority.cert_pem.bytes())
        self.certificate, self.key = self.issue("server", self.authority.issue_cert(*NAMES))

    def write(self, name: str, content: bytes) -> Path:
        """A file in its directory."""
        path = self.directory / name
        path.write_bytes(content)
        return path

    def issue(self, stem: str, leaf: trustme.LeafCert) -> tuple[Path, Path]:
        """A chain and its key, as files."""
        chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
        return self.write(f"{stem}.pem", chain), self.write(f"{stem}.key", leaf.private_key_pem.bytes())

    def material(self, clients_of: Party | None = None) -> Material:
        """Its own pair, with clients of the given party only."""
        return load("listener", self.certificate, self.key, clients_of.ca if clients_of else None)

    def client(self, shown: Party | None = None, name: str = "alice") -> ssl.SSLContext:
        """A client that trusts this party, and shows a certificate of another."""
        context = ssl.create_default_context(cafile=self.ca)
        if shown is not None:
            context.load_cert_chain(*shown.issue("client", shown.authority.issue_cert("c.test", common_name=name)))
        return context


@pytest.fixture
def old(tmp_path: Path) -> Party:
    return Party(tmp_path / "old")


@pytest.fixture
def new(tmp_path: Path) -> Party:
    return Party(tmp_path / "new")


def handshake(
    server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost", session: ssl.SSLSession | None = None
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """Both ends of a connection after a word each way; raises ``SSLError`` if either end refuses the other."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    theirs = client.wrap_bio(to_client, to_server, server_hostname=name, session=session)
    for _ in range(3):
        for end in (theirs, ours):
            with contextlib.suppress(ssl.SSLWantReadError):
                end.do_handshake()
    ours.write(b"a")
    assert theirs.read(1) == b"a"
    return ours, theirs


def accepts(server: ssl.SSLContext, client: ssl.SSLContext, name: str = "localhost") -> bool:
    """Whether the two come together."""
    try:
        handshake(server, client, name)
    except ssl.SSLError:
        return False
    return True


def test_what_fits_is_loaded(old: Party) -> None:
    material = old.material(old)
    assert material.warning is None
    assert (material.certificate, material.key) == (old.certificate.read_bytes(), old.key.read_bytes())
    assert material == old.material(old)
    assert material != old.material()
    assert b"PRIVATE KEY" in material.key
    assert "PRIVATE KEY" not in repr(material)


@pytest.mark.parametrize("key_first", [True, False])
def test_certificate_and_key_may_be_one_file(old: Party, key_first: bool) -> None:
    parts = [old.key.read_bytes(), old.certificate.read_bytes()]
    both = old.write("both.pem", b"\xc3\xa9 a note\n" + b"".join(parts if key_first else reversed(parts)))
    material = load("listener", both, None, None)
    assert "PRIVATE KEY" not in repr(material)
    assert accepts(ServerTLS(material).context, old.client())


@pytest.mark.parametrize(
    ("certificate", "key", "client_ca", "named"),
    [
        pytest.param("absent", "server.key", None, ["tlsCertFile", "absent", "No such file"], id="no-certificate-file"),
        pytest.param("server.pem", "absent", None, ["tlsKeyFile", "absent", "No such file"], id="no-key-file"),
        pytest.param("server.pem", "server.key", "absent", ["clientCAFile", "absent", "No such file"], id="no-CA-file"),
        pytest.param("", "server.key", None, ["tlsCertFile", "directory"], id="a-directory"),
        pytest.param("empty", "server.key", None, ["tlsCertFile", "empty", "PEM"], id="empty-certificate"),
        pytest.param("der", "server.key", None, ["tlsCertFile", "der", "PEM"], id="DER"),
        pytest.param("cut", "server.key", None, ["tlsCertFile", "cut", "PEM"], id="certificate-cut-off"),
        pytest.param("server.key", "server.key", None, ["tlsCertFile", "server.key", "PEM"], id="key-in-its-place"),
        pytest.param("server.pem", "empty", None, ["tlsKeyFile", "empty", "PEM"], id="empty-key"),
        pytest.param("server.pem", "server.pem", None, ["tlsKeyFile", "server.pem", "PEM"], id="certificate-for-a-key"),
        pytest.param("server.pem", None, None, ["tlsCertFile", "no private key", "listener.tlsKeyFile"], id="no-key"),
        pytest.param("server.pem", "broken.key", None, ["tlsKeyFile", "broken.key"], id="broken-key"),
        pytest.param("server.pem", "other.key", None, ["tlsCertFile", "tlsKeyFile", "other.key", "belong"], id="other-key"),
        pytest.param("server.pem", "encrypted.key", None, ["tlsKeyFile", "encrypted.key", "passphrase"], id="encrypted"),
        pytest.param(
            "encrypted.both", None, None, ["tlsCertFile", "encrypted.both", "passphrase"], id="encrypted-in-one-file"
        ),
        pytest.param(
            "old-encrypted.both", None, None, ["tlsCertFile", "old-encrypted.both", "passphrase"], id="encrypted-PKCS1"
        ),
        pytest.param("server.pem", "server.key", "empty", ["clientCAFile", "empty", "PEM"], id="empty-CA"),
        pytest.param("server.pem", "server.key", "server.key", ["clientCAFile", "server.key", "PEM"], id="key-for-a-CA"),
        pytest.param("huge", "server.key", None, ["tlsCertFile", "huge", "1 MiB"], id="huge"),
    ],
)
def test_what_does_not_fit_is_named_with_its_key_and_no_secret(
    old: Party, certificate: str, key: str | None, client_ca: str | None, named: list[str]
) -> None:
    leaf = old.authority.issue_cert(*NAMES)
    private = serialization.load_pem_private_key(old.key.read_bytes(), None)
    encrypted, older = (
        private.private_bytes(serialization.Encoding.PEM, kind, serialization.BestAvailableEncryption(b"canary"))
        for kind in (serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL)
    )
    chain, secret = old.certificate.read_bytes(), old.key.read_bytes()
    old.write("empty", b"")
    old.write("der", ssl.PEM_cert_to_DER_cert(old.certificate.read_text()))
    old.write("cut", chain[:300])
    old.write("broken.key", secret.replace(b"\nM", b"\nA"))
    old.write("other.key", leaf.private_key_pem.bytes())
    old.write("encrypted.key", encrypted)
    old.write("encrypted.both", chain + encrypted)
    old.write("old-encrypted.both", older + chain)
    old.write("huge", chain + b"#" * 1024 * 1024)
    paths = [old.directory / name if name is not None else None for name in (certificate, key, client_ca)]
    assert paths[0] is not None
    with pytest.raises(CertificateUnusable) as caught:
        load("listener", paths[0], paths[1], paths[2])
    message = str(caught.value)
    assert message.startswith("listener.")
    for part in named:
        assert part in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    for line in (secret + encrypted + older).splitlines():
        assert len(line) < 20 or line.startswith(b"-----") or line.decode() not in message


@pytest.mark.parametrize(
    ("begins", "ends", "why"),
    [(-30 * DAY, -DAY, "certificate has expired"), (DAY, 30 * DAY, "certificate is not yet valid")],
)
def test_a_certificate_out_of_its_time_is_a_warning(
    old: Party, begins: datetime.timedelta, ends: datetime.timedelta, why: str
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    leaf = old.authority.issue_cert(*NAMES, not_before=now + begins, not_after=now + ends)
    certificate, key = old.issue("bad", leaf)
    material = load("adminListener", certificate, key, None)
    assert material.warning is not None
    assert material.warning.startswith(f"adminListener.tlsCertFile {certificate}: ")
    assert why in material.warning
    unwarned = Material(material.certificate, material.key, None)
    assert material == unwarned, "content alone is compared"


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
def test_new_handshakes_use_the_new_pair_in_the_same_context(old: Party, new: Party, name: str) -> None:
    tls = ServerTLS(old.material())
    context = tls.context
    assert accepts(context, old.client(), name)
    tls.use(new.material())
    assert tls.context is context
    assert accepts(context, new.client(), name)
    assert not accepts(context, old.client(), name)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1"])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_another_client_ca_ends_what_the_old_one_allowed(old: Party, new: Party, name: str, version: ssl.TLSVersion) -> None:
    """Also for clients that send no server name, and those that go on with a session begun under the old one."""
    tls = ServerTLS(old.material(clients_of=old))
    of_old, of_new, nobody = old.client(shown=old), old.client(shown=new), old.client()
    for client in (of_old, of_new, nobody):
        client.minimum_version = client.maximum_version = version
    assert [accepts(tls.context, each, name) for each in (of_old, of_new, nobody)] == [True, False, False]
    session = handshake(tls.context, of_old, name)[1].session
    assert session is not None
    assert handshake(tls.context, of_old, name, session)[1].session_reused, "without an exchange sessions go on"
    tls.use(old.material(clients_of=new))
    assert [accepts(tls.context, each, name) for each in (of_old, of_new, nobody)] == [False, True, False]
    with pytest.raises(ssl.SSLError):
        handshake(tls.context, of_old, name, session)


def test_a_client_ca_may_come_and_go(old: Party, new: Party) -> None:
    tls = ServerTLS(old.material())
    assert accepts(tls.context, old.client())
    tls.use(old.material(clients_of=new))
    assert not accepts(tls.context, old.client())
    assert accepts(tls.context, old.client(shown=new))
    tls.use(old.material())
    assert accepts(tls.context, old.client())


def test_an_open_connection_goes_on(old: Party, new: Party) -> None:
    tls = ServerTLS(old.material())
    ours, theirs = handshake(tls.context, old.client())
    tls.use(new.material(clients_of=new))
    theirs.write(b"still here")
    assert ours.read(10) == b"still here"


def test_material_that_is_no_use_changes_nothing(old: Party, new: Party) -> None:
    tls = ServerTLS(old.material())
    with pytest.raises(ssl.SSLError):
        tls.use(Material(new.certificate.read_bytes(), old.key.read_bytes(), None))
    assert accepts(tls.context, old.client())


def test_tls_1_2_at_least_and_http_1_1(old: Party) -> None:
    context = ServerTLS(old.material()).context
    client = old.client()
    client.set_alpn_protocols(["h2", "http/1.1"])
    assert handshake(context, client)[1].selected_alpn_protocol() == "http/1.1"
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    assert handshake(context, client)[1].version() == "TLSv1.2"
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_1
    client.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        handshake(context, client)


@contextlib.asynccontextmanager
async def serving(context: ssl.SSLContext) -> AsyncIterator[int]:
    """A server on loopback that says who its client is; yields its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{user_of(writer.get_extra_info('peercert'))}\n".encode())
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


async def ask(port: int, client: ssl.SSLContext, host: str) -> str:
    """What the server says to a client that names it so, nothing if either refuses; an IP address is not sent as a name."""
    async with asyncio.timeout(30):
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname=host)
            try:
                return (await reader.readline()).decode().strip()
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    return ""


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_a_running_server_takes_the_new_pair_and_ca(old: Party, new: Party, host: str) -> None:
    tls = ServerTLS(old.material(clients_of=old))
    async with serving(tls.context) as port:
        assert await ask(port, old.client(shown=old), host) == "alice"
        tls.use(new.material(clients_of=new))
        assert await ask(port, new.client(shown=new, name="bob"), host) == "bob"
        for client in (old.client(shown=new), new.client(shown=old), new.client()):
            assert await ask(port, client, host) == ""


async def test_a_server_without_client_ca_knows_nobody(old: Party) -> None:
    async with serving(ServerTLS(old.material()).context) as port:
        assert await ask(port, old.client(shown=old), "localhost") == "None"


def test_files_exchanged_between_two_readings_are_not_mixed(
    old: Party, new: Party, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mounted Secret is exchanged by its symlink; here each time the certificate has been read, and the key not yet."""
    mounted = tmp_path / "mounted"
    mounted.symlink_to(old.directory)
    read, left = certificates._read, 3

    def swap(name: str, path: Path) -> bytes:
        nonlocal left
        content = read(name, path)
        if "tlsCertFile" in name and left:
            left -= 1
            fresh = tmp_path / "fresh"
            fresh.symlink_to(new.directory if mounted.readlink() == old.directory else old.directory)
            os.replace(fresh, mounted)
        return content

    monkeypatch.setattr(certificates, "_read", swap)
    assert load("listener", mounted / "server.pem", mounted / "server.key", mounted / "ca.pem") == new.material(new)
    left = 1_000_000
    with pytest.raises(CertificateUnusable, match="changed with each reading"):
        load("listener", mounted / "server.pem", mounted / "server.key", None)


@pytest.mark.parametrize(
    ("certificate", "user"),
    [
        pytest.param(None, None, id="no-certificate"),
        pytest.param({}, None, id="empty"),
        pytest.param({"subject": ()}, None, id="no-subject"),
        pytest.param({"subject": ((("organizationName", "o"),),)}, None, id="no-common-name"),
        pytest.param({"subject": ((("organizationName", "o"),), (("commonName", "alice"),))}, "alice", id="common-name"),
        pytest.param({"subject": ((("commonName", ""),),)}, None, id="empty-common-name"),
        pytest.param({"subject": ((("commonName", "alice"),), (("commonName", "bob"),))}, None, id="two-are-nobody"),
        pytest.param({"subject": ((("commonName", "alice"), ("commonName", "bob")),)}, None, id="two-in-one-part"),
        pytest.param({"issuer": ((("commonName", "alice"),),)}, None, id="the-issuer-is-not-the-user"),
    ],
)
def test_a_user_is_the_one_common_name(certificate: dict[str, object] | None, user: str | None) -> None:
    assert user_of(certificate) == user
