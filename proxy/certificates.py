"""TLS of our own listeners: a certificate, its key and a client CA, checked when read and exchanged while serving."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

_MAX_SIZE = 1024 * 1024
_READINGS = 8


class CertificateUnusable(Exception):
    """A listener's TLS file cannot be used; the text names the configuration key, the file, why, and what to do."""


@dataclass(frozen=True, slots=True)
class Material:
    """What a listener's TLS files held at one moment, PEM; two with the same content are equal.

    ``warning`` is for people: what clients will hold against the certificate, such as its end. Nothing else is in its
    ``repr``.
    """

    certificate: bytes = field(repr=False)
    key: bytes = field(repr=False)
    client_ca: bytes | None = field(repr=False)
    warning: str | None = field(default=None, compare=False)


def load(prefix: str, certificate: Path, key: Path | None, client_ca: Path | None) -> Material:
    """What the files hold, proved to fit by a handshake in memory; blocks; raises ``CertificateUnusable``.

    ``prefix`` is the configuration section, ``listener`` or ``adminListener``. Without ``key`` it is in ``certificate``. A
    certificate that clients will refuse (it has expired, say) is a warning only: the time here may be what is wrong.
    """
    certificate_name = f"{prefix}.tlsCertFile {certificate}"
    key_name = f"{prefix}.tlsKeyFile {key}" if key else certificate_name
    ca_name = f"{prefix}.clientCAFile {client_ca}"
    files = {certificate_name: certificate, key_name: key or certificate}
    if client_ca is not None:
        files[ca_name] = client_ca
    contents = _read_together(files)
    material = Material(contents[certificate_name], contents[key_name], contents.get(ca_name))
    _check_certificates(certificate_name, material.certificate)
    if material.client_ca is not None:
        _check_certificates(ca_name, material.client_ca)
    if b"PRIVATE KEY-----" not in material.key:
        hint = "" if key else f"; add it, or name its file in {prefix}.tlsKeyFile"
        raise CertificateUnusable(f"{key_name}: holds no private key in PEM{hint}")
    pair = certificate_name if key is None else f"{certificate_name} with {key_name}"
    try:
        fault = _what_clients_hold_against(material)
    except _Encrypted:
        raise CertificateUnusable(
            f"{key_name}: the key is encrypted; give one without a passphrase, readable for pullcache only"
        ) from None
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            why = "the key does not belong to the certificate; give the two that were made together, the server's own first"
        else:
            why = f"{_reason(error)}; give an unbroken key, and one of a size and kind that TLS allows today"
        raise CertificateUnusable(f"{pair}: {why}") from None
    if fault is None:
        return material
    return replace(material, warning=f"{certificate_name}: clients will refuse it: {fault}; put a good one in its place")


class ServerTLS:
    """TLS of one listener. ``context`` stays the same object; ``use`` decides what handshakes that begin later use.

    TLS 1.2 at least, HTTP/1.1 by ALPN. With a client CA no handshake succeeds without a certificate of it. Neither an old
    client CA nor a session begun under it is accepted after ``use``; connections that are open stay as they are.
    """

    def __init__(self, material: Material) -> None:
        self._switch = _Switch(ssl.PROTOCOL_TLS_SERVER)
        self.use(material)

    @property
    def context(self) -> ssl.SSLContext:
        """What the server is started with."""
        return self._switch

    def use(self, material: Material) -> None:
        """Handshakes from now on are with ``material``; reads no file on disk."""
        self._switch.current = _context_of(material)


def user_of(certificate: Mapping[str, Any] | None) -> str | None:
    """The common name in a verified client certificate, as ``getpeercert`` gives it; None unless there is exactly one."""
    subject = (certificate or {}).get("subject", ())
    names = [value for part in subject for name, value in part if name == "commonName"]
    return str(names[0]) if len(names) == 1 and names[0] else None


class _Switch(ssl.SSLContext):
    """Gives each connection to the context of the moment.

    An ``SSLContext`` can neither forget a CA nor the sessions it gave, and one exchanged in a handshake
    (``sni_callback``) takes over neither the demand for a client certificate nor the keys of sessions (OpenSSL
    ``SSL_set_SSL_CTX``). This one holds no certificate itself: whatever went round it would fail.
    """

    current: ssl.SSLContext

    def wrap_bio(
        self,
        incoming: ssl.MemoryBIO,
        outgoing: ssl.MemoryBIO,
        server_side: bool = False,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLObject:
        return self.current.wrap_bio(incoming, outgoing, server_side, server_hostname, session)

    def wrap_socket(
        self,
        sock: socket.socket,
        server_side: bool = False,
        do_handshake_on_connect: bool = True,
        suppress_ragged_eofs: bool = True,
        server_hostname: str | bytes | None = None,
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLSocket:
        return self.current.wrap_socket(
            sock, server_side, do_handshake_on_connect, suppress_ragged_eofs, server_hostname, session
        )


class _Encrypted(Exception):
    pass


def _no_password() -> str:
    # Without this OpenSSL would ask at the terminal, and wait.
    raise _Encrypted


def _context_of(material: Material) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    with _as_file(material.certificate) as certificate, _as_file(material.key) as key:
        context.load_cert_chain(certificate, key, password=_no_password)
    if material.client_ca is not None:
        with _as_file(material.client_ca) as client_ca:
            context.load_verify_locations(client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _what_clients_hold_against(material: Material) -> str | None:
    """Why a client that trusts this very certificate would refuse it, None if it would not; raises ``SSLError``."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname = False
    trusting.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    with _as_file(material.certificate) as certificate:
        trusting.load_verify_locations(certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = _context_of(replace(material, client_ca=None)).wrap_bio(to_server, to_client, server_side=True)
    client = trusting.wrap_bio(to_client, to_server)
    try:
        for side in (client, server, client):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    return None


def _check_certificates(name: str, pem: bytes) -> None:
    try:
        with _as_file(pem) as path:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except ssl.SSLError as error:
        raise CertificateUnusable(f"{name}: holds no usable certificate in PEM ({_reason(error)})") from None


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or "unreadable").replace("_", " ").lower()


def _read_together(files: Mapping[str, Path]) -> dict[str, bytes]:
    """The content of all of them at one moment, by name.

    Two readings that agree: files exchanged between one and the next (a mounted Secret's symlink) cannot be mixed.
    """
    before: dict[str, bytes] = {}
    for _ in range(_READINGS):
        contents = {name: _read(name, path) for name, path in files.items()}
        if contents == before:
            return contents
        before = contents
    raise CertificateUnusable(
        f"{', '.join(files)}: changed with each reading; exchange them all at once, and not all the time"
    )


def _read(name: str, path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_SIZE + 1)
    except OSError as error:
        raise CertificateUnusable(
            f"{name}: cannot be read: {error.strerror}; pullcache needs the right to read it"
        ) from None
    if len(content) > _MAX_SIZE:
        raise CertificateUnusable(f"{name}: larger than 1 MiB; that is no certificate or key")
    return content


@contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """A path of this process alone that holds ``content``, in memory: OpenSSL reads certificates from files only."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        yield f"/proc/self/fd/{descriptor}"
