"""Records over the network: whole and right, or an error; nothing that a daemon sends can make it otherwise."""

from __future__ import annotations

import errno
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import pytest
from integrity import check_integrity
from outlets import Behaviour, Outlet, served_folder, serving
from readers import PATIENCE
from stores import layout_of, make_plan, make_records, manifest_of, slot_of, slot_with, written
from threads import Task, run_all, wait_until

from moetier.proto import expert_store_pb2 as pb
from moetier.runtime.client import remote
from moetier.runtime.client.remote import RemoteStore
from moetier.runtime.wire.address import Address, Credentials
from moetier.runtime.wire.piece import WIRE_PIECE_BYTES, decode_piece, encode_piece
from moetier.testing import in_fork
from moetier.tiers.errors import (
    ChecksumError,
    ClosedError,
    ExhaustedError,
    MoetierError,
    ProtocolError,
    UnavailableError,
    UnknownModelError,
)
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.reader import ShardStore

PLAIN = Credentials(insecure=True)
LARGE = layout_of(rows=1024, columns=2304)  # 14 MB: over all channels
PLAN = make_plan(blocks=2, experts=3)
RECORDS = make_records(PLAN)
LARGE_PLAN = make_plan(blocks=1, experts=3, top_k=1, layout=LARGE)


@cache
def large_records() -> dict[ExpertKey, bytes]:
    return make_records(LARGE_PLAN)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("small"), PLAN, RECORDS)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("large"), LARGE_PLAN, large_records())


@contextmanager
def hostile(folder: Path, behaviour: Behaviour, **bounds: float) -> Iterator[tuple[RemoteStore, Outlet]]:
    with ShardStore.open(folder) as store:
        manifest = store.manifest
    outlet = Outlet(manifest, behaviour)
    with serving(outlet) as address, RemoteStore(address, PLAIN, manifest, **bounds) as reader:
        yield reader, outlet


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_every_record_arrives_whole(small: Path, large: Path, channels: int) -> None:
    for folder, records in ((small, RECORDS), (large, large_records())):
        manifest = manifest_of(folder)
        with (
            served_folder(folder) as (address, host, fetches),
            RemoteStore(address, PLAIN, manifest, channels=channels) as reader,
        ):
            reader.probe()
            for key, record in records.items():
                slot = slot_of(manifest, key)
                reader.read_into(key, slot)
                assert slot == slot_with(record)
            assert fetches.counts()["fetched_bytes"] == sum(len(record) + 4 for record in records.values())
            assert host.stats().misses <= len(records) * channels


def test_a_cold_record_wanted_by_eight_is_read_once(large: Path) -> None:
    manifest, key = manifest_of(large), ExpertKey(0, 1)
    with served_folder(large) as (address, host, _), ExitStack() as stack:
        readers = [stack.enter_context(RemoteStore(address, PLAIN, manifest)) for _ in range(8)]
        slots = [slot_of(manifest, key) for _ in readers]
        run_all([lambda r=r, s=s: r.read_into(key, s) for r, s in zip(readers, slots, strict=True)])
        assert all(slot == slot_with(large_records()[key]) for slot in slots)
        stats = host.stats()
        assert stats.bytes_in == LARGE.slot_bytes


# -- what a hostile or broken daemon sends ----------------------------------------------------------------------------


def honest(request: pb.FetchRequest) -> bytes:
    """The bytes that were asked for."""
    whole = slot_with(large_records()[ExpertKey(request.block, request.expert)])
    return whole[request.offset : request.offset + request.length]


def pieces(data: bytes, size: int = WIRE_PIECE_BYTES) -> Iterator[bytes]:
    for at in range(0, len(data), size):
        yield encode_piece(memoryview(data)[at : at + size])


