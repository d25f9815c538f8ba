"""Certificates and servers for TLS, good and bad."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import ssl
import struct
import warnings
from pathlib import Path
from types import TracebackType

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from .messages import Ending
from .recorder import authority

NAMES = ("localhost", "127.0.0.1", "::1")
DAY = datetime.timedelta(days=1)


class Authority:
    """A certificate authority in a directory, and server contexts with every kind of certificate."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ca_path = directory / "ca.pem"
        self._ca = trustme.CA()
        self._ca.cert_pem.write_to_path(str(self.ca_path))

    def client_context(self) -> ssl.SSLContext:
        """A client that trusts this authority only."""
        return ssl.create_default_context(cafile=str(self.ca_path))

    def pair(self, *names: str, stem: str = "server") -> tuple[Path, Path]:
        """A good certificate chain and its key, as files."""
        leaf = self._ca.issue_cert(*(names or NAMES))
        chain, key = self.directory / f"{stem}.pem", self.directory / f"{stem}.key"
        chain.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        leaf.private_key_pem.write_to_path(str(key))
        return chain, key

    def good(self, *names: str) -> ssl.SSLContext:
        """Valid for these names, else for all names of loopback."""
        return self._context(self._ca.issue_cert(*(names or NAMES)))

    def expired(self) -> ssl.SSLContext:
        """Good until yesterday."""
        now = datetime.datetime.now(datetime.UTC)
        return self._context(self._ca.issue_cert(*NAMES, not_before=now - 30 * DAY, not_after=now - DAY))

    def wrong_name(self) -> ssl.SSLContext:
        """Valid, but for somebody else."""
        return self.good("elsewhere.invalid")

    def foreign(self) -> ssl.SSLContext:
        """Valid, but by an authority nobody trusts."""
        return self._context(trustme.CA().issue_cert(*NAMES))

    def self_signed(self) -> ssl.SSLContext:
        """Right in everything, but vouched for by itself alone."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - DAY).not_valid_after(now + 30 * DAY)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate = builder.sign(key, hashes.SHA256())
        path = self.directory / "self-signed.pem"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            + certificate.public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    def outdated(self, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
        """A good certificate, but no version of TLS later than 1.1 (or the given one).

        Clients that insist on a later one are turned away by a close, without an alert.
        """
        context = self.good()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.set_ciphers("ALL:@SECLEVEL=0")
            context.minimum_version = version or ssl.TLSVersion.TLSv1
            context.maximum_version = version or ssl.TLSVersion.TLSv1_1
        return context

    @staticmethod
    def _context(leaf: trustme.LeafCert) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        leaf.configure_cert(context)
        return context


class HalfHandshake:
    """A TLS server that hears the client's hello, sends half of its own, and then ends or falls silent."""

    def __init__(self, context: ssl.SSLContext, how: Ending = "fin", host: str = "127.0.0.1") -> None:
        self.address = host
        self.port = 0
        self.attempts = 0
        self._context = context
        self._how = how
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The base URL."""
        return f"https://{authority(self.address, self.port)}"

    async def __aenter__(self) -> HalfHandshake:
        self._server = await asyncio.start_server(self._accept, self.address, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.attempts += 1
        task = asyncio.create_task(self._break_off(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: writer.transport.abort())  # one that is cancelled before it begins closes nothing

    async def _break_off(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            try:
                writer.write(await self._half_hello(reader))
                await writer.drain()
                if self._how == "stall":
                    await reader.read()
                elif self._how == "rst":
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            finally:
                writer.close()
                await writer.wait_closed()

    async def _half_hello(self, reader: asyncio.StreamReader) -> bytes:
        """The first half of what a real server would say first."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = self._context.wrap_bio(incoming, outgoing, server_side=True)
        while not outgoing.pending:
            data = await reader.read(4096)
            if not data:
                raise ConnectionResetError
            incoming.write(data)
            with contextlib.suppress(ssl.SSLWantReadError):
                session.do_handshake()
        return outgoing.read(outgoing.pending // 2)
