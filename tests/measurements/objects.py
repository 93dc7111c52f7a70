"""Compare the rate at which records are fetched from an object store with that of obstore alone.

    python tests/measurements/objects.py --megabytes 2.5 --records 200

Both read the same records from SeaweedFS on this machine, in as many threads, by turns. The cache is a new one each
time, so that every record is fetched, checked and written.
"""

from __future__ import annotations

import argparse
import mmap
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import obstore
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

from object_servers import weed_bucket
from obstore.store import from_url
from stores import layout_of, make_plan, make_records, write_store

from moetier.tiers.layout import ExpertKey
from moetier.tiers.objects.cache import CachedStore
from moetier.tiers.objects.cache_folder import fetch
from moetier.tiers.objects.push import push
from moetier.tiers.store.shard import ShardFile
from moetier.tools.cli.progress import transfer_progress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=2.5, help="of a record (default: %(default)s)")
    parser.add_argument("--records", type=int, default=200, help="number of records (default: %(default)s)")
    parser.add_argument("--loaders", type=int, default=4, help="fetches at a time (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    rows = max(64, round(arguments.megabytes * 1e6 / (3 * 1024 * 2)))
    plan = make_plan(blocks=1, experts=arguments.records, layout=layout_of(rows, 1024))
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        write_store(folder / "store", plan, make_records(plan))
        with weed_bucket(folder / "weed", patch) as bucket:
            address = f"{bucket}/model"
            push(folder / "store", address, transfer_progress("push"))
            rates: dict[str, list[float]] = {"obstore": [], "cached": []}
            for round_ in range(arguments.rounds):
                with CachedStore.open(fetch(address, folder / f"cache{round_}")) as store:
                    slot, client = store.layout(0).slot_bytes, from_url(address, client_options={"allow_http": True})
                    shard = ShardFile.of(Path(store.folder.name), store.manifest, 0).path.as_posix()

                    def raw(expert: int, client: Any = client, shard: str = shard, slot: int = slot) -> None:
                        obstore.get_range(client, shard, start=expert * slot, length=slot)

                    slots: SimpleQueue[memoryview] = SimpleQueue()
                    for _ in range(arguments.loaders):
                        slots.put(memoryview(mmap.mmap(-1, slot)))

                    def cached(expert: int, store: CachedStore = store, slots: Any = slots) -> None:
                        buffer = slots.get()
                        store.read_into(ExpertKey(0, expert), buffer)
                        slots.put(buffer)

                    rates["obstore"].append(rate(raw, slot, arguments))
                    rates["cached"].append(rate(cached, slot, arguments))
                shutil.rmtree(folder / f"cache{round_}")
    for what, measured in rates.items():
        print(
            f"{what:8} {statistics.median(measured) / 1e6:.0f} MB/s "
            f"({min(measured) / 1e6:.0f} to {max(measured) / 1e6:.0f})"
        )
    pairs = [ours / theirs for ours, theirs in zip(rates["cached"], rates["obstore"], strict=True)]
    print(f"ratio    {statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})")


def rate(work: Callable[[int], None], slot: int, arguments: argparse.Namespace) -> float:
    """Return the bytes a second of reading all records once."""
    began = time.perf_counter()
    with ThreadPoolExecutor(arguments.loaders) as pool:
        list(pool.map(work, range(arguments.records)))
    return arguments.records * slot / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
