"""Requests at one address: retries, limits, lists, and texts without secrets."""

from __future__ import annotations

import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import trustme
from object_servers import served_bucket, served_folder
from readers import PATIENCE
from threads import wait_until

from moetier.tiers.addresses import HTTP_AUTHORIZATION
from moetier.tiers.errors import ClosedError, ConfigError, MissingExpertError, StoreReadError, TargetError
from moetier.tiers.objects import client
from moetier.tiers.objects.client import Objects

pytest.importorskip("obstore")


def test_an_http_server_cannot_list(tmp_path: Path) -> None:
    with served_folder(tmp_path) as server, Objects(server.address) as objects:
        assert objects.sizes() is None


def test_an_object_has_at_most_what_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.1)
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
    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.1)
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


def test_a_signature_is_not_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Azure's, which obstore puts into the address of each request, and its errors into their texts."""
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.1)
    with served_folder(tmp_path) as server:
        server.fault = lambda name: "error"
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=1&sig=SECRET")
        monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", server.address)
        with Objects("az://container/model") as objects:
            for call in (lambda: objects.read_whole("some", 4), objects.sizes):
                with pytest.raises(StoreReadError) as error:
                    call()
                assert "503" in error.value.cause
                assert "SECRET" not in "".join(traceback.format_exception(error.value))
        assert any("SECRET" in name for name in server.gets), "it was sent"


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize("endpoint", ["http://user:SECRET@127.0.0.1:1", "http://127.0.0.1:1/?sig=SECRET"])
def test_secrets_in_an_endpoint_are_refused(variable: str, endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, endpoint)
    with pytest.raises(ConfigError, match=f"endpoint in {variable}") as error:
        Objects("s3://bucket/model")
    assert "AWS_SECRET_ACCESS_KEY" in error.value.fix
    assert "SECRET@" not in str(error.value)
    assert "sig=" not in str(error.value)


def test_a_missing_object_is_not_asked_for_again(tmp_path: Path) -> None:
    with served_folder(tmp_path) as server, Objects(server.address) as objects:
        with pytest.raises(MissingExpertError, match="no object some"):
            objects.read_whole("some", 4)
        assert len(server.gets) == 1


def test_closing_ends_an_answer_that_is_slow(tmp_path: Path) -> None:
    """A few bytes at a time, for half an hour."""
    (tmp_path / "some").write_bytes(bytes(1000))
    with served_folder(tmp_path) as server, Objects(server.address) as objects:
        server.fault, server.seconds = lambda name: "trickle", 0.05
        with ThreadPoolExecutor(1) as pool:
            reading = pool.submit(objects.read_whole, "some", 1 << 20)
            wait_until(lambda: bool(server.gets))
            time.sleep(0.5)
            assert not reading.done()
            objects.close()
            try:
                with pytest.raises(ClosedError):
                    reading.result(PATIENCE)
            finally:
                server.stop()  # else a failure would hang


def test_an_answer_that_trickles_stands_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "STALL_SECONDS", 0.5)
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(client, "MIN_RATE", 100_000)
    (tmp_path / "some").write_bytes(bytes(1000))
    with served_folder(tmp_path) as server, Objects(server.address) as objects:
        server.fault, server.seconds = lambda name: "trickle", 0.05
        with pytest.raises(StoreReadError, match="bytes have come in"):
            objects.read_whole("some", 1 << 20)


@pytest.mark.parametrize("name", ["file/below", "x" * 300])
def test_what_a_local_folder_cannot_have_is_not_tried_again(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with Objects(f"file://{tmp_path}") as objects:
        with pytest.raises(StoreReadError):
            objects.read_whole(name, 4)
        assert objects.retries == 0


def test_an_unknown_host_is_reported_soon() -> None:
    with Objects("http://a..b/model") as objects:  # of two labels, one is empty
        with pytest.raises(StoreReadError, match=r"The host of http://a\.\.b/model is not known\."):
            objects.read_whole("some", 4)
        assert objects.retries == client.RETRIES


@pytest.mark.parametrize("with_tls", [True, False])
def test_a_server_that_is_not_trusted_is_reported_soon(with_tls: bool, tmp_path: Path) -> None:
    certificate = trustme.CA().issue_cert("127.0.0.1") if with_tls else None
    with served_folder(tmp_path, certificate) as server:
        address = server.address.replace("http:", "https:")
        with Objects(address) as objects:
            with pytest.raises(
                StoreReadError, match=f"{address} has no TLS with a certificate that is trusted"
            ) as error:
                objects.read_whole("some", 4)
            assert "SSL_CERT_FILE" in error.value.fix
            assert objects.retries == client.RETRIES
        assert not server.gets


def test_http_servers_get_the_authorization_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By TLS only."""
    (tmp_path / "some").write_bytes(b"here")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setenv(HTTP_AUTHORIZATION, "Bearer SECRET")
    with served_folder(tmp_path) as server, Objects(server.address) as objects:
        assert objects.read_whole("some", 4) == b"here"
        assert server.keys == [""]
    with served_folder(tmp_path, authority.issue_cert("127.0.0.1")) as server, Objects(server.address) as objects:
        assert objects.read_whole("some", 4) == b"here"
        assert server.keys == ["Bearer SECRET"]


def test_an_answer_that_is_cut_short_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.1)
    (tmp_path / "some").write_bytes(bytes(100))
    with (
        served_folder(tmp_path) as server,
        Objects(server.address) as objects,
        pytest.raises(StoreReadError, match="the answer ended after 50 of 100 bytes"),
    ):
        objects.read("some", 50, memoryview(bytearray(100)))


def test_an_object_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(client, "RETRY_SECONDS", 0.1)
    (tmp_path / "folder/some").mkdir(parents=True)
    with Objects(f"file://{tmp_path}", uploads=True) as objects:
        with pytest.raises(TargetError, match=f"folder at file://{tmp_path} can't be removed"):
            objects.delete("folder")
        objects.delete("other")  # there is none
