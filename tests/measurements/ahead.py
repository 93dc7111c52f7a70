"""Measure products with records whose code prefetches codes, pairs, both or neither into the CPU's caches.

    python tests/measurements/ahead.py DIR

The four variants take turns in one process. Products have one row of inputs and random records with a layout of DIR.
Prints the GB/s of records that they multiply: medians (least to most).
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from moetier.runtime.kernels.jit.processor import Processor
from moetier.runtime.kernels.products.gemm_tile import TileEmitter
from moetier.runtime.kernels.products.packed import PackedKernels
from moetier.tiers.layout import RecordLayout
from moetier.tiers.store.folder import read_manifest, store_folder
from moetier.tools.bench.output import Spread, alternate
from moetier.tools.cli.report import table
from moetier.tools.rates.products import KernelProbe, projection_bytes, random_records

WAYS = {"both": (True, True), "codes": (True, False), "pairs": (False, True), "nothing": (False, False)}
UNCACHED = 512 << 20  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.15, help="of each way in a round (default: %(default)s)")
    arguments = parser.parse_args()
    layout = next(iter(read_manifest(store_folder(arguments.directory)).layouts.values()))
    print(f"machine  {platform.machine()}, {torch.get_num_threads()} threads; torch {torch.__version__}")
    records = random_records(layout, UNCACHED)
    probes = {way: KernelProbe(kernels_that(*asks, layout), layout, records) for way, asks in WAYS.items()}
    lines = [["projection", *(f"{way}, GB/s" for way in WAYS)]]
    for projection in layout.projections:
        ways: dict[str, Callable[[], float]] = {
            way: partial(probe.seconds, projection.name, 1, at_least=arguments.seconds) for way, probe in probes.items()
        }
        results = alternate(arguments.rounds, ways)
        nbytes = projection_bytes(layout, projection.name)
        rates = [Spread.of([nbytes / seconds / 1e9 for seconds in times]) for times in results.values()]
        lines.append([projection.name, *(rate.text() for rate in rates)])
    print(table(lines))


def kernels_that(ask_for_codes: bool, ask_for_pairs: bool, layout: RecordLayout) -> PackedKernels:
    """Compiled for all of a layout's projections."""
    processor = Processor()
    processor.has_stream_prefetch = not ask_for_codes
    kernels = PackedKernels(processor)
    pairs = TileEmitter._prefetch_pairs if ask_for_pairs else lambda *_: None
    with patch.object(TileEmitter, "_prefetch_pairs", pairs):
        for p in layout.projections:
            row = torch.zeros(1, p.columns, dtype=torch.bfloat16)
            kernels.project(row, torch.zeros(layout.record_bytes, dtype=torch.uint8), layout, p.name)
    return kernels


if __name__ == "__main__":
    main()
