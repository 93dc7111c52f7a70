"""``StoreTests``: what every store must do, as tests.

For a store that ``open_store`` opens, ``write`` is enough:

    from moetier.testing import StoreTests

    class TestMyStore(StoreTests):
        def write(self, folder, manifest, records):
            ...  # write the records into the folder, as the store wants them
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from moetier.runtime.stores.registry import open_store
from moetier.tiers.cache.budget import slots_for, smallest_budget
from moetier.tiers.errors import ChecksumError, ClosedError, MissingExpertError, MoetierError
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import CHECKSUM_BYTES, ExpertKey, Projection, RecordLayout
from moetier.tiers.manifest import Block, Manifest, method_of
from moetier.tiers.store.base import DirectoryStore, Store
from moetier.tiers.store.checksum import checksum_bytes, crc32c
from moetier.tiers.store.scrub import scrub
from moetier.tiers.store.scrubbable import Problem
from moetier.tiers.store.shard import store_digest

from .reads import PATIENCE, in_fork, paused_read, read_record, settles, slot_of, until_it_waits

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
        """A store of records of 9.6 MB, which may be read in several pieces."""
        written = Written(tmp_path_factory.mktemp("large"), *make_records(1, 2, 1024, 1560))
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
            if isinstance(store, DirectoryStore):
                problems = [problem for problem in scrub(store) if isinstance(problem, Problem)]
                assert [(problem.block, problem.expert) for problem in problems] == [bad]
            self.damage(tmp_path, store, bad)
            assert read_record(store, bad) == records[bad], "an error is not remembered"

    def test_records_in_wrong_places_are_errors(self, small: Written, tmp_path: Path) -> None:
        """If the store keeps the manifest that it is given, which has the checksum of each record."""
        other = ExpertKey(1, 3)
        swapped = {**small.records, KEY: small.records[other], other: small.records[KEY]}
        self.write(tmp_path, small.manifest, swapped)
        with self.open(tmp_path) as store:
            if store.manifest.record_checksums != small.manifest.record_checksums:
                pytest.skip("it makes a manifest of its own")
            for key in (KEY, other):
                with pytest.raises(ChecksumError):
                    read_record(store, key)

    def test_bad_files_are_errors_of_moetier(self, small: Written, tmp_path: Path) -> None:
        """Each file is missing, empty, cut or a folder. Then records are right, or there is an error with advice."""
        with self.open(small.folder) as store:
            if not store.is_local:
                pytest.skip("its files are those of another store")
        opens: list[Callable[[Path], AbstractContextManager[Store]]] = [self.open]
        if self._is_registered:
            opens.append(partial(open_store, damaged=True))
        folder = tmp_path / "store"
        folder.mkdir()
        self.write(folder, small.manifest, small.records)
        for file in [path for path in sorted(folder.rglob("*")) if path.is_file()]:
            for spoil in (Path.unlink, _empty, _cut, _replace_with_folder):
                copy = Path(shutil.copytree(folder, tmp_path / "copy"))
                spoil(copy / file.relative_to(folder))
                for opening in opens:
                    with contextlib.suppress(MoetierError), opening(copy) as store:
                        for key, record in small.records.items():
                            with contextlib.suppress(MoetierError):
                                assert read_record(store, key) == record
                shutil.rmtree(copy)

    def test_it_answers_what_commands_ask(self, small: Written) -> None:
        with self.open(small.folder) as store:
            if not isinstance(store, DirectoryStore):
                pytest.skip("it is not in a directory")
            assert store.directory.exists()
            assert all(store.path(block).exists() for block in range(len(small.manifest.blocks)))
            assert store.fix.endswith(".")
            assert all(path.is_file() for path in store.other_files)
            assert not store.other_file_faults()
            assert not [problem for problem in scrub(store) if isinstance(problem, Problem)]

    def test_its_class_recognises_it_and_nothing_else(self, small: Written, tmp_path: Path) -> None:
        if not self._is_registered:
            pytest.skip("open_store does not open it")
        with self.open(small.folder) as store:
            assert isinstance(store, DirectoryStore)
            assert store.directory == small.folder
            store_class, manifest = type(store), store.manifest
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "empty").mkdir()
        for location in (tmp_path, tmp_path / "config.json", tmp_path / "empty", tmp_path / "none"):
            assert not store_class.recognises(location)
        assert store_class.recognises(small.folder)
        assert store_class.read_manifest(small.folder) == manifest
        with store_class.open(small.folder, damaged=True) as store:
            assert not store.faults
            assert read_record(store, KEY) == small.records[KEY]

    @property
    def _is_registered(self) -> bool:
        return type(self).open is StoreTests.open

    def test_after_an_error_no_thread_writes(self, tmp_path: Path) -> None:
        manifest, records = make_records(1, 2, 1024, 1560)
        self.write(tmp_path, manifest, records)
        threads = threading.active_count()
        with self.open(tmp_path) as store:
            self.damage(tmp_path, store, KEY)
            slot = slot_of(manifest, KEY)
            with pytest.raises(ChecksumError):
                store.read_into(KEY, slot)
            mark = b"\xa5" * len(slot)
            slot[:] = mark
        assert settles(lambda: threading.active_count() <= threads), "threads go on after close"
        assert slot == mark

    def test_close_releases_threads_and_descriptors(self, small: Written, large: Written) -> None:
        def held() -> tuple[int, int]:
            return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

        def read_all() -> None:
            for written in (small, large):
                with self.open(written.folder) as store:
                    for key in written.records:
                        read_record(store, key)

        read_all()  # what libraries keep for the life of the process is made now
        threads, descriptors = held()
        read_all()
        assert settles(lambda: held()[0] <= threads and held()[1] <= descriptors), (threads, descriptors, held())

    def test_close_waits_for_a_read(self, small: Written) -> None:
        """A store that asks another machine may end the read instead."""
        with self.open(small.folder) as store, paused_read(store, KEY) as read:
            closing = threading.Thread(target=store.close)
            closing.start()
            returns = until_it_waits(closing)
            found = read.finish()
            closing.join(PATIENCE)
            assert not closing.is_alive(), "close hangs"
            if found != small.records[KEY]:
                assert isinstance(found, ClosedError if store.is_local else MoetierError), found
                assert returns or not store.is_local, "the read failed, though close waited for it"

    def test_a_fork_during_a_read_does_not_wait_for_it(self, small: Written) -> None:
        with self.open(small.folder) as store, paused_read(store, KEY) as read:
            assert "ClosedError" in in_fork(lambda: read_record(store, KEY))
            assert in_fork(store.close) == "returned None"
            assert read.finish() == small.records[KEY]

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
            for seed in range(20):
                wanted = [ExpertKey(seed % 2, expert) for expert in random.Random(seed).sample(range(4), 3)]
                read = {lease.key: bytes(lease.record) for lease in host.acquire(wanted)}
                assert read == {key: small.records[key] for key in wanted}
            assert (host.stats().failures, host.stats().leased) == (0, 0)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _replace_with_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
