"""``moetier trace DIR --prompts FILE -o T.npz``: generate, and record which experts were used."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import MOST, OPTIONS, Number
from moetier.runtime.generation.decoding import behind, encode, warn_if_cut, within_context
from moetier.tiers.errors import ConfigError, TargetError, TargetExistsError
from moetier.tools.cli.arguments import add_decoding_arguments, add_resource_arguments, decoding_of, resources_of
from moetier.tools.cli.loading import loaded
from moetier.tools.cli.parser import DIRECTORY, directory
from moetier.tools.cli.report import table

if TYPE_CHECKING:
    from moetier.runtime.trace.trace import Trace

LAYERS = Number(int, 0, MOST, "Give 0, for no predictions, to 2^31 - 1.")
PROMPT_KEYS = ("prompt", "turns", "text")  # keys of a JSON line that may hold the prompt; of "turns" the first is taken
EXAMPLES = ("moetier trace ./mixtral-4bit --prompts prompts.txt -o trace.npz",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier trace`."""
    parser.add_argument("directory", type=directory, metavar="DIR", help=DIRECTORY)
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='one prompt a line; from a .jsonl file each line\'s "prompt", "text" or first of "turns"',
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="T.npz", help="file of the new trace")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    parser.add_argument(
        "--look-ahead",
        type=LAYERS,
        default=2,
        metavar="N",
        help="how many layers ahead routers are asked for predictions (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object: what was recorded")
    add_decoding_arguments(parser, new_tokens=128)
    add_resource_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return 0. Raises MoetierError."""
    # no speculation: each forward pass is recorded, and need not be fast. --look-ahead is for the recorder
    resources = resources_of(arguments, speculate="off", look_ahead=OPTIONS["look_ahead"].default)
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
    return 0


def read_prompts(path: Path) -> list[str]:
    """Read the prompts of a file, one in each line of text or .jsonl; skip empty lines. Raises ConfigError."""
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{path}: can't be read ({why}).", "Give a text, or a .jsonl file.") from error
    filled = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise ConfigError(f"{path} has no prompts.", "Write one into each line.")
    is_json = path.suffix == ".jsonl"
    return [_prompt_of(line, f"{path}:{number}") if is_json else line for number, line in filled]


def _prompt_of(line: str, place: str) -> str:
    """Return the prompt of a line of JSON. Raises ConfigError if it has none; ``place`` names the line in the error."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is not JSON.", "Write one object into each line.") from error
    value = next((found[key] for key in PROMPT_KEYS if key in found), None) if isinstance(found, dict) else None
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{place} has no prompt.", f"Write it as one of {', '.join(PROMPT_KEYS)}.")
    return value


def _check_target(path: Path, *, force: bool) -> None:
    """Raise TargetError where the trace can't be written. Called before hours of work, and again before writing."""
    if not path.parent.is_dir():
        raise TargetError(f"{path.parent} is no folder.", "Make it, or name another with -o.")
    if path.is_dir():
        raise TargetExistsError(f"{path} is a folder.", "Name a file in it with -o.")
    if path.exists() and not force:
        raise TargetExistsError(f"{path} exists.", "Name another file with -o, or replace it with --force.")


def record(model: Any, tokenizer: Any, prompts: list[str], decoding: dict[str, Any], *, look_ahead: int) -> Trace:
    """Generate from each prompt, and record which experts each sequence uses.

    The last new token of a sequence is not recorded, as it is not fed to the model. ``decoding`` is as ``decoding_of``
    returns it; ``model`` is from ``load``. Raises ConfigError, before anything is recorded, for a prompt without tokens
    or with more than fit the model's context.
    """
    from moetier.runtime.trace.recorder import Recorder, pieces_of

    encoded = [encode(model, tokenizer, prompt, f"Prompt {number}") for number, prompt in enumerate(prompts, 1)]
    if nothing := [str(number) for number, inputs in enumerate(encoded, 1) if not inputs["input_ids"].numel()]:
        raise ConfigError(f"There are no tokens in prompt {', '.join(nothing)}.", "Leave it out.")
    with Recorder(model, look_ahead=look_ahead) as recorder:
        if recorder.refusals is not None:
            print(f"trace: {recorder.refusals}", file=sys.stderr)
        for number, inputs in enumerate(encoded, 1):
            length = inputs["input_ids"].shape[1]
            limited = within_context(model, length, decoding)
            token_ids = model.generate(**inputs, **behind(length, limited), use_cache=True)[0, :-1].tolist()
            warn_if_cut(model, length, len(token_ids) + 1 - length, decoding)
            recorder.end_sequence(token_ids, n_prefill=length, pieces=pieces_of(tokenizer, token_ids))
            print(f"trace: {number} of {len(prompts)} prompts", file=sys.stderr)
        manifest = model.tiers.manifest
        return recorder.trace(model=manifest.model, digest=manifest.digest)


def to_json(path: Path, trace: Trace) -> dict[str, Any]:
    """Return the sizes of a trace and the recall of its predictions as JSON."""
    from moetier.runtime.trace.recall import compare

    return {
        "trace": str(path),
        "model": trace.model,
        "sequences": len(trace.sequences),
        "tokens": trace.tokens,
        "blocks": trace.block_count,
        "top_k": trace.top_k,
        "recall": [asdict(found) for found in compare(trace)] if trace.lookaheads else [],
    }


def summary(trace: Trace) -> str:
    """Describe a trace as text: its sizes, and the recall of the experts that gates predicted."""
    from moetier.runtime.trace.recall import RULES, compare

    head = f"{len(trace.sequences)} sequences, {trace.tokens:,} tokens, {trace.block_count} blocks, top {trace.top_k}"
    if not trace.lookaheads:
        return head
    rows = [["recall", *RULES], *([f"{found.lookahead} ahead", *found.cells()] for found in compare(trace))]
    return f"{head}\n{table(rows)}"
