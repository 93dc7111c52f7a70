"""Credentials from the files of Amazon's tools, and names that can't be listed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from object_servers import served_bucket, served_folder

from moetier.tiers.errors import ClosedError, ConfigError, StoreReadError
from moetier.tiers.objects.client import Objects, _profile

pytest.importorskip("obstore")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(
        "[default]\naws_access_key_id = one\naws_secret_access_key = a%b\n[work]\naws_access_key_id = two\n"
    )
    (tmp_path / ".aws/config").write_text("[profile work]\nregion = eu-north-1\n")
    return tmp_path


def test_a_profile_is_found_as_amazons_tools_find_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _profile() == {"aws_access_key_id": "one", "aws_secret_access_key": "a%b"}
    monkeypatch.setenv("AWS_PROFILE", "work")
    assert _profile() == {"aws_access_key_id": "two", "region": "eu-north-1"}
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    assert _profile() == {"aws_access_key_id": "two"}
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "three")
    assert _profile() == {}


def test_a_file_of_credentials_that_is_malformed_is_said(home: Path) -> None:
    (home / ".aws/credentials").write_text("nonsense")
    with pytest.raises(ConfigError, match="credentials"):
        _profile()


def test_an_http_server_can_not_list(tmp_path: Path) -> None:
    with served_folder(tmp_path) as server, Objects(server.address) as objects:
        assert objects.sizes() is None


def test_an_object_has_at_most_what_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetier.tiers.objects.client.BACKOFF_SECONDS", 0.01)
    (tmp_path / "large").write_bytes(bytes(100))
    with served_folder(tmp_path) as server, Objects(server.address) as objects:
        assert objects.read_whole("large", 100) == bytes(100)
        with pytest.raises(StoreReadError, match="more than 99 bytes"):
            objects.read_whole("large", 99)
        server.fault = lambda name: "endless"
        with pytest.raises(StoreReadError, match="more than 100 bytes"):
            objects.read_whole("large", 100)


def test_an_upload_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served_bucket(tmp_path, monkeypatch) as server, Objects("s3://bucket/model", uploads=True) as objects:
        server.fault = lambda name: "error" if len(server.puts) < 3 else ""
        objects.put("small", b"here")
        assert (tmp_path / "bucket/model/small").read_bytes() == b"here"
        assert len(server.puts) == 3


def test_listing_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetier.tiers.objects.client.BACKOFF_SECONDS", 0.01)
    (tmp_path / "bucket/model").mkdir(parents=True)
    (tmp_path / "bucket/model/some").write_bytes(bytes(100))
    with served_bucket(tmp_path, monkeypatch) as server, Objects("s3://bucket/model") as objects:
        server.fault = lambda name: "error" if len(server.gets) < 2 else ""
        assert objects.sizes() == {"some": 100}
        server.fault = lambda name: "error"
        with pytest.raises(StoreReadError, match="list of objects at s3://bucket/model"):
            objects.sizes()
        server.fault, asked = lambda name: "refused", len(server.gets)
        assert objects.sizes() is None
        assert len(server.gets) == asked + 1


def test_a_list_has_at_most_what_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetier.tiers.objects.client.MAX_OBJECTS", 2500)
    with served_bucket(tmp_path, monkeypatch) as server, Objects("s3://bucket/model") as objects:
        server.fault = lambda name: "endless"
        with pytest.raises(StoreReadError, match="more than 2,500 objects at s3://bucket/model"):
            objects.sizes()
        assert len(server.gets) < 10


def test_what_is_closed_sends_no_request(tmp_path: Path) -> None:
    (tmp_path / "some").write_bytes(b"here")
    with served_folder(tmp_path) as server:
        objects = Objects(server.address)
        assert objects.read_whole("some", 4) == b"here"
        objects.close()
        with pytest.raises(ClosedError):
            objects.read_whole("some", 4)
        assert len(server.gets) == 1
