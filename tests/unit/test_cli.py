"""The command: exit codes, what it says, and that a wrong configuration opens nothing."""

from __future__ import annotations

import fcntl
import importlib
import os
import pty
import select
import socket
import subprocess
import sys
import termios
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import trustme
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives import serialization

from proxy import __version__
from proxy.cli import main
from proxy.config.model import Config

ROOT = Path(__file__).parents[2]
WRITTEN = """
upstreams:
- {name: "corp.test:5000", pathPrefix: corp, timeouts: {head: 1500ms}, caFile: /ca.pem, allowAddresses: [10.0.0.0/8]}
log: {level: debug}
admin: ":7"
adminListener: {tokenFile: /token}
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
    assert lines[-1] == "the configuration has 3 faults"


def test_what_is_hardly_meant_is_warned_of(tmp_path: Path) -> None:
    """A secret for another registry serves nobody."""
    file, secret = tmp_path / "config.yaml", tmp_path / "config.json"
    secret.write_text('{"auths": {"other.test": {"username": "u", "password": "hunter2"}}}')
    access = "{mode: shared, iUnderstandThisIsShared: true}"
    file.write_text(f"upstreams: [{{name: corp.test, access: {access}}}]\nimagePullSecrets: [{{file: {secret}}}]")
    result = invoke("check-config", str(file))
    assert result.exit_code == 0
    assert "warning: upstreams[0].access: shared, and no pull secret is for corp.test" in result.stderr
    secret.write_text('{"auths": {"corp.test": {"username": "u", "password": "hunter2"}}}')
    assert invoke("check-config", str(file)).stderr == ""


def test_a_rule_that_decides_nothing_is_warned_of(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text('imagePullPolicy: {rules: [{match: "docker.io/nginx:1", policy: Never}, {match: "*", policy: Always}]}')
    result = invoke("check-config", str(file))
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: imagePullPolicy.rules[0].match: 'docker.io/nginx:1' matches nothing of ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--admin", "127.0.0.1:1"], "127.0.0.1:1 cannot be asked: Connection refused; is pullcache running"),
        (["--token-file", "/nowhere/token"], "/nowhere/token: cannot be used"),
        (["--ca-file", "/nowhere/ca"], "/nowhere/ca: cannot be used"),
    ],
)
def test_an_explanation_that_cannot_be_had_says_why(arguments: list[str], told: str) -> None:
    result = invoke("explain", "docker.io/library/debian", *arguments)
    assert result.exit_code == 1
    assert told in result.stderr


@pytest.mark.parametrize(
    "content", [b"hunter2-one\nhunter2-two", b"hunter2 two", "hunter2-\u20ac".encode(), b"hunter2-\xff", b"", b"\n"]
)
def test_a_token_file_that_holds_no_token_is_named_and_not_quoted(tmp_path: Path, content: bytes) -> None:
    """What no header can show is refused before anybody is asked; nothing of it is printed."""
    file = tmp_path / "token"
    file.write_bytes(content)
    for command in (["explain"], ["warm", "--server", "http://127.0.0.1:1"]):
        result = invoke(*command, "docker.io/library/debian:12", "--admin", "127.0.0.1:1", "--token-file", str(file))
        assert result.exit_code == 1
        assert f"{file}: holds no token" in result.stderr
        for told in (result.stderr, result.stdout, repr(result.exception)):
            assert "hunter2" not in told
            assert "0xff" not in told
            assert "20ac" not in told


class _Other(BaseHTTPRequestHandler):
    """What is no pullcache: it sends away, or knows no such page."""

    def do_GET(self) -> None:
        assert isinstance(self.server, _OtherServer)
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        away = self.path.startswith("/away/explain")
        self.send_response(302 if away else 404)
        if away:
            self.send_header("Location", f"http://localhost:{self.server.server_port}/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""


class _OtherServer(HTTPServer):
    """It, and what it was asked with which token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Other)
        self.asked: list[tuple[str, str | None]] = []


@pytest.fixture
def other() -> Iterator[_OtherServer]:
    with _OtherServer() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_an_operators_token_follows_no_redirect(tmp_path: Path, other: _OtherServer) -> None:
    file = tmp_path / "token"
    file.write_text("hunter2-hunter2-hunter2")
    address = f"http://127.0.0.1:{other.server_port}/away"
    result = invoke("explain", "docker.io/library/debian", "--admin", address, "--token-file", str(file))
    assert (result.exit_code, [path.partition("?")[0] for path, _ in other.asked]) == (1, ["/away/explain"])
    assert f"{address}: it answered 302; is this its admin address?" in result.stderr


def test_what_is_no_pullcache_is_told(other: _OtherServer) -> None:
    address = f"127.0.0.1:{other.server_port}"
    assert "it answered 404; is this its admin address?" in invoke("explain", "a", "--admin", address).stderr
    told = invoke("explain", "a", "--admin", f"https://{address}").stderr
    assert "if it has no TLS, write --admin http://..." in told


