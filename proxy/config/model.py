"""The configuration: one frozen model of everything that an operator decides.

camelCase keys; where Kubernetes has a name for a thing, that name. Sizes are Kubernetes quantities, times are durations.
What is wrong of one key is found here; how the file is read, and what is wrong between keys, in ``file``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from proxy.config.upstreams import PUBLIC_REGISTRIES, UpstreamConfig
from proxy.config.values import (
    Address,
    Count,
    Duration,
    ExternalURL,
    Glob,
    Listener,
    LocalPath,
    MinFree,
    Period,
    Quantity,
    QueueTimeout,
    Section,
    write_duration,
)
from proxy.logs import LogFormat, LogLevel
from proxy.names import DOCKER_HUB, canonical_host


def _default_directory() -> Path:
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "pullcache"
    return Path("~/.cache/pullcache").expanduser()


class CacheConfig(Section):
    """Where content is kept."""

    directory: LocalPath = Field(default_factory=_default_directory)
    max_size: Quantity | None = Field(default=None, gt=0, description="the most that it takes; None: what the disk has")
    min_free: MinFree = Field(default="5%", description="what it leaves free of the disk, a quantity or a percentage")  # type: ignore[assignment]
    max_blob_size: Quantity = Field(default="128Gi", gt=0, description="larger blobs are refused")  # type: ignore[assignment]


class PullSecretSource(Section):
    """Where credentials for upstreams are: one of ``file``, ``directory``, or ``registry`` with a user and password."""

    file: LocalPath | None = None
    directory: LocalPath | None = None
    registry: str | None = Field(default=None, min_length=1)
    username: str | None = None
    password_file: LocalPath | None = None
    repositories: list[Glob] = Field(
        default_factory=list, description="used for these alone: globs over registry/repository"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if sum(where is not None for where in (self.file, self.directory, self.registry)) != 1:
            raise ValueError("exactly one of file, directory and registry is needed")
        if "@" in (self.registry or ""):
            raise ValueError("registry: a host, perhaps with port and path; its user is 'username'")
        if (self.registry is None) != (self.username is None) or (self.registry is None) != (self.password_file is None):
            raise ValueError("registry, username and passwordFile belong together")
        return self


class CredentialProviderConfig(Section):
    """The kubelet's credential provider plugins: what its two flags of that name say."""

    config_file: LocalPath
    bin_directory: LocalPath