def flipped(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    data = bytearray(honest(request))
    data[len(data) // 2] ^= 1
    yield from pieces(bytes(data))


def another(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    """One part is of another record."""
    if request.offset:
        request.expert = (request.expert + 1) % 3
    yield from pieces(honest(request))


def swapped(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from reversed(list(pieces(honest(request), WIRE_PIECE_BYTES // 2)))


def short(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from pieces(honest(request)[:-1])


def empty(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from ()


def longer(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from pieces(honest(request) + b"x")


def endless(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    while context.is_active():
        yield from pieces(bytes(WIRE_PIECE_BYTES))


def too_large(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from pieces(honest(request), 2 * WIRE_PIECE_BYTES)


def far_too_large(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield encode_piece(memoryview(bytes(16 * WIRE_PIECE_BYTES)))


def noise(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
    yield b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        (flipped, ChecksumError),
        (another, ChecksumError),
        (swapped, ChecksumError),
        (short, ProtocolError),
        (empty, ProtocolError),
        (longer, ProtocolError),
        (endless, ProtocolError),
        (too_large, ProtocolError),
        (far_too_large, ProtocolError),
        (noise, ProtocolError),
    ],
)
def test_wrong_bytes_are_an_error(large: Path, behaviour: Behaviour, expected: type[MoetierError]) -> None:
    key = ExpertKey(0, 1)
    with hostile(large, behaviour) as (reader, outlet):
        with pytest.raises(expected):
            reader.read_into(key, slot_of(reader.manifest, key))
        assert outlet.requests
        with HostTier(reader, slots={"records": 1}) as host:
            with pytest.raises(expected):
                list(host.acquire([key]))
            assert host.stats().ready == 0, "nothing is kept"
            check_integrity(host)


def test_what_fails_is_tried_once_more(large: Path) -> None:
    with hostile(large, flipped, channels=1) as (reader, outlet):
        with pytest.raises(ChecksumError):
            reader.read_into(ExpertKey(0, 1), slot_of(reader.manifest, ExpertKey(0, 1)))
        assert len(outlet.requests) == 2


def test_a_stream_that_breaks_is_read_again_whole(large: Path) -> None:
    broken = threading.Semaphore(2)

    def breaks(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        data = honest(request)
        if broken.acquire(blocking=False):
            yield from pieces(bytes(len(data) // 2))  # wrong ones, too
            context.abort(grpc.StatusCode.UNAVAILABLE, "broken")
        yield from pieces(data)

    key = ExpertKey(0, 2)
    with hostile(large, breaks) as (reader, _):
        slot = slot_of(reader.manifest, key)
        reader.read_into(key, slot)
        assert slot == slot_with(large_records()[key])


def test_fields_of_a_later_version_are_ignored(large: Path) -> None:
    def newer(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        for piece in pieces(honest(request)):
            yield b"\x10\x07" + piece + b"\x1a\x03abc"  # field 2, a varint; field 3, bytes
            yield b""

    key = ExpertKey(0, 0)
    with hostile(large, newer) as (reader, _):
        slot = slot_of(reader.manifest, key)
        reader.read_into(key, slot)
        assert slot == slot_with(large_records()[key])


@pytest.mark.parametrize("when", ["at once", "in the middle", "with empty pieces"])
def test_a_daemon_that_stands_still_is_not_waited_for(large: Path, when: str) -> None:
    def stands(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        over = threading.Event()
        context.add_callback(over.set)
        if when == "in the middle":
            yield from pieces(honest(request)[:WIRE_PIECE_BYTES])
        while not over.wait(0.05):
            if when == "with empty pieces":
                yield b""

    key = ExpertKey(0, 0)
    with hostile(large, stands, timeout=0.5) as (reader, outlet):
        task = Task(lambda: reader.read_into(key, slot_of(reader.manifest, key)))
        with pytest.raises(UnavailableError):
            task.result()
        assert len(outlet.requests) <= 3, "what never came is not asked for again"


def test_the_slot_is_left_alone_once_the_read_has_returned(large: Path) -> None:
    """Part of the record breaks at once; the others, which were slow, write nothing any more."""
    slow = threading.Event()

    def behaviour(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        if request.offset == 0:
            context.abort(grpc.StatusCode.DATA_LOSS, "broken")
        slow.wait(PATIENCE)
        yield from pieces(honest(request))

    key = ExpertKey(0, 0)
    with hostile(large, behaviour) as (reader, _):
        slot = slot_of(reader.manifest, key)
        with pytest.raises(ChecksumError):
            reader.read_into(key, slot)
        slot[:] = b"\x55" * len(slot)
        slow.set()
        time.sleep(0.3)
        assert slot == b"\x55" * len(slot)


def test_a_daemon_that_takes_no_more_calls_has_no_slot_to_spare(small: Path) -> None:
    """It sends nothing wrong, and has not gone away."""
    over = threading.Event()

    def waits(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        over.wait(60)
        yield encode_piece(memoryview(slot_with(RECORDS[ExpertKey(request.block, request.expert)])))

    outlet = Outlet(manifest_of(small), waits)
    with serving(outlet, calls=1) as address, RemoteStore(address, PLAIN, manifest_of(small)) as reader:
        slot = slot_of(reader.manifest, ExpertKey(0, 0))
        task = Task(lambda: reader.read_into(ExpertKey(0, 0), slot))
        wait_until(lambda: len(outlet.requests) == 1)
        try:
            with pytest.raises(ExhaustedError):
                reader.read_into(ExpertKey(0, 1), slot_of(reader.manifest, ExpertKey(0, 1)))
        finally:
            over.set()
        task.result()


class WithoutThreads(ThreadPoolExecutor):
    def submit(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("can't start new thread")


def test_a_part_without_a_thread_that_can_read_it(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no thread to be had: nothing is written behind the caller's back."""
    key = ExpertKey(0, 0)
    monkeypatch.setattr(remote, "ThreadPoolExecutor", WithoutThreads)
    with served_folder(large) as (address, _, _), RemoteStore(address, PLAIN, manifest_of(large)) as reader:
        slot = slot_of(reader.manifest, key)
        with pytest.raises(UnavailableError, match="can't be called"):
            reader.read_into(key, slot)
        assert not any(slot), "the transfer ended before its first byte"


# -- who and what -----------------------------------------------------------------------------------------------------


def test_another_store_is_refused(small: Path, large: Path) -> None:
    with (
        served_folder(small) as (address, _, _),
        RemoteStore(address, PLAIN, manifest_of(large)) as reader,
        pytest.raises(UnknownModelError, match="acme/tiny-moe"),
    ):
        reader.probe()


def test_names_of_a_stranger_are_told_in_one_line(small: Path) -> None:
    stranger = replace(manifest_of(small), model="a\nb" * 10_000, digest="0" * 64)
    with (
        serving(Outlet(stranger, empty)) as address,
        RemoteStore(address, PLAIN, manifest_of(small)) as reader,
        pytest.raises(UnknownModelError) as caught,
    ):
        reader.probe()
    assert "it serves a ba ba b" in caught.value.cause
    assert "\n" not in caught.value.cause
    assert len(caught.value.cause) < 400


def test_nobody_there(small: Path) -> None:
    with RemoteStore(Address(target="127.0.0.1:1"), PLAIN, manifest_of(small)) as reader:
        with pytest.raises(UnavailableError):
            reader.probe()
        with pytest.raises(UnavailableError):
            reader.read_into(ExpertKey(0, 0), slot_of(reader.manifest, ExpertKey(0, 0)))


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, "Too many open files"), RuntimeError("can't start new thread")]
)
def test_a_process_that_cannot_connect_says_so(small: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(remote, "open_channel", fails)
    with RemoteStore(Address(target="127.0.0.1:1"), PLAIN, manifest_of(small)) as reader:
        slot = slot_of(reader.manifest, ExpertKey(0, 0))
        calls: list[Callable[[], object]] = [
            reader.probe,
            lambda: reader.read_into(ExpertKey(0, 0), slot),
            lambda: reader.compute(pb.ComputeRequest(), 1),
        ]
        for call in calls:
            with pytest.raises(UnavailableError, match=re.escape(str(error))):
                call()


def test_a_check_in_a_fork_or_after_close_is_an_error(small: Path) -> None:
    reader = RemoteStore(Address(target="127.0.0.1:1"), PLAIN, manifest_of(small))
    assert "ClosedError" in in_fork(reader.probe)
    reader.close()
    with pytest.raises(ClosedError):
        reader.probe()


def test_closing_ends_what_is_being_read(large: Path) -> None:
    def stands(request: pb.FetchRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        over = threading.Event()
        context.add_callback(over.set)
        over.wait(3 * PATIENCE)
        yield from ()

    key = ExpertKey(0, 0)
    with hostile(large, stands, timeout=3 * PATIENCE) as (reader, outlet):
        task = Task(lambda: reader.read_into(key, slot_of(reader.manifest, key)))
        wait_until(lambda: len(outlet.requests) == 3)
        reader.close()
        with pytest.raises((UnavailableError, ClosedError)):
            task.result()


class Computer(Outlet):
    """Begins to answer computations, and ends once ``goes_on`` is set."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest, empty)
        self.goes_on = threading.Event()

    def Compute(self, request: pb.ComputeRequest, context: grpc.ServicerContext) -> Iterator[bytes]:  # type: ignore[override]  # serialised pieces
        yield encode_piece(memoryview(b"begun"))
        self.goes_on.wait(60)
        yield encode_piece(memoryview(b"ended"))


def test_renewed_connections_are_closed_and_calls_on_the_last_one_go_on(small: Path) -> None:
    def connections() -> int:
        found = 0
        for each in Path("/proc/self/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile, as the one of this folder
                found += str(each.readlink()).startswith("socket:")
        return found

    outlet = Computer(manifest_of(small))
    with serving(outlet) as address, RemoteStore(address, PLAIN, manifest_of(small), timeout=60) as reader:
        opened = []
        for _ in range(10):
            call, _ = reader.compute(pb.ComputeRequest(), 1)
            assert decode_piece(next(call))[0] == b"begun"
            opened.append(connections())
            reader.renew()
        wait_until(lambda: connections() <= opened[1])
        outlet.goes_on.set()
        assert [decode_piece(message)[0] for message in call] == [b"ended"]
