"""Credentials of a profile of Amazon's tools, as requests show them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_servers import FolderServer, moto_bucket, served_folder

from moetier.tiers.errors import ConfigError, StoreReadError
from moetier.tiers.objects.aws_profile import profile
from moetier.tiers.objects.client import Objects

pytest.importorskip("obstore")
ADDRESS = "s3://bucket/model"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user with two profiles that have keys."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        "[default]\naws_access_key_id = one\naws_secret_access_key = a%b\n"
        "[work]\naws_access_key_id = two\naws_secret_access_key = c\n"
    )
    (tmp_path / ".aws/config").write_text("[default]\nregion = eu-north-1\n[profile work]\nregion = us-west-2\n")
    return tmp_path


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FolderServer]:
    (tmp_path / "bucket/model").mkdir(parents=True)
    (tmp_path / "bucket/model/some").write_bytes(b"here")
    with served_folder(tmp_path) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", running.address)
        yield running


def shown(server: FolderServer) -> str:
    """The key with which an object is read."""
    with Objects(ADDRESS) as objects:
        assert objects.read_whole("some", 4) == b"here"
    return server.keys[-1]


def test_keys_are_those_of_the_profile(home: Path, server: FolderServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.address)
    assert shown(server) == "one"
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert shown(server) == "two"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "three")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "d")
    assert shown(server) == "three"


def test_a_program_gives_credentials(home: Path, server: FolderServer) -> None:
    (home / ".aws/credentials").unlink()
    said = '{"Version": 1, "AccessKeyId": "four", "SecretAccessKey": "e"}'
    program = home / "program"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o700)
    (home / ".aws/config").write_text(f"[default]\ncredential_process = {program}\nregion = eu-north-1\n")
    assert shown(server) == "four"


def test_a_role_is_taken(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By moto's token service, which gives keys of its own."""
    with moto_bucket(monkeypatch) as bucket:
        with Objects(f"{bucket}/model", uploads=True) as objects:
            objects.put("some", b"here")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        (home / ".aws/config").write_text(
            "[profile reader]\nrole_arn = arn:aws:iam::123456789012:role/reader\nsource_profile = work\n"
        )
        monkeypatch.setenv("AWS_PROFILE", "reader")
        with Objects(f"{bucket}/model") as objects:
            assert objects.read_whole("some", 4) == b"here"


def test_a_profile_that_is_not_there_is_reported(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(ConfigError, match="profile absent can't be used"):
        Objects(ADDRESS)


def test_a_file_of_credentials_that_is_malformed_is_reported(home: Path) -> None:
    (home / ".aws/credentials").write_text("nonsense")
    with pytest.raises(ConfigError, match="credentials"):
        Objects(ADDRESS)


def test_a_program_that_fails_is_reported_at_once(home: Path, server: FolderServer) -> None:
    (home / ".aws/credentials").unlink()
    (home / ".aws/config").write_text("[default]\ncredential_process = /bin/false\nregion = eu-north-1\n")
    with pytest.raises((ConfigError, StoreReadError)) as error, Objects(ADDRESS) as objects:
        objects.read_whole("some", 4)
    assert "profile" in error.value.cause or "credentials" in error.value.fix


def test_a_profile_needs_boto3(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "boto3" or name == "obstore.auth.boto3"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigError, match=r"^s3://bucket/model needs boto3") as error:
        Objects(ADDRESS)
    assert ".[objects,aws]" in error.value.fix


def test_a_region_alone_needs_no_credentials(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor boto3, as a config file may be there for other tools."""
    (home / ".aws/credentials").unlink()
    assert profile(ADDRESS) == {"region": "eu-north-1"}
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert profile(ADDRESS) == {}
