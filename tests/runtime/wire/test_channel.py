"""Who is let in, and to whom one speaks: real daemons on TCP, real certificates."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import grpc
import outlets  # noqa: F401 - keeps gRPC's event loop from one test to the next
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from daemons import DaemonProcess, running_daemon
from readers import PATIENCE
from stores import make_plan, make_records, manifest_of, read_record, slot_of, written
from threads import Task, wait_until

from moetier.proto import expert_store_pb2 as pb
from moetier.proto.expert_store_pb2_grpc import ExpertStoreStub
from moetier.runtime.client.remote import RemoteStore
from moetier.runtime.client.spread import SpreadStore
from moetier.runtime.wire.address import Address, Credentials
from moetier.runtime.wire.channel import open_channel, read_identity, read_pem, read_token
from moetier.tiers.errors import ConfigError, MoetierError, RefusedError, UnavailableError
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey
from moetier.tiers.manifest import Manifest

PLAN = make_plan(blocks=1, experts=2)
RECORDS = make_records(PLAN)
TOKEN = "c0ffee" * 10


@dataclass(frozen=True)
class Files:
    """Certificates and tokens."""

    ca: Path
    other_ca: Path
    cert: Path  # of the daemon, for 127.0.0.1
    key: Path
    client_cert: Path
    client_key: Path
    stranger_cert: Path  # of a client, signed by the other authority
    stranger_key: Path
    token: Path
    wrong_token: Path


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("files")
    ca, other = trustme.CA(), trustme.CA()
    for name, authority in (("ca", ca), ("other_ca", other)):
        authority.cert_pem.write_to_path(str(folder / name))
    for name, authority in (("", ca), ("client_", ca), ("stranger_", other)):
        issued = authority.issue_cert("127.0.0.1" if not name else "client.test")
        issued.private_key_pem.write_to_path(str(folder / f"{name}key"))
        issued.cert_chain_pems[0].write_to_path(str(folder / f"{name}cert"))
    (folder / "token").write_text(f"{TOKEN}\n")
    (folder / "wrong_token").write_text(TOKEN[:-1])
    return Files(**{name: folder / name for name in Files.__dataclass_fields__})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("store"), PLAN, RECORDS)


@pytest.fixture(scope="module")
def manifest(store: Path) -> Manifest:
    return manifest_of(store)


@contextmanager
def daemon(store: Path, folder: Path, *options: str | Path) -> Iterator[DaemonProcess]:
    with running_daemon(store, folder=folder, extra=["--listen", "127.0.0.1:0", *options]) as process:
        yield process


@pytest.fixture(scope="module")
def with_tls(store: Path, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    options = ["--tls-cert", files.cert, "--tls-key", files.key, "--token-file", files.token]
    with daemon(store, tmp_path_factory.mktemp("tls") / "d", *options) as process:
        yield process


@pytest.fixture(scope="module")
def with_mutual_tls(store: Path, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    options = ["--tls-cert", files.cert, "--tls-key", files.key, "--token-file", files.token]
    with daemon(store, tmp_path_factory.mktemp("mutual") / "d", *options, "--tls-client-ca", files.ca) as process:
        yield process


@pytest.fixture(scope="module")
def without_tls(store: Path, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    with daemon(store, tmp_path_factory.mktemp("plain") / "d", "--token-file", files.token) as process:
        yield process


def read(address: str, credentials: Credentials, manifest: Manifest) -> None:
    """A record, through all that stands in between."""
    key = ExpertKey(0, 1)
    with RemoteStore(Address.parse(address), credentials, manifest) as reader:
        errors = []
        slot = slot_of(manifest, ExpertKey(0, 0))
        for step in (reader.probe, lambda: reader.read_into(key, slot)):
            try:
                step()
            except MoetierError as error:
                errors.append(error)
        if errors:
            assert len(errors) == 2, "what is refused is refused in every call"
            assert type(errors[0]) is type(errors[1])
            assert bytes(slot) == bytes(len(slot)), "nothing is served"
            raise errors[0]
        assert slot[:-CHECKSUM_BYTES] == RECORDS[key]


def test_the_right_credentials(
    with_tls: DaemonProcess,
    with_mutual_tls: DaemonProcess,
    without_tls: DaemonProcess,
    files: Files,
    manifest: Manifest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # is not gone through
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")
    good = Credentials(token_file=files.token, ca=files.ca)
    read(with_tls.card.listen, good, manifest)
    read(with_mutual_tls.card.listen, replace(good, cert=files.client_cert, key=files.client_key), manifest)
    read(without_tls.card.listen, Credentials(token_file=files.token, insecure=True), manifest)
    monkeypatch.setenv("SSL_CERT_FILE", str(files.ca))
    read(with_tls.card.listen, replace(good, ca=None), manifest)


@pytest.mark.parametrize(
    "change",
    [
        lambda f: {"ca": f.other_ca},
        lambda f: {"ca": None},
        lambda f: {"token_file": None},
        lambda f: {"token_file": f.wrong_token},
        lambda f: {"ca": None, "insecure": True},
    ],
    ids=["another authority", "the system's authorities", "no token", "a wrong token", "no TLS"],
)
def test_wrong_credentials(
    with_tls: DaemonProcess,
    files: Files,
    store: Path,
    manifest: Manifest,
    change: Callable[[Files], dict[str, Path | bool | None]],
) -> None:
    """No store beside it makes up for them, and no other daemon."""
    credentials = replace(Credentials(token_file=files.token, ca=files.ca), **change(files))
    with pytest.raises(RefusedError, match=r"TLS|trust|token"):
        read(with_tls.card.listen, credentials, manifest)
    addresses = [Address.parse("127.0.0.1:1"), Address.parse(with_tls.card.listen)]
    with pytest.raises(RefusedError, match=with_tls.card.listen):
        SpreadStore.open(addresses, credentials, manifest, store)


def test_each_client_is_logged_without_its_token(store: Path, files: Files, manifest: Manifest, tmp_path: Path) -> None:
    with daemon(store, tmp_path / "d", "--token-file", files.token) as process:
        read(process.card.listen, Credentials(token_file=files.token, insecure=True), manifest)
        assert "level=info event=remote-client peer=ipv4:127.0.0.1:" in process.log
        assert "refused" not in process.log
        for token, cause in ((None, "no credential"), (files.wrong_token, "a credential that is not known")):
            time.sleep(0 if token is None else 1)  # they are said once a second
            with pytest.raises(RefusedError):
                read(process.card.listen, Credentials(token_file=token, insecure=True), manifest)
            wait_until(lambda cause=cause: f'cause="{cause}"' in process.log)  # type: ignore[misc]
        lines = [line for line in process.log.splitlines() if "level=warning event=client-refused" in line]
        assert "peer=ipv4:127.0.0.1:" in lines[0]
        told = len(lines) + sum(int(line.partition(" unsaid=")[2] or 0) for line in lines)
        assert told in (3, 4), "the record that was asked for, too; that of the last may still be to say"
        assert 2 <= len(lines) <= told, "a line for each second at least"
        assert TOKEN[:-1] not in process.log


def test_another_hosts_certificate(with_tls: DaemonProcess, files: Files, manifest: Manifest) -> None:
    port = with_tls.card.listen.rpartition(":")[2]
    with pytest.raises(RefusedError, match=r"(?i)hostname|not in peer certificate"):
        read(f"localhost:{port}", Credentials(token_file=files.token, ca=files.ca), manifest)


def test_a_daemon_of_a_group_has_the_certificate_of_its_name(
    store: Path, files: Files, tmp_path: Path, manifest: Manifest
) -> None:
    """And not one of its IP address, which changes."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca"))
    issued = ca.issue_cert("localhost")
    issued.private_key_pem.write_to_path(str(tmp_path / "key"))
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "cert"))
    credentials = Credentials(token_file=files.token, ca=tmp_path / "ca")
    options = ["--tls-cert", tmp_path / "cert", "--tls-key", tmp_path / "key", "--token-file", files.token]
    with daemon(store, tmp_path / "d", *options) as process:
        group = Address.parse(f"dns:///localhost:{process.card.listen.rpartition(':')[2]}")
        assert Address.parse(process.card.listen) not in group.resolve(), "it has the group's name beside it"
        assert process.card.listen in map(str, group.resolve())
        with SpreadStore.open([group], credentials, manifest) as reader:
            assert read_record(reader, ExpertKey(0, 1)) == RECORDS[ExpertKey(0, 1)]
            assert process.card.listen in [share.place for share in reader.shares() if share.records]
        with open_channel(group, credentials) as channel:  # as stats does: of any one of them
            assert ExpertStoreStub(channel).Describe(pb.DescribeRequest(), timeout=PATIENCE).pid == process.pid
        with pytest.raises(RefusedError, match=r"(?i)hostname|not in peer certificate"):
            read(process.card.listen, credentials, manifest)


