"""The command: exit codes, what it says, and that a wrong configuration opens nothing."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from proxy import __version__
from proxy.cli import main
from proxy.config import Config

ROOT = Path(__file__).parents[2]
WRITTEN = """
upstreams:
- {name: "corp.test:5000", pathPrefix: corp, timeouts: {head: 1500ms}, caFile: /ca.pem, allowAddresses: [10.0.0.0/8]}
log: {level: debug}
admin: ":7"
cache: {directory: /old, maxBlobSize: 1Gi}
"""


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configurations that would have been served."""
    configs: list[Config] = []

    def run(config: Config) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr(importlib.import_module("proxy.cli.serve"), "run", run)
    return configs


def test_a_good_configuration_is_called_good(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("upstreams: [{name: ghcr.io}, {name: corp.test}]")
    result = invoke("check-config", str(file))
    assert result.exit_code == 0
    assert str(file) in result.stdout
    assert "ghcr.io, corp.test" in result.stdout


def test_every_fault_of_a_bad_one_is_listed(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("lisen: :1\nlog: {level: loud}\nupstreams: [{name: Corp}]")
    result = invoke("check-config", str(file))
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert sorted(line.partition(":")[0] for line in lines[:-1]) == ["lisen", "log.level", "upstreams[0].name"]
    assert lines[-1] == "the configuration has 3 faults; nothing was started"


@pytest.mark.parametrize(
    "arguments",
    [
        ["check-config", "/nowhere.yaml"],
        ["serve", "--config", "/nowhere.yaml"],
        ["check-config"],
        ["nonsense"],
        ["serve", "--nonsense"],
    ],
)
def test_what_cannot_be_used_exits_2(arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_the_version_is_told() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"pullcache, version {__version__}\n")


def test_serve_takes_the_configuration_as_it_is(served: list[Config], tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "listen: 127.0.0.1:7000\nupstreams: [{name: corp.test, timeouts: {head: 1s}, allowAddresses: [10.0.0.0/8]}]"
    )
    assert invoke("serve", "--config", str(file)).exit_code == 0
    assert served[0].listen.port == 7000


@pytest.mark.parametrize(
    "text",
    [
        "",
        WRITTEN,
    ],
)
def test_options_override_their_keys_and_no_other(served: list[Config], tmp_path: Path, text: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert invoke("serve", "--config", str(file)).exit_code == 0
    for option, key, value in [
        ("--listen", "listen", "127.0.0.2:7000"),
        ("--admin", "admin", "[::1]:7001"),
        ("--cache-directory", "cache", str(tmp_path / "cache")),
    ]:
        result = invoke("serve", "--config", str(file), option, value)
        assert result.exit_code == 0, result.output
        changed = served[-1]
        assert str(changed.cache.directory if key == "cache" else getattr(changed, key)) == value
        assert changed.cache.max_blob_size == served[0].cache.max_blob_size
        assert changed.model_dump(exclude={key}) == served[0].model_dump(exclude={key})


def test_serve_needs_no_configuration(served: list[Config]) -> None:
    result = invoke("serve", "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0")
    assert result.exit_code == 0, result.output
    assert len(served[0].upstreams) == 7


@pytest.mark.parametrize("arguments", [["--listen", "nowhere"], ["--admin", "1"]])
def test_a_wrong_option_is_a_fault_of_the_configuration(served: list[Config], arguments: list[str]) -> None:
    result = invoke("serve", *arguments)
    assert result.exit_code == 2
    assert [line.partition(":")[0] for line in result.stderr.splitlines()[:-1]] == [arguments[0].removeprefix("--")]
    assert not served


def test_serve_with_a_wrong_configuration_opens_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        file = tmp_path / "config.yaml"
        file.write_text(f"listen: 127.0.0.1:{port}\ncache: {{directory: {tmp_path}/cache}}\nnonsense: 1\n")
        result = python("-m", "proxy", "serve", "--config", str(file))
    assert result.returncode == 2
    assert "nonsense: unknown key" in result.stderr
    assert "listened" not in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "cache").exists()


def test_help_does_not_wait_for_the_server_to_be_imported() -> None:
    result = python("-X", "importtime", "-m", "proxy", "--help")
    assert result.returncode == 0
    assert "pull-through cache" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "proxy.cli" in imported
    assert not imported & {"aiohttp", "prometheus_client", "proxy.serve", "proxy.app"}
