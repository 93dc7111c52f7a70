"""The registry of stores: open the store at a path, whatever its format.

To add a store, derive a class from ``DirectoryStore`` (``tiers.store.base``) in a module of its own, and give it a line
in ``STORES``.
"""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name

from moetier.tiers.manifest import Manifest
from moetier.tiers.store.base import DirectoryStore
from moetier.tiers.store.reader import ShardStore

# Module and class of each store. The order does not matter, as the classes recognise different locations. Only in a
# directory with the files of two stores, the first class opens it.
STORES = [
    "moetier.tiers.store.mirror:MirroredStore",
    "moetier.tiers.store.reader:ShardStore",
    "moetier.tiers.objects.cache:CachedStore",
    "moetier.runtime.stores.checkpoint_store:CheckpointStore",
]


def open_store(location: Path, *, damaged: bool = False) -> DirectoryStore:
    """Open the store at ``location``: a model directory, the cache of an object store, a checkpoint, or a GGUF file.

    A store with mirrors is opened with them. ``damaged``: open only the copy at ``location``, even if parts of it are
    bad; ``faults`` then has the errors.

    Raises StoreError, or for a checkpoint CheckpointError, if there is no store, or if it can't be opened.
    """
    return _class_for(location).open(location, damaged=damaged)


def read_manifest(location: Path) -> Manifest:
    """Return the manifest of the store at ``location``, as ``open_store`` finds it. Raises as ``open_store``."""
    return _class_for(location).read_manifest(location)


def _class_for(location: Path) -> type[DirectoryStore]:
    """Return the class of the store at ``location``. Modules of later classes in ``STORES`` are not imported."""
    recognising = (store_class for store_class in map(resolve_name, STORES) if store_class.recognises(location))
    return next(recognising, ShardStore)  # its errors say that there is no store, and how one is made