def test_tls_to_a_daemon_without_tls(without_tls: DaemonProcess, files: Files, manifest: Manifest) -> None:
    with pytest.raises(RefusedError, match="not use TLS") as caught:
        read(without_tls.card.listen, Credentials(token_file=files.token, ca=files.ca), manifest)
    assert "`credentials.insecure`" in caught.value.fix


@pytest.mark.parametrize("insecure", [True, False])
def test_a_missing_daemon_behind_a_proxy_is_away(files: Files, store: Path, manifest: Manifest, insecure: bool) -> None:
    """As behind a forwarded port: it may come, and until then the store is read."""
    credentials = Credentials(insecure=True) if insecure else Credentials(ca=files.ca)
    with socket.create_server(("127.0.0.1", 0)) as forwarder:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    forwarder.accept()[0].close()

        threading.Thread(target=hang_up, daemon=True).start()
        address = Address.parse(f"127.0.0.1:{forwarder.getsockname()[1]}")
        with SpreadStore.open([address], credentials, manifest, store) as reader:
            assert read_record(reader, ExpertKey(0, 1)) == RECORDS[ExpertKey(0, 1)]
            away, local = reader.shares()
            assert (away.records, away.bytes, bool(away.away)) == (0, 0, True)
            assert (local.place, local.records, local.bytes) == ("the local store", 1, manifest.layout(0).slot_bytes)
        forwarder.shutdown(socket.SHUT_RDWR)