class ListenerConfig(Section):
    """How clients connect, and who they must be."""

    tls_cert_file: LocalPath | None = None
    tls_key_file: LocalPath | None = None
    client_ca_file: LocalPath | None = Field(default=None, alias="clientCAFile")
    tls_terminated_in_front: bool = False
    htpasswd_file: LocalPath | None = None
    realm: str = Field(default="pullcache", pattern=r"^[ !#-\[\]-~]{1,128}$")
    users: dict[str, list[Glob]] = Field(
        default_factory=dict, description="what each may read: globs over registry/repository"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_tls(self.tls_cert_file, self.tls_key_file, self.client_ca_file)
        if self.users and not self.is_guarded:
            raise ValueError("users: nobody says who he is; give htpasswdFile, or clientCAFile")
        return self

    @property
    def is_guarded(self) -> bool:
        """Whether it knows who its clients are, and turns others away."""
        return self.htpasswd_file is not None or self.client_ca_file is not None


class AdminListenerConfig(Section):
    """How operators connect to ``admin``, and how they show that they are."""

    tls_cert_file: LocalPath | None = None
    tls_key_file: LocalPath | None = None
    client_ca_file: LocalPath | None = Field(default=None, alias="clientCAFile")
    token_file: LocalPath | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_tls(self.tls_cert_file, self.tls_key_file, self.client_ca_file)
        return self


def _check_tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> None:
    if certificate is None and (key is not None or client_ca is not None):
        raise ValueError("tlsKeyFile and clientCAFile need tlsCertFile beside them")


class RuleConfig(Section):
    """A rule on what may be pulled at all; the first that matches decides, and what none matches is allowed."""

    name: str = Field(min_length=1, max_length=128, examples=["name: nothing else from ghcr"])
    match: Glob = Field(description="a glob over registry/repository; * matches / too", examples=['match: "ghcr.io/corp/*"'])
    action: Literal["allow", "deny"]
    dry_run: bool = False


PullPolicy = Literal["Always", "IfNotPresent", "Never"]


class ImagePullPolicyRule(Section):
    """The policy of what ``match`` matches; the first that matches decides."""

    match: Glob = Field(
        description="a glob over registry/repository:tag; * matches / too", examples=['match: "ghcr.io/corp/*:main"']
    )
    policy: PullPolicy
    max_age: Period | None = Field(default=None, description="IfNotPresent: a tag held for longer is asked for again")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_age is not None and self.policy != "IfNotPresent":
            asked = "asks every time" if self.policy == "Always" else "never asks"
            raise ValueError(
                f"maxAge belongs to policy: IfNotPresent, and {self.policy} {asked}; write policy: IfNotPresent, or leave "
                "maxAge out"
            )
        return self


class ImagePullPolicyConfig(Section):
    """When a registry is asked about what is held, where that is not to be derived from the tag."""

    rules: list[ImagePullPolicyRule] = Field(
        default_factory=list, examples=['- {match: "ghcr.io/corp/*:main", policy: Always}']
    )


class BackoffConfig(Section):
    """ImagePullBackOff: how long nobody asks again for what an upstream failed to give, refused, or does not have."""

    initial: Period = Field(default="10s", description="after a first failure, doubling; 0s: asked each time")  # type: ignore[assignment]
    max: Period = Field(default="5m", description="the most that it grows to")  # type: ignore[assignment]
    not_found: Period = Field(default="10s", description="after a 404: a tag just pushed must appear")  # type: ignore[assignment]
    refused: Period = Field(default="10s", description="after a 401 or 403, for whom it was")  # type: ignore[assignment]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.initial > self.max:
            first, most = (write_duration(value) for value in (self.initial, self.max))
            of_first, of_most = ("" if key in self.model_fields_set else ", the default" for key in ("initial", "max"))
            raise ValueError(
                f"initial ({first}{of_first}) is longer than max ({most}{of_most}), the most that it grows to; write "
                f"initial: {most} or less, or max: {first} or more"
            )
        return self


class LogConfig(Section):
    """How log lines look."""

    format: LogFormat = "text"
    level: LogLevel = "info"


class Config(Section):
    """Everything that an operator decides."""

    listen: Listener = Address("127.0.0.1", 5000)
    admin: Listener = Address("127.0.0.1", 5001)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    default_upstream: str | None = None
    upstreams: list[UpstreamConfig] = Field(
        default_factory=lambda: [UpstreamConfig.model_validate({"name": name}) for name in PUBLIC_REGISTRIES],
        min_length=1,
        examples=["- name: docker.io"],
    )
    listener: ListenerConfig = ListenerConfig()
    admin_listener: AdminListenerConfig = AdminListenerConfig()
    external_url: ExternalURL | None = Field(default=None, alias="externalURL")
    image_pull_secrets: list[PullSecretSource] = Field(
        default_factory=list, examples=["- file: /etc/pullcache/registry-corp.yaml"]
    )
    image_credential_provider: CredentialProviderConfig | None = None
    reread_files_every: Duration = Field(default="5s", description="how often secrets and certificates are looked at")  # type: ignore[assignment]
    rules: list[RuleConfig] = Field(
        default_factory=list, examples=['- {name: nothing else from ghcr, match: "ghcr.io/*", action: deny}']
    )
    image_pull_policy: ImagePullPolicyConfig = Field(
        default=ImagePullPolicyConfig(), examples=['rules: [{match: "*", policy: Always}]']
    )
    always_pull_images: bool = Field(default=False, description="every tag is Always, whatever the rules say")
    offline: bool = Field(default=False, description="everything is Never: no registry is asked")
    serialize_image_pulls: bool | None = Field(default=None, description="one image after the other")
    max_parallel_image_pulls: Count | None = Field(default=None, description="so many images at once; None: any number")
    queue_timeout: QueueTimeout = Field(default="2m", description="what waits longer for its turn fails")  # type: ignore[assignment]
    stale_if_error: bool = Field(default=True, description="a held tag is served while its upstream fails")
    max_stale: Period | None = Field(default=None, description="unless it was confirmed longer ago")
    deleted_grace: Period = Field(default="0s", description="a held tag is served so long after its upstream said 404")  # type: ignore[assignment]
    backoff: BackoffConfig = BackoffConfig()
    log: LogConfig = LogConfig()

    @property
    def image_limit(self) -> int | None:
        """How many images may be pulled at once, if that is limited. Unset together, both mean "parallel": a node has one
        disk and one user, a cache many."""
        return self.max_parallel_image_pulls or (1 if self.serialize_image_pulls else None)

    @property
    def verifies(self) -> bool:
        """Whether the credentials of clients are looked at, for some upstream."""
        return any(upstream.access is not None and upstream.access.mode == "verify" for upstream in self.upstreams)

    @property
    def default_name(self) -> str | None:
        """The upstream of names that do not say one: as configured, else Docker Hub if it is cached, else none."""
        if self.default_upstream is not None:
            return canonical_host(self.default_upstream)
        return DOCKER_HUB if any(upstream.name == DOCKER_HUB for upstream in self.upstreams) else None
