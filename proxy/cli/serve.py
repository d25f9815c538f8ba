"""``pullcache serve``: runs the server, and says at the terminal how to point clients at it."""

from __future__ import annotations

import asyncio
import logging

import click

from proxy import logs
from proxy.access.htpasswd import HtpasswdInvalid
from proxy.admin import AdminTokenUnusable
from proxy.certificates import CertificateUnusable
from proxy.config.file import ConfigError
from proxy.config.model import Config
from proxy.names import DOCKER_HUB
from proxy.serve import CannotStart, serve
from proxy.storage.database import CatalogTooNew
from proxy.storage.layout import DirectoryUnusable

log = logging.getLogger(__name__)

REFUSALS = (
    CannotStart,
    ConfigError,
    DirectoryUnusable,
    CatalogTooNew,
    CertificateUnusable,
    HtpasswdInvalid,
    AdminTokenUnusable,
    OSError,
)
"""Why a start is refused; each text names what, where, and what to do."""


def run(config: Config) -> int:
    """Serves; the exit code."""
    logs.set_up(config.log.format, config.log.level)
    try:
        asyncio.run(serve(config, announce))
    except REFUSALS as error:
        click.echo(f"pullcache cannot start: {error}", err=True)
        return 2
    return 0


def announce(config: Config) -> None:
    """Says where the cache listens, what is dangerous about it, and how it is used."""
    if not config.listen.is_loopback and not config.listener.is_guarded:
        log.warning(
            "listen: %s is reachable from other machines, and everybody who reaches it can pull; a firewall or a network "
            "policy should let only your nodes through",
            config.listen,
        )
    if not config.admin.is_loopback and config.admin_listener.tls_cert_file is None:
        log.warning("admin: %s is without TLS; whoever is on the line can read the token of adminListener", config.admin)
    for upstream in config.upstreams:
        if upstream.insecure_skip_verify:
            log.warning("upstream %s: insecureSkipVerify is on; whoever is on the line can pose as it", upstream.name)
    log.info("serving on %s, admin on %s, cache in %s", config.listen, config.admin, config.cache.directory)
    if config.log.format == "text":
        click.echo(guide(config))


def guide(config: Config) -> str:
    """How to point containerd and Docker at this cache."""
    host = config.listen.host
    if host in ("", "0.0.0.0", "::"):  # noqa: S104 - told apart, not bound
        host = "THIS-MACHINE"
    scheme = "https" if config.listener.tls_cert_file else "http"
    url = config.external_url or f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.listen.port}"
    chosen = next((u for u in config.upstreams if u.name == config.default_name), config.upstreams[0])
    authority = url.partition("://")[2]
    lines = [
        f"pullcache serves {', '.join(upstream.name for upstream in config.upstreams)}",
        "",
        f"containerd: /etc/containerd/certs.d/{chosen.name}/hosts.toml (a folder for each registry; needs config_path)",
        f'  server = "{chosen.endpoints[-1]}"',
        f'  [host."{url}"]',
        '    capabilities = ["pull", "resolve"]',
    ]
    if config.default_name == DOCKER_HUB:
        lines += ["", "Docker: /etc/docker/daemon.json, then restart dockerd", f'  {{ "registry-mirrors": ["{url}"] }}']
    lines += ["", f"any client: {authority}/{chosen.prefix}/REPOSITORY:TAG"]
    return "\n".join(lines)