def test_a_daemon_that_answers_a_connection_late_is_not_away(
    without_tls: DaemonProcess, files: Files, manifest: Manifest
) -> None:
    """As one far away, or one that many connect to: an attempt takes longer than the first pause between two."""
    host, _, port = without_tls.card.listen.rpartition(":")

    def forward(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = forwarder.accept()
                time.sleep(0.2)  # of the network
                far = socket.create_connection((host, int(port)))
                ends.extend((near, far))
                tasks.extend(Task(partial(forward, *pair), "forwarder") for pair in ((near, far), (far, near)))

    ends: list[socket.socket] = []
    tasks: list[Task[None]] = []
    with socket.create_server(("127.0.0.1", 0)) as forwarder:
        accepting = Task(accept, "forwarder")
        credentials = Credentials(token_file=files.token, insecure=True)
        read(f"127.0.0.1:{forwarder.getsockname()[1]}", credentials, manifest)
        forwarder.shutdown(socket.SHUT_RDWR)
        accepting.result()
    for task in tasks:
        task.result()
    for end in ends:
        end.close()


@pytest.mark.parametrize("who", ["nobody", "a stranger"])
def test_a_client_without_the_right_certificate(
    with_mutual_tls: DaemonProcess, files: Files, manifest: Manifest, who: str
) -> None:
    shown = {} if who == "nobody" else {"cert": files.stranger_cert, "key": files.stranger_key}
    with pytest.raises(RefusedError, match="certificate"):
        read(with_mutual_tls.card.listen, Credentials(token_file=files.token, ca=files.ca, **shown), manifest)


def test_over_its_unix_socket_too(with_tls: DaemonProcess, manifest: Manifest) -> None:
    """By a credential of the control socket; a new one after a restart."""
    key = ExpertKey(0, 0)
    slot = slot_of(manifest, ExpertKey(0, 0))
    with RemoteStore(with_tls.address, Credentials(), manifest) as reader:
        reader.probe()
        reader.read_into(key, slot)
        assert slot[:-CHECKSUM_BYTES] == RECORDS[key]
        with_tls.restart()
        with pytest.raises((RefusedError, UnavailableError)):
            reader.read_into(key, slot)
        reader.probe()
        reader.read_into(key, slot)
    with open_channel(with_tls.address, Credentials(), bearer="0" * 32) as channel:
        describe = channel.unary_unary(
            "/moetier.v1.ExpertStore/Describe", pb.DescribeRequest.SerializeToString, pb.DescribeReply.FromString
        )
        with pytest.raises(grpc.RpcError) as caught:
            describe(pb.DescribeRequest(), timeout=PATIENCE)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


# -- files ------------------------------------------------------------------------------------------------------------

SOMEWHERE = Address(target="127.0.0.1:7070")


@pytest.mark.parametrize("text", ["", "\n", "two\nlines\n", "with space", "ünïcode", "\x00", "tab\there"])
def test_what_is_no_token(tmp_path: Path, text: str) -> None:
    path = tmp_path / "token"
    path.write_text(text)
    with pytest.raises(ConfigError, match="token"):
        read_token(path)
    with pytest.raises(ConfigError, match="token"):
        open_channel(SOMEWHERE, Credentials(token_file=path, insecure=True))


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_what_is_a_token(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "token"
    path.write_bytes(f"{TOKEN}{ending}".encode())
    assert read_token(path) == TOKEN


def test_a_token_that_every_user_can_read_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o640)
    read_token(path)
    assert caplog.messages == []
    other = tmp_path / "other"
    other.write_text(TOKEN)
    other.chmod(0o644)
    for _ in range(2):
        read_token(other)
    assert caplog.messages == [f"Every user can read the token in {other}. Close the file: chmod 600 {other}"]


def test_files_that_are_not_there(tmp_path: Path, files: Files) -> None:
    gone = tmp_path / "gone"
    for credentials in (
        Credentials(token_file=gone),
        Credentials(token_file=tmp_path),
        Credentials(ca=gone),
        Credentials(ca=files.ca, cert=gone, key=files.client_key),
        Credentials(ca=files.ca, cert=files.client_cert, key=gone),
    ):
        with pytest.raises(ConfigError, match="can't be read"):
            open_channel(SOMEWHERE, credentials)


def test_certificates_with_text_between_them(tmp_path: Path, files: Files) -> None:
    """As in bundles of many authorities."""
    bundle = tmp_path / "bundle"
    bundle.write_bytes("# Főtanúsítvány\n".encode() + files.ca.read_bytes() + files.other_ca.read_bytes())
    assert read_pem(bundle, "CA") == bundle.read_bytes()


def test_the_system_s_authorities_are_vetted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(range(256)))
    monkeypatch.setenv("SSL_CERT_FILE", str(noise))
    with pytest.raises(ConfigError, match=r"system's CA .*PEM"):
        open_channel(SOMEWHERE, Credentials())


