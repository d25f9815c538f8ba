"""Which authorities a registry is believed by."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import trustme

from proxy.config.upstreams import UpstreamConfig
from proxy.upstream.tls import context_of


def config(**keys: Any) -> UpstreamConfig:
    """An upstream."""
    return UpstreamConfig.model_validate({"name": "registry.test", **keys})


def an_authority() -> bytes:
    """A certificate in PEM."""
    return trustme.CA().cert_pem.bytes()


def test_those_with_files_of_their_own_share_nothing(tmp_path: Path) -> None:
    """What one registry is believed by, another is not."""
    own = tmp_path / "ca.pem"
    own.write_bytes(an_authority())
    contexts = [context_of(config()), context_of(config(caFile=str(own))), context_of(config(insecureSkipVerify=True))]
    assert len(set(map(id, contexts))) == 3
    assert contexts[0] is context_of(config(name="other.test"))
    assert len(contexts[1].get_ca_certs()) == len(contexts[0].get_ca_certs()) + 1


def test_the_systems_authorities_are_read_again_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is given a context with authorities of before."""
    bundle = tmp_path / "system.pem"
    bundle.write_bytes(an_authority())
    monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
    monkeypatch.setenv("SSL_CERT_DIR", str(tmp_path / "none"))
    assert len(context_of(config()).get_ca_certs()) == 1
    bundle.write_bytes(an_authority() + an_authority())
    os.utime(bundle, ns=(1, 1))
    assert len(context_of(config()).get_ca_certs()) == 2
