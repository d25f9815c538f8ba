"""Every error that a client of pullcache can see: one class a registry error code and status.

Foreign exceptions (aiohttp, OSError, sqlite3) become one of these at two edges only, ``upstream/`` and ``storage/``;
``edge`` alone turns them into a response. Nothing in between chooses a status.

Codes: OCI distribution spec 1.1.1, section "Error Codes"; statuses: distribution ``registry/api/errcode/register.go``.
"""

from __future__ import annotations

from typing import ClassVar


class RegistryError(Exception):
    """An answer of the registry API other than success.

    ``message`` is what a person finally reads in ``kubectl describe pod``: it names the upstream, what it said, and
    what to do. ``headers`` go into the response as they are, and each of ``challenges`` as a ``WWW-Authenticate``.
    """

    code: ClassVar[str] = "UNKNOWN"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.headers = headers or {}
        self.challenges: tuple[str, ...] = ()
        self.is_remembered = False
        """Whether it was the answer of before: nobody was asked now."""
        self.age = 0.0
        """Seconds since it was answered."""


class NameInvalid(RegistryError):
    """The repository name breaks the grammar."""

    code, status = "NAME_INVALID", 400


class DigestInvalid(RegistryError):
    """The digest breaks the grammar, or its algorithm is not known."""

    code, status = "DIGEST_INVALID", 400


class NameUnknown(RegistryError):
    """No upstream, or no repository, of that name."""

    code, status = "NAME_UNKNOWN", 404


class ManifestUnknown(RegistryError):
    """The registry answered that it has no such manifest."""

    code, status = "MANIFEST_UNKNOWN", 404


class BlobUnknown(RegistryError):
    """The registry answered that it has no such blob."""

    code, status = "BLOB_UNKNOWN", 404


class Denied(RegistryError):
    """The registry itself refused the right to read (401 or 403 as a registry error)."""

    code, status = "DENIED", 403


class CredentialRefused(Denied):
    """What was shown to prove who asks is not accepted: not only the right is missing.

    ``is_certain``: a program said so, not a page for people, which may be that of a gateway in between.
    """

    def __init__(self, message: str, *, headers: dict[str, str] | None = None, is_certain: bool = True) -> None:
        super().__init__(message, headers=headers)
        self.is_certain = is_certain


class Unauthorized(RegistryError):
    """Who asks has to prove who he is; ``challenges`` say how."""

    code, status = "UNAUTHORIZED", 401


class TooManyAttempts(RegistryError):
    """A client has shown too many wrong credentials of late. That says nothing of any upstream."""

    code, status = "TOOMANYREQUESTS", 429


class PaginationNumberInvalid(RegistryError):
    """``n`` of a list is not a number of at least 0."""

    code, status = "PAGINATION_NUMBER_INVALID", 400


class Unsupported(RegistryError):
    """A method that a read-only registry does not offer."""

    code, status = "UNSUPPORTED", 405


class RangeInvalid(RegistryError):
    """The range begins at or after the end of the content."""

    code, status = "RANGE_INVALID", 416


class RequestTooLarge(RegistryError):
    """The request brought a body that is larger than what is drained and ignored."""

    code, status = "SIZE_INVALID", 413


class RequestInvalid(RegistryError):
    """What came is not a request that HTTP allows."""

    code, status = "UNSUPPORTED", 400


class LoopDetected(RegistryError):
    """The request has been through this very instance before (RFC 5842 section 7.2, found by ``Via``)."""

    code, status = "UNAVAILABLE", 508


class CacheFailing(RegistryError):
    """The cache itself cannot: files, descriptors, or it is stopping."""

    code, status = "UNAVAILABLE", 503


class UpstreamFailing(RegistryError):
    """The upstream gave no answer that could be used; what is held may be served in its place."""


class UpstreamUnavailable(UpstreamFailing):
    """No answer in time: connection, DNS, TLS, time limits."""

    code, status = "UNAVAILABLE", 503


class UpstreamBroken(UpstreamFailing):
    """An answer that is no use: 5xx, wrong bytes, wrong length, not a registry at all.

    ``retry_after``: the ``Retry-After`` of a 503, for our own patience; no client is told it.
    """

    code, status = "UNKNOWN", 502

    def __init__(self, message: str, *, headers: dict[str, str] | None = None, retry_after: str = "") -> None:
        super().__init__(message, headers=headers)
        self.retry_after = retry_after


class UpstreamIntercepted(UpstreamBroken):
    """A 401 or 403 that is no registry's: a firewall or a login page in between has answered."""


class UpstreamRefused(UpstreamBroken):
    """A 4xx that is none of the known ones: no use, but no word on how the upstream is either."""


class ManifestGone(UpstreamFailing):
    """The registry has a tag no more, and what it pointed at is still served: ``deletedGrace``."""

    code, status = "MANIFEST_UNKNOWN", 404


class SecretRefused(UpstreamFailing):
    """The upstream does not accept a secret of this cache. That is a fault of the operator's, which says nothing of what the
    clients may read."""

    code, status = "DENIED", 403


class TooManyRequests(UpstreamFailing):
    """The upstream limits the rate; ``Retry-After`` is passed on when it gave one."""

    code, status = "TOOMANYREQUESTS", 429
