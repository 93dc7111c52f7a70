"""``moetier quality SRC --text FILE...``: measure the size and the perplexity for each way of storing weights."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.runtime.machine.memory import shortage
from moetier.tiers.errors import ConfigError
from moetier.tiers.layout import TRUNK_BITS
from moetier.tiers.options import MAX_COUNT, Number
from moetier.tiers.text import format_bytes
from moetier.tools.cli.arguments import add_bits, add_resource_arguments, asked, numbers, resources_of
from moetier.tools.cli.parser import UsageError, add_json, checked, source
from moetier.tools.cli.report import table
from moetier.tools.convert.options import CONVERT_OPTIONS

if TYPE_CHECKING:
    from moetier.tools.quality.quality import Row

_log = logging.getLogger(__name__)

EXAMPLES = (
    "moetier quality ./Mixtral-8x7B-v0.1 --text book.txt --bits 4,3,2",
    "moetier quality ./mixtral-4bit --text texts/ --json",
)

TOKENS = Number(int, 2, MAX_COUNT, "Give 2 to 2^31 - 1: a perplexity needs at least two tokens.")
METHODS = ("hqq", "rounding")
WAYS = ("bits", "group_size", "pairs", "trunk_bits", "method")  # options whose combinations are measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier quality`."""
    parser.add_argument(
        "source",
        type=source,
        metavar="SRC",
        help="a checkpoint, which is quantised in memory in each of the given ways; or a model directory or pulled "
        "model (ID:TAG), which is measured as it is",
    )
    parser.add_argument(
        "--text", nargs="+", type=Path, required=True, metavar="PATH", help="text files, or folders with .txt files"
    )
    parser.add_argument(
        "--tokens",
        type=TOKENS,
        default=3072,
        metavar="N",
        help="number of tokens to measure from the beginning of each text (default: %(default)s)",
    )
    add_bits(parser, TRUNK_BITS[:1])
    parser.add_argument(
        "--group-size",
        type=numbers,
        metavar="N,...",
        help=CONVERT_OPTIONS["group_size"].help,
    )
    parser.add_argument("--pairs", type=_names, metavar="TYPE,...", help=CONVERT_OPTIONS["pairs"].help)
    parser.add_argument(
        "--method", type=_methods, metavar="NAME,...", help=f"{', '.join(METHODS)}, or both (default: {METHODS[0]})"
    )
    parser.add_argument("--fast", action="store_true", help="the same as --method rounding, as in moetier convert")
    add_json(parser)
    add_resource_arguments(parser)


def _names(value: str) -> list[str]:
    return value.split(",")


def _methods(value: str) -> list[str]:
    methods = list(dict.fromkeys(_names(value)))
    if not set(methods) <= set(METHODS):
        raise ConfigError(f"{value!r} has an unknown method.", f"Give one or both of {', '.join(METHODS)}.")
    return methods


