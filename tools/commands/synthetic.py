"""``moetier synthetic``: make a model with a large model's shapes and random weights, to try out a machine."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import TIER_OPTIONS
from moetier.runtime.generation.decoding import DECODING
from moetier.tiers.options import COUNT
from moetier.tiers.text import format_bytes
from moetier.tools.cli.arguments import add_option
from moetier.tools.cli.parser import UsageError, add_json
from moetier.tools.synthetic.checkpoint import (
    GEOMETRIES,
    ROUTINGS,
    WHOLE,
    curve_table,
    lru_curve,
)

if TYPE_CHECKING:
    from moetier.tools.convert.conversion import ConversionReport

EXAMPLES = (
    "moetier synthetic build/mixtral-4L --store build/mixtral-4L-4bit",
    "moetier synthetic build/qwen3-30b --geometry qwen3-30b-a3b",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier synthetic`."""
    parser.add_argument(
        "target",
        metavar="DST",
        type=Path,
        help="folder for the new checkpoint or, if --geometry is a whole model, for the new model directory",
    )
    parser.add_argument(
        "--geometry",
        choices=GEOMETRIES,
        default="mixtral-4L",
        help=f"model whose shapes to use; {' and '.join(WHOLE)} are whole models, written without a checkpoint "
        "(default: %(default)s)",
    )
    parser.add_argument("--blocks", type=COUNT, metavar="N", help="number of blocks (default: the geometry's own)")
    add_option(parser, replace(DECODING["seed"], help="seed of the weights"))
    parser.add_argument(
        "--store",
        type=Path,
        metavar="DIR",
        help="also convert the checkpoint to 4 bits, by rounding, into DIR; compare its routing with that of a trained "
        "model",
    )
    add_option(parser, TIER_OPTIONS["threads"])
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return 0, or 128 plus the signal's number if one stopped it. Raises MoetierError."""
    if arguments.geometry in WHOLE:
        return _run_whole(arguments)
    from moetier.runtime.machine.threads import use_threads
    from moetier.tools.synthetic.tensors import make_synthetic

    use_threads(arguments.threads)
    size = make_synthetic(
        arguments.target, geometry=arguments.geometry, blocks=arguments.blocks, seed=arguments.seed, quiet=False
    )
    report: dict[str, Any] = {"checkpoint": str(arguments.target), "bytes": size, "store": None, "hit_ratio": {}}
    if not arguments.json:
        print(f"{arguments.target}: {format_bytes(size)}", flush=True)
    if arguments.store is not None:
        from moetier.tools.synthetic.store import convert_synthetic, routing_of

        convert_synthetic(arguments.target, arguments.store, threads=arguments.threads, quiet=False)
        trace = routing_of(arguments.store, threads=arguments.threads)
        if not arguments.json:
            print(curve_table(arguments.geometry, trace))
        else:
            curve = lru_curve(trace, list(ROUTINGS[arguments.geometry].curve))
            report |= {"store": str(arguments.store), "hit_ratio": curve}
    if arguments.json:
        print(json.dumps(report))
    return 0


def _run_whole(arguments: argparse.Namespace) -> int:
    from .convert import report_of

    if arguments.store is not None:
        raise UsageError(
            f"{arguments.geometry} is written as a model directory at once. --store is for what is converted.",
            "Leave out --store.",
        )

    def make() -> ConversionReport:
        from moetier.tools.synthetic.store import make_store

        return make_store(
            arguments.target,
            geometry=arguments.geometry,
            blocks=arguments.blocks,
            seed=arguments.seed,
            threads=arguments.threads,
            quiet=False,
        )

    return report_of(make, arguments.json)
