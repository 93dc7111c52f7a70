"""docs/protocol.md: a client that was written from it alone (``protocol_client.py``) reads from a real daemon."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import grpc
import outlets  # noqa: F401 - keeps gRPC's event loop from one test to the next
import protocol_client
import pytest
from daemons import DaemonProcess, running_daemon
from format_reader import Reader
from protocol_client import Client
from stores import layout_of, make_store

SLOT = layout_of().slot_bytes


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 blocks of 8 experts, top 2."""
    folder = tmp_path_factory.mktemp("store")
    make_store(folder, experts=8)
    return folder


@pytest.fixture(scope="module")
def daemon(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """With 12 slots: 4 a block."""
    with running_daemon(store, ram=12 * SLOT, folder=tmp_path_factory.mktemp("daemon") / "d") as process:
        yield process


def record(store: Path, block: int, expert: int) -> bytes:
    """As it is in the store: what a slot begins with."""
    return Reader(store).record(block, expert).tobytes()


def test_it_has_the_messages_and_nothing_else_of_moetier_s() -> None:
    tree = ast.parse(Path(protocol_client.__file__).read_text())
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {name for name in names if name.startswith("moetier")}
    assert ours == {"moetier.proto", "moetier.proto.expert_store_pb2_grpc"}


def test_misses_hits_and_what_is_evicted(store: Path, daemon: DaemonProcess) -> None:
    with Client(daemon.folder, Reader(store).manifest) as client:
        assert client.arena.digest == Reader(store).manifest["digest"]
        (model,) = client.describe().models
        assert dict(model.slots) == client.welcome["slots"] == {"records": 12}

        assert client.arena.copy(1, 5) is None
        for expert, slot in client.demand(1, [5, 2, 7]):
            assert slot[:-4] == record(store, 1, expert)
        found = dict(client.hits(1, [5, 2, 7, 0]))
        assert sorted(found) == [2, 5, 7]
        assert all(slot[:-4] == record(store, 1, expert) for expert, slot in found.items())
        daemon.wait_for("reported_hits == 3")

        # more than a block has slots, and more than a client may hold
        assert sorted(expert for expert, _ in client.demand(1, range(8))) == [*range(8)]
        there = [expert for expert in range(8) if client.arena.copy(1, expert) is not None]
        assert 0 < len(there) < 8


def test_a_fetch(store: Path, daemon: DaemonProcess) -> None:
    manifest = Reader(store).manifest
    with Client(daemon.folder, manifest) as client:
        whole = client.fetch(manifest["digest"], 2, 3)
        assert len(whole) == SLOT
        assert whole[:-4] == record(store, 2, 3)
        assert client.fetch(manifest["digest"], 2, 3, offset=100, length=50) == whole[100:150]


def test_what_is_refused(store: Path, daemon: DaemonProcess) -> None:
    manifest = Reader(store).manifest
    with pytest.raises(ConnectionError, match="UnknownModelError"):
        Client(daemon.folder, manifest | {"digest": "0" * 64})
    with Client(daemon.folder, manifest) as client:
        with pytest.raises(LookupError, match="MissingExpertError"):
            list(client.demand(0, [99]))
        assert [expert for expert, _ in client.demand(0, [1])] == [1]  # the stream goes on
        with pytest.raises(grpc.RpcError) as raised:
            list(client.demand(0, [1, 1]))
        assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert b"ProtocolError" in dict(raised.value.trailing_metadata() or ())["moetier-error-bin"]