def run(arguments: argparse.Namespace) -> None:
    """Run the command. Raises MoetierError."""
    converted = (Path(arguments.source) / "experts.zarr").is_dir()
    if arguments.fast and arguments.method not in (None, ["rounding"]):
        raise UsageError("--fast means --method rounding, but --method names another.", "Leave out --fast or --method.")
    if converted and any(asked(arguments, name) for name in (*WAYS, "fast")):
        raise ConfigError(
            f"{arguments.source} is converted already: it can only be measured as it is.",
            "Leave out --bits, --trunk-bits, --group-size, --pairs, --method and --fast, or name the checkpoint.",
        )
    resources = resources_of(arguments)
    if not converted and resources != resources_of(_defaults(arguments)) | {"threads": arguments.threads}:
        raise ConfigError(
            f"{arguments.source} is a checkpoint: it is measured in memory, without tiers.",
            "Leave out --ram, --device, --daemon and other options of tiers, or name a model directory.",
        )
    if short := shortage():
        _log.warning("%s", short)
    import transformers

    from moetier.runtime.devices.device import turn_off_onednn_where_barred
    from moetier.runtime.machine.threads import use_threads
    from moetier.tools.quality.quality import measure_checkpoint, measure_directory, read_texts, ways_of

    transformers.utils.logging.disable_progress_bar()
    texts = read_texts(arguments.text)
    use_threads(arguments.threads)
    turn_off_onednn_where_barred()
    if converted:
        rows = [measure_directory(Path(arguments.source), texts, arguments.tokens, resources)]
    else:
        methods = arguments.method or ["rounding" if arguments.fast else "hqq"]
        with checked():
            ways = ways_of(arguments.bits, arguments.group_size, arguments.pairs, arguments.trunk_bits, methods)
        rows = []
        for row in measure_checkpoint(arguments.source, texts, arguments.tokens, ways):
            rows.append(row)
            print(f"quality: {len(rows)} of {len(ways) + 1} measured", file=sys.stderr)
    result = {"model": arguments.source, "tokens": arguments.tokens, "rows": to_json(rows)}
    print(json.dumps(result) if arguments.json else report(rows))


def _defaults(arguments: argparse.Namespace) -> argparse.Namespace:
    """Return the resource options of an empty command line: values from the settings, or else the built-in defaults."""
    parser = argparse.ArgumentParser()
    add_resource_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args([])) | arguments.configured)


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the rows as JSON, each with its rank and the change of its perplexity from the first row."""
    from moetier.tools.quality.quality import PerplexityChange, ranks

    places = ranks([row.loss for row in rows])
    results = []
    for number, row in enumerate(rows):
        change = PerplexityChange.of(row.loss, rows[0].loss)
        errors = {"change": change.relative, "change_error": change.relative_error}
        results.append(row.to_json() | errors | {"rank": places[number] if places else None})
    return results


def report(rows: Sequence[Row]) -> str:
    """Return the rows as a table: perplexity of all texts, its change from the first row, rank, perplexity of each."""
    from moetier.tools.quality.quality import MIN_WINDOWS, PerplexityChange, ranks

    names = list(rows[0].losses)
    places = ranks([row.loss for row in rows])
    trunk = any(row.trunk_bits != 16 for row in rows)
    head = ["bits", *(["trunk"] * trunk), "group", "pairs", "method", "experts", "bits/weight", "error"]
    lines = [[*head, "perplexity", "change", *(["rank"] if places else []), *names]]
    for number, row in enumerate(rows):
        change = PerplexityChange.of(row.loss, rows[0].loss)
        error = "" if change.relative_error is None else f" ± {change.relative_error:.2%}".removesuffix("%")
        lines.append(
            [
                "as it is" if row.bits is None else str(row.bits),
                *([str(row.trunk_bits)] * trunk),
                row.group,
                row.pairs,
                row.method,
                "" if row.stored_bytes is None else format_bytes(row.stored_bytes),
                "" if row.bits_per_weight is None else f"{row.bits_per_weight:.3f}",
                "" if row.error is None else f"{row.error:.4f}",
                f"{row.perplexity:.3f}",
                "" if row is rows[0] else f"{change.relative * 100:+.2f}{error} %",
                *(["-".join(map(str, dict.fromkeys(places[number])))] if places else []),
                *(f"{row.losses[name].perplexity:.2f}" for name in names),
            ]
        )
    if len(rows) == 1:
        return table(lines)
    windows = len(rows[0].loss.windows)
    notes = []
    if windows > 1:
        notes += [
            f"±: standard error of the change, of {windows} windows, each compared with the same one in the first row."
        ]
    if places:
        notes += [
            "rank: the places that a row may have. Two rows that differ by less than two standard errors share places."
        ]
    else:
        notes += [f"No ranks: with fewer than {MIN_WINDOWS} windows the standard error itself is uncertain."]
    return "\n".join([table(lines), *notes])
