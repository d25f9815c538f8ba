"""A credential for a registry, and in whose name a registry is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Credential:
    """A user and password, or a token with which a token server gives others (``identitytoken``).

    Two with the same content are equal wherever they come from. ``source`` and ``registry`` say that, for people: the file
    or program, and the key in it. Nothing secret is in its ``repr``.
    """

    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    source: str = field(default="", compare=False)
    registry: str = field(default="", compare=False)

    @property
    def is_ours(self) -> bool:
        """Whether it comes from a configuration, not from a client."""
        return bool(self.registry)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show: podman sends an empty user and password for "no credential"."""
        return not (self.username or self.password or self.identity_token)


@dataclass(frozen=True, slots=True)
class Found:
    """The credentials for an image; ``failure``: why there may be more, which cannot be had just now."""

    credentials: tuple[Credential, ...]
    failure: str = ""


Proof = Literal["anonymous", "secret", "client"]
"""To whom a registry has given content: anybody, whoever shows the secrets of this cache, or one client by his own."""


@dataclass(frozen=True, slots=True)
class Identity:
    """In whose name a registry is asked. ``with_secret``: a GET shows our secret, if there is one, for the sake of its
    quota: that anybody may have the content was proved without it."""

    proof: Proof
    credential: Credential | None = None
    with_secret: bool = False


ANONYMOUS = Identity("anonymous")
QUOTA = Identity("anonymous", with_secret=True)
SECRET = Identity("secret")


@dataclass(frozen=True, slots=True)
class Asker:
    """Who is behind a request upstream: in whose name it is made, and the proxies that it came through."""

    identity: Identity = ANONYMOUS
    via: str = ""
    wants_a_right: bool = False
    is_fresh: bool = False
    """Whether no token may be shown that was given before: it tells of the right that was there then."""

    @property
    def asks_registry_only(self) -> bool:
        """Whether no mirror may be asked: a client's credential is for the registry itself, and so is the question who may
        read."""
        return self.wants_a_right or self.identity.proof == "client"
