"""A store on disk: a zarr v3 group with one shard of records for each block. The trunk's files are beside the store.

Other packages use ``mirror.open_store``, ``reader.ExpertStore``, ``writer.StoreWriter``, ``folder``, ``shard``,
``trunk``, ``scrub``, ``checksum``, ``unchanged`` and ``atomic``, and read the headers of files with ``safetensors`` and
``gguf``. The package imports only the top-level modules of ``tiers``. Only ``writer`` imports zarr.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .reader import ExpertStore as ExpertStore
    from .writer import ShardWriter as ShardWriter
    from .writer import StoreWriter as StoreWriter

__getattr__ = exports(__name__, {"ExpertStore": "reader", "ShardWriter": "writer", "StoreWriter": "writer"})
