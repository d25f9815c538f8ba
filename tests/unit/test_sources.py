"""Where pull secrets lie: each kind of file, mounted Secrets as Kubernetes mounts them, and one bad among good ones."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from proxy import files
from proxy.config.model import PullSecretSource
from proxy.credentials.credential import Credential
from proxy.credentials.docker_config import Entry
from proxy.credentials.sources import Reading, read

CANARY = "s3cr3t-canary"
HUB = "https://index.docker.io/v1/"


def source(**keys: Any) -> PullSecretSource:
    return PullSecretSource.model_validate(
        {key: str(value) if isinstance(value, Path) else value for key, value in keys.items()}
    )


def docker_config(registry: str = "corp.test", username: str = "user", password: str = CANARY) -> bytes:
    """What ``docker login`` writes."""
    auth = base64.b64encode(f"{username}:{password}".encode()).decode()
    return json.dumps({"auths": {registry: {"auth": auth}}}).encode()


def dockercfg(registry: str = "corp.test", username: str = "user", password: str = CANARY) -> bytes:
    return json.dumps({registry: {"username": username, "password": password, "email": "a@b"}}).encode()


def manifest(content: bytes) -> bytes:
    """What ``kubectl create secret docker-registry ... --dry-run=client -o yaml`` writes."""
    encoded = base64.b64encode(content).decode()
    return (
        f"apiVersion: v1\ndata:\n  .dockerconfigjson: {encoded}\nkind: Secret\nmetadata:\n  creationTimestamp: null\n"
        "  name: regcred\ntype: kubernetes.io/dockerconfigjson\n"
    ).encode()


class Mounted:
    """A Secret as kubelet mounts it: a directory for each state, and a link that is exchanged."""

    def __init__(self, path: Path, **files: bytes) -> None:
        self.path = path
        self._state = 0
        path.mkdir(parents=True)
        self.update(**files)

    def update(self, **files: bytes) -> None:
        """Kubernetes ``pkg/volume/util/atomic_writer.go``; ``dockercfg=`` is the key ``.dockercfg``."""
        self._state += 1
        state = self.path / f"..2026_01_01_00_00_00.{self._state}"
        state.mkdir()
        for name, content in files.items():
            (state / f".{name}").write_bytes(content)
        (self.path / "..data_tmp").symlink_to(state.name)
        (self.path / "..data_tmp").rename(self.path / "..data")
        for name in files:
            if not (self.path / f".{name}").is_symlink():
                (self.path / f".{name}").symlink_to(f"..data/.{name}")
        for link in self.path.iterdir():
            if link.is_symlink() and not link.exists():
                link.unlink()


def entries(readings: dict[str, Reading]) -> list[Entry]:
    return [entry for reading in readings.values() for entry in (reading.config.entries if reading.config else ())]


def faults(readings: dict[str, Reading]) -> list[str]:
    return [reading.fault for reading in readings.values() if reading.fault]


def shown(found: list[Entry]) -> list[tuple[str, str, str]]:
    return [(entry.registry, entry.credential.username, entry.credential.password) for entry in found if entry.credential]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        pytest.param("config.json", docker_config(), id="docker-config"),
        pytest.param("anything", dockercfg(), id="dockercfg-told-by-its-content"),
        pytest.param("secret.yaml", manifest(docker_config()), id="manifest-of-kubectl"),
        pytest.param(".dockerconfigjson", docker_config(), id="key-of-a-mounted-secret"),
        pytest.param(".dockercfg", dockercfg(), id="older-key-of-a-mounted-secret"),
    ],
)
def test_a_file_of_each_kind(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    (found,) = entries(read([source(file=path)]))
    assert shown([found]) == [("corp.test", "user", CANARY)]
    assert found.source == str(path)
    assert found.credential is not None
    assert (found.credential.source, found.credential.registry) == (str(path), "corp.test")


def test_the_key_of_a_mounted_secret_says_what_its_content_is(tmp_path: Path) -> None:
    """A registry may be called ``auths``, in a file of the older kind."""
    path = tmp_path / ".dockercfg"
    path.write_bytes(dockercfg("auths"))
    assert shown(entries(read([source(file=path)]))) == [("auths", "user", CANARY)]


def test_a_user_whose_password_is_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text(f"{CANARY} with: all kinds \u00e9\n")
    (found,) = entries(read([source(registry="corp.test/team", username="robot$ci", passwordFile=path)]))
    assert found == Entry("corp.test/team", Credential("robot$ci", f"{CANARY} with: all kinds \u00e9"))
    assert found.credential is not None
    assert (found.source, found.credential.source, found.credential.registry) == (str(path), str(path), "corp.test/team")


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"canary\xff", b"canary\nsecond line", b"canary\0", b"can\tary", b"canary\r\nx\r\n"]
)
def test_a_password_that_is_none_is_a_fault(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "password"
    path.write_bytes(content)
    readings = read([source(registry="corp.test", username="u", passwordFile=path)])
    assert faults(readings) == [f"{path}: the password of corp.test is empty, or no text of one line"]
    assert entries(readings) == []


def test_repositories_go_with_every_entry_of_their_source(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(docker_config())
    (tmp_path / "password").write_text("p")
    globs = ["corp.test/team/*"]
    limited, inline, free = entries(
        read(
            [
                source(file=tmp_path / "config.json", repositories=globs),
                source(registry="corp.test", username="u", passwordFile=tmp_path / "password", repositories=globs),
                source(file=tmp_path / "config.json"),
            ]
        )
    )
    assert (limited.repositories, inline.repositories, free.repositories) == (tuple(globs), tuple(globs), ())


# --- directories ---


def test_a_mounted_secret(tmp_path: Path) -> None:
    mounted = Mounted(tmp_path / "mount", dockerconfigjson=docker_config(password="first"))
    (found,) = entries(read([source(directory=mounted.path)]))
    assert shown([found]) == [("corp.test", "user", "first")]
    assert found.source == str(mounted.path / ".dockerconfigjson")


def test_a_mounted_secret_that_was_exchanged(tmp_path: Path) -> None:
    mounted = Mounted(tmp_path / "mount", dockerconfigjson=docker_config(password="first"))
    secrets = [source(directory=mounted.path)]
    before = read(secrets)
    mounted.update(dockerconfigjson=docker_config(password="second"))
    after = read(secrets)
    assert shown(entries(after)) == [("corp.test", "user", "second")], "of the states that lie beside it, only the last"
    assert list(after) == list(before)
    mounted.update(dockercfg=dockercfg(password="third"))
    assert shown(entries(read(secrets))) == [("corp.test", "user", "third")]


def test_a_directory_of_mounted_secrets_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        Mounted(tmp_path / name, dockerconfigjson=docker_config(password=name))
    (tmp_path / "notes.txt").write_text("no Secret")
    (tmp_path / "empty").mkdir()
    readings = read([source(directory=tmp_path)])
    assert [password for _, _, password in shown(entries(readings))] == ["a", "b", "c"]
    assert faults(readings) == []


def test_a_mounted_secret_that_is_taken_away_while_it_is_looked_at_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No fault, after which what it held would still be used: it was listed, and is gone when it is opened."""
    for name in ("a", "b"):
        Mounted(tmp_path / name, dockerconfigjson=docker_config(password=name))
    really = files.read

    def late(path: Path) -> bytes:
        if path.parent.name == "a":
            path.unlink()
        return really(path)

    monkeypatch.setattr(files, "read", late)
    readings = read([source(directory=tmp_path)])
    assert [password for _, _, password in shown(entries(readings))] == ["b"]
    assert faults(readings) == []


