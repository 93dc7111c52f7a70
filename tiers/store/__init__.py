"""A store on disk: a zarr v3 group with one shard of records for each block. The trunk's files are beside the store.

``base`` has the interface of all stores, also of those in other packages. ``runtime.stores`` opens them.

Other packages use ``base``, ``reader.ShardStore``, ``mirror``, ``writer.StoreWriter``, ``folder``, ``shard``,
``trunk``, ``scrub``, ``checksum``, ``unchanged`` and ``atomic``. Only ``writer`` imports zarr.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .base import DirectoryStore as DirectoryStore
    from .base import Store as Store
    from .base import WrapperStore as WrapperStore
    from .reader import ShardStore as ShardStore
    from .writer import ShardWriter as ShardWriter
    from .writer import StoreWriter as StoreWriter

__getattr__ = exports(
    __name__,
    {
        "DirectoryStore": "base",
        "ShardStore": "reader",
        "ShardWriter": "writer",
        "Store": "base",
        "StoreWriter": "writer",
        "WrapperStore": "base",
    },
)
