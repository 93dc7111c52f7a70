"""``moetier bench kernels``: the speed of matrix products with expert records, beside the memory's read bandwidth."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import TIER_OPTIONS
from moetier.tiers.layout import BITS, Bits, Projection, RecordLayout
from moetier.tiers.options import COUNT, SECONDS
from moetier.tools.cli.arguments import add_option
from moetier.tools.cli.parser import UsageError, directory
from moetier.tools.cli.report import format_seconds
from moetier.tools.rates import products as rates
from moetier.tools.rates.hardware import Machine
from moetier.tools.rates.reads import GB

from .output import Spread, add_bench_arguments, alternate, begin_bench, report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

EXAMPLES = ("moetier bench kernels --bits 4 --rows 1",)

ROWS = (1, 4, 16, 64, 512)
MEMORY = ("", 0)  # key of the measurement of memory, beside the products' keys (projection, rows)
EXPERTS = {  # hidden and intermediate size
    "Mixtral-8x7B": (4096, 14336),
    "Qwen3-30B-A3B": (2048, 768),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier bench kernels`."""
    parser.add_argument(
        "directory",
        type=directory,
        nargs="?",
        metavar="DIR",
        help=f"a model directory, whose records are measured (default: {' and '.join(EXPERTS)})",
    )
    parser.add_argument(
        "--bits",
        type=int,
        choices=BITS,
        action="append",
        help="bits per weight; may be repeated; not with DIR (default: all)",
    )
    parser.add_argument(
        "--rows",
        type=COUNT,
        action="append",
        metavar="N",
        help=f"rows of inputs; may be repeated (default: {', '.join(map(str, ROWS))})",
    )
    parser.add_argument(
        "--seconds", type=SECONDS, default=0.3, metavar="S", help="seconds per multiplication (default: %(default)s)"
    )
    add_option(parser, TIER_OPTIONS["threads"])
    add_bench_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command. Raises MoetierError."""
    began = begin_bench(arguments)
    rows = arguments.rows or list(ROWS)
    layouts = dict(_layouts(arguments))
    import torch

    from moetier.runtime.devices.cpu import Cpu
    from moetier.runtime.machine.threads import use_threads

    use_threads(arguments.threads)
    table = [["projection", "bits", "rows", "GB/s", "memory, GB/s", "ratio", "GFLOP/s", "ms"]]
    results: list[dict[str, Any]] = []
    products = sum(len(layout.projections) for layout in layouts.values()) * len(rows)
    least = format_seconds(arguments.rounds * products * arguments.seconds)
    print(f"bench kernels: this takes at least {least}", file=sys.stderr, flush=True)
    for title, layout in layouts.items():
        probe = rates.KernelProbe(Cpu().kernels(), layout, rates.random_records(layout, rates.UNCACHED_BYTES))
        ways: dict[tuple[str, int], Callable[[], Any]] = {MEMORY: partial(rates.memory_rate, rates.UNCACHED_BYTES)}
        for p, count in product(layout.projections, rows):
            ways[p.name, count] = partial(probe.seconds, p.name, count, at_least=arguments.seconds)
        measured = alternate(arguments.rounds, ways)
        for p, count in product(layout.projections, rows):
            nbytes = rates.projection_bytes(layout, p.name)
            result = result_of(title, p, count, nbytes, Spread.of(measured[p.name, count]), measured[MEMORY])
            results.append(result)
            table.append(_row(result))
    dtype = str(rates.activation_dtype()).removeprefix("torch.")
    by = " or ".join(sorted({result["bound_by"] for result in results}))
    notes = [f"memory   read at the rate of torch's {by} over 512 MiB, whichever is quickest; activations in {dtype}"]
    report(
        arguments, began, Machine.here(threads=torch.get_num_threads()), table, results, notes=notes, activations=dtype
    )


def result_of(
    title: str, p: Projection, rows: int, nbytes: int, seconds: Spread, memory: Sequence[tuple[float, str]]
) -> dict[str, Any]:
    """Return one row of the table as JSON.

    A product of ``rows`` rows with the projection ``p`` takes ``seconds`` and reads ``nbytes`` of the record.
    ``memory`` has results of ``memory_rate``, by round.
    """
    rate, bound = Spread.of(nbytes / s for s in seconds.runs), Spread.of(memory_rate for memory_rate, _ in memory)
    return {
        "records": title,
        "projection": p.name,
        "outputs": p.rows,
        "inputs": p.columns,
        "bits": p.bits,
        "rows": rows,
        "bytes": nbytes,
        "seconds": seconds.to_json(),
        "bytes_per_s": rate.to_json(),
        "bound_bytes_per_s": bound.to_json(),
        "bound_by": memory[-1][1],
        "ratio": rate.median / bound.median,
        "flops_per_s": 2 * rows * p.rows * p.columns / seconds.median,
    }


def _row(result: dict[str, Any]) -> list[str]:
    return [
        f"{result['records']} {result['projection']} {result['outputs']}x{result['inputs']}",
        str(result["bits"]),
        str(result["rows"]),
        Spread(tuple(result["bytes_per_s"]["runs"])).text(GB),
        Spread(tuple(result["bound_bytes_per_s"]["runs"])).text(GB, 1),
        f"{result['ratio']:.2f}",
        f"{result['flops_per_s'] / 1e9:.1f}",
        f"{1e3 * result['seconds']['median']:.3f}",
    ]


def _layouts(arguments: argparse.Namespace) -> Iterator[tuple[str, RecordLayout]]:
    """Yield the title and the record layout of everything to measure."""
    if arguments.directory is not None:
        from moetier.runtime.stores.registry import read_manifest

        if arguments.bits:
            raise UsageError(
                "--bits changes nothing with DIR, whose records have their own bits.",
                "Leave out --bits, or leave out DIR.",
            )
        yield from read_manifest(arguments.directory).layouts.items()
        return
    for title, (hidden, inner) in EXPERTS.items():
        for bits in arguments.bits or BITS:
            yield f"{title}, {bits} bits", expert_layout(hidden, inner, bits)


def expert_layout(hidden: int, inner: int, bits: Bits) -> RecordLayout:
    """Return the record layout of an expert with gate, up and down projections, as ``moetier convert`` makes it.

    ``hidden`` and ``inner`` are the hidden and the intermediate size.
    """
    from moetier.tiers.quant.codec import layout_for

    shapes = {"gate_up_proj": ((2 * inner, hidden), "bfloat16"), "down_proj": ((hidden, inner), "bfloat16")}
    return layout_for(shapes, bits=bits)
