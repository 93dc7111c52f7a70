"""``moetier bench disk DIR``: rate of the store's reader beside fio's."""

from __future__ import annotations

import argparse
import random
from functools import partial
from typing import TYPE_CHECKING, Any

from moetier.tiers.options import SECONDS
from moetier.tiers.text import format_bytes
from moetier.tools.cli.parser import add_directory
from moetier.tools.rates.hardware import Machine
from moetier.tools.rates.reads import GB, NO_FIO, RandomReads, fio_version, read_rate

from .output import Spread, add_bench_arguments, alternate, begin_bench, report

if TYPE_CHECKING:
    from moetier.tiers.store.base import Store

EXAMPLES = ("moetier bench disk ./mixtral-4bit",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier bench disk`."""
    add_directory(parser)
    parser.add_argument(
        "--seconds", type=SECONDS, default=3.0, metavar="S", help="seconds per run (default: %(default)s)"
    )
    add_bench_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command. Raises MoetierError."""
    from moetier.runtime.stores.registry import open_store
    from moetier.tiers.source import LOADERS

    began = begin_bench(arguments)
    fio = fio_version()
    with open_store(arguments.directory, damaged=True) as store:
        reads = RandomReads.of_records(arguments.directory)
        depths = (1, LOADERS)
        ways = {}
        for depth in depths:
            ways["moetier", depth] = partial(store_rate, store, reads.block_bytes, depth, arguments.seconds)
            ways["bound", depth] = partial(reads.rate, depth, arguments.seconds)
        measured = alternate(arguments.rounds, ways)
    rows, results = [["depth", "record", "moetier, GB/s", f"{reads.by}, GB/s", "ratio"]], list[dict[str, Any]]()
    for depth in depths:
        own, bound = Spread.of(measured["moetier", depth]), Spread.of(measured["bound", depth])
        ratio = own.median / bound.median
        rows.append([str(depth), format_bytes(reads.block_bytes), own.text(GB), bound.text(GB), f"{ratio:.2f}"])
        results.append(
            {
                "depth": depth,
                "record_bytes": reads.block_bytes,
                "bytes_per_s": own.to_json(),
                "bound_bytes_per_s": bound.to_json(),
                "ratio": ratio,
            }
        )
    page_cache = (
        "avoided (O_DIRECT)" if reads.is_direct else "dropped before each run; this file system has no O_DIRECT"
    )
    notes = [f"page cache {page_cache}", *([] if fio else [NO_FIO])]
    machine = Machine.here(place=arguments.directory, fio=fio)
    report(arguments, began, machine, rows, results, notes=notes, by=reads.by, page_cache=page_cache)


def store_rate(store: Store, record_bytes: int, depth: int, seconds: float) -> float:
    """Measure how many bytes per second the store reads of random records, and checks against their checksums.

    Only records of ``record_bytes`` are read. ``depth`` threads read for about ``seconds``.
    """
    from moetier.tiers.layout import ExpertKey

    keys = [
        ExpertKey(block, expert)
        for block, entry in enumerate(store.manifest.blocks)
        if store.layout(block).slot_bytes == record_bytes
        for expert in range(entry.experts)
    ]
    return read_rate(
        lambda buffer: store.read_into(random.choice(keys), buffer), record_bytes, depth=depth, seconds=seconds
    )
