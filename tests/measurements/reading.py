"""Measure how fast one or four threads read and check records, and how fast a restarted daemon checks its slots.

    taskset -c 0,1 python tests/measurements/reading.py [FOLDER]

Writes stores with records of 2.6 MB and of 88 MB into FOLDER, by default /dev/shm. On such a tmpfs, a read is a copy in
memory, so the time of checksums is not hidden by the disk. For the restart, ``HostTier`` takes over a filled arena, as
a daemon takes over the arena of a daemon that was killed.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent / "helpers"))

from stores import layout_of, make_store

from moetier.tiers.arena.arena import Arena
from moetier.tiers.arena.layout import ArenaLayout
from moetier.tiers.host.tier import HostTier
from moetier.tiers.layout import ExpertKey
from moetier.tiers.store.reader import ShardStore
from moetier.tools.bench.disk import store_rate

GEOMETRIES = {"2.6 MB": (layout_of(424, 1024), 2, 128), "88 MB": (layout_of(3584, 4096), 2, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("/dev/shm"))
    parser.add_argument("--seconds", type=float, default=3.0, metavar="S", help="of each run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="medians are of (default: %(default)s)")
    arguments = parser.parse_args()
    print(f"machine  {platform.machine()}, {len(os.sched_getaffinity(0))} CPUs; medians of {arguments.rounds} rounds")
    for name, (layout, blocks, experts) in GEOMETRIES.items():
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            make_store(Path(folder), blocks=blocks, experts=experts, layout=layout)
            reads(name, Path(folder), arguments.seconds, arguments.rounds)
            with ShardStore.open(Path(folder)) as store:
                restarts(store, arguments.rounds)


def reads(name: str, folder: Path, seconds: float, rounds: int) -> None:
    """A reader of large records uses several threads by itself: on one core it shows what a core reads and checks."""
    cores = os.sched_getaffinity(0)
    ways = {"one core, 1 reader": ({min(cores)}, 1), "1 reader": (cores, 1), "4 readers": (cores, 4)}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    used: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, (allowed, readers) in ways.items():
            os.sched_setaffinity(0, allowed)  # threads inherit it, those of the store too
            try:
                with ShardStore.open(folder) as store:
                    before = time.process_time()
                    rates[way].append(store_rate(store, store.layout(0).slot_bytes, readers, seconds))
                    used[way].append((time.process_time() - before) / seconds)
            finally:
                os.sched_setaffinity(0, cores)
    four = median(rates["4 readers"])
    for way, measured in rates.items():
        compared = "" if way == "4 readers" else f"; 4 readers are {four / median(measured):.2f} times as fast"
        print(f"{name:<8} {way}: {median(measured) / 1e9:.2f} GB/s, {median(used[way]):.1f} cores busy{compared}")


def restarts(store: ShardStore, rounds: int) -> None:
    """Fills an arena, and takes it back as a daemon takes that of a killed one."""
    manifest = store.manifest
    slots = dict.fromkeys(manifest.layouts, manifest.record_count)
    arena = Arena.create(ArenaLayout.of(manifest, slots))
    descriptor = arena.export()
    try:
        with HostTier(store, slots=slots, arena=arena) as tier:
            for block, entry in enumerate(manifest.blocks):
                assert all(
                    lease.validate() for lease in tier.acquire([ExpertKey(block, e) for e in range(entry.experts)])
                )
        times = []
        for _ in range(rounds):
            arena = Arena.reclaim(descriptor, manifest)
            began = time.perf_counter()
            with HostTier(store, slots=slots, arena=arena) as tier:
                times.append(time.perf_counter() - began)
                assert tier.recovered == manifest.record_count
    finally:
        os.close(descriptor)
    rate = manifest.stored_bytes / median(times) / 1e9
    print(f"{'':<8} restart: {manifest.record_count} slots taken back and checked at {rate:.2f} GB/s")


if __name__ == "__main__":
    main()
