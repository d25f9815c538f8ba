"""The composition root: a configuration in, one running cache out. Every object of the program is made here."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from proxy import files
from proxy.access.attempts import Attempts
from proxy.access.gate import Gate
from proxy.access.handles import Handles
from proxy.access.htpasswd import HtpasswdInvalid, Users, parse_htpasswd
from proxy.access.proofs import Access
from proxy.admin import Action, AdminToken, AdminTokenUnusable
from proxy.admission import Admission
from proxy.certificates import CertificateUnusable, ServerTLS, load
from proxy.config.file import ConfigError
from proxy.config.model import AdminListenerConfig, Config, ListenerConfig
from proxy.credentials.credential import Credential
from proxy.credentials.helpers import CredentialHelpers
from proxy.credentials.providers import Provider, ProviderConfigInvalid, Providers, parse_provider_config
from proxy.credentials.secrets import PullSecrets
from proxy.edge import Edge, Route
from proxy.explain import Explain
from proxy.fetch import Fetcher
from proxy.globs import idle_rules
from proxy.handlers import Handlers
from proxy.image_pull_policy import PullPolicies
from proxy.listener import Listener
from proxy.metrics import Metrics
from proxy.policy import Routes, Staleness
from proxy.pull.blobs import Blobs
from proxy.pull.discovery import Discovery
from proxy.pull.images import Images
from proxy.pull.links import Links
from proxy.pull.manifests import Manifests
from proxy.rules import Rules
from proxy.storage.space import Limits
from proxy.storage.store import Store
from proxy.threads import Threads
from proxy.upstream.client import Upstream
from proxy.upstream.tls import TLSFileUnusable
from proxy.watch import Watch, when_changed

log = logging.getLogger(__name__)

TOKEN_PATH = "/token"  # noqa: S105 - a path
_HANDLE_LIFE = 270.0
_TIDY_EVERY = 5.0
_SWEEP_EVERY = 30.0  # seconds; together 5 minutes


@dataclass(frozen=True, slots=True)
class Cache:
    """A cache that is ready to be listened for."""

    listener: Listener
    metrics: Metrics
    reload: Callable[[], None]
    actions: Mapping[str, Action]
    """What operators may ask for, by the path of the admin listener."""
    tls: ServerTLS | None
    admin_tls: ServerTLS | None
    admin_token: AdminToken | None


def routes_of(config: Config) -> Routes:
    """The closed list of names that requests may use."""
    prefixes = {form: upstream.name for upstream in config.upstreams for form in (upstream.name, upstream.prefix)}
    return Routes(prefixes, frozenset(upstream.name for upstream in config.upstreams), config.default_name)


def endpoints(handlers: Handlers, *, gives_tokens: bool) -> list[Route]:
    """The paths of the registry API. Raw paths: an encoded character is in no name, so it is in no path (T36)."""
    routes = [
        Route("base", re.compile(r"/v2/?"), handlers.base),
        Route("manifest", re.compile(r"/v2/(?P<name>[^%\\]+)/manifests/(?P<reference>[^/%\\]+)"), handlers.manifest),
        Route("blob", re.compile(r"/v2/(?P<name>[^%\\]+)/blobs/(?P<digest>[^/%\\]+)"), handlers.blob),
        Route("tags", re.compile(r"/v2/(?P<name>[^%\\]+)/tags/list"), handlers.tags),
        Route("referrers", re.compile(r"/v2/(?P<name>[^%\\]+)/referrers/(?P<digest>[^/%\\]+)"), handlers.referrers),
        Route("other", re.compile(r"/v2/.*", re.DOTALL), handlers.not_offered),
    ]
    if gives_tokens:
        routes.append(Route("token", re.compile(TOKEN_PATH), handlers.token, is_open=True, takes_form=True))
    return routes


@asynccontextmanager
async def build(config: Config) -> AsyncIterator[Cache]:
    """The whole object graph, taken down in reverse order.

    Raises ``DirectoryUnusable``, ``CatalogTooNew``, ``TLSFileUnusable``, ``CertificateUnusable``, ``HtpasswdInvalid`` or
    ``ConfigError``.
    """
    metrics = Metrics()
    instance = f"pullcache-{secrets.token_hex(8)}"
    timer = asyncio.get_running_loop().time
    async with AsyncExitStack() as stack:
        limits = Limits(config.cache.max_size, config.cache.min_free)
        store = Store.open(config.cache.directory, metrics, limits, timer)
        stack.callback(store.close)
        threads = Threads()
        stack.callback(threads.close)  # before the store: what runs in a thread uses it
        watch = Watch(config.reread_files_every, metrics)
        upstreams: dict[str, Upstream] = {}

        def secrets_changed(gone: Collection[Credential]) -> None:
            access.forget_secret()
            for upstream in upstreams.values():
                upstream.ask_again()
                for credential in gone:
                    upstream.forget(credential)

        pull_secrets = await pull_secrets_of(config, threads, stack, secrets_changed)
        access = Access(store, threads, Attempts(timer), pull_secrets.concerns, timer)
        stack.push_async_callback(access.close)
        watch.add("pull secrets", pull_secrets.reread)
        await watch.look()
        check_access(config, pull_secrets)
        for line in warnings_of(config, pull_secrets):
            log.warning("%s", line)
        for settings in config.upstreams:
            upstream = upstreams[settings.name] = Upstream(settings, metrics, instance, pull_secrets.lookup, config.backoff)
            stack.push_async_callback(upstream.close)
            if settings.tls_files:
                reread = when_changed(settings.tls_files, upstream.use_files_again, TLSFileUnusable, threads)
                watch.add(f"certificates of {settings.name}", reread)
        slots = {settings.name: settings.max_concurrent_fetches for settings in config.upstreams}
        call_later = asyncio.get_running_loop().call_later
        admission = Admission(config.image_limit, slots, config.queue_timeout, timer, call_later, metrics)
        fetcher = Fetcher(store, threads, metrics, admission, config.cache.max_blob_size)
        stack.push_async_callback(fetcher.close)
        handles = Handles(timer, _HANDLE_LIFE)
        gate = _gate_of(config, handles, stack, watch, threads)
        stack.push_async_callback(gate.close)
        policies = PullPolicies(config)
        staleness = Staleness(config.stale_if_error, config.max_stale, config.deleted_grace)
        links = Links(upstreams, store, threads, metrics)
        images = Images(store, timer, are_counted=config.image_limit is not None)
        handlers = Handlers(
            upstreams,
            gate,
            Rules(config.rules),
            policies,
            access,
            store,
            Manifests(links, store, threads, metrics, staleness),
            Blobs(links, store, fetcher, images),
            Discovery(upstreams, store, threads, metrics, staleness),
            images,
            routes_of(config),
            metrics,
            instance,
        )
        routes = endpoints(handlers, gives_tokens=config.verifies)
        edge = Edge(routes, gate, metrics, is_fronted=config.listener.tls_terminated_in_front)
        for task in (watch.run(), _sweep(handles, upstreams), _tidy(store, threads)):
            stack.push_async_callback(_end, asyncio.create_task(task))
        tls = _tls_of("listener", config.listener, watch, threads)
        admin_tls = _tls_of("adminListener", config.admin_listener, watch, threads)
        explain = Explain(handlers.routes, upstreams, handlers.rules, policies, staleness, pull_secrets, store)

        actions = {"/explain": Action(explain.answer)}

        def reload() -> None:
            pull_secrets.renew()
            watch.soon()
            for upstream in upstreams.values():
                upstream.ask_again()

        yield Cache(Listener(edge, metrics), metrics, reload, actions, tls, admin_tls, _token_of(config, watch, threads))


async def pull_secrets_of(
    config: Config, threads: Threads, stack: AsyncExitStack, changed: Callable[[Collection[Credential]], None]
) -> PullSecrets:
    """The pull secrets that a configuration names, not read yet; raises ``ConfigError``."""
    timer = asyncio.get_running_loop().time
    helpers = CredentialHelpers(timer)
    stack.push_async_callback(helpers.close)
    directory = Path()
    plugins: tuple[Provider, ...] = ()
    if (settings := config.image_credential_provider) is not None:
        directory = settings.bin_directory
        try:
            plugins = parse_provider_config(files.read(settings.config_file), str(settings.config_file))
        except (OSError, ProviderConfigInvalid) as error:
            raise ConfigError([f"imageCredentialProvider.configFile: {error}"]) from None
    providers = Providers(plugins, directory, timer)
    stack.push_async_callback(providers.close)
    return PullSecrets(config.image_pull_secrets, helpers, providers, threads, timer, changed)


def check_access(config: Config, pull_secrets: PullSecrets) -> None:
    """Raises ``ConfigError`` where there is a secret for an upstream, and nobody has said whom it serves."""
    faults = [
        f"upstreams[{number}].access: there is a pull secret for {upstream.name}; say whom it serves: 'public' (it raises "
        "the quota only: what upstream does not give to the anonymous is refused), 'verify' (what it does not give to the "
        "anonymous is given to clients whose own credential it accepts) or 'shared' (everybody who may use the listener "
        "gets what the secret opens)"
        for number, upstream in enumerate(config.upstreams)
        if upstream.access is None and pull_secrets.concerns(upstream)
    ]
    if faults:
        raise ConfigError(faults)


def warnings_of(config: Config, pull_secrets: PullSecrets) -> list[str]:
    """A line for each thing that may be meant, and hardly is."""
    return idle_rules_of(config) + [
        f"upstreams[{number}].access: shared, and no pull secret is for {upstream.name}: what is private there is refused; "
        "do the keys in the secret name that registry?"
        for number, upstream in enumerate(config.upstreams)
        if upstream.access is not None
        and upstream.access.mode == "shared"
        and upstream.client_cert_file is None
        and not pull_secrets.concerns(upstream)
    ]


def idle_rules_of(config: Config) -> list[str]:
    """A line for each rule that decides nothing."""
    names = [upstream.name for upstream in config.upstreams]
    policies = [rule.match for rule in config.image_pull_policy.rules]
    rules, passing = [rule.match for rule in config.rules], {at for at, rule in enumerate(config.rules) if rule.dry_run}
    idle = idle_rules("imagePullPolicy.rules", policies, names, is_tagged=True)
    return idle + idle_rules("rules", rules, names, passing=passing)


def read_htpasswd(path: Path) -> dict[str, bytes]:
    """The users of the listener; blocks; raises ``HtpasswdInvalid``."""
    try:
        return parse_htpasswd(files.read(path), f"listener.htpasswdFile {path}")
    except OSError as error:
        raise HtpasswdInvalid(f"listener.htpasswdFile {path}: cannot be read: {error.strerror}") from None


def _gate_of(config: Config, handles: Handles, stack: AsyncExitStack, watch: Watch, threads: Threads) -> Gate:
    timer = asyncio.get_running_loop().time
    users = None
    if (path := config.listener.htpasswd_file) is not None:
        read = partial(read_htpasswd, path)
        users = Users(read(), timer)
        stack.callback(users.close)
        watch.add("htpasswd", when_changed([path], lambda: users.use(read()), HtpasswdInvalid, threads))
    token_url = f"{config.external_url}{TOKEN_PATH}" if config.verifies else None
    wrong = Attempts(timer, per_upstream=10_000)  # many who are wrong must not lock out one more
    return Gate(config.listener.realm, users, config.listener.users, token_url, handles, wrong)


def _token_of(config: Config, watch: Watch, threads: Threads) -> AdminToken | None:
    if (path := config.admin_listener.token_file) is None:
        return None
    token = AdminToken(path)
    watch.add("admin token", when_changed([path], token.reread, AdminTokenUnusable, threads))
    return token


def _tls_of(
    section: str, settings: ListenerConfig | AdminListenerConfig, watch: Watch, threads: Threads
) -> ServerTLS | None:
    if settings.tls_cert_file is None:
        return None
    read = partial(load, section, settings.tls_cert_file, settings.tls_key_file, settings.client_ca_file)
    tls = ServerTLS(read())
    named = (settings.tls_cert_file, settings.tls_key_file, settings.client_ca_file)

    def reread() -> None:
        material = read()
        if material.warning:
            log.warning("%s", material.warning)
        tls.use(material)

    paths = [path for path in named if path is not None]
    watch.add(f"{section} certificates", when_changed(paths, reread, CertificateUnusable, threads))
    return tls


async def _sweep(handles: Handles, upstreams: Mapping[str, Upstream]) -> None:
    """Sees to it that no client's credential outlives its time in memory, whether anybody asks again or not."""
    while True:
        await asyncio.sleep(_SWEEP_EVERY)
        handles.drop_expired()
        for upstream in upstreams.values():
            upstream.drop_expired()


async def _tidy(store: Store, threads: Threads) -> None:
    """Writes down what was pulled, and makes room where it is short."""
    while True:
        await asyncio.sleep(_TIDY_EVERY)
        await threads.run(store.tidy)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
