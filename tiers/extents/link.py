"""Link a checkpoint: read it once, and make the checksums of its records and of all bytes beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moetier.tiers.errors import StoreError
from moetier.tiers.store.checksum import checksum_bytes, crc32c
from moetier.tiers.store.scrub import checksums

from .reader import ExtentStore, read_ranges
from .table import ExtentTable


def link(store: ExtentStore) -> Iterator[int | ExtentTable]:
    """Read a checkpoint whose table has no checksums. Yield the sizes of reads, as progress, and at last the table.

    ``store`` is open over all shards. Raises StoreReadError.
    """
    links = []
    for key, crc in checksums(store):
        if isinstance(crc, StoreError):
            raise crc
        links.append(checksum_bytes(crc))
        yield store.layout(key.block).payload_bytes
    sums = []
    for path, ranges in zip(store.paths, store.table.gaps(), strict=True):
        crc = 0
        for piece in read_ranges(path, ranges):
            crc = crc32c(piece, crc)
            yield len(piece)
        sums.append(crc)
    store.check_unchanged()
    shards = (replace(shard, rest=crc) for shard, crc in zip(store.table.shards, sums, strict=True))
    linked = replace(store.manifest, record_checksums=b"".join(links))
    yield replace(store.table, manifest=linked, shards=tuple(shards))
