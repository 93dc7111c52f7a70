"""``moetier trace DIR --prompts FILE -o T.npz``: generate text, and record which experts are used."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetier.runtime.config import OPTIONS, PREFILL_CHUNK
from moetier.runtime.generation.decoding import behind, chunks_of, encode, warn_if_cut, within_context
from moetier.runtime.options import MOST, Number
from moetier.tiers.errors import ConfigError, TargetError, TargetExistsError
from moetier.tools.cli.arguments import add_decoding_arguments, add_resource_arguments, decoding_of, resources_of
from moetier.tools.cli.loading import loaded
from moetier.tools.cli.parser import DIRECTORY, check_utf8, directory
from moetier.tools.cli.report import table

if TYPE_CHECKING:
    from moetier.runtime.trace.trace import Trace

LAYERS = Number(int, 0, MOST, "Give 0 to 2^31 - 1; with 0, no predictions are recorded.")
PROMPT_KEYS = ("prompt", "turns", "text")  # keys of a JSON line that may hold the prompt, or a list that begins with it
EXAMPLES = ("moetier trace ./mixtral-4bit --prompts prompts.txt -o trace.npz",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moetier trace`."""
    parser.add_argument("directory", type=directory, metavar="DIR", help=DIRECTORY)
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
    parser.add_argument("--json", action="store_true", help="print one JSON object that describes the trace")
    add_decoding_arguments(parser, new_tokens=128)
    add_resource_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command and return 0. Raises MoetierError."""
    # without speculation, because a recording need not be fast; --look-ahead is an option of the recorder
    resources = resources_of(
        arguments, speculate="off", look_ahead=OPTIONS["look_ahead"].default, prefill_chunk=PREFILL_CHUNK
    )
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
    """Return the prompts of a file: one in each line of text or of .jsonl. Empty lines are skipped.

    Raises ConfigError if the file can't be read, has no prompts, or has a line of JSON without a prompt.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{path} can't be read ({why}).", "Name a text file or a .jsonl file.") from error
    filled = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise ConfigError(f"{path} has no prompts.", "Write one prompt into each line.")
    is_json = path.suffix == ".jsonl"
    return [_prompt_of(line, f"{path}:{number}") if is_json else line for number, line in filled]


def _prompt_of(line: str, place: str) -> str:
    """Return the prompt of a line of JSON. Raises ConfigError if it has none; ``place`` names the line in the error."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place} is not JSON.", "Write one JSON object into each line.") from error
    value = next((found[key] for key in PROMPT_KEYS if key in found), None) if isinstance(found, dict) else None
    if isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{place} has no prompt.", f"Give it as the value of one of {', '.join(PROMPT_KEYS)}.")
    return check_utf8(value, f"The prompt of {place}")  # JSON may contain half of a surrogate pair


def _check_target(path: Path, *, force: bool) -> None:
    """Check that the trace can be written, before hours of work and again before writing. Raises TargetError."""
    if not path.parent.is_dir():
        raise TargetError(f"{path.parent} is not a folder.", "Create it, or name a file in another folder with -o.")
    if path.is_dir():
        raise TargetExistsError(f"{path} is a folder.", "Name a file in this folder with -o.")
    if path.exists() and not force:
        raise TargetExistsError(f"{path} exists.", "Name another file with -o, or replace this one with --force.")


def record(model: Any, tokenizer: Any, prompts: list[str], decoding: dict[str, Any], *, look_ahead: int) -> Trace:
    """Generate text from each prompt, and return a trace of the experts that each sequence uses.

    The last new token of a sequence is not recorded, because it is not fed to the model. ``model`` is from ``load``,
    and ``decoding`` from ``decoding_of``. ``look_ahead`` is the number of layers ahead for which the predictions of
    gates are recorded. Raises ConfigError, before anything is recorded, if a prompt has no tokens, or more than fit
    into the model's context.
    """
    from moetier.runtime.trace.recorder import Recorder, pieces_of

    encoded = [encode(model, tokenizer, prompt, f"Prompt {number}") for number, prompt in enumerate(prompts, 1)]
    if nothing := [str(number) for number, inputs in enumerate(encoded, 1) if not inputs["input_ids"].numel()]:
        raise ConfigError(f"There are no tokens in prompt {', '.join(nothing)}.", "Remove such prompts from the file.")
    with Recorder(model, look_ahead=look_ahead) as recorder:
        if recorder.refusals is not None:
            print(f"trace: {recorder.refusals}", file=sys.stderr)
        for number, inputs in enumerate(encoded, 1):
            length = inputs["input_ids"].shape[1]
            limited = within_context(model, length, decoding)
            given = behind(length, limited) | chunks_of(model, length, model.tiers.prefill_chunk)
            token_ids = model.generate(**inputs, **given, use_cache=True)[0, :-1].tolist()
            warn_if_cut(model, length, len(token_ids) + 1 - length, decoding)
            recorder.end_sequence(token_ids, n_prefill=length, pieces=pieces_of(tokenizer, token_ids))
            print(f"trace: {number} of {len(prompts)} prompts", file=sys.stderr)
        manifest = model.tiers.manifest
        return recorder.trace(model=manifest.model, digest=manifest.digest)


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
        "recall": [asdict(found) for found in compare(trace)] if trace.lookaheads else [],
    }


def summary(trace: Trace) -> str:
    """Return a description of a trace as text: its sizes, and the recall of the gates' predictions."""
    from moetier.runtime.trace.recall import RULES, compare

    head = f"{len(trace.sequences)} sequences, {trace.tokens:,} tokens, {trace.block_count} blocks, top {trace.top_k}"
    if not trace.lookaheads:
        return head
    rows = [["recall", *RULES], *([f"{found.lookahead} ahead", *found.cells()] for found in compare(trace))]
    return f"{head}\n{table(rows)}"
