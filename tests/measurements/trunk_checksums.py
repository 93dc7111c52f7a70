"""Compare the time to check a trunk's checksums with the time to load the model.

    python tests/measurements/trunk_checksums.py DIR

By turns, loads the model directory, without a daemon, and computes the checksums of its trunk's files; all files are in
the page cache. Prints the seconds of both, as medians (least to most), and the rate of the checksums. It also prints
how large a trunk may be if its checksums are to take a twentieth of this load. ``CHECKED_BYTES`` in
tiers/store/trunk.py must be below this size for small models, which load in the least time. If the trunk is at most
that large, the load itself includes the check.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from pathlib import Path

import moetier
from moetier.tiers.manifest import Manifest
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tiers.store.trunk import CHECKED_BYTES, check_sum
from moetier.tiers.text import format_bytes
from moetier.tools.bench.output import Spread, alternate

SHARE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    manifest = read_manifest(store_folder(arguments.directory))
    ways = {"load": lambda: load(arguments.directory), "checksums": lambda: check(arguments.directory, manifest)}
    for way in ways.values():  # not counted: imports, and files that come into the page cache
        way()
    spreads = {name: Spread.of(seconds) for name, seconds in alternate(arguments.rounds, ways).items()}
    size = sum(entry.bytes for entry in manifest.trunk.values())
    print(f"machine    {platform.machine()}, {os.cpu_count()} CPUs; {manifest.model}, a trunk of {format_bytes(size)}")
    for name, seconds in spreads.items():
        print(f"{name:<10} {seconds.text()} s")
    rate = size / spreads["checksums"].median
    share = spreads["checksums"].median / spreads["load"].median
    print(f"checksums  {rate / 1e9:.2f} GB/s, {share:.1%} of the load")
    most = int(rate * spreads["load"].median * SHARE)
    print(f"{SHARE:.0%} of this load are {format_bytes(most)}; up to {format_bytes(CHECKED_BYTES)} are checked")


def load(directory: Path) -> float:
    began = time.perf_counter()
    model, _ = moetier.load(directory, daemon=None)
    seconds = time.perf_counter() - began
    model.tiers.close()
    return seconds


def check(directory: Path, manifest: Manifest) -> float:
    began = time.perf_counter()
    for name, entry in manifest.trunk.items():
        for _ in check_sum(directory / name, entry, cached=True):
            pass
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
