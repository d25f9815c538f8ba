"""What an upstream's configuration means for TLS."""

from __future__ import annotations

import os
import ssl
from functools import lru_cache

from proxy.config.upstreams import UpstreamConfig


class TLSFileUnusable(OSError):
    """A certificate or key file cannot be used; the text names the upstream, the key and the file."""


def context_of(config: UpstreamConfig) -> ssl.SSLContext:
    """The context of every connection of one upstream; raises ``TLSFileUnusable``."""
    if not (config.ca_file or config.client_cert_file or config.insecure_skip_verify):
        return _shared(_stamp())
    context = _trusting_the_system()
    if config.ca_file:
        try:
            context.load_verify_locations(config.ca_file)
        except (OSError, ssl.SSLError) as error:
            raise _unusable(config, f"caFile {config.ca_file}", str(error)) from error
    if config.client_cert_file:
        files = f"clientCertFile {config.client_cert_file}"
        if config.client_key_file:
            files += f" with clientKeyFile {config.client_key_file}"
        try:
            context.load_cert_chain(config.client_cert_file, config.client_key_file, password=_no_password)
        except ssl.SSLError as error:
            reason = (error.reason or str(error)).replace("_", " ").lower()
            hint = "give PEM, and the key that belongs to the certificate (clientKeyFile)"
            raise _unusable(config, files, f"{reason}; {hint}") from error
        except (OSError, ValueError) as error:
            raise _unusable(config, files, str(error)) from error
    if config.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _trusting_the_system() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


@lru_cache(1)
def _shared(_: tuple[tuple[str, int], ...]) -> ssl.SSLContext:
    """Of all upstreams that have no files of their own: to read the system's authorities takes 20 ms for each context."""
    return _trusting_the_system()


def _stamp() -> tuple[tuple[str, int], ...]:
    """Another one when the system's authorities are others."""
    paths = ssl.get_default_verify_paths()
    return tuple((path, os.stat(path).st_mtime_ns) for path in (paths.cafile, paths.capath) if path)


def _no_password() -> str:
    # Without this OpenSSL would ask at the terminal, and wait.
    raise ValueError("the key is encrypted; give one without a passphrase, readable for pullcache only")


def _unusable(config: UpstreamConfig, what: str, why: str) -> TLSFileUnusable:
    return TLSFileUnusable(f"upstream {config.name}: {what} cannot be used: {why}")
