"""``moetier bench disk DIR``: how near the store's reader comes to what the disk gives."""

from __future__ import annotations

import argparse
import random
from functools import partial
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import format_bytes
from moetier.runtime.number import SECONDS
from moetier.tools.cli.options import DIRECTORY, directory

from .disk_rate import NO_FIO, RandomReads, fio_version, read_rate
from .machine import Machine
from .output import add_bench_arguments, check_bench, report
from .rounds import Spread, alternate

if TYPE_CHECKING:
    from moetier.tiers.store.reader import ExpertStore

EXAMPLES = ("moetier bench disk ./mixtral-4bit",)

GB = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=directory, metavar="DIR", help=DIRECTORY)
    parser.add_argument(
        "--seconds", type=SECONDS, default=3.0, metavar="S", help="seconds per run (default: %(default)s)"
    )
    add_bench_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    from moetier.tiers.host.tier import LOADERS
    from moetier.tiers.store.reader import ExpertStore

    check_bench(arguments)
    fio = fio_version()
    with ExpertStore.open(arguments.directory) as store:
        reads = RandomReads.of_records(arguments.directory, direct=store.direct)
        depths = (1, LOADERS)
        ways = {}
        for depth in depths:
            ways["moetier", depth] = partial(store_rate, store, reads.block_bytes, depth, arguments.seconds)
            ways["bound", depth] = partial(reads.rate, depth, arguments.seconds)
        found = alternate(arguments.rounds, ways)
    rows, results = [["depth", "record", "moetier, GB/s", f"{reads.by}, GB/s", "ratio"]], list[dict[str, Any]]()
    for depth in depths:
        own, bound = Spread.of(found["moetier", depth]), Spread.of(found["bound", depth])
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
    page_cache = "avoided (O_DIRECT)" if reads.direct else "dropped before each read; this file system has no O_DIRECT"
    notes = [f"page cache {page_cache}", *([] if fio else [NO_FIO])]
    machine = Machine.here(place=arguments.directory, fio=fio)
    return report(arguments, machine, rows, results, notes=notes, by=reads.by, page_cache=page_cache)


def store_rate(store: ExpertStore, record_bytes: int, depth: int, seconds: float) -> float:
    """Bytes a second of whole records, at random among those of that size, checksums proved."""
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
