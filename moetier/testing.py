"""Tests for stores of your own: derive a class from ``StoreTests``, and run it with pytest.

For a store that ``open_store`` opens, ``write`` is enough:

    from moetier.testing import StoreTests

    class TestMyStore(StoreTests):
        def write(self, folder, manifest, records):
            ...  # write the records into the folder, as the store wants them
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import secrets
import select
import signal
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from moetier.runtime.stores.registry import open_store
from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.errors import ChecksumError, ClosedError, MissingExpertError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey, Projection, RecordLayout
from moetier.tiers.manifest import Block, Manifest, method_of
from moetier.tiers.store.base import Store
from moetier.tiers.store.checksum import checksum_bytes, crc32c
from moetier.tiers.store.shard import store_digest

PATIENCE = 60.0  # seconds until a read that hangs fails

KEY = ExpertKey(0, 1)

Records = Mapping[ExpertKey, bytes]
"""Type of a dictionary from experts to their records, each ``record_bytes`` long, without its checksum."""


class Written(NamedTuple):
    """A store that a test has written."""

    folder: Path
    manifest: Manifest
    records: Records


def make_records(blocks: int, experts: int, rows: int, columns: int) -> tuple[Manifest, Records]:
    """Make random records of an invented model, and their manifest.

    The model has ``blocks`` blocks of ``experts`` experts, with matrices [2 * rows, columns] and [columns, rows] of 16
    bits.
    """
    projections = Projection("gate_up_proj", 2 * rows, columns, 16), Projection("down_proj", columns, rows, 16)
    layout = RecordLayout(projections)
    padding = bytes(layout.record_bytes - layout.payload_bytes)
    keys = [ExpertKey(block, expert) for block in range(blocks) for expert in range(experts)]
    records = {key: secrets.token_bytes(layout.payload_bytes) + padding for key in keys}
    crcs = [crc32c(memoryview(record)) for record in records.values()]
    manifest = Manifest(
        model="acme/tiny-moe",
        source_digest=hashlib.sha256(secrets.token_bytes()).hexdigest(),
        blocks=tuple(Block(f"model.layers.{at}.mlp.experts", "records", at, experts, 2) for at in range(blocks)),
        layouts={"records": layout},
        version="0.1.0",
        method=method_of("hqq", {"records": layout}, None),
    )
    return replace(manifest, digest=store_digest(crcs), record_checksums=b"".join(map(checksum_bytes, crcs))), records


class StoreTests:
    """The contract of ``Store`` (``moetier.tiers.store.base``), as tests. A derived class says how a store is made."""

    def write(self, folder: Path, manifest: Manifest, records: Records) -> None:
        """Write a store with these records into ``folder``, which is empty."""
        raise NotImplementedError

    def open(self, folder: Path) -> AbstractContextManager[Store]:
        """Open the store in ``folder``, which ``write`` has written. The default is ``open_store``."""
        return open_store(folder)

    def damage(self, folder: Path, store: Store, key: ExpertKey) -> None:
        """Flip one bit of a record where ``store`` reads it. A second call repairs the record.

        Without this method, the test that damage is noticed is skipped.
        """
        pytest.skip("this class does not say how a record is damaged")

    @pytest.fixture(scope="class")
    @classmethod
    def small(cls, tmp_path_factory: pytest.TempPathFactory) -> Written:
        """A store of records of 16 KiB."""
        written = Written(tmp_path_factory.mktemp("small"), *make_records(2, 4, 64, 32))
        cls().write(*written)
        return written

    @pytest.fixture(scope="class")
    @classmethod
    def large(cls, tmp_path_factory: pytest.TempPathFactory) -> Written:
        """A store of records of 18 MB, which may be read in several pieces."""
        written = Written(tmp_path_factory.mktemp("large"), *make_records(1, 2, 2048, 1560))
        cls().write(*written)
        return written

    def test_it_says_what_it_holds(self, small: Written) -> None:
        with self.open(small.folder) as store:
            assert store.manifest.blocks == small.manifest.blocks
            assert store.manifest.layouts == small.manifest.layouts
            assert store.manifest.digest == small.manifest.digest
            assert not store.faults

    def test_each_record_is_read_with_its_checksum(self, small: Written, large: Written) -> None:
        for written in (small, large):
            with self.open(written.folder) as store:
                for key, record in written.records.items():
                    slot = slot_of(store.manifest, key)
                    store.read_into(key, slot)
                    assert slot == record + checksum_bytes(crc32c(memoryview(record)))

    def test_many_threads_read_at_once(self, large: Written) -> None:
        def read_all(seed: int) -> bool:
            keys = list(large.records)
            random.Random(seed).shuffle(keys)
            return all(read_record(store, key) == large.records[key] for key in keys)

        with self.open(large.folder) as store, ThreadPoolExecutor(6) as pool:
            assert all(pool.map(read_all, range(6), timeout=PATIENCE))

    def test_a_pause_changes_nothing_and_its_exception_ends_the_read(self, large: Written) -> None:
        """A store need not call ``pause``."""
        calls, most, raises = 0, 0, False

        def pause() -> bool:
            nonlocal calls
            calls += 1
            if raises:
                raise InterruptedError
            return calls < most

        with self.open(large.folder) as store:
            slot = slot_of(large.manifest, KEY)
            for most in (100, 2):
                calls = 0
                slot[:] = bytes(len(slot))
                store.read_into(KEY, slot, pause)
                assert slot[:-CHECKSUM_BYTES] == large.records[KEY]
                assert calls <= most, "it was called after it had returned False"
            calls, raises = 0, True
            try:
                store.read_into(KEY, slot, pause)
            except InterruptedError:
                assert calls == 1
            else:
                assert calls == 0, "the read went on"
            assert read_record(store, KEY) == large.records[KEY]

    def test_what_the_model_does_not_have_is_an_error(self, small: Written) -> None:
        with self.open(small.folder) as store:
            slot = slot_of(small.manifest, KEY)
            for key in (ExpertKey(-1, 0), ExpertKey(2, 0), ExpertKey(0, -1), ExpertKey(0, 4), ExpertKey(0, 10**9)):
                with pytest.raises(MissingExpertError, match=small.manifest.model):
                    store.read_into(key, slot)
            assert not any(slot), "nothing was written"
            assert read_record(store, KEY) == small.records[KEY]

    def test_a_bad_record_is_an_error_and_others_are_read(self, tmp_path: Path) -> None:
        manifest, records = make_records(2, 4, 64, 32)
        self.write(tmp_path, manifest, records)
        bad = ExpertKey(1, 2)
        with self.open(tmp_path) as store:
            self.damage(tmp_path, store, bad)
            for _ in range(2):
                with pytest.raises(ChecksumError, match="expert 2"):
                    read_record(store, bad)
                for key in (KEY, ExpertKey(1, 1), ExpertKey(1, 3)):
                    assert read_record(store, key) == records[key]
            self.damage(tmp_path, store, bad)
            assert read_record(store, bad) == records[bad], "an error is not remembered"

    def test_after_close_a_read_is_an_error(self, small: Written) -> None:
        with self.open(small.folder) as store:
            slot = slot_of(small.manifest, KEY)
            store.read_into(KEY, slot)
            for _ in range(2):
                store.close()
                with pytest.raises(ClosedError):
                    store.read_into(KEY, slot)

    def test_a_fork_is_refused_and_closes_its_own(self, small: Written) -> None:
        with self.open(small.folder) as store:
            assert read_record(store, KEY) == small.records[KEY]
            assert "ClosedError" in in_fork(lambda: read_record(store, KEY))
            assert in_fork(store.close) == "returned None"
            assert read_record(store, KEY) == small.records[KEY], "the parent goes on"

    def test_a_host_tier_reads_from_it(self, small: Written) -> None:
        """At the smallest budget, with what a host tier registers."""
        slots = slots_for(small.manifest, smallest_budget(small.manifest))
        with self.open(small.folder) as store, HostTier(store, slots=slots, loads_rest=store.is_local) as host:
            store.on_fault(host.condemn)
            store.on_recovery(host.count_failure)
            for seed in range(20):
                wanted = [ExpertKey(seed % 2, expert) for expert in random.Random(seed).sample(range(4), 3)]
                read = {lease.key: bytes(lease.record) for lease in host.acquire(wanted)}
                assert read == {key: small.records[key] for key in wanted}
            host.check_integrity()


def slot_of(manifest: Manifest, key: ExpertKey) -> memoryview:
    """Return a slot for a record, which begins on a page."""
    return memoryview(mmap.mmap(-1, manifest.layout(key.block).slot_bytes))


def read_record(store: Store, key: ExpertKey) -> bytes:
    """Read a record. Return it without its checksum."""
    slot = slot_of(store.manifest, key)
    store.read_into(key, slot)
    return bytes(slot[:-CHECKSUM_BYTES])


def in_fork(work: Callable[[], object]) -> str:
    """Call ``work`` in a forked child. Return its result or its error, as text. A hang fails."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of forks of a process with threads
        child = os.fork()
    if not child:
        try:
            text = f"returned {work()}"
        except BaseException as error:
            text = f"{type(error).__name__}: {' '.join(str(error).splitlines())}"
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    try:
        assert select.select([reading], [], [], PATIENCE)[0], "the child hangs"
        return os.read(reading, 4096).decode()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