class Files:
    """Certificates and keys, good and bad."""

    def __init__(self, folder: Path) -> None:
        leaf, other = trustme.CA().issue_cert("pullcache.test"), trustme.CA().issue_cert("pullcache.test")
        self.folder = folder
        self.certificate = self._write("certificate.pem", leaf.cert_chain_pems[0].bytes())
        self.key = self._write("good.key", leaf.private_key_pem.bytes())
        self.both = self._write("both.pem", leaf.private_key_and_cert_chain_pem.bytes())
        private = serialization.load_pem_private_key(leaf.private_key_pem.bytes(), None)
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        encrypted = private.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"hunter2"))
        old = private.private_bytes(
            pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.BestAvailableEncryption(b"hunter2")
        )
        bad = {
            "encrypted": encrypted,
            "encrypted in the old form": old,
            "of another certificate": other.private_key_pem.bytes(),
            "no key": b"hello",
            "empty": b"",
            "a certificate": leaf.cert_chain_pems[0].bytes(),
        }
        self.bad = {name: self._write(f"{name.replace(' ', '-')}.key", data) for name, data in bad.items()}
        self.bad["missing"] = folder / "missing.key"
        self.bad["a directory"] = folder

    def config(self, keys: str) -> Path:
        """A configuration with one upstream of these keys, and one that is good."""
        file = self.folder / "config.yaml"
        file.write_text(
            f"cache: {{directory: {self.folder}/cache}}\nlisten: 127.0.0.1:0\nadmin: 127.0.0.1:0\n"
            f"upstreams: [{{name: ghcr.io}}, {{name: corp.test, {SHARED}, {keys}}}]\n"
        )
        return file

    def _write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


SHARED = "access: {mode: shared, iUnderstandThisIsShared: true}"
"""What ``clientCertFile`` wants beside it."""

BAD_KEYS = [
    "encrypted",
    "encrypted in the old form",
    "of another certificate",
    "no key",
    "empty",
    "a certificate",
    "missing",
    "a directory",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Made once: keys take their time."""
    return Files(tmp_path_factory.mktemp("tls"))


def test_a_good_certificate_is_called_good(files: Files) -> None:
    for keys in (f"clientCertFile: {files.certificate}, clientKeyFile: {files.key}", f"clientCertFile: {files.both}"):
        result = invoke("check-config", str(files.config(keys)))
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("bad", BAD_KEYS)
def test_a_key_that_cannot_be_used_is_named(files: Files, bad: str) -> None:
    """With its upstream and its file, so that somebody can mend it; nothing of what is in the file is told."""
    keys = f"clientCertFile: {files.certificate}, clientKeyFile: {files.bad[bad]}"
    result = invoke("check-config", str(files.config(keys)))
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    fault, last = result.stderr.splitlines()
    assert fault.startswith("upstream corp.test: ")
    assert "clientKeyFile" in fault
    assert str(files.bad[bad]) in fault
    assert ("encrypted" in fault) == bad.startswith("encrypted")
    assert ("mismatch" in fault) == (bad == "of another certificate")
    assert last == "the configuration has 1 fault"


@pytest.mark.parametrize("key", ["caFile", "clientCertFile"])
@pytest.mark.parametrize("bad", ["missing", "a directory", "no key", "empty"])
def test_a_certificate_that_cannot_be_used_is_named(files: Files, bad: str, key: str) -> None:
    result = invoke("check-config", str(files.config(f"{key}: {files.bad[bad]}")))
    assert result.exit_code == 2
    assert result.stderr.startswith(f"upstream corp.test: {key} {files.bad[bad]} cannot be used: ")


def test_every_upstream_whose_files_are_wrong_is_named(files: Files) -> None:
    file = files.folder / "config.yaml"
    file.write_text(
        f"upstreams: [{{name: a.test, caFile: /no/a}}, {{name: b.test}}, {{name: c.test, {SHARED}, clientCertFile: /no/c}}]"
    )
    result = invoke("check-config", str(file))
    assert [line.partition(":")[0] for line in result.stderr.splitlines()[:-1]] == ["upstream a.test", "upstream c.test"]


@pytest.mark.parametrize("bad", ["encrypted", "encrypted in the old form", "missing"])
@pytest.mark.parametrize("command", ["check-config", "serve"])
def test_nobody_is_ever_asked_for_a_passphrase(files: Files, command: str, bad: str) -> None:
    """At a terminal, where OpenSSL would ask, and wait for ever for an answer."""
    config = files.config(f"clientCertFile: {files.certificate}, clientKeyFile: {files.bad[bad]}")
    arguments = ["check-config", str(config)] if command == "check-config" else ["serve", "--config", str(config)]
    code, said = at_a_terminal("-m", "proxy", *arguments)
    assert code == 2, said
    assert "corp.test" in said
    assert "PEM pass phrase" not in said
    assert "Traceback" not in said


def at_a_terminal(*arguments: str) -> tuple[int, str]:
    """Runs Python with a terminal of its own; the exit code, and what stands there. Whoever asks there is killed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    said = b""
    try:
        while b"pass phrase" not in said and select.select([ours], [], [], 60)[0]:
            try:
                said += os.read(ours, 4096)
            except OSError:  # nobody is at the other end any more
                return process.wait(60), said.decode(errors="replace")
        return -1, said.decode(errors="replace")
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize(
    "arguments",
    [
        ["check-config", "/nowhere.yaml"],
        ["serve", "--config", "/nowhere.yaml"],
        ["check-config"],
        ["nonsense"],
        ["serve", "--nonsense"],
        ["explain", ""],
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
