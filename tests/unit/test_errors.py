"""Errors: one class a code and status, as distribution has them, and what a proxy needs."""

from __future__ import annotations

import pytest

from proxy import errors
from proxy.errors import RegistryError

EXPECTED = {
    "RegistryError": ("UNKNOWN", 500),
    "NameInvalid": ("NAME_INVALID", 400),
    "DigestInvalid": ("DIGEST_INVALID", 400),
    "NameUnknown": ("NAME_UNKNOWN", 404),
    "ManifestUnknown": ("MANIFEST_UNKNOWN", 404),
    "BlobUnknown": ("BLOB_UNKNOWN", 404),
    "Denied": ("DENIED", 403),
    "CredentialRefused": ("DENIED", 403),
    "Unauthorized": ("UNAUTHORIZED", 401),
    "TooManyAttempts": ("TOOMANYREQUESTS", 429),
    "PaginationNumberInvalid": ("PAGINATION_NUMBER_INVALID", 400),
    "Unsupported": ("UNSUPPORTED", 405),
    "RangeInvalid": ("RANGE_INVALID", 416),
    "RequestTooLarge": ("SIZE_INVALID", 413),
    "RequestInvalid": ("UNSUPPORTED", 400),
    "LoopDetected": ("UNAVAILABLE", 508),
    "CacheFailing": ("UNAVAILABLE", 503),
    "UpstreamFailing": ("UNKNOWN", 500),
    "UpstreamUnavailable": ("UNAVAILABLE", 503),
    "UpstreamBroken": ("UNKNOWN", 502),
    "UpstreamIntercepted": ("UNKNOWN", 502),
    "UpstreamRefused": ("UNKNOWN", 502),
    "SecretRefused": ("DENIED", 403),
    "ManifestGone": ("MANIFEST_UNKNOWN", 404),
    "TooManyRequests": ("TOOMANYREQUESTS", 429),
}
KNOWN_CODES = frozenset(
    {
        "BLOB_UNKNOWN",
        "BLOB_UPLOAD_INVALID",
        "BLOB_UPLOAD_UNKNOWN",
        "DIGEST_INVALID",
        "MANIFEST_BLOB_UNKNOWN",
        "MANIFEST_INVALID",
        "MANIFEST_UNKNOWN",
        "NAME_INVALID",
        "NAME_UNKNOWN",
        "SIZE_INVALID",
        "UNAUTHORIZED",
        "DENIED",
        "UNSUPPORTED",
        "TOOMANYREQUESTS",
        "RANGE_INVALID",
        "PAGINATION_NUMBER_INVALID",
        "UNAVAILABLE",
        "UNKNOWN",
    }
)
CLASSES: dict[str, type[RegistryError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, RegistryError)
}


def test_the_table_below_is_complete() -> None:
    assert set(CLASSES) == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_each_class_has_its_code_and_status(name: str) -> None:
    kind = CLASSES[name]
    assert issubclass(kind, RegistryError)
    assert (kind.code, kind.status) == EXPECTED[name]
    assert kind.code in KNOWN_CODES
    assert kind.__doc__


@pytest.mark.parametrize("name", EXPECTED)
def test_an_error_carries_message_and_headers(name: str) -> None:
    error = CLASSES[name]("what went wrong", headers={"Retry-After": "5"})
    assert isinstance(error, RegistryError)
    assert (str(error), error.message, error.headers) == ("what went wrong", "what went wrong", {"Retry-After": "5"})
    assert CLASSES[name]("x").headers == {}
    assert CLASSES[name]("x").challenges == ()


@pytest.mark.parametrize(
    ("name", "stale_allowed"),
    [
        (name, name.startswith("Upstream") or name in ("TooManyRequests", "SecretRefused", "ManifestGone"))
        for name in EXPECTED
    ],
)
def test_what_is_held_stands_in_for_a_failing_upstream_and_for_nothing_else(name: str, stale_allowed: bool) -> None:
    assert issubclass(CLASSES[name], errors.UpstreamFailing) is stale_allowed


def test_a_credential_that_is_refused_is_a_right_that_is_refused() -> None:
    """Whoever ends a yes at a refusal ends it at this one too; what the operator's secret is refused says nothing of it."""
    assert issubclass(errors.CredentialRefused, errors.Denied)
    assert not issubclass(errors.SecretRefused, errors.Denied)