def test_files_that_are_something_else(tmp_path: Path, files: Files) -> None:
    noise = tmp_path / "noise"
    noise.write_bytes(bytes(range(256)))
    cut = tmp_path / "cut"
    cut.write_bytes(files.ca.read_bytes()[:200])
    encrypted = tmp_path / "encrypted"
    key = load_pem_private_key(files.client_key.read_bytes(), None)
    encrypted.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, BestAvailableEncryption(b"secret"))
    )
    for path in (noise, cut, files.token, files.key):
        with pytest.raises(ConfigError, match="PEM"):
            read_pem(path, "CA")
        with pytest.raises(ConfigError, match="PEM"):
            open_channel(SOMEWHERE, Credentials(ca=path))
    for cert, path, cause in (
        (files.client_cert, noise, f"{noise} holds no private key in PEM form"),
        (files.client_cert, files.key, f"The key {files.key} is not that of the certificate {files.client_cert}"),
        (files.client_cert, encrypted, f"{encrypted} holds no private key in PEM form that is not encrypted"),
        (files.token, files.client_key, f"The certificate {files.token} holds no certificates in PEM form"),
    ):
        with pytest.raises(ConfigError, match=re.escape(cause)):
            read_identity(cert, path)


def test_what_contradicts_itself(files: Files) -> None:
    for credentials in (
        Credentials(insecure=True, ca=files.ca),
        Credentials(insecure=True, cert=files.client_cert, key=files.client_key),
        Credentials(cert=files.client_cert),
        Credentials(key=files.client_key),
    ):
        with pytest.raises(ConfigError):
            open_channel(SOMEWHERE, credentials)


def test_folders_that_are_not_safe_or_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError):
        open_channel(Address.of(tmp_path / "nowhere"), Credentials())
    folder = tmp_path / "open"
    folder.mkdir(mode=0o755)
    with pytest.raises(RefusedError, match="open to other users"):
        open_channel(Address.of(folder), Credentials())
