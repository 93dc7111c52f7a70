"""``moetier trace DIR --prompts FILE -o T.npz``: generate text, and record which experts are used."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import TIER_OPTIONS
from moetier.tiers.errors import TargetError, TargetExistsError
from moetier.tiers.options import MAX_COUNT, Number
from moetier.tools.cli.arguments import add_decoding_arguments, add_resource_arguments, decoding_of, resources_of
from moetier.tools.cli.loading import loaded
from moetier.tools.cli.parser import add_directory, add_json
from moetier.tools.cli.report import table
from moetier.tools.traces.recording import read_prompts, record

if TYPE_CHECKING:
    from moetier.runtime.trace.trace import Trace

LAYERS = Number(int, 0, MAX_COUNT, "Give 0 to 2^31 - 1; with 0, no predictions are recorded.")
EXAMPLES = ("moetier trace ./mixtral-4bit --prompts prompts.txt -o trace.npz",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier trace`."""
    add_directory(parser)
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='file with a prompt in each line; in a .jsonl file the prompt is "prompt", "text" or the first of "turns"',
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="T.npz", help="trace file to write")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument(
        "--look-ahead",
        type=LAYERS,
        default=2,
        metavar="N",
        help="number of layers ahead for which predictions of the routers are recorded (default: %(default)s)",
    )
    add_json(parser, "one JSON object that describes the trace")
    add_decoding_arguments(parser, new_tokens=128)
    add_resource_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Run the command. Raises MoetierError."""
    # without speculation, because a recording need not be fast; --look-ahead is an option of the recorder
    resources = resources_of(arguments, speculate="off", look_ahead=TIER_OPTIONS["look_ahead"].default)
    decoding = decoding_of(arguments)
    prompts = read_prompts(arguments.prompts)
    _check_target(arguments.output, force=arguments.force)

    with loaded(arguments.directory, resources) as (model, tokenizer, _):
        import torch

        torch.manual_seed(arguments.seed)
        trace = record(model, tokenizer, prompts, decoding, look_ahead=arguments.look_ahead)
    _check_target(arguments.output, force=arguments.force)
    trace.save(arguments.output)
    print(json.dumps(to_json(arguments.output, trace)) if arguments.json else f"{arguments.output}: {summary(trace)}")


def _check_target(path: Path, *, force: bool) -> None:
    """Check that the trace can be written, before hours of work and again before writing. Raises TargetError."""
    if not path.parent.is_dir():
        raise TargetError(f"{path.parent} is not a folder.", "Create it, or name a file in another folder with -o.")
    if path.is_dir():
        raise TargetExistsError(f"{path} is a folder.", "Name a file in this folder with -o.")
    if path.exists() and not force:
        raise TargetExistsError(f"{path} exists.", "Name another file with -o, or replace this one with --force.")


def to_json(path: Path, trace: Trace) -> dict[str, Any]:
    """Return the file, the sizes and the recall of the predictions of a trace as JSON."""
    from moetier.runtime.trace.recall import compare

    return {
        "trace": str(path),
        "model": trace.model,
        "sequences": len(trace.sequences),
        "tokens": trace.tokens,
        "blocks": trace.block_count,
        "top_k": trace.top_k,
        "recall": [asdict(recall) for recall in compare(trace)] if trace.lookaheads else [],
    }


def summary(trace: Trace) -> str:
    """Return a description of a trace as text: its sizes, and the recall of the gates' predictions."""
    from moetier.runtime.trace.recall import RULES, compare

    head = f"{len(trace.sequences)} sequences, {trace.tokens:,} tokens, {trace.block_count} blocks, top {trace.top_k}"
    if not trace.lookaheads:
        return head
    rows = [["recall", *RULES], *([f"{recall.lookahead} ahead", *recall.cells()] for recall in compare(trace))]
    return f"{head}\n{table(rows)}"
