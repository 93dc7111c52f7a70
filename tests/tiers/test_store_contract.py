"""The contract of stores (moetier.testing.StoreTests), checked for each store and wrapper of the project."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from extent_files import open_extents, write_extents
from faults import flip_bit
from object_servers import served_folder
from outlets import PLAIN, served
from stores import manifest_of, write_store

from moetier.runtime.client.remote import RemoteStore
from moetier.runtime.client.spread import SpreadStore
from moetier.runtime.stores.registry import open_store
from moetier.runtime.wire.address import Address
from moetier.testing import Records, StoreTests
from moetier.tiers.cache.budget import slots_for
from moetier.tiers.extents.reader import ExtentStore
from moetier.tiers.extents.table import ExtentTable
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.manifest import Manifest
from moetier.tiers.objects.cache import CachedStore
from moetier.tiers.objects.cache_folder import fetch
from moetier.tiers.store.base import DirectoryStore, Store, WrapperStore
from moetier.tiers.store.folder import GROUP, read_json
from moetier.tiers.store.mirror import MirroredStore
from moetier.tiers.store.reader import ShardStore
from moetier.tiers.store.scrubbable import Scrubbable
from moetier.tiers.store.shard import ShardFile


class TestExpertStore(StoreTests):
    def write(self, folder: Path, manifest: Manifest, records: Records) -> None:
        write_store(folder, manifest.plan, dict(records))

    def damage(self, folder: Path, store: Store, key: ExpertKey) -> None:
        file = ShardFile.of(folder / GROUP, store.manifest, key.block)
        flip_bit(file.path, key.expert * file.slot_bytes + 1000)


class TestWrapperStore(TestExpertStore):
    def open(self, folder: Path) -> WrapperStore:
        return WrapperStore(ShardStore.open(folder))

    def test_it_passes_everything_to_the_store_that_it_wraps(self) -> None:
        bases = Store, DirectoryStore, Scrubbable
        members = {name for each in bases for name in vars(each) if not name.startswith("_")}
        made = {"open", "recognises", "read_manifest", "directory", "manifest"}  # by a derived class, or copied
        computed = {"layout", "is_local", "check_record"}  # from what is passed
        assert members - made - computed <= vars(WrapperStore).keys()


class TestMirroredStore(TestExpertStore):
    """Both copies are one folder, so that damage is in both."""

    @contextlib.contextmanager
    def open(self, folder: Path) -> Iterator[Store]:
        with MirroredStore([ShardStore.open(folder), ShardStore.open(folder)]) as store:
            yield store


class TestCachedStore(TestExpertStore):
    @contextlib.contextmanager
    def open(self, folder: Path) -> Iterator[Store]:
        pytest.importorskip("obstore")
        with served_folder(folder) as server, open_store(fetch(server.address, folder / "cache")) as store:
            assert isinstance(store, CachedStore)
            yield store


class TestExtentStore(StoreTests):
    def write(self, folder: Path, manifest: Manifest, records: Records) -> None:
        table = write_extents(folder, manifest, dict(records))
        (folder / "table.json").write_text(json.dumps(table.to_json()))

    def open(self, folder: Path) -> ExtentStore:
        path = folder / "table.json"
        return open_extents(folder, ExtentTable.from_json(read_json(path), str(path)))

    def damage(self, folder: Path, store: Store, key: ExpertKey) -> None:
        assert isinstance(store, ExtentStore)
        extent = store.table.extents(key)[1]
        flip_bit(store.paths[extent.shard], extent.offset)


class TestRemoteStore(TestExpertStore):
    daemons = 1

    @contextlib.contextmanager
    def open(self, folder: Path) -> Iterator[Store]:
        with contextlib.ExitStack() as closing:
            store = closing.enter_context(open_store(folder))
            slots = slots_for(store.manifest, store.manifest.stored_bytes)
            host = closing.enter_context(HostTier(store, slots=slots))
            addresses = [closing.enter_context(served(host)) for _ in range(self.daemons)]
            yield closing.enter_context(self.reader(addresses, store.manifest))

    def reader(self, addresses: list[Address], manifest: Manifest) -> Store:
        return RemoteStore(addresses[0], PLAIN, manifest)


class TestSpreadStore(TestRemoteStore):
    daemons = 2

    def reader(self, addresses: list[Address], manifest: Manifest) -> Store:
        return SpreadStore.open(addresses, PLAIN, manifest)


class TestSpreadStoreWithoutDaemons(TestExpertStore):
    """All records come from the local store."""

    def open(self, folder: Path) -> SpreadStore:
        return SpreadStore.open([Address(target="127.0.0.1:1")], PLAIN, manifest_of(folder), folder)