def test_the_secret_of_a_directory_itself_goes_before_those_below(tmp_path: Path) -> None:
    (tmp_path / ".dockerconfigjson").write_bytes(docker_config(password="here"))
    Mounted(tmp_path / "a", dockerconfigjson=docker_config(password="below"), dockercfg=dockercfg(password="older"))
    assert [password for _, _, password in shown(entries(read([source(directory=tmp_path)])))] == ["here", "below", "older"]


def test_sources_are_read_in_their_order_and_one_may_stand_twice(tmp_path: Path) -> None:
    for name in ("z", "a"):
        (tmp_path / name).write_bytes(docker_config(password=name))
    readings = read([source(file=tmp_path / name) for name in ("z", "a", "z")])
    assert [password for _, _, password in shown(entries(readings))] == ["z", "a", "z"]
    assert [name.partition(" ")[0] for name in readings] == [f"imagePullSecrets[{number}]" for number in range(3)]


# --- what cannot be used ---


@pytest.mark.parametrize(
    "content", [b"", b"{canary", b"canary", b"[]", b'{"auths": {"corp.test": {"auth": "canary!"}}, "x": 1}']
)
@pytest.mark.parametrize("name", ["config.json", ".dockerconfigjson", ".dockercfg"])
def test_one_bad_secret_is_named_and_the_others_are_used(tmp_path: Path, name: str, content: bytes) -> None:
    bad = tmp_path / "bad" / name
    bad.parent.mkdir()
    bad.write_bytes(content)
    (tmp_path / "good").write_bytes(docker_config())
    readings = read([source(file=bad), source(file=tmp_path / "good")])
    assert shown(entries(readings)) == [("corp.test", "user", CANARY)]
    (fault,) = faults(readings)
    assert str(bad) in fault
    assert "canary" not in fault


