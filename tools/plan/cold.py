"""Cold start of a model in an object store: how long its trunk and its experts take to be fetched."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moetier.tiers.source import LOADERS
from moetier.tiers.store.checksum import READ_PIECE_BYTES
from moetier.tiers.store.folder import GROUP
from moetier.tiers.store.shard import ShardFile

SECONDS = 2.0  # of fetching, to measure the rate


def cold_start(folder: Path) -> dict[str, Any] | None:
    """Return the bytes that a cache of an object store lacks, and the seconds to fetch them, as a dictionary for JSON.

    Return None if ``folder`` is no such cache, or lacks nothing. To measure the rate, records, or their first 8 MiB,
    are fetched for SECONDS; they are not kept. Raises StoreError.
    """
    from moetier.tiers.objects.cache import CachedStore

    if not CachedStore.recognises(folder):
        return None
    with CachedStore.open(folder) as store:
        manifest, trunk = store.manifest, 0
        for name in manifest.trunk:  # the folder of ``cache_folder.outline`` has holes in place of the trunk's weights
            status = (folder / name).stat()
            trunk += max(status.st_size - 512 * status.st_blocks, 0)
        experts = manifest.stored_bytes - store.cached_bytes
        stop = time.monotonic() + SECONDS

        def work(seed: int) -> int:
            chosen, done = random.Random(seed), 0
            while not done or time.monotonic() < stop:
                file = ShardFile.of(Path(GROUP), manifest, chosen.randrange(len(manifest.blocks)))
                view = memoryview(bytearray(min(file.slot_bytes, READ_PIECE_BYTES)))
                store.objects.read(file.path.as_posix(), chosen.randrange(file.experts) * file.slot_bytes, view)
                done += len(view)
            return done

        began = time.monotonic()
        with ThreadPoolExecutor(LOADERS, thread_name_prefix="moetier-plan") as pool:
            rate = sum(pool.map(work, range(LOADERS))) / (time.monotonic() - began)
        return {
            "address": store.address,
            "bytes_per_s": rate,
            "trunk_bytes": trunk,
            "trunk_s": trunk / rate,
            "experts_bytes": experts,
            "experts_s": experts / rate,
        }
