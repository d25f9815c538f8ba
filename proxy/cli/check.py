"""``pullcache check-config``: what is wrong, or may be, with the files that a good configuration names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

from proxy import app
from proxy.access.htpasswd import HtpasswdInvalid
from proxy.admin import AdminToken, AdminTokenUnusable
from proxy.certificates import CertificateUnusable, load
from proxy.config.file import ConfigError
from proxy.config.model import Config
from proxy.threads import Threads
from proxy.upstream.tls import TLSFileUnusable, context_of
from proxy.watch import Faults


def check(config: Config) -> tuple[list[str], list[str]]:
    """Faults (a line for each certificate, key, user file and pull secret that cannot be used) and warnings; reads all of
    the files."""
    checks: list[Callable[[], object]] = [partial(context_of, upstream) for upstream in config.upstreams]
    for section, listener in (("listener", config.listener), ("adminListener", config.admin_listener)):
        if listener.tls_cert_file is not None:
            checks.append(partial(load, section, listener.tls_cert_file, listener.tls_key_file, listener.client_ca_file))
    if config.listener.htpasswd_file is not None:
        checks.append(partial(app.read_htpasswd, config.listener.htpasswd_file))
    if config.admin_listener.token_file is not None:
        checks.append(partial(AdminToken, config.admin_listener.token_file))
    faults = []
    for each in checks:
        try:
            each()
        except (TLSFileUnusable, CertificateUnusable, HtpasswdInvalid, AdminTokenUnusable) as error:
            faults.append(str(error))
    more, warnings = asyncio.run(_secrets(config))
    return faults + more, warnings


async def _secrets(config: Config) -> tuple[list[str], list[str]]:
    faults: list[str] = []
    warnings: list[str] = []
    async with AsyncExitStack() as stack:
        threads = Threads()
        stack.callback(threads.close)
        try:
            pull_secrets = await app.pull_secrets_of(config, threads, stack, lambda _: None)
            try:
                await pull_secrets.reread()
            except Faults as unusable:
                faults += unusable.lines
            warnings = app.warnings_of(config, pull_secrets)
            app.check_access(config, pull_secrets)
        except ConfigError as error:
            faults += error.faults
    return faults, warnings