def test_one_bad_mounted_secret_is_named_and_its_neighbours_are_used(tmp_path: Path) -> None:
    for name, content in (("a", docker_config(password="a")), ("b", b"{canary"), ("c", docker_config(password="c"))):
        Mounted(tmp_path / name, dockerconfigjson=content)
    readings = read([source(directory=tmp_path)])
    assert [password for _, _, password in shown(entries(readings))] == ["a", "c"]
    (fault,) = faults(readings)
    assert str(tmp_path / "b" / ".dockerconfigjson") in fault
    assert "canary" not in fault


def test_a_directory_below_that_may_not_be_entered_does_not_hide_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions cannot be tried as root, who may enter everything."""
    for name in ("a", "b"):
        Mounted(tmp_path / name, dockerconfigjson=docker_config(password=name))
    exists = Path.exists

    def refusing(path: Path) -> bool:
        if path.parent.name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refusing)
    readings = read([source(directory=tmp_path)])
    assert shown(entries(readings)) == [("corp.test", "user", "b")]
    (fault,) = faults(readings)
    assert str(tmp_path / "a") in fault
    assert "cannot be read: Permission denied" in fault


@pytest.mark.parametrize("kind", ["file", "passwordFile", "directory"])
def test_what_is_not_there_is_a_fault_that_names_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "missing"
    keys = {"registry": "corp.test", "username": "u", kind: path} if kind == "passwordFile" else {kind: path}
    (fault,) = faults(read([source(**keys)]))
    assert str(path) in fault
    assert "cannot be read: No such file or directory" in fault


def test_what_is_of_another_kind_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(docker_config())
    (tmp_path / "directory").mkdir()
    found = faults(read([source(file=tmp_path / "directory"), source(directory=tmp_path / "file")]))
    assert ["it is not a file" in found[0], "Not a directory" in found[1]] == [True, True]


def test_a_directory_without_a_secret_is_a_fault(tmp_path: Path) -> None:
    """A mistyped mount is not the same as having no secrets."""
    (tmp_path / "config.json").write_bytes(docker_config())
    (fault,) = faults(read([source(directory=tmp_path)]))
    assert fault == (f"{tmp_path}: no Secret is in it: neither .dockerconfigjson nor .dockercfg, nor directories with these")


def test_a_file_without_end_is_not_read_to_its_end() -> None:
    (fault,) = faults(read([source(file=Path("/dev/zero"))]))
    assert "/dev/zero: " in fault


def test_no_secret_is_in_what_is_printed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(docker_config())
    (tmp_path / "b").write_text(CANARY)
    readings = read([source(file=tmp_path / "a"), source(registry="r", username="u", passwordFile=tmp_path / "b")])
    assert len(entries(readings)) == 2
    assert CANARY not in repr(readings)
